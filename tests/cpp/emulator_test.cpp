// Shows what the emulator offers to kernels and launchers, and that it reports what a kernel must not
// do, each with a kernel that does it.
#include <cooperative_groups.h>

#include <functional>
#include <vector>

#include "../../csrc/cuda/common/numeric.cuh"
#include "emulated.h"

// Not in a namespace without a name: the kernels' names are to be found in the messages.
namespace broken {

using namespace pyext;

__global__ void divergent_barrier_kernel() {
  if (threadIdx.x < 40) __syncthreads();
}

__global__ void two_barriers_kernel(int* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
    out[0] = 1;
  } else {
    __syncthreads();
    out[1] = 1;
  }
}

__global__ void missing_lane_kernel(int* out) {
  if (threadIdx.x % 32 == 5) __syncthreads();
  out[threadIdx.x] = __shfl_xor_sync(FULL_WARP, threadIdx.x, 1);
  if (threadIdx.x % 32 != 5) __syncthreads();
}

__global__ void foreign_lane_kernel(int* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_xor_sync(0xffffu, threadIdx.x, 16);
}

__global__ void misaligned_vector_kernel() {
  Vector<float, 4> value{};
  store_vector(shared_memory<float>() + 1, value);
}

__global__ void misaligned_global_kernel(float* out) { store_vector(out + 1, Vector<float, 4>{}); }

__global__ void misaligned_scalar_kernel(char* out) { *reinterpret_cast<int*>(out + 2) = 1; }

__global__ void nothing_kernel() {}

__global__ void missing_barrier_kernel(int* out) {
  int* shared = shared_memory<int>();
  shared[threadIdx.x] = 1;
  out[threadIdx.x] = shared[63 - threadIdx.x];
}

