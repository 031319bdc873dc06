"""What `python -m ep_backend.bench.multi_gpu` was asked for. Lists are swept."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ep_backend import NetworkConfig
from ep_backend.bench.op_cuda_settings import (
    TRAVELLING_DTYPES,
    Case,
    CudaBenchSettings,
    add_case_options,
)
from ep_backend.bench.options import numbers, without_output, words
from ep_backend.settings import default_transfer

PROGRAM = "python -m ep_backend.bench.multi_gpu"
MAX_GPUS = 8

# Short enough for a rented machine: the whole run takes about two minutes.
DEFAULTS = CudaBenchSettings(
    num_ranks=(2,),
    num_tokens=(1, 16, 64, 128),
    dispatch_dtypes=("fp8",),
    forms=("fused",),
    num_max_tagged_tokens=(None, 0),
    chain=100,
    num_repeats=20,
    with_floors=False,
    with_gemm=False,
)


KINDS = ("low-latency", "normal")


@dataclass(frozen=True)
class NormalSettings:
    """Of the normal kernels. Sizes, repeats and seed are those of the low-latency ones."""

    num_tokens: tuple[int, ...] = (4096, 8192)
    dispatch_dtypes: tuple[str, ...] = tuple(TRAVELLING_DTYPES)
    num_sms: tuple[int, ...] = (8, 16, 24)
    """Of each rank."""
    chain: int = 8
    hidden: int = DEFAULTS.hidden
    num_experts: int = DEFAULTS.num_experts
    top_k: int = DEFAULTS.top_k
    num_repeats: int = DEFAULTS.num_repeats
    seed: int = DEFAULTS.seed

    def __post_init__(self) -> None:
        for name in ("num_tokens", "num_sms"):
            if min(getattr(self, name), default=0) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected positive numbers")
        if self.chain < 1:
            raise ValueError(f"the normal kernels' chain is {self.chain}, expected at least 1")
        if self.top_k > 8:
            raise ValueError(
                f"top_k is {self.top_k}, expected at most 8: sums of more rows are not exact, so "
                "the normal kernels' results could not be checked. Pass --kind low-latency."
            )
        for dtype in self.dispatch_dtypes:
            if dtype not in TRAVELLING_DTYPES:
                raise ValueError(f"dispatch dtype is {dtype!r}, expected bf16 or fp8")


@dataclass(frozen=True)
class Options:
    settings: CudaBenchSettings
    """Its only number of ranks is that of the GPUs."""
    command: str
    normal: NormalSettings
    kinds: tuple[str, ...] = KINDS
    with_nccl: bool = True
    with_copy: bool = True
    with_tests: bool = True
    limit_secs: float = 240.0
    """Of the whole run; then its processes are ended."""
    output: Path | None = None
    network: str | None = None
    """As EP_BACKEND_NETWORK; None: the environment's, or CUDA IPC."""
    with_default_transfer: bool = False
    """Rows move as in a buffer that is told nothing, whatever `settings.transfers` says."""

    @property
    def num_gpus(self) -> int:
        return self.settings.num_ranks[0]

    def cases(self) -> list[Case]:
        """Of the low-latency kernels, without those that are another one by a second name: batches
        above the default limit are not tagged anyway."""
        if "low-latency" not in self.kinds:
            return []
        settings = self.settings
        is_default_listed = None in settings.num_max_tagged_tokens
        return [
            self._with_transfer(case)
            for case in settings.cases()
            if not (
                is_default_listed
                and case.num_max_tagged_tokens == 0
                and case.num_tokens > case.default_tagged_tokens(settings.hidden, settings.top_k)
            )
        ]

    def _with_transfer(self, case: Case) -> Case:
        if not self.with_default_transfer:
            return case
        is_by_expert = case.output_layout == "expert_workspace"
        transfer = default_transfer(
            case.num_ranks, has_expert_workspaces=is_by_expert, is_virtual=False
        )
        return replace(case, transfer=transfer)


