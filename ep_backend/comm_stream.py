"""Where the operations of a buffer run: on the current stream; or, if their caller wants to overlap
them with other work, on a stream of the buffer's own.

    with comm_stream.operation(previous_event, async_finish) as operation:
        ...                                          # allocations and launches on that stream
        operation.reads(x)
        operation.writes(recv_x)
    operation.event.current_stream_wait()

How tensors are kept alive. PyTorch gives memory that was let go of to the next tensor of the same
stream, at once: what is still to happen on that stream is behind it. With two streams:

- What an operation reads is, as a rule, of the caller's stream. With `async_finish` it is kept here
  until that stream waits for the operation's event, or else until the event has happened.
- What it makes is of our stream, and read on the caller's. Outside of graphs `record_stream` keeps
  such memory from our stream until the caller's has come to where it was let go of.
- `record_stream` in a graph would keep it for the whole graph. So a captured operation waits for
  all that the caller's stream was given, not for `previous_event` alone: whoever has read what was
  let go of is then ahead of it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch

from ep_backend import _native
from ep_backend.events import EventOverlap
from ep_backend.kernels import stream_of


class Operation:
    """One operation, while it is issued.

    Attributes:
        event: when it will have ended, once the `with` block is left; nothing to wait for on the
            CPU and without `async_finish`.
        stream: where its kernels are launched, as CUDA knows it; 0 on the CPU.
    """

    def __init__(self, stream: int = 0) -> None:
        self.stream = stream
        self.event = EventOverlap()
        self.read: list[torch.Tensor] = []
        self.written: list[torch.Tensor] = []

    def reads(self, *tensors: torch.Tensor | None) -> None:
        """The caller's."""
        self.read += [tensor for tensor in tensors if tensor is not None]

    def writes(self, *tensors: torch.Tensor | None) -> None:
        """New ones, for the caller."""
        self.written += [tensor for tensor in tensors if tensor is not None]


class Streams(Protocol):
    def operation(
        self,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        only_launches: bool = False,
    ) -> AbstractContextManager[Operation]:
        """Its body issues an operation.

        Args:
            previous_event: the operation waits for it; else for all that the current stream has
                been given.
            async_finish: the current stream does not wait for the operation: its event says when
                it has ended.
            only_launches: the body only launches kernels on `Operation.stream`; else that is
                PyTorch's current stream meanwhile, if nothing else is said.
        """

    def close(self) -> None: ...


class NoStreams:
    """On the CPU: when a call returns, all has happened."""

    @contextmanager
    def operation(
        self,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        only_launches: bool = False,
    ) -> Iterator[Operation]:
        if previous_event is not None:
            previous_event.current_stream_wait()
        yield Operation()

    def close(self) -> None: ...


class CommStream:
    """One buffer's. Operations that ask for nothing run on the current stream. Those on our stream
    and all others run in the order in which they are issued; two others on different streams only
    if their caller lets one stream wait for the other.

    Every layer passes here: streams are CUDA's handles and events our own, which take the host a
    microsecond where PyTorch's objects take ten."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        # Of our stream; None: there was none.
        self._last_is_captured: bool | None = None
        # Once there was an operation on our stream, outside of graphs, others leave an event.
        self._is_used = False
        self._last_elsewhere: _native.CudaEvent | None = None
        self._in_flight: deque[_InFlight] = deque()

    @property
    def stream(self) -> torch.cuda.Stream:
        """Its blocks go first where SMs become free: rows that wait hold up every rank."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device, priority=-1)
        return self._stream

    @contextmanager
    def operation(
        self,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        only_launches: bool = False,
    ) -> Iterator[Operation]:
        is_captured = torch.cuda.is_current_stream_capturing()
        current = stream_of(self._device)
        if previous_event is None and not async_finish:
            if self._is_beside(is_captured):
                _order(self.stream.cuda_stream, current)
            yield Operation(current)
            if self._is_used and not is_captured:
                self._last_elsewhere = _recorded(current)
            return
        stream, own = self.stream, self.stream.cuda_stream
        operation = Operation(own)
        self._let_go(is_captured)
        if previous_event is None or is_captured or not self._is_used:
            _order(current, own)
        self._last_is_captured = is_captured
        if not is_captured:
            self._is_used = True
            if self._last_elsewhere is not None:
                self._last_elsewhere.wait(own)
                self._last_elsewhere = None
        try:
            if only_launches and previous_event is None:
                yield operation
            else:
                with torch.cuda.stream(stream):
                    if previous_event is not None:
                        previous_event.current_stream_wait()
                    yield operation
        except BaseException:
            _order(own, current)  # it may have been launched in part
            raise
        if operation.written and not is_captured:
            callers_stream = torch.cuda.current_stream(self._device)
            for tensor in operation.written:
                tensor.record_stream(callers_stream)
        if async_finish:
            in_flight = _InFlight(
                _recorded(own), self._device, current, operation.read, is_captured
            )
            self._in_flight.append(in_flight)
            operation.event = EventOverlap(in_flight)
        else:
            _order(own, current)

    def close(self) -> None:
        self._in_flight.clear()

    def _is_beside(self, is_captured: bool) -> bool:
        """Whether operations on our stream may run beside one on the current stream: not those
        outside of a graph, which have ended before it, nor those in another."""
        if self._last_is_captured != is_captured:
            return False
        if not is_captured:
            return True
        with torch.cuda.stream(self.stream):
            return torch.cuda.is_current_stream_capturing()

    def _let_go(self, is_capturing: bool) -> None:
        """Of what operations that have ended have read."""
        while self._in_flight and self._in_flight[0].is_over(is_capturing):
            self._in_flight.popleft()


def _recorded(stream: int) -> _native.CudaEvent:
    """When the stream will have done all that it has been given."""
    event = _native.CudaEvent()
    event.record(stream)
    return event


def _order(before: int, behind: int) -> None:
    """What a stream is given from now on comes behind all that the other has been given."""
    _recorded(before).wait(behind)


class _InFlight:
    """The end of an operation that the caller's stream did not wait for at once.

    Args:
        read: kept until the caller's stream waits, or until the operation has ended.
    """

    def __init__(
        self,
        event: _native.CudaEvent,
        device: torch.device,
        callers_stream: int,
        read: list[torch.Tensor],
        is_captured: bool,
    ) -> None:
        self._event = event
        self._device = device
        self._callers_stream = callers_stream
        self._read = read
        self._is_captured = is_captured

    def current_stream_wait(self) -> None:
        current = stream_of(self._device)
        self._event.wait(current)
        if current == self._callers_stream:
            self._read = []

    wait = current_stream_wait

    def is_over(self, is_capturing: bool) -> bool:
        """While a graph is captured, no event may be asked, and those in graphs never."""
        if not self._read:
            return True
        return not is_capturing and (self._is_captured or self._event.has_happened())
