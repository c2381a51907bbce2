// Packed weights and the register tiles that multiply them: everything that costs time goes through multiply().
//
// A weight matrix W[outs][ins] is packed once. Its outputs are cut into groups of 64. Inside a group the inputs follow each
// other in steps; one step holds, for each of the 64 outputs, 4 bytes: 2 bf16 inputs or 4 int8 inputs. So a step is 256
// bytes, four registers, and a group is one stream that is read from its first byte to its last:
//
//     group 0                                                            group 1
//     step 0: |out 0: in 0,1|out 1: in 0,1| ... |out 63: in 0,1|          step 0: |out 64: ...
//     step 1: |out 0: in 2,3|out 1: in 2,3| ... |out 63: in 2,3|          ...
//
// 4 bits: a step still is 256 bytes, which now hold 8 inputs of an output in 4 bytes: byte i has input i in its lower half and
// input i + 4 in its upper half, so that `step & 0x0f` and `step >> 4 & 0x0f` are two steps of bytes, ready to be multiplied.
// A half byte is the number plus 8. Behind each 4 steps, which make a block of 32 inputs, come the block's 64 scales in bf16:
//
//     block 0                                                                      block 1
//     step 0: |out 0: in 0+4,1+5,2+6,3+7|out 1: ... |out 63: ...|  1..3  |scales|   step 4: ...
//
// A gate/up pair of matrices is packed as one, 16 gate outputs beside the 16 up outputs that belong to them, so that
// silu(gate) * up happens in registers. Missing outputs and inputs are zeros.
//
// A tile is M rows of activations by 64 outputs (up to 6 rows) or by 32 (7 to 12 rows), 24 registers of sums. Each sum runs
// over the inputs in order, in a register of its own: a row's result does not depend on the rows beside it, bit by bit.
// 4 bits need two registers a sum, integers of the block and floats of the row, so their tiles are half as large.
#pragma once
#include "simd.h"

enum Kind : int32_t { BF16 = 0, INT8 = 1, INT4 = 2 };

constexpr int GROUP = 64;           // outputs
constexpr int STEP = 4 * GROUP;     // bytes
constexpr int MOST_ROWS = 12;       // of a tile
constexpr int BLOCK = 32;           // inputs that share a scale in int4
constexpr int BLOCK_STEPS = 4;
constexpr int BLOCK_BYTES = BLOCK_STEPS * STEP + 2 * GROUP;
constexpr int ZERO = 8;             // what int4 stores for 0

// One packed matrix, or one expert's part of several. Mirrored in packed.py.
struct Matrix {
  const char* data;
  const float* scales;    // int8: one for each output
  const int32_t* sums;    // int8: 128 times the sum of an output's weights, since activations are stored with 128 added
  int64_t outs, ins;      // as the model sees them
  int32_t kind;
  int32_t paired;         // gate and up side by side: `outs` counts both

  int64_t n_groups() const { return (paired ? round_up(outs / 2, GROUP / 2) * 2 : round_up(outs, GROUP)) / GROUP; }
  int64_t n_blocks() const { return (ins + BLOCK - 1) / BLOCK; }  // int4
  int64_t ins_per_step() const { return kind == BF16 ? 2 : kind == INT8 ? 4 : 8; }
  int64_t n_steps() const { return kind == INT4 ? n_blocks() * BLOCK_STEPS : (ins + ins_per_step() - 1) / ins_per_step(); }
  int64_t group_bytes() const { return kind == INT4 ? n_blocks() * BLOCK_BYTES : n_steps() * STEP; }
  int64_t bytes() const { return n_groups() * group_bytes(); }
  const char* group(int64_t g) const { return data + g * group_bytes(); }
  // Matrices of equal shape stand one behind the other (experts, heads).
  Matrix nth(int64_t i) const {
    Matrix m = *this;
    m.data += i * bytes();
    if (kind == INT8) m.scales += i * n_groups() * GROUP, m.sums += i * n_groups() * GROUP;
    return m;
  }
};

// Activations of up to MOST_ROWS rows: bf16, or 8 bits as quantize.h makes them and a scale for each row.
struct Rows {
  const char* at[MOST_ROWS];
  const int32_t* starts[MOST_ROWS];  // int4: where a row's sum over each block starts
  float scale[MOST_ROWS];
};

// What a tile fetches while it computes. The next group of a stream is brought into the second-level cache while this one
// is multiplied; a group that is read again (more than one pass) is fetched a little ahead into the first level.
// STREAM: a tile that reads whole steps once fetches itself instead, 4 KB ahead, and at its end the beginning of the next
// group, so that a thread's reading never starts anew (the machine, which fetches by itself, does at every page of 4 KB).
enum Fetch { NONE, STREAM, NEXT_4, NEXT_2, NEXT_1_AND_AHEAD, AHEAD };

