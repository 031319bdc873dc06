"""In which order sends and hooks may run: Python's half of the rule. The kernels check again,
because a captured graph replays without Python."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from ep_backend.errors import OrderError

T = TypeVar("T")


class PhaseOrder:
    """The operations of one phase ("dispatch" or "combine") on one buffer.

    Send e follows hook e - num_banks, hook e follows send e and hook e - 1. A send and a hook may
    run at the same time in two threads; two sends, or two hooks, may not: kernels of one kind share
    scratch memory.
    """

    def __init__(self, name: str, num_banks: int) -> None:
        self.name = name
        self._num_banks = num_banks
        self._num_sent = 0
        self._num_hooked = 0
        self._send_lock = threading.Lock()
        self._hook_lock = threading.Lock()

    def send(self, run: Callable[[int], T]) -> T:
        """Runs a send that may start now, which gets its epoch. If it raises, it has not happened.

        Raises:
            OrderError: too many operations wait for their hooks, or another send is running.
        """
        if not self._send_lock.acquire(blocking=False):
            raise self._is_running("send")
        try:
            epoch = self._num_sent + 1
            if epoch - self._num_hooked > self._num_banks:
                raise OrderError(
                    f"{self.name} {epoch} needs the bank of {self.name} {epoch - self._num_banks}, "
                    f"whose hook has not been called (num_banks = {self._num_banks}). Call that "
                    "hook first, or create the buffer with more banks."
                )
            result = run(epoch)
            self._num_sent = epoch
            return result
        finally:
            self._send_lock.release()

    def hook(self, epoch: int, run: Callable[[], None]) -> None:
        """Runs the hook of `epoch`. If it raises, it has not happened and may be called again.

        Raises:
            OrderError: an earlier hook has not been called, or another hook is running.
        """
        if not self._hook_lock.acquire(blocking=False):
            raise self._is_running("hook")
        try:
            if epoch != self._num_hooked + 1:
                raise OrderError(
                    f"the hook of {self.name} {epoch} was called before the hook of {self.name} "
                    f"{self._num_hooked + 1}. Call the hooks of a phase in the order of their "
                    "sends."
                )
            run()
            self._num_hooked = epoch
        finally:
            self._hook_lock.release()

    def exchange(self, run: Callable[[int], T]) -> T:
        """Runs a send and its hook as one call, which gets its epoch. If it raises, it has not
        happened.

        Raises:
            OrderError: an operation waits for its hook, or a send or a hook is running.
        """
        if not self._send_lock.acquire(blocking=False):
            raise self._is_running("send")
        try:
            if not self._hook_lock.acquire(blocking=False):
                raise self._is_running("hook")
            try:
                self.require_idle()
                epoch = self._num_sent + 1
                result = run(epoch)
                self._num_sent = self._num_hooked = epoch
                return result
            finally:
                self._hook_lock.release()
        finally:
            self._send_lock.release()

    def require_idle(self) -> None:
        """Raises `OrderError` while an operation waits for its hook: hooks run in order, so a call
        that sends and receives cannot overtake it."""
        if self._num_hooked != self._num_sent:
            raise OrderError(
                f"{self.name}_and_receive was called while {self.name} {self._num_hooked + 1} "
                "waits for its hook. Call that hook first."
            )

    def require_unused(self) -> None:
        """Raises `OrderError` while a send or a hook is running, in another thread."""
        for what, lock in (("send", self._send_lock), ("hook", self._hook_lock)):
            if lock.locked():
                raise self._is_running(what)

    def _is_running(self, what: str) -> OrderError:
        return OrderError(
            f"a {self.name} {what} is running in another thread. Call the {what}s of one buffer "
            "one after the other, and close it behind them."
        )
