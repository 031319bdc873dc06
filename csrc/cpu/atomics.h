// Accesses to words that other processes read or write. The names spell operation and order; the
// scope is always the whole machine. Payload needs none of these: it is published by a signal.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ep::cpu {

template <typename T>
inline T ld_relaxed(const T* word) {
  return __atomic_load_n(word, __ATOMIC_RELAXED);
}
template <typename T>
inline T ld_acquire(const T* word) {
  return __atomic_load_n(word, __ATOMIC_ACQUIRE);
}
template <typename T>
inline T ld_seq_cst(const T* word) {
  return __atomic_load_n(word, __ATOMIC_SEQ_CST);
}
template <typename T>
inline void st_relaxed(T* word, T value) {
  __atomic_store_n(word, value, __ATOMIC_RELAXED);
}
// Also a release of everything written before it. Stronger than release, because a publisher must
// not read the sleeper count before its word is visible (see wait.h).
template <typename T>
inline void st_seq_cst(T* word, T value) {
  __atomic_store_n(word, value, __ATOMIC_SEQ_CST);
}
template <typename T>
inline void add_seq_cst(T* word, T value) {
  __atomic_fetch_add(word, value, __ATOMIC_SEQ_CST);
}

// A typed view of one place in symmetric memory; offsets come from LowLatencyLayout only.
template <typename T>
inline T* at(std::byte* base, uint64_t offset) {
  return reinterpret_cast<T*>(base + offset);
}

}  // namespace ep::cpu
