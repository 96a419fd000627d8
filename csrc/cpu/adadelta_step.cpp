// adadelta_step on CPU tensors: schema (for every device), launch and registration of the kernel in
// adadelta_step.h.
#include <cmath>

#include "common/tensors.h"

#define PYEXT_KERNELS "adadelta_step.h"
#include "common/for_each_isa.h"

namespace pyext {
namespace {

void adadelta_step(const Tensor& param, const Tensor& grad, const Tensor& square_avg,
                   const Tensor& acc_delta, double lr, double rho, double eps,
                   double weight_decay) {
  const char* op = "adadelta_step";
  for (const Tensor* each : {&grad, &square_avg, &acc_delta}) check_like(op, param, *each);
  Updated updated_param(param);
  Updated updated_square_avg(square_avg, updated_param), updated_acc_delta(acc_delta, updated_param);
  const Tensor flat_grad = with_strides_of(updated_param.flat, grad);
  visit_floating(param.scalar_type(), op, [&]<class T>(Type<T>) {
    using Acc = Accumulate<T>;
    T* param_data = updated_param.flat.mutable_data_ptr<T>();
    const T* grad_data = flat_grad.const_data_ptr<T>();
    T* square_avg_data = updated_square_avg.flat.mutable_data_ptr<T>();
    T* acc_delta_data = updated_acc_delta.flat.mutable_data_ptr<T>();
    torch::stable::parallel_for(0, param.numel(), kGrain, [=](int64_t begin, int64_t end) {
      PYEXT_ON_BEST_ISA({
        const kernels::AdadeltaRates<Acc> rates{Acc(lr), Acc(rho), Acc(1 - rho), Acc(eps),
                                                Acc(weight_decay)};
        const auto step = weight_decay != 0 ? kernels::adadelta_step<Acc, true, T>
                                            : kernels::adadelta_step<Acc, false, T>;
        step(param_data + begin, grad_data + begin, square_avg_data + begin,
             acc_delta_data + begin, end - begin, rates);
      });
    });
  });
  for (Updated* each : {&updated_param, &updated_square_avg, &updated_acc_delta})
    each->write_back();
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pyext, m) {
  m.def(
      "adadelta_step(Tensor(a!) param, Tensor grad, Tensor(b!) square_avg, Tensor(c!) acc_delta, "
      "float lr, float rho, float eps, float weight_decay) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pyext, CPU, m) {
  m.impl("adadelta_step", TORCH_BOX(&adadelta_step));
}

}  // namespace pyext
