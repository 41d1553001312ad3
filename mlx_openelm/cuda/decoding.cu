// All layers of OpenELM for one token of one sequence in one kernel, with one block per multiprocessor. All blocks work
// on the same step and wait for each other before the next. A launch per step would take longer than many of the steps
// themselves, and no memory would be read meanwhile.
//
// `decoding.py` puts definitions before this source, which depend on the model:
//   HALF (numbers are float16, else bfloat16), LAYERS, MODEL_DIM, HEAD_DIM, GROUPS (query heads of a key-value head),
//   NORMS (of queries and keys), EPS, LOG_BASE (of RoPE, to base 2), SCALE,
//   MOST_PARTS, PARTS_SIZE, MOST_QKV and MOST_IN, the sizes of intermediate results,
//   per layer HEADS[], INNER[] and KINDS[][4]; FOR_KIND(kind, call) for the model's kinds of weights.
// Sums are float32. Intermediate results are rounded where MLX's own kernels round them.

#ifndef EMULATED
__device__ __forceinline__ float to_float(half_t x) {
#if HALF
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
  return y;
#else
  return __uint_as_float((word_t)x << 16);
#endif
}

__device__ __forceinline__ half_t to_half(float x) {
  half_t y;
#if HALF
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
#else
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
#endif
  return y;
}

// Weights are read once, so they should not evict other data from the cache.
__device__ __forceinline__ uint4 read_once(const uint4* at) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(at));
  return v;
}

// Data that other blocks write during this kernel must not come from this multiprocessor's own cache.
__device__ __forceinline__ uint4 read_shared(const uint4* at) {
  uint4 v;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(at) : "memory");
  return v;
}

__device__ __forceinline__ word_t read_shared(const word_t* at) {
  word_t v;
  asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(v) : "l"(at) : "memory");
  return v;
}

__device__ __forceinline__ half_t read_shared(const half_t* at) {
  half_t v;
  asm volatile("ld.global.cg.u16 %0, [%1];" : "=h"(v) : "l"(at) : "memory");
  return v;
}

__device__ __forceinline__ word_t read_acquire(const word_t* at) {
  word_t v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(at) : "memory");
  return v;
}

__device__ __forceinline__ void add_release(word_t* at, word_t value) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(at), "r"(value) : "memory");
}

// Loads from memory into the cache that all multiprocessors share.
__device__ __forceinline__ void prefetch(const void* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }
#endif

__device__ __forceinline__ float read_shared(const float* at) { return __uint_as_float(read_shared((const word_t*)at)); }

__device__ __forceinline__ float rounded(float x) { return to_float(to_half(x)); }

// The two numbers of a word, low bits first.
__device__ __forceinline__ void unpack(word_t pair, float* out) {
#if HALF
  out[0] = to_float((half_t)pair);
  out[1] = to_float((half_t)(pair >> 16));
#else
  out[0] = __uint_as_float(pair << 16);
  out[1] = __uint_as_float(pair & 0xffff0000u);
#endif
}

__device__ __forceinline__ void unpack(uint4 words, float* out) {
  unpack(words.x, out);
  unpack(words.y, out + 2);
  unpack(words.z, out + 4);
  unpack(words.w, out + 6);
}

__device__ __forceinline__ word_t pack(float low, float high) { return to_half(low) | (word_t)to_half(high) << 16; }

// The sum over `width` neighbouring lanes, returned in all of them; other lanes of the warp may have diverged.
template <int width>
__device__ __forceinline__ float lane_sum(float x) {
  const word_t lanes = width == 32 ? 0xffffffffu : ((1u << width % 32) - 1) << (threadIdx.x % 32 / width * width);
#pragma unroll
  for (int i = width / 2; i; i /= 2) x += __shfl_xor_sync(lanes, x, i);
  return x;
}

constexpr int WARPS = THREADS / 32;
// Every product takes its inputs 256 at a time.
constexpr int STRIDE = 256;
// Before its inputs are complete, each unit loads the first AHEAD tiles of its weights into registers and prefetches
// FURTHER tiles into the cache, so that memory keeps reading while the blocks wait for each other.
constexpr int AHEAD = 4, FURTHER = 16;

