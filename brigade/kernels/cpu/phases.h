// What layers are put together from: phases of a linear layer, phases of attention, and the job of an attention layer, which
// ends in the same phases whatever its queries and its cache rows are.
#pragma once
#include <algorithm>
#include <type_traits>
#include <vector>

#include "attention.h"
#include "pool.h"
#include "quantize.h"
#include "tiles.h"

// What one step runs: tokens in slices, their positions' rotary tables, and where their cache rows go.
struct Step {
  int64_t n_tokens, n_sequences, page;
  const float *cos, *sin;     // [tokens][rope / 2]
  const int64_t* slots;       // [tokens]
  const Sequence* sequences;  // in the order of their rows
  const int32_t* pages;
};

// ---- Linear layers

// Phases for out = x W^T: quantisation of the rows if the weights are int8, then the groups. Only experts may be int4.
template <class OutFrom>
struct Linear {
  Pool& pool;
  const Matrix& w;
  const bf16* x;
  int64_t n, stride;
  OutFrom out_from;
  Quantized q;

  void operator()(int64_t g) {
    const char* next = w.group(std::min(g + 1, w.n_groups() - 1));
    if (w.kind == BF16)
      multiply_group<BF16>(
          w, g, n, next,
          [&](int64_t i, int count, Rows& rows) {
            for (int m = 0; m < count; m++) rows.at[m] = (const char*)(x + (i + m) * stride);
          },
          out_from);
    else
      multiply_group<INT8>(
          w, g, n, next,
          [&](int64_t i, int count, Rows& rows) {
            for (int m = 0; m < count; m++) q.give(i + m, rows, m);
          },
          out_from);
  }
};

template <class OutFrom>
static Linear<OutFrom> linear(Pool& pool, const Matrix& w, const bf16* x, int64_t n, int64_t stride, Cutter& memory,
                              OutFrom out_from) {
  Quantized q;
  if (w.kind == INT8) q = Quantized(memory, n, w.ins, INT8);
  return Linear<OutFrom>{pool, w, x, n, stride, out_from, q};
}

// Memory that linear() takes.
INLINE size_t linear_bytes(const Matrix& w, int64_t n) {
  Cutter size{nullptr};
  if (w.kind == INT8) Quantized(size, n, w.ins, INT8);
  return size.used;
}

// ---- Attention

// Which query rows a task computes. A task of one split leaves a partial result; one of all splits (-1) a finished row.
struct AttentionTask {
  int64_t sequence, kv_head, first_row, n, split;
};

template <int LANES>
static void attention_tasks(const Heads& h, const Step& s, int n_threads, std::vector<AttentionTask>& tasks) {
  tasks.clear();
  for (int64_t i = 0; i < s.n_sequences; i++) {
    const int64_t rows = s.sequences[i].n * h.group;
    for (int64_t kv = 0; kv < h.n_kv; kv++)
      for (int64_t r = 0; r < rows; r += LANES) tasks.push_back({i, kv, r, std::min<int64_t>(LANES, rows - r), -1});
  }
  if ((int64_t)tasks.size() >= 4 * n_threads || n_threads == 1) return;
  // Too few tasks for the threads: one for each split. Folded in order, they give what one task gives.
  std::vector<AttentionTask> cut;
  for (const AttentionTask& t : tasks) {
    const Sequence& q = s.sequences[t.sequence];
    const int64_t n_keys = q.start + (t.first_row + t.n - 1) / h.group + 1;
    const int64_t n_splits = (n_keys + SPLIT - 1) / SPLIT;
    for (int64_t i = 0; i < n_splits; i++) cut.push_back({t.sequence, t.kv_head, t.first_row, t.n, n_splits == 1 ? -1 : i});
  }
  tasks.swap(cut);
}

// What attention reads, scaled: a head's query at q + token * q_token + head * q_head; and where its row goes, in the same way.
struct QueryRows {
  const bf16* q;
  int64_t q_token, q_head;
  bf16* out;
  int64_t out_token, out_head;
};

// The two phases of attention.
template <int LANES>
struct AttentionPhases {
  const Heads& heads;
  const Step& step;
  Cache cache;
  const QueryRows& rows;
  std::vector<AttentionTask> tasks;
  Buffer& partial_memory;
  char* partials = nullptr;
  int64_t partial_bytes = 0;

  void plan(int n_threads) {
    attention_tasks<LANES>(heads, step, n_threads, tasks);
    const bool any = std::any_of(tasks.begin(), tasks.end(), [](const AttentionTask& t) { return t.split >= 0; });
    partial_bytes = (int64_t)sizeof(float) * LANES * (2 + round_up(heads.value_width, GROUP));
    partials = any ? partial_memory.get(tasks.size() * partial_bytes) : nullptr;
  }

