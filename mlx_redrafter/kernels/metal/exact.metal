// y (M, N) = x (M, K) times affine weights w (N, K), BITS each, ROWS rows at a time, every row in the
// order in which MLX's kernel for a single row adds (qmv, kernels/quantized.h): a lane takes the
// inputs of PACKS words of every 32 x PACKS words; inputs are scaled down instead of shifting weights.
// What ROWS is changes nothing in a row. ONCE: products are joined with the sums that follow.
constexpr int PARTS = 2, COLUMNS = 4;
constexpr int PACK = 32 / BITS, EACH = PACKS * PACK;

const int M = x_shape[0], K = x_shape[1], N = w_shape[0];
const int words = w_shape[1], groups = scales_shape[1], group = K / groups;
const int part = int(simdgroup_index_in_threadgroup), lane = int(thread_index_in_simdgroup);
const int n0 = (int(threadgroup_position_in_grid.x) * PARTS + part) * COLUMNS;
const int m0 = int(threadgroup_position_in_grid.y) * ROWS;

float sums[ROWS][COLUMNS];
UNROLL
for (int m = 0; m < ROWS; m++) {
  UNROLL
  for (int t = 0; t < COLUMNS; t++) {
    sums[m][t] = 0.0f;
  }
}

for (int k = lane * EACH; k < K; k += 32 * EACH) {  // K ends between two lanes
  uint packed[COLUMNS][PACKS];
  float scale[COLUMNS], bias[COLUMNS];
  UNROLL
  for (int t = 0; t < COLUMNS; t++) {
    const uint row = uint(min(n0 + t, N - 1));
    UNROLL
    for (int i = 0; i < PACKS; i++) {
      packed[t][i] = w[row * uint(words) + uint(k / PACK + i)];
    }
    scale[t] = float(scales[row * uint(groups) + uint(k / group)]);
    bias[t] = float(biases[row * uint(groups) + uint(k / group)]);
  }
  UNROLL
  for (int m = 0; m < ROWS; m++) {
    const int from = min(m0 + m, M - 1) * K + k;
    float given[EACH], total = 0.0f;
    UNROLL
    for (int i = 0; i < EACH; i += 4) {
      const float4 four = load4(x + from + i);
      if (BITS == 4) {
        total += four.x + four.y + four.z + four.w;
        given[i] = four.x;
        given[i + 1] = four.y / 16.0f;
        given[i + 2] = four.z / 256.0f;
        given[i + 3] = four.w / 4096.0f;
      } else {
        UNROLL
        for (int j = 0; j < 4; j++) {
          total += four[j];
          given[i + j] = four[j];
        }
      }
    }
    UNROLL
    for (int t = 0; t < COLUMNS; t++) {
      float found = 0.0f;
      UNROLL
      for (int i = 0; i < EACH; i += 4) {
        if (BITS == 4) {
          const uint four = packed[t][i / 8] >> (i % 8 * 4);
          float sum = given[i] * float(four & 0x000fu);
          if (ONCE) {  // the first two products as clang joins them
            sum = fma(given[i], float(four & 0x000fu), given[i + 1] * float(four & 0x00f0u));
          } else {
            sum = sum + given[i + 1] * float(four & 0x00f0u);
          }
          sum = joined<ONCE>(given[i + 2], float(four & 0x0f00u), sum);
          found += joined<ONCE>(given[i + 3], float(four & 0xf000u), sum);
        } else {
          UNROLL
          for (int j = 0; j < 4; j++) {
            found = joined<ONCE>(given[i + j], float(packed[t][i / 4] >> (8 * j) & 0xffu), found);
          }
        }
      }
      sums[m][t] += joined<ONCE>(scale[t], found, total * bias[t]);
    }
  }
}

UNROLL
for (int m = 0; m < ROWS; m++) {
  UNROLL
  for (int t = 0; t < COLUMNS; t++) {
    const float sum = simd_sum(sums[m][t]);
    if (lane == 0 && m0 + m < M && n0 + t < N) {
      y[(m0 + m) * N + n0 + t] = T(sum);
    }
  }
}