// Waits until all blocks have arrived; `target` counts arrivals.
__device__ void wait_for_all(word_t* arrivals, word_t& target) {
  target += gridDim.x;
  __syncthreads();
  if (threadIdx.x == 0) {
    add_release(arrivals, 1u);
    const long long since = clock64();
    while (read_acquire(arrivals) < target) {
      if (clock64() - since > 10000000000ll) __trap();  // after a few seconds: an error is better than a GPU that hangs
    }
  }
  __syncthreads();
}

// A weight [rows, in] as MLX stores it: plain, or packed in affine mode.
struct Matrix {
  const void* weight;
  const half_t* scales;
  const half_t* biases;
};

// A tile is 256 weights of one row. It is the work of a unit: a warp (8 per lane), or if packed, 8 lanes (32 per lane).
template <int bits, int group>
struct Tile {
  static constexpr int lanes = 8, bytes = 32 * bits;
  alignas(16) word_t words[bits];
  half_t scale, bias;

  __device__ __forceinline__ void load(const Matrix& m, long long index, int lane) {
    const long long chunk = index * 8 + lane;
    const word_t* at = (const word_t*)m.weight + chunk * bits;
    if constexpr (bits % 4 == 0) {
#pragma unroll
      for (int i = 0; i < bits / 4; ++i) ((uint4*)words)[i] = read_once((const uint4*)at + i);
    } else {
#pragma unroll
      for (int i = 0; i < bits; ++i) words[i] = at[i];
    }
    scale = m.scales[chunk * 32 / group];
    bias = m.biases[chunk * 32 / group];
  }

  // The product with 256 inputs: four pieces of 8 per lane, `lanes` apart so that lanes read neighbours; and the sums.
  __device__ __forceinline__ float dot(const uint4* inputs, const float* sums, int lane) const {
    float sum = 0.0f;
#pragma unroll
    for (int piece = 0; piece < 4; ++piece) {
      float x[8];
      unpack(inputs[piece * lanes + lane], x);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int bit = (piece * 8 + i) * bits, word = bit / 32, shift = bit % 32;
        word_t q = words[word] >> shift;
        if (shift + bits > 32) q |= words[(bit + bits - 1) / 32] << (32 - shift);
        // An integer below 2^23 becomes a float without a conversion instruction, which has a low throughput.
        const float value = __uint_as_float((q & ((1u << bits) - 1)) | 0x4b000000u) - 8388608.0f;
        sum = fmaf(value, x[i], sum);
      }
    }
    return fmaf(to_float(scale), sum, to_float(bias) * sums[lane]);
  }
};

template <int group>
struct Tile<0, group> {
  static constexpr int lanes = 32, bytes = 512;
  uint4 words;

  __device__ __forceinline__ void load(const Matrix& m, long long index, int lane) {
    words = read_once((const uint4*)m.weight + index * lanes + lane);
  }

  __device__ __forceinline__ float dot(const uint4* inputs, const float*, int lane) const {
    float w[8], x[8], sum = 0.0f;
    unpack(words, w);
    unpack(inputs[lane], x);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum = fmaf(w[i], x[i], sum);
    return sum;
  }
};

// A product's inputs in shared memory: 16 bits each, 8 in a piece; the sum of every 32; and partial results.
struct Inputs {
  uint4* pieces;
  float* sums;
  float* partial;
};

// A block's share of x W^T: some rows (with `glu`, of gates and then of ups), whose tiles the units divide evenly.
template <int bits, int group, bool glu>
struct Product {
  using Part = Tile<bits, group>;
  static constexpr int lanes = Part::lanes, units = THREADS / lanes;
  Matrix matrix;
  int tiles;        // per row
  int row, count;   // the first row, and how many
  int each;         // tiles per unit
  long long first, second;  // tile of the first gate, and of the first up
  Part ahead[AHEAD];

  __device__ __forceinline__ int unit() const { return threadIdx.x / lanes; }
  __device__ __forceinline__ int lane() const { return threadIdx.x % lanes; }
  __device__ __forceinline__ int end() const { return min((unit() + 1) * each, tiles * count * (1 + glu)); }

  // The position of this block's i-th tile in the weight.
  __device__ __forceinline__ long long place_of(int i) const {
    return glu && i >= tiles * count ? second + i - tiles * count : first + i;
  }

