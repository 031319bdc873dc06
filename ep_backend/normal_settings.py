"""A normal buffer's settings: their checks, before the ranks agree on them, and their kernels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ep_backend import _native
from ep_backend.checks import check_int
from ep_backend.handles import KernelStatistics
from ep_backend.kernels import default_spin_us
from ep_backend.settings import (
    DTYPES,
    SCALE_FORMATS,
    TRAVELLING_DTYPES,
    check_choice,
    check_dispatch_dtype,
    device_type,
    dtype_name,
)
from ep_backend.tuning import Shape, Tuned

if TYPE_CHECKING:
    from ep_backend.group import Group
    from ep_backend.network import NetworkConfig

# As the native module counts them.
NORMAL_KERNEL_NAMES = ("normal_counts", "normal_dispatch", "normal_combine")
DEFAULT_NUM_BYTES = 64 << 20
MAX_NUM_BYTES = 1 << 46
"""Of symmetric memory: more than any host has."""

Settings = TypeVar("Settings", bound="NormalShape")


@dataclass(frozen=True)
class NormalShape:
    """What all ranks must agree on, on any device; see `NormalBuffer`."""

    hidden: int
    num_experts: int
    top_k: int
    dtype: torch.dtype
    dispatch_dtype: torch.dtype
    scale_format: str
    num_bytes: int

    # Where kernels have others, it is a setting.
    expert_ids = "local"

    def tuning_shape(self, num_ranks: int) -> Shape:
        """By which the tuning table knows such a buffer."""
        return Shape(
            kernels="normal",
            num_ranks=num_ranks,
            hidden=self.hidden,
            num_experts=self.num_experts,
            top_k=self.top_k,
            dtype=dtype_name(self.dtype),
            dispatch_dtype=dtype_name(self.dispatch_dtype),
            combine_dtype=dtype_name(self.dtype),
            output_layout="normal",
            reduction="normal",
            has_workspaces=False,
        )

    def tuned(self: Settings, tuned: Tuned, given: Mapping[str, Any]) -> Settings:
        """With what the table says in place of what the caller has not given."""
        num_bytes = tuned.int_of("num_bytes")
        if num_bytes is None or given["num_bytes"] is not None:
            return self
        return replace(self, num_bytes=num_bytes)

    def check_shape(self, num_ranks: int) -> None:
        """Raises `ValueError` for what no kernel could serve, whatever the memory."""
        check_int("num_ranks", num_ranks, 1, _native.MAX_RANKS)
        check_int("num_experts", self.num_experts, 1, _native.MAX_EXPERTS)
        check_int("hidden", self.hidden, 1, 1 << 20)
        check_int("top_k", self.top_k, 1, _native.MAX_TOP_K)
        check_choice("dtype", self.dtype, DTYPES)
        check_dispatch_dtype(self.dtype, self.dispatch_dtype, self.scale_format)

    def check_num_bytes(self, least: int, why: str) -> None:
        """Raises `ValueError` for a budget of less than `least`, or of more than there can be."""
        check_int("num_bytes", self.num_bytes, least, MAX_NUM_BYTES, why)

    def round_config(self, num_ranks: int, num_tokens_per_round: int) -> _native.NormalConfig:
        """Of kernels that send so many tokens of a rank at once."""
        return _native.NormalConfig(
            **self.native_shape(num_ranks), num_tokens_per_round=num_tokens_per_round
        )

    def native_shape(self, num_ranks: int) -> dict[str, Any]:
        """What the native configurations of all kernels have, by name."""
        return {
            "num_ranks": num_ranks,
            "num_experts": self.num_experts,
            "hidden": self.hidden,
            "top_k": self.top_k,
            "dtype": DTYPES[self.dtype],
            "dispatch_dtype": TRAVELLING_DTYPES[self.dispatch_dtype],
            "scale_format": SCALE_FORMATS[self.scale_format],
        }


@dataclass(frozen=True)
class NormalSettings(NormalShape):
    """Of a buffer on the CPU."""

    def agreed(self) -> dict[str, Any]:
        """By name, for `Group.agree`."""
        settings = {"device": "cpu"} | asdict(self)
        return settings | {
            "protocol version": _native.NORMAL_PROTOCOL_VERSION,
            "protocol version between nodes": _native.NORMAL_NODE_PROTOCOL_VERSION,
        }

    def check(self, num_ranks: int, ranks_per_node: int | None = None) -> None:
        """Raises `ValueError` for what no kernel could serve.

        Args:
            ranks_per_node: where they are on several nodes.
        """
        self.check_shape(num_ranks)
        least = self.least_num_bytes(num_ranks, ranks_per_node)
        self.check_num_bytes(
            least,
            f"With {num_ranks} ranks and rows of {self.hidden * self.dtype.itemsize} bytes, one "
            f"token of each rank at a time takes {least}. Pass at least that; more is faster.",
        )

    def least_num_bytes(self, num_ranks: int, ranks_per_node: int | None = None) -> int:
        """For one token of each rank at a time; of any settings that `num_bytes` may go with."""
        config = self.round_config(num_ranks, 1)
        if ranks_per_node is None:
            return _native.NormalLayout(config).num_bytes
        return _native.NormalNodeLayout(node_config(config, ranks_per_node)).num_bytes

    def num_bytes_for(self, num_ranks: int, num_tokens: int) -> int:
        """Budget in which so many tokens of a rank travel at once."""
        return _native.NormalLayout(self.round_config(num_ranks, num_tokens)).num_bytes

    def config(self, num_ranks: int, ranks_per_node: int | None = None) -> _native.NormalConfig:
        """With as many tokens a round as the budget has room for."""
        config = self.round_config(num_ranks, 0)
        if ranks_per_node is None:
            num_tokens = _native.NormalLayout.num_tokens_that_fit(config, self.num_bytes)
        else:
            num_tokens = _native.NormalNodeLayout.num_tokens_that_fit(
                node_config(config, ranks_per_node), self.num_bytes
            )
        config.num_tokens_per_round = num_tokens
        return config


def check_local_ids(expert_ids: str, who_has: str) -> None:
    """Raises `ValueError` for expert numbers that these kernels do not give."""
    if expert_ids != "local":
        raise ValueError(
            f"expert_ids is {expert_ids!r}, which only {who_has}. Pass 'local', or leave it out."
        )


def check_cpu(device: str | torch.device, network: NetworkConfig | None) -> None:
    """Raises `ValueError` for another device, on a CUDA one a buffer is of another class; and for
    what only those have."""
    if device_type(device) != "cpu":
        raise ValueError(f"device is {str(device)!r}, expected 'cpu' or a CUDA device.")
    if network is not None:
        raise ValueError(
            "network is given, but device is 'cpu': over a network only GPUs are joined. Pass "
            "device='cuda', or leave network out."
        )


def check_one_node(group: Group) -> None:
    """Raises `ValueError` where ranks on CUDA devices are on several nodes."""
    if group.network is not None:
        raise ValueError(
            f"ranks_per_node is {group.ranks_per_node}, but the network of a virtual world is a "
            "CPU's. Pass device='cpu', or leave ranks_per_node out."
        )


def node_config(config: _native.NormalConfig, ranks_per_node: int) -> _native.NormalNodeConfig:
    return _native.NormalNodeConfig(config, ranks_per_node)


class CpuNormalKernels:
    """They run in the calling thread and wait there, without the interpreter lock. Kernels take
    addresses and sizes; csrc/bindings_normal.cpp says which.

    Args:
        spin_us: see `NormalBuffer`.
    """

    def __init__(
        self,
        config: _native.NormalConfig,
        group: Group,
        bases: list[int],
        timeout_secs: float,
        spin_us: float | None,
    ) -> None:
        self.spin_us = default_spin_us(group.num_ranks) if spin_us is None else spin_us
        timeout_ns, spin_ns = int(timeout_secs * 1e9), int(self.spin_us * 1e3)
        rank: _native.NormalRank | _native.NormalNodeRank
        if group.network is not None and group.num_nodes > 1:
            rank = _native.NormalNodeRank(
                node_config(config, group.ranks_per_node),
                group.self_rank,
                bases,
                group.network.native,
                timeout_ns=timeout_ns,
                spin_ns=spin_ns,
            )
        else:
            rank = _native.NormalRank(
                config, group.self_rank, bases, timeout_ns=timeout_ns, spin_ns=spin_ns
            )
        self._rank = rank
        self.normal_counts = rank.exchange_counts
        self.normal_dispatch = rank.dispatch
        self.normal_combine = rank.combine

    def statistics(self) -> KernelStatistics:
        return KernelStatistics.of_cpu(NORMAL_KERNEL_NAMES, self._rank.statistics())

    def report(self) -> _native.OpResult:
        return _native.OpResult()
