// A cblas_sgemm whose result for one row does not depend on how many rows are multiplied with it.
//
// Why it exists: MLX on the CPU calls cblas_sgemm. The Linux wheel carries netlib's reference BLAS:
// its bits do not change with the number of rows M, but it runs at 3 GFLOP/s on one thread, so that
// verifying N drafted tokens costs N decode steps. OpenBLAS is fast, but sums in another order for
// another M: a verify pass rounds differently from plain decoding and may choose another token.
// Here every output keeps the order of the reference, one running sum over k, and the speed comes
// from computing many outputs side by side: columns in vector lanes, rows in registers, panels in
// threads. The wheel's reference multiplies and then adds on x86-64, but fuses the two on aarch64:
// the build says -ffp-contract=off on the one and =fast on the other.
//   A W^T  (x @ W.T, Q @ K^T):  sum = 0; sum += A[m][l] * W[n][l]; C = alpha * sum + beta * C
//   A B    (P @ V):             C = beta * C; C += (alpha * A[m][l]) * B[l][n]
// A transposed A occurs in training only and is copied first.
#include <algorithm>
#include <cstdlib>
#include <vector>

#include "helper_threads.hpp"

namespace {

// LANES floats fill a vector register; MAX_ROWS x 2 running sums fit in the register file.
#if defined(__AVX512F__)
constexpr int LANES = 16, MAX_ROWS = 8;
#elif defined(__AVX__)
constexpr int LANES = 8, MAX_ROWS = 4;
#elif defined(__aarch64__)
constexpr int LANES = 4, MAX_ROWS = 8;
#else
constexpr int LANES = 4, MAX_ROWS = 4;
#endif
constexpr int PANEL = 2 * LANES;    // output columns computed together
constexpr int DEPTH = 128;          // PANEL x DEPTH weights stay in the L1 cache
constexpr int BLOCK_ROWS = 128;     // rows that share one packed panel
constexpr int PREFETCH = 64;        // floats read ahead in each weight row
constexpr long THREADED = 1 << 18;  // multiply-adds from which a second thread pays

typedef float Vec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int Lanes __attribute__((vector_size(LANES * 4)));
inline Vec& vec(float* p) { return *reinterpret_cast<Vec*>(p); }
inline const Vec& vec(const float* p) { return *reinterpret_cast<const Vec*>(p); }

// C (m x n) = alpha A (m x k) B + beta C, row-major; with `dot`, B is stored n x k.
struct Gemm {
  bool dot;
  long m, n, k;
  float alpha;
  const float* a;
  long lda;
  const float* b;
  long ldb;
  float beta;
  float* c;
  long ldc;
  long group = 0, columns = 0, tickets = 0;  // a ticket is BLOCK_ROWS rows x `group` columns
};

// One stage of a LANES x LANES transpose in registers: swaps off-diagonal STEP x STEP blocks.
template <int STEP>
inline void exchange(Vec* v) {
  if (STEP >= LANES) return;
  Lanes low, high;
  for (int i = 0; i < LANES; ++i) {
    low[i] = i & STEP ? LANES + i - STEP : i;
    high[i] = i & STEP ? LANES + i : i + STEP;
  }
  for (int i = 0; i + STEP < LANES; ++i) {
    if (i & STEP) continue;
    const Vec x = v[i], y = v[i + STEP];
    v[i] = __builtin_shuffle(x, y, low);
    v[i + STEP] = __builtin_shuffle(x, y, high);
  }
}

// w (depth x PANEL) = B[n0 : n0 + PANEL, k0 : k0 + depth]^T; past the edge the last row again.
void pack_transposed(const Gemm& g, long n0, long cols, long k0, long depth, float* w) {
  for (int half = 0; half < PANEL; half += LANES, w += LANES) {
    const float* rows[LANES];
    for (int i = 0; i < LANES; ++i)
      rows[i] = g.b + (n0 + std::min<long>(half + i, cols - 1)) * g.ldb + k0;
    long l = 0;
    for (; l + LANES <= depth; l += LANES) {
      Vec v[LANES];
      for (int i = 0; i < LANES; ++i) {
        v[i] = vec(rows[i] + l);
        __builtin_prefetch(rows[i] + l + PREFETCH);
      }
      exchange<1>(v), exchange<2>(v), exchange<4>(v), exchange<8>(v);
      for (int i = 0; i < LANES; ++i) vec(w + (l + i) * PANEL) = v[i];
    }
    for (; l < depth; ++l)
      for (int i = 0; i < LANES; ++i) w[l * PANEL + i] = rows[i][l];
  }
}

void pack_rows(const Gemm& g, long n0, long cols, long k0, long depth, float* w) {
  for (long l = 0; l < depth; ++l, w += PANEL) {
    const float* row = g.b + (k0 + l) * g.ldb + n0;
    std::fill(std::copy(row, row + cols, w), w + PANEL, 0.0f);
  }
}

// sums (ROWS x PANEL) += a (ROWS x depth) w (depth x PANEL), one step of depth after the other.
template <int ROWS>
void multiply(const float* a, long lda, const float* w, long ldw, long depth, float* sums) {
  Vec s[ROWS][2];
  for (int r = 0; r < ROWS; ++r)
    for (int h = 0; h < 2; ++h) s[r][h] = vec(sums + r * PANEL + h * LANES);
  for (long l = 0; l < depth; ++l, w += ldw) {
    const Vec w0 = vec(w), w1 = vec(w + LANES);
    for (int r = 0; r < ROWS; ++r) {
      const float x = a[r * lda + l];
      s[r][0] += w0 * x;
      s[r][1] += w1 * x;
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int h = 0; h < 2; ++h) vec(sums + r * PANEL + h * LANES) = s[r][h];
}

constexpr decltype(&multiply<1>) MULTIPLY[] = {nullptr,     multiply<1>, multiply<2>,
                                               multiply<3>, multiply<4>, multiply<5>,
                                               multiply<6>, multiply<7>, multiply<8>};

void run_panel(const Gemm& g, long m0, long rows, long n0) {
  alignas(64) static thread_local float packed[DEPTH * PANEL];
  alignas(64) static thread_local float sums[BLOCK_ROWS * PANEL];
  const long cols = std::min<long>(PANEL, g.n - n0);
  float* const c = g.c + m0 * g.ldc + n0;
  std::fill(sums, sums + rows * PANEL, 0.0f);
  if (!g.dot && g.beta != 0)
    for (long r = 0; r < rows; ++r)
      for (long i = 0; i < cols; ++i) sums[r * PANEL + i] = g.beta * c[r * g.ldc + i];
  const bool in_place = !g.dot && cols == PANEL && rows <= MAX_ROWS;
  for (long k0 = 0; k0 < g.k; k0 += DEPTH) {
    const long depth = std::min<long>(DEPTH, g.k - k0);
    if (g.dot)
      pack_transposed(g, n0, cols, k0, depth, packed);
    else if (!in_place)
      pack_rows(g, n0, cols, k0, depth, packed);
    const float* const w = in_place ? g.b + k0 * g.ldb + n0 : packed;
    const long ldw = in_place ? g.ldb : PANEL;
    for (long r = 0; r < rows; r += MAX_ROWS)
      MULTIPLY[std::min<long>(MAX_ROWS, rows - r)](g.a + (m0 + r) * g.lda + k0, g.lda, w, ldw,
                                                   depth, sums + r * PANEL);
  }
  for (long r = 0; r < rows; ++r)
    for (long i = 0; i < cols; ++i) {
      const float sum = sums[r * PANEL + i];
      float& out = c[r * g.ldc + i];
      out = !g.dot ? sum : g.beta == 0 ? g.alpha * sum : g.alpha * sum + g.beta * out;
    }
}

void run_ticket(const Gemm& g, long ticket) {
  const long m0 = ticket / g.columns * BLOCK_ROWS, rows = std::min<long>(BLOCK_ROWS, g.m - m0);
  const long n0 = ticket % g.columns * g.group, n1 = std::min(g.n, n0 + g.group);
  for (long n = n0; n < n1; n += PANEL) run_panel(g, m0, rows, n);
}

int thread_count() {
  const char* text = std::getenv("OMP_NUM_THREADS");
  if (const int n = text ? std::atoi(text) : 0; n > 0) return n;
  cpu_set_t set;
  return sched_getaffinity(0, sizeof set, &set) == 0 ? std::min(CPU_COUNT(&set), 16) : 1;
}

// Never deleted: its threads may still sleep in it while the process exits.
std::atomic<HelperThreads*> helpers{nullptr};

bool run_threaded(const Gemm& g, int threads) {
  static std::mutex creation;
  if (!helpers) {
    const std::lock_guard<std::mutex> lock(creation);
    if (!helpers) {
      helpers = new HelperThreads(threads);
      // Threads do not survive fork(): a child starts its own.
      pthread_atfork(nullptr, nullptr, [] { helpers = nullptr; });
    }
  }
  return helpers.load()->run([&g](long ticket) { run_ticket(g, ticket); }, g.tickets);
}

void run(Gemm& g) {
  static const int threads = thread_count();
  const long panels = (g.n + PANEL - 1) / PANEL;
  g.group = PANEL * std::max(1L, panels / (threads * 8));
  g.columns = (g.n + g.group - 1) / g.group;
  g.tickets = g.columns * ((g.m + BLOCK_ROWS - 1) / BLOCK_ROWS);
  const bool large = threads > 1 && g.tickets > 1 && g.m * g.n * g.k > THREADED;
  if (large && run_threaded(g, threads)) return;
  for (long t = 0; t < g.tickets; ++t) run_ticket(g, t);
}

constexpr int ROW_MAJOR = 101, NO_TRANS = 111;

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void cblas_sgemm(int order, int ta, int tb, int m, int n, int k, float alpha, const float* a,
                        int lda, const float* b, int ldb, float beta, float* c, int ldc) {
  if (order != ROW_MAJOR)  // the transposed product is row-major
    return cblas_sgemm(ROW_MAJOR, tb, ta, n, m, k, alpha, b, ldb, a, lda, beta, c, ldc);
  if (m <= 0 || n <= 0) return;
  // MLX calls one row with unit strides "transposed"; it must round as every other row does.
  if (ta != NO_TRANS && m == 1 && lda == 1) ta = NO_TRANS;
  Gemm g{tb != NO_TRANS, m, n, alpha == 0 ? 0 : k, alpha, a, lda, b, ldb, beta, c, ldc};
  std::vector<float> copy;
  if (ta != NO_TRANS || (!g.dot && alpha != 1)) {
    copy.resize(g.m * g.k);
    constexpr long TILE = 32;  // both sides of a tile stay in the L1 cache
    for (long i0 = 0; i0 < g.m; i0 += TILE)
      for (long l0 = 0; l0 < g.k; l0 += TILE)
        for (long i = i0; i < std::min(g.m, i0 + TILE); ++i)
          for (long l = l0; l < std::min(g.k, l0 + TILE); ++l) {
            const float x = ta != NO_TRANS ? a[l * lda + i] : a[i * lda + l];
            copy[i * g.k + l] = g.dot ? x : alpha * x;
          }
    g.a = copy.data(), g.lda = g.k;
  }
  run(g);
}
