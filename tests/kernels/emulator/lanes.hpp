// Threads of a group as fibers: each runs until it has to wait for others, in an order that is drawn.
#pragma once
#include <csetjmp>
#include <memory>
#include <stdexcept>
#include <string>
#include <ucontext.h>
#include <vector>

#include "numbers.hpp"

namespace emulated {

constexpr int SIMD = 32, MOST_THREADS = 256;

struct Wrong : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline void must(bool right, const std::string& otherwise) {
  if (!right) throw Wrong(otherwise);
}

struct Random {
  uint64_t state;
  explicit Random(uint64_t seed) : state(seed * 0x9e3779b97f4a7c15u + 1) {}
  uint32_t below(uint32_t n) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return uint32_t(state >> 33) % n;
  }
};

// What a lane shows to those of its simdgroup. Two by turns: the next is shown while others still
// read the one before.
struct Shown {
  float values[4];
};

struct Lane {
  enum State { FRESH, READY, WAITING, DONE } state = FRESH;
  jmp_buf here;
  ucontext_t start;
  std::unique_ptr<char[]> stack;
  int index = 0;
  const char* waits_for = nullptr;
  int waits_at = 0;  // line
  int turn = 0;
  Shown shown[2];
};

struct Group {
  std::vector<Lane> lanes;
  int threads = 0, running = -1;
  jmp_buf scheduler;
  ucontext_t origin;
  void (*body)(void*) = nullptr;
  void* given = nullptr;
  std::string error;
  uint3 place, size;
  int epoch = 0;                // of the whole group: barriers so far
  std::vector<int> own_epochs;  // of its simdgroups
};

inline Group& group() {
  static Group one;
  return one;
}

inline Lane& lane() { return group().lanes[group().running]; }

inline void to_scheduler() {
  if (_setjmp(lane().here) == 0) _longjmp(group().scheduler, 1);
}

// Every lane's whole life: it runs one body after the other.
inline void live() {
  for (;;) {
    Group& all = group();
    try {
      all.body(all.given);
    } catch (const Wrong& error) {
      if (all.error.empty()) {
        all.error = std::string(error.what()) + ", lane " + std::to_string(all.running);
      }
    }
    lane().state = Lane::DONE;
    to_scheduler();
  }
}

inline const char* const BARRIER = "threadgroup_barrier";
inline const char* const OWN_BARRIER = "simdgroup_barrier";

inline void wait_for(const char* what, int line = 0) {
  lane().state = Lane::WAITING;
  lane().waits_for = what;
  lane().waits_at = line;
  to_scheduler();
}

inline void resume(int index) {
  Group& all = group();
  Lane& one = all.lanes[index];
  all.running = index;
  if (_setjmp(all.scheduler) != 0) return;
  if (one.stack) _longjmp(one.here, 1);
  constexpr size_t bytes = 256 * 1024;
  one.stack.reset(new char[bytes]);
  getcontext(&one.start);
  one.start.uc_stack.ss_sp = one.stack.get();
  one.start.uc_stack.ss_size = bytes;
  one.start.uc_link = nullptr;
  makecontext(&one.start, live, 0);
  swapcontext(&all.origin, &one.start);
}

// Lets lanes first..end-1 go on if all of them wait for the same thing.
inline bool released(int first, int end, bool barrier) {
  Group& all = group();
  const char* what = all.lanes[first].waits_for;
  const int line = all.lanes[first].waits_at;
  for (int i = first; i < end; i++) {
    const Lane& one = all.lanes[i];
    if (one.state != Lane::WAITING || one.waits_for != what || one.waits_at != line) {
      return false;
    }
  }
  if ((what == BARRIER) != barrier) return false;
  if (what == BARRIER) all.epoch++;
  if (what == OWN_BARRIER) all.own_epochs[first / SIMD]++;
  for (int i = first; i < end; i++) all.lanes[i].state = Lane::READY;
  return true;
}

// One group of threads from beginning to end. Throws Wrong.
inline void run_group(int threads, void (*body)(void*), void* given, Random& random, bool shuffle) {
  Group& all = group();
  all.threads = threads;
  all.body = body;
  all.given = given;
  all.error.clear();
  all.epoch = 0;
  all.own_epochs.assign(threads / SIMD, 0);
  if (int(all.lanes.size()) < threads) all.lanes.resize(threads);
  std::vector<int> ready;
  for (int i = 0; i < threads; i++) {
    all.lanes[i].state = Lane::READY;
    all.lanes[i].index = i;
    all.lanes[i].turn = 0;
    ready.push_back(i);
  }
  while (!ready.empty()) {
    const size_t pick = shuffle ? random.below(uint32_t(ready.size())) : ready.size() - 1;
    const int index = ready[pick];
    ready[pick] = ready.back();
    ready.pop_back();
    resume(index);
    if (!all.error.empty()) {
      all.lanes.clear();  // those that stand somewhere within are not gone on with
      throw Wrong(all.error);
    }
    const int first = index / SIMD * SIMD;
    if (released(first, first + SIMD, false)) {
      for (int i = first; i < first + SIMD; i++) ready.push_back(i);
    } else if (ready.empty() && released(0, threads, true)) {
      for (int i = 0; i < threads; i++) ready.push_back(i);
    }
  }
  for (int i = 0; i < threads; i++) {
    if (all.lanes[i].state == Lane::WAITING) {
      const std::string text = "not all threads come to the same " +
          std::string(all.lanes[i].waits_for) + ", lane " + std::to_string(i) + " waits";
      all.lanes.clear();
      throw Wrong(text);
    }
  }
}

