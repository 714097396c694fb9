#include "engine.h"

#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <map>
#include <memory>
#include <numeric>
#include <unordered_map>

#include "fiber.h"
#include "types.h"

// CUDA's variables, for the thread that runs.
__attribute__((visibility("hidden"))) uint3 threadIdx, blockIdx;
__attribute__((visibility("hidden"))) dim3 blockDim, gridDim;

namespace cuda_on_cpu {

std::string (*describe_address)(uintptr_t address) = nullptr;

namespace {

struct AsyncCopy {
  void* to;
  const void* from;
  size_t bytes;
  bool valid;
  unsigned group;
  Site site;
};

struct Thread {
  Context context;
  int stack = -1;  // index among the stacks; -1 before its start
  bool ended = false;
  uint3 index;
  // While it waits:
  const char* waits = nullptr;
  Site site;
  unsigned mask;  // 0: for the whole block
  void* state;
  std::vector<AsyncCopy> copies;
  unsigned num_groups = 0;
};

struct Warp {
  unsigned runnable, waiting, ended;
};

enum class Order { Forward, Reverse, Random };

struct Engine {
  Thread threads[MAX_THREADS];
  Warp warps[MAX_THREADS / WARP_LANES];
  unsigned num_threads, num_warps;
  unsigned current;
  unsigned runnable_warps;
  unsigned at_barrier;
  Context caller;
  std::vector<Stack> stacks;
  std::vector<int> free_stacks;
  const Launch* launch;
  char* shared;  // dynamic; its last byte is before a guard page
  int result;
  siginfo_t fault;  // si_signo is 0 if there was none
  Order order;
  uint64_t random;
};
// Without destruction: threads of the process may still use it while it ends.
union Undestroyed {
  Engine engine;
  Undestroyed() : engine() {}
  ~Undestroyed() {}
} undestroyed;
// One launch runs at a time (the driver sees to it), so its state is global: kernels find it without asking.
constexpr Engine& engine = undestroyed.engine;

// Of the operating system's thread that runs a kernel now.
thread_local bool runs_kernel = false;

constexpr size_t SHARED_CAPACITY = 256 << 10;

std::unordered_map<std::string, Kernel>& kernels() {
  static auto& registered = *new std::unordered_map<std::string, Kernel>;
  return registered;
}

Order order_of_environment() {
  const char* order = getenv("CUDA_ON_CPU_ORDER");
  if (!order || !*order || !strcmp(order, "forward")) return Order::Forward;
  if (!strcmp(order, "reverse")) return Order::Reverse;
  if (!strncmp(order, "random", 6)) return Order::Random;
  fprintf(stderr, "cuda-on-cpu: CUDA_ON_CPU_ORDER=%s is none of forward, reverse, random, random:SEED\n", order);
  abort();
}

uint64_t random_number() {
  engine.random ^= engine.random << 13;
  engine.random ^= engine.random >> 7;
  engine.random ^= engine.random << 17;
  return engine.random;
}

unsigned choose(unsigned set) {
  switch (engine.order) {
    case Order::Forward:
      return __builtin_ctz(set);
    case Order::Reverse:
      return 31 - __builtin_clz(set);
    default:
      for (unsigned skip = unsigned(random_number() % unsigned(__builtin_popcount(set))); skip > 0; skip--) set &= set - 1;
      return __builtin_ctz(set);
  }
}

// The next thread that can run, or -1. A warp runs until all its lanes wait.
int next_thread() {
  if (!engine.runnable_warps) return -1;
  unsigned warp = engine.current / WARP_LANES;
  if (engine.order == Order::Random || !(engine.runnable_warps >> warp & 1)) warp = choose(engine.runnable_warps);
  return int(warp * WARP_LANES + choose(engine.warps[warp].runnable));
}

void set_runnable(unsigned warp, unsigned lanes) {
  engine.warps[warp].runnable |= lanes;
  engine.runnable_warps |= 1u << warp;
}
void clear_runnable(unsigned warp, unsigned lanes) {
  engine.warps[warp].runnable &= ~lanes;
  if (!engine.warps[warp].runnable) engine.runnable_warps &= ~(1u << warp);
}

void become(unsigned thread) {
  engine.current = thread;
  threadIdx = engine.threads[thread].index;
}

void run_threads();

// Leaves the current thread, to come back to `kept`, for thread `next`; for the caller of the launch if that is -1.
void leave_for(int next, Context& kept) {
  if (next < 0) {
    change(kept, engine.caller);
    return;
  }
  Thread& to = engine.threads[next];
  become(unsigned(next));
  if (to.stack < 0) {
    to.stack = engine.free_stacks.back();
    engine.free_stacks.pop_back();
    start_at(to.context, engine.stacks[to.stack], run_threads);
  }
  change(kept, to.context);
}
void leave(Context& kept) { leave_for(next_thread(), kept); }

void end_thread() {
  Thread& own = engine.threads[engine.current];
  if (!own.copies.empty())
    fail(LAUNCH_FAILED, "ends with asynchronous copies that it has not waited for, the first of %s:%d",
         own.copies[0].site.file, own.copies[0].site.line);
  own.ended = true;
  const unsigned warp = engine.current / WARP_LANES, lane = 1u << engine.current % WARP_LANES;
  engine.warps[warp].ended |= lane;
  clear_runnable(warp, lane);
}

// What each stack runs: a thread from its start, and then, on the same stack, others that have not started.
void run_threads() {
  for (;;) {
    const Launch& launch = *engine.launch;
    launch.kernel->invoke(launch.kernel->function, launch.parameters);
    end_thread();
    Thread& own = engine.threads[engine.current];
    const int stack = own.stack;
    const int next = next_thread();
    if (next >= 0 && engine.threads[next].stack < 0) {
      become(unsigned(next));
      engine.threads[next].stack = stack;
      continue;
    }
    engine.free_stacks.push_back(stack);
    leave_for(next, own.context);
  }
}

std::string place_of(unsigned thread) {
  const uint3& index = engine.threads[thread].index;
  char text[96];
  snprintf(text, sizeof(text), "thread (%u,%u,%u)", index.x, index.y, index.z);
  return text;
}

void report(const std::string& message) {
  fprintf(stderr, "cuda-on-cpu: kernel %s, block (%u,%u,%u) of (%u,%u,%u), %s\n", engine.launch->kernel->name, blockIdx.x,
          blockIdx.y, blockIdx.z, gridDim.x, gridDim.y, gridDim.z, message.c_str());
}

// No thread can run, and not all have ended: says who waits where.
void report_deadlock() {
  std::string message = "cannot go on:";
  std::map<std::string, std::pair<unsigned, unsigned>> groups;  // how many threads, and the first
  for (unsigned thread = 0; thread < engine.num_threads; thread++) {
    const Thread& it = engine.threads[thread];
    char text[512] = "ended";
    if (!it.ended && it.mask)
      snprintf(text, sizeof(text), "wait in %s at %s:%d for lanes 0x%08x", it.waits, it.site.file, it.site.line, it.mask);
    else if (!it.ended)
      snprintf(text, sizeof(text), "wait in %s at %s:%d", it.waits, it.site.file, it.site.line);
    auto& group = groups.emplace(text, std::make_pair(0u, thread)).first->second;
    group.first++;
  }
  for (const auto& group : groups)
    message += "\n  " + std::to_string(group.second.first) + " threads, the first " + place_of(group.second.second) + ", " +
               group.first;
  report(message);
}

void prepare_block(Extent block) {
  const unsigned count = unsigned(block.count());
  engine.num_threads = count;
  engine.num_warps = (count + WARP_LANES - 1) / WARP_LANES;
  engine.runnable_warps = engine.num_warps == 32 ? ~0u : (1u << engine.num_warps) - 1;
  engine.at_barrier = 0;
  engine.current = 0;
  for (unsigned warp = 0; warp < engine.num_warps; warp++) {
    const unsigned lanes = count - warp * WARP_LANES;
    engine.warps[warp] = Warp{lanes >= WARP_LANES ? ~0u : (1u << lanes) - 1, 0, 0};
  }
  for (unsigned thread = 0; thread < count; thread++) {
    Thread& it = engine.threads[thread];
    it.stack = -1;
    it.ended = false;
    it.waits = nullptr;
    it.index = uint3{thread % block.x, thread / block.x % block.y, thread / (block.x * block.y)};
    it.copies.clear();
    it.num_groups = 0;
  }
  // A failed launch leaves stacks behind.
  while (engine.stacks.size() < count) engine.stacks.push_back(make_stack(unsigned(engine.stacks.size())));
  engine.free_stacks.resize(engine.stacks.size());
  for (size_t i = 0; i < engine.stacks.size(); i++) engine.free_stacks[i] = int(engine.stacks.size() - 1 - i);
}

// What a kernel did to get a signal.
void report_fault() {
  const siginfo_t& fault = engine.fault;
  const auto address = reinterpret_cast<uintptr_t>(fault.si_addr);
  engine.result = fault.si_signo == SIGFPE ? LAUNCH_FAILED : ILLEGAL_ADDRESS;
  std::string message = "uses " + std::string(describe_address ? describe_address(address) : "memory that is not mapped");
  char text[64];
  snprintf(text, sizeof(text), " (address 0x%zx)", size_t(address));
  message += text;
  if (address < 4096) message = "uses a null pointer" + std::string(text);
  for (const Stack& stack : engine.stacks)
    if (is_below_stack(stack, fault.si_addr)) {
      message = "has used up its stack";
      engine.result = LAUNCH_FAILED;
    }
  if (fault.si_signo == SIGFPE) message = "divides an integer by zero";
  // x86 tells no address of one that is not canonical, nor of a misaligned one.
  if (fault.si_signo != SIGFPE && fault.si_code == SI_KERNEL) {
    message = "uses a misaligned or impossible address";
    engine.result = MISALIGNED_ADDRESS;
  }
  report(place_of(engine.current) + " " + message);
}

void run_block() {
  const Launch& launch = *engine.launch;
  prepare_block(launch.block);
  // What a block finds in shared memory is undefined: bytes of NaN.
  memset(launch.kernel->shared_begin, 0xff, size_t(launch.kernel->shared_end - launch.kernel->shared_begin));
  if (launch.shared_bytes) memset(dynamic_shared(), 0xff, launch.shared_bytes);
  leave(engine.caller);
  if (engine.fault.si_signo != 0) report_fault();
  if (engine.result != 0) return;
  for (unsigned thread = 0; thread < engine.num_threads; thread++) {
    if (engine.threads[thread].ended) continue;
    engine.result = LAUNCH_FAILED;
    report_deadlock();
    return;
  }
}

struct sigaction previous_segv, previous_bus, previous_fpe;

const struct sigaction& previous_of(int signal) {
  return signal == SIGSEGV ? previous_segv : signal == SIGBUS ? previous_bus : previous_fpe;
}

// Faults of a kernel end its launch. This runs on a signal stack, which may be small: the caller of the launch does the rest,
// and this frame is left behind, as SA_NODEFER allows.
void handle_fault(int signal, siginfo_t* info, void* context) {
  if (runs_kernel) {
    engine.fault = *info;
    Context abandoned;
    change(abandoned, engine.caller);
  }
  const struct sigaction& previous = previous_of(signal);
  if (previous.sa_flags & SA_SIGINFO) return previous.sa_sigaction(signal, info, context);
  if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN) return previous.sa_handler(signal);
  sigaction(signal, &previous, nullptr);  // the fault comes again
}

// A stack for signals, for threads that have none.
void ensure_signal_stack() {
  static thread_local std::unique_ptr<char[]> own;
  static thread_local bool checked = false;
  if (checked) return;
  checked = true;
  stack_t now;
  if (sigaltstack(nullptr, &now) == 0 && !(now.ss_flags & SS_DISABLE)) return;
  constexpr size_t BYTES = 64 << 10;
  own.reset(new char[BYTES]);
  stack_t mine{};
  mine.ss_sp = own.get();
  mine.ss_size = BYTES;
  sigaltstack(&mine, nullptr);
}

}  // namespace

