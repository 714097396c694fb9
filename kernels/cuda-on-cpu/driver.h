// The driver's state, for its files. Types and codes are those of the driver's ABI; handles are pointers to these structures.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "engine.h"

#define CUDA_API extern "C" __attribute__((visibility("default")))

using CUresult = int;
using CUdevice = int;
using CUdeviceptr = unsigned long long;

enum : CUresult {
  CUDA_SUCCESS = 0,
  CUDA_ERROR_INVALID_VALUE = 1,
  CUDA_ERROR_OUT_OF_MEMORY = 2,
  CUDA_ERROR_NOT_INITIALIZED = 3,
  CUDA_ERROR_NO_DEVICE = 100,
  CUDA_ERROR_INVALID_DEVICE = 101,
  CUDA_ERROR_INVALID_CONTEXT = 201,
  CUDA_ERROR_UNSUPPORTED_LIMIT = 215,
  CUDA_ERROR_FILE_NOT_FOUND = 301,
  CUDA_ERROR_INVALID_HANDLE = 400,
  CUDA_ERROR_NOT_FOUND = 500,
  CUDA_ERROR_NOT_READY = 600,
  CUDA_ERROR_ILLEGAL_ADDRESS = 700,
  CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES = 701,
  CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED = 704,
  CUDA_ERROR_PRIMARY_CONTEXT_ACTIVE = 708,
  CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED = 712,
  CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED = 713,
  CUDA_ERROR_MISALIGNED_ADDRESS = 716,
  CUDA_ERROR_LAUNCH_FAILED = 719,
  CUDA_ERROR_NOT_SUPPORTED = 801,
  CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED = 900,
  CUDA_ERROR_STREAM_CAPTURE_INVALIDATED = 901,
  CUDA_ERROR_STREAM_CAPTURE_MERGE = 902,
  CUDA_ERROR_STREAM_CAPTURE_UNMATCHED = 903,
  CUDA_ERROR_STREAM_CAPTURE_UNJOINED = 904,
  CUDA_ERROR_STREAM_CAPTURE_ISOLATION = 905,
  CUDA_ERROR_STREAM_CAPTURE_IMPLICIT = 906,
  CUDA_ERROR_CAPTURED_EVENT = 907,
  CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD = 908,
  CUDA_ERROR_GRAPH_EXEC_UPDATE_FAILURE = 910,
};

namespace cuda_on_cpu {

struct Device;
struct Stream;

// What a stream does: at once, later, or whenever a graph is launched.
struct Operation {
  std::string name;  // of the kernel, or what it is; graphs are of the same shape if their names are
  std::function<CUresult()> run;
  enum class Kind {
    Short,      // one at a time in the whole process
    Composite,  // of others, or calls the host's code: takes no part in that
    MayBlock,   // waits for other processes: is run by a thread of the stream's own
  } kind = Kind::Short;
};

// A capture under way, which may have been joined by other streams than its origin.
struct Capture {
  Stream* origin;
  int mode;  // 0 global, 1 of the thread, 2 relaxed
  std::thread::id thread;
  bool invalidated = false;
  std::vector<Operation> operations;
};

struct Event {
  Device* device;
  unsigned flags;
  bool recorded = false;
  // Captured: which capture, and what its stream had done by then.
  std::shared_ptr<Capture> capture;
  Stream* captured_on = nullptr;
  size_t captured_at = 0;
  // The last record: its number among the operations of its stream.
  std::shared_ptr<Stream> stream;
  uint64_t ticket = 0;
  std::chrono::steady_clock::time_point time;
};

struct Stream {
  Device* device;
  unsigned flags;
  int priority = 0;
  std::shared_ptr<Capture> capture;
  size_t captured = 0;    // operations it has put into its capture
  size_t joined_at = 0;   // how many of them its origin has waited for
  // Operations that wait: some if one may block or CUDA_ON_CPU_LAZY is set, else none.
  std::deque<Operation> queue;
  uint64_t submitted = 0, finished = 0;
  bool running = false;
  bool has_worker = false;
  std::condition_variable changed;
};

struct Graph {
  std::vector<Operation> operations;
};

struct Function {
  const Kernel* kernel;
  Device* device;
  unsigned max_dynamic_shared;
};
struct Module {
  Device* device;
  std::map<std::string, std::unique_ptr<Function>> functions;
};

// A device and its primary context, the only one it has.
struct Device {
  CUdevice ordinal;
  unsigned retained = 0;
  CUresult error = CUDA_SUCCESS;  // what a kernel ended with; all calls return it from then on
  size_t used_bytes = 0;
  std::shared_ptr<Stream> default_stream;
};

constexpr size_t KIB = 1024;
constexpr size_t STATIC_SHARED_BYTES = 48 * KIB;
constexpr size_t MAX_SHARED_BYTES = 227 * KIB;
constexpr int NUM_MULTIPROCESSORS = 132;

// Guards all that is below, but is not held while operations run.
extern std::mutex state;
using Lock = std::unique_lock<std::mutex>;

std::vector<Device>& devices();
size_t memory_bytes();  // of each device

// The device whose context is current; `error` if there is none or a kernel has failed on it.
Device* current_device(CUresult& error);
// What a call must not do while a capture forbids it: invalidates the capture and returns the error.
CUresult forbidden_in_capture();
// The same for a call that uses the default stream, which waits for those that are not created as non-blocking.
CUresult forbidden_for_default_stream();
// The same for a call that waits for the whole device.
CUresult forbidden_for_device(Device* device);

// null if there is none such; the default stream for null, 1 and 2.
std::shared_ptr<Stream> find_stream(void* handle, Device* device);
// Runs, queues or records the operation.
CUresult submit(const std::shared_ptr<Stream>& stream, Operation operation);
// Runs or waits for all operations of the stream up to `ticket`.
CUresult finish(const std::shared_ptr<Stream>& stream, uint64_t ticket);
CUresult finish_all(Device* device);
void drop_streams(Device* device);

// Whether all the bytes are in one allocation of device memory (or of host memory that devices may use).
bool is_device_memory(CUdeviceptr address, size_t bytes);
void free_memory_of(Device* device);

CUresult launch(const Function& function, Extent grid, Extent block, size_t shared_bytes, void** parameters,
                const std::shared_ptr<Stream>& stream);

}  // namespace cuda_on_cpu

// For the other libraries of this folder: puts an operation into a stream, as kernels are. `run` returns a CUresult; `drop`
// is called once, when the operation cannot run again.
CUDA_API CUresult cudaOnCpuSubmit(void* stream, const char* name, int may_block, CUresult (*run)(void*), void (*drop)(void*),
                                  void* state);
CUDA_API int cudaOnCpuIsDeviceMemory(const void* address, size_t bytes);
CUDA_API int cudaOnCpuDevice();  // the current one, or -1