  __device__ __forceinline__ void load(Part& tile, int i) const { tile.load(matrix, place_of(i), lane()); }

  // Determines the share of this block.
  __device__ __forceinline__ void divide(const Matrix& m, int in, int rows) {
    matrix = m;
    tiles = in / STRIDE;
    row = (int)((long long)rows * blockIdx.x / gridDim.x);
    count = (int)((long long)rows * (blockIdx.x + 1) / gridDim.x) - row;
    each = (tiles * count * (1 + glu) + units - 1) / units;
    first = (long long)row * tiles;
    second = first + (long long)rows * tiles;
  }

  // Prefetches a unit's tiles from its `from`-th on into the cache.
  __device__ __forceinline__ void fetch(int from, int count_) const {
    constexpr int lines = Part::bytes < 128 ? 1 : Part::bytes / 128;
    const int begin = unit() * each + from, last = min(begin + count_, end());
#pragma unroll 1
    for (int j = lane(); begin + j / lines < last; j += lanes) {
      prefetch((const char*)matrix.weight + place_of(begin + j / lines) * Part::bytes + j % lines * 128);
    }
  }

  // Does not need the inputs yet.
  __device__ __forceinline__ void start(const Matrix& m, int in, int rows) {
    divide(m, in, rows);
#pragma unroll
    for (int a = 0; a < AHEAD; ++a) {
      if (unit() * each + a < end()) load(ahead[a], unit() * each + a);
    }
    fetch(AHEAD, FURTHER);
  }

  // After this and a __syncthreads, `result` returns the sums.
  __device__ __forceinline__ void run(const Inputs& inputs) {
    int i = unit() * each, r = tiles ? i / tiles : 0, t = i - r * tiles;
    const int last = end();
    float sum = 0.0f;
#pragma unroll 1
    while (i < last) {
#pragma unroll
      for (int a = 0; a < AHEAD; ++a) {
        if (i < last) {
          sum += ahead[a].dot(inputs.pieces + t * 32, inputs.sums + t * 8, lane());
          if (i + AHEAD < last) load(ahead[a], i + AHEAD);
          ++i, ++t;
          if (t == tiles || i == last) {
            sum = lane_sum<lanes>(sum);
            // Units and rows both increase, so their sum is a unique index.
            if (lane() == 0) inputs.partial[unit() + r] = sum;
            sum = 0.0f, t = 0, ++r;
          }
        }
      }
    }
  }

  // The dot product of the r-th row of this block, of `2 * count` if `glu`.
  __device__ __forceinline__ float result(const Inputs& inputs, int r) const {
    float sum = 0.0f;
#pragma unroll 1
    for (int u = r * tiles / each; u <= ((r + 1) * tiles - 1) / each; ++u) sum += inputs.partial[u + r];
    return sum;
  }
};

// Stores piece i of the inputs where the product's tiles read it.
template <int bits>
__device__ __forceinline__ void place(const Inputs& inputs, int i, uint4 words) {
  if constexpr (bits == 0) {
    inputs.pieces[i] = words;
  } else {
    inputs.pieces[i / 32 * 32 + i % 4 * 8 + i % 32 / 4] = words;
    float x[8], sum = 0.0f;
    unpack(words, x);
#pragma unroll
    for (int j = 0; j < 8; ++j) sum += x[j];
    // A warp stores 32 pieces at a time.
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    if (i % 4 == 0) inputs.sums[i / 4] = sum;
  }
}

