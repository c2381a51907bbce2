// Threads that share the tasks of a job. A job is a list of phases; a phase is n independent tasks; a phase starts when all
// tasks of the one before are done.
//
// Each thread has a share of a phase, neighbouring tasks, and claims them one by one from a counter that is its own; when its
// share is used up it claims from the others'. Neighbouring tasks read neighbouring memory, so a thread's reading is one long
// stream. And a claim touches a cache line that nobody else wants: between two cores of one complex a line takes 30 ns, between
// complexes 180 ns, which a counter for all would cost with every task.
//
// The caller works too, and never waits for a helper to arrive, only for tasks that a helper has claimed. So a helper that
// the system has put aside costs nothing, where an OpenMP barrier would cost a scheduler quantum for every parallel region.
#pragma once
#include <immintrin.h>
#include <sched.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <vector>

class Pool {
 public:
  static constexpr int MAX_PHASES = 16;

  class Job {
   public:
    // Add a phase: f(task) for task = 0..n-1. `f` must live until the job has run.
    template <class F>
    void phase(int64_t n, F& f) {
      if (n_phases_ == MAX_PHASES) throw std::logic_error("a job has too many phases");
      const int i = n_phases_++;
      phases_[i] = {n, &f, [](void* function, int64_t task) { (*(F*)function)(task); }};
      done_[i].tasks.store(0, std::memory_order_relaxed);
      for (int t = 0; t < n_threads_; t++) shares_[t].next[i].store(begin(t, n), std::memory_order_relaxed);
    }

   private:
    friend class Pool;
    struct Phase {
      int64_t n;
      void* task_function;
      void (*call)(void* task_function, int64_t task);
    };
    struct alignas(64) Done {
      std::atomic<int64_t> tasks{0};
    };
    struct alignas(64) Share {  // of one thread, in every phase
      std::atomic<int64_t> next[MAX_PHASES];
    };

    // The first task of a thread's share. One task alone is the caller's.
    int64_t begin(int thread, int64_t n) const { return (n * thread + n_threads_ - 1) / n_threads_; }

    // Tasks of phase i, this thread's own first. Returns how many it has done.
    int64_t work(int i, int thread) {
      const Phase& p = phases_[i];
      int64_t n_done = 0;
      for (int k = 0; k < n_threads_; k++) {
        const int t = (thread + k) % n_threads_;
        const int64_t end = begin(t + 1, p.n);
        std::atomic<int64_t>& next = shares_[t].next[i];
        if (next.load(std::memory_order_relaxed) >= end) continue;
        for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < end; n_done++) p.call(p.task_function, task);
      }
      return n_done;
    }

    Phase phases_[MAX_PHASES];
    Done done_[MAX_PHASES];
    int n_phases_ = 0, n_threads_ = 1;
    std::unique_ptr<Share[]> shares_;
    alignas(64) std::atomic<int> inside_{0};  // helpers that are looking at this job
  };

  explicit Pool(int n_threads) : n_threads_(n_threads) {
    for (Job& job : ring_) job.n_threads_ = n_threads, job.shares_.reset(new Job::Share[n_threads]);
    for (int i = 1; i < n_threads; i++) helpers_.emplace_back([this, i] { help(i); });
  }

  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      ending_ = true;
      posted_.fetch_add(1);
    }
    wake_.notify_all();
    for (auto& t : helpers_) t.join();
  }

  int n_threads() const { return n_threads_; }

  // An empty job to fill. Only one may be open, and only one thread may use a pool.
  Job& open() {
    Job& job = ring_[(posted_.load(std::memory_order_relaxed) + 1) % RING];
    while (job.inside_.load(std::memory_order_acquire)) _mm_pause();  // a helper that was put aside long ago
    job.n_phases_ = 0;
    return job;
  }

  void run(Job& job) {
    if (n_threads_ == 1) {
      work(job, 0);
      return;
    }
    posted_.fetch_add(1, std::memory_order_seq_cst);
    if (sleepers_.load()) {
      std::lock_guard<std::mutex> lock(mutex_);
      wake_.notify_all();
    }
    work(job, 0);
  }

 private:
  // Jobs are posted in a ring, so that a helper which comes back late still finds the one it was in untouched.
  static constexpr int RING = 64;
  // About 200 microseconds: a step's calls follow each other faster than that.
  static constexpr int SPINS_BEFORE_SLEEP = 20000;

  static void work(Job& job, int thread) {
    for (int i = 0; i < job.n_phases_; i++) {
      std::atomic<int64_t>& done = job.done_[i].tasks;
      if (const int64_t n = job.work(i, thread)) done.fetch_add(n, std::memory_order_acq_rel);
      if (thread && i + 1 == job.n_phases_) return;
      for (int spins = 0; done.load(std::memory_order_acquire) < job.phases_[i].n;) {
        _mm_pause();
        if (++spins > 2000) {
          sched_yield();
          spins = 1000;
        }
      }
    }
  }

  void help(int thread) {
    uint64_t seen = 0;  // not posted_: a thread that starts late must not take the closing for seen
    while (true) {
      uint64_t now;
      for (int spins = 0; (now = posted_.load(std::memory_order_acquire)) == seen;) {
        _mm_pause();
        if (++spins <= SPINS_BEFORE_SLEEP) continue;
        std::unique_lock<std::mutex> lock(mutex_);
        sleepers_++;
        wake_.wait(lock, [&] { return posted_.load() != seen; });
        sleepers_--;
        spins = 0;
      }
      if (ending_) return;
      seen = now;
      Job& job = ring_[now % RING];
      job.inside_.fetch_add(1);
      if (posted_.load(std::memory_order_acquire) - now < RING / 2) work(job, thread);
      job.inside_.fetch_sub(1);
    }
  }

  const int n_threads_;
  Job ring_[RING];
  alignas(64) std::atomic<uint64_t> posted_{0};
  std::atomic<int> sleepers_{0};
  std::atomic<bool> ending_{false};
  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<std::thread> helpers_;
};
