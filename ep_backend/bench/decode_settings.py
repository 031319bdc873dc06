"""What `ep-backend bench decode` was asked for: a model's shape, ranks and batches."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ep_backend.bench.options import numbers, option_adder

PROGRAM = "ep-backend bench decode"
DEVICES = ("cpu", "cuda")
LAYOUTS = ("expert_major", "expert_workspace")


@dataclass(frozen=True)
class MoEShape:
    """Of a model's MoE layers. Shared experts, attention and dense layers are left out."""

    hidden: int
    intermediate: int
    """Of a routed expert."""
    num_experts: int
    top_k: int
    num_layers: int
    """With routed experts."""


# From the models' published config.json.
MODELS = {
    "deepseek-v3": MoEShape(7168, 2048, 256, 8, 58),
    "kimi-k2": MoEShape(7168, 2048, 384, 8, 60),
    "qwen3-235b": MoEShape(4096, 1536, 128, 8, 94),
    "tiny": MoEShape(256, 128, 16, 4, 2),
}


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    num_ranks: int
    num_tokens: int
    """Of every rank, in all micro-batches together."""
    num_micro_batches: int
    """1: a dispatch and a combine in one call each; 2: overlapped through receive hooks."""


@dataclass(frozen=True)
class DecodeSettings:
    model: str = "tiny"
    device: str = "cpu"
    num_ranks: tuple[int, ...] = (2,)
    num_tokens: tuple[int, ...] = (1, 8, 32, 128)
    num_layers: int = 4
    """Run one after the other in a step that is timed; they share their experts' weights."""
    layout: str = "expert_major"
    gpu_per_rank: bool = False
    """On CUDA: a process and a GPU a rank; else virtual ranks that share one GPU."""
    dtype: torch.dtype = torch.bfloat16
    num_repeats: int = 20
    """Steps timed."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (("model", tuple(MODELS)), ("device", DEVICES), ("layout", LAYOUTS)):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}, expected {' or '.join(map(repr, allowed))}")
        for name in ("num_ranks", "num_tokens"):
            values = getattr(self, name)
            if not values or min(values) < 1:
                raise ValueError(f"{name} is {values}, expected positive numbers")
        for name in ("num_layers", "num_repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if max(self.num_ranks) > self.shape.num_experts:
            raise ValueError(
                f"num_ranks has {max(self.num_ranks)}, expected at most {self.shape.num_experts}, "
                "an expert a rank"
            )
        if self.device == "cpu" and self.layout != "expert_major":
            raise ValueError("layout is 'expert_workspace', which only CUDA has")
        if self.device == "cpu" and self.gpu_per_rank:
            raise ValueError("gpu_per_rank is True with device 'cpu', expected 'cuda'")

    @property
    def shape(self) -> MoEShape:
        return MODELS[self.model]

    def cases(self) -> list[Case]:
        return [
            Case(num_ranks, num_tokens, num_micro_batches)
            for num_ranks in self.num_ranks
            for num_tokens in self.num_tokens
            for num_micro_batches in (1, 2)
            if num_micro_batches <= num_tokens
        ]

    def cases_of(self, num_ranks: int) -> list[Case]:
        return [case for case in self.cases() if case.num_ranks == num_ranks]


def parse_arguments(arguments: list[str]) -> tuple[DecodeSettings, Path | None]:
    """The settings, and where the JSON goes. Wrong arguments end the program, as argparse does."""
    default = DecodeSettings()
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Time of a decode step's MoE layers: dispatch, experts, combine; with one "
        "micro-batch, and with two that overlap through receive hooks. Ranks are processes on a "
        "CPU, or in a CUDA graph virtual ranks on one GPU or processes with a GPU each.",
    )

    add = option_adder(parser, default)
    add("--model", "model", str, f"One of {', '.join(MODELS)}: the shape of its MoE layers.")
    add("--device", "device", str, "cpu or cuda.")
    add("--ranks", "num_ranks", numbers, "List: expert-parallel ranks.")
    add("--tokens", "num_tokens", numbers, "List: tokens of every rank.")
    add("--layers", "num_layers", int, "Layers of a step that is timed.")
    add("--layout", "layout", str, "expert_major, or on CUDA expert_workspace.")
    parser.add_argument(
        "--gpu-per-rank",
        action="store_true",
        help="On CUDA: a process and a GPU a rank [default: virtual ranks on one GPU].",
    )
    add("--repeats", "num_repeats", int, "Steps timed.")
    add("--seed", "seed", int, "Of inputs and weights.")
    parser.add_argument("--output", "--json", type=Path, help="Write all results there, as JSON.")
    given = {k: v for k, v in vars(parser.parse_args(arguments)).items() if v is not None}
    output: Path | None = given.pop("output", None)
    try:
        return replace(default, **given), output
    except ValueError as e:
        parser.error(str(e))
