// The emulator includes this file unchanged.

// What a lane holds of an 8x8 matrix: two neighbours of a row (as MLX's steel/gemm/mma.h).
inline int row_of(uint lane) {
  return int(lane / 16) * 4 + int(lane / 2) % 4;
}

inline int column_of(uint lane) {
  return int(lane / 8) % 2 * 4 + int(lane) % 2 * 2;
}

// a * b + c, 8x8 each, of what every lane holds.
inline float2 multiplied(float2 a, float2 b, float2 c) {
  simdgroup_matrix<float, 8, 8> left, right, sum;
  reinterpret_cast<thread float2&>(left.thread_elements()) = a;
  reinterpret_cast<thread float2&>(right.thread_elements()) = b;
  reinterpret_cast<thread float2&>(sum.thread_elements()) = c;
  simdgroup_multiply_accumulate(sum, left, right, sum);
  return reinterpret_cast<thread float2&>(sum.thread_elements());
}

// a * b + c, rounded once or twice.
template <bool ONCE>
inline float joined(float a, float b, float c) {
  return ONCE ? fma(a, b, c) : a * b + c;
}
