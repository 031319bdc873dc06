"""Deliberate faults, to prove that checks can fail. Never set this in production.

`EP_BACKEND_FAULT=drop-remote-contributions` makes every rank answer other ranks' tokens with zeros.
"""

from __future__ import annotations

import enum
import os
import warnings
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from ep_backend.handles import DispatchHandle

FAULT_VARIABLE = "EP_BACKEND_FAULT"


class Fault(enum.Enum):
    DROP_REMOTE_CONTRIBUTIONS = "drop-remote-contributions"


def active_fault() -> Fault | None:
    """The fault asked for by the environment, with a warning that cannot be overlooked.

    Raises:
        ValueError: no such fault.
    """
    name = os.environ.get(FAULT_VARIABLE)
    if not name:
        return None
    try:
        fault = Fault(name)
    except ValueError:
        known = ", ".join(fault.value for fault in Fault)
        raise ValueError(f"{FAULT_VARIABLE} is {name!r}, expected one of: {known}.") from None
    warnings.warn(f"{FAULT_VARIABLE}={name}: results are wrong on purpose", stacklevel=3)
    return fault


def drop_remote_rows(
    x: torch.Tensor, num_rows_per_rank: torch.Tensor, self_rank: int
) -> torch.Tensor:
    """A copy of `x` `[N, H]`, rows by source rank, in which those of other ranks' tokens are 0. The
    host does not wait for the counts, so a graph can hold it."""
    ends = num_rows_per_rank.cumsum(0)
    rows = torch.arange(len(x), device=x.device)
    is_own = (rows < ends[self_rank]) & (rows >= ends[self_rank] - num_rows_per_rank[self_rank])
    return torch.where(is_own[:, None], x, 0)


def drop_remote_contributions(expert_out: torch.Tensor, handle: DispatchHandle) -> torch.Tensor:
    """A copy of `expert_out` in which the rows of other ranks' tokens are 0; in a workspace, which
    peers read themselves, `expert_out` after they were made so."""
    if handle.workspace >= 0:
        self_rank = handle.buffer.group.self_rank
        expert_out[:self_rank] = 0
        expert_out[self_rank + 1 :] = 0
        return expert_out
    faulty = expert_out.clone()
    rows = faulty.view(-1, faulty.shape[-1])
    first = 0
    for src_rank, num_messages in enumerate(handle.num_messages.tolist()):
        messages = handle.messages[first : first + num_messages]
        first += num_messages
        if src_rank == handle.buffer.group.self_rank or num_messages == 0:
            continue
        begin = int(messages[0, 2])
        end = int(messages[-1, 2] + messages[-1, 3])
        rows[handle.entries[begin:end, 0]] = 0
    return faulty
