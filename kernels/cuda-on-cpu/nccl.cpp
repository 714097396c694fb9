// libnccl.so.2 for processes (or threads with a device each) of one machine: they exchange pieces through shared memory.
// A rank that does not come makes the others wait, as NCCL does, until they abort their communicators.
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "cu.h"
#include "types.h"

#define API extern "C" __attribute__((visibility("default")))

namespace {

using Result = int;
enum : Result {
  SUCCESS = 0,
  UNHANDLED_CUDA_ERROR = 1,
  SYSTEM_ERROR = 2,
  INVALID_ARGUMENT = 4,
  INVALID_USAGE = 5,
  IN_PROGRESS = 7,
};
enum DataType { INT8, UINT8, INT32, UINT32, INT64, UINT64, FLOAT16, FLOAT32, FLOAT64, BFLOAT16, FLOAT8_E4M3, NUM_TYPES };
enum Reduction { SUM, PROD, MAX, MIN, NUM_REDUCTIONS };

constexpr size_t BYTES_OF[NUM_TYPES] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1};
const char* const NAMES_OF[NUM_TYPES] = {"int8", "uint8", "int32", "uint32", "int64", "uint64", "f16", "f32", "f64", "bf16", "f8"};

struct UniqueId {
  char text[128];
};

constexpr int MAX_RANKS = 16;
constexpr size_t PIECE_BYTES = 256 << 10;

// What a rank is doing, which all must agree in.
struct Description {
  char name[16];
  uint64_t count;
  int32_t type, reduction, root;
  bool operator==(const Description& other) const {
    return !strcmp(name, other.name) && count == other.count && type == other.type && reduction == other.reduction &&
           root == other.root;
  }
  std::string text() const {
    return std::string(name) + " of " + std::to_string(count) + " " + NAMES_OF[type] + " (reduction " +
           std::to_string(reduction) + ", root " + std::to_string(root) + ")";
  }
};
// Pieces are numbered; a rank's piece is in one of two places in turn.
struct Rank {
  std::atomic<uint32_t> joined;
  std::atomic<uint64_t> written, read;  // how many pieces
  Description description[2];
  alignas(64) unsigned char piece[2][PIECE_BYTES];
};
struct Shared {
  std::atomic<uint32_t> num_ranks, joined;
  Rank ranks[MAX_RANKS];
};

void pause(unsigned& turns) {
  if (++turns < 200)
    std::this_thread::yield();
  else
    std::this_thread::sleep_for(std::chrono::microseconds(std::min(turns, 1000u) / 5));
}

struct Comm {
  Shared* shared = nullptr;
  std::string name;
  int rank, num_ranks, device;
  std::atomic<bool> aborted{false};
  std::atomic<Result> error{SUCCESS};
  uint64_t pieces = 0;  // of the operations, which run one after the other
  std::mutex one;

  ~Comm() {
    if (shared) munmap(shared, sizeof(Shared));
    shm_unlink(name.c_str());  // there is no such name any more if all have joined
  }

  bool is_complete() const { return shared->joined.load() == uint32_t(num_ranks); }

  // False if aborted.
  template <class Condition> bool wait(Condition condition) {
    for (unsigned turns = 0; !condition();) {
      if (aborted) return false;
      pause(turns);
    }
    return true;
  }
  bool wait_for_all(std::atomic<uint64_t> Rank::* count, uint64_t least) {
    return wait([&] {
      for (int i = 0; i < num_ranks; i++)
        if ((shared->ranks[i].*count).load(std::memory_order_acquire) < least) return false;
      return true;
    });
  }

  // Gives the own piece to all, and all pieces to `use`. False if aborted or the ranks do different things.
  bool exchange(const Description& description, const void* own, size_t bytes, const std::function<void(const std::vector<const unsigned char*>&)>& use) {
    if (!wait([&] { return is_complete(); })) return false;
    const uint64_t number = ++pieces;
    const size_t place = number % 2;
    // The piece before the last, which was here, has been read by all.
    if (number > 2 && !wait_for_all(&Rank::read, number - 2)) return false;
    Rank& mine = shared->ranks[rank];
    mine.description[place] = description;
    if (own) memcpy(mine.piece[place], own, bytes);
    mine.written.store(number, std::memory_order_release);
    if (!wait_for_all(&Rank::written, number)) return false;
    std::vector<const unsigned char*> all;
    for (int i = 0; i < num_ranks; i++) {
      const Description& other = shared->ranks[i].description[place];
      if (!(other == description)) {
        fprintf(stderr, "cuda-on-cpu: rank %d does %s, rank %d %s\n", rank, description.text().c_str(), i, other.text().c_str());
        error = INVALID_USAGE;
        return false;
      }
      all.push_back(shared->ranks[i].piece[place]);
    }
    use(all);
    mine.read.store(number, std::memory_order_release);
    return true;
  }
};

