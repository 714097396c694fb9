// Runs a kernel: its blocks one after the other, each thread of a block as a fiber with a stack of its own.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <string>
#include <vector>

namespace cuda_on_cpu {

struct Extent {
  unsigned x, y, z;
  size_t count() const { return size_t(x) * y * z; }
};

// Where a kernel is in its source, for reports.
struct Site {
  const char* file;
  int line;
};

// What EXPORT registers.
struct Kernel {
  const char* name;
  void (*function)();
  // Calls `function` with the values that the parameters point to.
  void (*invoke)(void (*function)(), void** parameters);
  std::vector<size_t> parameter_bytes, parameter_alignments;
  unsigned max_threads;
  // The static shared memory of the kernel's source file.
  char* shared_begin;
  char* shared_end;
};
void register_kernel(const Kernel& kernel);
const Kernel* find_kernel(const char* name);
std::vector<const Kernel*> all_kernels();

struct Launch {
  const Kernel* kernel;
  void** parameters;
  Extent grid, block;
  size_t shared_bytes;
};

// How a kernel ended; the codes are the driver's (`CUresult`), 0 for success. A failure has been written to stderr.
int run(const Launch& launch);

// Says in `fail` what a bad address is to device memory; the driver's memory sets it.
extern std::string (*describe_address)(uintptr_t address);

// Catches what kernels do wrong with addresses and divisions. Twice does nothing.
void catch_faults();

// For use inside kernels (cuda_on_cpu.h):

// Ends the launch with an error that names kernel, block and thread.
[[noreturn]] void fail(int code, const char* format, ...) __attribute__((format(printf, 2, 3)));

// Waits for all threads of the block.
void meet_block(const char* what, Site site);

// Waits for the lanes of `mask`, each of which brings its own `lane_state`; the last one calls
// `complete(states of the lanes, null for those not in the mask, mask)`.
using Complete = void (*)(void** states, unsigned mask);
void meet_warp(const char* what, unsigned mask, void* lane_state, Complete complete, Site site);

// The dynamic shared memory of the block.
void* dynamic_shared();
bool is_shared(const void* address, size_t bytes);

// Copies from global to shared memory that are under way.
void copy_async(void* to, const void* from, size_t bytes, bool valid, Site site);
void copy_async_close_group();
void copy_async_wait_group(unsigned pending);

constexpr int LAUNCH_FAILED = 719, ILLEGAL_ADDRESS = 700, MISALIGNED_ADDRESS = 716;
constexpr unsigned WARP_LANES = 32;
constexpr unsigned MAX_THREADS = 1024;

}  // namespace cuda_on_cpu
