// Enough of CUDA on a CPU to run decoding.cu: a system thread for each block, a fiber for each of its CUDA threads.
// Fibers switch wherever CUDA threads would wait for each other.
#pragma once

#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <map>
#include <memory>
#include <thread>
#include <vector>

#define EMULATED
#define __device__
#define __global__
#define __constant__ static const
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __shared__ static thread_local

using std::max;
using std::min;

struct uint4 {
  unsigned x, y, z, w;
} __attribute__((aligned(16)));

struct Index {
  unsigned x;
};

namespace emulation {

constexpr size_t stack_size = 1 << 16;

struct Fiber {
  ucontext_t start;
  jmp_buf context;  // valid once it has started; unlike swapcontext, longjmp makes no system calls
  bool is_started = false;
  std::unique_ptr<char[]> stack;
  Index thread;
  bool is_done = false;
};

// State shared by the threads of a block.
struct Block {
  jmp_buf scheduler;
  std::vector<Fiber> fibers;
  Fiber* current = nullptr;
  unsigned arrived = 0, round = 0;  // at __syncthreads
  struct Exchange {
    unsigned arrived = 0, left = 0, ready = 0;
    uint32_t values[32];
  };
  std::map<std::pair<unsigned, unsigned>, Exchange> exchanges;  // by warp and mask
};

inline thread_local Block* block;
inline thread_local Index block_index;
inline Index grid_size, block_size;

__attribute__((noinline)) static void yield() {
  if (!_setjmp(block->current->context)) _longjmp(block->scheduler, 1);
}

__attribute__((noinline)) static void resume() {
  if (_setjmp(block->scheduler)) return;
  auto& fiber = *block->current;
  if (fiber.is_started) _longjmp(fiber.context, 1);
  fiber.is_started = true;
  setcontext(&fiber.start);
}

}  // namespace emulation

#define threadIdx (emulation::block->current->thread)
#define blockIdx (emulation::block_index)
#define gridDim (emulation::grid_size)

alignas(16) static thread_local uint4 emulated_shared[1 << 14];

inline void __syncthreads() {
  auto& block = *emulation::block;
  const unsigned round = block.round;
  if (++block.arrived == emulation::block_size.x) {
    block.arrived = 0;
    ++block.round;
  }
  while (block.round == round) emulation::yield();
}

inline float __shfl_xor_sync(uint32_t mask, float value, int other) {
  auto& block = *emulation::block;
  const unsigned lane = threadIdx.x % 32, count = __builtin_popcount(mask);
  if (!(mask >> lane & 1) || !(mask >> (lane ^ other) & 1)) fprintf(stderr, "a lane exchanges with one outside of the mask\n"), abort();
  auto& exchange = block.exchanges[{threadIdx.x / 32, mask}];
  while (exchange.left) emulation::yield();  // until the last exchange is over
  memcpy(&exchange.values[lane], &value, 4);
  const unsigned ready = exchange.ready;
  if (++exchange.arrived == count) {
    exchange.arrived = 0;
    exchange.left = count;
    ++exchange.ready;
  }
  while (exchange.ready == ready) emulation::yield();
  float result;
  memcpy(&result, &exchange.values[lane ^ other], 4);
  --exchange.left;
  return result;
}

inline void __threadfence() { __sync_synchronize(); }
inline void __trap() { fprintf(stderr, "trap\n"), abort(); }
inline long long clock64() { return 0; }
inline uint32_t atomicAdd(uint32_t* at, uint32_t value) { return __atomic_fetch_add(at, value, __ATOMIC_SEQ_CST); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }

inline float __uint_as_float(uint32_t x) {
  float y;
  memcpy(&y, &x, 4);
  return y;
}

// Replacements for the parts of decoding.cu that use GPU instructions.
template <typename half_t>
inline float half_to_float(half_t x, bool is_float16) {
  if (!is_float16) return __uint_as_float((uint32_t)x << 16);
  _Float16 y;
  memcpy(&y, &x, 2);
  return y;
}

inline uint16_t float_to_half(float x, bool is_float16) {
  uint16_t y;
  if (is_float16) {
    const _Float16 z = (_Float16)x;
    memcpy(&y, &z, 2);
    return y;
  }
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

template <typename T>
inline T read_shared(const T* at) {
  return *at;
}

inline uint4 read_once(const uint4* at) { return *at; }

inline void prefetch(const void*) {}
inline void add_release(uint32_t* at, uint32_t value) { atomicAdd(at, value); }

inline uint32_t read_acquire(const uint32_t* at) {
  std::this_thread::yield();  // to the blocks that this one waits for, since there may be more blocks than cores
  emulation::yield();
  return __atomic_load_n(at, __ATOMIC_SEQ_CST);
}

namespace emulation {

template <typename Body>
void launch(unsigned blocks, unsigned threads, Body body) {
  grid_size.x = blocks, block_size.x = threads;
  std::vector<std::thread> running;
  for (unsigned b = 0; b < blocks; ++b) {
    running.emplace_back([=] {
      Block own;
      own.fibers.resize(threads);
      block = &own;
      block_index.x = b;
      static thread_local const Body* run;
      run = &body;
      for (unsigned t = 0; t < threads; ++t) {
        auto& fiber = own.fibers[t];
        fiber.thread.x = t;
        fiber.stack.reset(new char[stack_size]);  // uninitialized, so that little of it is touched
        getcontext(&fiber.start);
        fiber.start.uc_stack.ss_sp = fiber.stack.get();
        fiber.start.uc_stack.ss_size = stack_size;
        makecontext(&fiber.start, (void (*)())(+[] {
          (*run)();
          block->current->is_done = true;
          yield();
        }), 0);
      }
      for (unsigned left = threads; left;) {
        for (auto& fiber : own.fibers) {
          if (fiber.is_done) continue;
          own.current = &fiber;
          resume();
          left -= fiber.is_done;
        }
      }
    });
  }
  for (auto& thread : running) thread.join();
}

}  // namespace emulation
