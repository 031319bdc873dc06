"""What `ep-backend tune` was asked for: shapes, batches, and what to try."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ep_backend.bench.decode_settings import MODELS
from ep_backend.bench.options import numbers, option_adder, words
from ep_backend.settings import dtype_name
from ep_backend.tuning import Shape

PROGRAM = "ep-backend tune"
DEVICES = ("cpu", "cuda")
KERNELS = ("low_latency", "normal")
FORMS = ("fused", "hook")
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
DTYPES_BY_NAME = {dtype_name(dtype): dtype for dtype in DTYPES.values()}
LAYOUTS = {
    "expert_major": ("expert_major", "rank"),
    "expert_source": ("expert_major", "source"),
    "expert_workspace": ("expert_major", "source"),
    "rank_major": ("rank_major", "rank"),
}
"""Of low latency: `output_layout` and `reduction`. In workspaces: expert_workspace, and on CUDA
rank_major where rows come home as they are."""


@dataclass(frozen=True)
class TuneSettings:
    device: str = "cpu"
    kernels: tuple[str, ...] = KERNELS
    num_ranks: tuple[int, ...] = (2,)
    is_virtual: bool = False
    """CUDA: all ranks on one GPU, instead of a process a GPU."""
    hidden: int = 2048
    num_experts: int = 64
    top_k: int = 8
    dtype: str = "bf16"
    dispatch_dtype: str = ""
    """As the next: "" is the dtype."""
    combine_dtype: str = ""
    layouts: tuple[str, ...] = ("expert_major",)
    """Of low latency."""
    num_tokens: tuple[int, ...] = (1, 16, 64, 128)
    """Of every rank; low latency. The buffer has room for the most."""
    num_prefill_tokens: tuple[int, ...] = (4096,)
    """Of every rank; normal."""
    num_sms: tuple[int, ...] = ()
    """To try, of a rank. Empty: some, up to what there is."""
    spin_us: tuple[float, ...] = (0, 10, 50, 200, 1000)
    form: str = "fused"
    """Low latency: one call, or a send and its hook."""
    chain: int = 20
    """Operations between two events, or between two meetings of CPU processes."""
    num_repeats: int = 10
    """Chains timed, twice each."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (
            ("device", DEVICES),
            ("kernels", KERNELS),
            ("dtype", ("float32", "bf16")),
            ("dispatch_dtype", ("", self.dtype, "fp8")),
            ("combine_dtype", ("", self.dtype, "fp8")),
            ("layouts", tuple(LAYOUTS)),
            ("form", FORMS),
        ):
            given = getattr(self, name)
            for value in given if isinstance(given, tuple) else (given,):
                if value not in allowed:
                    listed = " or ".join(a for a in allowed if a)
                    raise ValueError(f"{name} has {value!r}, expected {listed}")
        for name in ("num_ranks", "num_tokens", "num_prefill_tokens"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected positive numbers")
        if self.num_sms and min(self.num_sms) < 1:
            raise ValueError(f"num_sms is {self.num_sms}, expected positive numbers")
        if not self.spin_us or min(self.spin_us) < 0:
            raise ValueError(f"spin_us is {self.spin_us}, expected numbers from 0")
        for name in ("hidden", "num_experts", "top_k", "chain", "num_repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k is {self.top_k}, expected at most {self.num_experts} experts")
        if self.num_experts < max(self.num_ranks):
            raise ValueError(
                f"num_experts is {self.num_experts}, expected at least the largest number of "
                f"ranks, {max(self.num_ranks)}"
            )
        if self.device == "cpu" and (self.is_virtual or "expert_workspace" in self.layouts):
            raise ValueError("virtual ranks and expert workspaces are for --device cuda")
        if "expert_workspace" in self.layouts and self.combine_dtype == "fp8":
            raise ValueError("rows in expert workspaces come home as they are, not as fp8")

    def shapes_of(self, num_ranks: int) -> list[Shape]:
        """What is searched for with so many ranks, one after the other."""
        shapes = []
        for kernels in self.kernels:
            layouts = self.layouts if kernels == "low_latency" else ("normal",)
            shapes += [self._shape(kernels, num_ranks, layout) for layout in layouts]
        return shapes

    def _shape(self, kernels: str, num_ranks: int, layout: str) -> Shape:
        is_normal = kernels == "normal"
        combine_dtype = self.dtype if is_normal else self.combine_dtype or self.dtype
        is_fetched = self.device == "cuda" and combine_dtype == self.dtype
        output_layout, reduction = LAYOUTS.get(layout, (layout, layout))
        return Shape(
            kernels=kernels,
            num_ranks=num_ranks,
            hidden=self.hidden,
            num_experts=self.num_experts,
            top_k=self.top_k,
            dtype=dtype_name(DTYPES[self.dtype]),
            dispatch_dtype=dtype_name(DTYPES[self.dispatch_dtype or self.dtype]),
            combine_dtype=dtype_name(DTYPES[combine_dtype]),
            output_layout=output_layout,
            reduction=reduction,
            has_workspaces=layout == "expert_workspace" or (layout == "rank_major" and is_fetched),
        )

    def tokens_of(self, shape: Shape) -> tuple[int, ...]:
        return self.num_tokens if shape.kernels == "low_latency" else self.num_prefill_tokens


@dataclass(frozen=True)
class Request:
    """The command line."""

    settings: TuneSettings
    table: Path | None
    """Default: where buffers look."""
    output: Path | None
    """Of all that was measured."""
    shows: bool
    """Print the table, and search nothing."""


def parse_arguments(arguments: list[str]) -> Request:
    """Wrong arguments end the program with status 2, as argparse does."""
    parser = _parser()
    given = {k: v for k, v in vars(parser.parse_args(arguments)).items() if v is not None}
    table, output, shows = given.pop("table", None), given.pop("output", None), given.pop("shows")
    model = given.pop("model", None)
    if model is not None:
        shape = MODELS[model]
        of_model = {
            "hidden": shape.hidden,
            "num_experts": shape.num_experts,
            "top_k": shape.top_k,
        }
        given = of_model | given
    try:
        return Request(replace(TuneSettings(), **given), table, output, shows)
    except ValueError as e:
        parser.error(str(e))


def _parser() -> argparse.ArgumentParser:
    default = TuneSettings()
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Searches settings for a shape on this machine, and stores them in the table "
        "that buffers look in: processes on a CPU, a process a GPU, or virtual ranks on one GPU.",
    )

    add = option_adder(parser, default)
    parser.add_argument("--show", dest="shows", action="store_true", help="Print the table.")
    parser.add_argument("--model", choices=MODELS, help="The shape of its MoE layers.")
    add("--device", "device", str, "cpu or cuda.")
    add("--kernels", "kernels", words, f"List of {', '.join(KERNELS)}.")
    add("--ranks", "num_ranks", _ascending, "List: expert-parallel ranks.")
    parser.add_argument(
        "--virtual",
        dest="is_virtual",
        action="store_const",
        const=True,
        help="All ranks on one GPU, not a process a GPU.",
    )
    add("--hidden", "hidden", int, "Elements of a row.")
    add("--experts", "num_experts", int, "Experts of all ranks together.")
    add("--top-k", "top_k", int, "Experts of a token.")
    add("--dtype", "dtype", str, "float32 or bf16.")
    add(
        "--dispatch-dtype",
        "dispatch_dtype",
        str,
        "Of rows of dispatch: the dtype, or fp8.",
        "the dtype",
    )
    add("--combine-dtype", "combine_dtype", str, "Low latency: the dtype, or fp8.", "the dtype")
    add("--layout", "layouts", words, f"Low latency: list of {', '.join(LAYOUTS)}.")
    add("--tokens", "num_tokens", _ascending, "Low latency: list of tokens of every rank.")
    add("--prefill-tokens", "num_prefill_tokens", _ascending, "Normal: list of tokens of a rank.")
    add("--num-sms", "num_sms", _ascending, "CUDA: list of blocks of a kernel, of a rank.", "some")
    add("--spin-us", "spin_us", _floats, "CPU: list of microseconds that a wait polls.")
    add("--form", "form", str, "Low latency: fused or hook, one call or a send and its hook.")
    add("--chain", "chain", int, "Pairs in a chain.")
    add("--repeats", "num_repeats", int, "Chains timed, twice each.")
    add("--seed", "seed", int, "Of the inputs.")
    parser.add_argument(
        "--table", type=Path, help="The table. [default: EP_BACKEND_TUNING, or in the user's cache]"
    )
    parser.add_argument("--output", "--json", type=Path, help="Write all times there, as JSON.")
    return parser


def _ascending(text: str) -> tuple[int, ...]:
    return tuple(sorted(numbers(text)))


def _floats(text: str) -> tuple[float, ...]:
    return tuple(sorted(float(word) for word in text.split(",")))
