// Element types: what they accumulate in, how they convert, and 16-byte vectors of them.
#pragma once

#include <type_traits>

#include "platform.cuh"

namespace pyext {

// float64 accumulates in float64, every other floating type in float32.
template <class T>
using Accumulate = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ __forceinline__ double to_accumulate(double value) { return value; }
__device__ __forceinline__ float to_accumulate(float value) { return value; }
__device__ __forceinline__ float to_accumulate(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_accumulate(__nv_bfloat16 value) {
  return __bfloat162float(value);
}

template <class T>
__device__ __forceinline__ T from_accumulate(Accumulate<T> value) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(value);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(value);
  } else {
    return value;
  }
}

// `Width` neighbouring elements that move in accesses of up to 16 bytes.
template <class T, int Width>
struct alignas(sizeof(T) * Width < 16 ? sizeof(T) * Width : 16) Vector {
  T at[Width];
};

template <class T>
constexpr int ELEMENTS_PER_16_BYTES = 16 / static_cast<int>(sizeof(T));

template <class T, int Width>
__device__ __forceinline__ Vector<T, Width> load_vector(const T* source) {
  check_alignment(source, alignof(Vector<T, Width>));
  return *reinterpret_cast<const Vector<T, Width>*>(source);
}

template <class T, int Width>
__device__ __forceinline__ void store_vector(T* destination, const Vector<T, Width>& value) {
  check_alignment(destination, alignof(Vector<T, Width>));
  *reinterpret_cast<Vector<T, Width>*>(destination) = value;
}

inline bool is_aligned(const void* pointer, std::size_t bytes) {
  return reinterpret_cast<std::uintptr_t>(pointer) % bytes == 0;
}

}  // namespace pyext
