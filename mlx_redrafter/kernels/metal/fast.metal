// y (M, N) = x (M, K) times affine weights w (N, K), BITS each, for the rows of TILES 8x8 matrices.
//
// A group of threads makes 32 columns of y. Its 8 simdgroups take chunks of K in turn and add up what
// they found at the end. A lane reads 16 bytes of a weight's row at a time; the 4 lanes of a row lie
// side by side in K, and x is read in the order in which that brings the weights. So every word is
// read once, straight into the matrix, and none goes through the memory of the group.
constexpr int PARTS = 8, COLUMNS = 4;
constexpr int EACH = 128 / BITS, CHUNK = 4 * EACH;  // weights in 16 bytes, and of four lanes
SHARED(float, held, PARTS * COLUMNS * TILES * 64);

const int M = x_shape[0], K = x_shape[1], N = w_shape[0];
const int words = w_shape[1], groups = scales_shape[1], group = K / groups;
const int part = int(simdgroup_index_in_threadgroup), lane = int(thread_index_in_simdgroup);
const int r = row_of(lane), c = column_of(lane);
const int n0 = int(threadgroup_position_in_grid.x) * COLUMNS * 8;
const int m0 = int(threadgroup_position_in_grid.y) * TILES * 8;

float2 sums[COLUMNS][TILES];
UNROLL
for (int t = 0; t < COLUMNS; t++) {
  UNROLL
  for (int u = 0; u < TILES; u++) {
    sums[t][u] = float2(0.0f, 0.0f);
  }
}

for (int k0 = part * CHUNK; k0 < K; k0 += PARTS * CHUNK) {
  const int mine = k0 + c / 2 * EACH;  // of K; K ends between two lanes, never within one
  uint4 packed[COLUMNS];
  float scale[COLUMNS], bias[COLUMNS];
  UNROLL
  for (int t = 0; t < COLUMNS; t++) {
    const uint row = uint(min(n0 + 8 * t + r, N - 1));
    const uint of_group = row * uint(groups) + uint(mine / group);
    packed[t] = mine < K ? load4(w + row * uint(words) + uint(mine / (32 / BITS))) : uint4(0, 0, 0, 0);
    scale[t] = mine < K ? float(scales[of_group]) : 0.0f;
    bias[t] = mine < K ? float(biases[of_group]) : 0.0f;
  }
  UNROLL
  for (int i = 0; i < EACH / 8; i++) {  // eight weights of every lane
    const int k = k0 + r / 2 * EACH + 8 * i + r % 2 * 4;
    float4 left[TILES], right[TILES];
    UNROLL
    for (int u = 0; u < TILES; u++) {
      const int m = m0 + 8 * u + c;
      left[u] = k < K ? load4(x + min(m, M - 1) * K + k) : float4(0, 0, 0, 0);
      right[u] = k < K ? load4(x + min(m + 1, M - 1) * K + k) : float4(0, 0, 0, 0);
    }
    UNROLL
    for (int s = 0; s < 4; s++) {  // weights s and s + 4 of them
      UNROLL
      for (int t = 0; t < COLUMNS; t++) {
        const uint low = BITS == 4 ? packed[t][i] >> (4 * s) : packed[t][2 * i % 4] >> (8 * s);
        const uint high =
            BITS == 4 ? packed[t][i] >> (4 * s + 16) : packed[t][(2 * i + 1) % 4] >> (8 * s);
        constexpr uint MASK = (1u << BITS) - 1;
        const float2 weights = float2(
            fma(float(low & MASK), scale[t], bias[t]), fma(float(high & MASK), scale[t], bias[t]));
        UNROLL
        for (int u = 0; u < TILES; u++) {
          sums[t][u] = multiplied(weights, float2(left[u][s], right[u][s]), sums[t][u]);
        }
      }
    }
  }
}

UNROLL
for (int t = 0; t < COLUMNS; t++) {
  UNROLL
  for (int u = 0; u < TILES; u++) {
    const int at = ((part * COLUMNS + t) * TILES + u) * 64 + r * 8 + c;
    held[at] = sums[t][u].x;
    held[at + 1] = sums[t][u].y;
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);
for (int i = part * 32 + lane; i < COLUMNS * TILES * 64; i += PARTS * 32) {
  const int column = i % (COLUMNS * 8), row = i / (COLUMNS * 8);
  const int at = (column / 8 * TILES + row / 8) * 64 + column % 8 * 8 + row % 8;
  float sum = 0.0f;
  for (int p = 0; p < PARTS; p++) {
    sum += held[p * COLUMNS * TILES * 64 + at];
  }
  if (m0 + row < M && n0 + column < N) {
    y[(m0 + row) * N + n0 + column] = T(sum);
  }
}
