// relu on CPU tensors: schemas (for every device), launch and registration of the kernels in relu.h.
#include "common/tensors.h"

#define PYEXT_KERNELS "relu.h"
#include "common/for_each_isa.h"

namespace pyext {
namespace {

Tensor relu_forward(const Tensor& x) {
  Tensor out = in_huge_pages(fresh_like(x));
  const Tensor flat_x = with_strides_of(out, x);
  visit_real(x.scalar_type(), "relu_forward", [&]<class T>(Type<T>) {
    const T* x_data = flat_x.const_data_ptr<T>();
    T* out_data = out.mutable_data_ptr<T>();
    const bool streamed = is_streamed(out);
    torch::stable::parallel_for(0, out.numel(), kGrain, [=](int64_t begin, int64_t end) {
      PYEXT_ON_BEST_ISA(kernels::write(
          out_data + begin, end - begin, streamed, [=](int64_t first, int64_t count, T* to) {
            kernels::relu_forward(x_data + begin + first, to, count);
          }));
    });
  });
  return out;
}

Tensor relu_backward(const Tensor& grad, const Tensor& out) {
  check_like("relu_backward", out, grad);
  Tensor grad_x = in_huge_pages(fresh_like(out));
  const Tensor flat_grad = with_strides_of(grad_x, grad);
  const Tensor flat_out = with_strides_of(grad_x, out);
  visit_real(out.scalar_type(), "relu_backward", [&]<class T>(Type<T>) {
    const T* grad_data = flat_grad.const_data_ptr<T>();
    const T* out_data = flat_out.const_data_ptr<T>();
    T* grad_x_data = grad_x.mutable_data_ptr<T>();
    const bool streamed = is_streamed(out);
    torch::stable::parallel_for(0, out.numel(), kGrain, [=](int64_t begin, int64_t end) {
      PYEXT_ON_BEST_ISA(kernels::write(
          grad_x_data + begin, end - begin, streamed, [=](int64_t first, int64_t count, T* to) {
            const int64_t i = begin + first;
            kernels::relu_backward(grad_data + i, out_data + i, to, count);
          }));
    });
  });
  return grad_x;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pyext, m) {
  m.def("relu_forward(Tensor x) -> Tensor");
  m.def("relu_backward(Tensor grad, Tensor out) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(pyext, CPU, m) {
  m.impl("relu_forward", TORCH_BOX(&relu_forward));
  m.impl("relu_backward", TORCH_BOX(&relu_backward));
}

}  // namespace pyext
