// two_layer_sgd_step on CPU tensors: five products, everything else in their epilogues; those that
// need only the rows at hand in one parallel region.
#include "two_layer_sgd_step.h"

#include "../common/updatable.h"

#define PYEXT_KERNELS "two_layer.h"
#include "common/for_each_isa.h"

namespace pyext {

template <class T>
T sgd_step(const Matrix<const T>& x, const Matrix<const T>& y, const Matrix<T>& w1,
           const Matrix<T>& w2, double lr) {
  using Acc = Accumulate<T>;
  const int64_t n = x.rows, n_hidden = w1.columns, n_out = w2.columns;
  const auto old_w1 = as_const(w1), old_w2 = as_const(w2);
  const Buffer<T> hidden_data(n * n_hidden);
  const Buffer<Acc> grad_out_data(n * n_out);
  const auto hidden = dense_view(hidden_data.get(), n, n_hidden);
  const auto grad_out = dense_view(grad_out_data.get(), n, n_out);
  double sum = 0;
  PYEXT_ON_BEST_ISA({
    const kernels::Descend<Acc, T> descend1{w1, Acc(lr)}, descend2{w2, Acc(lr)};
    Panels<Acc> d{nullptr, n, n_hidden, kernels::panel_width_of_d<Acc>(x, n_hidden, descend1)};
    const Buffer<Acc> d_data(d.size());
    d.data = d_data.get();
    // grad_out = 2 (prediction - y)
    const int64_t partials = divide_up(n_out, kernels::Vector<Acc>::lanes);
    std::vector<double> partial_sums(n * partials);
    const kernels::StoreError<Acc, T, Acc> store_error{
        nullptr, y, grad_out, Acc(2), nullptr, partial_sums.data(), partials};
    const kernels::StoreWhereActive<Acc, T> store_d{nullptr, as_const(hidden), d};
    const auto rest = [&](const auto& rows) {
      kernels::product_of_rows<Acc>(rows, as_const(hidden), old_w2, store_error);
      kernels::product_of_rows<Acc>(rows, as_const(grad_out), old_w2.transposed(), store_d);
    };
    if (kernels::goes_by_halves<Acc>(x, old_w1, old_w2))
      kernels::forward_by_halves<Acc>(x, old_w1, hidden, Parallel{}, rest);
    else
      kernels::forward_by_rows<Acc>(x, old_w1, old_w2, Parallel{},
                                    kernels::StoreReluWithBias<Acc, T>{nullptr, hidden}, rest);
    // From here on the weights change: all that read them is done.
    kernels::weight_products<Acc>(x, as_const(hidden), as_const(d), as_const(grad_out), Parallel{},
                                  descend1, descend2);
    for (const double each : partial_sums) sum += each;
  });
  return T(Acc(sum));
}

template double sgd_step(const Matrix<const double>&, const Matrix<const double>&,
                         const Matrix<double>&, const Matrix<double>&, double);
template float sgd_step(const Matrix<const float>&, const Matrix<const float>&,
                        const Matrix<float>&, const Matrix<float>&, double);
template BFloat16 sgd_step(const Matrix<const BFloat16>&, const Matrix<const BFloat16>&,
                           const Matrix<BFloat16>&, const Matrix<BFloat16>&, double);
template Half sgd_step(const Matrix<const Half>&, const Matrix<const Half>&, const Matrix<Half>&,
                       const Matrix<Half>&, double);

namespace {

Tensor two_layer_sgd_step(const Tensor& x, const Tensor& y, const Tensor& w1, const Tensor& w2,
                          double lr) {
  const char* op = "two_layer_sgd_step";
  check_network(op, x, w1, w2, std::nullopt, std::nullopt);
  check_matrix(op, "y", x, y, x.size(0), w2.size(1));
  check_updatable(op, {&w1, &w2}, {&x, &y});
  Tensor loss = fresh(x, {});
  visit_floating(x.scalar_type(), op, [&]<class T>(Type<T>) {
    *loss.mutable_data_ptr<T>() =
        sgd_step(view<T>(x), view<T>(y), mutable_view<T>(w1), mutable_view<T>(w2), lr);
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
