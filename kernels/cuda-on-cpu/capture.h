// What streams and graphs share.
#pragma once

#include "driver.h"

namespace cuda_on_cpu {

CUresult execute(const Operation& operation);

// Adds the operation to the stream's capture.
CUresult record(Stream& stream, Operation operation);

// Of all streams in the capture.
void leave_capture(const Capture* capture);
bool has_unjoined_streams(const Capture* capture);

}  // namespace cuda_on_cpu
