"""A normal buffer's settings on CUDA: their checks, before the ranks agree on them, and their
kernels."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from ep_backend import _native
from ep_backend.checks import check_int
from ep_backend.group import Group
from ep_backend.kernels import check_current, current_stream
from ep_backend.normal_settings import NormalShape
from ep_backend.settings import EXPERT_IDS, check_choice, check_row_alignment

DEFAULT_NUM_SMS = 16
"""More do not pull faster over NVLink, which is what combine does; nor does a dispatch of bfloat16
rows gain from more. One of float8 does."""


@dataclass(frozen=True)
class CudaNormalSettings(NormalShape):
    """Of a buffer on CUDA; see `NormalBuffer`."""

    expert_ids: str = "local"

    def agreed(self) -> dict[str, Any]:
        """By name, for `Group.agree`."""
        version = _native.NORMAL_DEVICE_PROTOCOL_VERSION
        settings = {"device": "cuda"} | asdict(self)
        return settings | {"network": None, "protocol version": version}

    def check(self, num_ranks: int) -> None:
        """Raises `ValueError` for what no kernel could serve."""
        check_cuda_shape(self, num_ranks)
        check_choice("expert_ids", self.expert_ids, dict.fromkeys(EXPERT_IDS))
        least = self.least_num_bytes(num_ranks)
        self.check_num_bytes(
            least,
            f"With {num_ranks} ranks, one token of each rank at a time, twice, takes {least}. Pass "
            "at least that; batches whose rows all have room are faster.",
        )

    def num_bytes_for(self, num_ranks: int, num_rows: int) -> int:
        """Budget in which a rank has room for so many rows; at least for the fewest."""
        config = self._config(num_ranks, max(num_rows, 2 * num_ranks))
        return _native.NormalDeviceLayout.budget_for(config)

    def least_num_bytes(self, num_ranks: int) -> int:
        """For one token of each rank at a time; of any settings that `num_bytes` may go with."""
        return self.num_bytes_for(num_ranks, 0)

    def config(self, num_ranks: int) -> _native.NormalDeviceConfig:
        """With as many rows as the budget has room for."""
        return self._config(num_ranks, self._num_rows_that_fit(num_ranks, self.num_bytes))

    def _num_rows_that_fit(self, num_ranks: int, num_bytes: int) -> int:
        config = self._config(num_ranks, 0)
        return _native.NormalDeviceLayout.num_rows_that_fit(config, num_bytes)

    def _config(self, num_ranks: int, num_rows: int) -> _native.NormalDeviceConfig:
        return _native.NormalDeviceConfig(
            **self.native_shape(num_ranks),
            num_rows=num_rows,
            global_expert_ids=self.expert_ids == "global",
        )


def check_cuda_shape(shape: NormalShape, num_ranks: int) -> None:
    """Raises `ValueError` for what no kernel on a GPU could serve, whatever the memory."""
    why = "Each is a bit of a word of the kernels."
    check_int("num_ranks", num_ranks, 1, _native.MAX_DEVICE_RANKS, why)
    why = "The CUDA kernels count rows by expert in shared memory."
    check_int("num_experts", shape.num_experts, 1, _native.MAX_DEVICE_EXPERTS, why)
    shape.check_shape(num_ranks)
    check_row_alignment(shape.hidden, (shape.dtype, shape.dispatch_dtype))


def num_available_sms(group: Group, device: torch.device) -> int:
    """SMs that a kernel of one rank may have. Virtual ranks share the GPU, and wait there for each
    other: their blocks must be on it together."""
    num_sms = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, num_sms // group.num_ranks) if group.is_virtual else num_sms


class CudaNormalKernels:
    """They are launched on the calling thread's current stream, but for combine, which is told.
    Kernels take addresses and sizes; csrc/bindings_cuda_normal.cpp says which.

    Args:
        num_max_sms: blocks that a kernel will have at most.
        shares_gpu: all ranks are on the same GPU.
    """

    def __init__(
        self,
        config: _native.NormalDeviceConfig,
        self_rank: int,
        bases: list[int],
        timeout_secs: float,
        num_max_sms: int,
        shares_gpu: bool,
        device: torch.device,
    ) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._rank = _native.CudaNormalRank(
                config,
                self_rank,
                bases,
                timeout_ns=int(timeout_secs * 1e9),
                num_max_sms=num_max_sms,
                shares_gpu=shares_gpu,
            )

    def normal_dispatch(self, *args: Any) -> _native.OpResult:
        return self._rank.dispatch(*args, current_stream(self._device))

    def normal_counts(self, ticket: int) -> _native.OpResult:
        """Waits for the counts of the dispatch with this ticket, without the interpreter lock."""
        return self._rank.wait_for_counts(ticket, current_stream(self._device))

    def normal_unpack(self, *args: int) -> _native.OpResult:
        return self._rank.unpack(*args, current_stream(self._device))

    def normal_combine(self, *args: Any) -> _native.OpResult:
        check_current(self._device)
        return self._rank.combine(*args)

    def counts(self) -> tuple[int, int, bool, list[int]]:
        """What `normal_counts` has waited for: N, I, whether all ranks have room, and rows that
        list each local expert."""
        return self._rank.counts()

    def report(self) -> _native.OpResult:
        return self._rank.report()

    def epochs(self) -> int:
        """Address of how many dispatches, and combines, have been completed."""
        return self._rank.epochs()
