"""Checks of what every rank needs: versions, cores, shared memory."""

from __future__ import annotations

import os
import platform

import torch

from ep_backend import __version__, _native
from ep_backend.doctor.checks import Check, Level, Machine, gib

MIN_SHM_BYTES = 1 << 30
ENGINES = {
    "vllm": "0.26.0 to 0.33.0",
    "sglang": "0.5.19 to 0.5.23",
}
"""Versions that the plug-ins were written against: README's support table says what was run."""


def check_host(machine: Machine) -> list[Check]:
    return [
        Check(
            "versions",
            Level.OK,
            f"ep_backend {__version__}, protocol {_native.PROTOCOL_VERSION}, "
            f"torch {torch.__version__}, Python {platform.python_version()}",
        ),
        _check_cores(),
        _check_shm(machine),
        *(_check_engine(machine, name, known) for name, known in ENGINES.items()),
        *_check_fault(machine),
    ]


def _check_cores() -> Check:
    num_cores = len(os.sched_getaffinity(0))
    if num_cores > 1:
        return Check("cores", Level.OK, f"{num_cores} usable by this process")
    return Check(
        "cores",
        Level.NOTE,
        "1 usable by this process: ranks on a CPU sleep instead of polling",
        "Give each rank a core of its own.",
    )


def _check_shm(machine: Machine) -> Check:
    free = machine.free_bytes("/dev/shm")
    if free is None:
        return Check(
            "/dev/shm",
            Level.MISSING,
            "not there: processes on a CPU cannot share memory",
            "Mount a tmpfs on /dev/shm (docker run --shm-size 4g).",
        )
    if free < MIN_SHM_BYTES:
        return Check(
            "/dev/shm",
            Level.NOTE,
            f"{gib(free)} free; a container's default of 64 MiB is soon full",
            "Start the container with --shm-size 4g, or --ipc host.",
        )
    return Check("/dev/shm", Level.OK, f"{gib(free)} free")


def _check_engine(machine: Machine, name: str, known: str) -> Check:
    version = machine.version_of(name)
    if version is None:
        return Check(name, Level.NOTE, "not installed here", f"Its plug-in knows {known}.")
    return Check(name, Level.OK, f"{version}; the plug-in knows {known}")


def _check_fault(machine: Machine) -> list[Check]:
    fault = machine.environ.get("EP_BACKEND_FAULT")
    if not fault:
        return []
    return [
        Check(
            "EP_BACKEND_FAULT",
            Level.MISSING,
            f"{fault!r}: results are broken on purpose",
            "Unset it: it is for tests.",
        )
    ]
