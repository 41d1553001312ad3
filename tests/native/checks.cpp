// Checks of the kernels against plain loops in double precision, without MLX and Python.
//
//     g++ -std=c++20 -O2 -march=native -pthread -I mlx_openelm/native/src tests/native/checks.cpp -o checks
//     ./checks [--seed N] [group ...]
//
// Buffers have exactly the length of their contents, so that the address sanitizer detects every read outside of them.

#include "check_attention.h"
#include "check_elementwise.h"
#include "check_instructions.h"
#include "check_products.h"
#include "check_threads.h"

int main(int count, char** arguments) {
  const std::vector<std::pair<std::string, void (*)()>> groups = {
      {"loads", check_loads},
      {"arithmetic", check_arithmetic},
      {"packing", check_packing},
      {"few_rows", check_few_rows},
      {"extreme_rows", check_extreme_rows},
      {"many_rows", check_many_rows},
      {"rms_norm", check_norms},
      {"log_softmax", check_log_softmax},
      {"swiglu", check_swiglu},
      {"split_heads", check_split_heads},
      {"attention", check_attention},
      {"attention_gradient", check_attention_gradient},
      {"pool", check_pool},
      {"fork", check_fork},
  };
  unsigned seed = 0;
  std::vector<std::string> wanted;
  for (int i = 1; i < count; i++) {
    std::string argument = arguments[i];
    if (argument == "--seed" && i + 1 < count) seed = unsigned(std::stoul(arguments[++i]));
    else wanted.push_back(argument);
  }
  std::printf("%d lanes, %d registers, seed %u\n", kLanes, kRegisters, seed);
  for (auto& [name, run] : groups) {
    if (!wanted.empty() && std::find(wanted.begin(), wanted.end(), name) == wanted.end()) continue;
    generator.seed(seed);  // so that a group run alone gets the same numbers
    int before = passed, failed_before = failed;
    run();
    std::printf("%-20s %d passed, %d failed\n", name.c_str(), passed - before, failed - failed_before);
    std::fflush(stdout);
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed || !passed;
}
