// One SGD step on views, for the ops that take one or several.
#pragma once

#include "common/two_layer_operands.h"

namespace pyext {

// Updates w1 and w2 in place and returns the loss before; of shapes that fit.
template <class T>
T sgd_step(const Matrix<const T>& x, const Matrix<const T>& y, const Matrix<T>& w1,
           const Matrix<T>& w2, double lr);

}  // namespace pyext
