// The table of this library's CUDA kernels, for tools that ask for their registers, shared memory
// and spills.
//
// A .cu file names each kernel that it launches, at namespace scope:
//
//     PYEXT_REGISTER_KERNEL("relu_forward<float>", (relu_forward_kernel<float>));
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

// The number of registered kernels.
int pyext_cuda_kernel_count(void);

// The name of kernel `index`, or NULL if there is no such index.
const char* pyext_cuda_kernel_name(int index);

// Fills `attributes` and returns NULL, or returns why it cannot (no GPU, no code for this GPU).
const char* pyext_cuda_kernel_attributes(int index, PyextKernelAttributes* attributes);

#ifdef __cplusplus
}  // extern "C"

namespace pyext {

// One kernel of the table; the constructor puts it there.
struct RegisteredKernel {
  RegisteredKernel(const char* name, const void* function);
  const char* name;
  const void* function;
};

}  // namespace pyext

#define PYEXT_CONCATENATE_(a, b) a##b
#define PYEXT_CONCATENATE(a, b) PYEXT_CONCATENATE_(a, b)
#define PYEXT_REGISTER_KERNEL(name, kernel)                                                    \
  static const ::pyext::RegisteredKernel PYEXT_CONCATENATE(registered_kernel_, __COUNTER__)( \
      name, reinterpret_cast<const void*>(kernel))
#endif
