// Attention over pages of the cache, read in place. One kernel serves decode and prefill, latent (MLA) and grouped-query
// attention: a query row is a pair of a token and a head, and up to LANES query rows that share a key head are computed
// together, one in each lane of a register. So the scores of one key are one register, a softmax runs down the lanes without
// any shuffle, and keys are read from their pages as they lie.
//
//     scores[key][lane] = sum over the key's pairs of numbers: broadcast(pair of key) * queries[pair][lane]
//     out[lane][value]  = sum over pairs of keys:              broadcast(pair of p[lane]) * values[pair of keys][value]
//
// In a decode of a few heads most lanes would be idle. Where a key head has 2 to 8 query heads, a score is therefore the sum of
// two chains, one over even and one over odd pairs of numbers, always: up to 8 query rows then fill 16 lanes, and one
// instruction multiplies two pairs of the key.
//
//     lanes of a decode:  | row 0, even pair | row 0, odd pair | row 1, even pair | ...    times    | even pair | odd pair | even ..
//
// A decode computes little with what it reads, and finds it in no cache of the processor: a layer's weights have passed since
// the last step. So while folded lanes compute a chunk, the rows of the chunk after it are fetched, at the end those of the
// next task, a line of a row now and a line of another then: many at once would wait for each other.
//
// The softmax is computed online (arXiv:1805.02867; FlashAttention, arXiv:2205.14135) in chunks of CHUNK keys, and afresh in
// every SPLIT keys; the splits are folded in order. Chunks and splits lie at fixed positions, and a key that a lane may not
// see changes nothing in it, so a row's result is the same, bit by bit, in a decode, in any chunk of a prefill, and beside
// any other rows.
#pragma once
#include "pool.h"
#include "tiles.h"

constexpr int CHUNK = 64;
constexpr int SPLIT = 512;
constexpr int HALF = 8;            // query rows that fill a register with two chains each
constexpr float NOTHING = -1e30f;  // the maximum of no scores

// Several tokens of one request: query rows row..row+n-1 of the batch at positions start..
struct Sequence {
  int64_t row, n, start, first_page;  // first_page: index into the page table
  int64_t expanded;                   // positions before it are computed in the expanded form, if the layer has one
};

// Where keys and values lie in a cache row, and how many heads share them.
struct Heads {
  int64_t n_kv, group;           // key heads; query heads of each
  int64_t key_at, key_width;     // of key head 0; numbers
  int64_t value_at, value_width;
  int64_t row_width;             // numbers of a cache row
  int64_t key_step, value_step;  // from one key head to the next
};

struct Cache {
  const bf16* rows;
  int64_t page;          // rows of a page
  const int32_t* pages;  // page tables of all sequences
  const bf16* row(const Sequence& s, int64_t position, int64_t width) const {
    return rows + ((int64_t)pages[s.first_page + position / page] * page + position % page) * width;
  }
};

// Some keys of a sequence, and whose head they are read for.
struct Keys {
  const Sequence* sequence;
  int64_t kv_head, from, n;
};

// The running softmax of LANES query rows: maximum, sum, and the weighted values so far.
template <int LANES>
struct Partial {
  float most[LANES], sum[LANES];
  float* out;  // [LANES][width]
};

template <int LANES>
class Attention {
 public:
  static constexpr int L = LANES / 16;  // registers

  Attention(const Heads& heads, const Cache& cache) : heads_(heads), cache_(cache), width_(round_up(heads.value_width, GROUP)) {
    n_pairs_ = (heads.key_width + 1) / 2;
    auto cut = [&](Cutter c) {
      queries_ = c.take<uint32_t>((n_pairs_ + 1) * LANES);
      scores_ = c.take<float>(CHUNK * LANES);
      weights_ = c.take<uint32_t>(CHUNK / 2 * LANES);
      values_ = c.take<uint32_t>(CHUNK / 2 * width_);
      split_.out = c.take<float>(LANES * width_);
      total_.out = c.take<float>(LANES * width_);
      return c.used;
    };
    static thread_local Buffer memory;
    char* at = memory.get(cut(Cutter{nullptr}));
    cut(Cutter{at});
  }

  static int64_t n_splits(int64_t n_keys) { return (n_keys + SPLIT - 1) / SPLIT; }

