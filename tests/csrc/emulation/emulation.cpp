// Runs kernels: blocks one after the other, the threads of a block as fibers that change places at
// barriers, shuffles and their end, in ascending, descending or random order.
//
// What is seen:
//
// - An access that is outside of every tensor whose address the operator asked PyTorch for, a write
//   to one that it asked for as constant, a write to a kernel's arguments, an access that is not
//   aligned to its size. The compiler announces accesses: the sources are compiled with the
//   instrumentation of -fsanitize=thread, and the functions that it calls (__tsan_read4, ...) are
//   the ones below. Vectors announce themselves (cuda_runtime.h), as one access of all their bytes.
// - A race: two threads touch the same bytes, one of them writes, and no barrier of their block is
//   between them; threads of different blocks of one launch are never ordered. This is found from
//   who touched what since which barrier, so it does not depend on the order in which threads ran.
// - A read of shared memory that no thread of the block has written.
// - Barriers that not all threads of a block reach, or not the same one; shuffles whose mask does
//   not name the lane that calls, or names lanes that do not come, or that read such a lane.
// - Launches that CUDA refuses: the next cudaGetLastError says so.
//
// What is not: what a compiler makes of the sources (contraction, registers), what memory that is
// not ordered by barriers may show on a GPU, atomics and asynchronous copies (the sources have
// none), time. Launches are in the order of the source, and finished when they return.

#include "cuda_runtime.h"

#include <link.h>
#include <sys/mman.h>

// EMULATION_UCONTEXT: the C library's way to change fibers everywhere, a system call each.
#if !defined(__x86_64__) && !defined(EMULATION_UCONTEXT)
#define EMULATION_UCONTEXT
#endif
#if defined(EMULATION_UCONTEXT)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

namespace emulation {
namespace {

// Of every GPU from compute capability 7.0 on.
constexpr int64_t kMostThreads = 1024;
constexpr int64_t kMostBlocks = INT32_MAX;
constexpr size_t kMostArgumentBytes = CUDART_VERSION >= 12010 ? 32764 : 4096;
constexpr int kWarp = 32;

constexpr size_t kPage = 4096;
constexpr size_t kGuard = 16 * kPage;       // not accessible, below each stack
constexpr size_t kStack = 64 * kPage;       // of one thread
constexpr size_t kGranule = 2;              // bytes that a race is looked for in: a bfloat16
constexpr size_t kCells = kPage / kGranule;  // of a page

enum class Order { ascending, descending, random };
enum class State { ready, at_barrier, at_shuffle, left };

struct Span {
  uintptr_t begin = 0, end = 0;

  bool holds(uintptr_t at, size_t bytes) const { return begin <= at && at + bytes <= end; }
};

struct Tensor {
  Span span;
  bool writable;
};

// Who touched some bytes last. run: of a launch for tensors, of a block for shared memory.
struct Touch {
  uint32_t run = 0, block = 0, epoch = 0;
  uint16_t thread = 0;
  bool many_threads = false;  // of that block, in that epoch
  bool many_blocks = false;
};

struct Cell {
  Touch read, write;
};

struct Page {
  Cell cell[kCells];
};

#if defined(EMULATION_UCONTEXT)
using Context = ucontext_t;
#else
using Context = void*;  // the stack pointer; what must survive a call lies above it
#endif

struct Thread {
  char* stack = nullptr;  // its lowest byte
  Context context;
  State state = State::left;
  int line = 0;            // of the barrier that it waits at
  unsigned mask = 0;       // of the shuffle that it waits at
  unsigned source = 0;     // lane that it wants to read
  uint64_t bits = 0;       // what it brings, then what it gets
};

// Everything lies on the heap: the writable memory of the library is the sources' shared memory.
struct Emulator {
  Order order = Order::ascending;
  std::mt19937_64 random;
  int64_t only_last = kMostBlocks;  // blocks of a grid that are run
  uint64_t launches = 0;
  cudaError_t last_error = cudaSuccess;

  std::vector<Tensor> tensors;  // sorted by address
  Span image_writable;
  std::vector<Span> image_constant;
  std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
  uintptr_t last_page = 0;
  Page* last_cells = nullptr;

  std::vector<Thread> threads;
  Context scheduler;
#if defined(__SANITIZE_ADDRESS__)
  const void* scheduler_stack = nullptr;
  size_t scheduler_bytes = 0;
#endif

