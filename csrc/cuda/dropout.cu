// CUDA implementation of dropout_seeded.
#include "common/tensor.h"

#include "dropout.cuh"
#include "introspect.h"

namespace pyext {
namespace {

#define PYEXT_REGISTER(T)                                                \
  PYEXT_REGISTER_KERNEL((dropout_kernel<T, true>), dropout_shape<T>(1),  \
                        (dropout_limits<T, true>()));                    \
  PYEXT_REGISTER_KERNEL((dropout_kernel<T, false>), dropout_shape<T>(1), \
                        (dropout_limits<T, false>()));
PYEXT_REGISTER(double)
PYEXT_REGISTER(float)
PYEXT_REGISTER(__half)
PYEXT_REGISTER(__nv_bfloat16)

Tensor dropout_seeded_op(const Tensor& input, const Tensor& seed, int64_t threshold,
                         double scale) {
  STD_TORCH_CHECK(seed.scalar_type() == ScalarType::Long && seed.numel() == 1 &&
                      seed.is_cuda() == input.is_cuda() &&
                      seed.get_device_index() == input.get_device_index(),
                  "dropout_seeded: seed must be one int64 on the input's device");
  const OnDeviceOf device(input);
  std::vector<int64_t> sizes(input.dim());
  for (int64_t i = 0; i < input.dim(); ++i) sizes[i] = input.size(i);
  const Tensor out = torch::stable::new_empty(input, sizes);
  const Tensor dense = with_strides_of(out, input);
  dispatch_floating("dropout_seeded", input.scalar_type(), [&](auto element) {
    using T = typename decltype(element)::type;
    dropout(const_data<T>(dense), const_data<int64_t>(seed), threshold, scale,
            mutable_data<T>(out), out.numel(), device.stream);
  });
  return out;
}

PYEXT_KERNEL_LIBRARY(m) { m.impl("dropout_seeded", TORCH_BOX(&dropout_seeded_op)); }

}  // namespace
}  // namespace pyext
