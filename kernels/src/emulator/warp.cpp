// warp.cpp: what the lanes of a warp do together, and asynchronous copies.
#include "runtime.h"

namespace emu {
// The only one of them that orders memory: every lane of the mask gets a clock later than all of theirs.
void sync_warp(u32 mask) {
  warp_meet(mask, fiber, [](void** args, const void*) {
    if (!block->checked) return;
    u32 tick = next_tick();
    for (int l = 0; l < 32; l++)
      if (args[l]) static_cast<Fiber*>(args[l])->clock = tick;
  }, nullptr);
}

struct Shuffled {
  u32 value, result;
  int lane;
};
struct ShuffleKind {
  Shuffle kind;
  int width;
};
u32 shuffle(Shuffle kind, u32 mask, u32 value, int lane, int width) {
  Shuffled mine = {value, value, lane};
  ShuffleKind common = {kind, width};
  warp_meet(mask, &mine, [](void** args, const void* common) {
    const ShuffleKind& k = *static_cast<const ShuffleKind*>(common);
    for (int l = 0; l < 32; l++) {
      if (!args[l]) continue;
      Shuffled& x = *static_cast<Shuffled*>(args[l]);
      int base = l & ~(k.width - 1), in = l & (k.width - 1), from = l;
      switch (k.kind) {
        case INDEX: from = base + (x.lane & (k.width - 1)); break;
        case XOR: from = (l ^ x.lane) < base + k.width ? l ^ x.lane : l; break;
        case DOWN: from = in + x.lane < k.width ? l + x.lane : l; break;
        case UP: from = in >= x.lane ? l - x.lane : l; break;
      }
      if (!args[from]) fail("a shuffle reads a lane outside its mask");
      x.result = static_cast<Shuffled*>(args[from])->value;
    }
  }, &common);
  return mine.result;
}

struct Vote {
  bool yes;
  u32 result;
};
u32 ballot(u32 mask, bool yes) {
  Vote mine = {yes, 0};
  warp_meet(mask, &mine, [](void** args, const void*) {
    u32 r = 0;
    for (int l = 0; l < 32; l++)
      if (args[l] && static_cast<Vote*>(args[l])->yes) r |= 1u << l;
    for (int l = 0; l < 32; l++)
      if (args[l]) static_cast<Vote*>(args[l])->result = r;
  }, nullptr);
  return mine.result;
}

// Carried out at the wait; until then the destination holds NaN, and a source that changes meanwhile shows.
void copy_async(void* to, const void* from, u32 bytes, bool pred) {
  uintptr_t all = (uintptr_t)to | (pred ? (uintptr_t)from : 0);
  if (all & (bytes - 1)) fail("cp.async: an address is not aligned to the copy's size");
  if (shared_offset(to) >= SHARED_LIMIT) fail("cp.async: the destination is not shared memory");
  touch(to, bytes, WRITE);
  if (pred) touch(from, bytes, READ);
  memset(to, 0xff, bytes);
  in_flight(to, bytes, true);
  fiber->copies.push_back({static_cast<u8*>(to), static_cast<const u8*>(from), bytes, pred});
  fiber->open++;
}
void copy_commit() {
  fiber->groups.push_back(fiber->open);
  fiber->open = 0;
}
void copy_wait(u32 left) {
  Fiber& f = *fiber;
  u32 done = f.groups.size() > left ? (u32)f.groups.size() - left : 0, copies = 0;
  for (u32 i = 0; i < done; i++) copies += f.groups[i];
  for (u32 i = 0; i < copies; i++) {
    const Copy& c = f.copies[i];
    in_flight(c.to, c.bytes, false);
    touch(c.to, c.bytes, WRITE);
    if (c.pred) {
      touch(c.from, c.bytes, READ);
      memcpy(c.to, c.from, c.bytes);
    } else {
      memset(c.to, 0, c.bytes);
    }
  }
  f.copies.erase(f.copies.begin(), f.copies.begin() + copies);
  f.groups.erase(f.groups.begin(), f.groups.begin() + done);
}
}  // namespace emu
