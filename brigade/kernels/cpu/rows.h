// What happens to one row at a time: normalisation, rotary positions, the gate's choice of experts.
#pragma once
#include "simd.h"

// to[0..n-1] = x * weight / root mean square of x; the pad up to a multiple of 64 becomes zeros.
template <class In>
INLINE void rms_norm(const In* x, const float* weight, float eps, int64_t n, bf16* to) {
  auto load = [&](int64_t i) {
    const __mmask16 lanes = first(n - i);
    if constexpr (sizeof(In) == 2)
      return load_bf16((const bf16*)x + i, lanes);
    else
      return _mm512_maskz_loadu_ps(lanes, (const float*)x + i);
  };
  __m512 squares = _mm512_setzero_ps();
  for (int64_t i = 0; i < n; i += 16) squares = _mm512_fmadd_ps(load(i), load(i), squares);
  const __m512 scale = _mm512_set1_ps(1.f / std::sqrt(_mm512_reduce_add_ps(squares) / n + eps));
  for (int64_t i = 0; i < n; i += 16) {
    const __m512 w = _mm512_maskz_loadu_ps(first(n - i), weight + i);
    store_bf16(to + i, _mm512_mul_ps(_mm512_mul_ps(load(i), scale), w));
  }
  for (int64_t i = round_up(n, 16); i < round_up(n, 64); i += 16) _mm256_storeu_si256((__m256i*)(to + i), _mm256_setzero_si256());
}

// Rotary position embedding of n numbers (arXiv:2104.09864), times `scale`; cos, sin: n / 2. Comes out as two halves.
INLINE void rotate(const float* x, const float* cos, const float* sin, bool interleaved, float scale, int64_t n, bf16* to) {
  const int64_t half = n / 2;
  for (int64_t i = 0; i < half; i++) {
    const float a = interleaved ? x[2 * i] : x[i], b = interleaved ? x[2 * i + 1] : x[half + i];
    to[i] = to_bf16((a * cos[i] - b * sin[i]) * scale);
    to[half + i] = to_bf16((b * cos[i] + a * sin[i]) * scale);
  }
}

struct Gate {
  const float* weight;  // [experts][stride]
  const float* bias;    // [experts]
  int64_t n_experts, top_k, n_groups, top_groups;
  float scale;
  int32_t normalise;
};

// Scores of `n` experts from `begin` on for one row of floats, padded with zeros to `stride`.
INLINE void gate_scores(const Gate& g, const float* x, int64_t stride, int64_t begin, int64_t n, float* scores) {
  for (int64_t e = begin; e < begin + n; e++) {
    const float* w = g.weight + e * stride;
    __m512 a = _mm512_setzero_ps(), b = a;
    int64_t k = 0;
    for (; k + 32 <= stride; k += 32) {
      a = _mm512_fmadd_ps(_mm512_loadu_ps(w + k), _mm512_loadu_ps(x + k), a);
      b = _mm512_fmadd_ps(_mm512_loadu_ps(w + k + 16), _mm512_loadu_ps(x + k + 16), b);
    }
    scores[e] = _mm512_reduce_add_ps(_mm512_add_ps(a, b));
  }
}

// DeepSeek-V3's choice (arXiv:2412.19437, section 2.1.2) from one row of scores, which is used up: top_k ids and weights.
// Of equal scores the lower id wins.
INLINE void choose_experts(const Gate& g, float* scores, float* pick, int32_t* ids, float* weights) {
  constexpr float never = -1e30f;
  for (int64_t e = 0; e < g.n_experts; e += 16) {
    const __mmask16 lanes = first(g.n_experts - e);
    const __m512 p = sigmoid512(_mm512_maskz_loadu_ps(lanes, scores + e));
    _mm512_mask_storeu_ps(scores + e, lanes, p);
    _mm512_mask_storeu_ps(pick + e, lanes, _mm512_add_ps(p, _mm512_maskz_loadu_ps(lanes, g.bias + e)));
  }
  const int64_t size = g.n_experts / g.n_groups;
  if (g.top_groups < g.n_groups) {
    float best[1024];
    for (int64_t i = 0; i < g.n_groups; i++) {
      float one = never, two = never;
      for (int64_t e = i * size; e < (i + 1) * size; e++) {
        if (pick[e] > one)
          two = one, one = pick[e];
        else
          two = std::max(two, pick[e]);
      }
      best[i] = one + two;
    }
    for (int64_t drop = g.n_groups - g.top_groups; drop > 0; drop--) {
      int64_t worst = -1;  // of equal groups the later one goes
      for (int64_t i = 0; i < g.n_groups; i++)
        if (best[i] != INFINITY && (worst < 0 || best[i] <= best[worst])) worst = i;
      best[worst] = INFINITY;
      for (int64_t e = worst * size; e < (worst + 1) * size; e++) pick[e] = never;
    }
  }
  float sum = 0;
  for (int64_t k = 0; k < g.top_k; k++) {
    const int64_t e = std::max_element(pick, pick + g.n_experts) - pick;
    ids[k] = (int32_t)e;
    weights[k] = scores[e];
    sum += scores[e];
    pick[e] = 2 * never;
  }
  const float factor = g.normalise ? g.scale / (sum + 1e-20f) : g.scale;
  for (int64_t k = 0; k < g.top_k; k++) weights[k] *= factor;
}
