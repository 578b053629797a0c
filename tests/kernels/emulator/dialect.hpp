// What the kernels' own dialect.h says on Metal; included last, as it takes common words away.
#pragma once
#include "run.hpp"

#define SHARED(type, name, count) const auto name = emulated::shared<type>(__LINE__, count)
#define UNROLL
#define device
#define constant const
#define thread
#define thread_index_in_simdgroup uint(emulated::own_lane())
#define simdgroup_index_in_threadgroup uint(emulated::lane().index / emulated::SIMD)
#define threadgroup_position_in_grid emulated::group().place

template <typename T>
vec<float, 4> load4(const emulated::Reader<T>& from) {
  emulated::must(from.first % 4 == 0, "four at once from no multiple of four");
  return {float(from[0]), float(from[1]), float(from[2]), float(from[3])};
}

inline uint4 load4(const emulated::Reader<uint32_t>& from) {
  emulated::must(from.first % 4 == 0, "four at once from no multiple of four");
  return {from[0], from[1], from[2], from[3]};
}
