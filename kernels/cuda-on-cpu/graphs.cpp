// Capture of streams into graphs, and graphs: sequences of operations, in the order in which they were captured.
#include "capture.h"
#include "driver.h"

namespace cuda_on_cpu {
namespace {

enum Mode { GLOBAL, OF_THREAD, RELAXED };
thread_local int mode_of_thread = GLOBAL;

std::set<std::shared_ptr<Capture>>& captures() {
  static auto& all = *new std::set<std::shared_ptr<Capture>>;
  return all;
}

// Both graphs and their executable copies are this; they live until destroyed.
std::map<void*, std::shared_ptr<Graph>>& graphs() {
  static auto& all = *new std::map<void*, std::shared_ptr<Graph>>;
  return all;
}
std::shared_ptr<Graph> find_graph(void* handle) {
  const auto found = graphs().find(handle);
  return found == graphs().end() ? nullptr : found->second;
}
void* add_graph(std::vector<Operation> operations) {
  auto graph = std::make_shared<Graph>();
  graph->operations = std::move(operations);
  void* handle = graph.get();
  graphs()[handle] = std::move(graph);
  return handle;
}

CUresult destroy_graph(void* handle) {
  Lock lock(state);
  return graphs().erase(handle) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

}  // namespace

CUresult forbidden_in_capture() {
  if (mode_of_thread == RELAXED) return CUDA_SUCCESS;
  CUresult error = CUDA_SUCCESS;
  for (const auto& capture : captures()) {
    const bool own = capture->thread == std::this_thread::get_id() && capture->mode != RELAXED;
    const bool all = capture->mode == GLOBAL && mode_of_thread == GLOBAL;
    if (!own && !all) continue;
    capture->invalidated = true;
    error = CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  }
  return error;
}

CUresult record(Stream& stream, Operation operation) {
  if (stream.capture->invalidated) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
  stream.capture->operations.push_back(std::move(operation));
  stream.captured++;
  return CUDA_SUCCESS;
}

}  // namespace cuda_on_cpu

using namespace cuda_on_cpu;

CUDA_API CUresult cuThreadExchangeStreamCaptureMode(int* mode) {
  if (*mode < GLOBAL || *mode > RELAXED) return CUDA_ERROR_INVALID_VALUE;
  std::swap(*mode, mode_of_thread);
  return CUDA_SUCCESS;
}

CUDA_API CUresult cuStreamBeginCapture_v2(void* handle, int mode) {
  Lock lock(state);
  CUresult error;
  Device* device = current_device(error);
  if (!device) return error;
  const auto stream = find_stream(handle, device);
  if (!stream) return CUDA_ERROR_INVALID_HANDLE;
  if (mode < GLOBAL || mode > RELAXED) return CUDA_ERROR_INVALID_VALUE;
  if (stream == device->default_stream) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  if (stream->capture) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  auto capture = std::make_shared<Capture>();
  capture->origin = stream.get();
  capture->mode = mode;
  capture->thread = std::this_thread::get_id();
  captures().insert(capture);
  stream->capture = capture;
  stream->captured = stream->joined_at = 0;
  return CUDA_SUCCESS;
}

CUDA_API CUresult cuStreamEndCapture(void* handle, void** graph) {
  Lock lock(state);
  *graph = nullptr;
  CUresult error;
  Device* device = current_device(error);
  if (!device) return error;
  const auto stream = find_stream(handle, device);
  if (!stream) return CUDA_ERROR_INVALID_HANDLE;
  const auto capture = stream->capture;
  if (!capture) return CUDA_ERROR_INVALID_VALUE;
  if (capture->origin != stream.get()) {
    capture->invalidated = true;
    return CUDA_ERROR_STREAM_CAPTURE_UNMATCHED;
  }
  if (capture->mode != RELAXED && capture->thread != std::this_thread::get_id()) {
    capture->invalidated = true;
    return CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD;
  }
  const bool unjoined = has_unjoined_streams(capture.get());
  leave_capture(capture.get());
  captures().erase(capture);
  if (capture->invalidated) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
  if (unjoined) return CUDA_ERROR_STREAM_CAPTURE_UNJOINED;
  *graph = add_graph(std::move(capture->operations));
  return CUDA_SUCCESS;
}

CUDA_API CUresult cuStreamIsCapturing(void* handle, int* status) {
  Lock lock(state);
  CUresult error;
  Device* device = current_device(error);
  if (!device) return error;
  const auto stream = find_stream(handle, device);
  if (!stream) return CUDA_ERROR_INVALID_HANDLE;
  *status = !stream->capture ? 0 : stream->capture->invalidated ? 2 : 1;
  return CUDA_SUCCESS;
}

CUDA_API CUresult cuGraphCreate(void** graph, unsigned flags) {
  if (flags != 0) return CUDA_ERROR_INVALID_VALUE;
  Lock lock(state);
  *graph = add_graph({});
  return CUDA_SUCCESS;
}
CUDA_API CUresult cuGraphDestroy(void* graph) { return destroy_graph(graph); }
CUDA_API CUresult cuGraphExecDestroy(void* executable) { return destroy_graph(executable); }

CUDA_API CUresult cuGraphInstantiateWithFlags(void** executable, void* graph, unsigned long long) {
  Lock lock(state);
  CUresult error;
  if (!current_device(error)) return error;
  const auto found = find_graph(graph);
  if (!found) return CUDA_ERROR_INVALID_VALUE;
  *executable = add_graph(found->operations);
  return CUDA_SUCCESS;
}

// How many operations there are, and handles of them that nothing else takes.
CUDA_API CUresult cuGraphGetNodes(void* graph, void** nodes, size_t* count) {
  Lock lock(state);
  const auto found = find_graph(graph);
  if (!found || !count) return CUDA_ERROR_INVALID_VALUE;
  if (nodes)
    for (size_t i = 0; i < *count; i++) nodes[i] = i < found->operations.size() ? &found->operations[i] : nullptr;
  *count = nodes ? std::min(*count, found->operations.size()) : found->operations.size();
  return CUDA_SUCCESS;
}

namespace {
struct UpdateResult {
  int result;
  void *node, *from;
};
constexpr int TOPOLOGY_CHANGED = 2;
}  // namespace

// As the real one where a graph has the same operations in the same order; parameters, grids and shared memory may differ.
CUDA_API CUresult cuGraphExecUpdate_v2(void* executable, void* graph, UpdateResult* result) {
  Lock lock(state);
  const auto old = find_graph(executable), next = find_graph(graph);
  if (!old || !next) return CUDA_ERROR_INVALID_VALUE;
  bool same = old->operations.size() == next->operations.size();
  for (size_t i = 0; same && i < old->operations.size(); i++) same = old->operations[i].name == next->operations[i].name;
  if (result) *result = UpdateResult{same ? 0 : TOPOLOGY_CHANGED, nullptr, nullptr};
  if (!same) return CUDA_ERROR_GRAPH_EXEC_UPDATE_FAILURE;
  // Launches under way keep what they began with.
  auto updated = std::make_shared<Graph>(*next);
  graphs()[executable] = std::move(updated);
  return CUDA_SUCCESS;
}

CUDA_API CUresult cuGraphUpload(void* executable, void*) {
  Lock lock(state);
  return find_graph(executable) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
CUDA_API CUresult cuGraphLaunch(void* executable, void* handle) {
  std::shared_ptr<Stream> stream;
  std::shared_ptr<Graph> graph;
  auto kind = Operation::Kind::Composite;
  {
    Lock lock(state);
    CUresult error;
    Device* device = current_device(error);
    if (!device) return error;
    stream = find_stream(handle, device);
    graph = find_graph(executable);
    if (!stream || !graph) return CUDA_ERROR_INVALID_HANDLE;
    for (const Operation& operation : graph->operations)
      if (operation.kind == Operation::Kind::MayBlock) kind = Operation::Kind::MayBlock;
  }
  return submit(stream, {"graph",
                         [graph] {
                           for (const Operation& operation : graph->operations) {
                             const CUresult error = execute(operation);
                             if (error) return error;
                           }
                           return CUresult(CUDA_SUCCESS);
                         },
                         kind});
}
