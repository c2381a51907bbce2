// Threads that share the tasks of a job. A job is a list of phases; a phase is n independent tasks claimed one by one from
// an atomic counter; a phase starts when all tasks of the one before are done.
//
// The caller works too, and never waits for a helper to arrive, only for tasks that a helper has claimed. So a helper that
// the system has put aside costs nothing, where an OpenMP barrier would cost a scheduler quantum for every parallel region.
#pragma once
#include <immintrin.h>
#include <sched.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <vector>

class Pool {
 public:
  static constexpr int MAX_PHASES = 16;

  struct Phase {
    std::atomic<int64_t> next{0}, done{0};
    int64_t n = 0;
    void (*call)(void* task_function, int64_t task) = nullptr;
    void* task_function = nullptr;
  };

  struct Job {
    Phase phases[MAX_PHASES];
    int n_phases = 0;
    std::atomic<int> inside{0};  // helpers that are looking at this job

    // Add a phase: f(task) for task = 0..n-1. `f` must live until the job has run.
    template <class F>
    void phase(int64_t n, F& f) {
      if (n_phases == MAX_PHASES) throw std::logic_error("a job has too many phases");
      Phase& p = phases[n_phases++];
      p.next.store(0, std::memory_order_relaxed);
      p.done.store(0, std::memory_order_relaxed);
      p.n = n;
      p.task_function = &f;
      p.call = [](void* function, int64_t task) { (*(F*)function)(task); };
    }
  };

  explicit Pool(int n_threads) : n_threads_(n_threads) {
    for (int i = 1; i < n_threads; i++) helpers_.emplace_back([this] { help(); });
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
    while (job.inside.load(std::memory_order_acquire)) _mm_pause();  // a helper that was put aside long ago
    job.n_phases = 0;
    return job;
  }

  void run(Job& job) {
    if (n_threads_ == 1) {
      work(job, false);
      return;
    }
    posted_.fetch_add(1, std::memory_order_seq_cst);
    if (sleepers_.load()) {
      std::lock_guard<std::mutex> lock(mutex_);
      wake_.notify_all();
    }
    work(job, false);
  }

 private:
  // Jobs are posted in a ring, so that a helper which comes back late still finds the one it was in untouched.
  static constexpr int RING = 64;
  // About 200 microseconds: a step's calls follow each other faster than that.
  static constexpr int SPINS_BEFORE_SLEEP = 20000;

  static void work(Job& job, bool helper) {
    for (int i = 0; i < job.n_phases; i++) {
      Phase& p = job.phases[i];
      for (int64_t task; (task = p.next.fetch_add(1, std::memory_order_relaxed)) < p.n;) {
        p.call(p.task_function, task);
        p.done.fetch_add(1, std::memory_order_release);
      }
      if (helper && i + 1 == job.n_phases) return;
      for (int spins = 0; p.done.load(std::memory_order_acquire) < p.n;) {
        _mm_pause();
        if (++spins > 2000) {
          sched_yield();
          spins = 1000;
        }
      }
    }
  }

  void help() {
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
      job.inside.fetch_add(1);
      if (posted_.load(std::memory_order_acquire) - now < RING / 2) work(job, true);
      job.inside.fetch_sub(1);
    }
  }

  const int n_threads_;
  Job ring_[RING];
  std::atomic<uint64_t> posted_{0};
  std::atomic<int> sleepers_{0};
  std::atomic<bool> ending_{false};
  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<std::thread> helpers_;
};