void register_kernel(const Kernel& kernel) {
  if (!kernels().emplace(kernel.name, kernel).second) {
    fprintf(stderr, "cuda-on-cpu: two kernels are named %s\n", kernel.name);
    abort();
  }
}

const Kernel* find_kernel(const char* name) {
  const auto found = kernels().find(name);
  return found == kernels().end() ? nullptr : &found->second;
}

std::vector<const Kernel*> all_kernels() {
  std::vector<const Kernel*> all;
  for (const auto& named : kernels()) all.push_back(&named.second);
  return all;
}

void catch_faults() {
  static const bool once = [] {
    struct sigaction action {};
    action.sa_sigaction = handle_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigemptyset(&action.sa_mask);
    sigaction(SIGSEGV, &action, &previous_segv);
    sigaction(SIGBUS, &action, &previous_bus);
    sigaction(SIGFPE, &action, &previous_fpe);
    return true;
  }();
  (void)once;
}

int run(const Launch& launch) {
  ensure_signal_stack();
  if (!engine.shared) {
    const size_t page = size_t(sysconf(_SC_PAGESIZE));
    void* base = mmap(nullptr, SHARED_CAPACITY + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED || mprotect(static_cast<char*>(base) + SHARED_CAPACITY, page, PROT_NONE) != 0) {
      perror("cuda-on-cpu: shared memory");
      abort();
    }
    engine.shared = static_cast<char*>(base);
  }
  engine.order = order_of_environment();
  engine.random = 0x9e3779b97f4a7c15u;
  if (engine.order == Order::Random) {
    const char* seed = strchr(getenv("CUDA_ON_CPU_ORDER"), ':');
    if (seed) engine.random ^= strtoull(seed + 1, nullptr, 0);
  }
  engine.launch = &launch;
  engine.result = 0;
  engine.fault.si_signo = 0;
  blockDim = dim3(launch.block.x, launch.block.y, launch.block.z);
  gridDim = dim3(launch.grid.x, launch.grid.y, launch.grid.z);
  runs_kernel = true;
  const size_t count = launch.grid.count();
  // Steps that have no divisor in common with the count reach every block once.
  size_t step = engine.order == Order::Random ? random_number() % count : 1;
  while (std::gcd(step, count) != 1) step++;
  if (engine.order == Order::Reverse) step = count - 1;
  size_t block = engine.order == Order::Forward ? 0 : count - 1;
  for (size_t i = 0; i < count && engine.result == 0; i++, block = (block + step) % count) {
    blockIdx = uint3{unsigned(block % launch.grid.x), unsigned(block / launch.grid.x % launch.grid.y),
                     unsigned(block / launch.grid.x / launch.grid.y)};
    run_block();
  }
  runs_kernel = false;
  return engine.result;
}

