"""What `python -m ep_backend.bench.multi_gpu` was asked for. Lists are swept."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import dataclass, replace
from pathlib import Path

from ep_backend import NetworkConfig
from ep_backend.bench.op_cuda_settings import Case, CudaBenchSettings, add_case_options

PROGRAM = "python -m ep_backend.bench.multi_gpu"
MAX_GPUS = 8

# Short enough for a rented machine: the whole run takes about a minute.
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


@dataclass(frozen=True)
class Options:
    settings: CudaBenchSettings
    """Its only number of ranks is that of the GPUs."""
    command: str
    with_nccl: bool = True
    with_copy: bool = True
    limit_secs: float = 180.0
    """Of the whole run; then its processes are ended."""
    output: Path | None = None
    network: str | None = None
    """As EP_BACKEND_NETWORK; None: the environment's, or CUDA IPC."""

    @property
    def num_gpus(self) -> int:
        return self.settings.num_ranks[0]

    def cases(self) -> list[Case]:
        """Without those that are another one by a second name: batches above the default limit are
        not tagged anyway."""
        is_default_listed = None in self.settings.num_max_tagged_tokens
        return [
            case
            for case in self.settings.cases()
            if not (
                is_default_listed
                and case.num_max_tagged_tokens == 0
                and case.num_tokens > case.default_tagged_tokens
            )
        ]


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
    run = {
        k: given.pop(k)
        for k in ("with_nccl", "with_copy", "limit_secs", "output", "network")
        if k in given
    }
    try:
        NetworkConfig.parse(run.get("network", ""))
        settings = replace(DEFAULTS, num_ranks=(num_gpus,), **given)
    except ValueError as e:
        parser.error(str(e))
    return Options(settings, shlex.join([*PROGRAM.split(), *arguments]), **run)


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
    for flag, name, what in (
        ("--no-nccl", "with_nccl", "NCCL's all-to-all of the same bytes"),
        ("--no-copy", "with_copy", "the copy from GPU 0 to GPU 1"),
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
        "--limit", dest="limit_secs", type=float, help="Seconds for the whole run. [default: 180]"
    )
    return parser
