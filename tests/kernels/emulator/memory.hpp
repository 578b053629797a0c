// Memory that is checked: ends, alignment, what was never written, and races between barriers.
#pragma once
#include <map>

#include "lanes.hpp"

namespace emulated {

constexpr size_t MOST_SHARED = 32 * 1024;

struct Array {
  std::string name, type;
  std::vector<int> shape;
  std::vector<char> bytes;
  size_t count = 1;
  std::vector<char> written;  // of an output: whether an element was
};

inline std::string spot(const Array& array, long at) {
  return array.name + "[" + std::to_string(at) + "] of " + std::to_string(array.count);
}

// What a kernel reads: never beyond its ends.
template <typename T>
struct Reader {
  const Array* array;
  long first = 0;
  Reader operator+(long offset) const { return {array, first + offset}; }
  T operator[](long at) const {
    at += first;
    must(at >= 0 && at < long(array->count), "reads past the end: " + spot(*array, at));
    T value;
    std::memcpy(&value, array->bytes.data() + at * sizeof(T), sizeof(T));
    return value;
  }
  T operator*() const { return (*this)[0]; }
};

// What a kernel writes: every element once, and reads nothing of it.
template <typename T>
struct Writer {
  Array* array;
  long first = 0;
  struct Element {
    Array* array;
    long at;
    void operator=(T value) const {
      must(at >= 0 && at < long(array->count), "writes past the end: " + spot(*array, at));
      must(!array->written[at], "writes twice: " + spot(*array, at));
      array->written[at] = 1;
      std::memcpy(array->bytes.data() + at * sizeof(T), &value, sizeof(T));
    }
  };
  Writer operator+(long offset) const { return {array, first + offset}; }
  Element operator[](long at) const { return {array, first + at}; }
};

struct Access {
  int thread, own_epoch;
};

// One word of a group's memory, and who came to it since the last barrier.
struct Word {
  bool set = false;
  int epoch = -1;
  std::vector<Access> readers, writers;
};

struct Block {
  std::vector<char> bytes;
  std::vector<Word> words;
};

// A group's memory, by the line that declares it.
inline std::map<int, Block>& blocks() {
  static std::map<int, Block> all;
  return all;
}

inline bool races(const Access& before) {
  const Group& all = group();
  const int own = all.running;
  if (before.thread == own) return false;
  return before.thread / SIMD != own / SIMD || before.own_epoch == all.own_epochs[own / SIMD];
}

template <typename T>
struct Shared {
  Block* block;
  struct Element {
    Block* block;
    long at;
    Word& visited(bool writing) const {
      must(at >= 0 && at < long(block->words.size()),
           "past the end of a group's memory: " + std::to_string(at));
      Word& word = block->words[at];
      const Group& all = group();
      if (word.epoch != all.epoch) {
        word.epoch = all.epoch;
        word.readers.clear();
        word.writers.clear();
      }
      for (const Access& one : word.writers) {
        must(!races(one), "two threads at one word without a barrier: " + std::to_string(at));
      }
      if (writing) {
        for (const Access& one : word.readers) {
          must(!races(one), "written before others have read: " + std::to_string(at));
        }
      }
      auto& list = writing ? word.writers : word.readers;
      list.push_back({all.running, all.own_epochs[all.running / SIMD]});
      return word;
    }
    operator T() const {
      must(visited(false).set, "reads what was never written: " + std::to_string(at));
      T value;
      std::memcpy(&value, block->bytes.data() + at * sizeof(T), sizeof(T));
      return value;
    }
    void operator=(T value) const {
      visited(true).set = true;
      std::memcpy(block->bytes.data() + at * sizeof(T), &value, sizeof(T));
    }
    void operator=(const Element& other) const { *this = T(other); }
    void operator+=(T value) const { *this = T(*this) + value; }
  };
  Element operator[](long at) const { return {block, at}; }
};

template <typename T>
Shared<T> shared(int line, long count) {
  Block& block = blocks()[line];
  if (block.words.empty()) {
    block.bytes.resize(count * sizeof(T));
    block.words.resize(count);
    size_t bytes = 0;
    for (const auto& [_, one] : blocks()) bytes += one.bytes.size();
    must(bytes <= MOST_SHARED, std::to_string(bytes) + " bytes of a group's memory are too many");
  }
  return {&block};
}

}  // namespace emulated