void fail(int code, const char* format, ...) {
  char text[1024];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof(text), format, arguments);
  va_end(arguments);
  report(place_of(engine.current) + " " + text);
  engine.result = code;
  Context abandoned;
  change(abandoned, engine.caller);
  abort();
}

unsigned this_lane() { return engine.current % WARP_LANES; }

void meet_block(const char* what, Site site) {
  Thread& own = engine.threads[engine.current];
  const unsigned warp = engine.current / WARP_LANES;
  own.waits = what;
  own.site = site;
  own.mask = 0;
  engine.warps[warp].waiting |= 1u << engine.current % WARP_LANES;
  if (++engine.at_barrier < engine.num_threads) {
    clear_runnable(warp, 1u << engine.current % WARP_LANES);
    leave(own.context);
    return;
  }
  for (unsigned thread = 0; thread < engine.num_threads; thread++) {
    const Thread& other = engine.threads[thread];
    if (other.site.line != site.line || strcmp(other.site.file, site.file) || strcmp(other.waits, what))
      fail(LAUNCH_FAILED, "divergent barrier: it waits in %s at %s:%d, %s in %s at %s:%d", what, site.file, site.line,
           place_of(thread).c_str(), other.waits, other.site.file, other.site.line);
  }
  engine.at_barrier = 0;
  for (unsigned w = 0; w < engine.num_warps; w++) {
    set_runnable(w, engine.warps[w].waiting);
    engine.warps[w].waiting = 0;
  }
}

