// Sums in a fixed order: bit-identical from run to run, whatever the device.
#pragma once

#include "kernel_limits.cuh"
#include "numeric.cuh"

namespace pyext {

constexpr int PARTIAL_SUM_THREADS = 1024;

// Shared memory that `block_sum` needs.
template <class Acc>
constexpr std::size_t block_sum_bytes(int threads) {
  return threads / WARP_SIZE * sizeof(Acc);
}

// Sum of `value` over the block, valid in thread 0. All threads of the block must call it; the
// block is one-dimensional and made of whole warps. Overwrites the start of the shared memory.
template <class Acc>
__device__ __forceinline__ Acc block_sum(Acc value) {
  Acc* warp_sums = shared_memory<Acc>();
  const int lane = threadIdx.x % WARP_SIZE;
  const int warp = threadIdx.x / WARP_SIZE;
  const int warps = blockDim.x / WARP_SIZE;
  for (int offset = WARP_SIZE / 2; offset > 0; offset /= 2) {
    value += __shfl_down_sync(FULL_WARP, value, offset);
  }
  __syncthreads();  // the caller may still be reading what lies in the shared memory
  if (lane == 0) warp_sums[warp] = value;
  __syncthreads();
  if (warp == 0) {
    value = lane < warps ? warp_sums[lane] : Acc(0);
    for (int offset = WARP_SIZE / 2; offset > 0; offset /= 2) {
      value += __shfl_down_sync(FULL_WARP, value, offset);
    }
  }
  return value;
}

template <class T>
LaunchShape sum_partials_shape() {
  return {dim3(1), dim3(PARTIAL_SUM_THREADS), block_sum_bytes<Accumulate<T>>(PARTIAL_SUM_THREADS)};
}

// A single block, which reads a few thousand values one by one.
template <class T>
constexpr KernelLimits sum_partials_limits() {
  return {.registers = registers_for(1, PARTIAL_SUM_THREADS),
          .load_bytes = sizeof(Accumulate<T>),
          .store_bytes = sizeof(T),
          .shared_bytes = block_sum_bytes<Accumulate<T>>(PARTIAL_SUM_THREADS)};
}

// out[0] = sum(partials) [/ divisor]. One block; a divisor of 0 elements gives nan, as the mean of
// nothing does.
template <class T>
__global__ void __launch_bounds__(PARTIAL_SUM_THREADS)
    sum_partials_kernel(const Accumulate<T>* partials, int64_t count, bool mean, int64_t divisor,
                        T* out) {
  Accumulate<T> sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += PARTIAL_SUM_THREADS) sum += partials[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) {
    out[0] = from_accumulate<T>(mean ? sum / static_cast<Accumulate<T>>(divisor) : sum);
  }
}

template <class T>
void sum_partials(const Accumulate<T>* partials, int64_t count, bool mean, int64_t divisor, T* out,
                  cudaStream_t stream) {
  launch(sum_partials_kernel<T>, sum_partials_shape<T>(), stream, partials, count, mean, divisor,
         out);
}

}  // namespace pyext
