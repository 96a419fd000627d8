// Loops over tasks, one after the other, in one parallel region. No PyTorch in here.
#pragma once

#include <atomic>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <thread>

#include "common/matrix.h"

namespace pyext {

// A loop whose tasks need nothing of each other, only of the phases before.
struct Phase {
  int64_t tasks;
  FunctionRef<void(int64_t)> run;
};

// Lets a processor that waits in a loop rest for some tens of clocks.
inline void pause_spinning() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Runs the phases: each begins when the one before is done. A region of its own for each would make
// all threads meet at PyTorch's barrier twice in between.
//
// A thread takes its own tasks first, the same ones of every call, whose operands its cache may still
// hold, then those that nobody has begun. So it does not matter how many of the threads come, and
// when: nobody waits for a task but one that somebody is at work on.
template <class Parallel>
void run_phases(std::initializer_list<Phase> phases, int64_t threads, const Parallel& parallel) {
  if (threads == 1) {
    for (const Phase& phase : phases)
      for (int64_t task = 0; task < phase.tasks; ++task) phase.run(task);
    return;
  }
  struct alignas(64) Progress {
    std::atomic<int64_t> done{0};
    std::unique_ptr<std::atomic<bool>[]> taken;
  };
  const auto progress = std::make_unique<Progress[]>(phases.size());
  for (size_t i = 0; i < phases.size(); ++i)
    progress[i].taken = std::make_unique<std::atomic<bool>[]>(phases.begin()[i].tasks);
  std::atomic<bool> failed{false};

  const auto work = [&](int64_t thread) {
    Progress* at = progress.get();
    for (const Phase& phase : phases) {
      const int64_t first = phase.tasks * thread / threads;
      for (int64_t i = 0; i < phase.tasks; ++i) {
        const int64_t task = (first + i) % phase.tasks;
        if (at->taken[task].load(std::memory_order_relaxed) ||
            at->taken[task].exchange(true, std::memory_order_relaxed))
          continue;
        phase.run(task);
        at->done.fetch_add(1, std::memory_order_release);
      }
      for (int64_t turns = 0; at->done.load(std::memory_order_acquire) < phase.tasks; ++turns) {
        if (failed.load(std::memory_order_relaxed)) return;  // who failed reports it
        if (turns < 1000)
          pause_spinning();
        else
          std::this_thread::yield();  // the other may be waiting for this core
      }
      ++at;
    }
  };
  parallel(threads, threads, [&](int64_t begin, int64_t end) {
    try {
      for (int64_t thread = begin; thread < end; ++thread) work(thread);
    } catch (...) {
      failed.store(true, std::memory_order_relaxed);
      throw;
    }
  });
}

}  // namespace pyext
