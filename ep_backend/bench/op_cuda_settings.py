"""What `ep-backend bench op --device cuda` was asked for: the cases, and the command line.

Options that take a comma-separated list are swept: every combination is a case. Parsed with
argparse, so that the benchmark also runs where only PyTorch is installed.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ep_backend.bench.options import numbers, option_adder, words
from ep_backend.settings import TRANSFERS, default_tagged_tokens

PROGRAM = "ep-backend bench op --device cuda"

TRAVELLING_DTYPES = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
"""Of rows of dispatch or combine."""
OUTPUT_LAYOUTS = ("expert_major", "expert_workspace", "rank_major")
"""Rows by expert, unpacked from an inbox, of which a partial sum a rank goes home. By expert in a
workspace, where every row is fetched from its expert. A row a (token, rank), in a workspace where
it is pulled and comes home as bf16."""
FORMS = ("fused", "hook")


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    num_ranks: int
    num_tokens: int
    """T of every rank."""
    dispatch_dtype: str
    combine_dtype: str
    """Both of `TRAVELLING_DTYPES`."""
    output_layout: str
    """Of `OUTPUT_LAYOUTS`."""
    form: str
    """"fused": send and receive in one call; "hook": a send, then its hook."""
    transfer: str
    num_sms: int | None
    """Blocks of a kernel; None: the GPU's SMs, shared by the ranks."""
    num_max_tagged_tokens: int | None
    """None: the buffer's default; 0: never tagged."""

    @property
    def has_workspace(self) -> bool:
        """On CUDA."""
        transfers = {"expert_workspace": ("pull",), "rank_major": ("pull", "pull_push")}
        may_be = self.transfer in transfers.get(self.output_layout, ())
        return may_be and self.combine_dtype == "bf16"

    @property
    def buffer_layout(self) -> str:
        """The buffer's `output_layout`."""
        return "rank_major" if self.output_layout == "rank_major" else "expert_major"

    def default_tagged_tokens(self, hidden: int, top_k: int) -> int:
        """Batches of up to so many tokens are tagged where `num_max_tagged_tokens` is None, between
        GPUs."""
        if self.has_workspace and self.num_ranks == 1:
            return 0
        return default_tagged_tokens(
            hidden * TRAVELLING_DTYPES[self.dispatch_dtype].itemsize,
            top_k,
            self.num_ranks,
            workspaces_of=self.buffer_layout if self.has_workspace else None,
            with_hooks=self.form == "hook",
        )


