// NVSHMEM's host side: start, symmetric memory, versions. One world a process, as NVSHMEM has it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace ep::nvshmem {

struct Version {
  int major, minor, patch;
};
// Of the device library that is linked into this module, and of the host library that is loaded.
Version device_version();
Version host_version();
// Where the host library lies.
std::string host_library();

// Nothing of the other calls may be made before; the state of the whole process, whoever started
// NVSHMEM.
bool is_initialized();
// What all ranks of a world need; made on one of them.
std::string make_unique_id();
// Collective. Throws std::runtime_error with NVSHMEM's status.
void initialize(const std::string& unique_id, int pe, int num_pes);
// Shows this module's kernels NVSHMEM's state on the device; without it they see none. After each
// start of NVSHMEM, on the device it was started on.
void attach();

int self_pe();
int num_pes();
// Symmetric memory on every PE, not zeroed. Collective. Throws std::runtime_error where there is
// none.
uintptr_t allocate(size_t num_bytes);
// Where this GPU sees that memory of a PE; 0: it does not.
uintptr_t address_on(uintptr_t address, int pe);
// Waits until everything that this PE has put is there.
void quiet();

}  // namespace ep::nvshmem
