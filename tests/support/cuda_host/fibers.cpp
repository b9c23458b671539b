// CUDA threads as fibers of one host thread, cluster by cluster.
//
// A fiber runs until it meets others; then one does that has nothing to wait for, of the same block as long
// as there is any: a block gets as far ahead of the others as the barriers let it. Whoever comes last to a
// meeting opens it. When nobody can run, the kernel has a deadlock, and its launch fails.
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include <cstdlib>
#include <map>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#include "platform.cuh"
#include "runtime.h"

namespace kd {

namespace {

// Those who must come before anybody goes on.
struct Meeting {
  int expected = 0, here = 0;
  unsigned round = 0;
};

struct Copy {
  void* to;
  const void* from;
  uint32_t bytes;
};

struct Warp {
  Meeting meeting;
  uint64_t values[kWarp];
};

struct Block {
  std::unique_ptr<char[]> memory;
  char* aligned = nullptr;
  Meeting meeting;
  std::vector<Warp> warps;
};

// Where a fiber goes on. swapcontext would ask the kernel for the signal mask at every switch.
#if defined(__x86_64__)
struct Context {
  void* stack_pointer = nullptr;
};
extern "C" void kd_switch(void** save, void* load);
asm(R"(
.text
.type kd_switch, @function
kd_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
)");
void go(Context& from, Context& to) { kd_switch(&from.stack_pointer, to.stack_pointer); }
void begin(Context& c, char* stack, size_t bytes, void (*entry)()) {
  void** top = (void**)(((uintptr_t)stack + bytes) / 16 * 16);
  top -= 2;  // a function begins 8 bytes off its caller's 16
  *top = (void*)entry;
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  c.stack_pointer = top;
}
#else
using Context = ucontext_t;
void go(Context& from, Context& to) { swapcontext(&from, &to); }
void begin(Context& c, char* stack, size_t bytes, void (*entry)()) {
  getcontext(&c);
  c.uc_stack.ss_sp = stack;
  c.uc_stack.ss_size = bytes;
  c.uc_link = nullptr;
  makecontext(&c, entry, 0);
}
#endif

struct Fiber {
  Context context;
  int thread = 0, rank = 0;
  bool done = false;
  const unsigned* waits_for = nullptr;  // a meeting's round or a barrier's parity, to change
  unsigned known = 0;

