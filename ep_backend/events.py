"""Events: when an operation will have ended on its stream. In DeepEP's words."""

from __future__ import annotations

from typing import Protocol

import torch


class Waitable(Protocol):
    """A `torch.cuda.Event`, or an `EventHandle`."""

    def wait(self) -> None: ...


class EventHandle:
    """What the current stream has been given until now; nothing where no GPU is in use."""

    def __init__(self) -> None:
        self._event: torch.cuda.Event | None = None
        if torch.cuda.is_initialized():
            self._event = torch.cuda.Event()
            self._event.record()

    def current_stream_wait(self) -> None:
        """Lets the current stream wait for it; the CPU goes on."""
        if self._event is not None:
            self._event.wait()

    wait = current_stream_wait


class EventOverlap:
    """When an operation will have ended on its stream.

    Args:
        event: a `torch.cuda.Event` or an `EventHandle`, or None where there is nothing to wait for:
            on the CPU, and of calls without `async_finish`.
        extra_tensors: kept alive as long as this object.
    """

    def __init__(
        self,
        event: Waitable | None = None,
        extra_tensors: tuple[torch.Tensor, ...] | None = None,
    ) -> None:
        self.event = event
        self.extra_tensors = extra_tensors

    def current_stream_wait(self, release_handle: bool = False) -> None:
        """Lets the current stream wait for the event; the CPU goes on.

        Args:
            release_handle: afterwards let go of the event and of the tensors.
        """
        if self.event is not None:
            self.event.wait()
        if release_handle:
            self.event = self.extra_tensors = None

    def __enter__(self) -> EventOverlap:
        """`with event:` waits at the end of the block."""
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.current_stream_wait()


def check_overlap(
    previous_event: EventOverlap | None, async_finish: bool, allocate_on_comm_stream: bool
) -> None:
    """Raises `ValueError` for arguments of a call that do not go together."""
    if allocate_on_comm_stream and not (async_finish and previous_event is not None):
        raise ValueError(
            "allocate_on_comm_stream is True, which needs async_finish=True and a previous_event. "
            "Pass both, or leave it out."
        )
