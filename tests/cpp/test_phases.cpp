// Phases of tasks in one parallel region: order, completeness, missing and failing threads.

#include "common/phases.h"

#include <chrono>
#include <stdexcept>
#include <vector>

#include "check.h"

namespace {

// A thread for each task, each of which comes a little later than the one before.
struct Threads {
  int64_t threads;
  template <class Body>
  void operator()(int64_t tasks, int64_t, const Body& body) const {
    std::vector<std::thread> running;
    std::vector<std::exception_ptr> errors(tasks);
    for (int64_t task = 0; task < tasks; ++task)
      running.emplace_back([&, task] {
        std::this_thread::sleep_for(std::chrono::microseconds(50 * task));
        try {
          body(task, task + 1);
        } catch (...) {
          errors[task] = std::current_exception();
        }
      });
    for (auto& each : running) each.join();
    for (const auto& error : errors)
      if (error) std::rethrow_exception(error);
  }
};

// All tasks on the thread at hand, as where PyTorch is called from within a parallel region.
struct Alone {
  int64_t threads;
  template <class Body>
  void operator()(int64_t tasks, int64_t, const Body& body) const {
    body(0, tasks);
  }
};

template <class Parallel>
void check_phases(int64_t threads, const std::vector<int64_t>& tasks) {
  std::vector<std::vector<std::atomic<int>>> runs;
  for (const int64_t each : tasks) runs.emplace_back(each);
  std::atomic<bool> early{false};
  const auto phase = [&](size_t number) {
    return [&, number](int64_t task) {
      for (size_t before = 0; before < number; ++before)
        for (const auto& each : runs[before])
          if (each.load() != 1) early = true;
      ++runs[number][task];
    };
  };
  const auto first = phase(0), second = phase(1), third = phase(2);
  pyext::run_phases({{tasks[0], first}, {tasks[1], second}, {tasks[2], third}}, threads,
                    Parallel{threads});
  CHECK(!early);
  for (const auto& each : runs)
    for (const auto& count : each) CHECK(count == 1);
}

// One task fails: the error arrives, and no thread waits for ever.
template <class Parallel>
void check_failure(int64_t threads, int64_t failing) {
  bool arrived = false;
  const auto fail = [&](int64_t task) {
    if (task == failing) throw std::runtime_error("a task");
  };
  const auto nothing = [](int64_t) {};
  try {
    pyext::run_phases({{4, fail}, {4, nothing}}, threads, Parallel{threads});
  } catch (const std::runtime_error&) {
    arrived = true;
  }
  CHECK(arrived);
}

}  // namespace

int main() {
  for (const int64_t threads : {1, 2, 3, 8})
    for (const std::vector<int64_t>& tasks :
         {std::vector<int64_t>{4, 2, 4}, {1, 1, 1}, {7, 0, 3}, {0, 20, 1}})
      for (int repeat = 0; repeat < 20; ++repeat) {
        check_phases<Threads>(threads, tasks);
        check_phases<Alone>(threads, tasks);
      }
  for (const int64_t threads : {1, 2, 3})
    for (int64_t failing = 0; failing < 4; ++failing) {
      check_failure<Threads>(threads, failing);
      check_failure<Alone>(threads, failing);
    }
  return failures != 0;
}
