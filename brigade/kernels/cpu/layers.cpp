// The functions that Python calls, one or two for each layer, over a residual stream of floats [tokens][stride]. Each is one
// job for the pool. Rows of activations are padded with zeros to a multiple of 64 numbers. Struct layouts: structs.py.
#include "attention.h"
#include "experts.h"
#include "pool.h"
#include "quantize.h"
#include "rows.h"
#include "tiles.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

// What one step runs: tokens in slices, their positions' rotary tables, and where their cache rows go.
struct Step {
  int64_t n_tokens, n_sequences, page;
  const float *cos, *sin;     // [tokens][rope / 2]
  const int64_t* slots;       // [tokens]
  const Sequence* sequences;  // in the order of their rows
  const int32_t* pages;
};

// Latent attention of one layer, in absorbed form.
struct Mla {
  const float *norm, *q_norm, *kv_norm;
  Matrix down;         // q_a and kv_a as one matrix; without q_lora: q and kv_a
  Matrix q_up;         // outs 0 without q_lora
  Matrix key, value;   // n_heads matrices each: nope -> latent, latent -> v
  Matrix out;
  int64_t dim, n_heads, q_rank, kv_rank, nope, rope, v;
  float eps, latent_eps, scale;
  int32_t interleaved;
};

EXPORT Pool* pool_new(int32_t n_threads) { return new Pool(n_threads); }
EXPORT void pool_free(Pool* pool) { delete pool; }

// ---- Packing

// Pack `w` [outs][ins] (bf16, row after row) into its place. paired: the first half of the rows are gate, the second up.
EXPORT void pack(const bf16* w, const Matrix* m) {
  const int64_t per_step = m->ins_per_step(), n_groups = m->n_groups(), half = m->outs / 2;
  auto source = [&](int64_t g, int n) -> const bf16* {  // row of W behind output n of group g, or null for padding
    int64_t row = g * GROUP + n;
    if (m->paired) {
      const int64_t i = g * (GROUP / 2) + n / 32 * 16 + n % 16;
      if (i >= half) return nullptr;
      row = n % 32 < 16 ? i : half + i;
    }
    return row < m->outs ? w + row * m->ins : nullptr;
  };
  for (int64_t g = 0; g < n_groups; g++)
    for (int n = 0; n < GROUP; n++) {
      const bf16* row = source(g, n);
      char* to = (char*)m->group(g) + 4 * n;
      float most = 0;
      if (row && m->kind == INT8)
        for (int64_t k = 0; k < m->ins; k++) most = std::max(most, std::fabs(to_float(row[k])));
      const float inverse = most > 0 ? 127.f / most : 0;
      int32_t sum = 0;
      for (int64_t step = 0; step < m->n_steps(); step++, to += STEP)
        for (int64_t i = 0; i < per_step; i++) {
          const int64_t k = step * per_step + i;
          const bf16 v = row && k < m->ins ? row[k] : 0;
          if (m->kind == BF16) {
            ((bf16*)to)[i] = v;
          } else {
            const int8_t q = (int8_t)std::lrint(to_float(v) * inverse);
            ((int8_t*)to)[i] = q;
            sum += q;
          }
        }
      if (m->kind == INT8) {
        ((float*)m->scales)[g * GROUP + n] = most / 127.f;
        ((int32_t*)m->sums)[g * GROUP + n] = 128 * sum;
      }
    }
}

// ---- Linear layers

// Phases for out = x W^T: quantisation of the rows if the weights are int8, then the groups.
template <class OutFrom>
struct Linear {
  Pool& pool;
  const Matrix& w;
  const bf16* x;
  int64_t n, stride;
  OutFrom out_from;
  Quantized q;

