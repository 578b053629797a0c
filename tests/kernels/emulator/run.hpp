// Reads cases, runs each in several orders of its lanes, and writes what came out.
#pragma once
#include <cstdio>
#include <functional>
#include <iostream>
#include <sstream>

#include "memory.hpp"

namespace emulated {

struct Case {
  std::string kernel;
  int orders = 1;
  int grid[3], size[3];
  std::vector<Array> inputs, outputs;
};

using Body = void (*)(void*);  // given a Case

struct Instance {
  const char* name;
  Body body;
};

inline size_t width(const std::string& type) {
  return type == "float16" || type == "bfloat16" ? 2 : type == "bool" ? 1 : 4;
}

template <typename T>
Reader<T> input(void* given, int index) {
  return {&static_cast<Case*>(given)->inputs[index]};
}

inline const int* shape(void* given, int index) {
  return static_cast<Case*>(given)->inputs[index].shape.data();
}

template <typename T>
Writer<T> output(void* given, int index) {
  return {&static_cast<Case*>(given)->outputs[index]};
}

// "name type 2 3 4", then for inputs the bytes.
inline Array array(std::istream& from, bool filled) {
  Array found;
  std::string line;
  std::getline(from, line);
  std::istringstream words(line);
  words >> found.name >> found.type;
  for (int n; words >> n;) {
    found.shape.push_back(n);
    found.count *= size_t(n);
  }
  found.bytes.resize(found.count * width(found.type));
  if (filled) from.read(found.bytes.data(), std::streamsize(found.bytes.size()));
  return found;
}

inline bool next_case(std::istream& from, Case& found) {
  std::string line;
  if (!std::getline(from, line)) return false;
  std::istringstream words(line);
  int inputs, outputs;
  words >> found.kernel >> found.orders >> inputs >> outputs;
  for (int& n : found.grid) words >> n;
  for (int& n : found.size) words >> n;
  found.inputs.clear();
  found.outputs.clear();
  for (int i = 0; i < inputs; i++) found.inputs.push_back(array(from, true));
  for (int i = 0; i < outputs; i++) found.outputs.push_back(array(from, false));
  return true;
}

// One run over the whole grid. Throws Wrong.
inline void launch(Case& job, Body body, int order) {
  const int threads = job.size[0] * job.size[1] * job.size[2];
  must(threads <= MOST_THREADS, std::to_string(threads) + " threads of a group are too many");
  must(threads % SIMD == 0, std::to_string(threads) + " threads are no whole simdgroups");
  int groups[3];
  for (int i = 0; i < 3; i++) {
    must(job.grid[i] % job.size[i] == 0, "the grid ends within a group");
    groups[i] = job.grid[i] / job.size[i];
  }
  for (Array& out : job.outputs) out.written.assign(out.count, 0);
  Random random{uint64_t(order)};
  const int count = groups[0] * groups[1] * groups[2];
  for (int i = 0; i < count; i++) {
    const uint at = uint(order ? count - 1 - i : i);
    group().place = {at % groups[0], at / groups[0] % groups[1], at / groups[0] / groups[1]};
    blocks().clear();
    run_group(threads, body, &job, random, order > 0);
  }
  for (const Array& out : job.outputs) {
    for (size_t i = 0; i < out.count; i++) {
      must(out.written[i], "never written: " + spot(out, long(i)));
    }
  }
}

inline std::string outcome(Case& job, const Instance* found) {
  if (found == nullptr) return "no kernel " + job.kernel;
  std::vector<std::vector<char>> first;
  try {
    for (int order = 0; order < job.orders; order++) {
      launch(job, found->body, order);
      for (size_t i = 0; i < job.outputs.size(); i++) {
        if (order == 0) first.push_back(job.outputs[i].bytes);
        must(first[i] == job.outputs[i].bytes, "another order of lanes gives other bits");
      }
    }
  } catch (const Wrong& error) {
    return error.what();
  }
  return "ok";
}

inline int run(const std::vector<Instance>& instances) {
  Case job;
  while (next_case(std::cin, job)) {
    const Instance* found = nullptr;
    for (const Instance& one : instances) {
      if (job.kernel == one.name) found = &one;
    }
    const std::string text = outcome(job, found);
    std::cout << text << "\n";
    if (text != "ok") continue;
    for (const Array& out : job.outputs) {
      std::cout.write(out.bytes.data(), std::streamsize(out.bytes.size()));
    }
  }
  return 0;
}

}  // namespace emulated
