// CUDA's keywords, error codes and data types for a host compiler.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Vectors of numbers: float4 and its kin, aligned to their size as on the device.
#define PYEXT_VECTOR_2(T, name)                            \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };       \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }
#define PYEXT_VECTOR_4(T, name)                            \
  struct alignas(16) name##4 { T x, y, z, w; };            \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
PYEXT_VECTOR_2(float, float)
PYEXT_VECTOR_2(double, double)
PYEXT_VECTOR_2(int, int)
PYEXT_VECTOR_2(unsigned, uint)
PYEXT_VECTOR_4(float, float)
PYEXT_VECTOR_4(int, int)
PYEXT_VECTOR_4(unsigned, uint)
#undef PYEXT_VECTOR_2
#undef PYEXT_VECTOR_4

using cudaStream_t = struct EmulatedStream*;
using cudaEvent_t = struct EmulatedEvent*;

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorNotReady = 600,
  cudaErrorCooperativeLaunchTooLarge = 720,
  cudaErrorNotSupported = 801,
};

inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorNotReady:
      return "device not ready";
    case cudaErrorCooperativeLaunchTooLarge:
      return "too many blocks in cooperative launch";
    default:
      return "operation not supported";
  }
}

struct __half {
  std::uint16_t bits;
};

struct __nv_bfloat16 {
  std::uint16_t bits;
};

inline float __half2float(__half value) {
  const int exponent = value.bits >> 10 & 31;
  const int mantissa = value.bits & 1023;
  float magnitude;
  if (exponent == 31) {
    magnitude = mantissa == 0 ? INFINITY : NAN;
  } else if (exponent == 0) {
    magnitude = std::ldexp(static_cast<float>(mantissa), -24);
  } else {
    magnitude = std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25);
  }
  return value.bits & 0x8000 ? -magnitude : magnitude;
}

// Rounds to nearest, ties to even (the host's default rounding mode).
inline __half __float2half_rn(float value) {
  const std::uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const float magnitude = std::fabs(value);
  std::uint16_t bits;
  if (std::isnan(value)) {
    bits = 0x7fff;
  } else if (magnitude >= 65520.0f) {
    bits = 0x7c00;
  } else if (magnitude < 6.103515625e-05f) {
    bits = static_cast<std::uint16_t>(std::nearbyint(std::ldexp(magnitude, 24)));
  } else {
    int exponent;
    std::frexp(magnitude, &exponent);  // magnitude = [0.5, 1) * 2^exponent
    const int mantissa = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 11 - exponent)));
    bits = static_cast<std::uint16_t>(((exponent + 14) << 10) + mantissa - 1024);
  }
  return {static_cast<std::uint16_t>(sign | bits)};
}

inline float __bfloat162float(__nv_bfloat16 value) {
  const std::uint32_t bits = std::uint32_t{value.bits} << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  if (std::isnan(value)) return {0x7fff};
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  bits += 0x7fff + (bits >> 16 & 1);
  return {static_cast<std::uint16_t>(bits >> 16)};
}
