// runtime.cpp: fibers and their scheduler, barriers, shared memory.
#include "runtime.h"

#include <sys/mman.h>
#include <cstdio>
#include <cstdlib>
#include <new>

#if !defined(__x86_64__) || defined(EMU_UCONTEXT)
#include <ucontext.h>
#endif

namespace emu {
__thread const Here* here = nullptr;
__thread Block* block = nullptr;
__thread Fiber* fiber = nullptr;

#if defined(__x86_64__) && !defined(EMU_UCONTEXT)
// Saves the callee-saved registers on the stack and goes on on another; ten times faster than swapcontext, which asks
// the kernel for the signal mask.
extern "C" void emu_switch(void** save, void* load);
asm(R"(.text
.globl emu_switch
.hidden emu_switch
.type emu_switch,@function
emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emu_switch,.-emu_switch
)");
static void* first_context(u8* stack, u32 tid, void (*run)()) {
  // Staggered, so that the stacks do not all fall on the same cache lines.
  void** top = reinterpret_cast<void**>(stack + STACK - (tid & 31) * 256);
  *--top = nullptr;
  *--top = nullptr;
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(run);  // where the switch returns to, with the stack as after a call
  for (int i = 0; i < 6; i++) *--top = nullptr;
  return top;
}
#else
static __thread ucontext_t main_context, lost_context;
static void emu_switch(void** save, void* load) {
  if (!*save) *save = block->main_sp ? &lost_context : &main_context;
  swapcontext(static_cast<ucontext_t*>(*save), static_cast<ucontext_t*>(load));
}
static void* first_context(u8* stack, u32, void (*run)()) {
  const u32 page = 4096;
  ucontext_t* u = reinterpret_cast<ucontext_t*>(stack + STACK - page);
  getcontext(u);
  u->uc_stack.ss_sp = stack + page;
  u->uc_stack.ss_size = STACK - 2 * page;
  u->uc_link = nullptr;
  makecontext(u, run, 0);
  return u;
}
#endif

dim3 thread_index() { return here->thread; }
dim3 block_index() { return here->block; }
dim3 block_size() { return here->block_dim; }
dim3 grid_size() { return here->grid_dim; }

// Ends the block: back to the scheduler, for good.
void fail_text(const std::string& problem) {
  Block& b = *block;
  char place[128];
  const Here& h = *fiber;
  snprintf(place, sizeof place, "block (%u,%u,%u) thread (%u,%u,%u): ", h.block.x, h.block.y, h.block.z, h.thread.x,
           h.thread.y, h.thread.z);
  b.error = place + problem;
  fiber = nullptr;
  void* lost = nullptr;
  emu_switch(&lost, b.main_sp);
  abort();
}
void fail(const char* problem) { fail_text(problem); }

// The next ready fiber in thread order, or from a random place on; the scheduler when none is ready.
static void* pick(Fiber* me) {
  Block& b = *block;
  u32 i = me->tid;
  if (b.random) {
    b.random ^= b.random << 13;
    b.random ^= b.random >> 7;
    b.random ^= b.random << 17;
    i = (u32)(b.random % b.n);
  }
  for (u32 k = 0; k < b.n; k++) {
    if (++i >= b.n) i = 0;
    Fiber& o = b.fibers[i];
    if (o.state == State::READY) {
      fiber = &o;
      here = &o;
      return o.sp;
    }
  }
  fiber = nullptr;
  return b.main_sp;
}
void yield() {
  Fiber* me = fiber;
  emu_switch(&me->sp, pick(me));
}

static void release_block(Block& b) {
  int line = 0;
  for (Fiber& f : b.fibers) {
    if (f.state != State::AT_BLOCK) continue;
    if (line && f.line != line)
      fail_text("divergent barrier: threads wait at __syncthreads of lines " + std::to_string(line) + " and " +
                std::to_string(f.line));
    line = f.line;
  }
  u32 tick = b.checked ? next_tick() : 0;
  b.epoch = tick;
  for (Fiber& f : b.fibers) {
    if (f.state == State::AT_BLOCK) f.state = State::READY;
    f.clock = tick;
  }
  b.at_block = 0;
}
// Threads that have exited count as arrived, as on the device.
void sync_block(int line) {
  Block& b = *block;
  Fiber* me = fiber;
  me->state = State::AT_BLOCK;
  me->line = line;
  if (++b.at_block + b.done == b.n) {
    release_block(b);
  } else {
    yield();
  }
}

void warp_meet(u32 mask, void* arg, WarpOp op, const void* common) {
  Fiber* me = fiber;
  Block& b = *block;
  Warp& w = b.warps[me->warp];
  if (!(mask >> me->lane & 1)) fail("a lane calls a warp operation whose mask leaves it out");
  if (mask & ~w.alive) fail("a warp operation's mask names lanes that have exited or do not exist");
  me->mask = mask;
  me->op = reinterpret_cast<const void*>(op);
  me->arg = arg;
  w.arrived |= 1u << me->lane;
  if ((w.arrived & mask) != mask) {
    me->state = State::AT_WARP;
    yield();
    return;
  }
  void* args[32] = {};
  for (u32 l = 0; l < 32; l++) {
    if (!(mask >> l & 1)) continue;
    Fiber& o = b.fibers[me->warp * 32 + l];
    if (o.mask != mask || o.op != me->op) fail("lanes meet at different warp operations or with different masks");
    args[l] = o.arg;
    o.state = State::READY;
  }
  w.arrived &= ~mask;
  op(args, common);
}

void group_meet(void* arg, GroupOp op) {
  Fiber* me = fiber;
  Block& b = *block;
  u32 number = me->warp / 4;
  if (b.n < (number + 1) * 128) fail("a warpgroup operation in a block without four whole warps here");
  Group& g = b.groups[number];
  me->arg = arg;
  me->op = reinterpret_cast<const void*>(op);
  g.waiting.push_back(me);
  if (g.waiting.size() < 128) {
    me->state = State::AT_GROUP;
    yield();
    return;
  }
  void* args[128];
  for (Fiber* f : g.waiting) {
    if (f->op != me->op) fail("threads meet at different warpgroup operations");
    args[f->tid & 127] = f->arg;
    f->state = State::READY;
  }
  g.waiting.clear();
  op(g, args, number);
}

u8* shared_array(const void* site, u32 bytes) {
  Block& b = *block;
  for (const Slot& s : b.slots)
    if (s.site == site) return b.shared + s.offset;
  u32 at = (b.top + 127) & ~127u;
  if (at + bytes + RED - b.dynamic > (48 << 10) + 8192 || at + bytes + RED > SHARED_LIMIT)
    fail("more than 48 KiB of shared arrays");
  b.slots.push_back({site, bytes, at});
  b.top = at + bytes + RED;
  memset(b.shared + at, 0xff, bytes + RED);
  if (b.checked) {
    memset(b.declared + at, 1, bytes);
    memset(b.declared + at + bytes, 0, RED);
  }
  return b.shared + at;
}
u8* shared_dynamic() { return block->shared; }
u32 shared_offset(const void* p) { return (u32)(static_cast<const u8*>(p) - block->shared); }

static void fiber_main() {
  block->kernel->enter(block->args);
  Block& b = *block;
  Fiber* me = fiber;
  me->state = State::DONE;
  b.done++;
  b.warps[me->warp].alive &= ~(1u << me->lane);
  if (b.at_block && b.at_block + b.done == b.n) release_block(b);
  emu_switch(&me->sp, pick(me));
  abort();
}

static void* map(size_t bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  return p;
}
Block::Block() { shared = static_cast<u8*>(map(SHARED_LIMIT)); }  // a page's alignment is enough for wgmma tiles
Block::~Block() {
  munmap(shared, SHARED_LIMIT);
  if (stacks) munmap(stacks, (size_t)stacks_for * STACK);
  if (cells) munmap(cells, SHARED_LIMIT * sizeof(Cell));
  if (declared) munmap(declared, SHARED_LIMIT);
}
void Block::reserve(u32 threads, bool with_checks) {
  if (threads > stacks_for) {
    if (stacks) munmap(stacks, (size_t)stacks_for * STACK);
    stacks = nullptr;
    stacks = static_cast<u8*>(map((size_t)threads * STACK));
    stacks_for = threads;
    // The lowest page of each stack may not be touched: an overflow is a fault, not a neighbour's wrong result.
    for (u32 i = 0; i < threads; i++) mprotect(stacks + (size_t)i * STACK, 4096, PROT_NONE);
  }
  if (with_checks && !cells) {
    cells = static_cast<Cell*>(map(SHARED_LIMIT * sizeof(Cell)));
    declared = static_cast<u8*>(map(SHARED_LIMIT));
  }
  checked = with_checks;
  n = threads;
  fibers.resize(threads);
  warps.resize((threads + 31) / 32);
  groups.resize((threads + 127) / 128);
}

// A write past an array, found after the block.
static bool red(const u8* p) {
  for (u32 i = 0; i < RED; i++)
    if (p[i] != 0xff) return true;
  return false;
}
static std::string place(const Block& b) {
  const dim3& i = b.fibers[0].block;
  return "block (" + std::to_string(i.x) + "," + std::to_string(i.y) + "," + std::to_string(i.z) + "): ";
}

// Runs a block to its end; the caller has set the indices and dimensions of every fiber.
void run_block(Block& b) {
  b.at_block = b.done = 0;
  b.slots.clear();
  b.error.clear();
  memset(b.shared, 0xff, b.dynamic + RED);
  b.top = b.dynamic + RED;
  if (b.checked) {
    memset(b.declared, 1, b.dynamic);
    memset(b.declared + b.dynamic, 0, SHARED_LIMIT - b.dynamic);
    b.start = b.epoch = next_tick();
  }
  for (Warp& w : b.warps) w = Warp{};
  for (Group& g : b.groups) {
    g.waiting.clear();
    g.open.clear();
    g.committed.clear();
  }
  for (u32 i = 0; i < b.n; i++) {
    Fiber& f = b.fibers[i];
    f.tid = i;
    f.lane = i & 31;
    f.warp = i >> 5;
    f.state = State::READY;
    f.clock = b.start;
    f.copies.clear();
    f.groups.clear();
    f.open = 0;
    f.sp = first_context(b.stacks + (size_t)i * STACK, i, fiber_main);
    b.warps[f.warp].alive |= 1u << f.lane;
  }
  block = &b;
  b.main_sp = nullptr;
  void* first = pick(&b.fibers[b.n - 1]);
  emu_switch(&b.main_sp, first);
  block = nullptr;
  fiber = nullptr;
  here = nullptr;
  if (!b.error.empty()) return;
  if (b.done != b.n) {
    u32 barrier = 0, warp = 0;
    int line = 0;
    for (const Fiber& f : b.fibers) {
      barrier += f.state == State::AT_BLOCK;
      if (f.state == State::AT_BLOCK) line = f.line;
      warp += f.state == State::AT_WARP || f.state == State::AT_GROUP;
    }
    b.error = place(b) + (barrier ? "divergent barrier: " : "deadlock: ") + std::to_string(barrier) + " threads wait at __syncthreads" +
              (line ? " of line " + std::to_string(line) : "") + ", " + std::to_string(warp) +
              " at a warp operation, " + std::to_string(b.done) + " have exited";
    return;
  }
  bool overrun = red(b.shared + b.dynamic);
  for (const Slot& s : b.slots) overrun = overrun || red(b.shared + s.offset + s.bytes);
  if (overrun) b.error = place(b) + "a write past the end of a shared array";
}
}  // namespace emu
