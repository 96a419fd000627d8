// relu_max_pool2d on CPU tensors: schemas (for every device), launch and registration of the kernels
// in relu_max_pool2d.h.
#include "common/pooling.h"
#include "common/tensors.h"

#define PYEXT_KERNELS "relu_max_pool2d.h"
#include "common/for_each_isa.h"

namespace pyext {
namespace {

using Sizes = std::vector<int64_t>;

// What memory safety needs of the sizes; pyext/ops/relu_max_pool2d.py says it in better words.
Pooling pooling(const char* op, int64_t height, int64_t width, const Sizes& kernel,
                const Sizes& stride, const Sizes& padding) {
  STD_TORCH_CHECK(kernel.size() == 2 && stride.size() == 2 && padding.size() == 2, op,
                  ": kernel_size, stride and padding are pairs");
  for (int i = 0; i < 2; ++i)
    STD_TORCH_CHECK(kernel[i] > 0 && kernel[i] <= kNowhere && stride[i] > 0 && padding[i] >= 0 &&
                        2 * padding[i] <= kernel[i],
                    op, ": kernel_size, stride or padding is out of range");
  STD_TORCH_CHECK(kernel[0] * kernel[1] <= kNowhere, op, ": at most 255 elements to a window");
  const auto windows = [&](int64_t n, int i) {
    const int64_t last = n + 2 * padding[i] - kernel[i];
    STD_TORCH_CHECK(n > 0 && last >= 0, op, ": a window does not fit into the input");
    return last / stride[i] + 1;
  };
  return {height,    width,     windows(height, 0), windows(width, 1), kernel[0],
          kernel[1], stride[0], stride[1],          padding[0],        padding[1]};
}

Sizes with_last_two(const Tensor& like, int64_t height, int64_t width) {
  Sizes sizes = like.sizes().vec();
  sizes[sizes.size() - 2] = height;
  sizes[sizes.size() - 1] = width;
  return sizes;
}

void check_planes(const char* op, const Tensor& t) {
  STD_TORCH_CHECK(t.is_cpu() && t.dim() >= 2, op, ": operands are planes on the CPU");
}

void check_index(const char* op, const Tensor& index, const Sizes& sizes) {
  STD_TORCH_CHECK(index.is_cpu() && index.scalar_type() == ScalarType::Byte &&
                      index.sizes().vec() == sizes,
                  op, ": index must be uint8 with one element for each window");
}

std::tuple<Tensor, Tensor> relu_max_pool2d_forward(Tensor input, Sizes kernel, Sizes stride,
                                                   Sizes padding) {
  const char* op = "relu_max_pool2d_forward";
  check_planes(op, input);
  const Pooling p = pooling(op, input.size(-2), input.size(-1), kernel, stride, padding);
  const Tensor flat = torch::stable::contiguous(input);
  const Sizes sizes = with_last_two(input, p.out_height, p.out_width);
  Tensor out = in_huge_pages(torch::stable::new_empty(input, sizes));
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
  check_planes(op, grad);
  const Pooling p = pooling(op, height, width, kernel, stride, padding);
  check_index(op, index, grad.sizes().vec());
  STD_TORCH_CHECK(grad.size(-2) == p.out_height && grad.size(-1) == p.out_width, op,
                  ": grad must have one element for each window");
  const Tensor flat_grad = torch::stable::contiguous(grad);
  const Tensor flat_index = torch::stable::contiguous(index);
  Tensor grad_input =
      in_huge_pages(torch::stable::new_empty(grad, with_last_two(grad, height, width)));
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
  check_planes(op, input);
  const Pooling p = pooling(op, input.size(-2), input.size(-1), kernel, stride, padding);
  check_index(op, index, with_last_two(input, p.out_height, p.out_width));
  const Tensor flat = torch::stable::contiguous(input);
  const Tensor flat_index = torch::stable::contiguous(index);
  Tensor out = torch::stable::new_empty(input, index.sizes());
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
