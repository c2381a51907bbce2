// The functions that Python calls, one or two for each layer, over a residual stream of floats [tokens][stride]. Each is one
// job for the pool. Rows of activations are padded with zeros to a multiple of 64 numbers. Struct layouts: structs.py.
#include "attention.h"
#include "checked.h"
#include "expanded.h"
#include "experts.h"
#include "pack.h"
#include "phases.h"
#include "pool.h"
#include "quantize.h"
#include "rows.h"
#include "tiles.h"
#include "wire.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

// Latent attention of one layer: absorbed, and with `expand_key` also expanded (expanded.h).
struct Mla {
  const float *norm, *q_norm, *kv_norm;
  Matrix down;         // q_a and kv_a as one matrix; without q_lora: q and kv_a
  Matrix q_up;         // outs 0 without q_lora
  Matrix key, value;   // n_heads matrices each: nope -> latent, latent -> v
  Matrix expand_key;   // the same as key the other way round, latent -> nope; outs 0 for a layer that only absorbs
  Matrix out;
  int64_t dim, n_heads, q_rank, kv_rank, nope, rope, v;
  float eps, latent_eps, scale;
  int32_t interleaved;
};

// Grouped-query attention of one layer. A cache row is all key heads, then all value heads.
struct Gqa {
  const float *norm, *bias;  // bias: of q, k and v, or null
  Matrix qkv;                // all query heads, all key heads, all value heads
  Matrix out;
  int64_t dim, n_kv, group, head_dim;  // group: query heads of a key head
  float eps, scale;
};

EXPORT Pool* pool_new(int32_t n_threads) { return new Pool(n_threads); }
EXPORT void pool_free(Pool* pool) { delete pool; }

// Pack `w` [outs][ins] (bf16, row after row) into its place. paired: the first half of the rows are gate, the second up.
// Uses no pool and no static memory: another thread may pack beside a running step.
EXPORT void pack(const bf16* w, const Matrix* m) { pack_matrix(w, *m); }

// ---- Linear layers

// y = x W^T: x [n][stride] bf16, y [n][y_stride] float.
EXPORT void linear_float(Pool* pool, const Matrix* w, const bf16* x, int64_t n, int64_t stride, float* y, int64_t y_stride) {
  static Buffer buffer;
  Cutter memory{buffer.get(linear_bytes(*w, n) + 64)};
  auto f = linear(*pool, *w, x, n, stride, memory, [=](int64_t i) { return StoreFloat{y + i * y_stride, y_stride, w->outs}; });
  auto quantize = [&](int64_t i) { f.q.take(i, x + i * stride); };
  Pool::Job& job = pool->open();
  if (w->kind == INT8) job.phase(n, quantize);
  job.phase(n ? w->n_groups() : 0, f);
  pool->run(job);
}

// ---- Attention

// Attention alone, for tests and benches: q [tokens][heads][q_stride] scaled, out [tokens][heads][out_stride].
EXPORT void attention(Pool* pool, const Heads* heads, const Step* step, const bf16* cache, const bf16* q, int64_t q_stride,
                      bf16* out, int64_t out_stride) {
  static Buffer partials;
  const int64_t n_heads = heads->n_kv * heads->group;
  const QueryRows rows{q, n_heads * q_stride, q_stride, out, n_heads * out_stride, out_stride};
  with_lanes(*heads, *step, [&](auto lanes) {
    AttentionPhases<lanes> a{*heads, *step, Cache{cache, step->page, step->pages}, rows, {}, partials};
    a.plan(pool->n_threads());
    auto compute = [&](int64_t i) { a.compute(i); };
    auto fold = [&](int64_t i) { a.fold(i); };
    Pool::Job& job = pool->open();
    job.phase(a.tasks.size(), compute);
    job.phase(a.partials ? a.tasks.size() : 0, fold);
    pool->run(job);
  });
}

// Rows of bf16 numbers; row m of a tile goes to row rows[m].
struct ScatterBf16 {
  bf16* to;
  const int64_t* rows;
  int64_t stride, outs;
  template <int J>
  void take(int m, int64_t g, int offset, const __m512 (&sum)[J]) const {
    StoreBf16{to + rows[m] * stride, 0, outs}.take(0, g, offset, sum);
  }
};