// Stores RMSNorm of x [MODEL_DIM] as inputs.
template <int bits>
__device__ __forceinline__ void place_normalized(const Inputs& inputs, const half_t* x, const half_t* weight) {
  constexpr int pieces = MODEL_DIM / 8, each = (pieces + THREADS - 1) / THREADS;
  __shared__ float squares[WARPS];
  uint4 words[each], gains[each];
  float sum = 0.0f;
#pragma unroll
  for (int k = 0; k < each; ++k) {
    const int i = threadIdx.x + k * THREADS;
    if (i >= pieces) continue;
    words[k] = read_shared((const uint4*)x + i);
    gains[k] = ((const uint4*)weight)[i];
    float values[8];
    unpack(words[k], values);
#pragma unroll
    for (int j = 0; j < 8; ++j) sum = fmaf(values[j], values[j], sum);
  }
  sum = lane_sum<32>(sum);
  if (threadIdx.x % 32 == 0) squares[threadIdx.x / 32] = sum;
  __syncthreads();
  sum = 0.0f;
#pragma unroll
  for (int w = 0; w < WARPS; ++w) sum += squares[w];
  const float factor = rsqrtf(sum / MODEL_DIM + EPS);
#pragma unroll
  for (int k = 0; k < each; ++k) {
    const int i = threadIdx.x + k * THREADS;
    if (i >= pieces) continue;
    float x8[8], g8[8];
    unpack(words[k], x8);
    unpack(gains[k], g8);
#pragma unroll
    for (int j = 0; j < 8; ++j) x8[j] = rounded(x8[j] * factor) * g8[j];
    place<bits>(inputs, i, {pack(x8[0], x8[1]), pack(x8[2], x8[3]), pack(x8[4], x8[5]), pack(x8[6], x8[7])});
  }
  __syncthreads();
}

// Merges attention's parts of each head [heads, parts, HEAD_DIM + 2] and stores them as inputs.
template <int bits>
__device__ __forceinline__ void place_mixed(const Inputs& inputs, const float* parts, int heads, int active) {
  __shared__ float tops[MOST_PARTS], sums[MOST_PARTS];
  constexpr int size = HEAD_DIM + 2;
#pragma unroll 1
  for (int i = threadIdx.x; i < heads * active; i += THREADS) {
    tops[i] = read_shared(parts + i * size + HEAD_DIM);
    sums[i] = read_shared(parts + i * size + HEAD_DIM + 1);
  }
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < heads * HEAD_DIM / 8; i += THREADS) {
    const int first = i * 8 / HEAD_DIM * active, at = i * 8 % HEAD_DIM;
    float top = tops[first], sum = 0.0f, mixed[8] = {};
#pragma unroll 1
    for (int p = first + 1; p < first + active; ++p) top = fmaxf(top, tops[p]);
#pragma unroll 2
    for (int p = first; p < first + active; ++p) {
      const float share = exp2f(tops[p] - top);
      sum = fmaf(sums[p], share, sum);
#pragma unroll
      for (int j = 0; j < 8; ++j) mixed[j] = fmaf(share, read_shared(parts + p * size + at + j), mixed[j]);
    }
    const float factor = 1.0f / sum;
#pragma unroll
    for (int j = 0; j < 8; ++j) mixed[j] *= factor;
    place<bits>(
        inputs, i, {pack(mixed[0], mixed[1]), pack(mixed[2], mixed[3]), pack(mixed[4], mixed[5]), pack(mixed[6], mixed[7])});
  }
  __syncthreads();
}

template <int bits>
__device__ __forceinline__ void place_plain(const Inputs& inputs, const half_t* x, int in) {
#pragma unroll 1
  for (int i = threadIdx.x; i < in / 8; i += THREADS) place<bits>(inputs, i, read_shared((const uint4*)x + i));
  __syncthreads();
}

// A head of qkv, normalized and rotated to its position: lane l of a warp has numbers l, l + 32, ...
__device__ __forceinline__ void prepare(const half_t* head, const half_t* norm, int position, float* out) {
  constexpr int each = HEAD_DIM / 32;
  const int lane = threadIdx.x % 32;
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < each; ++i) {
    out[i] = to_float(read_shared(head + lane + 32 * i));
    squares = fmaf(out[i], out[i], squares);
  }
#if NORMS
  const float factor = rsqrtf(lane_sum<32>(squares) / HEAD_DIM + EPS);
#pragma unroll
  for (int i = 0; i < each; ++i) out[i] = rounded(rounded(out[i] * factor) * to_float(norm[lane + 32 * i]));
#endif
#pragma unroll
  for (int i = 0; i < each / 2; ++i) {
    const float share = (float)(lane + 32 * i) / (HEAD_DIM / 2), angle = position * exp2f(-share * LOG_BASE);
    const float c = cosf(angle), s = sinf(angle), a = out[i], b = out[i + each / 2];
    out[i] = rounded(a * c - b * s);
    out[i + each / 2] = rounded(a * s + b * c);
  }
}

