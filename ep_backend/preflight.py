"""Whether this machine can do what a deployment is about to ask of it, before a model is loaded.

Compose files and pods run it first (`ep-backend check`; seconds), so that what cannot work stops
with a reason instead of with a time-out of the engine.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import torch

from ep_backend import LowLatencyBuffer, NormalBuffer, __version__, virtual_world
from ep_backend.doctor.checks import Check, Level, Machine
from ep_backend.doctor.gpu import Gpus, check_build, check_cards, check_peers
from ep_backend.doctor.rdma import check_rdma
from ep_backend.group import Group
from ep_backend.network import VARIABLE

KERNELS = ("low-latency", "normal")
REDUCTIONS = ("rank", "source")
"""Of low-latency kernels: our plug-ins use the first, DeepEP's API by itself the other."""

NUM_TOKENS, HIDDEN, NUM_EXPERTS, TOP_K = 4, 128, 4, 2
TIMEOUT_SECS = 30.0


class NotDeployable(RuntimeError):
    """This machine, or this ep_backend, cannot do it; the text says what to do instead."""


def check(
    *,
    num_hosts: int = 1,
    device: str = "cpu",
    num_gpus: int = 1,
    kernels: str = "low-latency",
    reduction: str = "rank",
) -> str:
    """Checks the topology, the GPUs and their links, then exchanges a few tokens.

    Args:
        num_hosts: over which the ranks of one expert-parallel group are spread.
        device: "cpu" or "cuda".
        num_gpus: of this host that the ranks will use; ignored on the CPU.
        kernels: those that the engine will use, one of `KERNELS`.
        reduction: of low-latency kernels, one of `REDUCTIONS`.

    Returns:
        What was found, in a line.

    Raises:
        NotDeployable: something is missing.
    """
    for name, value, known in (
        ("kernels", kernels, KERNELS),
        ("reduction", reduction, REDUCTIONS),
    ):
        if value not in known:
            raise NotDeployable(f"{name} is {value!r}, expected one of {', '.join(known)}.")
    if num_hosts > 1:
        _check_network(num_hosts, device)
    if device == "cuda":
        found = _check_gpus(num_gpus)
    elif device == "cpu":
        found = "CPU"
    else:
        raise NotDeployable(f"device is {device!r}, expected 'cpu' or 'cuda'.")
    with _no_network() if num_hosts > 1 else nullcontext():
        _check_exchange(device, kernels, reduction)
    network = "" if num_hosts == 1 else f", and what {num_hosts} hosts need is there"
    return f"ep_backend {__version__}: {found}, {kernels} kernels exchange correctly{network}"


def _check_network(num_hosts: int, device: str) -> None:
    """As far as one host can tell: nothing is sent to the others."""
    needs = f"one group over {num_hosts} hosts needs RDMA"
    otherwise = (
        "Keep each expert-parallel group on one host, or leave this backend out and let the engine "
        "use its own."
    )
    if device != "cuda":
        raise NotDeployable(
            f"{needs}, which only kernels on GPUs have; asked for is device {device}. {otherwise}"
        )
    for check in check_rdma(Machine(), Gpus.visible()):
        # A server's container may lock more memory than that in which this runs.
        if check.level is Level.MISSING and check.name != "locked memory":
            raise NotDeployable(f"{needs}. {check.name}: {check.found} {check.remedy} {otherwise}")


@contextmanager
def _no_network() -> Iterator[None]:
    """NVSHMEM is not started: it would want cards and locked memory, which containers of servers
    have, but not that in which this runs."""
    text = os.environ.pop(VARIABLE, None)
    try:
        yield
    finally:
        if text is not None:
            os.environ[VARIABLE] = text


def _check_gpus(num_gpus: int) -> str:
    """As doctor does, of the first `num_gpus`; and that there are as many."""
    _require(check_build())
    gpus = Gpus.visible()
    if len(gpus) < num_gpus:
        raise NotDeployable(
            f"{num_gpus} GPUs are needed, but torch sees {len(gpus)}. Reserve them for this "
            "container, or start fewer ranks."
        )
    used = gpus.first(num_gpus)
    for check in [*check_cards(used), *check_peers(used)]:
        _require(check)
    return f"{num_gpus} x {used.names[0]}"


