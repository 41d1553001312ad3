// Products of few rows with a packed matrix: y = x W^T, where reading W is most of the work.
//
// For packed matrices w = scale * q + bias within a group, so a group adds scale * sum(q x) + bias * sum(x), and the
// second sum is the same for every row of W. Activations are exact (`exact_rows.h`) or rounded (`rounded_rows.h`).
//
// There is a function for each number of bits, group size and number of rows. They take the compiler longest, so
// `packed_rows_*.cpp` share them out.

#pragma once

#include "exact_rows.h"
#include "rounded_rows.h"
#include "rows.h"

namespace openelm {

// Rows of x that share one unpacking of packed weights. Of rounded ones AVX-512 has registers for more; more exact ones
// would not fit the nearest cache.
constexpr int kSharing = 4, kSharingRounded = kLanes == 16 ? 8 : 4;

// y [rows, m.rows] += x [rows, m.columns] W^T; threads take `grain` rows of W at a time.
template <int bits>
void packed_few_rows(const Matrix& m, const float* x, int64_t rows, float* y, int64_t grain, bool round,
                     Scratch& scratch) {
  auto run = [&](auto group) {
    constexpr int kGroup = group.value;
    auto cover = [&](auto most, const auto& body) {
      for_ranges(m.rows, grain, [&](int64_t begin, int64_t end) {
        in_groups<most.value>(0, rows,
                              [&](int64_t first, auto count) { body(begin, end, first, y + first * m.rows, count); });
      });
    };
    if constexpr (can_round(bits)) {
      if (round) {
        Rounded some = round_rows<bits, kGroup>(x, rows, m.columns, scratch);
        Constant<kSharingRounded> most;
        return cover(most, [&](int64_t begin, int64_t end, int64_t first, float* out, auto count) {
          constexpr int R = count.value;
          auto products = [&](Rows of_w, auto& totals) INLINE_LAMBDA {
            rounded_products<bits, kGroup>(m, of_w, some, first, totals);
          };
          add_products<kWideLanes, R, kStreamsOfRounded<R>>(begin, end, out, m.rows, products);
        });
      }
    }
    Prepared some = prepare<bits, kGroup>(x, rows, m.columns, scratch);
    cover(Constant<kSharing>{}, [&](int64_t begin, int64_t end, int64_t first, float* out, auto count) {
      constexpr int R = count.value;
      auto products = [&](Rows of_w, auto& totals) INLINE_LAMBDA {
        exact_products<bits, kGroup>(m, of_w, some, first, totals);
      };
      add_products<kLanes, R, kStreamsOfExact<bits, R>>(begin, end, out, m.rows, products);
    });
  };
  if (m.group == 32) run(Constant<32>{});
  else if (m.group == 64) run(Constant<64>{});
  else run(Constant<128>{});
}

}  // namespace openelm
