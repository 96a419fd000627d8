// What every kernel needs from the platform: CUDA's keywords and types, the one accessor of shared
// memory, and the one way to launch. Without nvcc the emulator supplies the same names on the CPU.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#else
#include "../../emulator/cuda_on_cpu.h"
#endif

// A program that knows a better report (PyTorch's) defines this before the first include.
#ifndef PYEXT_CHECK_CUDA
#include <stdexcept>
#define PYEXT_CHECK_CUDA(call)                                  \
  do {                                                          \
    const cudaError_t status = (call);                          \
    if (status != cudaSuccess)                                  \
      throw std::runtime_error(cudaGetErrorString(status));     \
  } while (0)
#endif

namespace pyext {

constexpr int WARP_SIZE = 32;
constexpr unsigned FULL_WARP = 0xffffffffu;

#if defined(__CUDACC__)
// The block's dynamic shared memory. No kernel declares `__shared__` itself: the emulator could not
// tell the blocks of one launch apart.
template <class T>
__device__ __forceinline__ T* shared_memory() {
  extern __shared__ __align__(16) unsigned char dynamic_shared_memory[];
  return reinterpret_cast<T*>(dynamic_shared_memory);
}

// Only the emulator has to check: hardware faults.
__device__ __forceinline__ void check_alignment(const void*, std::size_t) {}
#else
template <class T>
T* shared_memory() {
  return reinterpret_cast<T*>(emulator::block_shared_memory());
}

using emulator::check_alignment;
#endif

// Programmatic dependent launch came with compute capability 9.0; the emulator has it, too.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define PYEXT_LAUNCHES_OVERLAP
#endif

// A kernel whose launch `overlaps_previous` calls this in every thread, before it touches what the
// kernels ahead of it in the stream write, or writes what they read. From here on the one before has
// ended, and so have those that it has waited for itself, which is why every thread must call this.
__device__ __forceinline__ void wait_for_previous_kernel() {
#ifdef PYEXT_LAUNCHES_OVERLAP
  cudaGridDependencySynchronize();
#endif
}

// Once every block has called it or ended, the next launch may begin if it overlaps this one.
__device__ __forceinline__ void let_next_kernel_begin() {
#ifdef PYEXT_LAUNCHES_OVERLAP
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

struct LaunchShape {
  dim3 grid;
  dim3 block;
  std::size_t shared_bytes = 0;    // at most 48 KiB: more would need cudaFuncSetAttribute
  bool cooperative = false;        // all blocks are alive at once, and the grid can meet
  bool overlaps_previous = false;  // where `can_overlap`: begins before the launch ahead has ended
};

// Whether the kernel's code on the current device has the waiting that an overlap needs. The device
// alone does not tell: a newer one may run the PTX of compute capability 8.0.
template <class Kernel>
bool can_overlap(Kernel* kernel) {
  cudaFuncAttributes attributes{};
  PYEXT_CHECK_CUDA(cudaFuncGetAttributes(&attributes, kernel));
  return attributes.ptxVersion >= 90;
}

template <class T>
struct Exactly {
  using type = T;
};

// Queues `kernel` on `stream` and checks the launch. The arguments convert to the kernel's own
// parameter types.
template <class... Parameters>
void launch(void (*kernel)(Parameters...), const LaunchShape& shape, cudaStream_t stream,
            typename Exactly<Parameters>::type... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute attributes[2] = {};
  config.attrs = attributes;
  if (shape.cooperative) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  }
  if (shape.overlaps_previous && can_overlap(kernel)) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  // cudaGetLastError reports the same error and clears it, so that no later check meets it again.
  static_cast<void>(cudaLaunchKernelEx(&config, kernel, arguments...));
  PYEXT_CHECK_CUDA(cudaGetLastError());
}

// Temporary device memory for an op that needs several launches. What `allocate` returns is aligned
// for 16-byte accesses and lives until the op's last launch has been queued.
class Scratch {
 public:
  virtual ~Scratch() = default;
  template <class T>
  T* allocate(int64_t count) {
    return static_cast<T*>(allocate_bytes(count * static_cast<int64_t>(sizeof(T))));
  }

 private:
  virtual void* allocate_bytes(int64_t bytes) = 0;
};

template <class T>
__host__ __device__ constexpr T ceil_div(T numerator, T denominator) {
  return (numerator + denominator - 1) / denominator;
}

}  // namespace pyext
