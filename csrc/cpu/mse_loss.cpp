// mse_loss on CPU tensors: schemas, launch and registration of the kernels in mse_loss.h.
#include "common/tensors.h"

#define PYEXT_KERNELS "mse_loss.h"
#include "common/for_each_isa.h"

namespace pyext {
namespace {

// Blocks of this many elements are summed by one thread each and then added in order, so the result
// does not depend on the thread count.
constexpr int64_t kSumBlock = 16384;

Tensor mse_loss_forward(const Tensor& input, const Tensor& target, int64_t reduction) {
  check_like("mse_loss_forward", input, target);
  const int64_t n = input.numel();
  const Tensor flat_input = torch::stable::contiguous(input);
  const Tensor flat_target = torch::stable::contiguous(target);
  Tensor out = reduction == kNone ? torch::stable::new_empty(input, input.sizes())
                                  : empty_matrix(input, {});
  visit_floating(input.scalar_type(), "mse_loss_forward", [&]<class T>(Type<T>) {
    using Acc = Accumulate<T>;
    const T* input_data = flat_input.const_data_ptr<T>();
    const T* target_data = flat_target.const_data_ptr<T>();
    T* out_data = out.mutable_data_ptr<T>();
    if (reduction == kNone) {
      torch::stable::parallel_for(0, n, kGrain, [=](int64_t begin, int64_t end) {
        PYEXT_ON_BEST_ISA(kernels::squared_error<Acc>(
            input_data + begin, target_data + begin, out_data + begin, end - begin));
      });
      return;
    }
    std::vector<double> sums((n + kSumBlock - 1) / kSumBlock);
    torch::stable::parallel_for(
        0, int64_t(sums.size()), kGrain / kSumBlock, [&](int64_t begin, int64_t end) {
          for (int64_t block = begin; block < end; ++block) {
            const int64_t first = block * kSumBlock;
            const int64_t length = std::min(kSumBlock, n - first);
            PYEXT_ON_BEST_ISA(sums[block] = kernels::sum_of_squared_errors<Acc>(
                                  input_data + first, target_data + first, length));
          }
        });
    double sum = 0;
    for (const double each : sums) sum += each;
    *out_data = T(Acc(reduction == kMean ? sum / double(n) : sum));
  });
  return out;
}

Tensor mse_loss_backward(const Tensor& grad, const Tensor& input, const Tensor& target,
                         int64_t reduction) {
  check_like("mse_loss_backward", input, target);
  if (reduction == kNone) check_like("mse_loss_backward", input, grad);
  STD_TORCH_CHECK(grad.is_cpu() && grad.scalar_type() == input.scalar_type(),
                  "mse_loss_backward: grad differs in device or dtype");
  STD_TORCH_CHECK(reduction == kNone || grad.numel() == 1, "mse_loss_backward: grad is not 0-d");
  const int64_t n = input.numel();
  const Tensor flat_grad = torch::stable::contiguous(grad);
  const Tensor flat_input = torch::stable::contiguous(input);
  const Tensor flat_target = torch::stable::contiguous(target);
  Tensor grad_input = torch::stable::new_empty(input, input.sizes());
  visit_floating(input.scalar_type(), "mse_loss_backward", [&]<class T>(Type<T>) {
    using Acc = Accumulate<T>;
    const int64_t step = reduction == kNone ? 1 : 0;
    const Acc scale = reduction == kMean ? Acc(2.0 / double(n)) : Acc(2);
    const T* grad_data = flat_grad.const_data_ptr<T>();
    const T* input_data = flat_input.const_data_ptr<T>();
    const T* target_data = flat_target.const_data_ptr<T>();
    T* grad_input_data = grad_input.mutable_data_ptr<T>();
    torch::stable::parallel_for(0, n, kGrain, [=](int64_t begin, int64_t end) {
      PYEXT_ON_BEST_ISA(kernels::mse_loss_backward<Acc>(grad_data + begin * step, step,
                                                        input_data + begin, target_data + begin,
                                                        scale, grad_input_data + begin,
                                                        end - begin));
    });
  });
  return grad_input;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pyext, m) {
  m.def("mse_loss_forward(Tensor input, Tensor target, int reduction) -> Tensor");
  m.def(
      "mse_loss_backward(Tensor grad, Tensor input, Tensor target, int reduction) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(pyext, CPU, m) {
  m.impl("mse_loss_forward", TORCH_BOX(&mse_loss_forward));
  m.impl("mse_loss_backward", TORCH_BOX(&mse_loss_backward));
}

}  // namespace pyext
