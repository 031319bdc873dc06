// Bulk copies by the copy engine of an SM (TMA, PTX cp.async.bulk), and the barriers in shared
// memory that loads arrive at. Addresses and sizes are multiples of 16 bytes.
//
// The engine is its own observer of memory (the "async proxy"): see fence_proxy_async.
#pragma once

#include <cstdint>

namespace ep::ptx {

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Between this thread's ordinary accesses and bulk copies, either way: of what it has read, written
// or seen published before, bulk copies that follow (of any thread, behind a barrier) are later.
// Waits, too, for what the thread has stored to reach the GPU's L2.
__device__ inline void fence_proxy_async() { asm volatile("fence.proxy.async;" ::: "memory"); }
// The same of shared memory alone, without that wait.
__device__ inline void fence_proxy_async_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ inline void mbarrier_init(uint64_t* barrier, uint32_t num_arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(num_arrivals)
               : "memory");
}

// Arrives, and lets the phase end only when so many bytes have come too.
__device__ inline void mbarrier_arrive_expect(uint64_t* barrier, uint32_t num_bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(num_bytes)
      : "memory");
}

// Until the phase of this parity has ended. Only bulk loads end phases here, which always arrive.
__device__ inline void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

__device__ inline void bulk_load(void* shared, const void* global, uint32_t num_bytes,
                                 uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(shared)),
      "l"(global), "r"(num_bytes), "r"(shared_address(barrier))
      : "memory");
}

__device__ inline void bulk_store(void* global, const void* shared, uint32_t num_bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global),
               "r"(shared_address(shared)), "r"(num_bytes)
               : "memory");
}

// Stores of this thread since the last call make a group.
__device__ inline void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Until this thread's groups have read their shared memory, which may be written again.
__device__ inline void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

// Until what this thread's groups wrote is visible to it.
__device__ inline void bulk_wait_written() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

}  // namespace ep::ptx
