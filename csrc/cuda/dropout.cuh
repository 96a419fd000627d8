// dropout: out[i] = bits[i] >= threshold ? x[i] * scale : 0, where bits come from Philox 4x32-10
// (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011): element i has word i % 4
// of the block whose counter is i / 4.
//
// Bytes moved: 2n elements. Launch: 256 threads, four groups of elements per thread in flight; a
// group is a whole number of blocks and of 16-byte vectors. One element per access where a pointer
// is unaligned. The seed is read on the device, so that nothing waits for it.
#pragma once

#include "common/elementwise.cuh"

namespace pyext {

struct PhiloxBlock {
  uint32_t word[4];
};

__device__ __forceinline__ PhiloxBlock philox(uint64_t key, uint64_t counter) {
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32);
  uint32_t c2 = 0, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
#pragma unroll 5  // whole, sm_100 takes up to 80 registers for it and float64 as many on sm_90
  for (int round = 0; round < 10; ++round) {
    const uint32_t high_0 = __umulhi(0xD2511F53u, c0), low_0 = 0xD2511F53u * c0;
    const uint32_t high_1 = __umulhi(0xCD9E8D57u, c2), low_1 = 0xCD9E8D57u * c2;
    c0 = high_1 ^ c1 ^ k0;
    c1 = low_1;
    c2 = high_0 ^ c3 ^ k1;
    c3 = low_0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// 64 bits, of which 2^32 is above all bits: nothing is kept.
template <class T>
__device__ __forceinline__ T keep_or_drop(T x, uint32_t bits, uint64_t threshold,
                                          Accumulate<T> scale) {
  return from_accumulate<T>(bits >= threshold ? to_accumulate(x) * scale : 0);
}

// Elements that a thread handles at once.
template <class T>
constexpr int DROPOUT_GROUP = ELEMENTS_PER_16_BYTES<T> < 4 ? 4 : ELEMENTS_PER_16_BYTES<T>;

template <class T, bool Aligned>
constexpr KernelLimits dropout_limits() {
  KernelLimits limits = elementwise_limits<T, ELEMENTS_PER_16_BYTES<T>, 1>();
  if (!Aligned) limits.load_bytes = limits.store_bytes = sizeof(T);
  return limits;
}

template <class T>
LaunchShape dropout_shape(int64_t n) {
  return elementwise_shape(n, DROPOUT_GROUP<T>);
}

template <class T, bool Aligned>
__global__ void __launch_bounds__(ELEMENTWISE_THREADS)
    dropout_kernel(const T* x, const int64_t* seed, uint64_t threshold, Accumulate<T> scale, T* out,
                   int64_t n) {
  constexpr int width = Aligned ? ELEMENTS_PER_16_BYTES<T> : 1;
  constexpr int group = DROPOUT_GROUP<T>;
  const auto key = static_cast<uint64_t>(*seed);
  const int64_t groups = n / group;
  for_each_chunk(groups, [&](int64_t first) {
    Vector<T, width> values[VECTORS_IN_FLIGHT][group / width];
#pragma unroll
    for (int i = 0; i < VECTORS_IN_FLIGHT; ++i) {
      const int64_t start = (first + i * ELEMENTWISE_THREADS) * group;
      if (start + group > n) continue;
#pragma unroll
      for (int j = 0; j < group / width; ++j) {
        values[i][j] = load_vector<T, width>(x + start + j * width);
      }
    }
#pragma unroll
    for (int i = 0; i < VECTORS_IN_FLIGHT; ++i) {
      const int64_t start = (first + i * ELEMENTWISE_THREADS) * group;
      if (start + group > n) continue;
      PhiloxBlock bits;
#pragma unroll
      for (int j = 0; j < group; ++j) {
        if (j % 4 == 0) bits = philox(key, static_cast<uint64_t>(start + j) / 4);
        T& value = values[i][j / width].at[j % width];
        value = keep_or_drop(value, bits.word[j % 4], threshold, scale);
      }
#pragma unroll
      for (int j = 0; j < group / width; ++j) {
        store_vector(out + start + j * width, values[i][j]);
      }
    }
  });
  const int64_t tail = groups * group + threadIdx.x;
  if (blockIdx.x == 0 && tail < n) {
    const PhiloxBlock bits = philox(key, static_cast<uint64_t>(tail) / 4);
#pragma unroll
    for (int j = 0; j < 4; ++j) {  // a word chosen by a runtime index would lie in local memory
      if (tail % 4 == j) out[tail] = keep_or_drop(x[tail], bits.word[j], threshold, scale);
    }
  }
}

template <class T>
void dropout(const T* x, const int64_t* seed, int64_t threshold, double scale, T* out, int64_t n,
             cudaStream_t stream) {
  if (n == 0) return;
  const auto kernel =
      all_aligned_to_16(x, out) ? dropout_kernel<T, true> : dropout_kernel<T, false>;
  launch(kernel, dropout_shape<T>(n), stream, x, seed, static_cast<uint64_t>(threshold),
         static_cast<Accumulate<T>>(scale), out, n);
}

}  // namespace pyext
