// What was built: the compilers, versions, flags and architectures of the compiled libraries, and
// the registers, shared memory and spills of each CUDA kernel. Includes no PyTorch header, so that
// it works with any PyTorch.

#include <cxxabi.h>
#include <dlfcn.h>
#include <pybind11/pybind11.h>

#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>

#include "build_info.h"  // kBuildInfo, written by the build
#include "cuda/introspect.h"

namespace py = pybind11;

namespace {

template <typename Function>
Function symbol(void* library, const char* name) {
  void* found = dlsym(library, name);
  if (found == nullptr) {
    throw std::runtime_error(std::string("the library has no ") + name);
  }
  return reinterpret_cast<Function>(found);
}

// The library stays open: it registers ops with PyTorch, which must not be unloaded.
void* open_library(const std::string& path) {
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    throw std::runtime_error(dlerror());
  }
  return library;
}

py::dict limits(const PyextKernelStatement& stated) {
  py::dict found;
  found["registers"] = stated.most_registers;
  found["shared_bytes"] = stated.most_shared_bytes;
  found["spill_bytes"] = stated.most_spill_bytes;
  found["load_bytes"] = stated.least_load_bytes;
  found["store_bytes"] = stated.least_store_bytes;
  return found;
}

// The demangled `name`, or `name` itself if it is not mangled.
std::string demangled(const std::string& name) {
  int status = 0;
  const std::unique_ptr<char, decltype(&std::free)> text(
      abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status), &std::free);
  return text ? text.get() : name;
}

py::list cuda_kernels(const std::string& path) {
  void* library = open_library(path);
  const auto count = symbol<decltype(&pyext_cuda_kernel_count)>(library, "pyext_cuda_kernel_count");
  const auto name = symbol<decltype(&pyext_cuda_kernel_name)>(library, "pyext_cuda_kernel_name");
  const auto attributes =
      symbol<decltype(&pyext_cuda_kernel_attributes)>(library, "pyext_cuda_kernel_attributes");
  const auto statement =
      symbol<decltype(&pyext_cuda_kernel_statement)>(library, "pyext_cuda_kernel_statement");
  py::list kernels;
  for (int index = 0; index < count(); ++index) {
    py::dict kernel;
    kernel["name"] = name(index);
    const PyextKernelStatement stated = statement(index);
    kernel["threads_per_block"] = stated.threads_per_block;
    kernel["dynamic_shared_bytes"] = stated.dynamic_shared_bytes;
    kernel["limits"] = limits(stated);
    PyextKernelAttributes found{};
    if (const char* error = attributes(index, &found)) {
      kernel["error"] = error;
    } else {
      kernel["registers_per_thread"] = found.registers_per_thread;
      kernel["static_shared_bytes"] = found.static_shared_bytes;
      kernel["max_dynamic_shared_bytes"] = found.max_dynamic_shared_bytes;
      kernel["local_bytes_per_thread"] = found.local_bytes_per_thread;
      kernel["constant_bytes"] = found.constant_bytes;
      kernel["max_threads_per_block"] = found.max_threads_per_block;
      kernel["ptx_version"] = found.ptx_version;
      kernel["binary_version"] = found.binary_version;
    }
    kernels.append(kernel);
  }
  return kernels;
}

}  // namespace

PYBIND11_MODULE(_introspect, module) {
  module.doc() = "What the compiled libraries were built with, and their CUDA kernels' attributes.";
  module.def(
      "build_info",
      [] { return py::module_::import("json").attr("loads")(kBuildInfo); },
      "The compilers, versions, flags and architectures of the last build, as a dict.");
  module.def("demangled", &demangled, py::arg("name"),
             "The C++ name behind a mangled one; any other text as it is.");
  module.def(
      "cuda_kernels", &cuda_kernels, py::arg("path"),
      R"(The kernels of the CUDA library at `path`, as a list of dicts.

Each has a "name" (its demangled signature), what its source says of it ("threads_per_block" and
"dynamic_shared_bytes" of its launches, and "limits": the most "registers", "shared_bytes" and
"spill_bytes", the least "load_bytes" and "store_bytes") and either the attributes of the code that
the current GPU would run ("registers_per_thread", "static_shared_bytes",
"max_dynamic_shared_bytes", "local_bytes_per_thread", "constant_bytes", "max_threads_per_block",
"ptx_version", "binary_version") or an "error" that says why there are none. Raises RuntimeError if
the library does not load; import torch first, whose libraries it needs.)");
}