  // Take query rows first..first+n-1 of a sequence and key head: row i is token i / group, head i % group of the group.
  // q: scaled, at q + token * token_stride + head * head_stride.
  void load(const Sequence& s, int64_t kv_head, const bf16* q, int64_t token_stride, int64_t head_stride, int64_t first_row,
            int64_t n) {
    sequence_ = s, kv_head_ = kv_head, n_ = (int)n;
    folded_ = LANES == 16 && two_chains() && n <= HALF;
    for (int lane = 0; lane < LANES; lane++) {
      const int64_t i = first_row + std::min<int64_t>(lane, n - 1);  // idle lanes repeat the last row
      const int64_t token = i / heads_.group, head = kv_head * heads_.group + i % heads_.group;
      const bf16* from = q + (s.row + token) * token_stride + head * head_stride;
      for (int64_t k = 0; k < n_pairs_; k++)
        if (!folded_)
          memcpy(&queries_[k * LANES + lane], from + 2 * k, 4);
        else if (lane < HALF)
          memcpy(&queries_[k / 2 * LANES + 2 * lane + k % 2], from + 2 * k, 4);
      last_[lane] = (int32_t)(s.start + token);
    }
  }

  // A matter of the layer, not of the step, so that a row's scores are always summed up in the same way.
  bool two_chains() const { return heads_.group > 1 && heads_.group <= HALF; }

  int64_t n_keys() const { return last_[LANES - 1] + 1; }

  // What is read after all this, so that it can be fetched. n 0: nothing is known of it.
  void load_next(const Keys& after) { after_ = after; }

  // Keys of one split, into `split()`.
  void run_split(int64_t i) {
    for (int lane = 0; lane < LANES; lane++) split_.most[lane] = NOTHING, split_.sum[lane] = 0;
    const int64_t end = std::min<int64_t>((i + 1) * SPLIT, n_keys());
    bool fresh = true;
    for (int64_t key = i * SPLIT; key < end; key += CHUNK, fresh = false) {
      const int n = (int)std::min<int64_t>(CHUNK, end - key);
      gather(sequence_, key, n, rows_);
      if (folded_) look_ahead(key + CHUNK);
      score(n);
      hide(key, n);
      soften(n);
      add_values(n, fresh);
    }
  }

  void clear_total() {
    for (int lane = 0; lane < LANES; lane++) total_.most[lane] = NOTHING, total_.sum[lane] = 0;
    memset(total_.out, 0, n_ * width_ * sizeof(float));
  }

  // total = total and the split that was run, weighted by their maxima.
  void fold_split() { fold(split_.most, split_.sum, split_.out); }

  void fold(const float* most, const float* sum, const float* out) {
    alignas(64) float keep[LANES], add[LANES];
    UNROLL for (int j = 0; j < L; j++) {
      const __m512 a = _mm512_loadu_ps(total_.most + 16 * j), b = _mm512_loadu_ps(most + 16 * j);
      const __m512 m = _mm512_max_ps(a, b);
      const __m512 ka = exp512(_mm512_sub_ps(a, m)), kb = exp512(_mm512_sub_ps(b, m));
      _mm512_store_ps(keep + 16 * j, ka);
      _mm512_store_ps(add + 16 * j, kb);
      _mm512_storeu_ps(total_.most + 16 * j, m);
      const __m512 old = _mm512_mul_ps(_mm512_loadu_ps(total_.sum + 16 * j), ka);
      _mm512_storeu_ps(total_.sum + 16 * j, _mm512_fmadd_ps(_mm512_loadu_ps(sum + 16 * j), kb, old));
    }
    for (int lane = 0; lane < n_; lane++) {
      const __m512 ka = _mm512_set1_ps(keep[lane]), kb = _mm512_set1_ps(add[lane]);
      for (int64_t d = 0; d < width_; d += 16) {
        float* t = total_.out + lane * width_ + d;
        const __m512 old = _mm512_mul_ps(_mm512_loadu_ps(t), ka);
        _mm512_storeu_ps(t, _mm512_fmadd_ps(_mm512_loadu_ps(out + lane * width_ + d), kb, old));
      }
    }
  }

