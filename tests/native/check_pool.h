// Checks of the kernels on several threads, and of several callers at once.

#pragma once

#include <atomic>
#include <thread>

#include "check_attention.h"
#include "check_elementwise.h"
#include "check_loops.h"
#include "check_products.h"

namespace {

void check_pool() {
  auto& pool = Pool::shared();
  // Kernels large enough for several threads; one thread gives bit-identical results.
  Stored packed({Type::float32, 4, 64}, 600, 1024), plain({Type::bfloat16}, 300, 512),
      tall({Type::bfloat16}, 1030, 512);
  Floats x = random_floats(40 * 1024), weight = random_floats(1024);
  Problem problem({1, 2, 1000, 4, 1, 64}, {}, causal);
  auto few = [&] { Floats y(4 * 600); return few_rows(packed.matrix, x.data(), 4, y.data(), true), y; };
  auto one = [&] { Floats y(600); return few_rows(packed.matrix, x.data(), 1, y.data(), true), y; };
  auto one_plain = [&] { Floats y(1030); return few_rows(tall.matrix, x.data(), 1, y.data(), false), y; };
  auto many = [&] { Floats y(40 * 300); return many_rows(plain.matrix, 300, 512, x.data(), 40, y.data(), false), y; };
  auto norm = [&] { Floats y(x.size()); return rms_norm(x.data(), weight.data(), 40, 1024, 1e-6f, y.data()), y; };
  auto mix = [&] { Floats y(problem.queries.size()); return attention(problem.a, y.data(), nullptr), y; };
  pool.set_threads(1);
  Floats few_alone = few(), one_alone = one(), one_plain_alone = one_plain(), many_alone = many(), norm_alone = norm(), mix_alone = mix();
  for (int threads : {1, 2, 3, 4, 2}) {
    pool.set_threads(threads);
    check_loops();
    std::atomic<int> wrong{0};
    std::vector<std::thread> callers;
    for (int caller = 0; caller < 3; caller++) {
      callers.emplace_back([&, caller] {
        for (int turn = 0; turn < 8; turn++) {
          wrong += few() != few_alone;
          wrong += one() != one_alone;
          wrong += one_plain() != one_plain_alone;
          wrong += many() != many_alone;
          wrong += norm() != norm_alone;
          wrong += mix() != mix_alone;
          if (caller == 0) pool.set_threads(threads);  // while others use the pool
        }
      });
    }
    for (auto& caller : callers) caller.join();
    check(wrong == 0, text(threads, "threads, three callers:", wrong.load(), "wrong"));
  }
  pool.set_threads(1);
}

}  // namespace
