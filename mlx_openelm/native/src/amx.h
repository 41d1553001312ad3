// AMX: products of small matrices in one instruction, on Intel's server processors since Sapphire Rapids.
//
// A tile is a register of 16 rows of 64 bytes, and a thread has eight. An instruction multiplies 16 rows of 32 numbers
// in bfloat16 with up to 16 columns of as many, and adds the results to a tile of floats: in 16 cycles, a sixteenth of
// what AVX-512 needs.

#pragma once

#include "simd.h"

#if defined(OPENELM_EMULATE_AMX)  // tests run this code on machines without AMX
#include "emulated_amx.h"
#endif
#if (defined(__AMX_BF16__) && defined(__linux__)) || defined(OPENELM_EMULATE_AMX)
#define OPENELM_AMX
#endif

#if defined(OPENELM_AMX)
#if !defined(OPENELM_EMULATE_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace openelm {

constexpr int kTileHeight = 16;                          // rows of a tile, and floats of a row
constexpr int kTileBytes = kTileHeight * sizeof(float);  // of a row
constexpr int kTileDepth = kTileBytes / sizeof(BFloat16);

// Whether this process may use tiles. Linux wants to be asked, since they make the state of a thread much larger.
inline bool has_tiles() {
#if defined(OPENELM_EMULATE_AMX)
  return true;
#else
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool has = syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  return has;
#endif
}

// What was written before is in memory for tiles to load: GCC does not know that they do.
INLINE void settle(const void* written) { asm volatile("" : : "r"(written) : "memory"); }

// While it exists, this thread has tiles: 0 and 1 are [16, 32] numbers in bfloat16, the others [16, columns] floats or
// pairs of such numbers. Afterwards the system need not save them.
class Tiles {
 public:
  explicit Tiles(int columns) {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } sizes;
    for (int i = 0; i < 8; i++) {
      sizes.rows[i] = kTileHeight;
      sizes.bytes[i] = i < 2 ? kTileBytes : columns * sizeof(float);
    }
    settle(&sizes);
    _tile_loadconfig(&sizes);
  }
  Tiles(const Tiles&) = delete;
  ~Tiles() { _tile_release(); }
};

}  // namespace openelm
#endif
