// two_layer_sgd_step on CPU tensors: five products, everything else in their epilogues; those that
// need only the rows at hand in one parallel region.
#include "common/two_layer_operands.h"

#define PYEXT_KERNELS "two_layer.h"
#include "common/for_each_isa.h"

namespace pyext {
namespace {

Tensor two_layer_sgd_step(const Tensor& x, const Tensor& y, const Tensor& w1, const Tensor& w2,
                          double lr) {
  const char* op = "two_layer_sgd_step";
  check_network(op, x, w1, w2, std::nullopt, std::nullopt);
  const int64_t n = x.size(0), n_hidden = w1.size(1), n_out = w2.size(1);
  check_matrix(op, "y", x, y, n, n_out);
  Tensor loss = empty_matrix(x, {});
  visit_floating(x.scalar_type(), op, [&]<class T>(Type<T>) {
    using Acc = Accumulate<T>;
    const Buffer<T> hidden_data(n * n_hidden);
    const Buffer<Acc> grad_out_data(n * n_out), d_data(n * n_hidden);
    const auto hidden = dense_view(hidden_data.get(), n, n_hidden);
    const auto grad_out = dense_view(grad_out_data.get(), n, n_out);
    const auto d = dense_view(d_data.get(), n, n_hidden);
    PYEXT_ON_BEST_ISA({
      const auto x_view = view<T>(x), w1_view = view<T>(w1), w2_view = view<T>(w2);
      // grad_out = 2 (prediction - y)
      const int64_t partials = divide_up(n_out, kernels::Vector<Acc>::lanes);
      std::vector<double> partial_sums(n * partials);
      const kernels::StoreError<Acc, T, Acc> store_error{
          nullptr, view<T>(y), grad_out, Acc(2), nullptr, partial_sums.data(), partials};
      const kernels::StoreWhereActive<Acc, T> store_d{nullptr, as_const(hidden), d};
      const auto rest = [&](const auto& rows) {
        kernels::product_of_rows<Acc>(rows, as_const(hidden), w2_view, store_error);
        kernels::product_of_rows<Acc>(rows, as_const(grad_out), w2_view.transposed(), store_d);
      };
      if (kernels::goes_by_halves<Acc>(x_view, w1_view, w2_view))
        kernels::forward_by_halves<Acc>(x_view, w1_view, hidden, Parallel{}, rest);
      else
        kernels::forward_by_rows<Acc>(x_view, w1_view, w2_view, Parallel{},
                                      kernels::StoreReluWithBias<Acc, T>{nullptr, hidden}, rest);
      // From here on the weights change: all that read them is done.
      kernels::weight_products<Acc>(x_view, as_const(hidden), as_const(d), as_const(grad_out),
                                    Parallel{},
                                    kernels::Descend<Acc, T>{mutable_view<T>(w1), Acc(lr)},
                                    kernels::Descend<Acc, T>{mutable_view<T>(w2), Acc(lr)});
      double sum = 0;
      for (const double each : partial_sums) sum += each;
      *loss.mutable_data_ptr<T>() = T(Acc(sum));
    });
  });
  return loss;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pyext, m) {
  m.def(
      "two_layer_sgd_step(Tensor x, Tensor y, Tensor(a!) w1, Tensor(b!) w2, float lr) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(pyext, CPU, m) {
  m.impl("two_layer_sgd_step", TORCH_BOX(&two_layer_sgd_step));
}

}  // namespace pyext
