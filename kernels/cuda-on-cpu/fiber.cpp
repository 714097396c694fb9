#include "fiber.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#if !defined(__x86_64__) && !defined(__aarch64__)
#include <ucontext.h>

#include <new>
#endif

namespace cuda_on_cpu {

// Much more than a kernel's local arrays take; pages are given only when touched.
constexpr size_t STACK_BYTES = 256 << 10;

Stack make_stack(unsigned index) {
  const size_t guard = size_t(sysconf(_SC_PAGESIZE));
  void* base = mmap(nullptr, guard + STACK_BYTES, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
  if (base == MAP_FAILED || mprotect(base, guard, PROT_NONE) != 0) {
    perror("cuda-on-cpu: a stack for a thread");
    abort();
  }
  // Threads run the same code: with tops at the same place of a page they would all use the same few sets of the cache.
  const size_t shift = index % 32 * (512 + 64);
  return Stack{static_cast<char*>(base), static_cast<char*>(base) + guard + STACK_BYTES - shift};
}

bool is_below_stack(const Stack& stack, const void* address) {
  const char* at = static_cast<const char*>(address);
  return at >= stack.base && at < stack.base + sysconf(_SC_PAGESIZE);
}

#if defined(__x86_64__)

// Saves what a called function must keep, on the old stack, and takes it from the new one.
asm(R"(
.text
.type cuda_on_cpu_change, @function
cuda_on_cpu_change:
  .cfi_startproc
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq (%rsi), %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .cfi_endproc
.size cuda_on_cpu_change, .-cuda_on_cpu_change
)");
extern "C" __attribute__((visibility("hidden"))) void cuda_on_cpu_change(void** from, void** to);

void start_at(Context& context, const Stack& stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack.top) & ~uintptr_t(15));
  *--top = nullptr;  // where `entry` would return to; it never does
  *--top = reinterpret_cast<void*>(entry);
  for (int saved = 0; saved < 6; saved++) *--top = nullptr;
  context.stack_pointer = top;
}
void change(Context& from, Context& to) { cuda_on_cpu_change(&from.stack_pointer, &to.stack_pointer); }

#elif defined(__aarch64__)

asm(R"(
.text
.type cuda_on_cpu_change, %function
cuda_on_cpu_change:
  .cfi_startproc
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  ldr x9, [x1]
  mov sp, x9
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
  .cfi_endproc
.size cuda_on_cpu_change, .-cuda_on_cpu_change
)");
extern "C" __attribute__((visibility("hidden"))) void cuda_on_cpu_change(void** from, void** to);

void start_at(Context& context, const Stack& stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack.top) & ~uintptr_t(15)) - 20;
  for (int saved = 0; saved < 20; saved++) top[saved] = nullptr;
  top[11] = reinterpret_cast<void*>(entry);  // x30
  context.stack_pointer = top;
}
void change(Context& from, Context& to) { cuda_on_cpu_change(&from.stack_pointer, &to.stack_pointer); }

#else

void start_at(Context& context, const Stack& stack, void (*entry)()) {
  if (!context.stack_pointer) context.stack_pointer = new ucontext_t;
  auto* machine = static_cast<ucontext_t*>(context.stack_pointer);
  getcontext(machine);
  machine->uc_stack.ss_sp = stack.base + sysconf(_SC_PAGESIZE);
  machine->uc_stack.ss_size = size_t(stack.top - static_cast<char*>(machine->uc_stack.ss_sp)) & ~size_t(15);
  machine->uc_link = nullptr;
  makecontext(machine, entry, 0);
}
void change(Context& from, Context& to) {
  if (!from.stack_pointer) from.stack_pointer = new ucontext_t;
  swapcontext(static_cast<ucontext_t*>(from.stack_pointer), static_cast<ucontext_t*>(to.stack_pointer));
}

#endif

}  // namespace cuda_on_cpu
