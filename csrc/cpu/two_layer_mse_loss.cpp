// two_layer_mse_loss on CPU tensors: the network's second product ends in the loss and its gradient.
#include "common/two_layer_operands.h"

#define PYEXT_KERNELS "two_layer.h"
#include "common/for_each_isa.h"

namespace pyext {
namespace {

std::tuple<Tensor, Tensor, Tensor> two_layer_mse_loss_forward(
    const Tensor& x, const Tensor& y, const Tensor& w1, const Tensor& w2,
    const std::optional<Tensor>& b1, const std::optional<Tensor>& b2, int64_t reduction) {
  const char* op = "two_layer_mse_loss_forward";
  check_network(op, x, w1, w2, b1, b2);
  const int64_t n = x.size(0), n_out = w2.size(1);
  check_matrix(op, "y", x, y, n, n_out);
  Tensor hidden = fresh(x, {n, w1.size(1)});
  Tensor error = fresh(x, {n, n_out});
  Tensor loss = reduction == kNone ? fresh(x, {n, n_out}) : fresh(x, {});
  const Bias bias1(b1), bias2(b2);
  visit_floating(x.scalar_type(), op, [&]<class T>(Type<T>) {
    using Acc = Accumulate<T>;
    PYEXT_ON_BEST_ISA({
      const int64_t partials = divide_up(n_out, kernels::Vector<Acc>::lanes);
      std::vector<double> partial_sums(n * partials);
      const kernels::StoreError<Acc, T, T> store_error{
          bias2.data<T>(), view<T>(y), mutable_view<T>(error), Acc(1),
          reduction == kNone ? loss.mutable_data_ptr<T>() : nullptr, partial_sums.data(), partials};
      kernels::forward_by_rows<Acc>(
          view<T>(x), view<T>(w1), view<T>(w2), Parallel{},
          kernels::StoreReluWithBias<Acc, T>{bias1.data<T>(), mutable_view<T>(hidden)},
          [&](const auto& rows) {
            kernels::product_of_rows<Acc>(rows, view<T>(hidden), view<T>(w2), store_error);
          });
      if (reduction != kNone) {
        double sum = 0;
        for (const double each : partial_sums) sum += each;
        *loss.mutable_data_ptr<T>() =
            T(Acc(reduction == kMean ? sum / double(n * n_out) : sum));
      }
    });
  });
  return {loss, hidden, error};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pyext, m) {
  m.def(
      "two_layer_mse_loss_forward(Tensor x, Tensor y, Tensor w1, Tensor w2, Tensor? b1, "
      "Tensor? b2, int reduction) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(pyext, CPU, m) {
  m.impl("two_layer_mse_loss_forward", TORCH_BOX(&two_layer_mse_loss_forward));
}

}  // namespace pyext
