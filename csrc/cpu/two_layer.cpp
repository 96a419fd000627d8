// two_layer on CPU tensors: schemas, launch and registration of the kernels in two_layer.h.
#include "common/two_layer_operands.h"

#define PYEXT_KERNELS "two_layer.h"
#include "common/for_each_isa.h"

namespace pyext {
namespace {

std::tuple<Tensor, Tensor> two_layer_forward(const Tensor& x, const Tensor& w1, const Tensor& w2,
                                             const std::optional<Tensor>& b1,
                                             const std::optional<Tensor>& b2) {
  check_network("two_layer_forward", x, w1, w2, b1, b2);
  Tensor hidden = fresh(x, {x.size(0), w1.size(1)});
  Tensor out = fresh(x, {x.size(0), w2.size(1)});
  const Bias bias1(b1), bias2(b2);
  visit_floating(x.scalar_type(), "two_layer_forward", [&]<class T>(Type<T>) {
    using Acc = Accumulate<T>;
    PYEXT_ON_BEST_ISA({
      const kernels::StoreWithBias<Acc, T> store_out{bias2.data<T>(), mutable_view<T>(out)};
      kernels::forward_by_rows<Acc>(
          view<T>(x), view<T>(w1), view<T>(w2), Parallel{},
          kernels::StoreReluWithBias<Acc, T>{bias1.data<T>(), mutable_view<T>(hidden)},
          [&](const auto& rows) {
            kernels::product_of_rows<Acc>(rows, view<T>(hidden), view<T>(w2), store_out);
          });
    });
  });
  return {out, hidden};
}

// Where the gradients go; null for those that nobody needs.
struct Gradients {
  const Tensor *x, *w1, *w2, *b1, *b2;
};

void check_backward(const char* op, const Tensor& grad_out, const Tensor& x, const Tensor& w1,
                    const Tensor& w2, const Tensor& hidden) {
  check_network(op, x, w1, w2, std::nullopt, std::nullopt);
  check_matrix(op, "grad_out", x, grad_out, x.size(0), w2.size(1));
  check_matrix(op, "hidden", x, hidden, x.size(0), w1.size(1));
}

Tensor fresh_like_weight(const Tensor& w) {
  if (!is_by_columns(w)) return fresh(w, {w.size(0), w.size(1)});
  return fresh(w, w.sizes(), {1, std::max<int64_t>(w.size(0), 1)});
}

void write_gradients(const char* op, const Tensor& grad_out,
                     const std::optional<Tensor>& grad_hidden, const Tensor& x, const Tensor& w1,
                     const Tensor& w2, const Tensor& hidden, const Gradients& to) {
  const int64_t n = x.size(0), n_hidden = w1.size(1), n_out = w2.size(1);
  const Tensor dense_hidden = in_one_run(hidden);
  const std::optional<Tensor> extra =
      grad_hidden ? std::optional(in_one_run(*grad_hidden)) : std::nullopt;

  visit_floating(x.scalar_type(), op, [&]<class T>(Type<T>) {
    using Acc = Accumulate<T>;
    PYEXT_ON_BEST_ISA({
      const auto store = [](const Tensor& grad) {
        return kernels::StoreWithBias<Acc, T>{nullptr, mutable_view<T>(grad)};
      };
      if (to.x || to.w1 || to.b1) {
        const Parallel parallel;
        // Where one thread's work is enough for d, each makes its own instead of fetching that of
        // another core: 98 → 84 µs at 64 x 1000 x 100 x 10 while a line takes 0.35 µs from one of
        // two cores to the other and back, 73 → 71 while it takes 0.07.
        const int64_t tasks =
            to.w1 && to.w2 && n * n_hidden * n_out < kernels::kSerialWork
                ? kernels::tasks_of_one_region<Acc>(
                      view<T>(x), dense_view<const Acc>(nullptr, n, n_hidden), view<T>(grad_out),
                      parallel, store(*to.w1), store(*to.w2))
                : 0;
        const bool own_d = tasks > 1;
        const int64_t width =
            to.w1 && !to.x && !to.b1
                ? kernels::panel_width_of_d<Acc>(view<T>(x), n_hidden, store(*to.w1))
                : 0;
        Panels<Acc> d{nullptr, n, n_hidden, width};
        const Buffer<Acc> workspace(d.size() * (own_d ? tasks : 1));
        d.data = workspace.get();
        const auto d_of = [&](int64_t task, const Parallel& parallel) {
          const Panels<Acc> d_of_task{d.data + task * d.size(), n, n_hidden, width};
          kernels::product<Acc>(view<T>(grad_out), view<T>(w2).transposed(), parallel,
                                kernels::StoreWhereActive<Acc, T>{
                                    extra ? extra->const_data_ptr<T>() : nullptr,
                                    view<T>(dense_hidden), d_of_task});
          return as_const(d_of_task.by_rows());
        };
        if (!own_d) d_of(0, parallel);
        const auto by_rows = as_const(d.by_rows());  // read only where d does not lie in panels
        if (to.w1 && to.w2)
          kernels::weight_products<Acc>(
              view<T>(x), view<T>(hidden), as_const(d), view<T>(grad_out), parallel,
              store(*to.w1), store(*to.w2),
              [&](int64_t task) { return own_d ? d_of(task, Parallel{1}) : by_rows; });
        else if (to.w1)
          kernels::weight_product<Acc>(view<T>(x), as_const(d), parallel, store(*to.w1));
        if (to.x)
          kernels::product<Acc>(by_rows, view<T>(w1).transposed(), parallel, store(*to.x));
        if (to.b1) kernels::column_sums<Acc>(by_rows, to.b1->mutable_data_ptr<T>(), parallel);
      }
      if (to.w2 && !to.w1)
        kernels::weight_product<Acc>(view<T>(hidden), view<T>(grad_out), Parallel{},
                                     store(*to.w2));
      if (to.b2)
        kernels::column_sums<Acc>(view<T>(grad_out), to.b2->mutable_data_ptr<T>(), Parallel{});
    });
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> two_layer_backward(
    const Tensor& grad_out, const std::optional<Tensor>& grad_hidden, const Tensor& x,
    const Tensor& w1, const Tensor& w2, const Tensor& hidden, bool need_x, bool need_w1,
    bool need_w2, bool need_b1, bool need_b2) {
  const char* op = "two_layer_backward";
  check_backward(op, grad_out, x, w1, w2, hidden);
  const int64_t n = x.size(0), n_hidden = w1.size(1);
  if (grad_hidden) check_matrix(op, "grad_hidden", x, *grad_hidden, n, n_hidden);
  const auto if_needed = [&](bool needed, std::initializer_list<int64_t> sizes) {
    return needed ? fresh(x, sizes) : fresh(x, {0});
  };
  Tensor grad_x = if_needed(need_x, {n, x.size(1)});
  Tensor grad_w1 = need_w1 ? fresh_like_weight(w1) : fresh(x, {0});
  Tensor grad_w2 = need_w2 ? fresh_like_weight(w2) : fresh(x, {0});
  Tensor grad_b1 = if_needed(need_b1, {n_hidden});
  Tensor grad_b2 = if_needed(need_b2, {w2.size(1)});
  write_gradients(op, grad_out, grad_hidden, x, w1, w2, hidden,
                  {need_x ? &grad_x : nullptr, need_w1 ? &grad_w1 : nullptr,
                   need_w2 ? &grad_w2 : nullptr, need_b1 ? &grad_b1 : nullptr,
                   need_b2 ? &grad_b2 : nullptr});
  return {grad_x, grad_w1, grad_w2, grad_b1, grad_b2};
}

// What a training step of a network without biases needs. To hand over five flags and take back
// three empty tensors is 4 to 6 of 200 µs of two_layer at 64 x 1000 x 100 x 10.
std::tuple<Tensor, Tensor> two_layer_backward_weights(const Tensor& grad_out, const Tensor& x,
                                                      const Tensor& w1, const Tensor& w2,
                                                      const Tensor& hidden) {
  const char* op = "two_layer_backward_weights";
  check_backward(op, grad_out, x, w1, w2, hidden);
  Tensor grad_w1 = fresh_like_weight(w1), grad_w2 = fresh_like_weight(w2);
  write_gradients(op, grad_out, std::nullopt, x, w1, w2, hidden,
                  {nullptr, &grad_w1, &grad_w2, nullptr, nullptr});
  return {grad_w1, grad_w2};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pyext, m) {
  m.def(
      "two_layer_forward(Tensor x, Tensor w1, Tensor w2, Tensor? b1, Tensor? b2) -> "
      "(Tensor, Tensor)");
  m.def(
      "two_layer_backward(Tensor grad_out, Tensor? grad_hidden, Tensor x, Tensor w1, Tensor w2, "
      "Tensor hidden, bool need_x, bool need_w1, bool need_w2, bool need_b1, bool need_b2) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "two_layer_backward_weights(Tensor grad_out, Tensor x, Tensor w1, Tensor w2, "
      "Tensor hidden) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(pyext, CPU, m) {
  m.impl("two_layer_forward", TORCH_BOX(&two_layer_forward));
  m.impl("two_layer_backward", TORCH_BOX(&two_layer_backward));
  m.impl("two_layer_backward_weights", TORCH_BOX(&two_layer_backward_weights));
}

}  // namespace pyext
