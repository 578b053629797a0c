#include <metal_simdgroup>
#include <metal_simdgroup_matrix>

// All that Metal and the emulator of tests/kernels say differently; MLX's own preamble stands before it.
// MLX compiles its kernels without fast math, and these the same way. Nor may the compiler join a
// product and a sum where the text does not.
#if __METAL_VERSION__ >= 320
#pragma METAL fp math_mode(safe)
#pragma METAL fp contract(off)
#endif

#define UNROLL _Pragma("clang loop unroll(full)")

// Memory of a threadgroup.
#define SHARED(type, name, count) threadgroup type name[count]

// Four neighbours at once; they lie at a multiple of their size.
inline uint4 load4(const device uint32_t* from) {
  return *(const device uint4*)from;
}

template <typename T>
inline float4 load4(const device T* from) {
  const vec<T, 4> found = *(const device vec<T, 4>*)from;
  return float4(float(found.x), float(found.y), float(found.z), float(found.w));
}
