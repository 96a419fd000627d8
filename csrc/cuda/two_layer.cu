// CUDA implementations of two_layer_forward and two_layer_backward.
#include "common/tensor.h"

#include "common/register_product.h"
#include "common/two_layer_instances.h"
#include "common/two_layer_tensors.h"

namespace pyext {

#define PYEXT_DEFINE(T) PYEXT_TWO_LAYER_INSTANCE(, T)
PYEXT_FOR_EACH_FLOATING(PYEXT_DEFINE)

namespace {

#define PYEXT_REGISTER_COLUMN_SUM(In, Out)                                        \
  PYEXT_REGISTER_KERNEL((column_sum_kernel<In, Out>), column_sum_shape<In>(1, 1), \
                        (column_sum_limits<In, Out>()))
#define PYEXT_REGISTER(T)                            \
  PYEXT_REGISTER_PRODUCT(T, StoreBias<T, true>)      \
  PYEXT_REGISTER_PRODUCT(T, StoreBias<T, false>)     \
  PYEXT_REGISTER_PRODUCT(T, StoreMasked<T>)          \
  PYEXT_REGISTER_TILES(T, StorePart<Accumulate<T>>); \
  PYEXT_REGISTER_COLUMN_SUM(T, T);
PYEXT_FOR_EACH_FLOATING(PYEXT_REGISTER)

PYEXT_REGISTER_TILE(float, LargeTile, StoreBias<float, true>);
PYEXT_REGISTER_TILE(float, LargeTile, StoreBias<float, false>);
PYEXT_REGISTER_TILE(float, LargeTile, StoreMasked<float>);
PYEXT_REGISTER_TILE(float, LargeTile, StorePart<float>);
PYEXT_REGISTER_COLUMN_SUM(__half, float);
PYEXT_REGISTER_COLUMN_SUM(float, __half);
PYEXT_REGISTER_COLUMN_SUM(__nv_bfloat16, float);
PYEXT_REGISTER_COLUMN_SUM(float, __nv_bfloat16);

std::tuple<Tensor, Tensor> two_layer_forward_op(const Tensor& x, const Tensor& w1,
                                                const Tensor& w2, const std::optional<Tensor>& b1,
                                                const std::optional<Tensor>& b2) {
  const char* op = "two_layer_forward";
  const TwoLayerSize size = checked_size(op, x, w1, w2);
  check_bias(op, "b1", b1, size.hidden, x);
  check_bias(op, "b2", b2, size.out, x);
  const OnDeviceOf device(x);
  const Tensor hidden = torch::stable::new_empty(x, {size.batch, size.hidden});
  const Tensor out = torch::stable::new_empty(x, {size.batch, size.out});
  TensorScratch scratch(x);
  dispatch_floating(op, x.scalar_type(), [&](auto element) {
    using T = typename decltype(element)::type;
    two_layer_forward(size, const_matrix<T>(x), const_matrix<T>(w1), bias_of<T>(b1),
                      const_matrix<T>(w2), bias_of<T>(b2), mutable_data<T>(hidden),
                      mutable_data<T>(out), scratch, device.stream);
  });
  return {out, hidden};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> two_layer_backward_op(
    const Tensor& grad_out, const std::optional<Tensor>& grad_hidden, const Tensor& x,
    const Tensor& w1, const Tensor& w2, const Tensor& hidden, bool need_x, bool need_w1,
    bool need_w2, bool need_b1, bool need_b2) {
  const char* op = "two_layer_backward";
  const TwoLayerSize size = checked_size(op, x, w1, w2);
  check_shape(op, "grad_out", grad_out, size.batch, size.out);
  check_shape(op, "hidden", hidden, size.batch, size.hidden);
  check_matches(op, "grad_out", grad_out, x);
  check_matches(op, "hidden", hidden, x);
  if (grad_hidden.has_value()) {
    check_shape(op, "grad_hidden", *grad_hidden, size.batch, size.hidden);
    check_matches(op, "grad_hidden", *grad_hidden, x);
  }
  const OnDeviceOf device(x);
  const auto matrix_if = [&](bool needed, int64_t rows, int64_t columns) {
    return needed ? torch::stable::new_empty(x, {rows, columns})
                  : torch::stable::new_empty(x, {0});
  };
  const auto vector_if = [&](bool needed, int64_t length) {
    return torch::stable::new_empty(x, {needed ? length : 0});
  };
  const Tensor grad_x = matrix_if(need_x, size.batch, size.in);
  const auto like_weight_if = [&](bool needed, const Tensor& w) {
    return needed && is_by_columns(w)
               ? torch::stable::transpose(matrix_if(true, w.size(1), w.size(0)), 0, 1)
               : matrix_if(needed, w.size(0), w.size(1));
  };
  const Tensor grad_w1 = like_weight_if(need_w1, w1);
  const Tensor grad_w2 = like_weight_if(need_w2, w2);
  const Tensor grad_b1 = vector_if(need_b1, size.hidden);
  const Tensor grad_b2 = vector_if(need_b2, size.out);
  TensorScratch scratch(x);
  dispatch_floating(op, x.scalar_type(), [&](auto element) {
    using T = typename decltype(element)::type;
    const auto data_if = [](bool needed, const Tensor& tensor) {
      return needed ? mutable_data<T>(tensor) : nullptr;
    };
    const TwoLayerGradients<T> gradients{
        data_if(need_x, grad_x), data_if(need_w1, grad_w1), data_if(need_w2, grad_w2),
        data_if(need_b1, grad_b1), data_if(need_b2, grad_b2), is_by_columns(w1),
        is_by_columns(w2)};
    two_layer_backward(size, const_matrix<T>(grad_out),
                       grad_hidden.has_value() ? const_matrix<T>(*grad_hidden) : Matrix<const T>{},
                       const_matrix<T>(x), const_matrix<T>(w1), const_matrix<T>(w2),
                       const_matrix<T>(hidden), gradients, scratch, device.stream);
  });
  return {grad_x, grad_w1, grad_w2, grad_b1, grad_b2};
}

PYEXT_KERNEL_LIBRARY(m) {
  m.impl("two_layer_forward", TORCH_BOX(&two_layer_forward_op));
  m.impl("two_layer_backward", TORCH_BOX(&two_layer_backward_op));
}

}  // namespace
}  // namespace pyext