  // The finished rows, as bf16, to out + token * token_stride + head * head_stride.
  void store(int64_t first_row, bf16* out, int64_t token_stride, int64_t head_stride) const {
    for (int lane = 0; lane < n_; lane++) {
      const int64_t i = first_row + lane;
      const int64_t token = i / heads_.group, head = kv_head_ * heads_.group + i % heads_.group;
      bf16* to = out + (sequence_.row + token) * token_stride + head * head_stride;
      const __m512 inverse = _mm512_set1_ps(1.f / total_.sum[lane]);
      for (int64_t d = 0; d < heads_.value_width; d += 16)
        store_bf16(to + d, _mm512_mul_ps(_mm512_loadu_ps(total_.out + lane * width_ + d), inverse),
                   first(heads_.value_width - d));
    }
  }

  const Partial<LANES>& split() const { return split_; }
  int64_t width() const { return width_; }

 private:
  // Row pointers of the chunk's keys; the last is repeated, so that pairs and tiles may read past the end.
  void gather(const Sequence& sequence, int64_t key, int n, const bf16** rows) const {
    const int64_t page = cache_.page;
    for (int i = 0; i < n;) {
      const bf16* row = cache_.row(sequence, key + i, heads_.row_width);
      for (int64_t left = page - (key + i) % page; left > 0 && i < n; left--, i++, row += heads_.row_width) rows[i] = row;
    }
    for (int i = n; i < CHUNK; i++) rows[i] = rows[n - 1];
  }

  // Rows to fetch while those of this chunk are computed: of the next chunk, which begins at `key`, or of the next task. If
  // there is none, those of this chunk once more, which costs next to nothing.
  void look_ahead(int64_t key) {
    const int64_t left = n_keys() - key;
    const Keys next = left > 0 ? Keys{&sequence_, kv_head_, key, left} : after_;
    next_head_ = next.n ? next.kv_head : kv_head_;
    if (next.n)
      gather(*next.sequence, next.from, (int)std::min<int64_t>(CHUNK, next.n), next_);
    else
      memcpy(next_, rows_, sizeof rows_);
  }

  template <int M>
  inline __attribute__((always_inline)) void score_tile(int i, int64_t offset) const {
    const char* at[M];
    UNROLL for (int m = 0; m < M; m++) at[m] = (const char*)(rows_[i + m] + offset);
    float* to = scores_ + i * LANES;
    __m512 sum[M][L];
    if (!two_chains()) {
      multiply_bf16<M, LANES, LANES>(at, (const char*)queries_, n_pairs_, nullptr, sum);
      UNROLL for (int m = 0; m < M; m++) UNROLL for (int j = 0; j < L; j++) _mm512_store_ps(to + m * LANES + 16 * j, sum[m][j]);
      return;
    }
    if constexpr (L == 1)
      if (folded_) {
        const char* next[M];
        UNROLL for (int m = 0; m < M; m++) next[m] = (const char*)(next_[i + m] + heads_.key_at + next_head_ * heads_.key_step);
        return score_folded<M>(at, next, queries_, n_pairs_, to);
      }
    multiply_bf16<M, LANES, 2 * LANES, 8>(at, (const char*)queries_, (n_pairs_ + 1) / 2, nullptr, sum);
    UNROLL for (int m = 0; m < M; m++) UNROLL for (int j = 0; j < L; j++) _mm512_store_ps(to + m * LANES + 16 * j, sum[m][j]);
    UNROLL for (int m = 0; m < M; m++) at[m] += 4;
    multiply_bf16<M, LANES, 2 * LANES, 8>(at, (const char*)(queries_ + LANES), n_pairs_ / 2, nullptr, sum);
    UNROLL for (int m = 0; m < M; m++) UNROLL for (int j = 0; j < L; j++) {
      float* t = to + m * LANES + 16 * j;
      _mm512_store_ps(t, _mm512_add_ps(_mm512_load_ps(t), sum[m][j]));
    }
  }

