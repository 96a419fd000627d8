// The extents of the two-layer network: x (batch, in), w1 (in, hidden), w2 (hidden, out).
#pragma once

#include <cstdint>

namespace pyext {

struct TwoLayerSize {
  int64_t batch;
  int64_t in;
  int64_t hidden;
  int64_t out;
};

}  // namespace pyext
