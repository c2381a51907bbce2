// Routed experts, shared experts and plain feed-forward layers: out += weight * down(silu(gate(x)) * up(x)), for each row's
// experts. A plain feed-forward layer is one expert that every row goes to with weight 1.
#pragma once
#include "pool.h"
#include "quantize.h"
#include "tiles.h"

// Results of a gate/up group: 16 or 32 hidden numbers of each row.
template <class T>
struct StoreHidden {
  T* to;
  int64_t stride;
  template <int J>
  void take(int m, int64_t g, int offset, const __m512 (&sum)[J]) const {
    UNROLL for (int j = 0; j < J; j += 2) {
      const __m512 h = _mm512_mul_ps(silu512(sum[j]), sum[j + 1]);
      T* p = to + m * stride + g * (GROUP / 2) + offset / 2 + 8 * j;
      if constexpr (sizeof(T) == 2)
        store_bf16((bf16*)p, h);
      else
        _mm512_storeu_ps((float*)p, h);
    }
  }
};

// Results of a down group, weighted and added to the rows they belong to.
struct AddWeighted {
  float* to[MOST_ROWS];
  float weight[MOST_ROWS];
  int64_t outs;
  template <int J>
  void take(int m, int64_t g, int offset, const __m512 (&sum)[J]) const {
    const int64_t at = g * GROUP + offset;
    UNROLL for (int j = 0; j < J; j++) {
      float* p = to[m] + at + 16 * j;
      const __mmask16 lanes = first(outs - at - 16 * j);
      const __m512 old = _mm512_maskz_loadu_ps(lanes, p);
      _mm512_mask_storeu_ps(p, lanes, _mm512_fmadd_ps(_mm512_set1_ps(weight[m]), sum[j], old));
    }
  }
};

// Which rows go to which expert, expert after expert, rows in order. Ids outside 0..n_experts-1 are skipped: they belong to
// another rank.
struct Routes {
  int64_t n_rows = 0;      // pairs of a row and an expert
  int64_t n_active = 0;
  int32_t* active;         // experts with rows, ascending
  int32_t* begin;          // first pair of each expert; begin[n_experts] is the end
  int32_t* row;            // of each pair
  float* weight;

  Routes(Cutter& memory, int64_t n_pairs, int64_t n_experts)
      : active(memory.take<int32_t>(n_experts)),
        begin(memory.take<int32_t>(n_experts + 1)),
        row(memory.take<int32_t>(n_pairs)),
        weight(memory.take<float>(n_pairs)) {}

  void sort(const int32_t* ids, const float* weights, int64_t n_tokens, int64_t k, int64_t n_experts) {
    memset(begin, 0, (n_experts + 1) * sizeof(int32_t));
    auto known = [&](int32_t e) { return e >= 0 && e < n_experts; };
    for (int64_t i = 0; i < n_tokens * k; i++)
      if (known(ids[i])) begin[ids[i] + 1]++;
    for (int64_t e = 0; e < n_experts; e++) {
      if (begin[e + 1]) active[n_active++] = (int32_t)e;
      begin[e + 1] += begin[e];
    }
    n_rows = begin[n_experts];
    for (int64_t i = 0; i < n_tokens * k; i++) {
      if (!known(ids[i])) continue;
      const int32_t at = begin[ids[i]]++;  // moves begin[e] to begin[e + 1]; put back below
      row[at] = (int32_t)(i / k);
      weight[at] = weights[i];
    }
    for (int64_t e = n_experts; e > 0; e--) begin[e] = begin[e - 1];
    begin[0] = 0;
  }
};