  Launch launch;
  Span call;
  void (*body)(const void*) = nullptr;
  uint32_t run_of_launch = 0, run_of_block = 0, runs = 0;
  uint32_t block = 0, epoch = 0;
  int running = -1;  // thread; -1 while the host's code runs
  std::string error;
};

Emulator& self() {
  static Emulator* const emulator = new Emulator;
  return *emulator;
}

// -- Fibers ------------------------------------------------------------------------------------

void fiber_main();

#if defined(EMULATION_UCONTEXT)
void change(Context& from, Context& to) { swapcontext(&from, &to); }

void prepare(Thread& thread) {
  getcontext(&thread.context);
  thread.context.uc_stack.ss_sp = thread.stack;
  thread.context.uc_stack.ss_size = kStack;
  makecontext(&thread.context, fiber_main, 0);
}
#else
extern "C" void emulation_switch(Context* save, Context load);
asm(R"(
  .text
  .hidden emulation_switch
  .globl emulation_switch
  .type emulation_switch, @function
emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size emulation_switch, .-emulation_switch
)");

void change(Context& from, Context& to) { emulation_switch(&from, to); }

void prepare(Thread& thread) {
  // A call leaves the stack 8 bytes off a multiple of 16: six registers, the address to return to,
  // and a place for one that is never returned to.
  auto* top = reinterpret_cast<void**>(thread.stack + kStack);
  void** const pointer = top - 8;
  std::fill(pointer, top, nullptr);
  pointer[6] = reinterpret_cast<void*>(&fiber_main);
  thread.context = pointer;
}
#endif

void to_scheduler() {
  Emulator& e = self();
  Thread& thread = e.threads[e.running];
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, e.scheduler_stack, e.scheduler_bytes);
#endif
  change(thread.context, e.scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, &e.scheduler_stack, &e.scheduler_bytes);
#endif
}

void to_thread(int number) {
  Emulator& e = self();
  Thread& thread = e.threads[number];
  e.running = number;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, thread.stack, kStack);
#endif
  change(e.scheduler, thread.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
  e.running = -1;
}

// A fiber serves one thread after the other.
void fiber_main() {
  Emulator& e = self();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &e.scheduler_stack, &e.scheduler_bytes);
#endif
  for (;;) {
    e.body(reinterpret_cast<const void*>(e.call.begin));
    e.threads[e.running].state = State::left;
    to_scheduler();
  }
}

void make_threads(int64_t count) {
  Emulator& e = self();
  e.threads.reserve(kMostThreads);  // contexts must not move
  while (static_cast<int64_t>(e.threads.size()) < count) {
    void* const memory = mmap(nullptr, kGuard + kStack, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, kGuard, PROT_NONE) != 0)
      throw std::runtime_error("emulation: no memory for the stacks of threads");
    Thread thread;
    thread.stack = static_cast<char*>(memory) + kGuard;
    e.threads.push_back(thread);
    prepare(e.threads.back());
  }
}

// -- Errors ------------------------------------------------------------------------------------

std::string name(uint32_t block, unsigned thread) {
  return "thread " + std::to_string(thread) + " of block " + std::to_string(block);
}

// Keeps the first error; a thread that has made one does not go on.
void fail(const std::string& what) {
  Emulator& e = self();
  if (e.error.empty()) e.error = std::string("emulation: ") + e.launch.kernel + ": " + what;
  if (e.running >= 0) to_scheduler();
}

void fail_here(const std::string& what) {
  fail(name(self().block, static_cast<unsigned>(self().running)) + " " + what);
}

std::string accesses(size_t bytes, bool write) {
  return (write ? "writes " : "reads ") + std::to_string(bytes) + " bytes ";
}

// -- Memory ------------------------------------------------------------------------------------

// The last tensor that begins at or before an address; nullptr if none does.
const Tensor* tensor_before(uintptr_t at) {
  const auto& tensors = self().tensors;
  const auto after = std::upper_bound(
      tensors.begin(), tensors.end(), at,
      [](uintptr_t wanted, const Tensor& tensor) { return wanted < tensor.span.begin; });
  return after == tensors.begin() ? nullptr : &*(after - 1);
}

