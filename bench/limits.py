"""What this machine can do right now: read bandwidth and matrix-product rates. Must not know a model.

    python -m bench.limits --threads 2

Rates of a shared machine change from hour to hour, so they are measured beside every measurement they are compared
with. A limit is the best of many short tries: what the machine gives when nobody disturbs it for a few milliseconds.

What measures is a value: `measure` takes lists of probes, functions from a thread count to one number, and keeps the
best number of each list. A faster kernel raises the limit by being added to a list.
"""

import argparse
import ctypes
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

Probe = Callable[[int], float | None]
"""Threads to GB/s or Gop/s; None where this machine lacks what it takes."""

SECONDS = 1.0
"""How long one probe tries."""

# Each thread reads its share of a buffer far larger than the caches; a window is a few milliseconds of reading.
READER = r"""
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>
using Clock = std::chrono::steady_clock;
static double seconds() { return std::chrono::duration<double>(Clock::now().time_since_epoch()).count(); }

static uint64_t read_all(const uint64_t* p, size_t n) {
    uint64_t s[32] = {};
    for (size_t i = 0; i < n; i += 32)
        for (int k = 0; k < 32; ++k) s[k] += p[i + k];
    uint64_t sum = 0;
    for (uint64_t v : s) sum += v;
    return sum;
}

// GB/s of the best window in `budget` seconds, all threads together; 0 if there is no memory for the buffer.
extern "C" double read_gbs(int n_threads, double budget) {
    const size_t window = 64u << 20, share = 4 * window, total = share * n_threads;
    void* at = mmap(nullptr, total, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED) return 0;
    madvise(at, total, MADV_HUGEPAGE);
    memset(at, 1, total);
    std::atomic<uint64_t> sink{0};
    std::atomic<int> arrived{0}, done{0};
    std::atomic<bool> stop{false};
    double best = 0;
    auto run = [&](int id) {
        const char* mine = static_cast<const char*>(at) + id * share;
        for (int turn = 0;; ++turn) {
            arrived.fetch_add(1);
            while (arrived.load() < n_threads * (turn + 1)) {}
            if (stop.load()) return;
            double begin = seconds();
            sink += read_all(reinterpret_cast<const uint64_t*>(mine + (turn % 4) * window), window / 8);
            done.fetch_add(1);
            if (id) continue;
            while (done.load() < n_threads * (turn + 1)) {}
            double took = seconds() - begin;
            best = std::max(best, n_threads * static_cast<double>(window) / took / 1e9);
            budget -= took;
            if (budget <= 0) stop = true;
        }
    };
    std::vector<std::thread> others;
    for (int id = 1; id < n_threads; ++id) others.emplace_back(run, id);
    run(0);
    for (auto& t : others) t.join();
    munmap(at, total);
    return sink.load() ? best : 0;
}

static void stay_on(int cpu) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    pthread_setaffinity_np(pthread_self(), sizeof set, &set);
}

// Nanoseconds of a cache line from one CPU to another: two threads pass it to and fro; the median of many windows.
extern "C" double cache_line_ns(int cpu, int other_cpu, double budget) {
    constexpr int trips = 1000;
    alignas(64) static std::atomic<int> turn;
    turn = 0;
    std::vector<double> windows;
    std::thread other([&] {
        stay_on(other_cpu);
        for (int t; (t = turn.load()) >= 0;)
            if (t == 1) turn.store(0);
    });
    std::thread one([&] {
        stay_on(cpu);
        auto there_and_back = [] {
            turn.store(1);
            while (turn.load() != 0) {}
        };
        there_and_back();
        for (double begin = seconds(), now = begin; now < begin + budget;) {
            for (int i = 0; i < trips; ++i) there_and_back();
            double then = now;
            now = seconds();
            windows.push_back((now - then) / (2 * trips) * 1e9);
        }
        turn.store(-1);
    });
    one.join();
    other.join();
    std::nth_element(windows.begin(), windows.begin() + windows.size() / 2, windows.end());
    return windows[windows.size() / 2];
}
"""


@dataclass(frozen=True)
class Limits:
    """Best rates of one moment, with all `threads` at work."""

    threads: int
    read_gbs: float
    """GB/s from memory."""
    bf16_gflops: float
    int8_gops: float
    sources: dict[str, str]
    """Which probe gave each number."""
    cache_line_ns: float | None = None
    """From one core to another. No limit, but it says where a hypervisor has put two virtual cores: below 60 or so they
    share a third-level cache, above 100 they do not, and then read bandwidth and the cost of every hand-over differ."""

    def gops(self, precision: str) -> float:
        """The rate at which a precision multiplies: int4 weights are widened and multiplied as int8."""
        return self.bf16_gflops if precision == "bf16" else self.int8_gops