std::mutex registry;
std::map<void*, std::shared_ptr<Comm>>& comms() {
  static auto& all = *new std::map<void*, std::shared_ptr<Comm>>;
  return all;
}
std::shared_ptr<Comm> find(void* handle) {
  std::lock_guard<std::mutex> lock(registry);
  const auto found = comms().find(handle);
  return found == comms().end() ? nullptr : found->second;
}

template <class T> T combine(Reduction reduction, T a, T b) {
  switch (reduction) {
    case PROD: return T(a * b);
    case MAX: return std::max(a, b);
    case MIN: return std::min(a, b);
    default: return T(a + b);
  }
}
template <class T> void reduce_as(Reduction reduction, const std::vector<const unsigned char*>& all, size_t count, void* to) {
  for (size_t i = 0; i < count; i++) {
    T result = reinterpret_cast<const T*>(all[0])[i];
    for (size_t rank = 1; rank < all.size(); rank++) result = combine(reduction, result, reinterpret_cast<const T*>(all[rank])[i]);
    static_cast<T*>(to)[i] = result;
  }
}
// Of 16 bits each: computed in floats, rounded once.
template <float (*load)(uint16_t), uint16_t (*store)(float)>
void reduce_halves(Reduction reduction, const std::vector<const unsigned char*>& all, size_t count, void* to) {
  for (size_t i = 0; i < count; i++) {
    float result = load(reinterpret_cast<const uint16_t*>(all[0])[i]);
    for (size_t rank = 1; rank < all.size(); rank++)
      result = combine(reduction, result, load(reinterpret_cast<const uint16_t*>(all[rank])[i]));
    static_cast<uint16_t*>(to)[i] = store(result);
  }
}
void reduce(int type, Reduction reduction, const std::vector<const unsigned char*>& all, size_t count, void* to) {
  using namespace cuda_on_cpu;
  switch (type) {
    case INT8: return reduce_as<int8_t>(reduction, all, count, to);
    case UINT8: return reduce_as<uint8_t>(reduction, all, count, to);
    case INT32: return reduce_as<int32_t>(reduction, all, count, to);
    case UINT32: return reduce_as<uint32_t>(reduction, all, count, to);
    case INT64: return reduce_as<int64_t>(reduction, all, count, to);
    case UINT64: return reduce_as<uint64_t>(reduction, all, count, to);
    case FLOAT16: return reduce_halves<float_of_f16, f16_of_float>(reduction, all, count, to);
    case FLOAT32: return reduce_as<float>(reduction, all, count, to);
    case FLOAT64: return reduce_as<double>(reduction, all, count, to);
    case BFLOAT16: return reduce_halves<float_of_bf16, bf16_of_float>(reduction, all, count, to);
  }
}

struct Collective {
  std::shared_ptr<Comm> comm;
  Description description;
  const unsigned char* from;
  unsigned char* to;
  size_t from_count, to_count;
  std::function<bool(const Collective&)> body;

  size_t element() const { return BYTES_OF[description.type]; }
  // Calls `each` for pieces of `count` elements, with the first and how many; stops when it says false.
  template <class Each> bool in_pieces(size_t count, Each each) const {
    const size_t most = PIECE_BYTES / element();
    for (size_t first = 0; first < count; first += most)
      if (!each(first, std::min(most, count - first))) return false;
    return true;
  }
  CUresult run() const {
    std::lock_guard<std::mutex> lock(comm->one);
    if ((from && from_count && !cudaOnCpuIsDeviceMemory(from, from_count * element())) ||
        (to && to_count && !cudaOnCpuIsDeviceMemory(to, to_count * element()))) {
      fprintf(stderr, "cuda-on-cpu: %s: a buffer is outside of device memory\n", description.text().c_str());
      return 700;
    }
    body(*this);
    return 0;  // of the device; what went wrong with others is the communicator's
  }
};