// x: [n_tokens][x_stride] bf16, padded with zeros to the matrices' steps; ids, weights: [n_tokens][k];
// residual: [n_tokens][residual_stride] float, added to in place. gate_ups, downs: `n_experts` matrices each, at least one,
// of equal shapes; each says where its weights are, so that another expert's can take their place between two calls.
template <Kind K>
void run_experts(Pool& pool, Buffer& buffer, const bf16* x, int64_t x_stride, const int32_t* ids, const float* weights,
                 float* residual, int64_t residual_stride, int64_t n_tokens, int64_t k, int64_t n_experts,
                 const Matrix* gate_ups, const Matrix* downs) {
  const Matrix &gate_up = gate_ups[0], &down = downs[0];  // for the shapes
  const int64_t hidden = gate_up.n_groups() * (GROUP / 2);  // padded; the pad is silu(0) * 0
  const int64_t n_pairs = n_tokens * k, width = gate_up.n_steps() * gate_up.ins_per_step();
  using Hidden = std::conditional_t<K == BF16, bf16, float>;
  char* memory = nullptr;
  Hidden* h = nullptr;
  Quantized xq, hq;
  auto cut = [&](Cutter c) {
    Routes routes(c, n_pairs, n_experts);
    h = c.take<Hidden>(n_pairs * hidden);
    if (K != BF16) xq = Quantized(c, n_tokens, width, K), hq = Quantized(c, n_pairs, hidden, K);
    memory = c.at + c.used;
    return std::pair(routes, c.used);
  };
  const size_t bytes = cut(Cutter{nullptr}).second;
  Routes routes = cut(Cutter{buffer.get(bytes)}).first;
  routes.sort(ids, weights, n_tokens, k, n_experts);

  const int64_t up_groups = gate_up.n_groups(), down_groups = down.n_groups();
  const int64_t n_up = routes.n_active * up_groups;

  auto quantize_x = [&](int64_t t) { xq.take(t, x + t * x_stride); };

  auto gate_and_up = [&](int64_t task) {
    const int32_t e = routes.active[task / up_groups];
    const int64_t g = task % up_groups, begin = routes.begin[e], n = routes.begin[e + 1] - begin;
    const int64_t after = std::min(task + 1, n_up - 1);
    const char* next = gate_ups[routes.active[after / up_groups]].group(after % up_groups);
    multiply_group<K>(
        gate_ups[e], g, n, next,
        [&](int64_t i, int count, Rows& rows) {
          for (int m = 0; m < count; m++) {
            const int64_t t = routes.row[begin + i + m];
            if (K == BF16)
              rows.at[m] = (const char*)(x + t * x_stride);
            else
              xq.give(t, rows, m);
          }
        },
        [&](int64_t i) { return StoreHidden<Hidden>{h + (begin + i) * hidden, hidden}; });
  };

  auto quantize_h = [&](int64_t pair) { hq.take(pair, (const float*)h + pair * hidden); };

  // A task owns some columns of the residual, and adds one expert after the other to them: no two tasks write the same
  // number, and each number's terms come in the order of the experts, whatever the batch. A task is several groups: with few
  // rows two, for a longer stream of weights; with many rows up to four, so that a row's hidden numbers are still in the
  // cache for the next group.
  const int64_t tasks_each = n_tokens < 128 ? 4 : 2, most = n_tokens < 128 ? 2 : 4;
  const int64_t chunk = std::clamp<int64_t>(down_groups / (tasks_each * pool.n_threads()), 1, most);
  auto down_and_add = [&](int64_t task) {
    const int64_t g0 = task * chunk, g1 = std::min(g0 + chunk, down_groups);
    for (int64_t a = 0; a < routes.n_active; a++) {
      const int32_t e = routes.active[a];
      const int64_t begin = routes.begin[e], n = routes.begin[e + 1] - begin;
      const Matrix& w = downs[e];
      for (int64_t g = g0; g < g1; g++) {
        const char* next = g + 1 < g1                ? w.group(g + 1)
                           : a + 1 < routes.n_active ? downs[routes.active[a + 1]].group(g0)
                                                     : downs[routes.active[0]].group(std::min(g1, down_groups - 1));
        multiply_group<K>(
            w, g, n, next,
            [&](int64_t i, int count, Rows& rows) {
              for (int m = 0; m < count; m++) {
                if (K == BF16)
                  rows.at[m] = (const char*)(h + (begin + i + m) * hidden);
                else
                  hq.give(begin + i + m, rows, m);
              }
            },
            [&](int64_t i) {
              AddWeighted out;
              out.outs = down.outs;
              for (int64_t m = 0; m < std::min<int64_t>(MOST_ROWS, n - i); m++) {
                out.to[m] = residual + (int64_t)routes.row[begin + i + m] * residual_stride;
                out.weight[m] = routes.weight[begin + i + m];
              }
              return out;
            });
      }
    }
  };

  Pool::Job& job = pool.open();
  if (K != BF16) job.phase(n_tokens, quantize_x);
  job.phase(n_up, gate_and_up);
  if (K != BF16) job.phase(routes.n_rows, quantize_h);
  job.phase((down_groups + chunk - 1) / chunk, down_and_add);
  pool.run(job);
}
