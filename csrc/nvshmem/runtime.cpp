#include "nvshmem/runtime.h"

#include <dlfcn.h>
#include <nvshmem_host.h>

#include <cstring>
#include <stdexcept>

#include "cuda/check.h"

namespace ep::nvshmem {

Version device_version() {
  return {NVSHMEM_VENDOR_MAJOR_VERSION, NVSHMEM_VENDOR_MINOR_VERSION, NVSHMEM_VENDOR_PATCH_VERSION};
}

Version host_version() {
  Version version = {};
  nvshmemx_vendor_get_version_info(&version.major, &version.minor, &version.patch);
  return version;
}

std::string host_library() {
  Dl_info info = {};
  // A function that only the host library has.
  if (dladdr(reinterpret_cast<void*>(&nvshmemx_hostlib_init_attr), &info) == 0) return "";
  return info.dli_fname;
}

bool is_initialized() { return nvshmemx_init_status() >= NVSHMEM_STATUS_IS_INITIALIZED; }

std::string make_unique_id() {
  nvshmemx_uniqueid_t id = NVSHMEMX_UNIQUEID_INITIALIZER;
  if (const int status = nvshmemx_get_uniqueid(&id)) {
    throw std::runtime_error("NVSHMEM made no unique id: status " + std::to_string(status));
  }
  return std::string(reinterpret_cast<const char*>(&id), sizeof id);
}

void initialize(const std::string& unique_id, int pe, int num_pes) {
  nvshmemx_uniqueid_t id;
  if (unique_id.size() != sizeof id) throw std::runtime_error("not a unique id of this NVSHMEM");
  std::memcpy(&id, unique_id.data(), sizeof id);
  nvshmemx_init_attr_t attributes = NVSHMEMX_INIT_ATTR_INITIALIZER;
  int status = nvshmemx_set_attr_uniqueid_args(pe, num_pes, &id, &attributes);
  if (status == 0) status = nvshmemx_hostlib_init_attr(NVSHMEMX_INIT_WITH_UNIQUEID, &attributes);
  if (status != 0) {
    throw std::runtime_error("NVSHMEM did not start: status " + std::to_string(status) +
                             ". Set NVSHMEM_DEBUG=INFO to see why.");
  }
}

// NVSHMEM has started, so this counts another user, and registers the state of this module.
void attach() {
  if (!is_initialized()) throw std::runtime_error("NVSHMEM has not started");
  nvshmem_init();
}

int self_pe() { return nvshmem_my_pe(); }
int num_pes() { return nvshmem_n_pes(); }

uintptr_t allocate(size_t num_bytes) {
  void* memory = nvshmem_malloc(num_bytes);
  if (memory == nullptr) {
    throw std::runtime_error("NVSHMEM has no " + std::to_string(num_bytes) +
                             " bytes of symmetric memory left");
  }
  return reinterpret_cast<uintptr_t>(memory);
}

uintptr_t address_on(uintptr_t address, int pe) {
  return reinterpret_cast<uintptr_t>(nvshmem_ptr(reinterpret_cast<void*>(address), pe));
}

void quiet() {
  // Kernels of other streams may not have put all yet: buffers are closed without waiting for them.
  cuda::check(cudaDeviceSynchronize(), "waiting for kernels");
  cudaStream_t stream;
  cuda::check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "creating a stream");
  nvshmemx_quiet_on_stream(stream);
  const cudaError_t error = cudaStreamSynchronize(stream);
  cudaStreamDestroy(stream);
  cuda::check(error, "waiting for puts");
}

}  // namespace ep::nvshmem
