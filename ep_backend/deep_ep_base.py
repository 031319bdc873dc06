"""What both halves of `deep_ep.Buffer` share: the ranks, and a buffer of ours for each shape."""

from __future__ import annotations

from typing import Any, TypeVar, cast

import torch

from ep_backend.comm_stream import CommStream, NoStreams, Streams
from ep_backend.errors import EPBackendError
from ep_backend.group import Group
from ep_backend.low_latency import LowLatencyBuffer
from ep_backend.normal import NormalBuffer

B = TypeVar("B", LowLatencyBuffer, NormalBuffer)


class BufferBase:
    def __init__(self, group: Group, timeout_secs: float) -> None:
        self._group = group
        self._timeout_secs = timeout_secs
        self._is_destroyed = False
        self._buffers: dict[tuple[Any, ...], LowLatencyBuffer | NormalBuffer] = {}
        self._streams: dict[torch.device, Streams] = {}

    def _buffer_for(self, kind: type[B], device: torch.device, **settings: Any) -> B:
        """The buffer with these settings. Collective where they are new."""
        self._require_alive()
        key = (kind, device, *settings.values())
        buffer = self._buffers.get(key)
        if buffer is None:
            buffer = self._buffers[key] = kind(
                self._group, timeout_secs=self._timeout_secs, device=device, **settings
            )
        return cast(B, buffer)

    def _streams_of(self, device: torch.device) -> Streams:
        """Where calls on tensors of this device run."""
        streams = self._streams.get(device)
        if streams is None:
            streams = CommStream(device) if device.type == "cuda" else NoStreams()
            self._streams[device] = streams
        return streams

    def _require_alive(self) -> None:
        if self._is_destroyed:
            raise EPBackendError("the Buffer was used after destroy().")
