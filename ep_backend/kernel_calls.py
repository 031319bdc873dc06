"""Calls of one buffer's kernels: observed, and refused once the buffer has failed or is closed."""

from __future__ import annotations

import os
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any, Protocol

import torch

from ep_backend import _native
from ep_backend.errors import EPBackendError, PeerTimeout, ProtocolError
from ep_backend.handles import KernelStatistics
from ep_backend.kernel_errors import exception_for
from ep_backend.observe.buffer import BufferObserver


class Kernels(Protocol):
    """Kernels of a rank, whatever their family: its other attributes are kernels, by name."""

    def report(self) -> _native.OpResult:
        """What has failed since, where kernels run asynchronously; else OK."""


class KernelCalls:
    """
    Args:
        num_experts: E, for messages.
        device: on CUDA, a call may raise what an earlier one found wrong.
        observer: is told of calls and failures.
        statistics: on the CPU, whose operations it counts.
    """

    def __init__(
        self,
        kernels: Kernels,
        num_experts: int,
        device: torch.device,
        observer: BufferObserver,
        statistics: Callable[[], KernelStatistics] | None = None,
    ) -> None:
        self._kernels = kernels
        self._num_experts = num_experts
        self._is_async = device.type == "cuda"
        self._observer = observer
        self._is_traced = observer.trace is not None
        self._statistics = statistics
        self._num_done: Counter[str] = Counter()
        self._failure: Exception | None = None
        self._is_closed = False
        _LIVE.add(self)

    def run(self, kind: str, num_tokens: int, *args: Any) -> None:
        """Calls the kernel named `kind`; raises what it reports.

        Args:
            num_tokens: for the trace.
        """
        self.require_usable(kind)
        kernel = getattr(self._kernels, kind)
        try:
            if self._is_traced:
                result = self._observer.traced(kind, num_tokens, lambda: kernel(*args))
            else:
                result = kernel(*args)
            self._raise_unless_ok(result)
            if self._statistics is not None:
                self._num_done[kind] += 1
        except BaseException as error:
            self._fail_if_done(kind, error)
            raise

    def require_done(self, kind: str) -> None:
        """In place of a kernel whose work an earlier one has done: raises as `run`."""
        self.require_usable(kind)
        self._raise_unless_ok(self._kernels.report())

    def require_usable(self, what: str) -> None:
        """Raises, where the buffer is closed or has failed."""
        if self._is_closed:
            raise EPBackendError(f"{what} was called on a closed buffer.")
        if self._failure is not None:
            raise self._failure.with_traceback(None)

    def fail(self, error: Exception) -> None:
        """Between two kernels something went wrong that peers do not know of: every later call
        raises `error`."""
        self._failure = error

    def raise_if_failed(self) -> None:
        """Raises what kernels have reported so far."""
        if self._failure is not None:
            raise self._failure.with_traceback(None)
        self._raise_unless_ok(self._kernels.report())

    @property
    def has_failed(self) -> bool:
        return self._failure is not None or not self._kernels.report().ok

    def close(self) -> bool:
        """Refuses every later call; False if that was so already."""
        was_open = not self._is_closed
        self._is_closed = True
        if was_open:
            self._observer.close()
        return was_open

    def _fail_if_done(self, kind: str, error: BaseException) -> None:
        """A signal handler (Ctrl-C) may raise `error` between the end of a kernel and the line
        that takes note of it: peers have been sent what the caller believes has not happened."""
        if self._statistics is None or self._failure is not None:
            return
        if self._statistics().num_ops[kind] > self._num_done[kind]:
            self.fail(
                EPBackendError(
                    f"{kind} was interrupted by {error!r} when it had been done, so that this rank "
                    "and its peers count differently. Create a new buffer on all ranks."
                )
            )

    def _raise_unless_ok(self, result: _native.OpResult) -> None:
        if result.ok:
            return
        error = exception_for(result, self._num_experts, is_async=self._is_async)
        if isinstance(error, (PeerTimeout, ProtocolError)) or self._is_async:
            self._failure = error  # every later call raises it again
            self._observer.failed(error)
        raise error


_LIVE: weakref.WeakSet[KernelCalls] = weakref.WeakSet()


def _fail_in_child() -> None:
    """A forked process has the parent's symmetric memory, where the parent's peers look."""
    for calls in _LIVE:
        calls.fail(
            EPBackendError(
                "this buffer is of the process that this one was forked from. Create buffers "
                "behind the fork, or start processes by spawning."
            )
        )


os.register_at_fork(after_in_child=_fail_in_child)
