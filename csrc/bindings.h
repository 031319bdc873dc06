// What the bindings of all devices share: Python passes addresses as integers, these functions pack
// them into what a kernel is given (protocol/op.h), in the order in which Python passes them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "protocol/op.h"

namespace ep {

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

inline protocol::HandleView handle_view(uintptr_t num_messages, uintptr_t messages,
                                        uintptr_t entries) {
  return {pointer<uint32_t>(num_messages), pointer<protocol::HandleMessage>(messages),
          pointer<protocol::HandleEntry>(entries)};
}

inline protocol::DispatchSendParams make_dispatch_send(uintptr_t x, bool x_is_quantized,
                                                       uintptr_t x_scales, uintptr_t topk_idx,
                                                       bool topk_idx_is_int64,
                                                       uintptr_t topk_weights, uint32_t num_tokens,
                                                       uintptr_t num_partials, uintptr_t answers,
                                                       int32_t workspace, uint32_t num_slots) {
  return {pointer<std::byte>(x),
          x_is_quantized,
          pointer<float>(x_scales),
          pointer<void>(topk_idx),
          topk_idx_is_int64,
          pointer<float>(topk_weights),
          num_tokens,
          pointer<uint32_t>(num_partials),
          pointer<uint32_t>(answers),
          workspace,
          num_slots};
}

inline protocol::DispatchRecvParams make_dispatch_recv(
    protocol::OutputLayout output, uintptr_t recv_x, uintptr_t recv_scales,
    uintptr_t num_recv_tokens_per_expert, uintptr_t recv_topk_idx, uintptr_t recv_topk_weights,
    uintptr_t num_messages, uintptr_t messages, uintptr_t entries, int32_t workspace,
    uint32_t num_slots) {
  return {output,
          pointer<std::byte>(recv_x),
          pointer<void>(recv_scales),
          pointer<int32_t>(num_recv_tokens_per_expert),
          pointer<int32_t>(recv_topk_idx),
          pointer<float>(recv_topk_weights),
          handle_view(num_messages, messages, entries),
          workspace,
          num_slots};
}

inline protocol::CombineSendParams make_combine_send(uintptr_t expert_out, uintptr_t num_messages,
                                                     uintptr_t messages, uintptr_t entries,
                                                     int32_t workspace, uint32_t num_slots) {
  return {pointer<std::byte>(expert_out), handle_view(num_messages, messages, entries), workspace,
          num_slots};
}

inline protocol::CombineRecvParams make_combine_recv(uintptr_t out, uint32_t num_tokens,
                                                     uintptr_t num_partials, uintptr_t answers,
                                                     uintptr_t topk_weights, int32_t workspace,
                                                     uint32_t num_slots) {
  return {pointer<std::byte>(out),
          num_tokens,
          pointer<uint32_t>(num_partials),
          pointer<uint32_t>(answers),
          pointer<float>(topk_weights),
          workspace,
          num_slots};
}

}  // namespace ep
