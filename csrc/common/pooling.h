// Where the windows of a pooling lie in each plane (the last two dimensions) of a tensor.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define PYEXT_HOST_DEVICE __host__ __device__
#else
#define PYEXT_HOST_DEVICE
#endif

namespace pyext {

constexpr int kNowhere = 255;  // no element of the window is above 0

struct Pooling {
  int64_t planes;
  int64_t height, width;          // of a plane of the input
  int64_t out_height, out_width;  // windows
  int64_t kernel_height, kernel_width;
  int64_t stride_height, stride_width;
  int64_t padding_height, padding_width;

  PYEXT_HOST_DEVICE int64_t elements() const { return planes * height * width; }
  PYEXT_HOST_DEVICE int64_t windows() const { return planes * out_height * out_width; }

  // Two by two, side by side: no window shares an element with another or hangs over the edge.
  bool is_2x2() const {
    return kernel_height == 2 && kernel_width == 2 && stride_height == 2 && stride_width == 2 &&
           padding_height == 0 && padding_width == 0;
  }
};

}  // namespace pyext
