// The pool of the C++ kernels' intermediates, for Python.
#include "common/buffer.h"
#include "common/tensors.h"

namespace pyext {
namespace {

int64_t empty_buffer_pool() { return int64_t(BufferPool::instance().empty()); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pyext, m) {
  m.def("empty_buffer_pool() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(pyext, CompositeExplicitAutograd, m) {
  m.impl("empty_buffer_pool", TORCH_BOX(&empty_buffer_pool));
}

}  // namespace pyext
