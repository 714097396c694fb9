// What the tests share: checks that go on after a failure, buffers, launches.
#pragma once

#include <stdio.h>

#include <vector>

#include "../cu.h"

inline int failures = 0;

#define CHECK(condition)                                                        \
  do {                                                                          \
    if (!(condition)) {                                                         \
      fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition);   \
      failures++;                                                               \
    }                                                                           \
  } while (false)
#define SAME(a, b)                                                                                       \
  do {                                                                                                   \
    const double a_ = double(a), b_ = double(b);                                                         \
    if (!(a_ == b_)) {                                                                                   \
      fprintf(stderr, "%s:%d: %s is %.9g, %s is %.9g\n", __FILE__, __LINE__, #a, a_, #b, b_);            \
      failures++;                                                                                        \
    }                                                                                                    \
  } while (false)

inline void* module_handle;
inline void* stream;

inline void start() {
  void* context;
  SAME(cuInit(0), 0);
  SAME(cuDevicePrimaryCtxRetain(&context, 0), 0);
  SAME(cuCtxSetCurrent(context), 0);
  SAME(cuModuleLoadData(&module_handle, "image"), 0);
  SAME(cuStreamCreate(&stream, 1), 0);
}

template <class T> struct Buffer {
  CUdeviceptr address = 0;
  size_t count;
  explicit Buffer(size_t count) : count(count) { SAME(cuMemAlloc_v2(&address, count * sizeof(T)), 0); }
  explicit Buffer(const std::vector<T>& values) : Buffer(values.size()) {
    SAME(cuMemcpyHtoD_v2(address, values.data(), count * sizeof(T)), 0);
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { cuMemFree_v2(address); }
  std::vector<T> get() const {
    std::vector<T> values(count);
    SAME(cuMemcpyDtoH_v2(values.data(), address, count * sizeof(T)), 0);
    return values;
  }
};

struct Shape {
  unsigned blocks, threads, shared_bytes = 0;
};
template <class... A> CUresult launch(const char* name, Shape shape, A... arguments) {
  void* function = nullptr;
  SAME(cuModuleGetFunction(&function, module_handle, name), 0);
  void* parameters[] = {&arguments..., nullptr};
  return cuLaunchKernel(function, shape.blocks, 1, 1, shape.threads, 1, 1, shape.shared_bytes, stream, parameters, nullptr);
}

inline std::vector<float> ramp(size_t count) {
  std::vector<float> values(count);
  for (size_t i = 0; i < count; i++) values[i] = float(i);
  return values;
}

// Of libraries.cpp.
void cublas_multiplies_in_streams_and_graphs();
void processes_reduce_and_gather();
void communicators_can_be_made_without_waiting();
