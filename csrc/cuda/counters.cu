#include "cuda/check.h"
#include "cuda/counters.h"

namespace ep::cuda {

namespace {

// Calls of this thread neither join nor break a graph that another thread is capturing.
class OutsideCapture {
 public:
  OutsideCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~OutsideCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

}  // namespace

CounterReader::CounterReader() {
  cudaStream_t stream;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "creating a stream");
  stream_ = stream;
}

CounterReader::~CounterReader() { cudaStreamDestroy(static_cast<cudaStream_t>(stream_)); }

std::vector<uint64_t> CounterReader::read(const uint64_t* counters, size_t count) const {
  const OutsideCapture outside;
  const auto stream = static_cast<cudaStream_t>(stream_);
  std::vector<uint64_t> values(count);
  check(cudaMemcpyAsync(values.data(), counters, count * sizeof(uint64_t), cudaMemcpyDeviceToHost,
                        stream),
        "reading a rank's counters");
  check(cudaStreamSynchronize(stream), "reading a rank's counters");
  return values;
}

}  // namespace ep::cuda