  bool can_run() const { return !done && (waits_for == nullptr || *waits_for != known); }
};

struct Cluster {
  int first_block = 0, blocks = 0, threads = 0;
  std::vector<Block> members;
  Meeting meeting;
  std::map<Barrier*, host::Phase> phases;
  std::map<Barrier*, std::vector<Copy>> copies;
  unsigned copies_started = 0;
};

constexpr size_t kStack = 64 * 1024;
Cluster* cluster = nullptr;
std::vector<Fiber> fibers;
std::vector<char> stacks;
Fiber* current = nullptr;
Context outside;
const std::function<void()>* body = nullptr;
size_t running = 0;
const char* fault = nullptr;  // of a kernel, whose launch then fails

// Leaves the kernel as it stands.
[[noreturn]] void fail(const char* what) {
  fault = what;
  go(current->context, outside);
  std::abort();
}

// The next that can run: of this block, else of another.
Fiber* runnable() {
  const size_t threads = cluster->threads, mine = current - fibers.data(), block = mine / threads * threads;
  for (size_t i = 1; i <= threads; ++i)
    if (Fiber& f = fibers[block + (mine - block + i) % threads]; f.can_run()) return &f;
  for (size_t i = 0; i < fibers.size(); ++i)
    if (Fiber& f = fibers[(block + threads + i) % fibers.size()]; f.can_run()) return &f;
  return nullptr;
}

// Copies that were put off happen at the latest when nobody can do without them.
Fiber* next_fiber() {
  if (Fiber* f = runnable()) return f;
  for (auto& [barrier, copies] : cluster->copies) host::finish_copies(*barrier);
  if (Fiber* f = runnable()) return f;
  fail("deadlock: every thread of the cluster waits for others");
}

void let_others_run() {
  Fiber* before = current;
  current = next_fiber();
  if (current != before) go(before->context, current->context);
}

void wait_for_change(const unsigned& what, unsigned known) {
  current->waits_for = &what;
  current->known = known;
  if (what == known) let_others_run();
  current->waits_for = nullptr;
}

void entry() {
  (*body)();
  current->done = true;
  if (--running == 0) go(current->context, outside);
  let_others_run();
}

void meet(Meeting& m) {
  const unsigned round = m.round;
  if (++m.here == m.expected) {
    m.here = 0;
    ++m.round;
  } else {
    wait_for_change(m.round, round);
  }
}

}  // namespace

namespace host {

int mutation = -1;
int thread_index() { return current->thread; }
int block_threads() { return cluster->threads; }
int block_index() { return cluster->first_block + current->rank; }
int cluster_blocks() { return cluster->blocks; }
char* shared_memory(int rank) { return cluster->members[rank].aligned; }

static Warp& my_warp() { return cluster->members[current->rank].warps[current->thread / kWarp]; }
void meet_warp() { meet(my_warp().meeting); }
void meet_block() { meet(cluster->members[current->rank].meeting); }
void meet_cluster() { meet(cluster->meeting); }
// Another block's memory is there from the cluster's first meeting on, and until its first thread ends.
void reach_block(int rank) {
  if (rank == current->rank) return;
  const size_t first = (size_t)rank * cluster->threads;
  bool there = cluster->meeting.round > 0;
  for (int i = 0; i < cluster->threads; ++i) there &= !fibers[first + i].done;
  if (there) return;
  fail("a thread writes to a block that may not have begun, or has ended");
}
uint64_t* exchange(uint64_t mine) {
  Warp& warp = my_warp();
  warp.values[current->thread % kWarp] = mine;
  meet_warp();
  return warp.values;
}

Phase& phase(Barrier& barrier) { return cluster->phases[&barrier]; }

void settle(Phase& p) {
  if (p.pending != 0 || p.bytes != 0) return;
  p.parity ^= 1;
  p.pending = p.arrivals;
}

void arrive_once(Phase& p) {
  if (p.pending > 0)
    --p.pending;
  else
    fault = "a thread arrived at a phase that lacked nothing but bytes";
}

void start_copy(void* to, const void* from, uint32_t bytes, Barrier& barrier) {
  if ((uintptr_t)to % 16 || (uintptr_t)from % 16 || bytes % 16 || bytes == 0)
    fail("the places and the bytes of a bulk copy must be multiples of 16");
  cluster->copies[&barrier].push_back({to, from, bytes});
  if (cluster->copies_started++ / 2 % 2) finish_copies(barrier);  // two sides are fetched together
}

void finish_copies(Barrier& barrier) {
  for (const Copy& copy : cluster->copies[&barrier]) {
    std::memcpy(copy.to, copy.from, copy.bytes);
    phase(barrier).bytes -= copy.bytes;
    settle(phase(barrier));
  }
  cluster->copies[&barrier].clear();
}

void wait_for_phase(Barrier& barrier, uint32_t parity) {
  finish_copies(barrier);
  wait_for_change(phase(barrier).parity, parity);
}

}  // namespace host

namespace runtime {

Chip host_chip{4, 227 * 1024, 16};
int host_clusters = 2;

namespace {

void prepare(Cluster& c, int64_t shared_bytes) {
  c.members.resize(c.blocks);
  c.meeting.expected = c.blocks * c.threads;
  for (Block& b : c.members) {
    b.memory.reset(new char[shared_bytes + 128]);
    std::memset(b.memory.get(), 0xff, shared_bytes + 128);  // NaN, in every type
    b.aligned = (char*)(((uintptr_t)b.memory.get() + 127) / 128 * 128);
    b.meeting.expected = c.threads;
    b.warps.resize(c.threads / kWarp);
    for (Warp& w : b.warps) w.meeting.expected = kWarp;
  }
  fibers.resize((size_t)c.blocks * c.threads);
  stacks.resize(fibers.size() * kStack);
  for (size_t i = 0; i < fibers.size(); ++i) {
    Fiber& f = fibers[i];
    f = {};
    f.rank = (int)i / c.threads;
    f.thread = (int)i % c.threads;
    begin(f.context, stacks.data() + i * kStack, kStack, entry);
  }
}

}  // namespace

void run(int blocks, int threads, int cluster_blocks, int64_t shared_bytes,
         const std::function<void()>& thread) {
  body = &thread;
  for (int first = 0; first < blocks; first += cluster_blocks) {
    Cluster c;
    c.first_block = first;
    c.blocks = cluster_blocks;
    c.threads = threads;
    cluster = &c;
    prepare(c, shared_bytes);
    current = fibers.data();
    running = fibers.size();
    go(outside, current->context);
    if (const char* found = std::exchange(fault, nullptr)) throw std::runtime_error(found);
  }
}

}  // namespace runtime
}  // namespace kd
