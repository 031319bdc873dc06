// Epochs, banks and credits: when an operation may start.
//
// The operations of one phase on one buffer are numbered 1, 2, 3, ... on every rank alike; 0 is
// what zeroed memory says, so it is never an epoch. Operation e uses bank e mod num_banks.
#pragma once

#include "protocol/base.h"

namespace ep::protocol {

EP_HOST_DEVICE constexpr uint32_t bank_of(uint64_t epoch, uint32_t num_banks) {
  return static_cast<uint32_t>(epoch % num_banks);
}

// A send of `epoch` may write to a peer once that peer has emptied epoch - num_banks, the last
// operation that used the same bank. Written as a sum: epoch - credit would wrap when a credit runs
// ahead of a late sender.
EP_HOST_DEVICE constexpr bool credit_admits(uint64_t credit, uint64_t epoch, uint32_t num_banks) {
  return credit + num_banks >= epoch;
}

// At most num_banks operations are between their send and their hook: one more would wait for a
// credit that this rank itself withholds.
EP_HOST_DEVICE constexpr bool may_send(uint64_t num_sent, uint64_t num_hooked, uint32_t num_banks) {
  return num_sent - num_hooked < num_banks;
}

// A hook follows its own send.
EP_HOST_DEVICE constexpr bool may_hook(uint64_t num_sent, uint64_t num_hooked) {
  return num_hooked < num_sent;
}

}  // namespace ep::protocol
