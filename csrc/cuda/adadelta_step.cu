// CUDA implementation of adadelta_step.
#include "common/tensor.h"

#include "adadelta_step.cuh"
#include "introspect.h"

namespace pyext {
namespace {

#define PYEXT_REGISTER_WIDTH(T, width)                                                 \
  PYEXT_REGISTER_KERNEL((adadelta_step_kernel<T, width>), elementwise_shape(1, width), \
                        (adadelta_step_limits<T, width>()));
#define PYEXT_REGISTER(T)                             \
  PYEXT_REGISTER_WIDTH(T, (ELEMENTS_PER_16_BYTES<T>)) \
  PYEXT_REGISTER_WIDTH(T, 1)
PYEXT_REGISTER(double)
PYEXT_REGISTER(float)
PYEXT_REGISTER(__half)
PYEXT_REGISTER(__nv_bfloat16)

void adadelta_step_op(const Tensor& param, const Tensor& grad, const Tensor& square_avg,
                      const Tensor& acc_delta, double lr, double rho, double eps,
                      double weight_decay) {
  const char* op = "adadelta_step";
  for (const Tensor* each : {&grad, &square_avg, &acc_delta}) {
    STD_TORCH_CHECK(same_sizes(*each, param), op, ": all tensors must have the same shape");
    check_matches(op, "one of the tensors", *each, param);
  }
  const OnDeviceOf device(param);
  Updated updated_param(param);
  Updated updated_square_avg(square_avg, updated_param), updated_acc_delta(acc_delta, updated_param);
  const Tensor dense_grad = with_strides_of(updated_param.flat, grad);
  dispatch_floating(op, param.scalar_type(), [&](auto element) {
    using T = typename decltype(element)::type;
    adadelta_step(mutable_data<T>(updated_param.flat), const_data<T>(dense_grad),
                  mutable_data<T>(updated_square_avg.flat),
                  mutable_data<T>(updated_acc_delta.flat), param.numel(),
                  adadelta_rates<Accumulate<T>>(lr, rho, eps, weight_decay), device.stream);
  });
  for (Updated* each : {&updated_param, &updated_square_avg, &updated_acc_delta}) {
    each->write_back();
  }
}

PYEXT_KERNEL_LIBRARY(m) { m.impl("adadelta_step", TORCH_BOX(&adadelta_step_op)); }

}  // namespace
}  // namespace pyext