thread_local int group_depth = 0;
struct Deferred {
  void* context;
  std::function<Result()> run;
};
thread_local std::vector<Deferred> deferred;

Result in_group(std::function<Result()> run) {
  if (group_depth == 0) return run();
  void* context = nullptr;
  cuCtxGetCurrent(&context);
  deferred.push_back({context, std::move(run)});
  return SUCCESS;
}

struct Call {
  const char* name;
  const void* from;
  void* to;
  size_t from_count, to_count, count;
  int type, reduction, root;
  void *comm, *stream;
};
Result enqueue(const Call& call, std::function<bool(const Collective&)> body) {
  const auto comm = find(call.comm);
  if (!comm) return INVALID_ARGUMENT;
  if (call.type < 0 || call.type >= NUM_TYPES) return INVALID_ARGUMENT;
  const bool reduces = call.reduction >= 0;
  if (reduces && (call.reduction >= NUM_REDUCTIONS || call.type == FLOAT8_E4M3)) return INVALID_ARGUMENT;
  if (call.root < 0 || call.root >= comm->num_ranks) return INVALID_ARGUMENT;
  if (comm->error) return comm->error;
  Description description{};
  snprintf(description.name, sizeof(description.name), "%s", call.name);
  description.count = call.count;
  description.type = call.type;
  description.reduction = call.reduction;
  description.root = call.root;
  auto collective = std::make_unique<Collective>(
      Collective{comm, description, static_cast<const unsigned char*>(call.from), static_cast<unsigned char*>(call.to),
                 call.from_count, call.to_count, std::move(body)});
  const std::string name = std::string("nccl") + call.name;
  void* stream = call.stream;
  // Shared, because what a std::function holds can be copied.
  const std::shared_ptr<Collective> kept = std::move(collective);
  return in_group([kept, stream, name] {
    const CUresult error = cudaOnCpuSubmit(
        stream, name.c_str(), 1, [](void* state) { return (*static_cast<std::shared_ptr<Collective>*>(state))->run(); },
        [](void* state) { delete static_cast<std::shared_ptr<Collective>*>(state); }, new std::shared_ptr<Collective>(kept));
    return error ? UNHANDLED_CUDA_ERROR : SUCCESS;
  });
}

Result join(const std::shared_ptr<Comm>& comm) {
  const int file = shm_open(comm->name.c_str(), O_CREAT | O_RDWR, 0600);
  if (file < 0 || ftruncate(file, sizeof(Shared)) != 0) {
    perror("cuda-on-cpu: shared memory");
    if (file >= 0) close(file);
    return SYSTEM_ERROR;
  }
  void* mapping = mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  if (mapping == MAP_FAILED) return SYSTEM_ERROR;
  comm->shared = static_cast<Shared*>(mapping);
  uint32_t expected = 0;
  if (!comm->shared->num_ranks.compare_exchange_strong(expected, uint32_t(comm->num_ranks)) &&
      expected != uint32_t(comm->num_ranks))
    return INVALID_USAGE;
  if (comm->shared->ranks[comm->rank].joined.exchange(1)) return INVALID_USAGE;
  if (++comm->shared->joined == uint32_t(comm->num_ranks)) shm_unlink(comm->name.c_str());
  return SUCCESS;
}

struct Config {
  size_t size;
  unsigned magic, version;
  int blocking;  // INT_MIN: not said
};

Result init(void** handle, int num_ranks, const UniqueId& id, int rank, const Config* config) {
  if (!handle || num_ranks < 1 || num_ranks > MAX_RANKS || rank < 0 || rank >= num_ranks) return INVALID_ARGUMENT;
  if (memcmp(id.text, "/cuda-on-cpu-", 13) != 0) return INVALID_ARGUMENT;
  const int device = cudaOnCpuDevice();
  if (device < 0) return UNHANDLED_CUDA_ERROR;
  auto comm = std::make_shared<Comm>();
  comm->name.assign(id.text, strnlen(id.text, sizeof(id.text)));
  comm->rank = rank;
  comm->num_ranks = num_ranks;
  comm->device = device;
  const Result joined = join(comm);
  if (joined) return joined;
  *handle = comm.get();
  {
    std::lock_guard<std::mutex> lock(registry);
    comms()[comm.get()] = comm;
  }
  const bool blocking = !config || config->blocking != 0;
  if (!blocking) return comm->is_complete() ? SUCCESS : IN_PROGRESS;
  return in_group([comm] {
    comm->wait([&] { return comm->is_complete(); });
    return SUCCESS;
  });
}

}  // namespace

