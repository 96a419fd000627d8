// dropout on CPU tensors: schema (for every device), launch and registration of dropout.h's kernel.
#include "common/tensors.h"

#define PYEXT_KERNELS "dropout.h"
#include "common/for_each_isa.h"

namespace pyext {
namespace {

// Elements below which a second thread costs more than it brings: ten rounds cost about as much as
// four element-wise operations.
constexpr int64_t kDropoutGrain = kGrain / 4;

Tensor dropout_seeded(const Tensor& input, const Tensor& seed, int64_t threshold, double scale) {
  STD_TORCH_CHECK(seed.scalar_type() == ScalarType::Long && seed.numel() == 1 && seed.is_cpu(),
                  "dropout_seeded: seed must be one int64 on the CPU");
  Tensor out = fresh(input, input.sizes());
  if (threshold > UINT32_MAX) return torch::stable::zero_(out);
  const Tensor x = with_strides_of(out, input);
  const auto key = uint64_t(*seed.const_data_ptr<int64_t>());
  const auto lowest = uint32_t(threshold);
  visit_floating(input.scalar_type(), "dropout_seeded", [&]<class T>(Type<T>) {
    const T* x_data = x.const_data_ptr<T>();
    T* out_data = out.mutable_data_ptr<T>();
    const auto factor = Accumulate<T>(scale);
    const bool streamed = is_streamed(out);
    torch::stable::parallel_for(0, out.numel(), kDropoutGrain, [=](int64_t begin, int64_t end) {
      PYEXT_ON_BEST_ISA(kernels::write(
          out_data + begin, end - begin, streamed, [=](int64_t first, int64_t count, T* to) {
            const int64_t i = begin + first;
            kernels::dropout(x_data + i, to, i, count, key, lowest, factor);
          }));
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pyext, m) {
  m.def("dropout_seeded(Tensor input, Tensor seed, int threshold, float scale) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(pyext, CPU, m) {
  m.impl("dropout_seeded", TORCH_BOX(&dropout_seeded));
}

}  // namespace pyext
