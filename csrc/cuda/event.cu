#include "cuda/check.h"
#include "cuda/event.h"

namespace ep::cuda {

Event::Event() {
  cudaEvent_t event;
  check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "creating an event");
  event_ = event;
}

Event::~Event() { cudaEventDestroy(static_cast<cudaEvent_t>(event_)); }

void Event::record(void* stream) {
  check(cudaEventRecord(static_cast<cudaEvent_t>(event_), static_cast<cudaStream_t>(stream)),
        "recording an event");
}

void Event::wait(void* stream) const {
  check(cudaStreamWaitEvent(static_cast<cudaStream_t>(stream), static_cast<cudaEvent_t>(event_), 0),
        "letting a stream wait for an event");
}

bool Event::has_happened() const {
  const cudaError_t error = cudaEventQuery(static_cast<cudaEvent_t>(event_));
  if (error == cudaErrorNotReady) {
    cudaGetLastError();  // or the next launch would report it
    return false;
  }
  check(error, "asking for an event");
  return true;
}

}  // namespace ep::cuda
