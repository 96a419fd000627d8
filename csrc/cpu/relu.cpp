// relu on CPU tensors: schemas (for every device), launch and registration of the kernels in relu.h.
#include "common/bits.h"
#include "common/tensors.h"

#define PYEXT_KERNELS "relu.h"
#include "common/for_each_isa.h"

namespace pyext {
namespace {

Tensor relu_forward(const Tensor& x) {
  Tensor out = fresh_like(x);
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
  Tensor grad_x = fresh_like(out);
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

int64_t mask_bytes(const Tensor& of) { return (of.numel() + 7) / 8; }

// Shared among the threads by bytes of the mask.
std::tuple<Tensor, Tensor> relu_forward_with_mask(const Tensor& x) {
  const Tensor flat_x = in_one_run(x);
  Tensor out = fresh(x, x.sizes());
  Tensor mask = torch::stable::new_empty(x, {mask_bytes(x)}, ScalarType::Byte);
  visit_floating(x.scalar_type(), "relu_forward_with_mask", [&]<class T>(Type<T>) {
    const int64_t n = x.numel();
    const T* x_data = flat_x.const_data_ptr<T>();
    T* out_data = out.mutable_data_ptr<T>();
    uint8_t* mask_data = mask.mutable_data_ptr<uint8_t>();
    const bool streamed = is_streamed(out);
    torch::stable::parallel_for(0, mask.numel(), kGrain / 8, [=](int64_t first_byte, int64_t end) {
      const int64_t begin = 8 * first_byte;
      PYEXT_ON_BEST_ISA(kernels::write(
          out_data + begin, std::min(n, 8 * end) - begin, streamed,
          [=](int64_t first, int64_t count, T* to) {
            const int64_t i = begin + first;
            kernels::relu_forward_with_mask(x_data + i, to, mask_data + i / 8, count);
          }));
    });
  });
  return {out, mask};
}

Tensor relu_backward_with_mask(const Tensor& grad, const Tensor& mask) {
  const char* op = "relu_backward_with_mask";
  STD_TORCH_CHECK(grad.is_cpu() && mask.is_cpu(), op, ": operands are on different devices");
  STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Byte && mask.numel() == mask_bytes(grad), op,
                  ": mask must hold one bit for each element of grad, as uint8");
  const Tensor flat_grad = in_one_run(grad);
  const Tensor flat_mask = in_one_run(mask);
  Tensor grad_x = fresh(grad, grad.sizes());
  visit_floating(grad.scalar_type(), op, [&]<class T>(Type<T>) {
    const int64_t n = grad.numel();
    const T* grad_data = flat_grad.const_data_ptr<T>();
    const uint8_t* mask_data = flat_mask.const_data_ptr<uint8_t>();
    T* grad_x_data = grad_x.mutable_data_ptr<T>();
    const bool streamed = is_streamed(grad_x);
    torch::stable::parallel_for(0, mask.numel(), kGrain / 8, [=](int64_t first_byte, int64_t end) {
      const int64_t begin = 8 * first_byte;
      PYEXT_ON_BEST_ISA(kernels::write(
          grad_x_data + begin, std::min(n, 8 * end) - begin, streamed,
          [=](int64_t first, int64_t count, T* to) {
            const int64_t i = begin + first;
            kernels::relu_backward_with_mask(grad_data + i, mask_data + i / 8, to, count);
          }));
    });
  });
  return grad_x;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pyext, m) {
  m.def("relu_forward(Tensor x) -> Tensor");
  m.def("relu_backward(Tensor grad, Tensor out) -> Tensor");
  m.def("relu_forward_with_mask(Tensor x) -> (Tensor, Tensor)");
  m.def("relu_backward_with_mask(Tensor grad, Tensor mask) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(pyext, CPU, m) {
  m.impl("relu_forward", TORCH_BOX(&relu_forward));
  m.impl("relu_backward", TORCH_BOX(&relu_backward));
  m.impl("relu_forward_with_mask", TORCH_BOX(&relu_forward_with_mask));
  m.impl("relu_backward_with_mask", TORCH_BOX(&relu_backward_with_mask));
}

}  // namespace pyext
