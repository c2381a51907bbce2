// Latent attention in the expanded form. The absorbed form multiplies queries with the latents themselves: 2 * rank + rope
// multiplications for each head and pair of positions. Expanding the latents into every head's keys and values costs
// rank * (nope + v) for each key, once for all queries of a chunk, and then a pair costs only nope + rope + v. With many
// queries that is far less: for DeepSeek-V3's sizes 320 instead of 1,088.
//
// The two forms round differently, so a row's form must not depend on how a prompt is cut or what is beside it. A sequence
// says which of its positions are expanded: those of the prompt's whole pages, however few of them a step has. All others, a
// prompt's last tokens and all new ones, are absorbed, also when they are computed a second time.
//
// Keys and values of some heads at a time stand in scratch memory, a plane for each head, in which sequences begin at a
// multiple of CHUNK keys. So it reads like a cache of grouped-query attention with one query head to each key head:
//
//     plane of head 0:  | sequence 0: key 0 | key 1 | ... | (up to a CHUNK) | sequence 1: key 0 | ...
//     plane of head 1:  | ...                  '- | nope numbers | rope numbers | v numbers | pad |
#pragma once
#include <vector>

#include "attention.h"
#include "phases.h"
#include "pool.h"
#include "tiles.h"

constexpr int64_t SCRATCH_BYTES = 32 << 20;  // of a pass, or what one head needs
constexpr int64_t EXPAND_KEYS = 128;         // keys of a task: enough to make much of a head's matrices

// The heads of a latent layer. key, value: n matrices each, latent -> nope and latent -> v; key.outs is 0 where the layer has
// no expanded form.
struct LatentHeads {
  const Matrix &key, &value;
  int64_t n, rank, nope, rope, v;
};

// A step's rows by form. Absorbed rows are numbered anew, without gaps.
struct Forms {
  std::vector<Sequence> expanded, absorbed;  // rows of `expanded` are the step's
  std::vector<int64_t> row_of;               // absorbed row -> the step's
  std::vector<int64_t> absorbed_row;         // the step's row -> absorbed row, or -1

  Forms(const Step& step, bool has_expanded) : absorbed_row(step.n_tokens, -1) {
    for (int64_t i = 0; i < step.n_sequences; i++) {
      Sequence s = step.sequences[i];
      const int64_t n = has_expanded ? std::clamp<int64_t>(s.expanded - s.start, 0, s.n) : 0;
      if (n) expanded.push_back({s.row, n, s.start, s.first_page, s.expanded});
      if (n == s.n) continue;
      absorbed.push_back({(int64_t)row_of.size(), s.n - n, s.start + n, s.first_page, 0});
      for (int64_t row = s.row + n; row < s.row + s.n; row++) {
        absorbed_row[row] = (int64_t)row_of.size();
        row_of.push_back(row);
      }
    }
  }

  int64_t n_absorbed() const { return (int64_t)row_of.size(); }

  static Step part(const Step& step, const std::vector<Sequence>& sequences) {
    Step s = step;
    s.n_sequences = (int64_t)sequences.size(), s.sequences = sequences.data();
    return s;
  }
};

// Keys and values of some heads of all sequences of a step.
class ExpandedKeys {
 public:
  ExpandedKeys(const LatentHeads& heads, const Step& step, const Cache& latents)
      : heads_(heads), step_(step), latents_(latents), width_(round_up(heads.nope + heads.rope + heads.v, 32)) {
    for (int64_t i = 0; i < step.n_sequences; i++) {
      Sequence s = step.sequences[i];
      for (int64_t key = 0; key < s.start + s.n; key += EXPAND_KEYS)
        blocks_.push_back({i, key, std::min(EXPAND_KEYS, s.start + s.n - key), n_keys_ + key});
      s.first_page = n_keys_ / CHUNK;
      sequences_.push_back(s);
      n_keys_ += round_up(s.start + s.n, CHUNK);
    }
    for (int64_t i = 0; i < n_keys_ / CHUNK; i++) pages_.push_back((int32_t)i);
    most_heads_ = std::clamp<int64_t>(SCRATCH_BYTES / plane_bytes(), 1, heads.n);
  }

  // Heads that fit the scratch memory at a time.
  int64_t most_heads() const { return most_heads_; }
  int64_t bytes() const { return most_heads_ * plane_bytes(); }
  int64_t n_tasks(int64_t n_heads) const { return n_heads * (int64_t)blocks_.size(); }