void meet_warp(const char* what, unsigned mask, void* lane_state, Complete complete, Site site) {
  Thread& own = engine.threads[engine.current];
  const unsigned index = engine.current / WARP_LANES;
  Warp& warp = engine.warps[index];
  const unsigned lane = 1u << engine.current % WARP_LANES;
  if (!(mask & lane)) fail(LAUNCH_FAILED, "%s at %s:%d: mask 0x%08x leaves the calling lane out", what, site.file, site.line, mask);
  own.waits = what;
  own.site = site;
  own.mask = mask;
  own.state = lane_state;
  warp.waiting |= lane;
  if ((warp.waiting & mask) != mask) {
    const unsigned first = index * WARP_LANES;
    const unsigned exist = engine.num_threads - first >= WARP_LANES ? ~0u : (1u << (engine.num_threads - first)) - 1;
    if (mask & (warp.ended | ~exist))
      fail(LAUNCH_FAILED, "%s at %s:%d: of the lanes in mask 0x%08x, 0x%08x have ended or do not exist", what, site.file,
           site.line, mask, mask & (warp.ended | ~exist));
    clear_runnable(index, lane);
    leave(own.context);
    return;
  }
  void* states[WARP_LANES];
  Thread* lanes = &engine.threads[index * WARP_LANES];
  for (unsigned i = 0; i < WARP_LANES; i++) {
    states[i] = nullptr;
    if (!(mask >> i & 1)) continue;
    if (lanes[i].mask != mask || lanes[i].waits != what)
      fail(LAUNCH_FAILED, "divergent warp: it calls %s at %s:%d for lanes 0x%08x, lane %u waits in %s at %s:%d for lanes 0x%08x",
           what, site.file, site.line, mask, i, lanes[i].waits, lanes[i].site.file, lanes[i].site.line, lanes[i].mask);
    states[i] = lanes[i].state;
  }
  if (complete) complete(states, mask);
  warp.waiting &= ~mask;
  set_runnable(index, mask);
}

