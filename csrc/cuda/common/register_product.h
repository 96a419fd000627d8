// Enters the kernels of one product with a given epilogue in the table of introspect.h.
#pragma once

#include "../introspect.h"
#include "product.cuh"

// `...` is the epilogue, which may contain commas.
#define PYEXT_REGISTER_TILE(T, tile, ...)                            \
  PYEXT_REGISTER_KERNEL((product_kernel<T, tile, __VA_ARGS__>),      \
                        (product_shape<T, tile, __VA_ARGS__>(1, 1)), \
                        (product_limits<T, tile, __VA_ARGS__>()))

#define PYEXT_REGISTER_TILES(T, ...)              \
  PYEXT_REGISTER_TILE(T, SmallTile, __VA_ARGS__); \
  PYEXT_REGISTER_TILE(T, MediumTile<T>, __VA_ARGS__)

#define PYEXT_REGISTER_PRODUCT(T, ...)                                      \
  PYEXT_REGISTER_TILES(T, __VA_ARGS__);                                     \
  PYEXT_REGISTER_KERNEL((combine_parts_kernel<Accumulate<T>, __VA_ARGS__>), \
                        (combine_parts_shape<__VA_ARGS__>(1)),              \
                        (combine_parts_limits<Accumulate<T>, __VA_ARGS__>()));
