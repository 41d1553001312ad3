// The main program of the checks: runs all groups, or those that the command line names.

#pragma once

#include "checking.h"

namespace {

using Groups = std::vector<std::pair<std::string, void (*)()>>;

int run_groups(const Groups& groups, int count, char** arguments) {
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

}  // namespace
