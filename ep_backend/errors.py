"""What can go wrong, by type. Every text names the value, the limit and what to do."""

from __future__ import annotations

from typing import Any


class EPBackendError(RuntimeError):
    """Base of the failures below. Wrong arguments raise `ValueError` instead."""


class PeerTimeout(EPBackendError):
    """A peer did not arrive within the buffer's timeout. The buffer stays failed.

    Attributes:
        record: what this rank was doing: `self_rank`, `peer_rank`, `phase` ("dispatch" or
            "combine"), `half` ("send" or "recv"), `epoch`, `expected`, `seen`, `waited_secs`.
    """

    def __init__(self, message: str, record: dict[str, Any]) -> None:
        super().__init__(message)
        self.record = record

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.record)  # pools of processes send errors home


class ProtocolError(EPBackendError):
    """Symmetric memory holds what the protocol does not allow. The buffer stays failed."""


class OrderError(EPBackendError):
    """Sends and hooks were called in an order that would deadlock or mix results."""


class RendezvousError(EPBackendError):
    """The ranks could not meet: a peer is missing, or could not set its memory up."""


class SettingsMismatch(ValueError):
    """Ranks created the same object with different settings."""
