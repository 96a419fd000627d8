// What the C++ tests share: a check that counts, and an exit code.
#pragma once

#include <cstdio>

inline int failures = 0;

#define CHECK(condition)                                                    \
  do {                                                                      \
    if (!(condition)) {                                                     \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);  \
      ++failures;                                                           \
    }                                                                       \
  } while (false)
