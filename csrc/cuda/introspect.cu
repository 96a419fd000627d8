// The table of kernels that introspect.h describes.

#if defined(__CUDACC__)  // the emulator has no table of kernels
#include "introspect.h"

#include <cuda_runtime.h>
#include <cxxabi.h>

#include <cstdlib>
#include <memory>
#include <vector>

namespace {

// A function's static: kernels register while the library's other files are still initialising.
std::vector<const pyext::RegisteredKernel*>& table() {
  static std::vector<const pyext::RegisteredKernel*> kernels;
  return kernels;
}

// "void pyext::relu_forward_kernel<float, 4>(float const*, float*, long)"
std::string signature_in(const std::type_info& tag) {
  int status = 0;
  const std::unique_ptr<char, decltype(&std::free)> demangled(
      abi::__cxa_demangle(tag.name(), nullptr, nullptr, &status), &std::free);
  const std::string text = demangled ? demangled.get() : tag.name();
  const std::string before = "pyext::KernelTag<&(";
  const std::string after = ")>";
  if (!text.starts_with(before) || !text.ends_with(after)) return text;
  return text.substr(before.size(), text.size() - before.size() - after.size());
}

bool is_index(int index) {
  return index >= 0 && index < static_cast<int>(table().size());
}

}  // namespace

pyext::RegisteredKernel::RegisteredKernel(const std::type_info& tag, const void* function,
                                          const LaunchShape& shape, const KernelLimits& limits)
    : name(signature_in(tag)),
      function(function),
      statement{
          .threads_per_block = static_cast<int>(shape.block.x * shape.block.y * shape.block.z),
          .dynamic_shared_bytes = static_cast<int>(shape.shared_bytes),
          .most_registers = limits.registers,
          .most_shared_bytes = static_cast<int>(limits.shared_bytes),
          .most_spill_bytes = limits.spill_bytes,
          .least_load_bytes = limits.load_bytes,
          .least_store_bytes = limits.store_bytes,
      } {
  table().push_back(this);
}

#define PYEXT_EXPORT __attribute__((visibility("default")))

extern "C" PYEXT_EXPORT int pyext_cuda_kernel_count() {
  return static_cast<int>(table().size());
}

extern "C" PYEXT_EXPORT const char* pyext_cuda_kernel_name(int index) {
  return is_index(index) ? table()[index]->name.c_str() : nullptr;
}

extern "C" PYEXT_EXPORT PyextKernelStatement pyext_cuda_kernel_statement(int index) {
  return is_index(index) ? table()[index]->statement : PyextKernelStatement{};
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
#endif
