// What the two-layer ops' tensors have in common: their sizes and their checks.
#pragma once

#include "../two_layer.cuh"
#include "tensor.h"

namespace pyext {

// Sizes from x (N, I), w1 (I, H) and w2 (H, O); refuses what would read outside of them.
inline TwoLayerSize checked_size(const char* op, const Tensor& x, const Tensor& w1,
                                 const Tensor& w2) {
  STD_TORCH_CHECK(x.dim() == 2 && w1.dim() == 2 && w2.dim() == 2, op,
                  ": x, w1 and w2 must have two dimensions");
  const TwoLayerSize size{x.size(0), x.size(1), w1.size(1), w2.size(1)};
  check_shape(op, "w1", w1, size.in, size.hidden);
  check_shape(op, "w2", w2, size.hidden, size.out);
  check_matches(op, "w1", w1, x);
  check_matches(op, "w2", w2, x);
  return size;
}

inline void check_bias(const char* op, const char* name, const std::optional<Tensor>& bias,
                       int64_t length, const Tensor& reference) {
  if (!bias.has_value()) return;
  STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == length, op, ": ", name,
                  " must have shape (", length, ",)");
  check_matches(op, name, *bias, reference);
}

template <class T>
Bias<T> bias_of(const std::optional<Tensor>& bias) {
  if (!bias.has_value()) return {};
  return {const_data<T>(*bias), bias->stride(0)};
}

}  // namespace pyext
