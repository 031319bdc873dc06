// Device memory that other processes of the host can map (CUDA IPC).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace ep::cuda {

// Zeroed memory of this process on the current device. Throws std::runtime_error where CUDA
// refuses.
class DeviceMemory {
 public:
  explicit DeviceMemory(size_t num_bytes);
  ~DeviceMemory();
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;

  uintptr_t address() const { return reinterpret_cast<uintptr_t>(data_); }
  // What another process opens.
  std::string ipc_handle() const;

 private:
  void* data_ = nullptr;
};

// A peer process's memory, mapped into this one. Unmapped with the object.
class PeerMemory {
 public:
  explicit PeerMemory(const std::string& ipc_handle);
  ~PeerMemory();
  PeerMemory(const PeerMemory&) = delete;
  PeerMemory& operator=(const PeerMemory&) = delete;

  uintptr_t address() const { return reinterpret_cast<uintptr_t>(data_); }

 private:
  void* data_ = nullptr;
};

}  // namespace ep::cuda
