// Puts a matrix into the layout that tiles.h draws, once, while a model is loaded.
#pragma once
#include <vector>

#include "tiles.h"

// The number with the largest magnitude. Compared as integers, magnitudes keep their order and what is not a number comes
// last: it must not be lost.
INLINE float extreme(const bf16* x, int64_t n) {
  bf16 most = 0;
  for (int64_t i = 0; i < n; i++)
    if ((x[i] & 0x7fff) > (most & 0x7fff)) most = x[i];
  return to_float(most);
}

// A row goes to `to` and on, 4 bytes of each step.
INLINE void pack_bf16(const bf16* row, const Matrix& m, char* to) {
  for (int64_t k = 0; k < 2 * m.n_steps(); k++) ((bf16*)(to + k / 2 * STEP))[k % 2] = k < m.ins ? row[k] : 0;
}

INLINE void pack_int8(const bf16* row, const Matrix& m, char* to, int64_t out) {
  const float most = std::fabs(extreme(row, m.ins)), inverse = most > 0 ? 127.f / most : 0;
  int32_t sum = 0;
  for (int64_t k = 0; k < 4 * m.n_steps(); k++) {
    const int8_t q = k < m.ins ? (int8_t)std::lrint(to_float(row[k]) * inverse) : 0;
    to[k / 4 * STEP + k % 4] = (char)q;
    sum += q;
  }
  ((float*)m.scales)[out] = most / 127.f;
  ((int32_t*)m.sums)[out] = 128 * sum;
}

// n: the row's place in the group. The number with the largest magnitude becomes -8 whatever its sign, so that all 16 values are used: steps are an eighth of
// it, not a seventh, and a number near the opposite end is cut to 7 of them.
INLINE void pack_int4(const bf16* row, const Matrix& m, char* group, int n) {
  for (int64_t b = 0; b < m.n_blocks(); b++) {
    char* block = group + b * BLOCK_BYTES;
    const int64_t first = b * BLOCK, count = std::min<int64_t>(BLOCK, m.ins - first);
    const bf16 stored = to_bf16(extreme(row + first, count) / -ZERO);
    const float scale = to_float(stored);
    ((bf16*)(block + BLOCK_STEPS * STEP))[n] = stored;
    for (int k = 0; k < BLOCK; k++) {
      const float v = k < count && scale != 0 ? to_float(row[first + k]) / scale : 0;
      const int q = ZERO + (int)std::fmax(-8.f, std::fmin(7.f, std::nearbyint(v)));  // also what is not a number
      char& byte = block[k / 8 * STEP + 4 * n + k % 4];
      byte = (char)(k % 8 < 4 ? q : (byte & 0x0f) | q << 4);
    }
  }
}

// w: [outs][ins], row after row. paired: the first half of the rows are gate, the second up. Outputs that fill a group up
// are zeros, and so are inputs that fill a step or a block up.
static void pack_matrix(const bf16* w, const Matrix& m) {
  const int64_t half = m.outs / 2;
  const std::vector<bf16> zeros(m.ins);
  auto source = [&](int64_t g, int n) -> const bf16* {  // row of W behind output n of group g
    int64_t row = g * GROUP + n;
    if (m.paired) {
      const int64_t i = g * (GROUP / 2) + n / 32 * 16 + n % 16;
      if (i >= half) return zeros.data();
      row = n % 32 < 16 ? i : half + i;
    }
    return row < m.outs ? w + row * m.ins : zeros.data();
  };
  for (int64_t g = 0; g < m.n_groups(); g++)
    for (int n = 0; n < GROUP; n++) {
      char* group = (char*)m.group(g);
      if (m.kind == BF16) pack_bf16(source(g, n), m, group + 4 * n);
      if (m.kind == INT8) pack_int8(source(g, n), m, group + 4 * n, g * GROUP + n);
      if (m.kind == INT4) pack_int4(source(g, n), m, group, n);
    }
}
