"""Expert-parallel all-to-all for MoE inference: dispatch and combine with receive hooks."""

try:
    from ep_backend import _native  # noqa: F401
except ImportError as e:
    raise ImportError(
        "ep_backend's native module is not built for this Python. Run `pip install .` in the "
        "repository (a C++17 compiler is enough)."
    ) from e

from ep_backend.errors import (
    EPBackendError,
    OrderError,
    PeerTimeout,
    ProtocolError,
    RendezvousError,
    SettingsMismatch,
)
from ep_backend.group import Group, VirtualWorld, virtual_world
from ep_backend.handles import (
    DispatchHandle,
    DispatchResult,
    KernelStatistics,
    OpCounters,
    RecvHook,
)
from ep_backend.low_latency import LowLatencyBuffer
from ep_backend.network import NetworkConfig
from ep_backend.normal import NormalBuffer
from ep_backend.normal_handles import NormalDispatchHandle, NormalDispatchResult

__version__ = "0.1.0"

__all__ = [
    "DispatchHandle",
    "DispatchResult",
    "EPBackendError",
    "Group",
    "KernelStatistics",
    "LowLatencyBuffer",
    "NetworkConfig",
    "NormalBuffer",
    "NormalDispatchHandle",
    "NormalDispatchResult",
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
