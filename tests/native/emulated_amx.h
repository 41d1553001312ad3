// AMX for machines without it: the few instructions that `amx.h` and `amx_rows.h` use, as loops by their definitions in
// Intel's Intrinsics Guide. Each thread has tiles of its own.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace emulated_amx {

struct Config {
  uint8_t palette, start, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
};
struct State {
  Config config;
  uint8_t tiles[8][16][64];
};
inline State& state() {
  thread_local State state{};
  return state;
}

inline void load_config(const void* config) {
  state() = {};
  std::memcpy(&state().config, config, sizeof(Config));
}
inline void release() { state() = {}; }
inline void zero(int tile) { std::memset(state().tiles[tile], 0, sizeof state().tiles[tile]); }
inline void load(int tile, const void* from, int64_t stride) {
  zero(tile);
  auto& config = state().config;
  for (int r = 0; r < config.rows[tile]; r++)
    std::memcpy(state().tiles[tile][r], static_cast<const char*>(from) + r * stride, config.bytes[tile]);
}
inline void store(int tile, void* to, int64_t stride) {
  auto& config = state().config;
  for (int r = 0; r < config.rows[tile]; r++)
    std::memcpy(static_cast<char*>(to) + r * stride, state().tiles[tile][r], config.bytes[tile]);
}

// Subnormal numbers count as zeros.
inline float flushed(float number) { return std::abs(number) < 0x1p-126f ? 0 : number; }
inline float half(const uint8_t (&row)[64], int i) {
  uint32_t bits = uint32_t(row[2 * i]) << 16 | uint32_t(row[2 * i + 1]) << 24;
  float number;
  std::memcpy(&number, &bits, sizeof number);
  return flushed(number);
}
inline void multiply(int to, int left, int right) {
  auto& [config, tiles] = state();
  for (int r = 0; r < config.rows[to]; r++) {
    for (int c = 0; c < config.bytes[to] / 4; c++) {
      float sums[2] = {}, total;
      for (int k = 0; k < config.bytes[left] / 4; k++)
        for (int i = 0; i < 2; i++)
          sums[i] = flushed(std::fma(half(tiles[left][r], 2 * k + i), half(tiles[right][k], 2 * c + i), sums[i]));
      std::memcpy(&total, &tiles[to][r][4 * c], sizeof total);
      total = flushed(total + flushed(sums[0] + sums[1]));
      std::memcpy(&tiles[to][r][4 * c], &total, sizeof total);
    }
  }
}

}  // namespace emulated_amx

#undef _tile_loadd  // macros in GCC's header
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig emulated_amx::load_config
#define _tile_release emulated_amx::release
#define _tile_zero emulated_amx::zero
#define _tile_loadd emulated_amx::load
#define _tile_stored emulated_amx::store
#define _tile_dpbf16ps emulated_amx::multiply
