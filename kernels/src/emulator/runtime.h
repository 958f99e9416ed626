// runtime.h: the emulator's own structures; kernels never see them.
#pragma once
#include "emu.h"

#include <string>
#include <vector>

namespace emu {
// ---- the C interface's argument, filled by cuda/emulated.rs
struct Arg {
  u64 value;
  u8* base;   // the memory it points into
  u64 bytes;  // size of that memory
  u32 kind;   // 'r' read-only memory, 'w' writable memory, '0' null, 'i' integer, 'f' float
};

// ---- registry.cpp: one entry a kernel, ended by a null name
struct Kernel {
  const char* name;
  const char* signature;  // a character an argument: 'p' pointer, 'i' integer, 'f' float
  void (*enter)(const Arg* args);
};
}  // namespace emu
extern const emu::Kernel emu_plain[];
extern const emu::Kernel emu_checked[];

namespace emu {
// ---- check.cpp: who touched a byte last, and when. Times are ticks of the synchronisation counter; 0 is never.
struct Cell {
  u32 writer, written, reader, read;
};

// ---- memory.cpp
struct Region {  // an allocation between two guards
  u8* base;
  u64 bytes;
  Cell* cells;  // one a byte, when asked for
};
// Copies the region whose guards or bytes hold `p`; false when there is none.
bool region_of(const void* p, Region* out);
// The access record of a region, made on first use; null without memory.
Cell* region_cells(const u8* base);
// Whether the bytes between the region and its guards are as they were left.
bool region_intact(const u8* base);
void install_fault_handler();
// An alternate signal stack for the calling thread, where it has none, while alive.
struct SignalStack {
  SignalStack();
  ~SignalStack();
  void* memory = nullptr;
};

enum class State : u8 { READY, AT_BLOCK, AT_WARP, AT_GROUP, DONE };
struct Copy {
  u8* to;
  const u8* from;
  u32 bytes;
  bool pred;
};
struct Fiber : Here {
  void* sp = nullptr;
  u32 tid = 0, lane = 0, warp = 0;
  State state = State::READY;
  int line = 0;                 // of the barrier it waits at
  u32 mask = 0;                 // of the warp operation it waits at
  const void* op = nullptr;     // which one
  void* arg = nullptr;          // its operands
  u32 clock = 0;                // the last synchronisation this thread took part in
  std::vector<Copy> copies;     // asynchronous copies not yet carried out
  std::vector<u32> groups;      // how many of them each committed group holds
  u32 open = 0;                 // how many are not committed
};
struct Warp {
  u32 arrived = 0, alive = 0;
};
struct Slot {
  const void* site;
  u32 bytes, offset;
};
struct Product {
  float* d[128];
  const u32* registers[128];  // of a; null where it lies in shared memory
  u64 a, b;
  u32 n;
  Type type;
  bool add;
};
struct Group {  // a warpgroup
  std::vector<Fiber*> waiting;
  std::vector<Product> open;
  std::vector<std::vector<Product>> committed;
};

const u32 RED = 64;  // bytes after each shared array
const u32 SHARED_LIMIT = (227 << 10) + (48 << 10) + (16 << 10);
const u32 STACK = 64 << 10;

const u8 IN_FLIGHT = 2;  // a cp.async is to write it

// A block while it runs; kept by its worker for the next one.
struct Block {
  Block();
  ~Block();
  void reserve(u32 threads, bool checked);
  std::string error;
  u64 linear = 0;
  u32 n = 0, at_block = 0, done = 0, dynamic = 0, top = 0;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<Slot> slots;
  std::vector<Group> groups;
  u8* shared = nullptr;   // SHARED_LIMIT bytes
  u8* stacks = nullptr;   // STACK bytes a thread
  u32 stacks_for = 0;
  void* main_sp = nullptr;
  u64 random = 0;
  // The launch.
  const Kernel* kernel = nullptr;
  const Arg* args = nullptr;
  u32 arg_count = 0;
  // Checks.
  bool checked = false;
  u32 start = 0, epoch = 0, launch_start = 0;  // ticks: of the block, of its last barrier, of the launch
  Cell* cells = nullptr;                       // of shared memory
  u8* declared = nullptr;                      // a shared byte: 0 no array's, 1 an array's, IN_FLIGHT
};
extern __thread Block* block;
extern __thread Fiber* fiber;

// ---- runtime.cpp
void yield();
void fail_text(const std::string& problem) __attribute__((noreturn));
void run_block(Block& b);
// All lanes of `mask` meet; the last to arrive runs `op` over every lane's argument (null outside the mask).
typedef void (*WarpOp)(void** args, const void* common);
void warp_meet(u32 mask, void* arg, WarpOp op, const void* common);
// All 128 threads of a warpgroup meet.
typedef void (*GroupOp)(Group& group, void** args, u32 number);
void group_meet(void* arg, GroupOp op);

// ---- check.cpp
enum Access { READ, WRITE, ATOMIC };
// Counts synchronisations; only checked launches use it, one at a time.
u32 next_tick();
// Checks an access of the running thread; does nothing in a plain launch.
void touch(const void* p, u32 bytes, Access access);
// The same on behalf of another thread of the block.
void touch_as(Fiber& who, const void* p, u32 bytes, Access access);
// Marks shared bytes as the target of a cp.async, or as delivered.
void in_flight(const void* p, u32 bytes, bool yes);
// What lies at `p`, in words.
std::string describe(const void* p, u32 bytes);
}  // namespace emu