void add_tensor(AtenTensorHandle handle, const void* data, bool writable) {
  Emulator& e = self();
  int64_t count = 0, dimensions = 0;
  int64_t *sizes = nullptr, *strides = nullptr;
  int32_t dtype = 0;
  aoti_torch_get_numel(handle, &count);
  aoti_torch_get_dim(handle, &dimensions);
  aoti_torch_get_sizes(handle, &sizes);
  aoti_torch_get_strides(handle, &strides);
  aoti_torch_get_dtype(handle, &dtype);
  if (count == 0) return;
  int64_t last = 0;  // element, counted from the first
  for (int64_t d = 0; d < dimensions; ++d) last += (sizes[d] - 1) * strides[d];
  const auto begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t end = begin + (last + 1) * aoti_torch_dtype_element_size(dtype);
  const auto at = std::lower_bound(
      e.tensors.begin(), e.tensors.end(), begin,
      [](const Tensor& tensor, uintptr_t wanted) { return tensor.span.begin < wanted; });
  if (at == e.tensors.end() || at->span.begin != begin) {
    e.tensors.insert(at, Tensor{{begin, end}, writable});
    return;
  }
  at->span.end = std::max(at->span.end, end);
  at->writable |= writable;
}

void find_image() {
  const auto add = [](dl_phdr_info* info, size_t, void*) {
    const auto here = reinterpret_cast<uintptr_t>(&find_image);
    Emulator& e = self();
    std::vector<Span> constant;
    Span writable;
    bool ours = false;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
      const auto& part = info->dlpi_phdr[i];
      if (part.p_type != PT_LOAD) continue;
      const uintptr_t begin = info->dlpi_addr + part.p_vaddr;
      const Span span{begin, begin + part.p_memsz};
      ours |= span.holds(here, 1);
      if (part.p_flags & PF_W)
        writable = span;
      else
        constant.push_back(span);
    }
    if (!ours) return 0;
    e.image_writable = writable;
    e.image_constant = constant;
    return 1;
  };
  dl_iterate_phdr(add, nullptr);
}

Cell& cell_of(uintptr_t at) {
  Emulator& e = self();
  const uintptr_t page = at / kPage;
  if (page != e.last_page || e.last_cells == nullptr) {
    std::unique_ptr<Page>& found = e.pages[page];
    if (found == nullptr) found = std::make_unique<Page>();
    e.last_page = page;
    e.last_cells = found.get();
  }
  return e.last_cells->cell[at % kPage / kGranule];
}

// Whether a thread of this run other than the running one did it, with no barrier since.
bool unordered(const Touch& touch, uint32_t run) {
  const Emulator& e = self();
  if (touch.run != run) return false;
  if (touch.many_blocks || touch.block != e.block) return true;
  if (touch.epoch != e.epoch) return false;
  return touch.many_threads || touch.thread != e.running;
}

void note(Touch& touch, uint32_t run) {
  const Emulator& e = self();
  const bool same_run = touch.run == run;
  const bool same_block = same_run && touch.block == e.block;
  const bool same_epoch = same_block && touch.epoch == e.epoch;
  const auto thread = static_cast<uint16_t>(e.running);
  const bool many_blocks = same_run && (touch.many_blocks || !same_block);
  const bool many_threads = same_epoch && (touch.many_threads || touch.thread != thread);
  touch = Touch{run, e.block, e.epoch, thread, many_threads, many_blocks};
}

void tell_race(const std::string& what, const Touch& other, const char* does) {
  fail_here(what + " that " + name(other.block, other.thread) + " " + does +
            " with no barrier between them");
}

void check_race(uintptr_t at, size_t bytes, bool write, bool shared) {
  const Emulator& e = self();
  const uint32_t run = shared ? e.run_of_block : e.run_of_launch;
  const char* const memory = shared ? "of shared memory" : "of a tensor";
  for (uintptr_t here = at; here < at + bytes; here += kGranule) {
    Cell& cell = cell_of(here);
    if (shared && !write && cell.write.run != run)
      fail_here(accesses(bytes, write) + "of shared memory that its block has not written");
    if (unordered(cell.write, run))
      tell_race(accesses(bytes, write) + memory, cell.write, "writes");
    if (write && unordered(cell.read, run))
      tell_race(accesses(bytes, write) + memory, cell.read, "reads");
    note(write ? cell.write : cell.read, run);
  }
}

void check_tensor(const Tensor& tensor, uintptr_t at, size_t bytes, bool write) {
  if (write && !tensor.writable)
    fail_here(accesses(bytes, write) + "of a tensor that the operator only reads");
  check_race(at, bytes, write, false);
}

