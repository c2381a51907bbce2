// Words of AVX-512 that the kernels speak: bf16 loads and stores, exp, silu. Nothing here knows a model.
#pragma once
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

typedef uint16_t bf16;

INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

INLINE float to_float(bf16 v) {
  uint32_t bits = (uint32_t)v << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

// Round to nearest, ties to even, as the vector instruction does.
INLINE bf16 to_bf16(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  return (bf16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// The first n lanes, n from 0 to 16.
INLINE __mmask16 first(int64_t n) { return (__mmask16)((1u << std::clamp<int64_t>(n, 0, 16)) - 1); }

INLINE __m512 load_bf16(const bf16* p, __mmask16 lanes = 0xffff) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, p)), 16));
}

INLINE void store_bf16(bf16* p, __m512 v, __mmask16 lanes = 0xffff) {
  _mm256_mask_storeu_epi16(p, lanes, (__m256i)_mm512_cvtneps_pbh(v));
}

INLINE __m512bh load_pairs(const void* p) { return (__m512bh)_mm512_loadu_si512(p); }

// Two neighbouring bf16 numbers, in every lane.
INLINE __m512bh broadcast_pair(const void* p) {
  int32_t pair;
  memcpy(&pair, p, 4);
  return (__m512bh)_mm512_set1_epi32(pair);
}

// GCC 12 spills the accumulators of _mm512_dpbusd_epi32; as one instruction of inline assembly it does not.
INLINE void add_dot_u8s8(__m512i& sum, __m512i u8, __m512i s8) { asm("vpdpbusd %2,%1,%0" : "+v"(sum) : "v"(u8), "v"(s8)); }

// e^x to about 2 units in the last place: range reduction by ln 2 in two parts, then a polynomial of degree 6
// (the coefficients are those of the Cephes library's expf). exp(0) is exactly 1. Below -87.3 it gives about 1e-38.
INLINE __m512 exp512(__m512 x) {
  x = _mm512_max_ps(_mm512_min_ps(x, _mm512_set1_ps(88.3f)), _mm512_set1_ps(-87.3f));
  __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f)),
                                  _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
  p = _mm512_fmadd_ps(_mm512_mul_ps(p, r), r, _mm512_add_ps(r, _mm512_set1_ps(1.f)));
  return _mm512_scalef_ps(p, n);
}

INLINE __m512 sigmoid512(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.f);
  return _mm512_div_ps(one, _mm512_add_ps(one, exp512(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

INLINE __m512 silu512(__m512 x) { return _mm512_mul_ps(x, sigmoid512(x)); }

// Memory that only grows, aligned to its pages; one for each purpose and thread, so that a step allocates nothing.
class Buffer {
 public:
  // At least `bytes` bytes. What was in it is lost when it grows.
  char* get(size_t bytes) {
    if (bytes > size_) {
      free(data_);
      size_ = (size_t)round_up((int64_t)(bytes + bytes / 4), 1 << 21);
      data_ = (char*)aligned_alloc(1 << 21, size_);
      if (!data_) throw std::bad_alloc();
    }
    return data_;
  }
  ~Buffer() { free(data_); }

 private:
  char* data_ = nullptr;
  size_t size_ = 0;
};

// Cuts one buffer into arrays, each aligned to a cache line. Without a buffer it only counts the bytes.
struct Cutter {
  char* at;
  size_t used = 0;
  template <class T>
  T* take(size_t n) {
    T* p = (T*)(at ? at + used : nullptr);
    used += (size_t)round_up((int64_t)(n * sizeof(T)), 64);
    return p;
  }
};