// The number of blocks that share the past of a head.
__device__ __forceinline__ int count_parts(int heads, int position) {
  return max(1, min((int)gridDim.x / heads, position / 128 + 1));
}

// A part of the past for one query head, with the new position in the last part.
struct Past {
  static constexpr int lanes = HEAD_DIM / 8;     // that read the key and value of one position
  static constexpr int slots = THREADS / lanes;  // positions at a time
  int head, part, first, last;
  half_t *keys, *values;  // of the head [capacity, HEAD_DIM]

  __device__ __forceinline__ Past(half_t* k, half_t* v, int capacity, int position, int active, int item) {
    head = item / active, part = item % active;
    const int length = (position + active) / active;
    first = part * length, last = min(first + length, position + 1);
    const long long start = (long long)(head / GROUPS) * capacity * HEAD_DIM;
    keys = k + start, values = v + start;
  }

  // Reads a past position, which does not depend on the new one.
  __device__ __forceinline__ void load(int position, int t, uint4& key, uint4& value) const {
    if (t >= min(last, position)) return;
    const long long at = (long long)t * HEAD_DIM + threadIdx.x % lanes * 8;
    key = *(const uint4*)(keys + at);
    value = *(const uint4*)(values + at);
  }
};

// Attention of the new position over a part of the past, by one block; it also writes the new key and value.
// `mixes` [WARPS, HEAD_DIM] is shared; k_words and v_words are the first keys and values as `past.load` gave them.
__device__ __forceinline__ void attend(
    const Past& past, uint4 k_words, uint4 v_words, const half_t* qkv, const half_t* q_norm, const half_t* k_norm,
    float* parts, float* mixes, int heads, int position, int active) {
  constexpr int each = HEAD_DIM / 32, lanes = Past::lanes, slots = Past::slots;
  __shared__ float query[HEAD_DIM], key[HEAD_DIM], value[HEAD_DIM];
  __shared__ float tops[WARPS], sums[WARPS];
  const int h = past.head, kv_heads = heads / GROUPS, kv = h / GROUPS, first = past.first, last = past.last;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const bool has_new = last == position + 1 && first <= position, writes = has_new && h % GROUPS == 0;
  float numbers[each];
  if (warp == 0) {
    prepare(qkv + h * HEAD_DIM, q_norm, position, numbers);
    // From here on exponentials have base 2.
    for (int i = 0; i < each; ++i) query[lane + 32 * i] = numbers[i] * (SCALE * 1.44269504f);
  } else if (warp == 1 && has_new) {
    prepare(qkv + (heads + kv) * HEAD_DIM, k_norm, position, numbers);
    for (int i = 0; i < each; ++i) {
      key[lane + 32 * i] = numbers[i];
      if (writes) past.keys[(long long)position * HEAD_DIM + lane + 32 * i] = to_half(numbers[i]);
    }
  } else if (warp == 2 && has_new) {
    for (int i = 0; i < each; ++i) {
      const half_t x = read_shared(qkv + (heads + kv_heads + kv) * HEAD_DIM + lane + 32 * i);
      value[lane + 32 * i] = to_float(x);
      if (writes) past.values[(long long)position * HEAD_DIM + lane + 32 * i] = x;
    }
  }
  __syncthreads();

  const int own = thread % lanes * 8, slot = thread / lanes;
  float q[8], top = -1e30f, sum = 0.0f, mix[8] = {};
#pragma unroll
  for (int i = 0; i < 8; ++i) q[i] = query[own + i];
  // All lanes of a warp do the same number of rounds, since they exchange numbers.
#pragma unroll 1
  for (int start = first; start < last; start += slots) {
    const int t = start + slot;
    float k[8], v[8], score = 0.0f;
    if (t < min(last, position)) {
      unpack(k_words, k);
      unpack(v_words, v);
      past.load(position, t + slots, k_words, v_words);
    } else {
      // The new position may not be in memory yet.
#pragma unroll
      for (int i = 0; i < 8; ++i) k[i] = t < last ? key[own + i] : 0.0f, v[i] = t < last ? value[own + i] : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) score = fmaf(q[i], k[i], score);
    score = lane_sum<lanes>(score);
    if (t < last) {
      const float higher = fmaxf(top, score), shrink = exp2f(top - higher), weight = exp2f(score - higher);
      top = higher;
      sum = fmaf(sum, shrink, weight);
#pragma unroll
      for (int i = 0; i < 8; ++i) mix[i] = fmaf(mix[i], shrink, weight * v[i]);
    }
  }

  // Merge the slots of a warp, then the warps.
#pragma unroll
  for (int i = lanes; i < 32; i *= 2) {
    const float other = __shfl_xor_sync(0xffffffffu, top, i), higher = fmaxf(top, other);
    const float mine = exp2f(top - higher), theirs = exp2f(other - higher);
    sum = sum * mine + __shfl_xor_sync(0xffffffffu, sum, i) * theirs;
#pragma unroll
    for (int j = 0; j < 8; ++j) mix[j] = mix[j] * mine + __shfl_xor_sync(0xffffffffu, mix[j], i) * theirs;
    top = higher;
  }
  if (lane < lanes) {
    for (int i = 0; i < 8; ++i) mixes[warp * HEAD_DIM + own + i] = mix[i];
    if (lane == 0) tops[warp] = top, sums[warp] = sum;
  }
  __syncthreads();
  top = tops[0];
  for (int w = 1; w < WARPS; ++w) top = fmaxf(top, tops[w]);
  sum = 0.0f;
  float mixed = 0.0f;
#pragma unroll 1
  for (int w = 0; w < WARPS; ++w) {
    const float factor = exp2f(tops[w] - top);
    sum += sums[w] * factor;
    if (thread < HEAD_DIM) mixed += mixes[w * HEAD_DIM + thread] * factor;
  }
  parts += (h * active + past.part) * (HEAD_DIM + 2);
  if (thread < HEAD_DIM) parts[thread] = mixed;
  if (thread == 0) parts[HEAD_DIM] = top, parts[HEAD_DIM + 1] = sum;
}

