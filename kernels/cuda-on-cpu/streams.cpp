// Streams and events: what runs when.
#include <stdlib.h>
#include <string.h>

#include "capture.h"
#include "driver.h"

namespace cuda_on_cpu {
namespace {

std::map<void*, std::shared_ptr<Stream>>& streams() {
  static auto& all = *new std::map<void*, std::shared_ptr<Stream>>;
  return all;
}
std::map<void*, std::shared_ptr<Event>>& events() {
  static auto& all = *new std::map<void*, std::shared_ptr<Event>>;
  return all;
}

constexpr unsigned NON_BLOCKING = 1;
constexpr unsigned WITHOUT_TIME = 2;
constexpr unsigned EXTERNAL = 1;

// CUDA_ON_CPU_LAZY=1: nothing runs before somebody waits for it, so that code which does not wait is found out.
bool is_lazy() {
  static const bool lazy = [] {
    const char* text = getenv("CUDA_ON_CPU_LAZY");
    return text && *text && strcmp(text, "0") != 0;
  }();
  return lazy;
}

// Held while one operation runs: kernels have global state, and devices do one thing at a time here.
std::mutex execution;

// Runs the first operation of the queue; `lock` is of `state`.
void run_first(Lock& lock, const std::shared_ptr<Stream>& stream) {
  const Operation operation = std::move(stream->queue.front());
  stream->queue.pop_front();
  stream->running = true;
  CUresult error = stream->device->error;
  if (!error) {
    lock.unlock();
    error = execute(operation);
    lock.lock();
  }
  if (error && !stream->device->error) stream->device->error = error;
  stream->running = false;
  stream->finished++;
  stream->changed.notify_all();
}

void work(std::shared_ptr<Stream> stream) {
  Lock lock(state);
  while (!stream->queue.empty()) {
    if (stream->running)
      stream->changed.wait(lock);
    else
      run_first(lock, stream);
  }
  stream->has_worker = false;
  stream->changed.notify_all();
}

CUresult finish_locked(Lock& lock, const std::shared_ptr<Stream>& stream, uint64_t ticket) {
  ticket = std::min(ticket, stream->submitted);
  while (stream->finished < ticket) {
    if (stream->running || stream->has_worker)
      stream->changed.wait(lock);
    else
      run_first(lock, stream);
  }
  return stream->device->error;
}

bool is_default(const std::shared_ptr<Stream>& stream) { return stream == stream->device->default_stream; }

// The default stream and those not created as non-blocking wait for each other.
void wait_for_others(Lock& lock, const std::shared_ptr<Stream>& stream) {
  if (stream->flags & NON_BLOCKING) return;
  std::vector<std::shared_ptr<Stream>> others;
  if (is_default(stream)) {
    for (const auto& it : streams())
      if (it.second->device == stream->device && !(it.second->flags & NON_BLOCKING)) others.push_back(it.second);
  } else if (stream->device->default_stream) {
    others.push_back(stream->device->default_stream);
  }
  for (const auto& other : others) finish_locked(lock, other, UINT64_MAX);
}

std::shared_ptr<Event> find_event(void* handle) {
  const auto found = events().find(handle);
  return found == events().end() ? nullptr : found->second;
}

}  // namespace

CUresult execute(const Operation& operation) {
  if (operation.kind != Operation::Kind::Short) return operation.run();
  std::lock_guard<std::mutex> one(execution);
  return operation.run();
}

CUresult forbidden_for_default_stream() {
  CUresult error = CUDA_SUCCESS;
  for (const auto& it : streams()) {
    if (!it.second->capture || (it.second->flags & NON_BLOCKING)) continue;
    it.second->capture->invalidated = true;
    error = CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
  }
  return error;
}
CUresult forbidden_for_device(Device* device) {
  CUresult error = CUDA_SUCCESS;
  for (const auto& it : streams()) {
    if (!it.second->capture || it.second->device != device) continue;
    it.second->capture->invalidated = true;
    error = CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  }
  return error;
}
void leave_capture(const Capture* capture) {
  for (const auto& it : streams())
    if (it.second->capture.get() == capture) it.second->capture = nullptr;
}
bool has_unjoined_streams(const Capture* capture) {
  for (const auto& it : streams())
    if (it.second->capture.get() == capture && it.second.get() != capture->origin && it.second->joined_at < it.second->captured)
      return true;
  return false;
}

std::shared_ptr<Stream> find_stream(void* handle, Device* device) {
  if (reinterpret_cast<uintptr_t>(handle) <= 2) {  // null, CU_STREAM_LEGACY, CU_STREAM_PER_THREAD
    if (!device->default_stream) {
      device->default_stream = std::make_shared<Stream>();
      device->default_stream->device = device;
      device->default_stream->flags = 0;
    }
    return device->default_stream;
  }
  const auto found = streams().find(handle);
  return found == streams().end() || found->second->device != device ? nullptr : found->second;
}

CUresult submit(const std::shared_ptr<Stream>& stream, Operation operation) {
  Lock lock(state);
  if (stream->capture) return record(*stream, std::move(operation));
  if (is_default(stream)) {
    const CUresult error = forbidden_for_default_stream();
    if (error) return error;
  }
  if (stream->device->error) return stream->device->error;
  wait_for_others(lock, stream);
  const bool needs_worker = operation.kind == Operation::Kind::MayBlock;
  stream->queue.push_back(std::move(operation));
  stream->submitted++;
  if (needs_worker && !stream->has_worker) {
    stream->has_worker = true;
    std::thread(work, stream).detach();
  }
  if (stream->has_worker || is_lazy()) return CUDA_SUCCESS;
  // If another thread runs this stream's operations now, then it finds this one too.
  while (!stream->running && !stream->has_worker && !stream->queue.empty()) run_first(lock, stream);
  return stream->device->error;
}

CUresult finish(const std::shared_ptr<Stream>& stream, uint64_t ticket) {
  Lock lock(state);
  return finish_locked(lock, stream, ticket);
}

static std::vector<std::shared_ptr<Stream>> streams_of(Device* device) {
  Lock lock(state);
  std::vector<std::shared_ptr<Stream>> all;
  if (device->default_stream) all.push_back(device->default_stream);
  for (const auto& it : streams())
    if (it.second->device == device) all.push_back(it.second);
  return all;
}
CUresult finish_all(Device* device) {
  for (const auto& stream : streams_of(device)) finish(stream, UINT64_MAX);
  Lock lock(state);
  return device->error;
}
void drop_streams(Device* device) {
  for (const auto& stream : streams_of(device)) {
    Lock lock(state);
    streams().erase(stream.get());
  }
  Lock lock(state);
  device->default_stream = nullptr;
}

}  // namespace cuda_on_cpu

