// Runs every exported kernel over arrays of exactly the size that it may touch, for a build with address and
// undefined-behaviour sanitizers. It looks for bad memory, not for wrong numbers: those are test_ops.py's business.
#include "layers.cpp"

#include <cstdio>

// On the heap and exactly so large, so that one element too many is seen.
template <class T>
struct Array {
  explicit Array(size_t n) : n(n), data((T*)malloc(n * sizeof(T) + (n == 0))) {}
  Array(const Array&) = delete;
  ~Array() { free(data); }
  const size_t n;
  T* const data;
};

static uint32_t state = 1;

static float random_float() {
  state = state * 1664525u + 1013904223u;
  return (float)(state >> 8) / (1 << 23) - 1.f;
}

static void fill(Array<bf16>& a) {
  for (size_t i = 0; i < a.n; i++) a.data[i] = to_bf16(random_float());
}
static void fill(Array<float>& a) {
  for (size_t i = 0; i < a.n; i++) a.data[i] = random_float();
}

static int failures = 0;

static void expect_finite(const Array<float>& a, const char* what) {
  for (size_t i = 0; i < a.n; i++)
    if (!std::isfinite(a.data[i])) {
      fprintf(stderr, "%s: number %zu is not finite\n", what, i);
      failures++;
      return;
    }
}

// Rows of `width` random numbers, padded with zeros to a multiple of 64.
struct PaddedRows {
  PaddedRows(int64_t n, int64_t width) : stride(round_up(width, 64)), x(n * stride) {
    fill(x);
    for (int64_t i = 0; i < n; i++)
      for (int64_t k = width; k < stride; k++) x.data[i * stride + k] = 0;
  }
  const int64_t stride;
  Array<bf16> x;
};

// `n` random matrices of one shape.
struct Weights {
  Weights(int64_t n, int64_t outs, int64_t ins, int32_t kind, int32_t paired = 0)
      : matrix{nullptr, nullptr, nullptr, outs, ins, kind, paired},
        bytes(n * matrix.bytes()),
        scales(kind == INT8 ? n * matrix.n_groups() * GROUP : 0),
        sums(scales.n) {
    matrix.data = bytes.data, matrix.scales = scales.data, matrix.sums = sums.data;
    Array<bf16> w(outs * ins);
    for (int64_t i = 0; i < n; i++) each.push_back(matrix.nth(i));
    for (int64_t i = 0; i < n; i++) {
      fill(w);
      pack(w.data, &each[i]);
    }
  }
  Matrix matrix;
  std::vector<Matrix> each;
  Array<char> bytes;
  Array<float> scales;
  Array<int32_t> sums;
};

// Every task of every phase runs once, and sees all tasks of the phase before it.
static void run_pool(Pool* pool) {
  constexpr int64_t most = 100;
  const std::vector<int64_t> sizes = {0, 1, 2, 3, most, 5, 1};
  for (int turn = 0; turn < 200; turn++) {
    std::vector<std::vector<int>> runs;
    for (int64_t n : sizes) runs.emplace_back(n, 0);
    std::atomic<int> early{0};
    auto task = [&](size_t phase) {
      return [&, phase](int64_t i) {
        if (phase)
          for (int n : runs[phase - 1]) early += n != 1;
        runs[phase][i]++;
      };
    };
    std::vector<decltype(task(0))> tasks;
    for (size_t i = 0; i < sizes.size(); i++) tasks.push_back(task(i));
    Pool::Job& job = pool->open();
    for (size_t i = 0; i < sizes.size(); i++) job.phase(sizes[i], tasks[i]);
    pool->run(job);
    bool once = true;
    for (const auto& phase : runs)
      for (int n : phase) once &= n == 1;
    if (!once || early) {
      fprintf(stderr, "pool: a task ran early, never or twice\n");
      failures++;
      return;
    }
  }
}

static void run_linear(Pool* pool, int32_t kind) {
  const int64_t shapes[][2] = {{1, 2}, {63, 31}, {65, 130}, {200, 64}};
  for (auto [outs, ins] : shapes) {
    Weights w(1, outs, ins, kind);
    for (int64_t n : {0, 1, 6, 7, 12, 13, 31}) {
      PaddedRows x(n, ins);
      Array<float> y(n * outs);
      linear_float(pool, &w.matrix, x.x.data, n, x.stride, y.data, outs);
      expect_finite(y, "linear");
    }
  }
}

