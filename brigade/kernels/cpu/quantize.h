// Activations in 8 bits: each row is divided by its largest magnitude over 127 and rounded. The machine multiplies unsigned
// by signed bytes. For int8 weights the activations are the unsigned side, stored with 128 added. For int4 weights they are
// the signed side, since the weights' half bytes are unsigned; what those have too much is taken off in `starts`.
#pragma once
#include "tiles.h"

INLINE __m512 load_any(const bf16* p) { return load_bf16(p); }
INLINE __m512 load_any(const float* p) { return _mm512_loadu_ps(p); }

struct Quantized {
  uint8_t* values = nullptr;
  float* scales = nullptr;
  int32_t* starts = nullptr;  // int4: -ZERO times the sum of each block's activations
  int64_t width = 0;          // a multiple of 16, for int4 of BLOCK; the inputs beyond the true ones are zeros
  int32_t kind = INT8;        // of the weights

  Quantized() = default;
  Quantized(Cutter& memory, int64_t n_rows, int64_t ins, int32_t kind)
      : values(memory.take<uint8_t>(n_rows * round_up(ins, kind == INT4 ? BLOCK : 16))),
        scales(memory.take<float>(n_rows)),
        starts(memory.take<int32_t>(kind == INT4 ? n_rows * (round_up(ins, BLOCK) / BLOCK) : 0)),
        width(round_up(ins, kind == INT4 ? BLOCK : 16)),
        kind(kind) {}

  // Row i from `width` numbers at x.
  template <class T>
  void take(int64_t i, const T* x) {
    // Compared as integers, magnitudes keep their order and what is not a number comes last: it must not be lost.
    __m512i largest = _mm512_setzero_si512();
    for (int64_t k = 0; k < width; k += 16)
      largest = _mm512_max_epi32(largest, _mm512_castps_si512(_mm512_abs_ps(load_any(x + k))));
    const int32_t bits = _mm512_reduce_max_epi32(largest);
    float most;
    memcpy(&most, &bits, 4);
    const __m512 inverse = _mm512_set1_ps(most > 0 ? 127.f / most : 0.f);
    scales[i] = most / 127.f;
    uint8_t* to = values + i * width;
    auto quantized = [&](int64_t k) { return _mm512_cvtps_epi32(_mm512_mul_ps(load_any(x + k), inverse)); };
    auto store = [&](int64_t k, __m512i q) { _mm_storeu_si128((__m128i*)(to + k), _mm512_cvtepi32_epi8(q)); };
    if (kind == INT8) {
      for (int64_t k = 0; k < width; k += 16) store(k, _mm512_add_epi32(quantized(k), _mm512_set1_epi32(128)));
      return;
    }
    for (int64_t k = 0; k < width; k += BLOCK) {
      const __m512i a = quantized(k), b = quantized(k + 16);
      store(k, a), store(k + 16, b);
      const __m512i zeros = _mm512_mullo_epi32(_mm512_add_epi32(a, b), _mm512_set1_epi32(-ZERO));
      starts[(i * width + k) / BLOCK] = _mm512_reduce_add_epi32(zeros);
    }
  }

  void give(int64_t i, Rows& rows, int m) const {
    rows.at[m] = (const char*)(values + i * width);
    rows.scale[m] = scales[i];
    if (kind == INT4) rows.starts[m] = starts + i * (width / BLOCK);
  }
};