// residual += attention(norm(residual)). `cache`: this layer's pages, rows of kv_rank + rope numbers, written here.
EXPORT void mla(Pool* pool, const Mla* layer, const Step* step, float* residual, int64_t stride, bf16* cache) {
  if (!step->n_tokens) return;
  const Mla& a = *layer;
  const int64_t T = step->n_tokens, H = a.n_heads, qk = a.nope + a.rope, row_width = a.kv_rank + a.rope;
  const bool lora = a.q_up.outs > 0;
  const int64_t q_outs = lora ? a.q_rank : H * qk;
  const int64_t x_stride = round_up(a.dim, 64), down_stride = round_up(a.down.outs, 64);
  const int64_t rank_stride = round_up(a.q_rank, 64), q_stride = round_up(H * qk, 64), head_stride = round_up(qk, 64);
  const int64_t latent_stride = round_up(row_width, 64), value_stride = round_up(H * a.v, 64);
  const Forms forms(*step, a.expand_key.outs > 0);
  const int64_t A = forms.n_absorbed();
  static Buffer buffer;
  bf16 *x, *q_low, *head_queries, *queries, *latents, *values;
  float *low, *q;
  auto cut = [&](Cutter c) {
    x = c.take<bf16>(T * x_stride);
    low = c.take<float>(T * down_stride);
    q_low = c.take<bf16>(T * rank_stride);
    q = c.take<float>(T * q_stride);
    head_queries = c.take<bf16>(T * H * head_stride);
    queries = c.take<bf16>(A * H * latent_stride);
    latents = c.take<bf16>(A * H * latent_stride);
    values = c.take<bf16>(T * value_stride);
    return c;
  };
  const size_t bytes = cut(Cutter{nullptr}).used + linear_bytes(a.down, T) + linear_bytes(a.q_up, T) + linear_bytes(a.out, T);
  Cutter memory = cut(Cutter{buffer.get(bytes + 256)});

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

  // Scaled queries of heads, and the rotary part of the absorbed ones, which stays as it is.
  auto split_query = [&](int64_t t) {
    for (int64_t h = 0; h < H; h++) {
      const float* from = (lora ? q + t * q_stride : low + t * down_stride) + h * qk;
      bf16* to = head_queries + (t * H + h) * head_stride;
      for (int64_t i = 0; i < a.nope; i += 16) {
        const __mmask16 lanes = first(a.nope - i);
        store_bf16(to + i, _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, from + i), _mm512_set1_ps(a.scale)), lanes);
      }
      rotate(from + a.nope, step->cos + t * a.rope / 2, step->sin + t * a.rope / 2, a.interleaved, a.scale, a.rope, to + a.nope);
      if (forms.absorbed_row[t] < 0) continue;
      bf16* latent = queries + (forms.absorbed_row[t] * H + h) * latent_stride;
      memcpy(latent + a.kv_rank, to + a.nope, a.rope * sizeof(bf16));
    }
  };

  // Into the latent space and out of it: one small matrix for each head, over the absorbed rows.
  auto per_head = [&](const Matrix& w, int64_t task, const auto& row_from, const auto& out_from) {
    const int64_t groups = w.n_groups(), h = task / groups, g = task % groups;
    const Matrix m = w.nth(h);
    multiply_group<BF16>(
        m, g, A, m.group(std::min(g + 1, groups - 1)),
        [&](int64_t i, int count, Rows& rows) {
          for (int j = 0; j < count; j++) rows.at[j] = (const char*)row_from(i + j, h);
        },
        [&](int64_t i) { return out_from(i, h); });
  };
  auto absorb = [&](int64_t task) {
    per_head(
        a.key, task, [&](int64_t i, int64_t h) { return head_queries + (forms.row_of[i] * H + h) * head_stride; },
        [&](int64_t i, int64_t h) { return StoreBf16{queries + (i * H + h) * latent_stride, H * latent_stride, a.kv_rank}; });
  };
  auto out_of_latent = [&](int64_t task) {
    per_head(
        a.value, task, [&](int64_t i, int64_t h) { return latents + (i * H + h) * latent_stride; },
        [&](int64_t i, int64_t h) { return ScatterBf16{values + h * a.v, &forms.row_of[i], value_stride, a.v}; });
  };

  auto make_queries = [&](Pool::Job& job) {
    job.phase(T, normalise);
    if (a.down.kind == INT8) job.phase(T, quantize_x);
    job.phase(a.down.n_groups(), down);
    job.phase(T, split_low);
    if (lora && a.q_up.kind == INT8) job.phase(T, quantize_low);
    if (lora) job.phase(a.q_up.n_groups(), up);
    job.phase(T, split_query);
  };
  if (!forms.expanded.empty()) {
    Pool::Job& job = pool->open();
    make_queries(job);
    pool->run(job);
    const LatentHeads latent_heads{a.expand_key, a.value, H, a.kv_rank, a.nope, a.rope, a.v};
    const QueryRows rows{head_queries, H * head_stride, head_stride, values, value_stride, a.v};
    attend_expanded(*pool, latent_heads, Forms::part(*step, forms.expanded), cache, rows);
  }
  const Heads heads{1, H, 0, row_width, 0, a.kv_rank, row_width, 0, 0};
  const QueryRows rows{queries, H * latent_stride, latent_stride, latents, H * latent_stride, latent_stride};
  auto prepare = [&](Pool::Job& job) {
    if (forms.expanded.empty()) make_queries(job);
    job.phase(A ? H * a.key.n_groups() : 0, absorb);
  };
  auto finish = [&](Pool::Job& job) { job.phase(A ? H * a.value.n_groups() : 0, out_of_latent); };
  attend(*pool, heads, Forms::part(*step, forms.absorbed), cache, rows, a.out, values, residual, stride, memory, prepare, finish);
}

