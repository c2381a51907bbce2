// Activations in 8 bits: each row is divided by its largest magnitude over 127, rounded, and stored with 128 added, since
// the machine multiplies unsigned by signed bytes.
#pragma once
#include "tiles.h"

INLINE __m512 load_any(const bf16* p) { return load_bf16(p); }
INLINE __m512 load_any(const float* p) { return _mm512_loadu_ps(p); }

struct Quantized {
  uint8_t* values = nullptr;
  float* scales = nullptr;
  int64_t width = 0;  // a multiple of 16; the inputs beyond the true ones are zeros

  Quantized() = default;
  Quantized(Cutter& memory, int64_t n_rows, int64_t ins)
      : values(memory.take<uint8_t>(n_rows * round_up(ins, 16))),
        scales(memory.take<float>(n_rows)),
        width(round_up(ins, 16)) {}

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
    for (int64_t k = 0; k < width; k += 16) {
      const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(load_any(x + k), inverse));
      _mm_storeu_si128((__m128i*)(values + i * width + k), _mm512_cvtepi32_epi8(_mm512_add_epi32(q, _mm512_set1_epi32(128))));
    }
    scales[i] = most / 127.f;
  }

  void give(int64_t i, Rows& rows, int m) const {
    rows.at[m] = (const char*)(values + i * width);
    rows.scale[m] = scales[i];
  }
};
