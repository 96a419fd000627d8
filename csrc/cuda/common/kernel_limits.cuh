// The hard limits that every kernel states beside itself. `python -m pyext.lab compile-report`
// reads the machine code of each architecture, and tests/test_compile_report.py holds it to them. A
// limit is loosened only with a reason in the same place.
#pragma once

#include <algorithm>
#include <cstddef>

namespace pyext {

// What one multiprocessor of the smallest architecture that the lab is built for by default has
// (sm_80; from the CUDA programming guide's table of technical specifications).
constexpr int REGISTERS_PER_SM = 65536;
constexpr int MOST_REGISTERS = 255;  // of one thread
constexpr std::size_t SHARED_BYTES_PER_SM = 164 * 1024;
constexpr std::size_t SYSTEM_SHARED_BYTES = 1024;     // of each block, beside its own
constexpr std::size_t MOST_SHARED_BYTES = 48 * 1024;  // without cudaFuncSetAttribute

struct KernelLimits {
  int registers;             // per thread, at most
  int load_bytes;            // the widest global load of a thread, at least
  int store_bytes;           // the widest global store, at least
  std::size_t shared_bytes;  // per block, static and dynamic, at most
  int spill_bytes = 0;       // local memory per thread, at most
};

// The most registers with which `blocks` blocks fit on a multiprocessor; they come in eights.
constexpr int registers_for(int blocks, int threads) {
  return std::min(REGISTERS_PER_SM / (blocks * threads) / 8 * 8, MOST_REGISTERS);
}

// The most shared memory with which `blocks` blocks fit on a multiprocessor.
constexpr std::size_t shared_for(int blocks) {
  return std::min(SHARED_BYTES_PER_SM / blocks - SYSTEM_SHARED_BYTES, MOST_SHARED_BYTES);
}

// Blocks that keep the memory busy, of which each has `block_bytes` of loads in flight, at most
// `most`. By Little's law: 8 TB/s over 148 multiprocessors (sm_100) times 1 us of latency; sm_80
// and sm_90 need less.
constexpr int blocks_in_flight(int block_bytes, int most) {
  constexpr int BYTES_IN_FLIGHT_PER_SM = 54'000;
  return std::min((BYTES_IN_FLIGHT_PER_SM + block_bytes - 1) / block_bytes, most);
}

}  // namespace pyext