void refuse(uintptr_t at, size_t bytes, bool write) {
  const Tensor* const before = tensor_before(at);
  std::string where;
  if (before != nullptr)
    where = ", " + std::to_string(at - before->span.begin) + " bytes after the begin of one of " +
            std::to_string(before->span.end - before->span.begin) + " bytes";
  fail_here(accesses(bytes, write) + "outside of every tensor" + where);
}

void check(const void* address, size_t bytes, bool write) {
  Emulator& e = self();
  if (e.running < 0) return;
  const auto at = reinterpret_cast<uintptr_t>(address);
  if (at % bytes != 0) fail_here(accesses(bytes, write) + "at an address that is not aligned");
  const auto stack = reinterpret_cast<uintptr_t>(e.threads[e.running].stack);
  if (Span{stack, stack + kStack}.holds(at, bytes)) return;
  const Tensor* const tensor = tensor_before(at);
  if (tensor != nullptr && tensor->span.holds(at, bytes))
    return check_tensor(*tensor, at, bytes, write);
  if (e.image_writable.holds(at, bytes)) return check_race(at, bytes, write, true);
  if (e.call.holds(at, bytes)) {
    if (write) fail_here(accesses(bytes, write) + "of the kernel's arguments");
    return;
  }
  for (const Span& span : e.image_constant)
    if (!write && span.holds(at, bytes)) return;
  refuse(at, bytes, write);
}

// -- Blocks ------------------------------------------------------------------------------------

template <typename Number>
std::vector<Number> in_order(Number begin, Number end) {
  Emulator& e = self();
  std::vector<Number> numbers(end - begin);
  std::iota(numbers.begin(), numbers.end(), begin);
  if (e.order == Order::descending) std::reverse(numbers.begin(), numbers.end());
  if (e.order == Order::random) std::shuffle(numbers.begin(), numbers.end(), e.random);
  return numbers;
}

using Warp = std::vector<Thread*>;

// Whether all lanes that a mask names have come to a shuffle of that mask.
bool all_lanes_wait(const Warp& warp, unsigned mask) {
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if ((mask >> lane & 1u) == 0) continue;
    if (lane >= warp.size()) return false;
    const Thread& thread = *warp[lane];
    if (thread.state != State::at_shuffle || thread.mask != mask) return false;
  }
  return true;
}

// The lanes whose shuffle is complete, as a mask.
unsigned complete_lanes(const Warp& warp) {
  unsigned complete = 0;
  for (unsigned lane = 0; lane < warp.size(); ++lane) {
    const Thread& thread = *warp[lane];
    const bool known = (complete >> lane & 1u) != 0;
    if (!known && thread.state == State::at_shuffle && all_lanes_wait(warp, thread.mask))
      complete |= thread.mask;
  }
  return complete;
}

// Gives the lanes of complete shuffles what they want; whether there were any.
bool exchange(const Warp& warp) {
  const unsigned complete = complete_lanes(warp);
  uint64_t brought[kWarp] = {};
  for (size_t lane = 0; lane < warp.size(); ++lane) brought[lane] = warp[lane]->bits;
  for (size_t lane = 0; lane < warp.size(); ++lane) {
    if ((complete >> lane & 1u) == 0) continue;
    Thread& thread = *warp[lane];
    if ((thread.mask >> thread.source & 1u) == 0)
      fail("a shuffle reads lane " + std::to_string(thread.source) +
           ", which its mask does not name");
    thread.bits = brought[thread.source];
    thread.state = State::ready;
  }
  return complete != 0;
}

bool exchange_all(int count) {
  Emulator& e = self();
  bool any = false;
  for (int first = 0; first < count; first += kWarp) {
    Warp warp;
    for (int t = first; t < std::min(first + kWarp, count); ++t) warp.push_back(&e.threads[t]);
    any |= exchange(warp);
  }
  return any;
}

int count_of(State state, int count) {
  const auto& threads = self().threads;
  return static_cast<int>(std::count_if(threads.begin(), threads.begin() + count,
                                        [&](const Thread& t) { return t.state == state; }));
}

