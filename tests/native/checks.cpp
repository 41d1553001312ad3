// Checks of the kernels against plain loops in double precision, without MLX and Python.
//
//     g++ -std=c++20 -O2 -march=native -pthread -I mlx_openelm/native/src tests/native/checks.cpp -o checks
//     ./checks [--seed N] [group ...]
//
// Buffers have exactly the length of their contents, so that the address sanitizer detects every read outside of them.
// With -D OPENELM_QUICK, matrix products and attention are left out: they are most of the time of compiling.

#include "check_elementwise.h"
#include "check_instructions.h"
#include "check_loops.h"
#include "run_groups.h"
#ifndef OPENELM_QUICK
#include "check_attention.h"
#include "check_pool.h"
#include "check_products.h"
#endif

int main(int count, char** arguments) {
  const Groups groups = {
      {"loads", check_loads},
      {"arithmetic", check_arithmetic},
      {"packing", check_packing},
#ifndef OPENELM_QUICK
      {"few_rows", check_few_rows},
      {"extreme_rows", check_extreme_rows},
      {"extreme_plain_rows", check_extreme_plain_rows},
      {"many_rows", check_many_rows},
      {"pool", check_pool},
      {"attention", check_attention},
      {"attention_gradient", check_attention_gradient},
#endif
      {"rms_norm", check_norms},
      {"log_softmax", check_log_softmax},
      {"swiglu", check_swiglu},
      {"split_heads", check_split_heads},
      {"loops", check_loops_on_threads},
      {"fork", check_fork},
  };
  return run_groups(groups, count, arguments);
}