using namespace cuda_on_cpu;

namespace {
// The stream of a call that does nothing but ask, wait or change it.
CUresult stream_for_call(void* handle, std::shared_ptr<Stream>& stream) {
  CUresult error;
  Device* device = current_device(error);
  if (!device) return error;
  stream = find_stream(handle, device);
  return stream ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}
// For one that must not be capturing.
CUresult uncaptured_stream(void* handle, std::shared_ptr<Stream>& stream) {
  const CUresult error = stream_for_call(handle, stream);
  if (error) return error;
  if (stream->capture) {
    stream->capture->invalidated = true;
    return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  }
  return is_default(stream) ? forbidden_for_default_stream() : CUDA_SUCCESS;
}
}  // namespace

CUDA_API CUresult cuStreamCreateWithPriority(void** handle, unsigned flags, int priority) {
  Lock lock(state);
  CUresult error;
  Device* device = current_device(error);
  if (!device) return error;
  if (flags > NON_BLOCKING) return CUDA_ERROR_INVALID_VALUE;
  auto stream = std::make_shared<Stream>();
  stream->device = device;
  stream->flags = flags;
  stream->priority = priority;
  *handle = stream.get();
  streams()[stream.get()] = stream;
  return CUDA_SUCCESS;
}
CUDA_API CUresult cuStreamCreate(void** handle, unsigned flags) { return cuStreamCreateWithPriority(handle, flags, 0); }
CUDA_API CUresult cuStreamDestroy_v2(void* handle) {
  std::shared_ptr<Stream> stream;
  {
    Lock lock(state);
    const auto found = streams().find(handle);
    if (found == streams().end()) return CUDA_ERROR_INVALID_HANDLE;
    stream = found->second;
    if (stream->capture) stream->capture->invalidated = true;
    streams().erase(found);
  }
  // The real driver returns at once and does the rest when the work is done.
  finish(stream, UINT64_MAX);
  return CUDA_SUCCESS;
}
CUDA_API CUresult cuStreamSynchronize(void* handle) {
  std::shared_ptr<Stream> stream;
  {
    Lock lock(state);
    const CUresult error = uncaptured_stream(handle, stream);
    if (error) return error;
  }
  Lock lock(state);
  wait_for_others(lock, stream);
  return finish_locked(lock, stream, UINT64_MAX);
}
CUDA_API CUresult cuStreamQuery(void* handle) {
  Lock lock(state);
  std::shared_ptr<Stream> stream;
  const CUresult error = uncaptured_stream(handle, stream);
  if (error) return error;
  if (stream->finished == stream->submitted) return CUDA_SUCCESS;
  if (!stream->running && !stream->has_worker) run_first(lock, stream);  // so that asking again and again comes to an end
  return stream->device->error ? stream->device->error : CUDA_ERROR_NOT_READY;
}
CUDA_API CUresult cuStreamGetCtx(void* handle, void** context) {
  Lock lock(state);
  std::shared_ptr<Stream> stream;
  const CUresult error = stream_for_call(handle, stream);
  if (!error) *context = stream->device;
  return error;
}
CUDA_API CUresult cuStreamGetFlags(void* handle, unsigned* flags) {
  Lock lock(state);
  std::shared_ptr<Stream> stream;
  const CUresult error = stream_for_call(handle, stream);
  if (!error) *flags = stream->flags;
  return error;
}

