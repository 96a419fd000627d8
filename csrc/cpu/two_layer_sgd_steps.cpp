// two_layer_sgd_steps on CPU tensors: one step after the other, within one call.
#include "two_layer_sgd_step.h"

namespace pyext {
namespace {

// Batch `step` of a tensor of batches; a tensor that is one batch is every step's.
template <class T>
Matrix<const T> batch(const Tensor& t, int64_t step) {
  if (t.dim() == 2) return view<T>(t);
  return {t.const_data_ptr<T>() + step * t.stride(0), t.size(1), t.size(2), t.stride(1),
          t.stride(2)};
}

Tensor two_layer_sgd_steps(const Tensor& x, const Tensor& y, const Tensor& w1, const Tensor& w2,
                           double lr, int64_t steps) {
  const char* op = "two_layer_sgd_steps";
  STD_TORCH_CHECK(steps >= 0, op, ": steps must not be negative");
  const int64_t dim = x.dim();
  STD_TORCH_CHECK((dim == 2 || dim == 3) && w1.dim() == 2 && w2.dim() == 2, op,
                  ": x must be a batch or a batch for each step, w1 and w2 matrices");
  STD_TORCH_CHECK(y.dim() == dim && y.size(dim - 2) == x.size(dim - 2) &&
                      y.size(dim - 1) == w2.size(1) && y.scalar_type() == x.scalar_type() &&
                      y.is_cpu(),
                  op, ": y differs from x @ w1 @ w2 in shape, dtype or device");
  STD_TORCH_CHECK(dim == 2 || (x.size(0) == steps && y.size(0) == steps), op,
                  ": there must be a batch for each step");
  check_matrix(op, "w1", x, w1, x.size(dim - 1), w1.size(1));
  check_matrix(op, "w2", x, w2, w1.size(1), w2.size(1));
  Tensor losses = fresh(x, {steps});
  visit_floating(x.scalar_type(), op, [&]<class T>(Type<T>) {
    for (int64_t step = 0; step < steps; ++step) {
      losses.mutable_data_ptr<T>()[step] = sgd_step(batch<T>(x, step), batch<T>(y, step),
                                                    mutable_view<T>(w1), mutable_view<T>(w2), lr);
    }
  });
  return losses;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pyext, m) {
  m.def(
      "two_layer_sgd_steps(Tensor x, Tensor y, Tensor(a!) w1, Tensor(b!) w2, float lr, int steps) "
      "-> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(pyext, CPU, m) {
  m.impl("two_layer_sgd_steps", TORCH_BOX(&two_layer_sgd_steps));
}

}  // namespace pyext