void* dynamic_shared() {
  // As far right as 16-byte alignment allows.
  return engine.shared + SHARED_CAPACITY - (engine.launch->shared_bytes + 15) / 16 * 16;
}

bool is_shared(const void* address, size_t bytes) {
  const char* at = static_cast<const char*>(address);
  const Kernel& kernel = *engine.launch->kernel;
  const char* dynamic = static_cast<const char*>(dynamic_shared());
  return (at >= kernel.shared_begin && at + bytes <= kernel.shared_end) ||
         (at >= dynamic && at + bytes <= dynamic + engine.launch->shared_bytes);
}

void copy_async(void* to, const void* from, size_t bytes, bool valid, Site site) {
  if (reinterpret_cast<uintptr_t>(to) % bytes != 0 || (reinterpret_cast<uintptr_t>(from) % bytes != 0))
    fail(MISALIGNED_ADDRESS, "copies asynchronously at %s:%d from %p to %p, which is misaligned", site.file, site.line, from, to);
  if (!is_shared(to, bytes))
    fail(ILLEGAL_ADDRESS, "copies asynchronously at %s:%d to %p, which is not shared memory", site.file, site.line, to);
  Thread& own = engine.threads[engine.current];
  own.copies.push_back(AsyncCopy{to, from, bytes, valid, own.num_groups, site});
  // From now on and until the wait, what is there is undefined.
  memset(to, 0xff, bytes);
}

void copy_async_close_group() { engine.threads[engine.current].num_groups++; }

void copy_async_wait_group(unsigned pending) {
  Thread& own = engine.threads[engine.current];
  size_t done = 0;
  for (; done < own.copies.size() && own.copies[done].group + pending < own.num_groups; done++) {
    const AsyncCopy& copy = own.copies[done];
    if (copy.valid)
      memcpy(copy.to, copy.from, copy.bytes);
    else
      memset(copy.to, 0, copy.bytes);
  }
  own.copies.erase(own.copies.begin(), own.copies.begin() + ptrdiff_t(done));
}

}  // namespace cuda_on_cpu

// What the compiler calls where -fsanitize finds a misaligned pointer, an index outside of an array, a division by zero.

namespace {
struct Where {
  const char* file;
  uint32_t line, column;
};
}  // namespace

extern "C" __attribute__((visibility("hidden"))) void __ubsan_handle_type_mismatch_v1_abort(const Where* where, uintptr_t address) {
  using namespace cuda_on_cpu;
  if (!address) fail(ILLEGAL_ADDRESS, "uses a null pointer at %s:%u", where->file, where->line);
  fail(MISALIGNED_ADDRESS, "uses misaligned address 0x%lx at %s:%u", (unsigned long)address, where->file, where->line);
}
extern "C" __attribute__((visibility("hidden"))) void __ubsan_handle_out_of_bounds_abort(const Where* where, uintptr_t index) {
  using namespace cuda_on_cpu;
  fail(ILLEGAL_ADDRESS, "uses index %ld outside of an array at %s:%u", long(index), where->file, where->line);
}
extern "C" __attribute__((visibility("hidden"))) void __ubsan_handle_divrem_overflow_abort(const Where* where, uintptr_t, uintptr_t) {
  using namespace cuda_on_cpu;
  fail(LAUNCH_FAILED, "divides an integer by zero at %s:%u", where->file, where->line);
}