CUDA_API CUresult cuLaunchHostFunc(void* handle, void (*function)(void*), void* argument) {
  std::shared_ptr<Stream> stream;
  {
    Lock lock(state);
    const CUresult error = stream_for_call(handle, stream);
    if (error) return error;
  }
  return submit(stream, {"host function",
                         [=] {
                           function(argument);
                           return CUDA_SUCCESS;
                         },
                         Operation::Kind::Composite});
}

CUDA_API CUresult cuEventCreate(void** handle, unsigned flags) {
  Lock lock(state);
  CUresult error;
  Device* device = current_device(error);
  if (!device) return error;
  auto event = std::make_shared<Event>();
  event->device = device;
  event->flags = flags;
  *handle = event.get();
  events()[event.get()] = event;
  return CUDA_SUCCESS;
}
CUDA_API CUresult cuEventDestroy_v2(void* handle) {
  Lock lock(state);
  return events().erase(handle) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}
CUDA_API CUresult cuEventRecordWithFlags(void* handle, void* stream_handle, unsigned flags) {
  std::shared_ptr<Stream> stream;
  std::shared_ptr<Event> event;
  {
    Lock lock(state);
    const CUresult error = stream_for_call(stream_handle, stream);
    if (error) return error;
    event = find_event(handle);
    if (!event || event->device != stream->device) return CUDA_ERROR_INVALID_HANDLE;
    if (stream->capture && flags != EXTERNAL) {
      event->capture = stream->capture;
      event->captured_on = stream.get();
      event->captured_at = stream->captured;
      return stream->capture->invalidated ? CUDA_ERROR_STREAM_CAPTURE_INVALIDATED : CUDA_SUCCESS;
    }
    event->capture = nullptr;
    event->stream = stream;
    event->ticket = stream->submitted + 1;
    event->recorded = true;
  }
  return submit(stream, {"event record", [event] {
                           event->time = std::chrono::steady_clock::now();
                           return CUDA_SUCCESS;
                         }});
}
CUDA_API CUresult cuEventRecord(void* event, void* stream) { return cuEventRecordWithFlags(event, stream, 0); }

