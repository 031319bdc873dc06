// When a stream has come somewhere: as PyTorch's events, for calls that are made for every layer.
#pragma once

namespace ep::cuda {

class Event {
 public:
  // For the current device. Each throws std::runtime_error where CUDA refuses.
  Event();
  ~Event();
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;

  // Streams are cudaStream_t; they may be capturing.
  void record(void* stream);
  // The stream waits for what was recorded last; not at all, where nothing was.
  void wait(void* stream) const;
  bool has_happened() const;

 private:
  void* event_ = nullptr;
};

}  // namespace ep::cuda
