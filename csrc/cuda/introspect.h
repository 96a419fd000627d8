// The table of this library's CUDA kernels, for tools that ask for their registers, shared memory
// and spills (the doctor, the compile report).
//
// A .cu file enters each kernel that it launches, at namespace scope, with the shape that it is
// launched with (any grid) and the limits that its machine code keeps to:
//
//     PYEXT_REGISTER_KERNEL((relu_forward_kernel<float, 4>), elementwise_shape(1, 4),
//                           (relu_forward_limits<float, 4>()));
//
// csrc/introspect.cpp reads the table through the C functions below, without linking to this
// library. They work without a GPU as far as they can: the names are always there, the attributes
// come with an error text.

#pragma once

#ifdef __cplusplus
extern "C" {
#endif

// A subset of cudaFuncAttributes, with a layout that does not depend on the CUDA version.
typedef struct {
  int registers_per_thread;
  int static_shared_bytes;
  int max_dynamic_shared_bytes;
  int local_bytes_per_thread;  // register spills and local arrays
  int constant_bytes;
  int max_threads_per_block;
  int ptx_version;     // 10 * major + minor
  int binary_version;  // 10 * major + minor
} PyextKernelAttributes;

// What the source says of a kernel: its launch, and common/kernel_limits.cuh.
typedef struct {
  int threads_per_block;
  int dynamic_shared_bytes;
  int most_registers;
  int most_shared_bytes;
  int most_spill_bytes;
  int least_load_bytes;
  int least_store_bytes;
} PyextKernelStatement;

// The number of registered kernels.
int pyext_cuda_kernel_count(void);

// The signature of kernel `index`, demangled, or NULL if there is no such index. The text lives as
// long as the library.
const char* pyext_cuda_kernel_name(int index);

// What was registered of kernel `index`; zeros if there is no such index.
PyextKernelStatement pyext_cuda_kernel_statement(int index);

// Fills `attributes` and returns NULL, or returns why it cannot (no GPU, no code for this GPU).
const char* pyext_cuda_kernel_attributes(int index, PyextKernelAttributes* attributes);

#ifdef __cplusplus
}  // extern "C"

#if defined(__CUDACC__)
#include <string>
#include <typeinfo>

#include "common/kernel_limits.cuh"
#include "common/platform.cuh"

namespace pyext {

// One kernel of the table; the constructor puts it there.
struct RegisteredKernel {
  RegisteredKernel(const std::type_info& tag, const void* function, const LaunchShape& shape,
                   const KernelLimits& limits);
  std::string name;
  const void* function;
  PyextKernelStatement statement;
};

// A type whose name contains the kernel's: so the name cannot differ from what is registered.
template <auto* Kernel>
struct KernelTag {};

}  // namespace pyext

#define PYEXT_CONCATENATE_(a, b) a##b
#define PYEXT_CONCATENATE(a, b) PYEXT_CONCATENATE_(a, b)
#define PYEXT_REGISTER_KERNEL(kernel, shape, limits)                                         \
  static const ::pyext::RegisteredKernel PYEXT_CONCATENATE(registered_kernel_, __COUNTER__)( \
      typeid(::pyext::KernelTag<kernel>), reinterpret_cast<const void*>(kernel), shape, limits)
#else  // the emulator has no table of kernels
#define PYEXT_REGISTER_KERNEL(kernel, shape, limits) static_assert(true)
#endif
#endif