__global__ void missing_second_barrier_kernel(int* out) {
  int* shared = shared_memory<int>();
  shared[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = shared[63 - threadIdx.x];
  if (threadIdx.x == 63) shared[5] = 2;
}

__global__ void two_writers_kernel() { shared_memory<int>()[0] = threadIdx.x; }

__global__ void unwritten_read_kernel(int* out) {
  int* shared = shared_memory<int>();
  if (threadIdx.x != 7) shared[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = shared[threadIdx.x];
}

__global__ void overrun_kernel() { shared_memory<int>()[threadIdx.x + 1] = 1; }

__global__ void underrun_kernel() { shared_memory<int>()[static_cast<int>(threadIdx.x) - 1] = 1; }

__global__ void copy_kernel(const int* in, int* out, int shift) {
  out[threadIdx.x] = in[threadIdx.x + shift];
}

__global__ void input_write_kernel(const int* in) { const_cast<int*>(in)[threadIdx.x] = 1; }

__global__ void global_race_kernel(int* out) { out[threadIdx.x / 2] = threadIdx.x; }

__global__ void block_race_kernel(int* out) { out[0] = blockIdx.x; }

__global__ void half_atomic_kernel(int* out) {
  if (threadIdx.x == 3) {
    out[0] = 1;
  } else {
    atomicAdd(out, 1);
  }
}

__global__ void early_block_kernel() {
  if (blockIdx.x != 2) cooperative_groups::this_grid().sync();
}

}  // namespace broken

namespace working {

using namespace pyext;

__global__ void warp_ordered_kernel(int* out) {
  int* shared = shared_memory<int>();
  shared[threadIdx.x] = threadIdx.x;
  __syncwarp();
  out[threadIdx.x] = shared[threadIdx.x ^ 1];
}

__global__ void halves_kernel(__half* out) { out[threadIdx.x] = __float2half_rn(1.0f); }

__global__ void votes_kernel(unsigned* out) {
  const unsigned lane = threadIdx.x % warpSize;
  out[0] = __ballot_sync(FULL_WARP, lane % 2 == 0);
  out[1] = __any_sync(FULL_WARP, lane == 9);
  out[2] = __all_sync(FULL_WARP, lane == 9);
  out[3] = __all_sync(FULL_WARP, lane < 32);
  out[4] = __activemask();
  out[5] = __reduce_add_sync(FULL_WARP, lane);
  out[6] = static_cast<unsigned>(__reduce_min_sync(FULL_WARP, 3 - static_cast<int>(lane)));
  out[7] = __reduce_max_sync(FULL_WARP, lane);
  out[8] = __reduce_or_sync(FULL_WARP, 1u << lane);
  out[9] = __reduce_and_sync(FULL_WARP, lane | 64u);
  out[10] = __reduce_xor_sync(FULL_WARP, lane);
  out[11] = __popc(0xf0f0u) + __ffs(8) + __clz(1);
}

__global__ void block_votes_kernel(int* out) {
  const int count = __syncthreads_count(threadIdx.x % 3 == 0);
  const int any = __syncthreads_or(threadIdx.x == 63);
  const int all = __syncthreads_and(threadIdx.x != 63);
  if (threadIdx.x == 0) {
    out[0] = count;
    out[1] = any;
    out[2] = all;
  }
}

__global__ void atomics_kernel(int* sums, unsigned* bits, double* total) {
  const int i = static_cast<int>(threadIdx.x);
  atomicAdd(&sums[0], i);
  atomicSub(&sums[1], 1);
  atomicMin(&sums[2], -i);
  atomicMax(&sums[3], i);
  if (atomicCAS(&sums[4], 0, i + 1) == 0) atomicExch(&sums[5], i);
  atomicOr(&bits[0], 1u << i % 32);
  atomicAnd(&bits[1], ~(1u << i % 32));
  atomicXor(&bits[2], 1u << i % 32);
  atomicInc(&bits[3], 9);
  atomicDec(&bits[4], 9);
  atomicAdd(total, 0.5);
}

__global__ void vectors_kernel(const float4* in, float4* out, double2* pair) {
  const float4 value = __ldg(in + threadIdx.x);
  __stcs(out + threadIdx.x, make_float4(value.w, value.z, value.y, value.x));
  if (threadIdx.x == 0) *pair = make_double2(__ldcs(&in->x), 2);
}

// Every block writes, the grid meets, every block reads its neighbour's.
__global__ void grid_kernel(int* parts, int* out) {
  const auto grid = cooperative_groups::this_grid();
  const auto block = cooperative_groups::this_thread_block();
  int* shared = shared_memory<int>();
  for (int round = 0; round < 3; ++round) {
    if (block.thread_rank() == 0) {
      shared[0] = static_cast<int>(grid.block_rank()) + round;
      parts[grid.block_rank()] = shared[0];
    }
    grid.sync();
    if (block.thread_rank() == 1) {
      out[grid.block_rank()] = shared[0] + parts[(grid.block_rank() + 1) % grid.num_blocks()];
    }
    grid.sync();
  }
}

// The block that comes last, as an atomic counter tells, adds up what all have left.
__global__ void last_block_kernel(int* parts, unsigned* counter, int* out) {
  parts[blockIdx.x] = blockIdx.x;
  __threadfence();
  if (atomicAdd(counter, 1u) != gridDim.x - 1) return;
  int sum = 0;
  for (unsigned i = 0; i < gridDim.x; ++i) sum += parts[i];
  *out = sum;
}

__global__ void early_reader_kernel(const int* in, int* out) {
  const int early = in[threadIdx.x];
  wait_for_previous_kernel();
  out[threadIdx.x] = early;
}

__global__ void fencing_copy_kernel(const int* in, int* out) {
  out[threadIdx.x] = in[threadIdx.x];
  __threadfence();
}

__global__ void fencing_early_reader_kernel(const int* in, int* out) {
  __threadfence();
  const int early = in[threadIdx.x];
  wait_for_previous_kernel();
  out[threadIdx.x] = early;
}

__global__ void late_reader_kernel(const int* in, int* out) {
  wait_for_previous_kernel();
  out[threadIdx.x] = in[threadIdx.x];
}

__global__ void hasty_writer_kernel(int* out) {
  out[threadIdx.x] = 2;
  wait_for_previous_kernel();
}

__global__ void add_kernel(int* value, int addend) { *value = *value * 10 + addend; }

}  // namespace working

namespace {

using namespace pyext;
using namespace broken;
using namespace working;

void expect_error(const std::string& part, const std::function<void()>& body) {
  try {
    body();
    expect(false, "the emulator did not report: " + part);
  } catch (const std::exception& error) {
    expect(std::string(error.what()).find(part) != std::string::npos,
           "expected '" + part + "', got '" + error.what() + "'");
  }
}

void test_barriers_and_warps() {
  int out[64] = {};
  expect_error("broken::divergent_barrier_kernel(), block (0, 0, 0), thread (0, 0, 0): the barrier",
               [] { launch(divergent_barrier_kernel, {dim3(1), dim3(64)}, nullptr); });
  expect_error("stands at that in line",
               [&] { launch(two_barriers_kernel, {dim3(1), dim3(64)}, nullptr, out); });
  expect_error("not all lanes of its mask come",
               [&] { launch(missing_lane_kernel, {dim3(1), dim3(64)}, nullptr, out); });
  expect_error("broken::foreign_lane_kernel(int*), block (0, 0, 0), thread (15, 0, 0): a shuffle",
               [&] { launch(foreign_lane_kernel, {dim3(1), dim3(32)}, nullptr, out); });

  unsigned votes[12] = {};
  launch(votes_kernel, {dim3(1), dim3(32)}, nullptr, votes);
  const unsigned expected[12] = {0x55555555u, 1, 0, 1, FULL_WARP, 496, unsigned(-28), 31,
                                 FULL_WARP,   64, 0, 8 + 4 + 31};
  for (int i = 0; i < 12; ++i) expect(votes[i] == expected[i], "vote " + std::to_string(i));
  launch(block_votes_kernel, {dim3(1), dim3(64)}, nullptr, out);
  expect(out[0] == 22 && out[1] == 1 && out[2] == 0, "votes of a block");
}

void test_launches() {
  expect_error("invalid configuration",
               [] { launch(nothing_kernel, {dim3(0), dim3(32)}, nullptr); });
  expect_error("invalid configuration",
               [] { launch(nothing_kernel, {dim3(1), dim3(1025)}, nullptr); });
  expect_error("invalid configuration",
               [] { launch(nothing_kernel, {dim3(1, 65536), dim3(1)}, nullptr); });
  expect_error("invalid argument",
               [] { launch(nothing_kernel, {dim3(1), dim3(1), 48 * 1024 + 1}, nullptr); });
  const auto opt_in = [](int bytes) {
    return cudaFuncSetAttribute(nothing_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  };
  expect(opt_in(163 * 1024 + 1) == cudaErrorInvalidValue, "no block has 164 KiB");
  expect(opt_in(163 * 1024) == cudaSuccess, "a block may ask for 163 KiB");
  launch(nothing_kernel, {dim3(1), dim3(1), 163 * 1024}, nullptr);
  opt_in(0);
  expect_error("broken::nothing_kernel(), grid (1, 1, 1) of blocks (2, 1, 1): a launch whose error "
               "was never asked for",
               [] {
                 cudaLaunchConfig_t config{dim3(1), dim3(2), 0, nullptr, nullptr, 0};
                 cudaLaunchKernelEx(&config, nothing_kernel);
                 cudaLaunchKernelEx(&config, nothing_kernel);
               });
  expect_error("never asked for", [] {
    const emulator::Op op;
    cudaLaunchConfig_t config{dim3(1), dim3(2), 0, op.stream(), nullptr, 0};
    cudaLaunchKernelEx(&config, nothing_kernel);
  });
  expect_error("broken::nothing_kernel(), grid (1, 1, 1) of blocks (1, 1, 1): a launch on another "
               "stream than the current one",
               [] {
                 const emulator::Op op;
                 launch(nothing_kernel, {dim3(1), dim3(1)}, nullptr);
               });
}

void test_alignment() {
  const LaunchShape one{dim3(1), dim3(1), 64};
  alignas(16) float global[8] = {};
  expect_error("misaligned", [&] { launch(misaligned_vector_kernel, one, nullptr); });
  expect_error("broken::misaligned_global_kernel(float*), block (0, 0, 0), thread (0, 0, 0): a "
               "misaligned access of 16 bytes",
               [&] { launch(misaligned_global_kernel, one, nullptr, global); });

  float4 in[2] = {{1, 2, 3, 4}, {5, 6, 7, 8}}, out[2];
  double2 pair;
  launch(vectors_kernel, {dim3(1), dim3(2)}, nullptr, in, out, &pair);
  expect(out[0].x == 4 && out[0].w == 1 && out[1].y == 7 && pair.x == 1 && pair.y == 2, "vectors");
}

void test_atomics() {
  int sums[6] = {0, 0, 0, 0, 0, -1};
  unsigned bits[5] = {0, ~0u, 0, 0, 0};
  double total = 0;
  launch(atomics_kernel, {dim3(2), dim3(64)}, nullptr, sums, bits, &total);
  expect(sums[0] == 2 * 2016 && sums[1] == -128 && sums[2] == -63 && sums[3] == 63, "integers");
  expect(sums[4] == 1 && sums[5] == 0, "atomicCAS and atomicExch");
  expect(bits[0] == ~0u && bits[1] == 0 && bits[2] == 0 && bits[3] == 8 && bits[4] == 2, "bits");
  expect(total == 64, "atomicAdd of a double");
}

void test_cooperative_launches() {
  LaunchShape shape{dim3(5), dim3(64), 64};
  shape.cooperative = true;
  int parts[5] = {}, out[5] = {};
  launch(grid_kernel, shape, nullptr, parts, out);
  for (int i = 0; i < 5; ++i) {
    expect(out[i] == i + 2 + (i + 1) % 5 + 2, "the grid meets, block " + std::to_string(i));
  }
  expect_error("broken::early_block_kernel(), block (0, 0, 0), thread (0, 0, 0): the barrier of the "
               "grid",
               [&] { launch(early_block_kernel, shape, nullptr); });
  int blocks = 0, multiprocessors = 0;
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, nothing_kernel, 64, 64);
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, 0);
  expect(blocks == 32 && multiprocessors == 4, "the emulated device");
  shape.grid = dim3(blocks * multiprocessors);
  launch(nothing_kernel, shape, nullptr);
  shape.grid.x += 1;
  expect_error("too many blocks in cooperative launch",
               [&] { launch(nothing_kernel, shape, nullptr); });
  shape = {dim3(5), dim3(64), 64};
  expect_error("not cooperative", [&] { launch(grid_kernel, shape, nullptr, parts, out); });
}

void test_streams() {
  cudaStream_t first, second;
  cudaEvent_t event;
  cudaStreamCreate(&first);
  cudaStreamCreate(&second);
  cudaEventCreate(&event);
  const LaunchShape one{dim3(1), dim3(1)};
  int value = 0;
  launch(add_kernel, one, first, &value, 1);
  cudaEventRecord(event, first);
  launch(add_kernel, one, first, &value, 3);
  expect(value == 0 && cudaEventQuery(event) == cudaErrorNotReady, "a stream's work waits");
  cudaStreamWaitEvent(second, event);
  launch(add_kernel, one, second, &value, 2);
  cudaStreamSynchronize(second);
  expect(value == 12 && cudaEventQuery(event) == cudaSuccess, "an event orders two streams");
  cudaStreamSynchronize(first);
  expect(value == 123, "a stream keeps its order");
  launch(add_kernel, one, first, &value, 4);
  launch(add_kernel, one, nullptr, &value, 5);
  expect(value == 12345, "the null stream waits for the others");
  cudaMemsetAsync(&value, 0, sizeof(value), second);
  cudaDeviceSynchronize();
  expect(value == 0, "cudaMemsetAsync");
  cudaEventDestroy(event);
  cudaStreamDestroy(second);
  cudaStreamDestroy(first);
}

#if defined(__SANITIZE_THREAD__)  // memory_checks.cpp sees the accesses
void test_shared_memory_checks() {
  int out[64] = {};
  const LaunchShape shape{dim3(1), dim3(64), 64 * sizeof(int)};
  expect_error("broken::missing_barrier_kernel(int*), block (0, 0, 0), thread (0, 0, 0): a read of "
               "what nothing wrote",
               [&] { launch(missing_barrier_kernel, shape, nullptr, out); });
  expect_error("broken::missing_second_barrier_kernel(int*), block (0, 0, 0), thread (63, 0, 0): a "
               "thread writes what another reads, with no barrier between, byte 20",
               [&] { launch(missing_second_barrier_kernel, shape, nullptr, out); });
  expect_error("two threads write, with no barrier",
               [&] { launch(two_writers_kernel, shape, nullptr); });
  expect_error("thread (7, 0, 0): a read of what nothing wrote",
               [&] { launch(unwritten_read_kernel, shape, nullptr, out); });
  expect_error("thread (63, 0, 0): an access beyond the end, to byte 256 of the shared memory",
               [&] { launch(overrun_kernel, shape, nullptr); });
  expect_error("thread (0, 0, 0): an access beyond the end, to byte -4 of the shared memory",
               [&] { launch(underrun_kernel, shape, nullptr); });
  expect_error("thread (0, 0, 0): a misaligned access of 4 bytes", [&] {
    launch(misaligned_scalar_kernel, shape, nullptr, reinterpret_cast<char*>(out));
  });
  launch(warp_ordered_kernel, shape, nullptr, out);
  expect(out[0] == 1 && out[63] == 62, "__syncwarp orders the accesses of a warp");
}

void test_global_memory_checks() {
  using emulator::Memory;
  const LaunchShape shape{dim3(1), dim3(64)};
  std::vector<int> in(64, 1), out(64), more(64);
  const emulator::Op op;
  emulator::allow(in.data(), 64 * sizeof(int), Memory::read_only);
  emulator::allow(out.data(), 64 * sizeof(int), Memory::writable);
  emulator::allow(more.data(), 64 * sizeof(int), Memory::unwritten);
  launch(copy_kernel, shape, op.stream(), in.data(), out.data(), 0);
  expect(out[63] == 1, "what was named may be touched");
  expect_error("broken::copy_kernel(int const*, int*, int), block (0, 0, 0), thread (63, 0, 0): a "
               "read of 4 bytes outside of the memory that the launch was given, to byte 256 of the "
               "256 bytes",
               [&] { launch(copy_kernel, shape, op.stream(), in.data(), out.data(), 1); });
  expect_error("thread (0, 0, 0): a write of 4 bytes outside", [&] {
    launch(copy_kernel, shape, op.stream(), in.data(), out.data() - 1, 0);
  });
  expect_error("a read of what nothing wrote, byte 0 of the 256 bytes of global memory", [&] {
    launch(copy_kernel, shape, op.stream(), more.data(), out.data(), 0);
  });
  expect_error("a write to an input, byte 0",
               [&] { launch(input_write_kernel, shape, op.stream(), in.data()); });
  expect_error("thread (1, 0, 0): two threads write, with no barrier between, byte 0 of the 256",
               [&] { launch(global_race_kernel, shape, op.stream(), out.data()); });
  expect_error("block (1, 0, 0), thread (0, 0, 0): two blocks write, with nothing to order them",
               [&] { launch(block_race_kernel, {dim3(2), dim3(1)}, op.stream(), out.data()); });
  expect_error("thread (3, 0, 0): two threads write",
               [&] { launch(half_atomic_kernel, shape, op.stream(), out.data()); });

  emulator::allow(in.data(), 64 * sizeof(int), Memory::writable);
  auto* counter = reinterpret_cast<unsigned*>(in.data());
  *counter = 0;
  launch(last_block_kernel, {dim3(9), dim3(1)}, op.stream(), more.data(), counter, out.data());
  expect(out[0] == 36, "the last block adds up what all have left");
  LaunchShape grid{dim3(3), dim3(32), 64};
  grid.cooperative = true;
  launch(grid_kernel, grid, op.stream(), more.data(), out.data());
  expect(out[2] == 4 + 2, "a barrier of the grid orders blocks");
  launch(halves_kernel, shape, op.stream(), reinterpret_cast<__half*>(out.data()));
}

// A launch that overlaps those before it: what it touches before it waits, they must leave alone.
void test_overlapping_launches() {
  const LaunchShape shape{dim3(1), dim3(64)};
  LaunchShape overlapping = shape;
  overlapping.overlaps_previous = true;
  int in[64] = {}, between[64] = {}, out[64] = {};
  const auto allow_all = [&] {
    for (auto* each : {&in, &between, &out})
      emulator::allow(*each, sizeof(*each), emulator::Memory::writable);
  };
  const auto chain = [&](auto second_kernel, const int* second_in) {
    const emulator::Op op;
    allow_all();
    launch(copy_kernel, shape, op.stream(), in, between, 0);
    launch(second_kernel, overlapping, op.stream(), second_in, out);
  };
  in[5] = 7;
  chain(late_reader_kernel, between);
  expect(out[5] == 7, "an overlapping launch that waits");
  in[5] = 8;
  chain(early_reader_kernel, in);
  expect(out[5] == 8, "an overlapping launch reads early what no kernel writes");
  expect_error("early_reader_kernel(int const*, int*), block (0, 0, 0), thread (0, 0, 0): a "
               "block reads what another writes, with nothing to order them",
               [&] { chain(early_reader_kernel, between); });
  expect_error("a block writes what another reads", [&] {
    const emulator::Op op;
    allow_all();
    launch(copy_kernel, shape, op.stream(), in, out, 0);
    launch(hasty_writer_kernel, overlapping, op.stream(), in);
  });
  // Fences order nothing between two launches.
  expect_error("a block reads what another writes", [&] {
    const emulator::Op op;
    allow_all();
    launch(fencing_copy_kernel, shape, op.stream(), in, between);
    launch(fencing_early_reader_kernel, overlapping, op.stream(), between, out);
  });
  // The one in the middle has waited for the first, but the third may begin before it ends.
  expect_error("a block reads what another writes", [&] {
    const emulator::Op op;
    allow_all();
    launch(copy_kernel, shape, op.stream(), in, between, 0);
    launch(late_reader_kernel, overlapping, op.stream(), in, out);
    launch(early_reader_kernel, overlapping, op.stream(), between, out);
  });
  expect_error("it ends without having waited",
               [&] { launch(copy_kernel, overlapping, nullptr, in, out, 0); });
}
#endif

}  // namespace

void test_emulator() {
  test_barriers_and_warps();
  test_launches();
  test_alignment();
  test_atomics();
  test_cooperative_launches();
  test_streams();
#if defined(__SANITIZE_THREAD__)
  test_shared_memory_checks();
  test_global_memory_checks();
  test_overlapping_launches();
#endif
}
