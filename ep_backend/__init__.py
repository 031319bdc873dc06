"""Expert-parallel all-to-all for MoE inference: dispatch and combine with receive hooks."""

from ep_backend.errors import (
    EPBackendError,
    OrderError,
    PeerTimeout,
    ProtocolError,
    RendezvousError,
    SettingsMismatch,
)
from ep_backend.group import Group, VirtualWorld, virtual_world
from ep_backend.low_latency import (
    DispatchHandle,
    DispatchResult,
    LowLatencyBuffer,
    OpCounters,
    RecvHook,
)

__version__ = "0.1.0"

__all__ = [
    "DispatchHandle",
    "DispatchResult",
    "EPBackendError",
    "Group",
    "LowLatencyBuffer",
    "OpCounters",
    "OrderError",
    "PeerTimeout",
    "ProtocolError",
    "RecvHook",
    "RendezvousError",
    "SettingsMismatch",
    "VirtualWorld",
    "virtual_world",
]
