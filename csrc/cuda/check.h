// CUDA errors as exceptions, and calls that every kind of rank makes.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <vector>

namespace ep::cuda {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
  }
}

// Of a rank's private state.
template <typename T>
T* zeroed_device_array(size_t count) {
  T* array = nullptr;
  check(cudaMalloc(&array, count * sizeof(T)), "allocating a rank's state");
  check(cudaMemset(array, 0, count * sizeof(T)), "zeroing a rank's state");
  return array;
}
template <typename T>
T* device_copy(const std::vector<T>& values, const char* what) {
  T* array = zeroed_device_array<T>(values.size());
  check(cudaMemcpy(array, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice), what);
  return array;
}

}  // namespace ep::cuda
