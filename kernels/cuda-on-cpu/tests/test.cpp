// Tests of the driver and the engine, through the library as a program sees it. Faulty kernels are run in processes of their
// own, whose messages are looked at.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "../types.h"
#include "check.h"

namespace {

// The float that rounding to nearest, ties to even, makes of x, among all values of a type in ascending order.
template <class Bits, class Value>
void all_conversions(const char* name, Bits largest, Value value, std::function<Bits(float)> convert, Bits sign, Bits overflow) {
  // `largest`: of the finite numbers; ascending bits are ascending numbers.
  for (uint32_t bits = 0; bits <= largest; bits++) {
    const double own = value(Bits(bits));
    if (convert(float(own)) != bits || convert(-float(own)) != Bits(bits | sign)) {
      fprintf(stderr, "%s: 0x%x does not come back\n", name, bits);
      failures++;
      return;
    }
    const bool is_last = bits == largest;
    const double next = is_last ? own + (own - value(Bits(bits - 1))) : value(Bits(bits + 1));
    const float middle = float((own + next) / 2);
    const Bits up = is_last ? overflow : Bits(bits + 1);
    if (double(middle) != (own + next) / 2) continue;  // not a float: below the least
    const Bits expected = bits % 2 == 0 ? Bits(bits) : up;
    const bool right = convert(middle) == expected && convert(nextafterf(middle, 0)) == bits &&
                       convert(nextafterf(middle, INFINITY)) == up && convert(-middle) == Bits(expected | sign);
    if (!right) {
      fprintf(stderr, "%s: between 0x%x and the next: %x\n", name, bits, unsigned(convert(middle)));
      failures++;
      return;
    }
  }
}

void conversions_round_to_nearest_even() {
  using namespace cuda_on_cpu;
  all_conversions<uint16_t>("bf16", 0x7f7f, float_of_bf16, bf16_of_float, 0x8000, 0x7f80);
  all_conversions<uint16_t>("f16", 0x7bff, float_of_f16, f16_of_float, 0x8000, 0x7c00);
  all_conversions<uint8_t>("f8", 0x7e, float_of_e4m3, e4m3_of_float, 0x80, 0x7e);
  SAME(e4m3_of_float(INFINITY), 0x7e);
  SAME(e4m3_of_float(-INFINITY), 0xfe);
  SAME(e4m3_of_float(1e30f), 0x7e);
  SAME(f16_of_float(INFINITY), 0x7c00);
  SAME(bf16_of_float(-INFINITY), 0xff80);
  CHECK(isnan(float_of_e4m3(e4m3_of_float(NAN))));
  CHECK(isnan(float_of_f16(f16_of_float(-NAN))));
  CHECK(isnan(float_of_bf16(bf16_of_float(NAN))));
  CHECK(isnan(float_of_e4m3(0xff)) && isnan(float_of_f16(0xfe00)) && isnan(float_of_bf16(0x7f81)));
  SAME(float_of_e4m3(0x7e), 448);
  SAME(float_of_e4m3(1), 1.0 / 512);
  SAME(float_of_f16(1), ldexp(1, -24));
  SAME(float_of_f16(0x7bff), 65504);
}

void warps_shuffle_and_vote() {
  const Buffer<float> x(ramp(128)), sums(128);
  const Buffer<uint32_t> prefixes(128), ballots(128);
  const Buffer<uint64_t> fifth(128);
  SAME(launch("check_warp", {2, 64}, x.address, sums.address, prefixes.address, fifth.address, ballots.address), 0);
  const auto got_sums = sums.get();
  const auto got_prefixes = prefixes.get(), got_ballots = ballots.get();
  const auto got_fifth = fifth.get();
  for (unsigned i = 0; i < 128; i++) {
    SAME(got_sums[i], 32 * (i / 32 * 32) + 31 * 16);
    SAME(got_prefixes[i], i % 32 + 1 + 100 * (i % 32 == 31 ? 31 : i % 32 + 1));
    SAME(got_fifth[i], uint64_t(i / 32 * 32 + 5) << 33);
    SAME(got_ballots[i], 0x49249249u ^ 1u << 31);
  }
}

void blocks_meet_at_barriers() {
  const Buffer<float> x(ramp(3 * 256)), out(3 * 256);
  SAME(launch("check_block", {3, 256}, x.address, out.address), 0);
  const auto got = out.get();
  for (unsigned i = 0; i < got.size(); i++) SAME(got[i], 256 * (i / 256 * 256) + 255 * 128);
  const Buffer<float> y(ramp(1000));
  SAME(launch("check_reverse", {1, 1000, 4000}, y.address), 0);
  SAME(y.get()[0], 999);
  SAME(y.get()[998], 1);
}

void a_missing_barrier_shows() {
  const Buffer<float> x(ramp(256));
  SAME(launch("check_reverse_without_barrier", {1, 256, 1024}, x.address), 0);
  const auto got = x.get();
  bool wrong = false;
  for (unsigned i = 0; i < 256; i++) wrong |= !(got[i] == float(255 - i));
  CHECK(wrong);
}

void shared_memory_is_poisoned_for_each_block() {
  const Buffer<uint32_t> out(2 * 32);
  SAME(launch("check_stale_shared", {2, 32, 128}, out.address), 0);
  for (const uint32_t x : out.get()) SAME(x, 0xffffffffu);
}

void asynchronous_copies_arrive_at_the_wait() {
  const Buffer<float> from(ramp(128)), early(128), late(128);
  SAME(launch("check_async_copy", {1, 32}, from.address, early.address, late.address), 0);
  const auto before = early.get(), after = late.get();
  for (unsigned i = 0; i < 128; i++) {
    CHECK(isnan(before[i]));
    const unsigned source = (i / 4 ^ 1) * 4 + i % 4;
    SAME(after[i], source / 4 == 9 ? 0 : source);
  }
}

template <class T> void check_product(const char* kernel) {
  std::vector<T> a(256), b(128);
  for (unsigned i = 0; i < 256; i++) a[i] = T(float(int(i * 37 % 29) - 14));
  for (unsigned i = 0; i < 128; i++) b[i] = T(float(int(i * 53 % 23) - 11));
  const Buffer<T> device_a(a), device_b(b);
  const Buffer<float> c(128);
  SAME(launch(kernel, {1, 32}, device_a.address, device_b.address, c.address), 0);
  const auto got = c.get();
  for (unsigned row = 0; row < 16; row++)
    for (unsigned column = 0; column < 8; column++) {
      float expected = 0;
      for (unsigned k = 0; k < 16; k++) expected += float(a[row * 16 + k]) * float(b[k * 8 + column]);
      SAME(got[row * 8 + column], expected);
    }
}
void tensor_cores_multiply() {
  check_product<__nv_bfloat16>("check_mma_bf16");
  check_product<__half>("check_mma_f16");
}

void atomics_count() {
  const Buffer<uint32_t> counts(std::vector<uint32_t>(3, 0));
  const Buffer<float> sum(std::vector<float>(1, 0));
  const Buffer<int32_t> extremes(std::vector<int32_t>(2, 0));
  SAME(launch("check_atomics", {4, 256}, counts.address, sum.address, extremes.address), 0);
  SAME(counts.get()[0], 1024);
  SAME(counts.get()[1], 0xffffffffu);
  SAME(sum.get()[0], 512);
  SAME(extremes.get()[0], 155);
  SAME(extremes.get()[1], -100);
}

void parameters_arrive() {
  struct {
    int32_t a;
    double b;
  } several{20, 0.25};
  const Buffer<float> out(24);
  void* function;
  SAME(cuModuleGetFunction(&function, module_handle, "check_parameters"), 0);
  CUdeviceptr address = out.address;
  int32_t a = -3;
  uint64_t c = 1000;
  float d = 0.5;
  int8_t e = -7;
  void* parameters[] = {&address, &a, &several, &c, &d, &e};
  SAME(cuLaunchKernel(function, 2, 3, 4, 32, 1, 1, 0, stream, parameters, nullptr), 0);
  for (const float x : out.get()) SAME(x, 1010.75);
  SAME(cuLaunchKernel(function, 2, 0, 4, 32, 1, 1, 0, stream, parameters, nullptr), 1);
  SAME(cuLaunchKernel(function, 2, 3, 4, 33, 1, 1, 0, stream, parameters, nullptr), 701);
  SAME(cuLaunchKernel(function, 1, 1, 1, 32, 1, 1, 49 << 10, stream, parameters, nullptr), 1);
  SAME(cuFuncSetAttribute(function, 8, 228 << 10), 1);
  SAME(cuFuncSetAttribute(function, 8, 227 << 10), 0);
  SAME(cuLaunchKernel(function, 1, 1, 1, 32, 1, 1, 227 << 10, stream, parameters, nullptr), 0);
  size_t offset, bytes;
  SAME(cuFuncGetParamInfo(function, 2, &offset, &bytes), 0);
  SAME(offset, 16);
  SAME(bytes, sizeof(several));
  SAME(cuFuncGetParamInfo(function, 5, &offset, &bytes), 0);
  SAME(offset, 44);
  SAME(bytes, 1);
  SAME(cuFuncGetParamInfo(function, 6, &offset, &bytes), 1);
  SAME(cuModuleGetFunction(&function, module_handle, "no_such_kernel"), 500);
}

void memory_is_bounded_and_counted() {
  size_t before, after, total;
  SAME(cuMemGetInfo_v2(&before, &total), 0);
  SAME(total, size_t(2) << 30);
  CUdeviceptr address, none;
  SAME(cuMemAlloc_v2(&address, 100), 0);
  SAME(cuMemGetInfo_v2(&after, &total), 0);
  SAME(before - after, 512);
  SAME(cuMemAlloc_v2(&none, total), 2);
  char bytes[101];
  SAME(cuMemcpyDtoH_v2(bytes, address, 101), 1);
  SAME(cuMemcpyDtoH_v2(bytes, address, 100), 0);
  SAME(bytes[99], char(0xff));
  SAME(cuMemsetD8Async(address + 50, 3, 51, stream), 1);
  SAME(cuMemsetD8Async(address + 50, 3, 50, stream), 0);
  SAME(cuMemFree_v2(address), 0);
  SAME(cuMemFree_v2(address), 1);
}

void graphs_replay_what_was_captured() {
  const Buffer<float> x(std::vector<float>(100, 0));
  float host[100] = {};
  void *graph, *executable, *other;
  SAME(cuStreamBeginCapture_v2(stream, 1), 0);
  SAME(launch("check_add", {1, 256}, x.address, 1.0f, 100u), 0);
  SAME(launch("check_add", {1, 256}, x.address, 2.0f, 50u), 0);
  SAME(cuMemcpyDtoHAsync_v2(host, x.address, sizeof(host), stream), 0);
  int status;
  SAME(cuStreamIsCapturing(stream, &status), 0);
  SAME(status, 1);
  SAME(cuStreamEndCapture(stream, &graph), 0);
  SAME(x.get()[0], 0);
  SAME(cuGraphInstantiateWithFlags(&executable, graph, 0), 0);
  SAME(cuGraphDestroy(graph), 0);
  for (int i = 0; i < 3; i++) SAME(cuGraphLaunch(executable, stream), 0);
  SAME(cuStreamSynchronize(stream), 0);
  SAME(host[0], 9);
  SAME(host[99], 3);

  // The same operations with other parameters are taken over; others are not.
  SAME(cuStreamBeginCapture_v2(stream, 1), 0);
  SAME(launch("check_add", {1, 256}, x.address, 10.0f, 100u), 0);
  SAME(launch("check_add", {1, 256}, x.address, 0.0f, 50u), 0);
  SAME(cuMemcpyDtoHAsync_v2(host, x.address, sizeof(host), stream), 0);
  SAME(cuStreamEndCapture(stream, &other), 0);
  CUgraphExecUpdateResultInfo result;
  SAME(cuGraphExecUpdate_v2(executable, other, &result), 0);
  SAME(cuGraphDestroy(other), 0);
  SAME(cuGraphLaunch(executable, stream), 0);
  SAME(cuStreamSynchronize(stream), 0);
  SAME(host[99], 13);
  SAME(cuStreamBeginCapture_v2(stream, 1), 0);
  SAME(cuMemsetD8Async(x.address, 0, 4, stream), 0);
  SAME(cuStreamEndCapture(stream, &other), 0);
  SAME(cuGraphExecUpdate_v2(executable, other, &result), 910);
  SAME(cuGraphDestroy(other), 0);
  SAME(cuGraphExecDestroy(executable), 0);
}

void a_capture_forbids_waiting_and_allocating() {
  const Buffer<float> x(100);
  CUdeviceptr address;
  void* graph;
  const auto invalidated_by = [&](const char* what, std::function<CUresult()> call, CUresult error) {
    SAME(cuStreamBeginCapture_v2(stream, 1), 0);
    if (call() != error) {
      fprintf(stderr, "%s in a capture does not return %d\n", what, error);
      failures++;
    }
    SAME(launch("check_add", {1, 256}, x.address, 1.0f, 100u), 901);
    SAME(cuStreamEndCapture(stream, &graph), 901);
    CHECK(graph == nullptr);
  };
  invalidated_by("cuStreamSynchronize", [] { return cuStreamSynchronize(stream); }, 900);
  invalidated_by("cuStreamQuery", [] { return cuStreamQuery(stream); }, 900);
  invalidated_by("cuCtxSynchronize", [] { return cuCtxSynchronize(); }, 900);
  invalidated_by("cuMemAlloc", [&] { return cuMemAlloc_v2(&address, 100); }, 900);
  invalidated_by("cuMemFree", [&] { return cuMemFree_v2(x.address); }, 900);
}

void streams_join_a_capture_by_events() {
  const Buffer<float> x(std::vector<float>(4, 0));
  void *other, *forked, *joined, *graph, *executable;
  SAME(cuStreamCreate(&other, 1), 0);
  SAME(cuEventCreate(&forked, 2), 0);
  SAME(cuEventCreate(&joined, 2), 0);
  for (const bool joins : {false, true}) {
    SAME(cuStreamBeginCapture_v2(stream, 1), 0);
    SAME(cuEventRecord(forked, stream), 0);
    SAME(cuStreamWaitEvent(other, forked, 0), 0);
    SAME(cuMemsetD32Async(x.address, 0x40000000, 4, other), 0);
    SAME(cuEventRecord(joined, other), 0);
    if (joins) SAME(cuStreamWaitEvent(stream, joined, 0), 0);
    SAME(cuStreamEndCapture(stream, &graph), joins ? 0 : 904);
  }
  SAME(cuEventQuery(joined), 907);
  SAME(x.get()[3], 0);
  SAME(cuGraphInstantiateWithFlags(&executable, graph, 0), 0);
  SAME(cuGraphLaunch(executable, other), 0);
  SAME(cuStreamSynchronize(other), 0);
  SAME(x.get()[3], 2);
  cuGraphExecDestroy(executable);
  cuGraphDestroy(graph);
  cuStreamDestroy_v2(other);
}

// Whoever retains a context while another gives the last one back has one of its own.
void contexts_come_and_go_on_several_threads() {
  std::atomic<int> failed{0};
  const auto use = [&] {
    for (int i = 0; i < 2000; i++) {
      usleep(i % 7);  // now and then, nobody has it
      void *context, *stream;
      CUdeviceptr memory;
      const int value = i;
      const bool is_fine = !cuDevicePrimaryCtxRetain(&context, 1) && !cuCtxSetCurrent(context) && !cuStreamCreate(&stream, 1) &&
                           !cuMemAlloc_v2(&memory, sizeof value) && !cuMemcpyHtoDAsync_v2(memory, &value, sizeof value, stream) &&
                           !cuStreamSynchronize(stream) && !cuMemFree_v2(memory) && !cuStreamDestroy_v2(stream);
      failed += !is_fine;
      failed += cuDevicePrimaryCtxRelease_v2(1) != 0;
    }
  };
  std::vector<std::thread> threads;
  for (int i = 0; i < 2; i++) threads.emplace_back(use);
  for (auto& thread : threads) thread.join();
  SAME(failed, 0);
}

void events_measure() {
  void *first, *second;
  float milliseconds = -1;
  SAME(cuEventCreate(&first, 0), 0);
  SAME(cuEventCreate(&second, 0), 0);
  SAME(cuEventQuery(first), 0);
  SAME(cuEventElapsedTime_v2(&milliseconds, first, second), 400);
  SAME(cuEventRecord(first, stream), 0);
  SAME(cuEventRecord(second, stream), 0);
  SAME(cuEventSynchronize(second), 0);
  SAME(cuEventElapsedTime_v2(&milliseconds, first, second), 0);
  CHECK(milliseconds >= 0);
}

// Runs `body` in a process of its own and returns what it has written to stderr; it ends with what `body` returns.
std::string output_of(std::function<CUresult()> body, CUresult expected) {
  int pipes[2];
  if (pipe(pipes) != 0) abort();
  fflush(stderr);
  const pid_t child = fork();
  if (child == 0) {
    dup2(pipes[1], STDERR_FILENO);
    close(pipes[0]);
    const CUresult result = body();
    fflush(stderr);
    _exit(result == expected ? 0 : 1);
  }
  close(pipes[1]);
  std::string output;
  char part[4096];
  for (ssize_t bytes; (bytes = read(pipes[0], part, sizeof(part))) > 0;) output.append(part, size_t(bytes));
  close(pipes[0]);
  int status;
  waitpid(child, &status, 0);
  if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) {
    fprintf(stderr, "the process did not end with error %d but with status 0x%x and:\n%s", expected, status, output.c_str());
    failures++;
  }
  return output;
}
void fails(const char* kernel, Shape shape, CUresult error, std::vector<const char*> messages, std::function<CUresult()> body) {
  const std::string output = output_of(
      [&] {
        const CUresult result = body();
        const CUresult later = cuStreamSynchronize(stream);  // the error stays
        return later == result ? result : -1;
      },
      error);
  for (const char* message : messages)
    if (output.find(message) == std::string::npos) {
      fprintf(stderr, "%s <<<%u, %u>>>: no \"%s\" in: %s\n", kernel, shape.blocks, shape.threads, message, output.c_str());
      failures++;
    }
}
template <class... A>
void launch_fails(const char* kernel, Shape shape, CUresult error, std::vector<const char*> messages, A... arguments) {
  fails(kernel, shape, error, messages, [&] { return launch(kernel, shape, arguments...); });
}

