// Stands in for Thrust's header of this name, which PyTorch's headers include under nvcc for conversions
// that nothing here calls. Thrust's own brings CUB and libcu++ with it: 2.4 of 9.6 s of CPU time for
// each .cu file (relu.cu, three architectures).
#pragma once

namespace thrust {

template <class T>
class complex {
 public:
  __host__ __device__ complex(T real, T imaginary) : real_(real), imaginary_(imaginary) {}
  __host__ __device__ T real() const { return real_; }
  __host__ __device__ T imag() const { return imaginary_; }

 private:
  T real_, imaginary_;
};

template <class T>
__host__ __device__ complex<T> polar(T radius, T angle);  // defined nowhere: not to be called

}  // namespace thrust
