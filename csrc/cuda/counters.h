// Counters on the device, read by the host while kernels count on.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace ep::cuda {

class CounterReader {
 public:
  // For the current device.
  CounterReader();
  ~CounterReader();
  CounterReader(const CounterReader&) = delete;
  CounterReader& operator=(const CounterReader&) = delete;

  // As counted so far. Waits for no kernel, and any thread may call it, also while another one
  // captures a graph. Throws std::runtime_error where the device has failed.
  std::vector<uint64_t> read(const uint64_t* counters, size_t count) const;

 private:
  void* stream_ = nullptr;
};

}  // namespace ep::cuda