API Result ncclGetVersion(int* version) {
  *version = 22800;
  return SUCCESS;
}
API const char* ncclGetErrorString(Result result) {
  switch (result) {
    case SUCCESS: return "no error";
    case UNHANDLED_CUDA_ERROR: return "unhandled cuda error";
    case SYSTEM_ERROR: return "unhandled system error";
    case INVALID_ARGUMENT: return "invalid argument";
    case INVALID_USAGE: return "invalid usage";
    case IN_PROGRESS: return "NCCL operation in progress";
    default: return "unknown result code";
  }
}
API const char* ncclGetLastError(void*) { return ""; }

API Result ncclGetUniqueId(UniqueId* id) {
  unsigned char random[16];
  const int file = open("/dev/urandom", O_RDONLY | O_CLOEXEC);
  if (file < 0) return SYSTEM_ERROR;
  const bool whole = read(file, random, sizeof(random)) == ssize_t(sizeof(random));
  close(file);
  if (!whole) return SYSTEM_ERROR;
  memset(id, 0, sizeof(*id));
  char* at = id->text + snprintf(id->text, sizeof(id->text), "/cuda-on-cpu-");
  for (const unsigned char byte : random) at += snprintf(at, 3, "%02x", byte);
  return SUCCESS;
}

API Result ncclCommInitRankConfig(void** comm, int num_ranks, UniqueId id, int rank, const Config* config) {
  return init(comm, num_ranks, id, rank, config);
}
API Result ncclCommInitRank(void** comm, int num_ranks, UniqueId id, int rank) {
  return init(comm, num_ranks, id, rank, nullptr);
}
static Result drop(void* handle, bool aborts) {
  std::shared_ptr<Comm> comm;
  {
    std::lock_guard<std::mutex> lock(registry);
    const auto found = comms().find(handle);
    if (found == comms().end()) return INVALID_ARGUMENT;
    comm = found->second;
    comms().erase(found);
  }
  if (aborts) comm->aborted = true;
  // The operation that runs now ends by itself; those in graphs and queues keep what they use.
  std::lock_guard<std::mutex> idle(comm->one);
  return SUCCESS;
}
API Result ncclCommDestroy(void* comm) { return drop(comm, false); }
API Result ncclCommAbort(void* comm) { return drop(comm, true); }
API Result ncclCommFinalize(void* comm) { return find(comm) ? SUCCESS : INVALID_ARGUMENT; }

API Result ncclCommGetAsyncError(void* handle, Result* error) {
  const auto comm = find(handle);
  if (!comm) return INVALID_ARGUMENT;
  *error = comm->error ? comm->error.load() : comm->is_complete() ? SUCCESS : IN_PROGRESS;
  return SUCCESS;
}
API Result ncclCommCount(void* handle, int* count) {
  const auto comm = find(handle);
  if (!comm) return INVALID_ARGUMENT;
  *count = comm->num_ranks;
  return SUCCESS;
}
API Result ncclCommUserRank(void* handle, int* rank) {
  const auto comm = find(handle);
  if (!comm) return INVALID_ARGUMENT;
  *rank = comm->rank;
  return SUCCESS;
}
API Result ncclCommCuDevice(void* handle, int* device) {
  const auto comm = find(handle);
  if (!comm) return INVALID_ARGUMENT;
  *device = comm->device;
  return SUCCESS;
}

API Result ncclGroupStart() {
  group_depth++;
  return SUCCESS;
}
API Result ncclGroupEnd() {
  if (group_depth == 0) return INVALID_USAGE;
  if (--group_depth > 0) return SUCCESS;
  const auto all = std::move(deferred);
  deferred.clear();
  void* context = nullptr;
  cuCtxGetCurrent(&context);
  Result result = SUCCESS;
  for (const Deferred& it : all) {
    cuCtxSetCurrent(it.context);
    const Result one = it.run();
    if (result == SUCCESS) result = one;
  }
  cuCtxSetCurrent(context);
  return result;
}