def _require(check: Check) -> None:
    if check.level is Level.MISSING:
        raise NotDeployable(f"{check.name}: {check.found}. {check.remedy}")


def _check_exchange(device: str, kernels: str, reduction: str) -> None:
    # On one GPU, kernels of several ranks on one stream would wait for each other.
    num_ranks = 1 if device == "cuda" else 2
    exchange = partial(_low_latency, reduction) if kernels == "low-latency" else _normal

    def rank_main(group: Group) -> bool:
        x, topk_idx, topk_weights = _batch(device)
        combined = exchange(group, x, topk_idx, topk_weights)
        factors = (topk_weights * (topk_idx + 1)).sum(dim=1, keepdim=True)
        return torch.equal(combined.float(), x.float() * factors)

    try:
        is_right = all(virtual_world(num_ranks, TIMEOUT_SECS).run(rank_main))
    except (RuntimeError, ValueError) as e:
        raise NotDeployable(f"{kernels} kernels on {device}: {e}") from e
    if not is_right:
        raise NotDeployable(
            f"{kernels} kernels on {device} gave a wrong result. Do not serve with this build."
        )


def _batch(device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Small integers and halves: every sum is exact in bfloat16."""
    x = (torch.arange(NUM_TOKENS * HIDDEN) % 8).view(NUM_TOKENS, HIDDEN).to(torch.bfloat16)
    first = torch.arange(NUM_TOKENS) % NUM_EXPERTS
    topk_idx = torch.stack([first, (first + 2) % NUM_EXPERTS], dim=1)
    topk_weights = torch.full((NUM_TOKENS, TOP_K), 0.5, dtype=torch.float32)
    return x.to(device), topk_idx.to(device), topk_weights.to(device)


def _low_latency(
    reduction: str,
    group: Group,
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
) -> torch.Tensor:
    """Experts multiply by their number plus one."""
    buffer = LowLatencyBuffer(
        group,
        num_max_tokens_per_rank=NUM_TOKENS,
        hidden=HIDDEN,
        num_experts=NUM_EXPERTS,
        top_k=TOP_K,
        dtype=x.dtype,
        reduction=reduction,
        device=x.device,
        timeout_secs=TIMEOUT_SECS,
    )
    there, home = (topk_weights, None) if reduction == "rank" else (None, topk_weights)
    result, recv_hook = buffer.dispatch(x, topk_idx, there)
    recv_hook()
    num_local = NUM_EXPERTS // group.num_ranks
    numbers = torch.arange(1, num_local + 1, device=x.device) + group.self_rank * num_local
    rows = result.recv_x * numbers.view(-1, 1, 1)
    combined, recv_hook = buffer.combine(rows, result.handle, topk_weights=home)
    recv_hook()
    combined = combined.clone()
    buffer.close()
    return combined


def _normal(
    group: Group, x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor
) -> torch.Tensor:
    """Experts multiply by their number plus one."""
    buffer = NormalBuffer(
        group,
        hidden=HIDDEN,
        num_experts=NUM_EXPERTS,
        top_k=TOP_K,
        dtype=x.dtype,
        num_bytes=1 << 20,
        device=x.device,
        timeout_secs=TIMEOUT_SECS,
    )
    result = buffer.dispatch(x, topk_idx, topk_weights)
    num_local = NUM_EXPERTS // group.num_ranks
    numbers = result.recv_topk_idx + 1 + group.self_rank * num_local
    is_ours = result.recv_topk_idx >= 0
    factors = (result.recv_topk_weights * numbers * is_ours).sum(dim=1, keepdim=True)
    combined = buffer.combine((result.recv_x.float() * factors).to(x.dtype), result.handle)
    buffer.close()
    return combined