def parse_arguments(arguments: list[str], num_visible: int) -> Options:
    """Wrong arguments end the program with status 2, as argparse does.

    Args:
        num_visible: GPUs of this machine, 0 where the build has no CUDA.
    """
    parser = _parser()
    given = {k: v for k, v in vars(parser.parse_args(arguments)).items() if v is not None}
    num_gpus = given.pop("num_gpus", None)
    if num_gpus is None:
        if num_visible < 2:
            parser.error(f"needs two GPUs, and a build with CUDA; {num_visible} visible to it")
        num_gpus = min(num_visible, MAX_GPUS)
    if not 1 <= num_gpus <= min(num_visible, MAX_GPUS):
        parser.error(f"--gpus is {num_gpus}; {num_visible} visible, at most {MAX_GPUS} used")
    kinds = given.get("kinds", KINDS)
    if not set(kinds) <= set(KINDS):
        parser.error(f"--kind is {','.join(kinds)}, expected a list of {' and '.join(KINDS)}")
    run = {
        k: given.pop(k)
        for k in (
            "kinds",
            "with_nccl",
            "with_copy",
            "with_tests",
            "limit_secs",
            "output",
            "network",
        )
        if k in given
    }
    of_normal = {
        k.removeprefix("normal_"): given.pop(k) for k in list(given) if k.startswith("normal_")
    }
    try:
        NetworkConfig.parse(run.get("network", ""))
        settings = replace(DEFAULTS, num_ranks=(num_gpus,), **given)
        normal = NormalSettings()
        if "normal" in kinds:
            normal = _normal_settings(settings, of_normal)
    except ValueError as e:
        parser.error(str(e))
    command = shlex.join([*PROGRAM.split(), *without_output(arguments)])
    takes_default = "transfers" not in given
    return Options(settings, command, normal, with_default_transfer=takes_default, **run)


def _normal_settings(settings: CudaBenchSettings, given: dict[str, Any]) -> NormalSettings:
    return NormalSettings(
        hidden=settings.hidden,
        num_experts=settings.num_experts,
        top_k=settings.top_k,
        num_repeats=settings.num_repeats,
        seed=settings.seed,
        **given,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Time of dispatch + combine between GPUs of one host, a process each.",
    )

    parser.add_argument(
        "--gpus",
        dest="num_gpus",
        type=int,
        help="The first so many; 1 as a trial. [default: all, <= 8]",
    )
    add_case_options(parser, DEFAULTS, with_ranks=False)
    parser.add_argument(
        "--kind", dest="kinds", type=words, help=f"List of {', '.join(KINDS)}. [default: both]"
    )
    for name, parse, text in (
        ("num_tokens", numbers, "List: tokens of every rank."),
        ("dispatch_dtypes", words, "List of bf16, fp8: rows of dispatch."),
        ("num_sms", numbers, "List: SMs of each rank's kernels."),
        ("chain", int, "Operations in a chain."),
    ):
        parser.add_argument(
            "--normal-"
            + {"num_tokens": "tokens", "dispatch_dtypes": "dispatch-dtype"}.get(
                name, name.replace("_", "-")
            ),
            dest=f"normal_{name}",
            type=parse,
            help=f"Normal kernels: {text} [default: {getattr(NormalSettings(), name)}]",
        )
    for flag, name, what in (
        ("--no-nccl", "with_nccl", "NCCL's all-to-all of the same bytes"),
        ("--no-copy", "with_copy", "the copy of 256 MiB from GPU 0 to GPU 1"),
        ("--no-tests", "with_tests", "the tests of several GPUs, which a checkout has"),
    ):
        parser.add_argument(
            flag, dest=name, action="store_const", const=False, help=f"Leave out {what}."
        )
    parser.add_argument(
        "--network",
        help="Memory of NVSHMEM with these settings, 'transport=none links=rdma', instead of CUDA "
        "IPC; with --transfer push --form hook.",
    )
    parser.add_argument(
        "--limit", dest="limit_secs", type=float, help="Seconds for the whole run. [default: 240]"
    )
    return parser
