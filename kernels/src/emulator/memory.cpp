// memory.cpp: device memory between guard pages, and faults turned into errors.
//
// An allocation ends as close to an untouchable page as its 16-byte alignment allows, so that an access past the end
// is a fault where it happens. The up to 15 bytes between, and those before the start, hold a pattern that is compared
// after each launch. (The checked kernels know the bounds to the byte: check.cpp.)
#include "runtime.h"

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <shared_mutex>

namespace emu {
const size_t GUARD = 256 << 10;
const u8 PATTERN = 0xff;  // NaN: what is read there by mistake shows

struct Allocation {
  u64 bytes;
  u8* map;
  size_t map_bytes;
  u8 *inner, *inner_end;  // the pages that may be touched
  Cell* cells;
};
static std::shared_mutex& lock() {
  static std::shared_mutex* m = new std::shared_mutex;  // never destroyed: memory may be freed by exit handlers
  return *m;
}
static std::map<uintptr_t, Allocation>& allocations() {
  static auto* m = new std::map<uintptr_t, Allocation>;
  return *m;
}

static size_t page() {
  static const size_t bytes = (size_t)sysconf(_SC_PAGESIZE);
  return bytes;
}

bool region_of(const void* p, Region* out) {
  uintptr_t a = (uintptr_t)p;
  std::shared_lock<std::shared_mutex> hold(lock());
  auto& all = allocations();
  auto at = all.upper_bound(a);
  // Guards reach below the base too: the next region may own the address as well.
  for (int i = 0; i < 2; i++) {
    if (i == 0 && at == all.begin()) continue;
    auto it = i == 0 ? std::prev(at) : at;
    if (it == all.end()) continue;
    const Allocation& m = it->second;
    if (a < (uintptr_t)m.map || a >= (uintptr_t)m.map + m.map_bytes) continue;
    *out = {reinterpret_cast<u8*>(it->first), m.bytes, m.cells};
    return true;
  }
  return false;
}

Cell* region_cells(const u8* base) {
  std::unique_lock<std::shared_mutex> hold(lock());
  auto it = allocations().find((uintptr_t)base);
  if (it == allocations().end()) return nullptr;
  Allocation& m = it->second;
  if (!m.cells) m.cells = static_cast<Cell*>(calloc(m.bytes + 1, sizeof(Cell)));
  return m.cells;
}

bool region_intact(const u8* base) {
  std::shared_lock<std::shared_mutex> hold(lock());
  auto it = allocations().find((uintptr_t)base);
  if (it == allocations().end()) return true;
  const Allocation& m = it->second;
  for (const u8* p = m.inner; p < base; p++)
    if (*p != PATTERN) return false;
  for (const u8* p = base + m.bytes; p < m.inner_end; p++)
    if (*p != PATTERN) return false;
  return true;
}

// ---- faults
static struct sigaction old_segv, old_bus;

static void hand_on(int signal, siginfo_t* info, void* context) {
  struct sigaction& old = signal == SIGSEGV ? old_segv : old_bus;
  if (old.sa_flags & SA_SIGINFO) {
    old.sa_sigaction(signal, info, context);
  } else if (old.sa_handler == SIG_DFL || old.sa_handler == SIG_IGN) {
    sigaction(signal, &old, nullptr);  // the access repeats, and ends the process
  } else {
    old.sa_handler(signal);
  }
}

static const char* verb(void* context) {
#if defined(__x86_64__) && defined(__linux__)
  return static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_ERR] & 2 ? "a write to " : "a read of ";
#else
  (void)context;
  return "an access to ";
#endif
}

// A fault of a running kernel ends its block; the fault came from the kernel's own instruction, so no lock of ours is
// held, and the fiber is never resumed. Other faults go to whoever handled them before.
static void on_fault(int signal, siginfo_t* info, void* context) {
  if (!block || !fiber) {
    hand_on(signal, info, context);
    return;
  }
  const u8* p = static_cast<const u8*>(info->si_addr);
  const u8* stack = block->stacks + (size_t)fiber->tid * STACK;
  if (p >= stack && p < stack + 4096) fail("stack overflow: large local arrays, or recursion");
  if (!p) fail("a null, wild or misaligned address");
  fail_text(std::string("out of bounds: ") + verb(context) + describe(p, 1));
}

void install_fault_handler() {
  static std::once_flag once;
  std::call_once(once, [] {
    struct sigaction now = {};
    now.sa_sigaction = on_fault;
    // NODEFER: the handler does not return, so the signal must not stay blocked.
    now.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigemptyset(&now.sa_mask);
    sigaction(SIGSEGV, &now, &old_segv);
    sigaction(SIGBUS, &now, &old_bus);
  });
}

SignalStack::SignalStack() {
  const size_t bytes = 64 << 10;
  stack_t now = {};
  if (sigaltstack(nullptr, &now) || !(now.ss_flags & SS_DISABLE)) return;
  now.ss_sp = malloc(bytes);
  now.ss_size = bytes;
  now.ss_flags = 0;
  if (now.ss_sp && sigaltstack(&now, nullptr) == 0) {
    memory = now.ss_sp;
  } else {
    free(now.ss_sp);
  }
}
SignalStack::~SignalStack() {
  if (!memory) return;
  stack_t off = {};
  off.ss_flags = SS_DISABLE;
  sigaltstack(&off, nullptr);
  free(memory);
}
}  // namespace emu

// `bytes` bytes of `fill`, aligned to 16; null when there is no memory.
extern "C" u8* emu_alloc(u64 bytes, int fill) {
  using namespace emu;
  if (bytes > (u64)1 << 46) return nullptr;
  size_t whole = (size_t)((bytes + 15) & ~15ull), inner = (whole + page() - 1) / page() * page();
  if (!inner) inner = page();
  size_t total = inner + 2 * GUARD;
  void* p = mmap(nullptr, total, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) return nullptr;
  Allocation m = {bytes, static_cast<u8*>(p), total, static_cast<u8*>(p) + GUARD, nullptr, nullptr};
  m.inner_end = m.inner + inner;
  if (mprotect(m.inner, inner, PROT_READ | PROT_WRITE)) {
    munmap(p, total);
    return nullptr;
  }
  u8* base = m.inner_end - whole;
  memset(m.inner, PATTERN, (size_t)(base - m.inner));
  if (fill) memset(base, fill, bytes);  // fresh pages are zero
  memset(base + bytes, PATTERN, (size_t)(m.inner_end - base - bytes));
  try {
    std::unique_lock<std::shared_mutex> hold(lock());
    allocations().emplace((uintptr_t)base, m);
  } catch (const std::exception&) {
    munmap(p, total);
    return nullptr;
  }
  return base;
}

extern "C" void emu_free(u8* base) {
  using namespace emu;
  std::unique_lock<std::shared_mutex> hold(lock());
  auto it = allocations().find((uintptr_t)base);
  if (it == allocations().end()) return;
  munmap(it->second.map, it->second.map_bytes);
  free(it->second.cells);
  allocations().erase(it);
}