// Results that one step passes to the next.
struct Scratch {
  half_t* qkv;
  float* parts;
  half_t* middle;  // after attention
  half_t* inner;
  half_t* output;  // of a layer
};

struct State {
  Inputs inputs;
  word_t* arrivals;
  word_t target;
};

// The pointers of one layer, in the order of `decoding.py`.
struct Layer {
  const half_t *attn_norm, *ffn_norm, *q_norm, *k_norm;
  Matrix qkv_proj, out_proj, proj_1, proj_2;
  half_t *keys, *values;
};

template <int bits, int group>
__device__ __noinline__ void project(State& state, const Layer& layer, const half_t* x, const Scratch& scratch, int heads) {
  Product<bits, group, false> product;
  product.start(layer.qkv_proj, MODEL_DIM, (heads + 2 * (heads / GROUPS)) * HEAD_DIM);
  wait_for_all(state.arrivals, state.target);
  place_normalized<bits>(state.inputs, x, layer.attn_norm);
  product.run(state.inputs);
  __syncthreads();
#pragma unroll 1
  for (int r = threadIdx.x; r < product.count; r += THREADS) {
    scratch.qkv[product.row + r] = to_half(product.result(state.inputs, r));
  }
}

// Attention leaves memory idle: meanwhile the next step's weights are prefetched into the cache.
template <int bits, int group>
__device__ __noinline__ void fetch_out(const Layer& layer, int heads) {
  Product<bits, group, false> product;
  product.divide(layer.out_proj, heads * HEAD_DIM, MODEL_DIM);
  product.fetch(0, AHEAD + FURTHER);
}

template <int bits, int group>
__device__ __noinline__ void project_out(
    State& state, const Layer& layer, const half_t* x, const Scratch& scratch, int heads, int active) {
  Product<bits, group, false> product;
  product.start(layer.out_proj, heads * HEAD_DIM, MODEL_DIM);
  wait_for_all(state.arrivals, state.target);
  place_mixed<bits>(state.inputs, scratch.parts, heads, active);
  product.run(state.inputs);
  __syncthreads();
#pragma unroll 1
  for (int r = threadIdx.x; r < product.count; r += THREADS) {
    const int row = product.row + r;
    scratch.middle[row] = to_half(to_float(read_shared(x + row)) + rounded(product.result(state.inputs, r)));
  }
}

