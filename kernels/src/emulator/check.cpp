// check.cpp: what the checked kernels are held to. The compiler calls a __tsan_ function for each of their loads and
// stores; no sanitizer runtime is linked, the functions are the ones below. Four questions are asked:
//   bounds    does every byte belong to an argument of the launch, to a shared array, or to the thread's own stack?
//   in flight is it shared memory that a cp.async was told to fill, and nobody waited for?
//   contract  is memory that the launcher passed as read-only left alone?
//   races     is the access ordered with every earlier one to the same byte, by barriers or by __syncwarp?
// Time is a counter of synchronisations. A thread's clock is the last one it took part in; the block's epoch is its
// last barrier. An access of another warp happened before iff it is older than the epoch; of another lane of the same
// warp, iff it is older than this lane's clock; of another block of the launch, never. This orders the accesses a
// schedule made, not the schedule: a race is found although nothing went wrong this time.
// Blocks are ordered by fences and atomics alone: what a thread wrote, or saw written before its block's last barrier,
// then __threadfence(), then an atomic, happened before what another does after an atomic on the same word, then
// __threadfence(), and a barrier where a third thread of its block is meant.
// Not seen: two reads of one byte by different threads are remembered as their warp's, block's or grid's, with the
// later time; atomics are checked for bounds only.
#include "runtime.h"

#include <map>