// The event of a call that waits for it or asks about it.
static CUresult uncaptured_event(void* handle, std::shared_ptr<Event>& event) {
  CUresult error;
  if (!current_device(error)) return error;
  event = find_event(handle);
  if (!event) return CUDA_ERROR_INVALID_HANDLE;
  if (!event->capture) return CUDA_SUCCESS;
  event->capture->invalidated = true;
  return CUDA_ERROR_CAPTURED_EVENT;
}
CUDA_API CUresult cuEventQuery(void* handle) {
  Lock lock(state);
  std::shared_ptr<Event> event;
  const CUresult error = uncaptured_event(handle, event);
  if (error || !event->recorded) return error;
  const auto stream = event->stream;
  if (stream->finished >= event->ticket) return CUDA_SUCCESS;
  if (!stream->running && !stream->has_worker && !stream->queue.empty()) run_first(lock, stream);
  return stream->device->error ? stream->device->error : CUDA_ERROR_NOT_READY;
}
CUDA_API CUresult cuEventSynchronize(void* handle) {
  Lock lock(state);
  std::shared_ptr<Event> event;
  const CUresult error = uncaptured_event(handle, event);
  if (error || !event->recorded) return error;
  return finish_locked(lock, event->stream, event->ticket);
}
CUDA_API CUresult cuEventElapsedTime_v2(float* milliseconds, void* start, void* end) {
  Lock lock(state);
  std::shared_ptr<Event> both[2];
  for (int i = 0; i < 2; i++) {
    const CUresult error = uncaptured_event(i == 0 ? start : end, both[i]);
    if (error) return error;
    if (!both[i]->recorded || (both[i]->flags & WITHOUT_TIME)) return CUDA_ERROR_INVALID_HANDLE;
    if (both[i]->stream->finished < both[i]->ticket) return CUDA_ERROR_NOT_READY;
  }
  *milliseconds = std::chrono::duration<float, std::milli>(both[1]->time - both[0]->time).count();
  return CUDA_SUCCESS;
}
CUDA_API CUresult cuEventElapsedTime(float* milliseconds, void* start, void* end) {
  return cuEventElapsedTime_v2(milliseconds, start, end);
}

CUDA_API CUresult cuStreamWaitEvent(void* stream_handle, void* handle, unsigned flags) {
  std::shared_ptr<Stream> stream;
  std::shared_ptr<Event> event;
  Operation::Kind kind;
  {
    Lock lock(state);
    const CUresult error = stream_for_call(stream_handle, stream);
    if (error) return error;
    event = find_event(handle);
    if (!event) return CUDA_ERROR_INVALID_HANDLE;
    if (event->capture) {
      if (stream->capture && stream->capture != event->capture) {
        stream->capture->invalidated = event->capture->invalidated = true;
        return CUDA_ERROR_STREAM_CAPTURE_MERGE;
      }
      if (!stream->capture) {  // the stream joins the capture
        stream->capture = event->capture;
        stream->captured = stream->joined_at = 0;
      } else if (event->captured_on != stream.get()) {
        event->captured_on->joined_at = std::max(event->captured_on->joined_at, event->captured_at);
      }
      return CUDA_SUCCESS;
    }
    if (!event->recorded) return CUDA_SUCCESS;
    if (stream->capture && flags != EXTERNAL) {
      stream->capture->invalidated = true;
      return CUDA_ERROR_STREAM_CAPTURE_ISOLATION;
    }
    if (event->stream == stream || (event->stream->finished >= event->ticket && !stream->capture)) return CUDA_SUCCESS;
    kind = event->stream->has_worker ? Operation::Kind::MayBlock : Operation::Kind::Composite;
  }
  const auto source = event->stream;
  const uint64_t ticket = event->ticket;
  return submit(stream, {"event wait", [=] { return finish(source, ticket); }, kind});
}

CUDA_API CUresult cudaOnCpuSubmit(void* handle, const char* name, int may_block, CUresult (*run)(void*), void (*drop)(void*),
                                  void* argument) {
  const std::shared_ptr<void> kept(argument, drop);
  std::shared_ptr<Stream> stream;
  {
    Lock lock(state);
    const CUresult error = stream_for_call(handle, stream);
    if (error) return error;
  }
  return submit(stream, {name, [run, kept] { return run(kept.get()); },
                         may_block ? Operation::Kind::MayBlock : Operation::Kind::Short});
}