constexpr int64_t STEPS_AHEAD = 16;

template <Fetch F>
INLINE void fetch(const char* next, const char* here, int64_t step, int64_t n_steps) {
  if constexpr (F == STREAM) {
    const int64_t left = n_steps - step;
    const char* at = STEPS_AHEAD < left ? here + STEPS_AHEAD * STEP : next + (STEPS_AHEAD - left) * STEP;
    UNROLL for (int i = 0; i < 4; i++) _mm_prefetch(at + i * 64, _MM_HINT_T1);
  }
  constexpr int lines = F == NEXT_4 ? 4 : F == NEXT_2 ? 2 : F == NEXT_1_AND_AHEAD ? 1 : 0;
  UNROLL for (int i = 0; i < lines; i++) _mm_prefetch(next + (step * lines + i) * 64, _MM_HINT_T1);
  if constexpr (F == NEXT_1_AND_AHEAD || F == AHEAD) {
    UNROLL for (int i = 0; i < 4; i++) _mm_prefetch(here + 2 * STEP + i * 64, _MM_HINT_T0);
  }
}

// The same for step `step` of block `block`: a quarter of its lines.
template <Fetch F>
INLINE void fetch_block(const char* next, const char* here, int64_t block, int step) {
  constexpr int per_block = BLOCK_BYTES / 64;
  constexpr int lines = F == NEXT_4 ? per_block : F == NEXT_2 ? per_block / 2 : F == NEXT_1_AND_AHEAD ? per_block / 4 + 1 : 0;
  UNROLL for (int i = step * lines / BLOCK_STEPS; i < (step + 1) * lines / BLOCK_STEPS; i++)
    _mm_prefetch(next + (block * lines + i) * 64, _MM_HINT_T1);
  if constexpr (F == NEXT_1_AND_AHEAD || F == AHEAD) {
    UNROLL for (int i = 0; i < 2; i++) _mm_prefetch(here + 2 * STEP + i * 64, _MM_HINT_T0);
  }
}

// sum[m][j] = row m times columns 16j.. of a bf16 panel whose steps are PANEL columns wide. Row m's pair of inputs of
// step k is at rows[m] + k * STRIDE.
template <int M, int WIDTH, int PANEL = GROUP, int STRIDE = 4, Fetch F = NONE>
INLINE void multiply_bf16(const char* const* rows, const char* panel, int64_t n_steps, const char* next,
                          __m512 (&sum)[M][WIDTH / 16]) {
  constexpr int J = WIDTH / 16;
  UNROLL for (int m = 0; m < M; m++) UNROLL for (int j = 0; j < J; j++) sum[m][j] = _mm512_setzero_ps();
  for (int64_t k = 0; k < n_steps; k++, panel += 4 * PANEL) {
    __m512bh w[J];
    UNROLL for (int j = 0; j < J; j++) w[j] = load_pairs(panel + 64 * j);
    fetch<F>(next, panel, k, n_steps);
    UNROLL for (int m = 0; m < M; m++) {
      const __m512bh x = broadcast_pair(rows[m] + k * STRIDE);
      UNROLL for (int j = 0; j < J; j++) sum[m][j] = _mm512_dpbf16_ps(sum[m][j], w[j], x);
    }
  }
}

// The same for int8 weights and uint8 activations: exact sums of integers, then the two scales.
template <int M, int WIDTH, Fetch F>
INLINE void multiply_int8(const Rows& rows, const Matrix& w, int64_t g, int offset, const char* next,
                          __m512 (&sum)[M][WIDTH / 16]) {
  constexpr int J = WIDTH / 16;
  const char* panel = w.group(g) + 4 * offset;
  __m512i total[M][J];
  UNROLL for (int m = 0; m < M; m++) UNROLL for (int j = 0; j < J; j++) total[m][j] = _mm512_setzero_si512();
  const int64_t n_steps = w.n_steps();
  for (int64_t k = 0; k < n_steps; k++, panel += STEP) {
    __m512i s8[J];
    UNROLL for (int j = 0; j < J; j++) s8[j] = _mm512_loadu_si512(panel + 64 * j);
    fetch<F>(next, panel, k, n_steps);
    UNROLL for (int m = 0; m < M; m++) {
      const __m512i u8 = (__m512i)broadcast_pair(rows.at[m] + 4 * k);
      UNROLL for (int j = 0; j < J; j++) add_dot_u8s8(total[m][j], u8, s8[j]);
    }
  }
  UNROLL for (int j = 0; j < J; j++) {
    const int64_t out = g * GROUP + offset + 16 * j;
    const __m512i shift = _mm512_loadu_si512(w.sums + out);
    const __m512 scale = _mm512_loadu_ps(w.scales + out);
    UNROLL for (int m = 0; m < M; m++) {
      const __m512 exact = _mm512_cvtepi32_ps(_mm512_sub_epi32(total[m][j], shift));
      sum[m][j] = _mm512_mul_ps(_mm512_mul_ps(exact, scale), _mm512_set1_ps(rows.scale[m]));
    }
  }
}