namespace emu {
static u32 ticks;
u32 next_tick() { return ++ticks; }

// A cell's thread: block << 10 | tid; above, whether it stands for several readers.
const u32 MANY_OF_WARP = 1u << 30, MANY_OF_BLOCK = 2u << 30, MANY_OF_GRID = 3u << 30, KIND = 3u << 30;

struct Me {
  u32 who, clock, epoch, since;  // since: accesses before this tick are of another block (shared) or launch (global)
};

// What an atomic after a fence let go: accesses of a block before its last barrier, and its thread's own.
struct Released {
  u32 who, epoch, clock;
};
struct Acquired {
  Released from;
  u32 tid, tick;  // by which thread of this block, and when
};
struct Fenced {
  u32 epoch = 0, clock = 0;   // of the last fence
  std::vector<Released> got;  // by atomics since then
};
// Of the launch, and of the running block: checked launches run one at a time, on one OS thread.
static std::map<const u32*, std::vector<Released>> released;
static std::vector<Acquired> acquired;
static std::vector<Fenced> fenced;
static u32 launch_of, block_of;
static void forget_others() {
  if (launch_of != block->launch_start) released.clear(), launch_of = block->launch_start;
  if (block_of != block->start) acquired.clear(), fenced.assign(block->n, Fenced{}), block_of = block->start;
}
void fence() {
  if (!block->checked) return;
  forget_others();
  Fenced& f = fenced[fiber->tid];
  for (const Released& r : f.got) acquired.push_back({r, fiber->tid, next_tick()});
  f = {block->epoch, fiber->clock, {}};
}
static bool handed_over(u32 who, u32 when, const Me& me) {
  forget_others();
  for (const Acquired& a : acquired) {
    bool mine = a.tid == (me.who & 1023) || a.tick < me.epoch, same = (a.from.who ^ who) >> 10 == 0;
    if (mine && same && (when < a.from.epoch || (a.from.who == who && when <= a.from.clock))) return true;
  }
  return false;
}

static bool before(u32 who, u32 when, const Me& me) {
  if (when < me.since) return true;
  u32 kind = who & KIND, apart = (who ^ me.who) & ~KIND;
  if (kind == MANY_OF_GRID) return false;
  if (apart >> 10) return kind == 0 && handed_over(who, when, me);
  if (kind == 0 && !apart) return true;
  if (kind <= MANY_OF_WARP && !(apart >> 5)) return when < me.clock;
  return when < me.epoch;
}

static std::string thread_of(u32 who) {
  switch (who & KIND) {
    case MANY_OF_WARP: return "several lanes of warp " + std::to_string((who & 1023) >> 5);
    case MANY_OF_BLOCK: return "several threads of the block";
    case MANY_OF_GRID: return "several blocks";
  }
  return "thread " + std::to_string(who & 1023) + " of block " + std::to_string(who >> 10 & 0xfffff);
}

static void race(const void* p, const char* mine, const char* theirs, u32 who) {
  fail_text(std::string("race: a ") + mine + " of " + describe(p, 1) + " is not ordered with a " + theirs + " by " +
            thread_of(who) + "; a barrier is missing");
}

static void record(Cell* cells, const void* p, u32 bytes, Access access, const Me& me) {
  for (u32 i = 0; i < bytes; i++) {
    Cell& c = cells[i];
    const u8* at = static_cast<const u8*>(p) + i;
    if (c.written && !before(c.writer, c.written, me)) race(at, access == WRITE ? "write" : "read", "write", c.writer);
    if (access == WRITE) {
      if (c.read && !before(c.reader, c.read, me)) race(at, "write", "read", c.reader);
      c = {me.who, me.clock, 0, 0};
    } else if (!c.read || before(c.reader, c.read, me)) {
      c.reader = me.who;
      c.read = me.clock;
    } else {
      u32 apart = (c.reader ^ me.who) & ~KIND, old = c.reader & KIND;
      u32 kind = apart >> 10 ? MANY_OF_GRID : apart >> 5 ? MANY_OF_BLOCK : MANY_OF_WARP;
      c.reader = (me.who & ~KIND) | std::max(kind, old);
      c.read = std::max(c.read, me.clock);
    }
  }
}

// The argument whose memory holds `p`, a writable one first; `wrong` when the access ends outside.
static const Arg* argument(const Block& b, const u8* p, u32 bytes, bool* wrong) {
  const Arg* found = nullptr;
  for (u32 i = 0; i < b.arg_count; i++) {
    const Arg& a = b.args[i];
    if (!a.base || p < a.base || p >= a.base + a.bytes) continue;
    *wrong = p + bytes > a.base + a.bytes;
    found = &a;
    if (a.kind == 'w') return found;
  }
  return found;
}

void touch_as(Fiber& who, const void* address, u32 bytes, Access access) {
  Block* b = block;
  if (!b || !b->checked) return;
  const u8* p = static_cast<const u8*>(address);
  if (p >= b->stacks && p < b->stacks + (size_t)b->n * STACK) return;
  u32 id = (u32)(b->linear & 0xfffff) << 10 | who.tid;
  const char* verb = access == READ ? "a read of " : "a write to ";
  if (p >= b->shared && p < b->shared + SHARED_LIMIT) {
    size_t at = (size_t)(p - b->shared);
    for (u32 i = 0; i < bytes; i++) {
      if (at + i >= SHARED_LIMIT || !b->declared[at + i])
        fail_text(std::string("out of bounds: ") + verb + describe(p + i, 1));
      if (b->declared[at + i] == IN_FLIGHT)
        fail_text(std::string("in flight: ") + verb + describe(p + i, 1) + ", which a cp.async has not delivered");
    }
    if (access != ATOMIC) record(b->cells + at, p, bytes, access, {id, who.clock, b->epoch, b->start});
    return;
  }
  bool wrong = false;
  if (const Arg* a = argument(*b, p, bytes, &wrong)) {
    if (wrong) fail_text(std::string("out of bounds: ") + verb + describe(p, bytes));
    if (a->kind != 'w') {
      if (access != READ) fail_text(std::string("read-only argument: ") + verb + describe(p, bytes));
      return;  // nothing writes it, so nothing races
    }
    Cell* cells = region_cells(a->base);
    if (cells && access != ATOMIC)
      record(cells + (p - a->base), p, bytes, access, {id, who.clock, b->epoch, b->launch_start});
    return;
  }
  Region r;
  if ((uintptr_t)p < 65536 || region_of(p, &r)) fail_text(std::string("out of bounds: ") + verb + describe(p, bytes));
  // Else a constant of the program, or the emulator's own.
}
void touch(const void* p, u32 bytes, Access access) {
  if (fiber) touch_as(*fiber, p, bytes, access);
}

void in_flight(const void* p, u32 bytes, bool yes) {
  if (block->checked) memset(block->declared + shared_offset(p), yes ? IN_FLIGHT : 1, bytes);
}

std::string describe(const void* address, u32 bytes) {
  const Block& b = *block;
  const u8* p = static_cast<const u8*>(address);
  auto where = [&](const char* what, const u8* base, u64 size) {
    std::string s = what;
    s += " of " + std::to_string(size) + " bytes, ";
    if (p < base) return s + std::to_string(base - p) + " bytes before its start";
    if (p >= base + size) return s + std::to_string(p - base - size) + " bytes past its end";
    s += "at byte " + std::to_string(p - base);
    return bytes > 1 ? s + ", " + std::to_string(bytes) + " bytes long" : s;
  };
  if ((uintptr_t)p < 65536) return "a null pointer plus " + std::to_string((uintptr_t)p);
  if (p >= b.shared && p < b.shared + SHARED_LIMIT) {
    const Slot* near = nullptr;
    for (const Slot& s : b.slots)
      if (b.shared + s.offset <= p && (!near || near->offset < s.offset)) near = &s;
    if (near) return where("a shared array", b.shared + near->offset, near->bytes);
    return where("dynamic shared memory", b.shared, b.dynamic);
  }
  Region r;
  if (!region_of(p, &r)) return "an address outside every buffer";
  for (u32 i = 0; i < b.arg_count; i++)
    if (b.args[i].base == r.base) return where(("argument " + std::to_string(i)).c_str(), r.base, r.bytes);
  return where("memory that is not an argument, a buffer", r.base, r.bytes);
}

u32 atomic(int op, u32* p, u32 value, u32 compare) {
  if ((uintptr_t)p & 3) fail("a misaligned atomic");
  touch(p, 4, ATOMIC);
  u32 old = __atomic_load_n(p, __ATOMIC_SEQ_CST), now;
  do {
    switch (op) {
      case ATOMIC_ADD: now = old + value; break;
      case ATOMIC_MAX: now = std::max(old, value); break;
      case ATOMIC_MIN: now = std::min(old, value); break;
      case ATOMIC_MAX_S: now = (u32)std::max((int)old, (int)value); break;
      case ATOMIC_MIN_S: now = (u32)std::min((int)old, (int)value); break;
      case ATOMIC_OR: now = old | value; break;
      case ATOMIC_AND: now = old & value; break;
      case ATOMIC_CAS: now = old == compare ? value : old; break;
      default: now = value;
    }
  } while (!__atomic_compare_exchange_n(p, &old, now, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST));
  if (block->checked) {
    forget_others();
    Fenced& f = fenced[fiber->tid];
    std::vector<Released>& here = released[p];
    f.got.insert(f.got.end(), here.begin(), here.end());
    if (f.epoch) here.push_back({(u32)(block->linear & 0xfffff) << 10 | fiber->tid, f.epoch, f.clock});
  }
  return old;
}
}  // namespace emu

