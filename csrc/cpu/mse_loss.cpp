// mse_loss on CPU tensors: schemas, launch and registration of the kernels in mse_loss.h.
#include "common/tensors.h"

#define PYEXT_KERNELS "mse_loss.h"
#include "common/for_each_isa.h"

namespace pyext {
namespace {

// Blocks of this many elements are summed by one thread each and then added in order, so the result
// does not depend on the thread count.
constexpr int64_t kSumBlock = 16384;

template <class Acc>
Acc scale_of(int64_t reduction, int64_t n) {
  return reduction == kMean ? Acc(2.0 / double(n)) : Acc(2);
}

// The sum of squared errors; where `grad_input` is given, each block's gradient for an upstream
// gradient of 1 as well, while the block is in L2, so that it costs no second pass over memory.
template <class T>
double sum_of_squared_errors(const T* input, const T* target, int64_t n, int64_t reduction,
                             T* grad_input, bool streamed) {
  using Acc = Accumulate<T>;
  const T one = T(1);
  const Acc scale = scale_of<Acc>(reduction, n);
  std::vector<double> sums((n + kSumBlock - 1) / kSumBlock);
  torch::stable::parallel_for(
      0, int64_t(sums.size()), kGrain / kSumBlock, [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; ++block) {
          const int64_t first = block * kSumBlock;
          const int64_t length = std::min(kSumBlock, n - first);
          const T *block_input = input + first, *block_target = target + first;
          PYEXT_ON_BEST_ISA({
            sums[block] = kernels::sum_of_squared_errors<Acc>(block_input, block_target, length);
            if (grad_input)
              kernels::write(grad_input + first, length, streamed,
                             [&](int64_t i, int64_t count, T* to) {
                               kernels::mse_loss_backward<Acc>(&one, 0, block_input + i,
                                                               block_target + i, scale, to, count);
                             });
          });
        }
      });
  double sum = 0;
  for (const double each : sums) sum += each;
  return reduction == kMean ? sum / double(n) : sum;
}

Tensor mse_loss_forward(const Tensor& input, const Tensor& target, int64_t reduction) {
  check_like("mse_loss_forward", input, target);
  const int64_t n = input.numel();
  const Tensor flat_input = in_one_run(input);
  const Tensor flat_target = in_one_run(target);
  Tensor out =
      reduction == kNone ? fresh(input, input.sizes()) : fresh(input, {});
  visit_floating(input.scalar_type(), "mse_loss_forward", [&]<class T>(Type<T>) {
    using Acc = Accumulate<T>;
    const T* input_data = flat_input.const_data_ptr<T>();
    const T* target_data = flat_target.const_data_ptr<T>();
    T* out_data = out.mutable_data_ptr<T>();
    if (reduction == kNone) {
      const bool streamed = is_streamed(out);
      torch::stable::parallel_for(0, n, kGrain, [=](int64_t begin, int64_t end) {
        PYEXT_ON_BEST_ISA(kernels::write(
            out_data + begin, end - begin, streamed, [=](int64_t first, int64_t count, T* to) {
              const int64_t i = begin + first;
              kernels::squared_error<Acc>(input_data + i, target_data + i, to, count);
            }));
      });
    } else {
      *out_data = T(Acc(sum_of_squared_errors<T>(input_data, target_data, n, reduction, nullptr,
                                                 false)));
    }
  });
  return out;
}

std::tuple<Tensor, Tensor> mse_loss_forward_backward(const Tensor& input, const Tensor& target,
                                                     int64_t reduction) {
  const char* op = "mse_loss_forward_backward";
  check_like(op, input, target);
  STD_TORCH_CHECK(reduction != kNone, op, ": needs a reduction");
  const Tensor flat_input = in_one_run(input);
  const Tensor flat_target = in_one_run(target);
  Tensor loss = fresh(input, {});
  Tensor grad_input = fresh(input, input.sizes());
  visit_floating(input.scalar_type(), op, [&]<class T>(Type<T>) {
    *loss.mutable_data_ptr<T>() = T(Accumulate<T>(sum_of_squared_errors<T>(
        flat_input.const_data_ptr<T>(), flat_target.const_data_ptr<T>(), input.numel(), reduction,
        grad_input.mutable_data_ptr<T>(), is_streamed(grad_input))));
  });
  return {loss, grad_input};
}

Tensor mse_loss_backward(const Tensor& grad, const Tensor& input, const Tensor& target,
                         int64_t reduction) {
  check_like("mse_loss_backward", input, target);
  if (reduction == kNone) check_like("mse_loss_backward", input, grad);
  STD_TORCH_CHECK(grad.is_cpu() && grad.scalar_type() == input.scalar_type(),
                  "mse_loss_backward: grad differs in device or dtype");
  STD_TORCH_CHECK(reduction == kNone || grad.numel() == 1, "mse_loss_backward: grad is not 0-d");
  const int64_t n = input.numel();
  const Tensor flat_grad = in_one_run(grad);
  const Tensor flat_input = in_one_run(input);
  const Tensor flat_target = in_one_run(target);
  Tensor grad_input = fresh(input, input.sizes());
  visit_floating(input.scalar_type(), "mse_loss_backward", [&]<class T>(Type<T>) {
    using Acc = Accumulate<T>;
    const int64_t step = reduction == kNone ? 1 : 0;
    const Acc scale = scale_of<Acc>(reduction, n);
    const T* grad_data = flat_grad.const_data_ptr<T>();
    const T* input_data = flat_input.const_data_ptr<T>();
    const T* target_data = flat_target.const_data_ptr<T>();
    T* grad_input_data = grad_input.mutable_data_ptr<T>();
    const bool streamed = is_streamed(grad_input);
    torch::stable::parallel_for(0, n, kGrain, [=](int64_t begin, int64_t end) {
      PYEXT_ON_BEST_ISA(kernels::write(
          grad_input_data + begin, end - begin, streamed, [=](int64_t first, int64_t count, T* to) {
            const int64_t i = begin + first;
            kernels::mse_loss_backward<Acc>(grad_data + i * step, step, input_data + i,
                                            target_data + i, scale, to, count);
          }));
    });
  });
  return grad_input;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pyext, m) {
  m.def("mse_loss_forward(Tensor input, Tensor target, int reduction) -> Tensor");
  m.def(
      "mse_loss_backward(Tensor grad, Tensor input, Tensor target, int reduction) -> Tensor");
  m.def(
      "mse_loss_forward_backward(Tensor input, Tensor target, int reduction) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(pyext, CPU, m) {
  m.impl("mse_loss_forward", TORCH_BOX(&mse_loss_forward));
  m.impl("mse_loss_backward", TORCH_BOX(&mse_loss_backward));
  m.impl("mse_loss_forward_backward", TORCH_BOX(&mse_loss_forward_backward));
}

}  // namespace pyext
