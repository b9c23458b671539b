// CUDA threads as fibers of one host thread, cluster by cluster, round robin.
//
// A fiber runs until it meets others; then the next one does. Whoever comes last to a meeting opens it.
// When a whole round moves nobody, the kernel has a deadlock, and the program says what it waits for.
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <vector>

#include "platform.h"
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

struct Fiber {
  void* stack_pointer = nullptr;
  ucontext_t context;
  int thread = 0, rank = 0;
  bool done = false;
};

struct Cluster {
  int first_block = 0, blocks = 0, grid = 0, threads = 0;
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
ucontext_t scheduler;
const std::function<void()>* body = nullptr;
unsigned progress = 0;
const char* reason = "";

void entry() {
  (*body)();
  current->done = true;
  ++progress;
  swapcontext(&current->context, &scheduler);
}

void meet(Meeting& m) {
  const unsigned round = m.round;
  if (++m.here == m.expected) {
    m.here = 0;
    ++m.round;
    ++progress;
    return;
  }
  while (m.round == round) host::yield("the others of its warp, block or cluster");
}

}  // namespace

namespace host {

int thread_index() { return current->thread; }
int block_threads() { return cluster->threads; }
int block_index() { return cluster->first_block + current->rank; }
int grid_blocks() { return cluster->grid; }
int cluster_blocks() { return cluster->blocks; }
char* shared_memory(int rank) { return cluster->members[rank].aligned; }

void yield(const char* waiting_for) {
  reason = waiting_for;
  swapcontext(&current->context, &scheduler);
}

static Warp& my_warp() { return cluster->members[current->rank].warps[current->thread / kWarp]; }
void meet_warp() { meet(my_warp().meeting); }
void meet_block() { meet(cluster->members[current->rank].meeting); }
void meet_cluster() { meet(cluster->meeting); }
uint64_t* exchange(uint64_t mine) {
  Warp& warp = my_warp();
  warp.values[current->thread % kWarp] = mine;
  meet_warp();
  return warp.values;
}

Phase& phase(Barrier& barrier) { return cluster->phases[&barrier]; }

void settle(Phase& p) {
  if (!p.arrived || p.bytes != 0) return;
  p.parity ^= 1;
  p.arrived = false;
  ++progress;
}

void start_copy(void* to, const void* from, uint32_t bytes, Barrier& barrier) {
  if ((uintptr_t)to % 16 || (uintptr_t)from % 16 || bytes % 16 || bytes == 0) {
    std::fprintf(stderr, "a bulk copy of %u bytes from %p to %p: all must be multiples of 16\n", bytes, from, to);
    std::abort();
  }
  cluster->copies[&barrier].push_back({to, from, bytes});
  if (cluster->copies_started++ % 2) finish_copies(barrier);
}

void finish_copies(Barrier& barrier) {
  for (const Copy& copy : cluster->copies[&barrier]) {
    std::memcpy(copy.to, copy.from, copy.bytes);
    phase(barrier).bytes -= copy.bytes;
    settle(phase(barrier));
  }
  cluster->copies[&barrier].clear();
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
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = stacks.data() + i * kStack;
    f.context.uc_stack.ss_size = kStack;
    f.context.uc_link = nullptr;
    makecontext(&f.context, entry, 0);
  }
}

void run_all() {
  for (bool running = true; running;) {
    running = false;
    const unsigned before = progress;
    for (Fiber& f : fibers) {
      if (f.done) continue;
      running = true;
      current = &f;
      swapcontext(&scheduler, &f.context);
    }
    if (running && progress == before) {
      std::fprintf(stderr, "deadlock: every thread of the cluster waits, the last one for %s\n", reason);
      std::abort();
    }
  }
}

}  // namespace

void run(int blocks, int threads, int cluster_blocks, int64_t shared_bytes, const std::function<void()>& thread) {
  body = &thread;
  for (int first = 0; first < blocks; first += cluster_blocks) {
    Cluster c;
    c.first_block = first;
    c.blocks = cluster_blocks;
    c.grid = blocks;
    c.threads = threads;
    cluster = &c;
    prepare(c, shared_bytes);
    run_all();
  }
}

}  // namespace runtime
}  // namespace kd
