// Calls from several threads at once, which share their inputs, among them the process's first:
// the same bits as a call alone. ThreadSanitizer finds here what would be a race without a trace in
// the bits.
#include <atomic>
#include <cstdlib>
#include <thread>
#include <vector>

#include "check.h"
#include "problem.h"

namespace {

constexpr int kThreads = 8;

// The backend that is chosen on first use.
constexpr Backend kChosen = {"chosen", cpu::set_attention_forward, cpu::set_attention_backward};

// Threads that all come here before any goes on, so that their calls overlap.
class Start {
 public:
  void wait() {
    --missing_;
    while (missing_ > 0) std::this_thread::yield();
  }

 private:
  std::atomic<int> missing_{kThreads};
};

template <class Real>
void test_calls(const Case& c) {
  Problem<Real> problem(c);
  std::vector<Results<Real>> found(kThreads, Results<Real>(c, problem.queries));
  std::vector<Status> status(kThreads);
  std::vector<std::thread> threads;
  Start start;
  for (int i = 0; i < kThreads; ++i) {
    threads.emplace_back([&, i] {
      start.wait();
      status[i] = call(kChosen, problem, found[i]);
    });
  }
  for (std::thread& thread : threads) thread.join();
  Results<Real> alone(c, problem.queries);
  CHECK(call(kChosen, problem, alone) == Status::kOk);
  for (int i = 0; i < kThreads; ++i) {
    CHECK(status[i] == Status::kOk);
    CHECK(found[i] == alone);
  }
}

}  // namespace

int main() {
  setenv("SETFORMER_LEAST_PARALLEL_WORK", "0", 0);  // small calls wake OpenMP's threads, too
  const Kernel linear = Kernel::kLinear, gaussian = Kernel::kGaussian;
  for (int round = 0; round < 4; ++round) {  // chance decides which calls and threads overlap
    test_calls<float>({2, 5, 131, 9, 17, 12, 2, linear, 0.01, 60, 2, true, true});
    // Heads of several spans, by scaling and in the log domain.
    test_calls<float>({1, 2, 1700, 5, 6, 7, 3, gaussian, 0.1, 1300});
    test_calls<double>({1, 1, 1700, 5, 6, 7, 3, gaussian, 0.003});
  }
  return check::report("test_concurrency");
}
