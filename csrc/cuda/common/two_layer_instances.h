// The building blocks that several two-layer ops share are compiled once, each in the .cu of the op
// that defines it; the other ops only declare them.
#pragma once

#include "../two_layer_mse_loss.cuh"

#define PYEXT_FOR_EACH_FLOATING(MACRO) \
  MACRO(double)                        \
  MACRO(float)                         \
  MACRO(__half)                        \
  MACRO(__nv_bfloat16)

// `keyword` is `extern` for a declaration and empty for the definition.
#define PYEXT_TWO_LAYER_INSTANCE(keyword, T)                                                       \
  keyword template void product_parts<T>(const ProductPlan&, const Matrix<const T>&,               \
                                         const Matrix<const T>&, int64_t, int64_t, int64_t,        \
                                         Accumulate<T>*, int64_t, cudaStream_t);                   \
  keyword template void hidden_layer<T>(const TwoLayerSize&, const Matrix<const T>&,               \
                                        const Matrix<const T>&, const Bias<T>&, T*, Scratch&,      \
                                        cudaStream_t);                                             \
  keyword template void hidden_gradient<T>(const TwoLayerSize&, const Matrix<const T>&,            \
                                           const Matrix<const T>&, const Matrix<const T>&,         \
                                           const Matrix<const T>&, T*, Scratch&, cudaStream_t);

#define PYEXT_TWO_LAYER_MSE_LOSS_INSTANCE(keyword, T)                                              \
  keyword template void output_layer_loss<T>(                                                      \
      const TwoLayerSize&, const Matrix<const T>&, const Matrix<const T>&, const Bias<T>&,         \
      const Matrix<const T>&, Reduction, Accumulate<T>, T*, T*, Scratch&, cudaStream_t);

// For those that include two_layer_sgd_step.cuh.
#define PYEXT_SGD_STEP_INSTANCE(keyword, T)                                                        \
  keyword template SgdWay sgd_way<T>(const TwoLayerSize&);                                         \
  keyword template void sgd_steps_in_one_launch<T>(                                                \
      const TwoLayerSize&, const SgdBatches<T>&, const Matrix<T>&, const Matrix<T>&, double,       \
      int64_t, T*, Scratch&, cudaStream_t);                                                        \
  keyword template void sgd_step_in_three_launches<T>(                                             \
      const TwoLayerSize&, const Matrix<const T>&, const Matrix<const T>&, const Matrix<T>&,       \
      const Matrix<T>&, double, T*, Scratch&, cudaStream_t);                                       \
  keyword template void sgd_step_by_products<T>(                                                   \
      const TwoLayerSize&, const Matrix<const T>&, const Matrix<const T>&, const Matrix<T>&,       \
      const Matrix<T>&, double, T*, Scratch&, cudaStream_t);