  // Scores of up to 8 query rows, whose even and odd pairs are beside each other. next: rows to fetch meanwhile.
  template <int M>
  INLINE void score_folded(const char* const* at, const char* const* next, const uint32_t* queries, int64_t n_pairs, float* to) {
    __m512 sum[M];
    UNROLL for (int m = 0; m < M; m++) sum[m] = _mm512_setzero_ps();
    auto add = [&](int64_t k) __attribute__((always_inline)) {
      const __m512bh q = load_pairs(queries + 16 * k);
      UNROLL for (int m = 0; m < M; m++) {
        int64_t two_pairs;
        memcpy(&two_pairs, at[m] + 8 * k, 8);
        sum[m] = _mm512_dpbf16_ps(sum[m], q, (__m512bh)_mm512_set1_epi64(two_pairs));
      }
    };
    int64_t k = 0;
    for (; k + 8 <= n_pairs / 2; k += 8) {  // a line of each row
      UNROLL for (int i = 0; i < 8; i++) {
        UNROLL for (int m = i; m < M; m += 8) _mm_prefetch(next[m] + 8 * k, _MM_HINT_T1);
        add(k + i);
      }
    }
    UNROLL for (int m = 0; m < M; m++) _mm_prefetch(next[m] + 8 * k, _MM_HINT_T1);
    for (; k < n_pairs / 2; k++) add(k);
    if (n_pairs % 2) {  // an even pair without an odd one
      const __mmask16 even = 0x5555;
      const __m512bh q = (__m512bh)_mm512_maskz_loadu_epi32(even, queries + 16 * (n_pairs / 2));
      UNROLL for (int m = 0; m < M; m++) {
        const __m512i pair = _mm512_maskz_mov_epi32(even, (__m512i)broadcast_pair(at[m] + 4 * (n_pairs - 1)));
        sum[m] = _mm512_dpbf16_ps(sum[m], q, (__m512bh)pair);
      }
    }
    const __m512i rows = _mm512_set_epi32(14, 12, 10, 8, 6, 4, 2, 0, 14, 12, 10, 8, 6, 4, 2, 0);
    UNROLL for (int m = 0; m < M; m++) {
      const __m512 both = _mm512_add_ps(sum[m], _mm512_permute_ps(sum[m], 0xb1));  // neighbours changed places
      _mm512_store_ps(to + m * 16, _mm512_permutexvar_ps(rows, both));
    }
  }

  void score(int n) {
    constexpr int M = L == 4 ? 6 : L == 2 ? 12 : 16;  // keys of a tile, so that its sums fit the registers
    const int64_t offset = heads_.key_at + kv_head_ * heads_.key_step;
    int i = 0;
    for (; i + M <= n; i += M) score_tile<M>(i, offset);
    for (; i + 4 <= n; i += 4) score_tile<4>(i, offset);
    for (; i < n; i++) score_tile<1>(i, offset);
  }

  // A lane does not see keys behind its own position.
  void hide(int64_t key, int n) {
    if (key + n - 1 <= last_[0]) return;  // lanes are in the order of their positions
    for (int i = 0; i < n; i++) {
      UNROLL for (int j = 0; j < L; j++) {
        const __mmask16 hidden = _mm512_cmplt_epi32_mask(_mm512_loadu_si512(last_ + 16 * j), _mm512_set1_epi32((int)key + i));
        float* s = scores_ + i * LANES + 16 * j;
        _mm512_store_ps(s, _mm512_mask_mov_ps(_mm512_load_ps(s), hidden, _mm512_set1_ps(2 * NOTHING)));
      }
    }
  }