  float* partial(int64_t task) const { return (float*)(partials + task * partial_bytes); }

  Keys keys(const AttentionTask& t) const {
    const Sequence& s = step.sequences[t.sequence];
    const int64_t from = std::max<int64_t>(t.split, 0) * SPLIT;
    return {&s, t.kv_head, from, s.start + s.n - from};
  }

  void compute(int64_t i) const {
    const AttentionTask& t = tasks[i];
    Attention<LANES> a(heads, cache);
    a.load(step.sequences[t.sequence], t.kv_head, rows.q, rows.q_token, rows.q_head, t.first_row, t.n);
    if (i + 1 < (int64_t)tasks.size()) a.load_next(keys(tasks[i + 1]));
    if (t.split >= 0) {
      a.run_split(t.split);
      float* p = partial(i);
      memcpy(p, a.split().most, sizeof(float) * LANES);
      memcpy(p + LANES, a.split().sum, sizeof(float) * LANES);
      memcpy(p + 2 * LANES, a.split().out, sizeof(float) * t.n * a.width());
      return;
    }
    a.clear_total();
    for (int64_t split = 0; split < a.n_splits(a.n_keys()); split++) {
      a.run_split(split);
      a.fold_split();
    }
    a.store(t.first_row, rows.out, rows.out_token, rows.out_head);
  }

  // The first split's task folds all splits of its rows.
  void fold(int64_t i) const {
    const AttentionTask& t = tasks[i];
    if (t.split != 0) return;
    Attention<LANES> a(heads, cache);
    a.load(step.sequences[t.sequence], t.kv_head, rows.q, rows.q_token, rows.q_head, t.first_row, t.n);
    a.clear_total();
    for (int64_t j = i; j < (int64_t)tasks.size() && tasks[j].split == j - i; j++) {
      const float* p = partial(j);
      a.fold(p, p + LANES, p + 2 * LANES);
    }
    a.store(t.first_row, rows.out, rows.out_token, rows.out_head);
  }
};

// Lanes for a step: many where rows of one key head are many, few where a decode has few heads.
static int lanes_for(const Heads& h, const Step& s) {
  int64_t most = 0;
  for (int64_t i = 0; i < s.n_sequences; i++) most = std::max(most, s.sequences[i].n * h.group);
  return most > 32 ? 64 : most > 16 ? 32 : 16;
}


// Calls f with the number of lanes as an integral constant.
template <class F>
INLINE void with_lanes(const Heads& heads, const Step& step, const F& f) {
  switch (lanes_for(heads, step)) {
    case 16: return f(std::integral_constant<int, 16>{});
    case 32: return f(std::integral_constant<int, 32>{});
    default: return f(std::integral_constant<int, 64>{});
  }
}

// The job of an attention layer: residual += values * w^T. prepare(job) adds the phases that make queries and cache rows,
// finish(job) those that make `values` [tokens][w.ins, padded] of what attention left in rows.out, if that is not them.
template <class Prepare, class Finish>
static void attend(Pool& pool, const Heads& heads, const Step& step, const bf16* cache, const QueryRows& rows, const Matrix& w,
                   bf16* values, float* residual, int64_t stride, Cutter& memory, const Prepare& prepare, const Finish& finish) {
  static Buffer partials;
  const int64_t T = step.n_tokens, value_stride = round_up(w.ins, 64);
  auto out = linear(pool, w, values, T, value_stride, memory,
                    [&](int64_t i) { return AddFloat{residual + i * stride, stride, w.outs}; });
  auto quantize = [&](int64_t t) {
    bf16* row = values + t * value_stride;
    std::fill(row + w.ins, row + value_stride, 0);  // it reads whole registers
    out.q.take(t, row);
  };
  with_lanes(heads, step, [&](auto lanes) {
    AttentionPhases<lanes> attention{heads, step, Cache{cache, step.page, step.pages}, rows, {}, partials};
    attention.plan(pool.n_threads());
    auto compute = [&](int64_t i) { attention.compute(i); };
    auto fold = [&](int64_t i) { attention.fold(i); };
    Pool::Job& job = pool.open();
    prepare(job);
    job.phase(attention.tasks.size(), compute);
    if (attention.partials) job.phase(attention.tasks.size(), fold);
    finish(job);
    if (w.kind == INT8) job.phase(T, quantize);
    job.phase(w.n_groups(), out);
    pool.run(job);
  });
}