  void operator()(int64_t g) {
    const char* next = w.group(std::min(g + pool.n_threads(), w.n_groups() - 1));
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
  if (w.kind == INT8) q = Quantized(memory, n, w.ins);
  return Linear<OutFrom>{pool, w, x, n, stride, out_from, q};
}

// y = x W^T: x [n][stride] bf16, y [n][y_stride] float.
EXPORT void linear_float(Pool* pool, const Matrix* w, const bf16* x, int64_t n, int64_t stride, float* y, int64_t y_stride) {
  static Buffer buffer;
  Cutter size{nullptr}, memory{nullptr};
  if (w->kind == INT8) Quantized(size, n, w->ins);
  memory.at = buffer.get(size.used + 64);
  auto f = linear(*pool, *w, x, n, stride, memory, [=](int64_t i) { return StoreFloat{y + i * y_stride, y_stride, w->outs}; });
  auto quantize = [&](int64_t i) { f.q.take(i, x + i * stride); };
  Pool::Job& job = pool->open();
  if (w->kind == INT8) job.phase(n, quantize);
  job.phase(n ? w->n_groups() : 0, f);
  pool->run(job);
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

// The two phases of attention over the rows q [tokens][heads][q_stride], into out [tokens][heads][out_stride].
template <int LANES>
struct AttentionPhases {
  const Heads& heads;
  const Step& step;
  Cache cache;
  const bf16* q;
  bf16* out;
  int64_t q_stride, out_stride;
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

  void compute(int64_t i) const {
    const AttentionTask& t = tasks[i];
    Attention<LANES> a(heads, cache);
    a.load(step.sequences[t.sequence], t.kv_head, q, q_stride, t.first_row, t.n);
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
    a.store(t.first_row, out, out_stride);
  }

  // The first split's task folds all splits of its rows.
  void fold(int64_t i) const {
    const AttentionTask& t = tasks[i];
    if (t.split != 0) return;
    Attention<LANES> a(heads, cache);
    a.load(step.sequences[t.sequence], t.kv_head, q, q_stride, t.first_row, t.n);
    a.clear_total();
    for (int64_t j = i; j < (int64_t)tasks.size() && tasks[j].split == j - i; j++) {
      const float* p = partial(j);
      a.fold(p, p + LANES, p + 2 * LANES);
    }
    a.store(t.first_row, out, out_stride);
  }
};

// Attention alone, for tests and benches: q [tokens][heads][q_stride] scaled, out [tokens][heads][out_stride].
template <int LANES>
static void run_attention(Pool& pool, const Heads& heads, const Step& step, const bf16* cache, const bf16* q, int64_t q_stride,
                          bf16* out, int64_t out_stride) {
  static Buffer partials;
  AttentionPhases<LANES> a{heads, step, Cache{cache, step.page, step.pages}, q, out, q_stride, out_stride, {}, partials};
  a.plan(pool.n_threads());
  auto compute = [&](int64_t i) { a.compute(i); };
  auto fold = [&](int64_t i) { a.fold(i); };
  Pool::Job& job = pool.open();
  job.phase(a.tasks.size(), compute);
  job.phase(a.partials ? a.tasks.size() : 0, fold);
  pool.run(job);
}

// Lanes for a step: many where rows of one key head are many, few where a decode has few heads.
static int lanes_for(const Heads& h, const Step& s) {
  int64_t most = 0;
  for (int64_t i = 0; i < s.n_sequences; i++) most = std::max(most, s.sequences[i].n * h.group);
  return most > 32 ? 64 : most > 16 ? 32 : 16;
}

EXPORT void attention(Pool* pool, const Heads* heads, const Step* step, const bf16* cache, const bf16* q, int64_t q_stride,
                      bf16* out, int64_t out_stride) {
  switch (lanes_for(*heads, *step)) {
    case 16: return run_attention<16>(*pool, *heads, *step, cache, q, q_stride, out, out_stride);
    case 32: return run_attention<32>(*pool, *heads, *step, cache, q, q_stride, out, out_stride);
    default: return run_attention<64>(*pool, *heads, *step, cache, q, q_stride, out, out_stride);
  }
}

// residual += attention(norm(residual)). `cache`: this layer's pages, rows of kv_rank + rope numbers, written here.
EXPORT void mla(Pool* pool, const Mla* layer, const Step* step, float* residual, int64_t stride, bf16* cache) {
  if (!step->n_tokens) return;
  const Mla& a = *layer;
  const int64_t T = step->n_tokens, H = a.n_heads, qk = a.nope + a.rope, row_width = a.kv_rank + a.rope;
  const bool lora = a.q_up.outs > 0;
  const int64_t q_outs = lora ? a.q_rank : H * qk;
  const int64_t x_stride = round_up(a.dim, 64), down_stride = round_up(a.down.outs, 64);
  const int64_t rank_stride = round_up(a.q_rank, 64), q_stride = round_up(H * qk, 64);
  const int64_t latent_stride = round_up(row_width, 64), value_stride = round_up(H * a.v, 64);
  static Buffer buffer;
  bf16 *x, *q_low, *queries, *latents, *values, *q_nope;
  float *low, *q;
  auto cut = [&](Cutter c) {
    x = c.take<bf16>(T * x_stride);
    low = c.take<float>(T * down_stride);
    q_low = c.take<bf16>(T * rank_stride);
    q = c.take<float>(T * q_stride);
    q_nope = c.take<bf16>(T * H * round_up(a.nope, 64));
    queries = c.take<bf16>(T * H * latent_stride);
    latents = c.take<bf16>(T * H * latent_stride);
    values = c.take<bf16>(T * value_stride);
    return c;
  };
  auto quantized_bytes = [&](const Matrix& w) { Cutter c{nullptr}; if (w.kind == INT8) Quantized(c, T, w.ins); return c.used; };
  const size_t own = cut(Cutter{nullptr}).used;
  Cutter memory = cut(Cutter{buffer.get(own + quantized_bytes(a.down) + quantized_bytes(a.q_up) + quantized_bytes(a.out) + 256)});

  auto normalise = [&](int64_t t) { rms_norm(residual + t * stride, a.norm, a.eps, a.dim, x + t * x_stride); };

  auto down = linear(*pool, a.down, x, T, x_stride, memory, [&](int64_t i) { return StoreFloat{low + i * down_stride, down_stride, a.down.outs}; });
  auto quantize_x = [&](int64_t t) { down.q.take(t, x + t * x_stride); };

  auto split_low = [&](int64_t t) {
    const float* from = low + t * down_stride;
    if (lora) rms_norm(from, a.q_norm, a.latent_eps, a.q_rank, q_low + t * rank_stride);
    bf16 latent[1 << 14];
    rms_norm(from + q_outs, a.kv_norm, a.latent_eps, a.kv_rank, latent);
    bf16* to = cache + step->slots[t] * row_width;
    memcpy(to, latent, a.kv_rank * sizeof(bf16));
    rotate(from + q_outs + a.kv_rank, step->cos + t * a.rope / 2, step->sin + t * a.rope / 2, a.interleaved, 1.f, a.rope, to + a.kv_rank);
  };

  auto up = linear(*pool, a.q_up, q_low, T, rank_stride, memory, [&](int64_t i) { return StoreFloat{q + i * q_stride, q_stride, a.q_up.outs}; });
  auto quantize_low = [&](int64_t t) { up.q.take(t, q_low + t * rank_stride); };

  const int64_t nope_stride = round_up(a.nope, 64);
  auto split_query = [&](int64_t t) {
    for (int64_t h = 0; h < H; h++) {
      const float* from = (lora ? q + t * q_stride : low + t * down_stride) + h * qk;
      bf16* nope = q_nope + (t * H + h) * nope_stride;
      bf16* to = queries + (t * H + h) * latent_stride;
      for (int64_t i = 0; i < nope_stride; i += 16) {
        const __m512 v = _mm512_maskz_loadu_ps(first(a.nope - i), from + i);
        store_bf16(nope + i, _mm512_mul_ps(v, _mm512_set1_ps(a.scale)));
      }
      rotate(from + a.nope, step->cos + t * a.rope / 2, step->sin + t * a.rope / 2, a.interleaved, a.scale, a.rope, to + a.kv_rank);
      for (int64_t i = row_width; i < latent_stride; i++) to[i] = 0;
    }
  };

  // Into the latent space and out of it: one small matrix for each head.
  auto per_head = [&](const Matrix& w, int64_t task, const bf16* from, int64_t from_stride, bf16* to, int64_t to_row, int64_t to_head) {
    const int64_t groups = w.n_groups(), h = task / groups, g = task % groups;
    const Matrix m = w.nth(h);
    multiply_group<BF16>(
        m, g, T, m.group(std::min(g + 1, groups - 1)),
        [&](int64_t i, int count, Rows& rows) {
          for (int j = 0; j < count; j++) rows.at[j] = (const char*)(from + ((i + j) * H + h) * from_stride);
        },
        [&](int64_t i) { return StoreBf16{to + i * to_row + h * to_head, to_row, m.outs}; });
  };
  auto absorb = [&](int64_t task) { per_head(a.key, task, q_nope, nope_stride, queries, H * latent_stride, latent_stride); };
  auto expand = [&](int64_t task) { per_head(a.value, task, latents, latent_stride, values, value_stride, a.v); };

  const Heads heads{1, H, 0, row_width, 0, a.kv_rank, row_width, 0, 0};
  static Buffer partials;
  auto with_lanes = [&](auto lanes) {
    AttentionPhases<lanes> phases{heads, *step, Cache{cache, step->page, step->pages}, queries, latents, latent_stride, latent_stride, {}, partials};
    phases.plan(pool->n_threads());
    auto compute = [&](int64_t i) { phases.compute(i); };
    auto fold = [&](int64_t i) { phases.fold(i); };
    auto clear_pads = [&](int64_t t) {
      for (int64_t i = H * a.v; i < value_stride; i++) values[t * value_stride + i] = 0;
    };
    auto out = linear(*pool, a.out, values, T, value_stride, memory, [&](int64_t i) { return AddFloat{residual + i * stride, stride, a.dim}; });
    auto quantize_values = [&](int64_t t) { out.q.take(t, values + t * value_stride); };
    Pool::Job& job = pool->open();
    job.phase(T, normalise);
    if (a.down.kind == INT8) job.phase(T, quantize_x);
    job.phase(a.down.n_groups(), down);
    job.phase(T, split_low);
    if (lora && a.q_up.kind == INT8) job.phase(T, quantize_low);
    if (lora) job.phase(a.q_up.n_groups(), up);
    job.phase(T, split_query);
    job.phase(H * a.key.n_groups(), absorb);
    job.phase(phases.tasks.size(), compute);
    if (phases.partials) job.phase(phases.tasks.size(), fold);
    job.phase(H * a.value.n_groups(), expand);
    job.phase(T, clear_pads);
    if (a.out.kind == INT8) job.phase(T, quantize_values);
    job.phase(a.out.n_groups(), out);
    pool->run(job);
  };
  switch (lanes_for(heads, *step)) {
    case 16: return with_lanes(std::integral_constant<int, 16>{});
    case 32: return with_lanes(std::integral_constant<int, 32>{});
    default: return with_lanes(std::integral_constant<int, 64>{});
  }
}

// ---- Feed-forward

// x = norm(residual) as bf16 [tokens][x_stride]; with a gate also ids and weights [tokens][k]: the chosen experts first.
EXPORT void norm_and_route(Pool* pool, const float* residual, int64_t stride, const float* norm, float eps, int64_t dim,
                           int64_t n_tokens, bf16* x, int64_t x_stride, const Gate* gate, int32_t* ids, float* weights, int64_t k) {
  static Buffer buffer;
  const int64_t n_experts = gate ? gate->n_experts : 0;
  float *scores, *picks, *wide;
  auto cut = [&](Cutter c) {
    scores = c.take<float>(n_tokens * n_experts);
    picks = c.take<float>(n_tokens * n_experts);
    wide = c.take<float>(gate ? n_tokens * x_stride : 0);
    return c.used;
  };
  char* at = buffer.get(cut(Cutter{nullptr}) + 64);
  cut(Cutter{at});
  auto normalise = [&](int64_t t) {
    rms_norm(residual + t * stride, norm, eps, dim, x + t * x_stride);
    if (gate)
      for (int64_t i = 0; i < x_stride; i += 16) _mm512_storeu_ps(wide + t * x_stride + i, load_bf16(x + t * x_stride + i));
  };
  const int64_t blocks = (n_experts + 15) / 16;
  auto score = [&](int64_t task) {
    const int64_t t = task / blocks, e = task % blocks * 16;
    gate_scores(*gate, wide + t * x_stride, x_stride, e, std::min<int64_t>(16, n_experts - e), scores + t * n_experts);
  };
  auto choose = [&](int64_t t) {
    choose_experts(*gate, scores + t * n_experts, picks + t * n_experts, ids + t * k, weights + t * k);
  };
  Pool::Job& job = pool->open();
  job.phase(n_tokens, normalise);
  if (gate) {
    job.phase(n_tokens * blocks, score);
    job.phase(n_tokens, choose);
  }
  pool->run(job);
}

// residual += sum over each token's experts; see experts.h.
EXPORT void experts(Pool* pool, const bf16* x, int64_t x_stride, const int32_t* ids, const float* weights, float* residual,
                    int64_t stride, int64_t n_tokens, int64_t k, int64_t n_experts, const Matrix* gate_up, const Matrix* down) {
  static Buffer buffer;
  auto run = gate_up->kind == BF16 ? run_experts<BF16> : run_experts<INT8>;
  run(*pool, buffer, x, x_stride, ids, weights, residual, stride, n_tokens, k, n_experts, *gate_up, *down);
}
