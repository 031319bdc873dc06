#include <cstring>

#include "cuda/check.h"
#include "cuda/memory.h"

namespace ep::cuda {

DeviceMemory::DeviceMemory(size_t num_bytes) {
  check(cudaMalloc(&data_, num_bytes), "allocating symmetric memory");
  check(cudaMemset(data_, 0, num_bytes), "zeroing symmetric memory");
  check(cudaDeviceSynchronize(), "zeroing symmetric memory");
}

DeviceMemory::~DeviceMemory() { cudaFree(data_); }

std::string DeviceMemory::ipc_handle() const {
  cudaIpcMemHandle_t handle;
  check(cudaIpcGetMemHandle(&handle, data_), "exporting symmetric memory");
  return std::string(reinterpret_cast<const char*>(&handle), sizeof handle);
}

PeerMemory::PeerMemory(const std::string& ipc_handle) {
  cudaIpcMemHandle_t handle;
  if (ipc_handle.size() != sizeof handle) throw std::runtime_error("not an IPC handle");
  std::memcpy(&handle, ipc_handle.data(), sizeof handle);
  check(cudaIpcOpenMemHandle(&data_, handle, cudaIpcMemLazyEnablePeerAccess),
        "mapping a peer's memory");
}

PeerMemory::~PeerMemory() { cudaIpcCloseMemHandle(data_); }

}  // namespace ep::cuda