void faulty_kernels_are_reported() {
  const Buffer<float> x(std::vector<float>(64, 1)), freed(64);
  const CUdeviceptr at = x.address;
  launch_fails("check_divergent_barrier", {2, 64}, 719, {"kernel check_divergent_barrier, block (", "divergent barrier", "checks.cu:"}, at);
  launch_fails("check_missed_barrier", {1, 64}, 719, {"cannot go on", "63 threads, the first thread (0,0,0), wait in __syncthreads at", "1 threads, the first thread (3,0,0), ended"}, at);
  launch_fails("check_ended_lane", {1, 64}, 719, {"__shfl_xor_sync", "common.cuh", "0x00000008"}, at);
  launch_fails("check_divergent_warp", {1, 32}, 719, {"divergent warp", "__shfl_sync", "__shfl_xor_sync"}, at);
  launch_fails("check_write", {1, 1}, 700, {"thread (0,0,0) uses what is 0 bytes behind the end of an allocation of 256 bytes"}, at, uint64_t(64));
  launch_fails("check_write", {1, 1}, 700, {"thread (0,0,0)"}, at, uint64_t(-1024));  // in the guard page
  launch_fails("check_write", {1, 1}, 700, {"null pointer"}, CUdeviceptr(0), uint64_t(0));
  launch_fails("check_misaligned", {1, 32}, 716, {"misaligned address", "common.cuh"}, at, 1u);
  launch_fails("check_shared_bounds", {1, 1}, 700, {"index 32 outside of an array", "checks.cu"}, at, 32u);
  launch_fails("check_deep_stack", {1, 1}, 719, {"used up its stack"}, at);
  launch_fails("check_forgotten_copy", {1, 32}, 719, {"asynchronous copies that it has not waited for", "checks.cu"}, at);
  const CUdeviceptr gone = freed.address;
  fails("check_write", {1, 1}, 700, {"uses byte 12 of an already freed allocation of 256 bytes"}, [&] {
    cuMemFree_v2(gone);
    return launch("check_write", {1, 1}, gone, uint64_t(3));
  });
}