// The same for grouped-query attention. Rows of `cache` hold 2 * n_kv * head_dim numbers.
EXPORT void gqa(Pool* pool, const Gqa* layer, const Step* step, float* residual, int64_t stride, bf16* cache) {
  if (!step->n_tokens) return;
  const Gqa& a = *layer;
  const int64_t T = step->n_tokens, H = a.n_kv * a.group, D = a.head_dim, kv_width = a.n_kv * D;
  const int64_t x_stride = round_up(a.dim, 64), qkv_stride = round_up(a.qkv.outs, 64), value_stride = round_up(a.out.ins, 64);
  static Buffer buffer;
  bf16 *x, *queries, *values;
  float* qkv;
  auto cut = [&](Cutter c) {
    x = c.take<bf16>(T * x_stride);
    qkv = c.take<float>(T * qkv_stride);
    queries = c.take<bf16>(T * H * D);
    values = c.take<bf16>(T * value_stride);
    return c;
  };
  const size_t bytes = cut(Cutter{nullptr}).used + linear_bytes(a.qkv, T) + linear_bytes(a.out, T);
  Cutter memory = cut(Cutter{buffer.get(bytes + 256)});

  auto normalise = [&](int64_t t) { rms_norm(residual + t * stride, a.norm, a.eps, a.dim, x + t * x_stride); };

  auto project = linear(*pool, a.qkv, x, T, x_stride, memory,
                        [&](int64_t i) { return StoreFloat{qkv + i * qkv_stride, qkv_stride, a.qkv.outs}; });
  auto quantize_x = [&](int64_t t) { project.q.take(t, x + t * x_stride); };

  auto split = [&](int64_t t) {
    float *q = qkv + t * qkv_stride, *k = q + H * D, *v = k + kv_width;
    if (a.bias)
      for (int64_t i = 0; i < a.qkv.outs; i++) q[i] += a.bias[i];
    const float *cos = step->cos + t * D / 2, *sin = step->sin + t * D / 2;
    for (int64_t h = 0; h < H; h++) rotate(q + h * D, cos, sin, false, a.scale, D, queries + (t * H + h) * D);
    bf16* to = cache + step->slots[t] * 2 * kv_width;
    for (int64_t h = 0; h < a.n_kv; h++) rotate(k + h * D, cos, sin, false, 1.f, D, to + h * D);
    for (int64_t i = 0; i < kv_width; i++) to[kv_width + i] = to_bf16(v[i]);
  };

  const Heads heads{a.n_kv, a.group, 0, D, kv_width, D, 2 * kv_width, D, D};
  const QueryRows rows{queries, H * D, D, values, value_stride, D};
  auto prepare = [&](Pool::Job& job) {
    job.phase(T, normalise);
    if (a.qkv.kind == INT8) job.phase(T, quantize_x);
    job.phase(a.qkv.n_groups(), project);
    job.phase(T, split);
  };
  attend(*pool, heads, *step, cache, rows, a.out, values, residual, stride, memory, prepare, [](Pool::Job&) {});
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
                    int64_t stride, int64_t n_tokens, int64_t k, int64_t n_experts, const Matrix* gate_ups, const Matrix* downs) {
  static Buffer buffer;
  auto run = gate_ups->kind == BF16 ? run_experts<BF16> : gate_ups->kind == INT8 ? run_experts<INT8> : run_experts<INT4>;
  run(*pool, buffer, x, x_stride, ids, weights, residual, stride, n_tokens, k, n_experts, gate_ups, downs);
}