// All threads wait at one barrier: they go on.
void pass_barrier(int count) {
  Emulator& e = self();
  const int line = e.threads[0].line;
  for (int t = 0; t < count; ++t) {
    if (e.threads[t].line != line)
      return fail("threads of block " + std::to_string(e.block) + " wait at the barriers of " +
                  "lines " + std::to_string(line) + " and " + std::to_string(e.threads[t].line));
    e.threads[t].state = State::ready;
  }
  ++e.epoch;
}

void tell_deadlock(int count) {
  fail("block " + std::to_string(self().block) + " does not go on: " +
       std::to_string(count_of(State::at_barrier, count)) + " of its threads wait at a barrier, " +
       std::to_string(count_of(State::at_shuffle, count)) + " at a shuffle, " +
       std::to_string(count_of(State::left, count)) + " have left");
}

void run_block(uint32_t block, int count) {
  Emulator& e = self();
  e.block = block;
  e.epoch = 0;
  e.run_of_block = ++e.runs;
  for (int t = 0; t < count; ++t) e.threads[t].state = State::ready;
  while (e.error.empty()) {
    for (const int t : in_order(0, count)) {
      if (e.threads[t].state == State::ready) to_thread(t);
      if (!e.error.empty()) return;
    }
    if (count_of(State::left, count) == count) return;
    if (exchange_all(count)) continue;
    if (count_of(State::at_barrier, count) == count)
      pass_barrier(count);
    else
      tell_deadlock(count);
  }
}

// What CUDA says to a launch.
cudaError_t judge(const Launch& launch, size_t argument_bytes) {
  const bool threads_fit = 1 <= launch.threads && launch.threads <= kMostThreads;
  const bool blocks_fit = 1 <= launch.blocks && launch.blocks <= kMostBlocks;
  if (!threads_fit || !blocks_fit) return cudaErrorInvalidConfiguration;
  if (launch.threads > launch.launch_bounds) return cudaErrorLaunchOutOfResources;
  if (argument_bytes > kMostArgumentBytes) return cudaErrorInvalidValue;
  return cudaSuccess;
}

}  // namespace

Index thread_index() { return {static_cast<unsigned>(self().running), 0, 0}; }
Index block_index() { return {self().block, 0, 0}; }
Index grid_size() { return {static_cast<unsigned>(self().launch.blocks), 1, 1}; }

void barrier(int line) {
  Thread& thread = self().threads[self().running];
  thread.state = State::at_barrier;
  thread.line = line;
  to_scheduler();
}

uint64_t shuffle_down(unsigned mask, uint64_t bits, unsigned offset, int width) {
  Emulator& e = self();
  Thread& thread = e.threads[e.running];
  const int lane = e.running % kWarp;
  if ((mask >> lane & 1u) == 0) fail_here("is not in the mask of its own shuffle");
  if (width < 1 || width > kWarp || (width & (width - 1)) != 0)
    fail_here("shuffles within " + std::to_string(width) + " lanes: no power of two up to 32");
  const bool inside = lane % width + static_cast<int>(offset) < width;
  thread.source = inside ? lane + offset : lane;
  thread.mask = mask;
  thread.bits = bits;
  thread.state = State::at_shuffle;
  to_scheduler();
  return thread.bits;
}

void copy(void* to, const void* from, size_t bytes) {
  check(from, bytes, false);
  check(to, bytes, true);
  memcpy(to, from, bytes);
}

void run(const Launch& launch, const void* call, size_t call_bytes, size_t argument_bytes,
         void (*body)(const void*)) {
  Emulator& e = self();
  e.last_error = judge(launch, argument_bytes);
  if (e.last_error != cudaSuccess) return;
  if (launch.dynamic_shared_bytes != 0)
    throw std::runtime_error("emulation: no shared memory of a size that the launch gives");
  if (e.image_writable.end == 0) find_image();
  make_threads(launch.threads);
  const auto begin = reinterpret_cast<uintptr_t>(call);
  e.launch = launch;
  e.call = Span{begin, begin + call_bytes};
  e.body = body;
  e.run_of_launch = ++e.runs;
  ++e.launches;
  const int64_t first = std::max<int64_t>(0, launch.blocks - e.only_last);
  for (const auto block : in_order(first, launch.blocks)) {
    run_block(static_cast<uint32_t>(block), static_cast<int>(launch.threads));
    if (!e.error.empty()) break;
  }
  if (e.error.empty()) return;
  // Threads that have not come to their end never will: their fibers begin anew.
  for (Thread& thread : e.threads) {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(thread.stack, kStack);
#endif
    prepare(thread);
  }
  throw std::runtime_error(std::exchange(e.error, {}));
}

}  // namespace emulation

