// Products of few rows with a matrix: y = x W^T, where reading W is most of the work. Plain ones are in `plain_rows.h` and
// `amx_rows.h`, packed ones in `packed_rows.h`.

#pragma once

#include "amx_rows.h"
#include "plain_rows.h"

namespace openelm {

// y [rows, m.rows] += x [rows, m.columns] W^T for a packed matrix; threads take `grain` rows of W at a time.
template <int bits>
void packed_few_rows(const Matrix& m, const float* x, int64_t rows, float* y, int64_t grain, bool round,
                     Scratch& scratch);

// The share of the weights that a thread takes at a time.
constexpr int64_t kBytesAtATime = 24 << 10;

// Whether a product is large enough for several threads, by the bytes that are read or by the numbers in them: 20 to 50
// microseconds on one thread. A smaller one gains little, and takes a core from the thread that prepares the next step.
inline bool is_worth_help(const Matrix& m, int64_t rows) {
  constexpr int64_t kBytes = 1 << 20, kNumbers = 1 << 20;
  return m.rows * m.row_bytes() * rows >= kBytes || m.rows * m.columns * rows >= kNumbers;
}

// y [rows, m.rows] += x [rows, m.columns] W^T for few rows.
inline void few_rows(const Matrix& m, const float* x, int64_t rows, float* y, bool round) {
  int64_t grain = (kBytesAtATime + m.row_bytes() - 1) / m.row_bytes();
  if (!is_worth_help(m, rows)) grain = m.rows;
  if (!m.bits) {
#if defined(OPENELM_AMX)
    if (m.type == Type::bfloat16 && has_tiles()) return amx_few_rows(m, x, rows, y, grain >= m.rows);
#endif
    with_type(m.type, [&](auto* t) { plain_few_rows<std::remove_cvref_t<decltype(*t)>>(m, x, rows, y, grain); });
    return;
  }
  thread_local Scratch scratch;
  with_bits(m.bits, [&](auto bits) {
    packed_few_rows<decltype(bits)::value>(m, x, rows, y, grain, round, scratch);
  });
}

}  // namespace openelm
