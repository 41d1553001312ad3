// Checks of `threads.h` alone.

#pragma once

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>

#include "checking.h"
#include "threads.h"

namespace {

// Every task runs exactly once, including those of nested loops.
void check_loops() {
  std::vector<std::atomic<int>> done(500 * 20);
  Pool::shared().run(500, [&](int64_t i) { Pool::shared().run(20, [&](int64_t j) { done[i * 20 + j]++; }); });
  int wrong = 0;
  for (auto& count : done) wrong += count != 1;
  check(wrong == 0, text("nested loops:", wrong, "wrong"));
  std::vector<std::atomic<int>> covered(1000);
  for_ranges(1000, 7, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) covered[i]++;
  });
  wrong = 0;
  for (auto& count : covered) wrong += count != 1;
  check(wrong == 0, text("for_ranges:", wrong, "wrong"));
}

void check_loops_on_threads() {
  for (int threads : {1, 2, 3, 4, 2}) {
    Pool::shared().set_threads(threads);
    check(Pool::shared().threads() == threads, "set_threads");
    check_loops();
  }
  Pool::shared().set_threads(0);
  check(Pool::shared().threads() == 1, "at least one thread");
}

// A forked child has no worker threads; the alarm ends it if it waits for them.
void check_fork() {
  Pool::shared().set_threads(3);
  check_loops();
  std::fflush(stdout);
  pid_t child = fork();
  if (child == 0) {
    alarm(60);
    int before = failed;
    check_loops();
    _exit(failed != before);
  }
  int status = 0;
  waitpid(child, &status, 0);
  check(WIFEXITED(status) && WEXITSTATUS(status) == 0, "a forked child");
  Pool::shared().set_threads(1);
}

}  // namespace
