// Stands for CUDA's own header where the emulator's folder comes first: the block, the grid.
#pragma once

#include "../cuda_on_cpu.h"

namespace cooperative_groups {

struct thread_block {
  void sync(PYEXT_LINE) const { emulator::block_barrier(line, false); }
  unsigned thread_rank() const {
    return (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  }
  unsigned size() const { return blockDim.x * blockDim.y * blockDim.z; }
};
inline thread_block this_thread_block() { return {}; }

// Its `sync` needs a cooperative launch.
struct grid_group {
  void sync(PYEXT_LINE) const { emulator::grid_barrier(line); }
  std::uint64_t block_rank() const {
    return (std::uint64_t{blockIdx.z} * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  }
  std::uint64_t num_blocks() const { return std::uint64_t{gridDim.x} * gridDim.y * gridDim.z; }
  std::uint64_t thread_rank() const {
    return block_rank() * this_thread_block().size() + this_thread_block().thread_rank();
  }
  std::uint64_t size() const { return num_blocks() * this_thread_block().size(); }
};
inline grid_group this_grid() { return {}; }

}  // namespace cooperative_groups
