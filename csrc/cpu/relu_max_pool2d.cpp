// relu_max_pool2d on CPU tensors: schemas (for every device), launch and registration of the kernels
// in relu_max_pool2d.h.
#include "../common/checked_pooling.h"
#include "common/tensors.h"

#define PYEXT_KERNELS "relu_max_pool2d.h"
#include "common/for_each_isa.h"

namespace pyext {
namespace {

void check_cpu(const char* op, const Tensor& t) {
  STD_TORCH_CHECK(t.is_cpu(), op, ": operands are on the CPU");
}

std::tuple<Tensor, Tensor> relu_max_pool2d_forward(Tensor input, Sizes kernel, Sizes stride,
                                                   Sizes padding) {
  const char* op = "relu_max_pool2d_forward";
  check_cpu(op, input);
  const Pooling p = checked_pooling(op, input, kernel, stride, padding);
  const Tensor flat = in_one_run(input);
  const Sizes sizes = with_last_two(input, p.out_height, p.out_width);
  Tensor out = fresh(input, sizes);
  Tensor index = torch::stable::new_empty(input, sizes, ScalarType::Byte);
  visit_floating(input.scalar_type(), op, [&]<class T>(Type<T>) {
    const T* from = flat.const_data_ptr<T>();
    T* out_data = out.mutable_data_ptr<T>();
    uint8_t* index_data = index.mutable_data_ptr<uint8_t>();
    const int64_t rows = out.numel() / p.out_width;
    const int64_t row_work = p.out_width * p.kernel_height * p.kernel_width;
    torch::stable::parallel_for(
        0, rows, kGrain / row_work + 1, [=](int64_t begin, int64_t end) {
          PYEXT_ON_BEST_ISA(kernels::relu_max_pool_forward<Accumulate<T>>(from, p, begin, end,
                                                                          out_data, index_data));
        });
  });
  return {out, index};
}

Tensor relu_max_pool2d_backward(Tensor grad, Tensor index, Sizes kernel, Sizes stride,
                                Sizes padding, int64_t height, int64_t width) {
  const char* op = "relu_max_pool2d_backward";
  check_cpu(op, grad);
  const Pooling p = checked_unpooling(op, grad, height, width, kernel, stride, padding);
  check_index(op, index, grad, p);
  const Tensor flat_grad = in_one_run(grad);
  const Tensor flat_index = in_one_run(index);
  Tensor grad_input = fresh(grad, with_last_two(grad, height, width));
  visit_floating(grad.scalar_type(), op, [&]<class T>(Type<T>) {
    const T* grad_data = flat_grad.const_data_ptr<T>();
    const uint8_t* index_data = flat_index.const_data_ptr<uint8_t>();
    T* grad_input_data = grad_input.mutable_data_ptr<T>();
    const bool streamed = is_streamed(grad_input);
    torch::stable::parallel_for(0, grad_input.numel(), kGrain, [=](int64_t begin, int64_t end) {
      PYEXT_ON_BEST_ISA(kernels::write(
          grad_input_data + begin, end - begin, streamed, [&](int64_t first, int64_t count, T* to) {
            kernels::relu_max_pool_backward<Accumulate<T>>(grad_data, index_data, p, begin + first,
                                                           count, to);
          }));
    });
  });
  return grad_input;
}

Tensor relu_max_pool2d_gather(Tensor input, Tensor index, Sizes kernel, Sizes stride,
                              Sizes padding) {
  const char* op = "relu_max_pool2d_gather";
  check_cpu(op, input);
  const Pooling p = checked_pooling(op, input, kernel, stride, padding);
  check_index(op, index, input, p);
  const Tensor flat = in_one_run(input);
  const Tensor flat_index = in_one_run(index);
  Tensor out = fresh(input, index.sizes());
  visit_floating(input.scalar_type(), op, [&]<class T>(Type<T>) {
    const T* from = flat.const_data_ptr<T>();
    const uint8_t* index_data = flat_index.const_data_ptr<uint8_t>();
    T* out_data = out.mutable_data_ptr<T>();
    torch::stable::parallel_for(0, out.numel(), kGrain, [=](int64_t begin, int64_t end) {
      PYEXT_ON_BEST_ISA(kernels::relu_max_pool_gather(from, index_data, p, begin, end, out_data));
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pyext, m) {
  m.def(
      "relu_max_pool2d_forward(Tensor input, int[2] kernel_size, int[2] stride, int[2] padding) -> "
      "(Tensor, Tensor)");
  m.def(
      "relu_max_pool2d_backward(Tensor grad, Tensor index, int[2] kernel_size, int[2] stride, "
      "int[2] padding, SymInt height, SymInt width) -> Tensor");
  m.def(
      "relu_max_pool2d_gather(Tensor input, Tensor index, int[2] kernel_size, int[2] stride, "
      "int[2] padding) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(pyext, CPU, m) {
  m.impl("relu_max_pool2d_forward", TORCH_BOX(&relu_max_pool2d_forward));
  m.impl("relu_max_pool2d_backward", TORCH_BOX(&relu_max_pool2d_backward));
  m.impl("relu_max_pool2d_gather", TORCH_BOX(&relu_max_pool2d_gather));
}

}  // namespace pyext
