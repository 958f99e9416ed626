// launch.cpp: the C interface: finds a kernel, checks its arguments, spreads its blocks over OS threads.
#include "runtime.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>

namespace emu {
// Stacks and shared memory are kept: mapping and first touching them costs more than a small launch.
static std::mutex pool_lock;
static std::vector<std::unique_ptr<Block>> pool;
static std::mutex checked_lock;  // one checked launch at a time: they share the tick counter

static std::unique_ptr<Block> take_block() {
  std::lock_guard<std::mutex> hold(pool_lock);
  if (pool.empty()) return std::unique_ptr<Block>(new Block());
  std::unique_ptr<Block> b = std::move(pool.back());
  pool.pop_back();
  return b;
}
static void keep_block(std::unique_ptr<Block> b) {
  std::lock_guard<std::mutex> hold(pool_lock);
  pool.push_back(std::move(b));
}

struct Launch {
  const Kernel* kernel;
  dim3 grid, dim;
  u32 shared_bytes;
  const Arg* args;
  u32 arg_count;
  bool checked;
  u64 seed;
  u32 start;
  std::atomic<u64> next{0};
  std::mutex lock;
  u64 failed = ~0ull;  // the first block at fault: the same for any number of threads
  std::string error;

  void fault(u64 linear, const std::string& what) {
    std::lock_guard<std::mutex> hold(lock);
    if (linear < failed) {
      failed = linear;
      error = what;
    }
  }
  bool going() {
    std::lock_guard<std::mutex> hold(lock);
    return failed == ~0ull;
  }
};

static void work(Launch& l) {
  std::unique_ptr<Block> kept = take_block();
  Block& b = *kept;
  b.reserve(l.dim.x * l.dim.y * l.dim.z, l.checked);
  b.kernel = l.kernel;
  b.args = l.args;
  b.arg_count = l.arg_count;
  b.dynamic = l.shared_bytes;
  b.launch_start = l.start;
  u64 blocks = (u64)l.grid.x * l.grid.y * l.grid.z, row = l.grid.x, plane = row * l.grid.y;
  for (u32 i = 0; i < b.n; i++) {
    Fiber& f = b.fibers[i];
    f.thread = {i % l.dim.x, i / l.dim.x % l.dim.y, i / (l.dim.x * l.dim.y)};
    f.block_dim = l.dim;
    f.grid_dim = l.grid;
  }
  for (u64 i; l.going() && (i = l.next++) < blocks;) {
    b.linear = i;
    b.random = l.seed ? ((l.seed + 1) * 0x9E3779B97F4A7C15ull ^ (i + 1)) | 1 : 0;
    for (Fiber& f : b.fibers) f.block = {(u32)(i % row), (u32)(i / row % l.grid.y), (u32)(i / plane)};
    run_block(b);
    if (!b.error.empty()) l.fault(i, b.error);
  }
  keep_block(std::move(kept));
}

static void run(Launch& l, u32 threads) {
  u64 blocks = (u64)l.grid.x * l.grid.y * l.grid.z;
  u32 workers = (u32)std::min<u64>(l.checked ? 1 : threads, blocks);
  auto guarded = [&l] {
    SignalStack stack;
    try {
      work(l);
    } catch (const std::exception& e) {
      l.fault(0, e.what());
    }
  };
  std::vector<std::thread> others;
  others.reserve(workers);
  try {
    for (u32 i = 1; i < workers; i++) others.emplace_back(guarded);
  } catch (const std::exception&) {  // no more threads: those that are there do the work
  }
  guarded();
  for (std::thread& t : others) t.join();
}

// "takes ppif, was given ppi": count and kinds.
static std::string mismatch(const Kernel& k, const Arg* args, u32 count) {
  std::string given;
  for (u32 i = 0; i < count; i++) {
    u32 kind = args[i].kind;
    given += kind == 'r' || kind == 'w' || kind == '0' ? 'p' : (char)kind;
  }
  if (given == k.signature) return "";
  return std::string("takes arguments (") + k.signature + "), was given (" + given +
         "); p pointer, i integer, f float, 8 unsupported";
}

static std::string launch(Launch& l, u32 threads) {
  std::string wrong = mismatch(*l.kernel, l.args, l.arg_count);
  if (!wrong.empty()) return wrong;
  if ((u64)l.dim.x * l.dim.y * l.dim.z > 1024 || l.shared_bytes > (227 << 10)) return "launch out of range";
  install_fault_handler();
  std::unique_lock<std::mutex> alone(checked_lock, std::defer_lock);
  if (l.checked) {
    alone.lock();
    l.start = next_tick();
  }
  run(l, threads);
  if (!l.error.empty()) return l.error;
  for (u32 i = 0; i < l.arg_count; i++)
    if (l.args[i].base && !region_intact(l.args[i].base))
      return "out of bounds: a write beside argument " + std::to_string(i) + " (" + std::to_string(l.args[i].bytes) +
             " bytes)";
  return "";
}
}  // namespace emu

extern "C" int emu_checks_available() {
#ifdef EMU_CHECKS
  return 1;
#else
  return 0;
#endif
}

// 0 when the kernel ran and nothing was found; else a message.
extern "C" int emu_launch(const char* name, const u32* grid, const u32* dim, u32 shared_bytes, const emu::Arg* args,
                          u32 count, u32 threads, int checked, u64 seed, char* message, u64 message_bytes) {
  std::string problem = "no such kernel";
  try {
    const emu::Kernel* k = emu_plain;
#ifdef EMU_CHECKS
    if (checked) k = emu_checked;
#endif
    for (; k->name; k++) {
      if (strcmp(k->name, name)) continue;
      emu::Launch l;
      l.kernel = k;
      l.grid = {grid[0], grid[1], grid[2]};
      l.dim = {dim[0], dim[1], dim[2]};
      l.shared_bytes = shared_bytes;
      l.args = args;
      l.arg_count = count;
      l.checked = checked != 0;
      l.seed = seed;
      l.start = 0;
      problem = emu::launch(l, threads);
      break;
    }
  } catch (const std::exception& e) {
    problem = e.what();
  }
  snprintf(message, message_bytes, "%s", problem.c_str());
  return problem.empty() ? 0 : 1;
}