@dataclass(frozen=True)
class CudaBenchSettings:
    """Sizes that all cases share, what is swept, and how it is timed."""

    num_ranks: tuple[int, ...] = (1, 8)
    num_tokens: tuple[int, ...] = (1, 16, 128)
    dispatch_dtypes: tuple[str, ...] = ("bf16", "fp8")
    combine_dtypes: tuple[str, ...] = ("bf16",)
    output_layouts: tuple[str, ...] = OUTPUT_LAYOUTS
    forms: tuple[str, ...] = FORMS
    transfers: tuple[str, ...] = ("pull",)
    num_sms: tuple[int | None, ...] = (None,)
    num_max_tagged_tokens: tuple[int | None, ...] = (None,)
    hidden: int = 7168
    num_experts: int = 256
    top_k: int = 8
    num_max_tokens_per_rank: int = 128
    chain: int = 20
    """Pairs of a graph."""
    num_repeats: int = 60
    """Replays timed."""
    seed: int = 0
    is_cold: bool = False
    """Also time pairs whose data are not in the L2 cache."""
    with_floors: bool = True
    with_gemm: bool = True
    with_flashinfer: bool = True
    """Where it is installed."""

    def __post_init__(self) -> None:
        for name in ("num_ranks", "num_tokens"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected positive numbers")
        for name in ("hidden", "num_experts", "top_k", "chain", "num_repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        for name, allowed in (
            ("dispatch_dtypes", tuple(TRAVELLING_DTYPES)),
            ("combine_dtypes", tuple(TRAVELLING_DTYPES)),
            ("output_layouts", OUTPUT_LAYOUTS),
            ("forms", FORMS),
            ("transfers", tuple(TRANSFERS)),
        ):
            for value in getattr(self, name):
                if value not in allowed:
                    raise ValueError(f"{name} has {value!r}, expected {' or '.join(allowed)}")
        if self.num_max_tokens_per_rank < max(self.num_tokens):
            raise ValueError(
                f"num_max_tokens_per_rank is {self.num_max_tokens_per_rank}, expected at least the "
                f"largest number of tokens, {max(self.num_tokens)}"
            )
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k is {self.top_k}, expected at most {self.num_experts} experts")
        if self.num_experts < max(self.num_ranks):
            raise ValueError(
                f"num_experts is {self.num_experts}, expected at least the largest number of "
                f"ranks, {max(self.num_ranks)}"
            )
        if not any(self.cases()):
            raise ValueError(
                "no case is left: rows in expert workspaces are pulled and come home as bf16"
            )

    def cases(self) -> Iterator[Case]:
        for values in itertools.product(
            self.num_ranks,
            self.num_tokens,
            self.dispatch_dtypes,
            self.combine_dtypes,
            self.output_layouts,
            self.forms,
            self.transfers,
            self.num_sms,
            self.num_max_tagged_tokens,
        ):
            case = Case(*values)
            if case.output_layout != "expert_workspace" or case.has_workspace:
                yield case


QUICK = CudaBenchSettings(
    num_tokens=(1, 128),
    dispatch_dtypes=("fp8",),
    output_layouts=("expert_major",),
    forms=("fused",),
    num_repeats=20,
)


def parse_arguments(arguments: list[str]) -> tuple[CudaBenchSettings, Path | None]:
    """The settings, and where the JSON goes. Wrong arguments end the program, as argparse does."""
    parser = _parser()
    given = vars(parser.parse_args(arguments))
    base = QUICK if given.pop("quick") else CudaBenchSettings()
    output: Path | None = given.pop("output")
    try:
        return replace(base, **{k: v for k, v in given.items() if v is not None}), output
    except ValueError as e:
        parser.error(str(e))


def _parser() -> argparse.ArgumentParser:
    default = CudaBenchSettings()
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Time of dispatch + combine between virtual ranks on one GPU, beside the "
        "GPU's own floors. A list is swept.",
    )

    add_case_options(parser, default, with_ranks=True)
    parser.add_argument(
        "--cold", dest="is_cold", action="store_const", const=True, help="Also with a cold L2."
    )
    for flag, name, what in (
        ("--no-floors", "with_floors", "the floors of the GPU"),
        ("--no-gemm", "with_gemm", "the GEMM between send and hook"),
        ("--no-flashinfer", "with_flashinfer", "FlashInfer, which is timed where it is installed"),
    ):
        parser.add_argument(
            flag, dest=name, action="store_const", const=False, help=f"Leave out {what}."
        )
    parser.add_argument("--quick", action="store_true", help="A few cases; seconds.")
    return parser


def add_case_options(
    parser: argparse.ArgumentParser, default: CudaBenchSettings, *, with_ranks: bool
) -> None:
    """Options of the sizes and of what is swept, each under its name in the settings and None where
    it was not given; and where the JSON goes.

    Args:
        default: what help shows.
        with_ranks: the number of virtual ranks is swept too.
    """

    add = option_adder(parser, default)
    if with_ranks:
        add("--ranks", "num_ranks", numbers, "List: virtual ranks, all on this GPU.")
    add("--tokens", "num_tokens", numbers, "List: tokens of every rank.")
    add("--dispatch-dtype", "dispatch_dtypes", words, "List of bf16, fp8: rows of dispatch.")
    add("--combine-dtype", "combine_dtypes", words, "List of bf16, fp8: rows of combine.")
    add("--layout", "output_layouts", words, "List of expert_major, expert_workspace, rank_major.")
    add("--form", "forms", words, "List of fused, hook: one call, or a send and its hook.")
    shown = None if with_ranks else "what a buffer takes"
    add("--transfer", "transfers", words, f"List of {', '.join(TRANSFERS)}.", shown)
    add("--num-sms", "num_sms", _numbers_or_default, "List: blocks of a kernel.")
    add("--tagged", "num_max_tagged_tokens", _tagged, "List of default, off, a number of tokens.")
    add("--hidden", "hidden", int, "Elements of a row.")
    add("--experts", "num_experts", int, "Experts of all ranks together.")
    add("--top-k", "top_k", int, "Experts of a token.")
    add(
        "--num-max-tokens",
        "num_max_tokens_per_rank",
        int,
        "Capacity of the buffers. Memory grows with ranks times this: 16 for 32 ranks and more.",
    )
    add("--chain", "chain", int, "Pairs in a graph.")
    add("--repeats", "num_repeats", int, "Replays timed.")
    add("--seed", "seed", int, "Of the inputs.")
    parser.add_argument("--output", "--json", type=Path, help="Write all results there, as JSON.")


def _numbers_or_default(text: str) -> tuple[int | None, ...]:
    return tuple(None if word == "default" else int(word) for word in text.split(","))


def _tagged(text: str) -> tuple[int | None, ...]:
    return _numbers_or_default(text.replace("off", "0"))