// The same for int4 weights and int8 activations: an exact sum of integers for each block, the sums of blocks in floats.
// A row's sum over a block starts at -ZERO times the sum of its activations, which takes the ZERO of every weight away.
template <int M, int WIDTH, Fetch F>
INLINE void multiply_int4(const Rows& rows, const Matrix& w, int64_t g, int offset, const char* next,
                          __m512 (&sum)[M][WIDTH / 16]) {
  constexpr int J = WIDTH / 16;
  const __m512i half_byte = _mm512_set1_epi8(0x0f);
  const char* block = w.group(g);
  UNROLL for (int m = 0; m < M; m++) UNROLL for (int j = 0; j < J; j++) sum[m][j] = _mm512_setzero_ps();
  const int64_t n_blocks = w.n_blocks();
  for (int64_t b = 0; b < n_blocks; b++, block += BLOCK_BYTES) {
    __m512i total[M][J];
    UNROLL for (int m = 0; m < M; m++) UNROLL for (int j = 0; j < J; j++) total[m][j] = _mm512_set1_epi32(rows.starts[m][b]);
    UNROLL for (int step = 0; step < BLOCK_STEPS; step++) {
      const char* panel = block + step * STEP + 4 * offset;
      fetch_block<F>(next, panel, b, step);
      UNROLL for (int upper = 0; upper < 2; upper++) {
        __m512i u8[J];
        UNROLL for (int j = 0; j < J; j++) {
          const __m512i bytes = _mm512_loadu_si512(panel + 64 * j);
          u8[j] = _mm512_and_si512(upper ? _mm512_srli_epi16(bytes, 4) : bytes, half_byte);
        }
        UNROLL for (int m = 0; m < M; m++) {
          const __m512i s8 = (__m512i)broadcast_pair(rows.at[m] + b * BLOCK + 8 * step + 4 * upper);
          UNROLL for (int j = 0; j < J; j++) add_dot_u8s8(total[m][j], u8[j], s8);
        }
      }
    }
    const bf16* scales = (const bf16*)(block + BLOCK_STEPS * STEP) + offset;
    UNROLL for (int j = 0; j < J; j++) {
      const __m512 scale = load_bf16(scales + 16 * j);
      UNROLL for (int m = 0; m < M; m++) sum[m][j] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(total[m][j]), scale, sum[m][j]);
    }
  }
  UNROLL for (int m = 0; m < M; m++) UNROLL for (int j = 0; j < J; j++)
    sum[m][j] = _mm512_mul_ps(sum[m][j], _mm512_set1_ps(rows.scale[m]));
}

// One tile: M rows by WIDTH outputs of group g from output `offset` of it on, handed to `out` as sums in registers.
template <Kind K, int M, int WIDTH, Fetch F, class Out>
static __attribute__((noinline)) void tile(const Rows& rows, const Matrix& w, int64_t g, int offset, const char* next,
                                           const Out& out) {
  __m512 sum[M][WIDTH / 16];
  if constexpr (K == BF16)
    multiply_bf16<M, WIDTH, GROUP, 4, F>(rows.at, w.group(g) + 4 * offset, w.n_steps(), next, sum);
  else if constexpr (K == INT8)
    multiply_int8<M, WIDTH, F>(rows, w, g, offset, next, sum);
  else
    multiply_int4<M, WIDTH, F>(rows, w, g, offset, next, sum);
  UNROLL for (int m = 0; m < M; m++) out.template take<WIDTH / 16>(m, g, offset, sum[m]);
}

// Calls f with an integral constant equal to n, from LOW to HIGH.
template <int LOW, int HIGH, class F>
INLINE void with_constant(int n, const F& f) {
  if constexpr (LOW == HIGH)
    f(std::integral_constant<int, LOW>{});
  else if (n == LOW)
    f(std::integral_constant<int, LOW>{});
  else
    with_constant<LOW + 1, HIGH>(n, f);
}

