// The table of kernels that introspect.h describes.

#include "introspect.h"

#include <cuda_runtime.h>

#include <vector>

namespace {

// A function's static: kernels register while the library's other files are still initialising.
std::vector<const pyext::RegisteredKernel*>& table() {
  static std::vector<const pyext::RegisteredKernel*> kernels;
  return kernels;
}

bool is_index(int index) {
  return index >= 0 && index < static_cast<int>(table().size());
}

}  // namespace

pyext::RegisteredKernel::RegisteredKernel(const char* name, const void* function)
    : name(name), function(function) {
  table().push_back(this);
}

#define PYEXT_EXPORT __attribute__((visibility("default")))

extern "C" PYEXT_EXPORT int pyext_cuda_kernel_count() {
  return static_cast<int>(table().size());
}

extern "C" PYEXT_EXPORT const char* pyext_cuda_kernel_name(int index) {
  return is_index(index) ? table()[index]->name : nullptr;
}

extern "C" PYEXT_EXPORT const char* pyext_cuda_kernel_attributes(
    int index, PyextKernelAttributes* attributes) {
  if (!is_index(index)) {
    return "no such kernel";
  }
  cudaFuncAttributes found{};
  const cudaError_t status = cudaFuncGetAttributes(&found, table()[index]->function);
  if (status != cudaSuccess) {
    cudaGetLastError();  // not to be taken for a later launch's error
    return cudaGetErrorString(status);
  }
  *attributes = PyextKernelAttributes{
      found.numRegs,
      static_cast<int>(found.sharedSizeBytes),
      found.maxDynamicSharedSizeBytes,
      static_cast<int>(found.localSizeBytes),
      static_cast<int>(found.constSizeBytes),
      found.maxThreadsPerBlock,
      found.ptxVersion,
      found.binaryVersion,
  };
  return nullptr;
}