API Result ncclAllReduce(const void* from, void* to, size_t count, int type, int reduction, void* comm, void* stream) {
  return enqueue({"AllReduce", from, to, count, count, count, type, std::max(reduction, 0), 0, comm, stream}, [](const Collective& it) {
    return it.in_pieces(it.description.count, [&](size_t first, size_t count) {
      const size_t bytes = it.element();
      return it.comm->exchange(it.description, it.from + first * bytes, count * bytes, [&](const auto& all) {
        reduce(it.description.type, Reduction(it.description.reduction), all, count, it.to + first * bytes);
      });
    });
  });
}
API Result ncclReduce(const void* from, void* to, size_t count, int type, int reduction, int root, void* comm, void* stream) {
  const auto found = find(comm);
  const bool is_root = found && found->rank == root;
  return enqueue({"Reduce", from, is_root ? to : nullptr, count, count, count, type, std::max(reduction, 0), root, comm, stream},
                 [](const Collective& it) {
                   return it.in_pieces(it.description.count, [&](size_t first, size_t count) {
                     const size_t bytes = it.element();
                     return it.comm->exchange(it.description, it.from + first * bytes, count * bytes, [&](const auto& all) {
                       if (it.to)
                         reduce(it.description.type, Reduction(it.description.reduction), all, count, it.to + first * bytes);
                     });
                   });
                 });
}
API Result ncclReduceScatter(const void* from, void* to, size_t count, int type, int reduction, void* comm, void* stream) {
  const auto found = find(comm);
  const size_t num_ranks = found ? size_t(found->num_ranks) : 0;
  return enqueue({"ReduceScatter", from, to, count * num_ranks, count, count, type, std::max(reduction, 0), 0, comm, stream},
                 [](const Collective& it) {
                   const size_t bytes = it.element(), total = it.description.count;
                   for (int target = 0; target < it.comm->num_ranks; target++) {
                     const bool going = it.in_pieces(total, [&](size_t first, size_t count) {
                       const auto* own = it.from + (size_t(target) * total + first) * bytes;
                       return it.comm->exchange(it.description, own, count * bytes, [&](const auto& all) {
                         if (target == it.comm->rank)
                           reduce(it.description.type, Reduction(it.description.reduction), all, count, it.to + first * bytes);
                       });
                     });
                     if (!going) return false;
                   }
                   return true;
                 });
}
API Result ncclAllGather(const void* from, void* to, size_t count, int type, void* comm, void* stream) {
  const auto found = find(comm);
  const size_t num_ranks = found ? size_t(found->num_ranks) : 0;
  return enqueue({"AllGather", from, to, count, count * num_ranks, count, type, -1, 0, comm, stream}, [](const Collective& it) {
    return it.in_pieces(it.description.count, [&](size_t first, size_t count) {
      const size_t bytes = it.element();
      return it.comm->exchange(it.description, it.from + first * bytes, count * bytes, [&](const auto& all) {
        for (size_t rank = 0; rank < all.size(); rank++)
          memcpy(it.to + (rank * it.description.count + first) * bytes, all[rank], count * bytes);
      });
    });
  });
}
API Result ncclBroadcast(const void* from, void* to, size_t count, int type, int root, void* comm, void* stream) {
  const auto found = find(comm);
  const bool is_root = found && found->rank == root;
  return enqueue({"Broadcast", is_root ? from : nullptr, to, count, count, count, type, -1, root, comm, stream},
                 [](const Collective& it) {
                   return it.in_pieces(it.description.count, [&](size_t first, size_t count) {
                     const size_t bytes = it.element();
                     const auto* own = it.from ? it.from + first * bytes : nullptr;
                     return it.comm->exchange(it.description, own, count * bytes, [&](const auto& all) {
                       memcpy(it.to + first * bytes, all[size_t(it.description.root)], count * bytes);
                     });
                   });
                 });
}
API Result ncclBcast(void* buffer, size_t count, int type, int root, void* comm, void* stream) {
  return ncclBroadcast(buffer, buffer, count, type, root, comm, stream);
}
