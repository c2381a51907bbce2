// Rows in 8 bits for the way to other ranks: brigade/comm/wire.py says what they look like, and does the same in torch. Bit by
// bit the same: products, quotients and roundings are single instructions there and here.
#pragma once
#include "simd.h"

enum WireKind : int32_t { WIRE_INT8 = 0, WIRE_FP8 = 1 };

struct WireRows {
  static constexpr int64_t TILE = 128;
  int64_t dim;
  int32_t kind;

  float largest() const { return kind == WIRE_INT8 ? 127.f : 448.f; }
  int64_t scales_at() const { return round_up(dim, 4); }
  int64_t row_bytes() const { return scales_at() + 4 * ((dim + TILE - 1) / TILE); }

  // x: `dim` numbers; to: row_bytes() bytes.
  void encode(const bf16* x, uint8_t* to) const {
    for (int64_t at = 0, tile = 0; at < dim; at += TILE, tile++) {
      const int64_t end = std::min(dim, at + TILE);
      // Compared as integers, magnitudes keep their order and what is not a number comes last: it must not be lost.
      __m512i bits = _mm512_setzero_si512();
      for (int64_t k = at; k < end; k += 16)
        bits = _mm512_max_epi32(bits, _mm512_castps_si512(_mm512_abs_ps(load_bf16(x + k, first(end - k)))));
      const int32_t most_bits = _mm512_reduce_max_epi32(bits);
      float most;
      memcpy(&most, &most_bits, 4);
      const float scale = most / largest();
      memcpy(to + scales_at() + 4 * tile, &scale, 4);
      const bool usual = most >= 0x1p-100f && std::isfinite(most);
      const __m512 inverse = _mm512_set1_ps(usual ? largest() / most : 0.f);
      for (int64_t k = at; k < end; k += 16) {
        const __m512 v = _mm512_mul_ps(load_bf16(x + k, usual ? first(end - k) : 0), inverse);
        const __m512i code = kind == WIRE_INT8 ? _mm512_cvtps_epi32(v) : to_e4m3(v);
        _mm512_mask_cvtepi32_storeu_epi8(to + k, first(end - k), code);
      }
    }
    for (int64_t k = dim; k < scales_at(); k++) to[k] = 0;
  }

  void decode(const uint8_t* row, bf16* to) const {
    for (int64_t at = 0, tile = 0; at < dim; at += TILE, tile++) {
      const int64_t end = std::min(dim, at + TILE);
      float one;
      memcpy(&one, row + scales_at() + 4 * tile, 4);
      const __m512 scale = _mm512_set1_ps(one);
      for (int64_t k = at; k < end; k += 16) {
        const __m128i code = _mm_maskz_loadu_epi8(first(end - k), row + k);
        const __m512 v = kind == WIRE_INT8 ? _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(code)) : from_e4m3(code);
        store_bf16(to + k, _mm512_mul_ps(v, scale), first(end - k));
      }
    }
  }

  // To nearest, ties to even, in the low byte of each lane. |v| may be 448 and a rounding error, no more.
  static __m512i to_e4m3(__m512 v) {
    const __m512 size = _mm512_abs_ps(v);
    const __m512i bits = _mm512_castps_si512(size);
    // Normal numbers: 20 of 23 bits of the mantissa are rounded away, and the exponent's bias becomes 7 in place of 127.
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 20), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7ffff)));
    const __m512i normal = _mm512_sub_epi32(_mm512_srli_epi32(rounded, 20), _mm512_set1_epi32((127 - 7) << 3));
    // Below 2^-6 they are multiples of 2^-9; eight of them are the bits of 2^-6.
    const __m512i small = _mm512_cvtps_epi32(_mm512_mul_ps(size, _mm512_set1_ps(512.f)));
    const __mmask16 is_small = _mm512_cmp_ps_mask(size, _mm512_set1_ps(0x1p-6f), _CMP_LT_OQ);
    const __m512i sign = _mm512_and_si512(_mm512_srli_epi32(_mm512_castps_si512(v), 24), _mm512_set1_epi32(0x80));
    return _mm512_or_si512(_mm512_mask_mov_epi32(normal, is_small, small), sign);
  }

  // As a half-precision number with the exponent 8 too small, which a multiplication puts right.
  static __m512 from_e4m3(__m128i code) {
    const __m256i wide = _mm256_cvtepu8_epi16(code);
    const __m256i sign = _mm256_slli_epi16(_mm256_and_si256(wide, _mm256_set1_epi16(0x80)), 8);
    const __m256i rest = _mm256_slli_epi16(_mm256_and_si256(wide, _mm256_set1_epi16(0x7f)), 7);
    return _mm512_mul_ps(_mm512_cvtph_ps(_mm256_or_si256(sign, rest)), _mm512_set1_ps(256.f));
  }
};