// ---- the compiler's callbacks. Weak, so that a program built with the real runtime keeps that one.
#ifdef EMU_CHECKS
#define HOOK extern "C" __attribute__((weak)) void
#define SIZED(n)                                                                       \
  HOOK __tsan_read##n(void* p) { emu::touch(p, n, emu::READ); }                        \
  HOOK __tsan_write##n(void* p) { emu::touch(p, n, emu::WRITE); }                      \
  HOOK __tsan_unaligned_read##n(void* p) { emu::touch(p, n, emu::READ); }              \
  HOOK __tsan_unaligned_write##n(void* p) { emu::touch(p, n, emu::WRITE); }            \
  HOOK __tsan_volatile_read##n(void* p) { emu::touch(p, n, emu::READ); }               \
  HOOK __tsan_volatile_write##n(void* p) { emu::touch(p, n, emu::WRITE); }             \
  HOOK __tsan_read_write##n(void* p) { emu::touch(p, n, emu::READ); emu::touch(p, n, emu::WRITE); } \
  HOOK __tsan_unaligned_read_write##n(void* p) { emu::touch(p, n, emu::READ); emu::touch(p, n, emu::WRITE); }
SIZED(1)
SIZED(2)
SIZED(4)
SIZED(8)
SIZED(16)
HOOK __tsan_init() {}
HOOK __tsan_func_entry(void*) {}
HOOK __tsan_func_exit() {}
HOOK __tsan_vptr_read(void**) {}
HOOK __tsan_vptr_update(void**, void*) {}
HOOK __tsan_read_range(void* p, unsigned long n) { emu::touch(p, (u32)n, emu::READ); }
HOOK __tsan_write_range(void* p, unsigned long n) { emu::touch(p, (u32)n, emu::WRITE); }
extern "C" __attribute__((weak)) void* __tsan_memcpy(void* to, const void* from, unsigned long n) {
  emu::touch(from, (u32)n, emu::READ);
  emu::touch(to, (u32)n, emu::WRITE);
  return memcpy(to, from, n);
}
extern "C" __attribute__((weak)) void* __tsan_memmove(void* to, const void* from, unsigned long n) {
  emu::touch(from, (u32)n, emu::READ);
  emu::touch(to, (u32)n, emu::WRITE);
  return memmove(to, from, n);
}
extern "C" __attribute__((weak)) void* __tsan_memset(void* to, int value, unsigned long n) {
  emu::touch(to, (u32)n, emu::WRITE);
  return memset(to, value, n);
}
#endif
