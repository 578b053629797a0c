// The gated delta rule over a tree of N <= 32 nodes, parents before children, in closed form (see
// models/forms.py): with gates g summed along a node's path and A_ij = beta_i exp(g_i - g_j) k_i.k_j
// for its proper ancestors j, a node adds delta_i = beta_i (v_i - exp(g_i) S k_i) - sum_j A_ij delta_j
// and puts out exp(g_i) S q_i + sum_j exp(g_i - g_j) q_i.k_j delta_j, where j may be i itself.
//
// A group of threads makes 32 values of one head, a simdgroup 4 of them: their rows of the state lie in
// its registers, read once for all nodes, SIZE / 32 numbers a lane. Lane j holds what node j adds.
constexpr int PARTS = 8, ROWS = 4, EACH = SIZE / 32, MOST = 32;
SHARED(float, totals, MOST);
SHARED(float, of_keys, MOST * MOST);
SHARED(float, of_queries, MOST * MOST);

const int N = v_shape[0], H = v_shape[1], WIDTH = v_shape[2];
const int part = int(simdgroup_index_in_threadgroup), lane = int(thread_index_in_simdgroup);
const int head = int(threadgroup_position_in_grid.x);
const int first = int(threadgroup_position_in_grid.y) * PARTS * ROWS + part * ROWS;
const int queries = head / (H / qk_shape[0]) * 2 * N * SIZE, keys = queries + N * SIZE;

if (part == 0 && lane < N) {
  float sum = 0.0f;
  for (int j = 0; j < N; j++) {
    sum += ancestors[lane * N + j] ? float(gates[j * H + head]) : 0.0f;
  }
  totals[lane] = sum;
  if (first == 0) {
    total[head * N + lane] = sum;
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);
for (int pair = part; pair < N * N; pair += PARTS) {
  const int i = pair / N, j = pair % N;
  float key = 0.0f, query = 0.0f;
  if (ancestors[pair]) {
    UNROLL
    for (int e = 0; e < EACH; e++) {
      const float other = qk[keys + j * SIZE + e * 32 + lane];
      key = fma(qk[keys + i * SIZE + e * 32 + lane], other, key);
      query = fma(qk[queries + i * SIZE + e * 32 + lane], other, query);
    }
    const float decay = exp(totals[i] - totals[j]);
    key = simd_sum(key) * decay * float(beta[i * H + head]);
    query = simd_sum(query) * decay;
  }
  if (lane == 0) {
    of_keys[i * MOST + j] = i == j ? 0.0f : key;
    of_queries[i * MOST + j] = query;
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);

float kept[ROWS][EACH], added[ROWS], given[ROWS];
UNROLL
for (int row = 0; row < ROWS; row++) {
  added[row] = given[row] = 0.0f;
  UNROLL
  for (int e = 0; e < EACH; e++) {
    kept[row][e] = state[(head * WIDTH + first + row) * SIZE + e * 32 + lane];
  }
}
for (int i = 0; i < N; i++) {
  const float grown = exp(totals[i]), weight = float(beta[i * H + head]);
  const bool before = lane < i, upto = lane <= i;
  const float mine = before ? float(of_keys[i * MOST + lane]) : 0.0f;
  const float own = upto ? float(of_queries[i * MOST + lane]) : 0.0f;
  float key[EACH], query[EACH];
  UNROLL
  for (int e = 0; e < EACH; e++) {
    key[e] = qk[keys + i * SIZE + e * 32 + lane];
    query[e] = qk[queries + i * SIZE + e * 32 + lane];
  }
  UNROLL
  for (int row = 0; row < ROWS; row++) {
    float read = 0.0f, out_of = 0.0f;
    UNROLL
    for (int e = 0; e < EACH; e++) {
      read = fma(kept[row][e], key[e], read);
      out_of = fma(kept[row][e], query[e], out_of);
    }
    const float taken = simd_sum(weight * grown * read + mine * added[row]);
    const float value = float(v[(i * H + head) * WIDTH + first + row]);
    added[row] = lane == i ? weight * value - taken : added[row];
    const float sum = simd_sum(grown * out_of + own * added[row]);
    given[row] = lane == i ? sum : given[row];
  }
}
if (lane < N) {
  UNROLL
  for (int row = 0; row < ROWS; row++) {
    out[(lane * H + head) * WIDTH + first + row] = given[row];
    delta[(head * N + lane) * WIDTH + first + row] = added[row];
  }
}
