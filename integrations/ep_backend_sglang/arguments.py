"""The command-line choice, and what becomes of it when SGLang resolves its arguments."""

from __future__ import annotations

import argparse
import functools
import os
from typing import Any

from ep_backend.memory import nvshmem
from ep_backend.network import VARIABLE, NetworkConfig
from ep_backend_sglang import choice, cpu_only
from ep_backend_sglang.patching import require, require_parameters

FIELDS = ("moe_a2a_backend", "speculative_moe_a2a_backend")
PLACE = "sglang.srt.server_args.ServerArgs"
QUEUE_PAIR_DEPTH = 1 << 14
"""Of processes that use both kinds of kernels over a network: NVSHMEM learns it once, from the
first buffer. Enough for as many tokens as SGLang lets a low-latency dispatch take; rounds of the
normal kernels are what fits."""


def check() -> None:
    from sglang.srt.server_args import ServerArgs

    for name in (*FIELDS, "enable_single_batch_overlap", "add_cli_args", "resolve_once"):
        require(hasattr(ServerArgs, name), PLACE, f"lacks {name!r}")
    require_parameters(ServerArgs.add_cli_args, f"{PLACE}.add_cli_args", "parser")
    require_parameters(ServerArgs.resolve_once, f"{PLACE}.resolve_once", "self")
    for name in ("nnodes", "deepep_mode"):
        require(hasattr(ServerArgs, name), PLACE, f"lacks {name!r}")


def install() -> None:
    from sglang.srt.server_args import ServerArgs

    _extend_choices(ServerArgs)
    _resolve_our_name(ServerArgs)


def _extend_choices(server_args: Any) -> None:
    original = server_args.add_cli_args

    @functools.wraps(original)
    def add_cli_args(parser: argparse.ArgumentParser) -> None:
        original(parser)
        actions = {action.dest: action for action in parser._actions}
        for field in FIELDS:
            has_choices = field in actions and actions[field].choices is not None
            require(has_choices, f"{PLACE}.add_cli_args", f"gives {field!r} no choices")
            # A new list: SGLang gives the same one to every parser.
            actions[field].choices = [*(actions[field].choices or ()), choice.NAME]

    server_args.add_cli_args = staticmethod(add_cli_args)


def _resolve_our_name(server_args: Any) -> None:
    """`resolve_once` is where a command line and the arguments of `Engine` meet: called first in
    the process that starts the others, and before anything depends on the backend."""
    original = server_args.resolve_once

    @functools.wraps(original)
    def resolve_once(self: Any) -> None:
        is_new = not any(
            getattr(self, f"_resolution_{end}", False) for end in ("finished", "failed")
        )
        if is_new:
            _choose(self)
        original(self)

    server_args.resolve_once = resolve_once


def _choose(record: Any) -> None:
    """Replaces our name in unresolved arguments by the one that SGLang knows.

    Raises:
        ValueError: the arguments ask for what we do not have; the text says which to pass.
        UnsupportedSGLang: see `choice.make_ours`.
    """
    backends = [getattr(record, field) for field in FIELDS]
    if choice.BUILT_IN in backends and (choice.NAME in backends or choice.is_ours()):
        raise ValueError(
            f"both {choice.BUILT_IN!r} and {choice.NAME!r} were chosen in one process or one after "
            "the other, but SGLang has one buffer for both. Choose one of them for --moe-a2a-"
            "backend and --speculative-moe-a2a-backend, and start the other in a new process."
        )
    if choice.NAME not in backends:
        return
    _refuse_what_is_missing(record)
    if record.nnodes > 1 and record.deepep_mode == "auto":
        _share_queue_pairs()
    choice.make_ours()
    for field, backend in zip(FIELDS, backends, strict=True):
        if backend == choice.NAME:
            setattr(record, field, choice.BUILT_IN)


def _refuse_what_is_missing(record: Any) -> None:
    if record.enable_single_batch_overlap:
        raise ValueError(
            "--enable-single-batch-overlap makes combine wait for signals of the experts' GEMM, "
            f"but combine of --moe-a2a-backend {choice.NAME} does not know them. Leave it out."
        )
    if record.nnodes > 1:
        _require_network(record)


def _require_network(record: Any) -> None:
    """Raises `ValueError` for ranks on several hosts that could not reach each other."""
    several = f"--nnodes is {record.nnodes}, but --moe-a2a-backend {choice.NAME}"
    otherwise = f"Or keep the ranks of a server on one host, or choose {choice.BUILT_IN!r}."
    if cpu_only.is_active():
        raise ValueError(f"{several} reaches other hosts from GPUs only. {otherwise}")
    try:
        nvshmem.extension()
    except ImportError as e:
        raise ValueError(f"{several} needs NVSHMEM for that: {e} {otherwise}") from e


def _share_queue_pairs() -> None:
    """Of both kinds of kernels, in the processes that this one starts. What the user has chosen
    stays."""
    network = NetworkConfig.from_env() or NetworkConfig()
    levels = (network.service_level, network.normal_service_level)
    missing = {
        "queue_pair_depth": (network.queue_pair_depth, QUEUE_PAIR_DEPTH),
        "service_level": levels,
        "normal_service_level": levels[::-1],
    }
    chosen = [
        f"{name}={other}"
        for name, (own, other) in missing.items()
        if own is None and other is not None
    ]
    os.environ[VARIABLE] = " ".join([*os.environ.get(VARIABLE, "").split(), *chosen])
