// What a given number of SMs can do at best: the yardsticks of the benchmarks.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ep::cuda {

// Copies, or writes, as fast as so many SMs can by ordinary loads and stores. Multiples of 16
// bytes.
void copy_on_sms(void* dst, const void* src, uint64_t num_bytes, uint32_t num_sms, void* stream);
void fill_on_sms(void* dst, uint64_t num_bytes, uint32_t num_sms, void* stream);

// By the GPU's copy engines, on no SM; also from or to a peer's memory.
void copy_by_engine(void* dst, const void* src, uint64_t num_bytes, void* stream);

}  // namespace ep::cuda
