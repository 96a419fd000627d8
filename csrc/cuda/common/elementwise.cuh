// The loop of every elementwise kernel: out[i] = operation(in0[i], in1[i], ...).
//
// Memory-bound: each thread keeps several 16-byte loads in flight before the first use. Blocks of
// 256 threads stride over the grid; indices are 64-bit; the tail that fills no vector is scalar.
#pragma once

#include <algorithm>
#include <utility>

#include "kernel_limits.cuh"
#include "numeric.cuh"

namespace pyext {

constexpr int ELEMENTWISE_THREADS = 256;
constexpr int VECTORS_IN_FLIGHT = 4;

// One block per 1024 vectors; the grid-stride loop takes over where the grid would get longer than
// 2^20 blocks, far beyond what any device holds at once.
inline LaunchShape elementwise_shape(int64_t n, int width) {
  const int64_t per_block = int64_t{ELEMENTWISE_THREADS} * VECTORS_IN_FLIGHT * width;
  const int64_t blocks = std::min<int64_t>(ceil_div(n, per_block), int64_t{1} << 20);
  return {dim3(static_cast<unsigned>(blocks)), dim3(ELEMENTWISE_THREADS)};
}

// A kernel that loads `Inputs` vectors of `Width` elements at a time and, if `stores_vectors`,
// stores one for them. A multiprocessor's 2048 threads are eight blocks.
template <class T, int Width, int Inputs>
constexpr KernelLimits elementwise_limits(bool stores_vectors = true) {
  constexpr int vector_bytes = Width * static_cast<int>(sizeof(T));
  constexpr int block_bytes = ELEMENTWISE_THREADS * VECTORS_IN_FLIGHT * Inputs * vector_bytes;
  return {.registers = registers_for(blocks_in_flight(block_bytes, 8), ELEMENTWISE_THREADS),
          .load_bytes = vector_bytes,
          .store_bytes = stores_vectors ? vector_bytes : static_cast<int>(sizeof(Accumulate<T>)),
          .shared_bytes = 0};
}

// Calls visit(first) for each group of this thread's vectors: first, first + ELEMENTWISE_THREADS,
// ..., VECTORS_IN_FLIGHT of them, of which those below `vectors` exist.
template <class Visit>
__device__ __forceinline__ void for_each_chunk(int64_t vectors, Visit visit) {
  const int64_t chunk = int64_t{ELEMENTWISE_THREADS} * VECTORS_IN_FLIGHT;
  for (int64_t first = blockIdx.x * chunk + threadIdx.x; first < vectors;
       first += gridDim.x * chunk) {
    visit(first);
  }
}

template <int Width, class T, class Operation, std::size_t... Input>
__device__ __forceinline__ void map_elements(std::index_sequence<Input...>, Operation operation,
                                             int64_t n, T* out,
                                             const T* const (&inputs)[sizeof...(Input)]) {
  const int64_t vectors = n / Width;
  for_each_chunk(vectors, [&](int64_t first) {
    Vector<T, Width> loaded[VECTORS_IN_FLIGHT][sizeof...(Input)];
#pragma unroll
    for (int i = 0; i < VECTORS_IN_FLIGHT; ++i) {
      const int64_t vector = first + i * ELEMENTWISE_THREADS;
      if (vector < vectors) {
        ((loaded[i][Input] = load_vector<T, Width>(inputs[Input] + vector * Width)), ...);
      }
    }
#pragma unroll
    for (int i = 0; i < VECTORS_IN_FLIGHT; ++i) {
      const int64_t vector = first + i * ELEMENTWISE_THREADS;
      if (vector < vectors) {
        Vector<T, Width> result;
#pragma unroll
        for (int j = 0; j < Width; ++j) result.at[j] = operation(loaded[i][Input].at[j]...);
        store_vector(out + vector * Width, result);
      }
    }
  });
  const int64_t tail = vectors * Width + threadIdx.x;
  if (blockIdx.x == 0 && tail < n) out[tail] = operation(inputs[Input][tail]...);
}

// To be called by all threads of a kernel launched with `elementwise_shape(n, Width)`. With
// Width > 1 all pointers are 16-byte aligned.
template <int Width, class T, class Operation, class... Inputs>
__device__ __forceinline__ void map_elements(Operation operation, int64_t n, T* out,
                                             const Inputs*... inputs) {
  const T* const table[] = {inputs...};
  map_elements<Width>(std::index_sequence_for<Inputs...>{}, operation, n, out, table);
}

template <class... Pointers>
bool all_aligned_to_16(const Pointers*... pointers) {
  return (is_aligned(pointers, 16) && ...);
}

}  // namespace pyext
