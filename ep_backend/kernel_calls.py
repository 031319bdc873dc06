"""Calls of one buffer's kernels: observed, and refused once the buffer has failed or is closed."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from ep_backend import _native
from ep_backend.errors import EPBackendError, PeerTimeout, ProtocolError
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
    """

    def __init__(
        self,
        kernels: Kernels,
        num_experts: int,
        device: torch.device,
        observer: BufferObserver,
    ) -> None:
        self._kernels = kernels
        self._num_experts = num_experts
        self._is_async = device.type == "cuda"
        self._observer = observer
        self._is_traced = observer.trace is not None
        self._failure: Exception | None = None
        self._is_closed = False

    def run(self, kind: str, num_tokens: int, *args: Any) -> None:
        """Calls the kernel named `kind`; raises what it reports.

        Args:
            num_tokens: for the trace.
        """
        if self._is_closed:
            raise EPBackendError(f"{kind} was called on a closed buffer.")
        if self._failure is not None:
            raise self._failure
        kernel = getattr(self._kernels, kind)
        if self._is_traced:
            result = self._observer.traced(kind, num_tokens, lambda: kernel(*args))
        else:
            result = kernel(*args)
        self._raise_unless_ok(result)

    def fail(self, error: Exception) -> None:
        """Between two kernels something went wrong that peers do not know of: every later call
        raises `error`."""
        self._failure = error

    def raise_if_failed(self) -> None:
        """Raises what kernels have reported so far."""
        if self._failure is not None:
            raise self._failure
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

    def _raise_unless_ok(self, result: _native.OpResult) -> None:
        if result.ok:
            return
        error = exception_for(result, self._num_experts, is_async=self._is_async)
        if isinstance(error, (PeerTimeout, ProtocolError)) or self._is_async:
            self._failure = error  # every later call raises it again
            self._observer.failed(error)
        raise error