  // Begin a pass over the heads first..
  void begin(int64_t first_head, bf16* scratch) { first_head_ = first_head, scratch_ = scratch; }

  // One block of keys of one head: task / blocks is the head of the pass.
  void expand(int64_t task) const {
    const int64_t n_blocks = (int64_t)blocks_.size(), head = task / n_blocks;
    const Block& b = blocks_[task % n_blocks];
    const int64_t row_width = heads_.rank + heads_.rope;
    const bf16* latents[EXPAND_KEYS];
    for (int64_t i = 0; i < b.n; i++) latents[i] = latents_.row(step_.sequences[b.sequence], b.key + i, row_width);
    bf16* to = scratch_ + (head * n_keys_ + b.place) * width_;
    multiply(heads_.key.nth(first_head_ + head), latents, b.n, to);
    multiply(heads_.value.nth(first_head_ + head), latents, b.n, to + heads_.nope + heads_.rope);
    for (int64_t i = 0; i < b.n; i++) memcpy(to + i * width_ + heads_.nope, latents[i] + heads_.rank, heads_.rope * sizeof(bf16));
  }

  // How attention sees n heads of a pass.
  Heads heads(int64_t n) const {
    const int64_t qk = heads_.nope + heads_.rope, plane = n_keys_ * width_;
    return {n, 1, 0, qk, qk, heads_.v, width_, plane, plane};
  }
  Step step() const {
    Step s = Forms::part(step_, sequences_);
    s.page = CHUNK, s.pages = pages_.data();
    return s;
  }

 private:
  struct Block {
    int64_t sequence, key, n, place;  // place: of the first key in a plane
  };

  int64_t plane_bytes() const { return n_keys_ * width_ * (int64_t)sizeof(bf16); }

  void multiply(const Matrix& m, const bf16* const* latents, int64_t n, bf16* to) const {
    for (int64_t g = 0; g < m.n_groups(); g++)
      multiply_group<BF16>(
          m, g, n, m.group(std::min(g + 1, m.n_groups() - 1)),
          [&](int64_t i, int count, Rows& rows) {
            for (int j = 0; j < count; j++) rows.at[j] = (const char*)latents[i + j];
          },
          [&](int64_t i) { return StoreBf16{to + i * width_, width_, m.outs}; });
  }

  const LatentHeads heads_;
  const Step step_;
  const Cache latents_;
  const int64_t width_;  // of a key and its value; numbers
  int64_t n_keys_ = 0, most_heads_ = 0, first_head_ = 0;
  std::vector<Block> blocks_;
  std::vector<Sequence> sequences_;
  std::vector<int32_t> pages_;
  bf16* scratch_ = nullptr;
};

// Attention of rows whose queries are heads, nope numbers and then rope numbers; the values of `rows.out` are those of the heads.
static void attend_expanded(Pool& pool, const LatentHeads& latent_heads, const Step& part, const bf16* cache,
                            const QueryRows& rows) {
  static Buffer scratch, partials;
  ExpandedKeys keys(latent_heads, part, Cache{cache, part.page, part.pages});
  bf16* at = (bf16*)scratch.get(keys.bytes());
  const Step step = keys.step();
  for (int64_t first = 0; first < latent_heads.n; first += keys.most_heads()) {
    const int64_t n = std::min(keys.most_heads(), latent_heads.n - first);
    keys.begin(first, at);
    const Heads heads = keys.heads(n);
    const QueryRows mine{rows.q + first * rows.q_head, rows.q_token, rows.q_head, rows.out + first * rows.out_head,
                         rows.out_token, rows.out_head};
    with_lanes(heads, step, [&](auto lanes) {
      AttentionPhases<lanes> attention{heads, step, Cache{at, step.page, step.pages}, mine, {}, partials};
      attention.plan(pool.n_threads());
      auto expand = [&](int64_t task) { keys.expand(task); };
      auto compute = [&](int64_t i) { attention.compute(i); };
      auto fold = [&](int64_t i) { attention.fold(i); };
      Pool::Job& job = pool.open();
      job.phase(keys.n_tasks(n), expand);
      job.phase(attention.tasks.size(), compute);
      if (attention.partials) job.phase(attention.tasks.size(), fold);
      pool.run(job);
    });
  }
}
