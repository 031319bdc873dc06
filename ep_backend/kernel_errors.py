"""From a kernel's status and flight record to an exception with a text one can act on."""

from __future__ import annotations

from typing import Any

from ep_backend._native import FlightRecord, Half, OpResult, Status
from ep_backend.errors import EPBackendError, OrderError, PeerTimeout, ProtocolError


def exception_for(result: OpResult, num_experts: int, *, is_async: bool) -> Exception:
    """The exception for a status other than OK.

    Args:
        is_async: kernels check their input while they run, so that a mistake fails the buffer.
    """
    if result.status == Status.BAD_EXPERT:
        return ValueError(
            f"topk_idx[{result.token}, {result.k}] is {result.expert}, expected -1 (not routed) or "
            f"an expert in 0..{num_experts - 1}. "
            + ("This buffer stays failed: create a new one." if is_async else "Nothing was sent.")
        )
    record = result.record
    if result.status == Status.TOO_MANY_ROWS:
        return ValueError(
            f"rank {record.peer_rank} receives {record.seen} rows, but "
            + (
                f"num_worst_tokens is {record.expected}. Pass at least that: the sum of all ranks' "
                "tokens is always enough."
                if record.peer_rank == record.self_rank
                else f"num_bytes has room for {record.expected}, and num_worst_tokens of rank "
                f"{record.self_rank} promised that there is. Pass the same on every rank."
            )
            + " This buffer stays failed: create a new one."
        )
    phase, half = record.phase.name.lower(), record.half.name.lower()
    where = f"{phase} {half} {record.epoch} on rank {record.self_rank}"
    if result.status == Status.TIMEOUT:
        what = "credit" if record.half == Half.SEND else "data"
        waited_secs = record.waited_ns / 1e9
        return PeerTimeout(
            f"{where}: the {what} of rank {record.peer_rank} did not come within "
            f"{waited_secs:.1f} s (expected epoch {record.expected}, saw {record.seen}). That rank "
            "is dead, late, or has issued other operations than this one. This buffer stays "
            "failed: create a new one.",
            _as_dict(record),
        )
    if result.status == Status.NOT_ARRIVED:
        return PeerTimeout(
            f"{where}: the signal of rank {record.peer_rank} came, but of the {record.expected} "
            f"puts that it tells of only {record.seen} within {record.waited_ns / 1e9:.1f} s. The "
            "network has lost them, or that rank has died. This buffer stays failed: create a new "
            "one.",
            _as_dict(record),
        )
    if result.status in (Status.NEWER_EPOCH, Status.CORRUPT):
        return ProtocolError(
            f"{where}: memory written by rank {record.peer_rank} contradicts its signal "
            f"({result.status.name}: expected {record.expected}, saw {record.seen}). The ranks "
            "have issued different operations, or memory was overwritten. This buffer stays "
            "failed: create a new one."
        )
    if result.status == Status.BUFFER_FAILED:
        return EPBackendError(
            f"{where} cannot run: another operation has just failed this buffer. See its exception."
        )
    return OrderError(f"{where} may not start now ({result.status.name}).")


def _as_dict(record: FlightRecord) -> dict[str, Any]:
    return {
        "self_rank": record.self_rank,
        "peer_rank": record.peer_rank,
        "phase": record.phase.name.lower(),
        "half": record.half.name.lower(),
        "epoch": record.epoch,
        "expected": record.expected,
        "seen": record.seen,
        "waited_secs": record.waited_ns / 1e9,
    }