template <int bits, int group>
__device__ __noinline__ void expand(State& state, const Layer& layer, const Scratch& scratch, int inner) {
  Product<bits, group, true> product;
  product.start(layer.proj_1, MODEL_DIM, inner);
  wait_for_all(state.arrivals, state.target);
  place_normalized<bits>(state.inputs, scratch.middle, layer.ffn_norm);
  product.run(state.inputs);
  __syncthreads();
#pragma unroll 1
  for (int r = threadIdx.x; r < product.count; r += THREADS) {
    const float gate = rounded(product.result(state.inputs, r));
    const float up = rounded(product.result(state.inputs, product.count + r));
    scratch.inner[product.row + r] = to_half(rounded(gate * rounded(1.0f / (1.0f + expf(-gate)))) * up);
  }
}

template <int bits, int group>
__device__ __noinline__ void contract(State& state, const Layer& layer, const Scratch& scratch, half_t* y, int inner) {
  Product<bits, group, false> product;
  product.start(layer.proj_2, inner, MODEL_DIM);
  wait_for_all(state.arrivals, state.target);
  place_plain<bits>(state.inputs, scratch.inner, inner);
  product.run(state.inputs);
  __syncthreads();
#pragma unroll 1
  for (int r = threadIdx.x; r < product.count; r += THREADS) {
    const int row = product.row + r;
    y[row] = to_half(to_float(read_shared(scratch.middle + row)) + rounded(product.result(state.inputs, r)));
  }
}

__device__ __forceinline__ void decode(
    const void* const* pointers, const half_t* x, const int* position_at, word_t* arrivals, half_t* y,
    int* next_position, char* memory, uint4* shared, int capacity) {
  const int position = *position_at;
  Scratch scratch;
  scratch.parts = (float*)memory;
  scratch.qkv = (half_t*)(scratch.parts + PARTS_SIZE);
  scratch.middle = scratch.qkv + MOST_QKV;
  scratch.output = scratch.middle + MODEL_DIM;
  scratch.inner = scratch.output + MODEL_DIM;
  State state;
  state.inputs.pieces = shared;
  state.inputs.sums = (float*)(shared + MOST_IN / 8);
  state.inputs.partial = state.inputs.sums + MOST_IN / 32;
  state.arrivals = arrivals;
  state.target = 0;
#pragma unroll 1
  for (int n = 0; n < LAYERS; ++n) {
    const Layer& layer = ((const Layer*)pointers)[n];
    const int heads = HEADS[n], active = count_parts(heads, position);
    const half_t* input = n ? scratch.output : x;
    FOR_KIND(KINDS[n][0], (project<bits, group>(state, layer, input, scratch, heads)));
    FOR_KIND(KINDS[n][1], (fetch_out<bits, group>(layer, heads)));
    bool has_waited = false;
#pragma unroll 1
    for (int item = blockIdx.x; item < heads * active; item += gridDim.x) {
      const Past past(layer.keys, layer.values, capacity, position, active, item);
      uint4 k_words, v_words;
      past.load(position, past.first + (int)threadIdx.x / Past::lanes, k_words, v_words);
      if (!has_waited) wait_for_all(arrivals, state.target);
      has_waited = true;
      attend(
          past, k_words, v_words, scratch.qkv, layer.q_norm, layer.k_norm, scratch.parts, (float*)shared, heads,
          position, active);
      __syncthreads();
    }
    if (!has_waited) wait_for_all(arrivals, state.target);
    FOR_KIND(KINDS[n][1], (project_out<bits, group>(state, layer, input, scratch, heads, active)));
    FOR_KIND(KINDS[n][2], (expand<bits, group>(state, layer, scratch, INNER[n])));
    FOR_KIND(KINDS[n][3], (contract<bits, group>(state, layer, scratch, n == LAYERS - 1 ? y : scratch.output, INNER[n])));
  }
  if (threadIdx.x == 0) {
    if (blockIdx.x == 0) next_position[0] = position + 1;
    // When the last block arrives, no block waits any more: reset for the next token.
    if (atomicAdd(arrivals, 1u) + 1 == (LAYERS * 5 + 1) * gridDim.x) *arrivals = 0;
  }
}
