// Floating-point numbers as the integers of their width, and what the standard library has for that.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

namespace pyext {

template <class T>
using BitsOf = std::conditional_t<
    sizeof(T) == 8, int64_t,
    std::conditional_t<sizeof(T) == 4, int32_t, int16_t>>;

}  // namespace pyext
