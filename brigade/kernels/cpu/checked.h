// Copies bytes and hashes them on the way, so that they pass through the core once. Knows neither pages nor torch.
//
// The hash is XXH3 with 64 bits and seed 0, as the xxhash library computes it, for whole stripes of 64 bytes and more
// than 240 bytes in all: one stripe is one register. Each of eight sums takes in its part of a stripe, mixed with a
// secret that moves on by 8 bytes from stripe to stripe; after 16 stripes the sums are scrambled.
#pragma once
#include "simd.h"

namespace checked {

constexpr int64_t STRIPE = 64, STRIPES = 16;
constexpr uint64_t P32_1 = 0x9E3779B1, P32_2 = 0x85EBCA77, P32_3 = 0xC2B2AE3D;
constexpr uint64_t P64_1 = 0x9E3779B185EBCA87, P64_2 = 0xC2B2AE3D27D4EB4F, P64_3 = 0x165667B19E3779F9,
                   P64_4 = 0x85EBCA77C2B2AE63, P64_5 = 0x27D4EB2F165667C5, AVALANCHE = 0x165667919E3779F9;

// The secret that the hash is defined with.
alignas(64) constexpr uint8_t SECRET[192] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};

struct Hash {
  __m512i sums = _mm512_set_epi64(P32_1, P64_5, P32_2, P64_4, P64_3, P64_2, P64_1, P32_3);
  int64_t stripe = 0;  // since the sums were scrambled

  void take(__m512i stripe_bytes, const uint8_t* secret) {
    const __m512i mixed = _mm512_xor_si512(stripe_bytes, _mm512_loadu_si512(secret));
    const __m512i product = _mm512_mul_epu32(mixed, _mm512_srli_epi64(mixed, 32));
    const __m512i swapped = _mm512_shuffle_epi32(stripe_bytes, (_MM_PERM_ENUM)0x4e);  // neighbours change places
    sums = _mm512_add_epi64(sums, _mm512_add_epi64(product, swapped));
  }

  void take_next(__m512i stripe_bytes) {
    take(stripe_bytes, SECRET + 8 * stripe);
    if (++stripe < STRIPES) return;
    sums = _mm512_xor_si512(sums, _mm512_srli_epi64(sums, 47));
    sums = _mm512_mullo_epi64(_mm512_xor_si512(sums, _mm512_loadu_si512(SECRET + 128)), _mm512_set1_epi64(P32_1));
    stripe = 0;
  }

  uint64_t end(int64_t n_bytes) const {
    uint64_t sum[8], secret[8], out = (uint64_t)n_bytes * P64_1;
    _mm512_storeu_si512(sum, sums);
    memcpy(secret, SECRET + 11, sizeof secret);
    for (int i = 0; i < 8; i += 2) {
      const unsigned __int128 product = (unsigned __int128)(sum[i] ^ secret[i]) * (sum[i + 1] ^ secret[i + 1]);
      out += (uint64_t)product ^ (uint64_t)(product >> 64);
    }
    out = (out ^ (out >> 37)) * AVALANCHE;
    return out ^ (out >> 32);
  }
};

// n runs of whole stripes, more than 240 bytes in all; gives the hash of what was written.
static uint64_t copy(uint8_t* const* to, const uint8_t* const* from, const int64_t* bytes, int64_t n) {
  Hash hash;
  int64_t total = 0;
  for (int64_t i = 0; i < n; i++) {
    const int64_t most = bytes[i] - (i + 1 == n ? STRIPE : 0);  // the very last stripe has a secret of its own
    for (int64_t at = 0; at < most; at += STRIPE) {
      const __m512i stripe_bytes = _mm512_loadu_si512(from[i] + at);
      _mm512_storeu_si512(to[i] + at, stripe_bytes);  // storing past the cache took twice as long
      hash.take_next(stripe_bytes);
    }
    total += bytes[i];
  }
  const int64_t last = bytes[n - 1] - STRIPE;
  const __m512i stripe_bytes = _mm512_loadu_si512(from[n - 1] + last);
  _mm512_storeu_si512(to[n - 1] + last, stripe_bytes);
  hash.take(stripe_bytes, SECRET + sizeof SECRET - STRIPE - 7);
  return hash.end(total);
}

}  // namespace checked