static void run_experts(Pool* pool, int32_t kind) {
  const int64_t shapes[][4] = {{5, 72, 41, 2}, {1, 63, 96, 1}, {7, 130, 33, 3}};  // experts, dim, width, of each row
  for (auto [n_experts, dim, width, k] : shapes) {
    Weights gate_up(n_experts, 2 * width, dim, kind, 1), down(n_experts, dim, width, kind);
    for (int64_t n : {0, 1, 7, 40, 140})
      for (bool one_owns_all : {false, true}) {
        PaddedRows x(n, dim);
        Array<int32_t> ids(n * k);
        Array<float> weights(n * k), residual(n * dim);
        fill(weights), fill(residual);
        for (size_t i = 0; i < ids.n; i++)
          ids.data[i] = one_owns_all ? (i % k ? -1 : n_experts - 1) : (int32_t)(i % (n_experts + 2)) - 1;  // some unknown
        experts(pool, x.x.data, x.stride, ids.data, weights.data, residual.data, dim, n, k, n_experts, gate_up.each.data(),
                down.each.data());
        expect_finite(residual, "experts");
        Array<float> results(n * k * dim);
        fill(results);
        add_weighted(pool, results.data, dim, ids.data, weights.data, k, k, residual.data, dim, n);
        expect_finite(residual, "add_weighted");
      }
  }
}

// Sequences over pages, and what a step says of them.
struct Batch {
  Batch(std::vector<std::pair<int64_t, int64_t>> tokens_and_start, int64_t page, int64_t rope)
      : page(page), n_tokens(count(tokens_and_start)), cos(n_tokens * rope / 2), sin(cos.n), slots(n_tokens) {
    fill(cos), fill(sin);
    int64_t row = 0;
    for (auto [n, start] : tokens_and_start) {
      sequences.push_back({row, n, start, (int64_t)pages.size(), 0});
      for (int64_t p = start; p < start + n; p++)
        slots.data[row++] = ((int64_t)pages.size() + p / page) * page + p % page;
      for (int64_t p = 0; p < start + n; p += page) pages.push_back((int32_t)pages.size());
    }
    sequences.shrink_to_fit(), pages.shrink_to_fit();
  }
  static int64_t count(const std::vector<std::pair<int64_t, int64_t>>& all) {
    int64_t n = 0;
    for (auto [tokens, start] : all) n += tokens;
    return n;
  }
  Step step() const {
    return {n_tokens, (int64_t)sequences.size(), page, cos.data, sin.data, slots.data, sequences.data(), pages.data()};
  }
  const int64_t page, n_tokens;
  Array<float> cos, sin;
  Array<int64_t> slots;
  std::vector<Sequence> sequences;
  std::vector<int32_t> pages;
};

static const std::vector<std::vector<std::pair<int64_t, int64_t>>> BATCHES = {
    {}, {{1, 0}}, {{1, 600}}, {{7, 0}}, {{70, 510}}, {{1, 5}, {1, 63}, {3, 64}, {40, 500}, {1, 1100}}};

static void run_attention_alone(Pool* pool) {
  const int64_t shapes[][3] = {{1, 20, 8}, {2, 18, 8}, {3, 20, 8}, {6, 64, 16}, {8, 64, 2}, {17, 130, 2}};  // heads, latent, rotary
  for (auto [n_heads, rank, rope] : shapes)
    for (const auto& sequences : BATCHES)
      for (int64_t page : {1, 16}) {
        const int64_t width = rank + rope;
        Batch batch(sequences, page, rope);
        Array<bf16> cache(batch.pages.size() * page * width), q(batch.n_tokens * n_heads * width);
        Array<bf16> out(batch.n_tokens * n_heads * rank);
        fill(cache), fill(q);
        const Heads heads{1, n_heads, 0, width, 0, rank, width, 0, 0};
        const Step step = batch.step();
        attention(pool, &heads, &step, cache.data, q.data, width, out.data, rank);
      }
}

// Where a sequence's expanded positions end: nowhere, within it or not, and behind it.
static int64_t border(const Sequence& s, int which) {
  const int64_t end = s.start + s.n;
  return which == 0 ? 0 : which == 1 ? (end - 1) / 8 * 8 : which == 2 ? s.start + s.n / 2 : end;
}

static void run_mla(Pool* pool, int32_t kind, bool lora) {
  const int64_t dim = 72, n_heads = 3, q_rank = lora ? 23 : 0, kv_rank = 20, nope = 18, rope = 6, v = 10;
  const int64_t queries = n_heads * (nope + rope);
  Weights down(1, (lora ? q_rank : queries) + kv_rank + rope, dim, kind), q_up(1, lora ? queries : 0, lora ? q_rank : 2, kind);
  Weights key(n_heads, kv_rank, nope, BF16), value(n_heads, v, kv_rank, BF16), out(1, dim, n_heads * v, kind);
  Weights expand_key(n_heads, nope, kv_rank, BF16);
  Array<float> norm(dim), q_norm(q_rank), kv_norm(kv_rank);
  fill(norm), fill(q_norm), fill(kv_norm);
  for (const auto& sequences : BATCHES)
    for (int which : {0, 1, 2, 3}) {
      const int32_t interleaved = which % 2;
      Batch batch(sequences, 8, rope);
      for (Sequence& s : batch.sequences) s.expanded = border(s, which);
      Array<float> residual(batch.n_tokens * dim);
      Array<bf16> cache(batch.pages.size() * 8 * (kv_rank + rope));
      fill(residual), fill(cache);
      const Mla layer{norm.data, lora ? q_norm.data : nullptr, kv_norm.data, down.matrix, q_up.matrix, key.matrix, value.matrix,
                      expand_key.matrix, out.matrix, dim, n_heads, q_rank, kv_rank, nope, rope, v, 1e-6f, 1e-6f, .2f, interleaved};
      const Step step = batch.step();
      mla(pool, &layer, &step, residual.data, dim, cache.data);
      expect_finite(residual, "mla");
    }
}