void lazy_streams_run_when_waited_for() {
  // In a process of its own: the variable is read once.
  output_of(
      [] {
        setenv("CUDA_ON_CPU_LAZY", "1", 1);
        execl("/proc/self/exe", "test", "lazy", nullptr);
        return 1;
      },
      0);
}
int lazy_main() {
  start();
  const Buffer<float> x(std::vector<float>(4, 0));
  void *event, *other;
  SAME(cuEventCreate(&event, 0), 0);
  SAME(cuStreamCreate(&other, 1), 0);
  float host[4] = {5, 5, 5, 5};
  SAME(launch("check_add", {1, 32}, x.address, 1.0f, 4u), 0);
  SAME(cuEventRecord(event, stream), 0);
  SAME(cuStreamWaitEvent(other, event, 0), 0);
  SAME(cuMemcpyDtoHAsync_v2(host, x.address, sizeof(host), other), 0);
  SAME(host[0], 5);
  SAME(cuEventQuery(event), 600);
  SAME(cuStreamSynchronize(other), 0);
  SAME(host[0], 1);
  SAME(cuEventQuery(event), 0);
  return failures != 0;
}

struct Test {
  const char* name;
  void (*run)();
};
constexpr Test TESTS[] = {
#define TEST(name) {#name, name}
    TEST(conversions_round_to_nearest_even),
    TEST(warps_shuffle_and_vote),
    TEST(blocks_meet_at_barriers),
    TEST(a_missing_barrier_shows),
    TEST(shared_memory_is_poisoned_for_each_block),
    TEST(asynchronous_copies_arrive_at_the_wait),
    TEST(tensor_cores_multiply),
    TEST(cublas_multiplies_in_streams_and_graphs),
    TEST(atomics_count),
    TEST(parameters_arrive),
    TEST(memory_is_bounded_and_counted),
    TEST(graphs_replay_what_was_captured),
    TEST(a_capture_forbids_waiting_and_allocating),
    TEST(streams_join_a_capture_by_events),
    TEST(contexts_come_and_go_on_several_threads),
    TEST(events_measure),
    TEST(communicators_can_be_made_without_waiting),
    TEST(processes_reduce_and_gather),
    TEST(faulty_kernels_are_reported),
    TEST(lazy_streams_run_when_waited_for),
};

}  // namespace

int main(int count, char** arguments) {
  if (count > 1 && !strcmp(arguments[1], "lazy")) return lazy_main();
  start();
  for (const Test& test : TESTS) {
    if (count > 1 && !strstr(test.name, arguments[1])) continue;
    const int before = failures;
    test.run();
    printf("%s %s\n", failures == before ? "ok    " : "FAILED", test.name);
  }
  return failures != 0;
}