// residual += weight * y for the k results of each row, in the order of their experts' ids, as run_experts adds them.
// y: [n_tokens][k][dim]; ids, weights: [n_tokens][stride_ids], of which the first k count.
EXPORT void add_weighted(Pool* pool, const float* y, int64_t dim, const int32_t* ids, const float* weights, int64_t ids_stride,
                         int64_t k, float* residual, int64_t stride, int64_t n_tokens) {
  auto add = [&](int64_t t) {
    const int32_t* id = ids + t * ids_stride;
    float* to = residual + t * stride;
    auto before = [&](int64_t a, int64_t b) { return id[a] != id[b] ? id[a] < id[b] : a < b; };
    for (int64_t last = -1, n = 0; n < k; n++) {
      int64_t next = -1;  // the first of those after the last one
      for (int64_t i = 0; i < k; i++)
        if ((last < 0 || before(last, i)) && (next < 0 || before(i, next))) next = i;
      last = next;
      const float* from = y + (t * k + next) * dim;
      const __m512 w = _mm512_set1_ps(weights[t * ids_stride + next]);
      for (int64_t i = 0; i < dim; i += 16) {
        const __mmask16 lanes = first(dim - i);
        const __m512 sum = _mm512_fmadd_ps(w, _mm512_maskz_loadu_ps(lanes, from + i), _mm512_maskz_loadu_ps(lanes, to + i));
        _mm512_mask_storeu_ps(to + i, lanes, sum);
      }
    }
  };
  Pool::Job& job = pool->open();
  job.phase(n_tokens, add);
  pool->run(job);
}

// ---- Rows on their way to other ranks

// x [n][stride] to rows of bytes; see wire.h.
EXPORT void wire_encode(Pool* pool, const bf16* x, int64_t stride, int64_t n, int64_t dim, int32_t kind, uint8_t* to) {
  const WireRows wire{dim, kind};
  auto encode = [&](int64_t i) { wire.encode(x + i * stride, to + i * wire.row_bytes()); };
  Pool::Job& job = pool->open();
  job.phase(n, encode);
  pool->run(job);
}

// out [n][stride]: row index[i] of n_rows as numbers.
EXPORT void wire_decode(Pool* pool, const uint8_t* rows, int64_t n_rows, const int64_t* index, int64_t n, int64_t dim, int32_t kind,
                        bf16* out, int64_t stride) {
  const WireRows wire{dim, kind};
  auto decode = [&](int64_t i) {
    wire.decode(rows + std::clamp<int64_t>(index[i], 0, n_rows - 1) * wire.row_bytes(), out + i * stride);
  };
  Pool::Job& job = pool->open();
  job.phase(n, decode);
  pool->run(job);
}

// n runs of bytes, as checked.h says; gives their hash. Needs no threads, and may be called from any.
EXPORT uint64_t copy_checked(uint8_t* const* to, const uint8_t* const* from, const int64_t* bytes, int64_t n) {
  return checked::copy(to, from, bytes, n);
}