// multiply_group() for int4: tiles of 3 rows by 64 outputs, or 6 by 32.
template <class RowsFrom, class OutFrom>
INLINE void multiply_group_int4(const Matrix& w, int64_t g, int64_t n, const char* next, const RowsFrom& rows_from,
                                const OutFrom& out_from) {
  Rows rows;
  if (n <= 3) {
    rows_from(0, (int)n, rows);
    const auto out = out_from(0);
    with_constant<1, 3>((int)n, [&](auto M) { tile<INT4, M, 64, M == 1 ? NONE : NEXT_4>(rows, w, g, 0, next, out); });
    return;
  }
  if (n <= 6) {
    rows_from(0, (int)n, rows);
    const auto out = out_from(0);
    with_constant<4, 6>((int)n, [&](auto M) {
      tile<INT4, M, 32, NEXT_2>(rows, w, g, 0, next, out);
      tile<INT4, M, 32, NEXT_2>(rows, w, g, 32, next + w.group_bytes() / 2, out);
    });
    return;
  }
  int quarter = 0;
  for (int64_t i = 0; i < n; quarter += 2) {
    const int64_t left = n - i;
    const int count = (int)(left <= 6 ? left : left < 12 ? (left + 1) / 2 : 6);
    rows_from(i, count, rows);
    const auto out = out_from(i);
    with_constant<1, 6>(count, [&](auto M) {
      for (int half = 0; half < 2; half++)
        if (quarter < 4)
          tile<INT4, M, 32, NEXT_1_AND_AHEAD>(rows, w, g, 32 * half, next + (quarter + half) * (w.group_bytes() / 4), out);
        else
          tile<INT4, M, 32, AHEAD>(rows, w, g, 32 * half, next, out);
    });
    i += count;
  }
}

// All n rows through group g. rows_from(first, count, rows) fills in the row pointers; out_from(first) says where results
// go. `next` is the group that this thread reads afterwards. Every weight is read from memory once: up to 12 rows take one
// or two passes over the group, more rows find it in the cache.
template <Kind K, class RowsFrom, class OutFrom>
INLINE void multiply_group(const Matrix& w, int64_t g, int64_t n, const char* next, const RowsFrom& rows_from,
                           const OutFrom& out_from) {
  if constexpr (K == INT4) return multiply_group_int4(w, g, n, next, rows_from, out_from);
  Rows rows;
  if (n <= 6) {
    rows_from(0, (int)n, rows);
    const auto out = out_from(0);
    with_constant<1, 6>((int)n, [&](auto M) { tile<K, M, 64, STREAM>(rows, w, g, 0, next, out); });
    return;
  }
  if (n <= 12) {
    rows_from(0, (int)n, rows);
    const auto out = out_from(0);
    with_constant<7, 12>((int)n, [&](auto M) {
      tile<K, M, 32, NEXT_2>(rows, w, g, 0, next, out);
      tile<K, M, 32, NEXT_2>(rows, w, g, 32, next + w.group_bytes() / 2, out);
    });
    return;
  }
  int pass = 0;
  for (int64_t i = 0; i < n; pass++) {
    const int64_t left = n - i;
    const int count = (int)(left <= 6 ? left : left < 12 ? (left + 1) / 2 : 6);
    rows_from(i, count, rows);
    const auto out = out_from(i);
    with_constant<1, 6>(count, [&](auto M) {
      if (pass < 4)
        tile<K, M, 64, NEXT_1_AND_AHEAD>(rows, w, g, 0, next + pass * (w.group_bytes() / 4), out);
      else
        tile<K, M, 64, AHEAD>(rows, w, g, 0, next, out);
    });
    i += count;
  }
}

// ---- Where results go. take<J>(m, g, offset, sum): J registers of row m, outputs 64 g + offset and on.

// Rows of bf16 numbers, `stride` apart; outputs beyond `outs` are not written.
struct StoreBf16 {
  bf16* to;
  int64_t stride, outs;
  template <int J>
  INLINE void put(bf16* p, int64_t left, const __m512 (&sum)[J]) {
    UNROLL for (int j = 0; j < J; j++) store_bf16(p + 16 * j, sum[j], first(left - 16 * j));
  }
  template <int J>
  void take(int m, int64_t g, int offset, const __m512 (&sum)[J]) const {
    put<J>(to + m * stride + g * GROUP + offset, outs - g * GROUP - offset, sum);
  }
};

// Rows of floats.
struct StoreFloat {
  float* to;
  int64_t stride, outs;
  template <int J>
  void take(int m, int64_t g, int offset, const __m512 (&sum)[J]) const {
    const int64_t at = g * GROUP + offset;
    UNROLL for (int j = 0; j < J; j++) _mm512_mask_storeu_ps(to + m * stride + at + 16 * j, first(outs - at - 16 * j), sum[j]);
  }
};

// Rows of floats that the sums are added to: the residual.
struct AddFloat {
  float* to;
  int64_t stride, outs;
  template <int J>
  void take(int m, int64_t g, int offset, const __m512 (&sum)[J]) const {
    const int64_t at = g * GROUP + offset;
    UNROLL for (int j = 0; j < J; j++) {
      float* p = to + m * stride + at + 16 * j;
      const __mmask16 lanes = first(outs - at - 16 * j);
      _mm512_mask_storeu_ps(p, lanes, _mm512_add_ps(_mm512_maskz_loadu_ps(lanes, p), sum[j]));
    }
  }
};