// What the lanes of this simdgroup show at the same point.
struct Round {
  Lane* first;
  int turn;
  const Shown& of(int lane) const { return first[lane].shown[turn]; }
};

inline Round exchange(const char* what, Shown value) {
  Lane& own = lane();
  const int turn = own.turn;
  own.shown[turn] = value;
  own.turn = 1 - turn;
  wait_for(what);
  return {&group().lanes[own.index / SIMD * SIMD], turn};
}

inline int own_lane() { return lane().index % SIMD; }

}  // namespace emulated

// Of all lanes, in the order of a butterfly, whose two sides are the same to the bit.
inline float simd_sum(float value) {
  const auto round = emulated::exchange("simd_sum", {{value}});
  float sums[emulated::SIMD];
  for (int i = 0; i < emulated::SIMD; i++) sums[i] = round.of(i).values[0];
  for (int half = emulated::SIMD / 2; half; half /= 2) {
    for (int i = 0; i < half; i++) sums[i] += sums[i + half];
  }
  return sums[0];
}

inline float simd_shuffle_xor(float value, int mask) {
  return emulated::exchange("simd_shuffle_xor", {{value}}).of(emulated::own_lane() ^ mask).values[0];
}

inline float simd_shuffle_down(float value, int distance) {
  const auto round = emulated::exchange("simd_shuffle_down", {{value}});
  const int from = emulated::own_lane() + distance;
  return round.of(from < emulated::SIMD ? from : emulated::own_lane()).values[0];
}

inline float simd_shuffle(float value, int from) {
  const auto round = emulated::exchange("simd_shuffle", {{value}});
  emulated::must(from >= 0 && from < emulated::SIMD, "simd_shuffle from no lane");
  return round.of(from).values[0];
}

inline float simd_broadcast(float value, int from) { return simd_shuffle(value, from); }

namespace emulated {

inline float unset() { return float_of(0x7fc0deadu); }

inline void must_be_set(const vec<float, 2>& pair) {
  for (int i = 0; i < 2; i++) must(bits_of(pair[i]) != 0x7fc0deadu, "reads a matrix never set");
}

}  // namespace emulated

// What a lane holds of it; reading what was never set is an error.
template <typename T, int ROWS, int COLUMNS>
struct simdgroup_matrix {
  static_assert(ROWS == 8 && COLUMNS == 8, "matrices are 8x8");
  vec<T, 2> elements{emulated::unset(), emulated::unset()};
  vec<T, 2>& thread_elements() { return elements; }
};

namespace emulated {

// The lane that holds an element's pair of columns.
inline int holder(int row, int column) {
  return row / 4 * 16 + column / 4 * 8 + row % 4 * 2 + column % 4 / 2;
}

}  // namespace emulated

template <typename T>
void simdgroup_multiply_accumulate(
    simdgroup_matrix<T, 8, 8>& out,
    const simdgroup_matrix<T, 8, 8>& left,
    const simdgroup_matrix<T, 8, 8>& right,
    const simdgroup_matrix<T, 8, 8>& sum) {
  using namespace emulated;
  for (const auto* one : {&left, &right, &sum}) must_be_set(one->elements);
  const auto round = exchange(
      "simdgroup_multiply_accumulate",
      {{left.elements.x, left.elements.y, right.elements.x, right.elements.y}});
  const int own = own_lane(), row = own / 16 * 4 + own / 2 % 4;
  const int column = own / 8 % 2 * 4 + own % 2 * 2;
  T first = sum.elements.x, second = sum.elements.y;
  for (int k = 0; k < 8; k++) {
    const T factor = round.of(holder(row, k)).values[k % 2];
    const Shown& other = round.of(holder(k, column));
    first = fma(factor, other.values[2], first);
    second = fma(factor, other.values[3], second);
  }
  out.elements = {first, second};
}

#define threadgroup_barrier(flags) emulated::wait_for(emulated::BARRIER, __LINE__)
#define simdgroup_barrier(flags) emulated::wait_for(emulated::OWN_BARRIER, __LINE__)