  // scores -> weights in pairs of keys; maximum, sum and the correction of earlier chunks.
  void soften(int n) {
    UNROLL for (int j = 0; j < L; j++) {
      const __m512 before = _mm512_loadu_ps(split_.most + 16 * j);
      __m512 most = before, sum = _mm512_setzero_ps();
      for (int i = 0; i < n; i++) most = _mm512_max_ps(most, _mm512_load_ps(scores_ + i * LANES + 16 * j));
      for (int i = 0; i < n; i += 2) {
        const __m512 a = weight(i, j, n, most), b = weight(i + 1, j, n, most);
        sum = _mm512_add_ps(sum, _mm512_add_ps(a, b));
        // The two keys' weights of a lane side by side: lane's low half the first key, high half the second.
        const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(a));
        const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(b)), 16);
        _mm512_store_si512(weights_ + i / 2 * LANES + 16 * j, _mm512_or_si512(low, high));
      }
      const __m512 keep = exp512(_mm512_sub_ps(before, most));
      _mm512_storeu_ps(keep_ + 16 * j, keep);
      _mm512_storeu_ps(split_.most + 16 * j, most);
      _mm512_storeu_ps(split_.sum + 16 * j, _mm512_fmadd_ps(_mm512_loadu_ps(split_.sum + 16 * j), keep, sum));
    }
  }

  INLINE __m512 weight(const float* scores, __m512 most) {
    const __m512 s = _mm512_load_ps(scores);
    const __mmask16 seen = _mm512_cmp_ps_mask(s, _mm512_set1_ps(1.5f * NOTHING), _CMP_GT_OQ);
    return _mm512_maskz_mov_ps(seen, exp512(_mm512_sub_ps(s, most)));
  }

  __m512 weight(int i, int j, int n, __m512 most) const {
    return i < n ? weight(scores_ + i * LANES + 16 * j, most) : _mm512_setzero_ps();
  }

  // Two keys' values side by side, as the tiles want them: [group of 64 values][pair of keys][64].
  void interleave(int n) {
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36,
                                         4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    const int64_t offset = heads_.value_at + kv_head_ * heads_.value_step;
    const int n_pairs = (n + 1) / 2;
    const bool apart = heads_.value_at > heads_.key_at;  // the next values are not a part of the next keys
    const int64_t next_offset = heads_.value_at + next_head_ * heads_.value_step;
    for (int64_t d = 0; d < width_; d += 32) {
      if (folded_ && apart)
        for (const bf16* row : next_) _mm_prefetch(row + next_offset + d, _MM_HINT_T1);
      const int64_t left = heads_.value_width - d;
      const __mmask32 some = left >= 32 ? 0xffffffffu : left > 0 ? (1u << left) - 1 : 0;
      uint32_t* to = values_ + d / GROUP * (CHUNK / 2 * GROUP) + d % GROUP;
      for (int p = 0; p < n_pairs; p++, to += GROUP) {
        const __m512i a = _mm512_maskz_loadu_epi16(some, rows_[2 * p] + offset + d);
        const __m512i b = _mm512_maskz_loadu_epi16(some, rows_[2 * p + 1] + offset + d);
        _mm512_store_si512(to, _mm512_permutex2var_epi16(a, low, b));
        _mm512_store_si512(to + 16, _mm512_permutex2var_epi16(a, high, b));
      }
    }
  }

  void add_values(int n, bool fresh) {
    interleave(n);
    const int n_pairs = (n + 1) / 2;
    for (int64_t g = 0; g < width_ / GROUP; g++) {
      const char* panel = (const char*)(values_ + g * (CHUNK / 2 * GROUP));
      for (int lane = 0; lane < n_; lane += 6)
        with_constant<1, 6>(std::min(6, n_ - lane), [&](auto M) { value_tile<M>(lane, panel, n_pairs, g, fresh); });
    }
  }

  template <int M>
  void value_tile(int lane, const char* panel, int n_pairs, int64_t g, bool fresh) {
    const char* at[M];
    UNROLL for (int m = 0; m < M; m++) at[m] = (const char*)(weights_ + lane + m);
    __m512 sum[M][4];
    multiply_bf16<M, GROUP, GROUP, 4 * LANES>(at, panel, n_pairs, nullptr, sum);
    UNROLL for (int m = 0; m < M; m++) {
      float* to = split_.out + (lane + m) * width_ + g * GROUP;
      const __m512 keep = _mm512_set1_ps(keep_[lane + m]);
      UNROLL for (int j = 0; j < 4; j++) {
        const __m512 v = fresh ? sum[m][j] : _mm512_fmadd_ps(_mm512_loadu_ps(to + 16 * j), keep, sum[m][j]);
        _mm512_storeu_ps(to + 16 * j, v);
      }
    }
  }

  const Heads heads_;
  const Cache cache_;
  const int64_t width_;  // of an output row, padded
  int64_t n_pairs_;
  Sequence sequence_;
  int64_t kv_head_;
  int n_;  // lanes in use
  bool folded_ = false;
  alignas(64) int32_t last_[LANES];
  alignas(64) float keep_[LANES];
  const bf16 *rows_[CHUNK], *next_[CHUNK];
  Keys after_{};
  int64_t next_head_ = 0;
  uint32_t *queries_, *weights_, *values_;
  float* scores_;
  Partial<LANES> split_, total_;
};
