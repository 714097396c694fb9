// Stacks, and changing between them.
#pragma once

#include <stddef.h>

namespace cuda_on_cpu {

struct Stack {
  char* base;  // of the guard page below
  char* top;
};
Stack make_stack(unsigned index);
// Whether the address is in the guard page of a stack: it has overflowed.
bool is_below_stack(const Stack& stack, const void* address);

// A point of execution: that of the thread that calls `change`, or the start of `entry` on a stack.
struct Context {
  void* stack_pointer = nullptr;
};
void start_at(Context& context, const Stack& stack, void (*entry)());
void change(Context& from, Context& to);

}  // namespace cuda_on_cpu