// -- CUDA --------------------------------------------------------------------------------------

cudaError_t cudaGetLastError() {
  return std::exchange(emulation::self().last_error, cudaSuccess);
}

const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaErrorInvalidConfiguration) return "invalid configuration argument";
  if (error == cudaErrorInvalidValue) return "invalid argument";
  if (error == cudaErrorLaunchOutOfResources) return "too many resources requested for launch";
  return "no error";
}

// -- PyTorch: the linker sends these calls here (--wrap) ---------------------------------------

extern "C" {

AOTITorchError __real_torch_get_mutable_data_ptr(AtenTensorHandle tensor, void** data);
AOTITorchError __real_torch_get_const_data_ptr(AtenTensorHandle tensor, const void** data);

AOTITorchError __wrap_torch_get_mutable_data_ptr(AtenTensorHandle tensor, void** data) {
  const AOTITorchError error = __real_torch_get_mutable_data_ptr(tensor, data);
  if (error == 0) emulation::add_tensor(tensor, *data, true);
  return error;
}

AOTITorchError __wrap_torch_get_const_data_ptr(AtenTensorHandle tensor, const void** data) {
  const AOTITorchError error = __real_torch_get_const_data_ptr(tensor, data);
  if (error == 0) emulation::add_tensor(tensor, *data, false);
  return error;
}

// An operator's guard lives as long as its launches: with it the tensors are forgotten.
AOTITorchError __wrap_aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  emulation::self().tensors.clear();
  *guard = reinterpret_cast<DeviceGuardHandle>(&emulation::self());
  return 0;
}

AOTITorchError __wrap_aoti_torch_delete_device_guard(DeviceGuardHandle) {
  emulation::self().tensors.clear();
  return 0;
}

AOTITorchError __wrap_aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}

// -- The tests ---------------------------------------------------------------------------------

#define EMULATION_EXPORT __attribute__((visibility("default")))

// order: 0 ascending, 1 descending, 2 random, which draws from the seed.
EMULATION_EXPORT void heptapod_emulation_order(int order, uint64_t seed) {
  emulation::self().order = static_cast<emulation::Order>(order);
  emulation::self().random.seed(seed);
}

// Of each grid only the last blocks are run, for the ends of huge tensors.
EMULATION_EXPORT void heptapod_emulation_only_last(int64_t blocks) {
  emulation::self().only_last = blocks;
}

EMULATION_EXPORT uint64_t heptapod_emulation_launches() { return emulation::self().launches; }

// -- The compiler's instrumentation ------------------------------------------------------------

#define EMULATION_HOOKS(bytes)                                                                   \
  void __tsan_read##bytes(void* at) { emulation::check(at, bytes, false); }                      \
  void __tsan_write##bytes(void* at) { emulation::check(at, bytes, true); }                      \
  void __tsan_unaligned_read##bytes(void* at) { emulation::check(at, bytes, false); }            \
  void __tsan_unaligned_write##bytes(void* at) { emulation::check(at, bytes, true); }
EMULATION_HOOKS(1)
EMULATION_HOOKS(2)
EMULATION_HOOKS(4)
EMULATION_HOOKS(8)
EMULATION_HOOKS(16)

// Copies of structs whose size is none of the above.
void __tsan_read_range(void* at, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i) emulation::check(static_cast<char*>(at) + i, 1, false);
}
void __tsan_write_range(void* at, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i) emulation::check(static_cast<char*>(at) + i, 1, true);
}

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

// Atomics of the host's code: reference counts, the guard of a static variable.
uint8_t __tsan_atomic8_load(const volatile uint8_t* at, int) {
  return __atomic_load_n(at, __ATOMIC_SEQ_CST);
}
uint32_t __tsan_atomic32_fetch_add(volatile uint32_t* at, uint32_t by, int) {
  return __atomic_fetch_add(at, by, __ATOMIC_SEQ_CST);
}
uint32_t __tsan_atomic32_load(const volatile uint32_t* at, int) {
  return __atomic_load_n(at, __ATOMIC_SEQ_CST);
}
uint64_t __tsan_atomic64_load(const volatile uint64_t* at, int) {
  return __atomic_load_n(at, __ATOMIC_SEQ_CST);
}

}  // extern "C"