static void run_gqa(Pool* pool, int32_t kind) {
  const int64_t dim = 72, shapes[][3] = {{2, 3, 12}, {1, 1, 64}, {3, 1, 34}};  // key heads, query heads of each, width
  for (auto [n_kv, group, head_dim] : shapes) {
    const int64_t outs = n_kv * (group + 2) * head_dim, row = 2 * n_kv * head_dim;
    Weights qkv(1, outs, dim, kind), out(1, dim, n_kv * group * head_dim, kind);
    Array<float> norm(dim), bias(outs);
    fill(norm), fill(bias);
    for (const auto& sequences : BATCHES)
      for (bool biased : {false, true}) {
        Batch batch(sequences, 8, head_dim);
        Array<float> residual(batch.n_tokens * dim);
        Array<bf16> cache(batch.pages.size() * 8 * row);
        fill(residual), fill(cache);
        const Gqa layer{norm.data, biased ? bias.data : nullptr, qkv.matrix, out.matrix, dim, n_kv, group, head_dim, 1e-6f, .2f};
        const Step step = batch.step();
        gqa(pool, &layer, &step, residual.data, dim, cache.data);
        expect_finite(residual, "gqa");
      }
  }
}

static void run_norm_and_route(Pool* pool) {
  const int64_t gates[][5] = {{32, 4, 4, 2, 72}, {19, 5, 1, 1, 130}, {1, 1, 1, 1, 63}};
  for (auto [n_experts, top_k, n_groups, top_groups, dim] : gates)
    for (int64_t n : {0, 1, 13}) {
      const int64_t stride = round_up(dim, 64);
      Array<float> residual(n * dim), norm(dim), weight(n_experts * stride), bias(n_experts), weights(n * top_k);
      Array<bf16> x(n * stride);
      Array<int32_t> ids(n * top_k);
      fill(residual), fill(norm), fill(weight), fill(bias);
      const Gate gate{weight.data, bias.data, n_experts, top_k, n_groups, top_groups, 2.5f, 1};
      norm_and_route(pool, residual.data, dim, norm.data, 1e-6f, dim, n, x.data, stride, &gate, ids.data, weights.data, top_k);
      norm_and_route(pool, residual.data, dim, norm.data, 1e-6f, dim, n, x.data, stride, nullptr, nullptr, nullptr, 0);
      expect_finite(weights, "route");
    }
}

static void run_wire(Pool* pool) {
  for (int64_t dim : {1, 24, 128, 137, 300})
    for (int32_t kind : {WIRE_INT8, WIRE_FP8})
      for (int64_t n : {0, 1, 5}) {
        const int64_t row_bytes = WireRows{dim, kind}.row_bytes();
        Array<bf16> x(n * dim), out(n * dim);
        Array<uint8_t> rows(n * row_bytes);
        Array<int64_t> index(n);
        fill(x);
        for (int64_t i = 0; i < n; i++) index.data[i] = n - 1 - i;
        wire_encode(pool, x.data, dim, n, dim, kind, rows.data);
        wire_decode(pool, rows.data, n, index.data, n, dim, kind, out.data, dim);
      }
}

// Runs of whole stripes, the first of them none at all.
static void run_copy_checked() {
  for (int64_t stripes : {4, 15, 16, 17, 33}) {
    Array<uint8_t> from(64 * stripes), to(64 * stripes);
    memset(from.data, 7, from.n);
    const int64_t first = 64 * (stripes / 8), sizes[] = {first, 64 * stripes - first};
    uint8_t* const here[] = {to.data, to.data + first};
    const uint8_t* const there[] = {from.data, from.data + first};
    copy_checked(here, there, sizes, 2);
  }
}

int main() {
  run_copy_checked();
  for (int n_threads : {1, 2}) {
    Pool* pool = pool_new(n_threads);
    for (int32_t kind : {BF16, INT8}) {
      run_linear(pool, kind);
      run_experts(pool, kind);
      run_mla(pool, kind, true);
      run_mla(pool, kind, false);
      run_gqa(pool, kind);
    }
    run_attention_alone(pool);
    run_norm_and_route(pool);
    run_wire(pool);
    run_experts(pool, INT4);
    pool_free(pool);
  }
  for (int n_threads : {1, 2, 5}) {  // five: more threads than some phases have tasks
    Pool* pool = pool_new(n_threads);
    run_pool(pool);
    run_experts(pool, INT8);
    pool_free(pool);
  }
  if (!failures) puts("clean");
  return failures != 0;
}
