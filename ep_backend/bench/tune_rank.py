"""The search for one shape, on ranks of any kind; and the processes of those that are processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ep_backend import Group
from ep_backend.bench.op_processes import RANK_TIMEOUT_SECS, Report
from ep_backend.bench.tune_cases import (
    Candidate,
    LowLatencyCandidate,
    NormalCandidate,
    inputs_of,
    measure,
    most_rows,
)
from ep_backend.bench.tune_ranks import CpuRank, GpuRank, Ranks
from ep_backend.bench.tune_search import (
    Found,
    Settings,
    Space,
    Times,
    search_low_latency,
    search_normal,
)
from ep_backend.bench.tune_settings import DTYPES_BY_NAME, TuneSettings
from ep_backend.kernels import default_spin_us
from ep_backend.normal_cuda_settings import (
    DEFAULT_NUM_SMS,
    CudaNormalSettings,
    num_available_sms,
)
from ep_backend.normal_settings import DEFAULT_NUM_BYTES, NormalSettings
from ep_backend.settings import TRANSFERS, BufferSettings, default_transfer
from ep_backend.tuning import Entry, Shape, Site

SMS_TO_TRY = (1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 32, 48, 64, 96)
"""And all there are."""
NORMAL_CHAIN = 2
"""Pairs of a chain: they take milliseconds."""
SHARES_OF_MEMORY = (8, 4, 2, 1)
"""Of what all rows need: an eighth to all of it."""
ROUTING_HEADROOM = 1.25
"""No two batches are routed alike, and one row too many sends all of them in rounds."""


@dataclass(frozen=True)
class ShapeResult:
    shape: Shape
    site: Site
    found: Found

    def entry(self, about: dict[str, Any]) -> Entry:
        """
        Args:
            about: when, and by which command.
        """
        found = self.found
        times = {"default_us": found.default_us, "tuned_us": found.tuned_us}
        by_tokens = {name: {str(n): us for n, us in t.items()} for name, t in times.items()}
        return Entry(
            self.shape,
            self.site,
            found.settings,
            about | {"defaults": found.defaults, "gain": found.gain} | by_tokens,
        )

    def cases(self) -> list[dict[str, Any]]:
        """Of each number of tokens, the time by default and with what was found."""
        found = self.found
        return [
            self._name()
            | {"num_tokens": n, "default_us": us, "tuned_us": found.tuned_us[n]}
            | {"tuned": told(found.settings)}
            for n, us in found.default_us.items()
        ]

    def tried(self) -> list[dict[str, Any]]:
        """A line for each candidate and number of tokens."""
        return [
            self._name()
            | {"step": measured.step, "settings": told(measured.settings)}
            | {"num_tokens": num_tokens, "pair_us": us}
            for measured in self.found.measured
            for num_tokens, us in measured.times_us.items()
        ]

    def _name(self) -> dict[str, Any]:
        shape = self.shape
        return {
            "kernels": shape.kernels,
            "num_ranks": shape.num_ranks,
            "output_layout": shape.output_layout,
            "reduction": shape.reduction,
            "has_workspaces": shape.has_workspaces,
        }


def told(settings: Settings) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def search(
    ranks: Ranks, settings: TuneSettings, shape: Shape, say: Callable[[str], None]
) -> ShapeResult:
    """Collective; the same on every rank.

    Args:
        say: told each step's times.
    """
    groups = ranks.make(lambda group: group)
    site = Site.of(shape.kernels, groups[0], ranks.device)
    space, defaults = _space(ranks, settings, shape, groups)

    def open_candidate(tried: Settings) -> Candidate:
        kind = LowLatencyCandidate if shape.kernels == "low_latency" else NormalCandidate
        return kind(ranks, settings, shape, tried)

    def timed(candidates: Any) -> list[Times]:
        times_us = measure(ranks, open_candidate, settings.tokens_of(shape), candidates, say)
        for tried, times in zip(candidates, times_us, strict=True):
            say(f"{told(tried)}: {', '.join(f'{us:.1f}' for us in times.values())} us")
        return times_us

    run = search_low_latency if shape.kernels == "low_latency" else search_normal
    return ShapeResult(shape, site, run(space, defaults, timed))


def _space(
    ranks: Ranks, settings: TuneSettings, shape: Shape, groups: list[Group]
) -> tuple[Space, Settings]:
    """What there is to try, and what a buffer takes where it is told nothing."""
    is_cuda = ranks.device.type == "cuda"
    names = shape.settings_of(ranks.device.type)
    num_max_sms = num_available_sms(groups[0], ranks.device) if is_cuda else 0
    num_sms = tuple(n for n in settings.num_sms or SMS_TO_TRY if n < num_max_sms)
    if is_cuda and (not settings.num_sms or max(settings.num_sms) >= num_max_sms):
        num_sms += (num_max_sms,)
    spin_us = tuple(sorted({*settings.spin_us, default_spin_us(shape.num_ranks)}))
    defaults: Settings = {}
    if "spin_us" in names:
        defaults["spin_us"] = default_spin_us(shape.num_ranks)
    if shape.kernels == "normal":
        if is_cuda:
            defaults["num_sms"] = min(DEFAULT_NUM_SMS, num_max_sms)
        num_bytes = _num_bytes(ranks, settings, shape, groups)
        defaults["num_bytes"] = max(DEFAULT_NUM_BYTES, num_bytes[0])
        return Space((), 0, num_sms, () if is_cuda else spin_us, num_bytes), defaults
    if not is_cuda:
        return Space(spin_us=spin_us), defaults
    defaults["num_sms"] = num_max_sms
    can_tag = "num_max_tagged_tokens" in names
    transfers = ["pull"]
    if "transfer" in names:
        by_default = default_transfer(
            shape.num_ranks, has_expert_workspaces=False, is_virtual=groups[0].is_virtual
        )
        defaults["transfer"] = by_default
        transfers = [by_default, *(way for way in TRANSFERS if way != by_default)]
    if can_tag:
        defaults["num_max_tagged_tokens"] = _default_tagged_tokens(
            settings, shape, is_virtual=groups[0].is_virtual
        )
    space = Space(
        transfers=tuple(transfers),
        num_max_tokens=max(settings.num_tokens) if can_tag else 0,
        num_sms=num_sms,
    )
    return space, defaults


def _default_tagged_tokens(settings: TuneSettings, shape: Shape, *, is_virtual: bool) -> int:
    by_default = BufferSettings(
        num_max_tokens_per_rank=max(settings.num_tokens),
        hidden=shape.hidden,
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        dtype=DTYPES_BY_NAME[shape.dtype],
        dispatch_dtype=DTYPES_BY_NAME[shape.dispatch_dtype],
        combine_dtype=DTYPES_BY_NAME[shape.combine_dtype],
        scale_format="float32",
        output_layout=shape.output_layout,
        reduction=shape.reduction,
        transfer="pull",
        num_max_tagged_tokens=None,
        num_workspaces=int(shape.has_workspaces),
        expert_ids="local",
        num_banks=2,
        device="cuda",
        with_hooks=settings.form == "hook",
        is_virtual=is_virtual,
    )
    return by_default.config(shape.num_ranks).num_max_tagged_tokens


def _num_bytes(
    ranks: Ranks, settings: TuneSettings, shape: Shape, groups: list[Group]
) -> tuple[int, ...]:
    """Budgets to try, ascending: shares of what the largest batch needs to travel at once."""
    num_tokens = max(settings.num_prefill_tokens)
    is_cuda = ranks.device.type == "cuda"
    kind = CudaNormalSettings if is_cuda else NormalSettings
    sized = kind(
        hidden=shape.hidden,
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        dtype=DTYPES_BY_NAME[shape.dtype],
        dispatch_dtype=DTYPES_BY_NAME[shape.dispatch_dtype],
        scale_format="float32",
        num_bytes=DEFAULT_NUM_BYTES,
    )
    if is_cuda:
        topk_idx = [
            inputs_of(settings, shape, group.self_rank, num_tokens).topk_idx for group in groups
        ]
        most = shape.num_ranks * num_tokens
        room = min(most, int(ROUTING_HEADROOM * most_rows(ranks, shape, topk_idx)))
    else:
        room = num_tokens
    budgets = {sized.num_bytes_for(shape.num_ranks, max(1, room // s)) for s in SHARES_OF_MEMORY}
    return tuple(sorted(budgets))


def rank_main(rank: int, argument: tuple[TuneSettings, int], report: Report) -> None:
    """Of a process a rank. Reports ("said", text), and ("found", result) of each shape.

    Args:
        argument: the settings, and which of their numbers of ranks this world has.
    """
    settings, num_ranks = argument
    torch.set_num_threads(1)
    group = Group.from_process_group(timeout_secs=RANK_TIMEOUT_SECS)
    with torch.inference_mode(settings.device == "cpu"):
        for shape in settings.shapes_of(num_ranks):
            report(("searching", f"searching: {shape}"))
            ranks = ranks_of(group, rank, settings, shape)
            found = search(ranks, settings, shape, lambda text: report(("said", text)))
            report(("found", found))


def ranks_of(group: Group, rank: int, settings: TuneSettings, shape: Shape) -> Ranks:
    num_ops = num_ops_of(settings, shape)
    if settings.device == "cpu":
        return CpuRank(group, num_ops, settings.num_repeats)
    torch.cuda.set_device(rank)
    return GpuRank(group, num_ops, settings.num_repeats)


def num_ops_of(settings: TuneSettings, shape: Shape) -> int:
    return settings.chain if shape.kernels == "low_latency" else NORMAL_CHAIN