def compiled_read(threads: int) -> float | None:
    """GB/s by a small C++ program. None without a compiler."""
    library = _library()
    if library is None:
        return None
    library.read_gbs.argtypes, library.read_gbs.restype = (ctypes.c_int, ctypes.c_double), ctypes.c_double
    return float(library.read_gbs(threads, SECONDS)) or None


def cache_line_ns() -> float | None:
    """From the first CPU that this process may use to the second, now. None without a compiler or with one CPU."""
    library, cpus = _library(), sorted(os.sched_getaffinity(0))
    if library is None or len(cpus) < 2:
        return None
    function = library.cache_line_ns
    function.argtypes, function.restype = (ctypes.c_int, ctypes.c_int, ctypes.c_double), ctypes.c_double
    return float(function(*cpus[:2], SECONDS / 4))


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The C++ above, compiled. None without a compiler."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory(prefix="brigade-limits-") as folder:
        source, library = Path(folder) / "read.cpp", Path(folder) / "read.so"
        source.write_text(READER)
        flags = ["-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-pthread"]
        subprocess.run([compiler, *flags, str(source), "-o", str(library)], check=True, capture_output=True)
        return ctypes.CDLL(str(library))


def torch_read(threads: int) -> float | None:
    """GB/s of torch adding up a large tensor."""
    import torch

    torch.set_num_threads(threads)
    data = torch.ones(64 << 20, dtype=torch.int64)
    return data.nbytes / _best_seconds(data.sum) / 1e9


def torch_bf16(threads: int) -> float | None:
    """GFLOP/s of torch's bf16 linear, on shapes like a prefill's."""
    import torch

    torch.set_num_threads(threads)
    m, k, n = 1024, 2048, 2048
    x = torch.randn(m, k).to(torch.bfloat16)
    w = torch.randn(n, k).to(torch.bfloat16)
    return 2 * m * k * n / _best_seconds(lambda: torch.nn.functional.linear(x, w)) / 1e9


def torch_int8(threads: int) -> float | None:
    """Gop/s of torch's int8 matrix product."""
    import torch

    torch.set_num_threads(threads)
    m, k, n = 1024, 2048, 2048
    x = torch.randint(-127, 127, (m, k), dtype=torch.int8)
    w = torch.randint(-127, 127, (n, k), dtype=torch.int8).t()
    return 2 * m * k * n / _best_seconds(lambda: torch._int_mm(x, w)) / 1e9


READ: tuple[Probe, ...] = (compiled_read, torch_read)
BF16: tuple[Probe, ...] = (torch_bf16,)
INT8: tuple[Probe, ...] = (torch_int8,)


def measure(
    threads: int, read: Sequence[Probe] = READ, bf16: Sequence[Probe] = BF16, int8: Sequence[Probe] = INT8
) -> Limits:
    """Try every probe and keep the best of each kind. Raises RuntimeError where no probe of a kind can run."""
    best = {kind: _best(kind, probes, threads) for kind, probes in (("read", read), ("bf16", bf16), ("int8", int8))}
    return Limits(
        threads=threads,
        read_gbs=best["read"][0],
        bf16_gflops=best["bf16"][0],
        int8_gops=best["int8"][0],
        sources={kind: source for kind, (_, source) in best.items()},
        cache_line_ns=cache_line_ns(),
    )


def measure_apart(threads: int) -> Limits:
    """`measure` in a process of its own, so that nothing of it stays: no threads, no memory."""
    command = [sys.executable, "-m", "bench.limits", "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False)
    if done.returncode:
        raise RuntimeError(f"the limits could not be measured: {done.stderr.strip()[-500:]}")
    return Limits(**json.loads(done.stdout))


def _best(kind: str, probes: Sequence[Probe], threads: int) -> tuple[float, str]:
    rates = [(rate, probe.__name__) for probe in probes if (rate := probe(threads)) is not None]
    if not rates:
        raise RuntimeError(f"no way to measure {kind} on this machine")
    return max(rates)


def _best_seconds(work: Callable[[], object]) -> float:
    work()
    best, end = float("inf"), time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


def main() -> int:
    """The command line. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="bench.limits", description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    print(json.dumps(asdict(measure(parser.parse_args().threads))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
