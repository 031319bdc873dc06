// Programmatic dependent launch (PTX griddepcontrol). Without it both do nothing.
#pragma once

namespace ep::ptx {

// Until all kernels before this one in its stream have ended and their writes are visible. Nothing
// that they write may be touched before.
__device__ inline void wait_for_earlier_kernels() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

// The next kernel of the stream may be put on the GPU; it waits there for this one's end.
__device__ inline void let_next_kernel_start() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

}  // namespace ep::ptx
