"""A buffer's settings: their checks, before the ranks agree on them, and their native form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from ep_backend import _native
from ep_backend.checks import check_int
from ep_backend.tuning import Shape, Tuned

if TYPE_CHECKING:
    from ep_backend.group import Group
    from ep_backend.network import NetworkConfig

DTYPES = {
    torch.float32: _native.DType.FLOAT32,
    torch.bfloat16: _native.DType.BFLOAT16,
}
TRAVELLING_DTYPES = DTYPES | {torch.float8_e4m3fn: _native.DType.FLOAT8_E4M3}
SCALE_FORMATS = {
    "float32": _native.ScaleFormat.FLOAT32,
    "power_of_two": _native.ScaleFormat.POWER_OF_TWO,
    "ue8m0": _native.ScaleFormat.UE8M0,
}
OUTPUT_LAYOUTS = {
    "expert_major": _native.OutputLayout.EXPERT_MAJOR,
    "rank_major": _native.OutputLayout.RANK_MAJOR,
}
REDUCTIONS = {"rank": _native.Reduction.RANK, "source": _native.Reduction.SOURCE}
TRANSFERS = {
    "push": _native.Transfer.PUSH,
    "pull": _native.Transfer.PULL,
    "pull_push": _native.Transfer.PULL_PUSH,
}

EXPERT_IDS = ("local", "global")
# What the kernels over a network have.
NETWORK_SETTINGS = {"device": "cuda", "num_workspaces": 0}
NETWORK_REMEDY = (
    "Pass the same NetworkConfig on every rank, or set EP_BACKEND_NETWORK to the same on every "
    "host."
)
# What goes with workspaces. (Rank-major, rows are reduced on their rank in any case.)
WORKSPACE_SETTINGS: dict[str, tuple[Any, ...]] = {
    "device": ("cuda",),
    "transfer": ("pull", "pull_push"),
}
EXPERT_WORKSPACE_SETTINGS = WORKSPACE_SETTINGS | {
    "transfer": ("pull",),
    "reduction": ("source",),
    "expert_ids": ("local",),
}
FEW_RANKS = 4
"""Between more GPUs tagged words have not been timed: a token goes to more ranks, 5.3 of 8, and its
words with it."""
TAGGED_BYTES = 2816 << 10
"""Of the messages of a batch between few ranks, up to which tagged words are worth their bytes:
what they save, two fences and a signal's trip, is the same for every batch, what they cost grows
with its bytes. Of 256 tokens (hidden 7168, float8, top-8) they are 2750 KiB: a pair of one kernel
each way takes 39.9 us instead of 50.2 between two H200s over NVLink, 73.6 instead of 83.2 between
four; with hooks 45.9 instead of 48.9, and 85.1 instead of 85.5. In bfloat16 128 tokens are as much:
between four 54.1 instead of 58.5 and, with hooks, 66.0 instead of 62.2."""
MAX_TAGGED_TOKENS = 256
"""By default; larger batches have not been timed."""

MAX_TIMEOUT_SECS = 1e6
MAX_SPIN_US = 1e5

CUDA_ROW_ALIGNMENT = 16
"""Bytes: the CUDA kernels move rows in vectors of this size."""
MAX_TAGGED_ROW_BYTES = 32 << 10


@dataclass(frozen=True)
class BufferSettings:
    """What all ranks must agree on; see `LowLatencyBuffer`."""

    num_max_tokens_per_rank: int
    hidden: int
    num_experts: int
    top_k: int
    dtype: torch.dtype
    dispatch_dtype: torch.dtype
    combine_dtype: torch.dtype
    scale_format: str
    output_layout: str
    reduction: str
    transfer: str
    num_max_tagged_tokens: int | None
    num_workspaces: int
    expert_ids: str
    num_banks: int
    device: str
    """Its type, "cpu" or "cuda"."""
    network: NetworkConfig | None = None
    """None: all ranks see each other's memory."""
    hierarchical: bool = False
    with_hooks: bool = True
    """Operations may be received through hooks: decides what is tagged by default."""
    is_virtual: bool = False
    """The ranks are threads, and on CUDA share a GPU: likewise."""

    def agreed(self) -> dict[str, Any]:
        """By name, for `Group.agree`."""
        settings = asdict(self) | agreed_network(self.network)
        return settings | {
            "protocol version": _native.PROTOCOL_VERSION,
            "protocol version between nodes": _native.MULTI_NODE_PROTOCOL_VERSION,
        }

    def remedies(self) -> dict[str, str]:
        """For `Group.agree`, where a setting of the network differs."""
        return dict.fromkeys(agreed_network(self.network), NETWORK_REMEDY)

    def tuning_shape(self, num_ranks: int) -> Shape:
        """By which the tuning table knows such a buffer."""
        return Shape(
            kernels="low_latency",
            num_ranks=num_ranks,
            hidden=self.hidden,
            num_experts=self.num_experts,
            top_k=self.top_k,
            dtype=dtype_name(self.dtype),
            dispatch_dtype=dtype_name(self.dispatch_dtype),
            combine_dtype=dtype_name(self.combine_dtype),
            output_layout=self.output_layout,
            reduction=self.reduction,
            has_workspaces=self.num_workspaces > 0,
        )

    def environment(self) -> dict[str, str]:
        """NVSHMEM's variables, by name."""
        assert self.network is not None
        return self.network.environment("low_latency", self.num_max_tokens_per_rank, self.num_banks)

    def tuned(self, tuned: Tuned, given: Mapping[str, Any]) -> BufferSettings:
        """With what the table says in place of what the caller has not given; over a network there
        is no choice."""
        if self.network is not None:
            return self
        changes: dict[str, Any] = {
            name: tuned.settings[name]
            for name in ("transfer", "num_max_tagged_tokens")
            if name in tuned.settings and given[name] is None
        }
        if "num_max_tagged_tokens" in changes:
            num_tagged = changes["num_max_tagged_tokens"]
            changes["num_max_tagged_tokens"] = min(num_tagged, self.num_max_tokens_per_rank)
        return replace(self, **changes)

    def check(self, num_ranks: int) -> None:
        """Raises `ValueError` for what no kernel could serve."""
        check_int("num_ranks", num_ranks, 1, _native.MAX_RANKS)
        check_int("num_experts", self.num_experts, 1, _native.MAX_EXPERTS)
        check_int(
            "num_max_tokens_per_rank",
            self.num_max_tokens_per_rank,
            1,
            _native.MAX_TOKENS_PER_RANK,
            "A signal counts messages in 15 bits.",
        )
        check_int("hidden", self.hidden, 1, 1 << 20)
        check_int("top_k", self.top_k, 1, _native.MAX_TOP_K)
        check_int("num_banks", self.num_banks, 2, _native.MAX_BANKS)
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("output_layout", self.output_layout, OUTPUT_LAYOUTS)
        check_choice("reduction", self.reduction, REDUCTIONS)
        check_choice("transfer", self.transfer, TRANSFERS)
        check_dispatch_dtype(self.dtype, self.dispatch_dtype, self.scale_format)
        self._check_combine_dtype()
        if self.num_max_tagged_tokens is not None:
            check_int(
                "num_max_tagged_tokens",
                self.num_max_tagged_tokens,
                0,
                self.num_max_tokens_per_rank,
                "No batch is larger than num_max_tokens_per_rank.",
            )
        self._check_reduction()
        self._check_workspaces()
        self._check_network()
        if self.device == "cuda" and _native.has_cuda:
            self._check_cuda()

    def _check_combine_dtype(self) -> None:
        if self.combine_dtype not in (self.dtype, torch.float8_e4m3fn):
            raise ValueError(
                f"combine_dtype is {self.combine_dtype}, expected {self.dtype}, which is the "
                "dtype, or torch.float8_e4m3fn."
            )

    def _check_reduction(self) -> None:
        if self.reduction == "source" and self.output_layout != "expert_major":
            raise ValueError(
                f"reduction is 'source', but output_layout is {self.output_layout!r}, in which the "
                "caller weights and sums the rows of a rank's experts itself: there are no rows of "
                "single experts to send home. Pass output_layout='expert_major', or leave "
                "reduction out."
            )

    def check_nodes(self, num_nodes: int) -> None:
        """Raises `ValueError` for what cannot be done where ranks are on so many nodes."""
        if num_nodes > 1 and self.device == "cuda":
            raise ValueError(
                f"device is 'cuda', but the virtual ranks are on {num_nodes} nodes, whose network "
                "is a CPU's. Pass device='cpu', or leave ranks_per_node out."
            )
        if not self.hierarchical:
            return
        if self.network is not None and self.network.links == "rdma":
            raise ValueError(
                "hierarchical is True and the network's links are 'rdma', but ranks of a node "
                "forward to each other's memory. Pass links='auto', and ranks_per_node where ranks "
                "of one host are to be on several nodes."
            )
        if self.reduction == "source":
            raise ValueError(
                "hierarchical is True and reduction 'source', but rows of a node are added up "
                "before they go home, and at home nobody could weight them. Pass reduction='rank'."
            )

    def _check_workspaces(self) -> None:
        check_int("num_workspaces", self.num_workspaces, 0, _native.MAX_BANKS)
        check_choice("expert_ids", self.expert_ids, dict.fromkeys(EXPERT_IDS))
        if self.num_workspaces == 0:
            if self.expert_ids != "local":
                raise ValueError(
                    f"expert_ids is {self.expert_ids!r}, which only workspaces have. Pass "
                    "num_workspaces, or leave it out."
                )
            return
        if self.combine_dtype != self.dtype:
            raise ValueError(
                f"num_workspaces is {self.num_workspaces} and combine_dtype {self.combine_dtype}, "
                f"but from workspaces rows are read as the experts wrote them, in {self.dtype}: "
                "nobody quantises them. Leave one of the two out."
            )
        is_by_expert = self.output_layout == "expert_major"
        settings = EXPERT_WORKSPACE_SETTINGS if is_by_expert else WORKSPACE_SETTINGS
        for name, allowed in settings.items():
            value = getattr(self, name)
            if value not in allowed:
                needed = " or ".join(repr(a) for a in allowed if a is not None)
                raise ValueError(
                    f"num_workspaces is {self.num_workspaces}, output_layout "
                    f"{self.output_layout!r} and {name} {value!r}, but in such workspaces it is "
                    f"{needed}. Pass that, or leave num_workspaces out."
                )

    def _check_network(self) -> None:
        if self.network is None:
            return
        for name, needed in NETWORK_SETTINGS.items():
            value = getattr(self, name)
            if value != needed:
                raise ValueError(
                    f"{name} is {value!r}, but over a network it is {needed!r}: the kernels that "
                    "put through NVSHMEM have nothing else yet. Pass that, or keep the group on "
                    "one host and leave network out."
                )
        if self.num_max_tagged_tokens:
            raise ValueError(
                f"num_max_tagged_tokens is {self.num_max_tagged_tokens}, but nothing is tagged "
                "over a network, whose cards may write less than a word at once. Leave it out, or "
                "pass 0."
            )

    def _check_cuda(self) -> None:
        why = "The CUDA kernels count rows by expert in shared memory."
        check_int("num_experts", self.num_experts, 1, _native.CUDA_MAX_EXPERTS, why)
        check_row_alignment(self.hidden, (self.dtype, self.dispatch_dtype, self.combine_dtype))

    def config(self, num_ranks: int) -> _native.LowLatencyConfig:
        """Of checked settings, hierarchical only if there are several nodes. The CPU's kernels, and
        those over a network, always push, and know no tagged words."""
        has_choice = self.device == "cuda" and self.network is None
        return _native.LowLatencyConfig(
            num_ranks=num_ranks,
            num_experts=self.num_experts,
            num_max_tokens_per_rank=self.num_max_tokens_per_rank,
            hidden=self.hidden,
            top_k=self.top_k,
            num_banks=self.num_banks,
            dtype=DTYPES[self.dtype],
            dispatch_dtype=TRAVELLING_DTYPES[self.dispatch_dtype],
            combine_dtype=TRAVELLING_DTYPES[self.combine_dtype],
            scale_format=SCALE_FORMATS[self.scale_format],
            transfer=TRANSFERS[self.transfer] if has_choice else _native.Transfer.PUSH,
            num_max_tagged_tokens=self._num_tagged_tokens(num_ranks) if has_choice else 0,
            num_workspaces=self.num_workspaces,
            global_expert_ids=self.expert_ids == "global",
            reduction=REDUCTIONS[self.reduction],
            packs_messages=self.network is not None and not self.hierarchical,
        )

    def multi_node_config(self, num_ranks: int, ranks_per_node: int) -> _native.MultiNodeConfig:
        """Where ranks are on several nodes; of checked settings."""
        return _native.MultiNodeConfig(
            self.config(num_ranks),
            ranks_per_node=ranks_per_node,
            is_hierarchical=self.hierarchical and ranks_per_node < num_ranks,
        )

    def ranks_per_node(self, group: Group) -> int:
        """As many as there are ranks where nodes make no difference. Collective, on GPUs. Raises
        `ValueError` for hosts that are no nodes."""
        network = self.network
        if network is None:
            return group.ranks_per_node
        if self.hierarchical or (network.ranks_per_node is not None and network.links == "auto"):
            return network.node_size(group.hosts())
        return group.num_ranks

    def num_symmetric_bytes(
        self, layout: _native.LowLatencyLayout, multi_node: _native.MultiNodeConfig | None
    ) -> int:
        """Of the memory of a rank.

        Args:
            layout: of `config()`.
            multi_node: where the kernels are those of several nodes.
        """
        if multi_node is None:
            if self.network is None:
                return layout.num_bytes
            return _native.NetworkLayout(layout).num_bytes
        nodes = _native.MultiNodeLayout(multi_node)
        return (
            nodes.num_bytes if self.network is None else _native.NodeNetworkLayout(nodes).num_bytes
        )

    def _num_tagged_tokens(self, num_ranks: int) -> int:
        if self.num_workspaces > 0 and num_ranks == 1:
            return 0
        if self.num_max_tagged_tokens is not None:
            return self.num_max_tagged_tokens
        if self.hidden * self.dtype.itemsize > MAX_TAGGED_ROW_BYTES:
            return 0
        most = default_tagged_tokens(
            self.hidden * self.dispatch_dtype.itemsize,
            self.top_k,
            num_ranks,
            workspaces_of=self.output_layout if self.num_workspaces > 0 else None,
            with_hooks=self.with_hooks,
            is_virtual=self.is_virtual,
        )
        return min(self.num_max_tokens_per_rank, most)


def default_transfer(num_ranks: int, *, has_expert_workspaces: bool, is_virtual: bool) -> str:
    """Between GPUs combine's rows are pushed: requests would be in the way of others' rows. A pair
    of 64 and 128 tokens a rank (hidden 7168, float8, top-8, untagged) between four H200s over
    NVLink takes 34.9 and 53.1 us all pulled, 29.9 and 46.7 all pushed, 4.2 and 5.3 us of that in
    combine; between two 22.9 and 30.6 pulled, 22.1 and 30.0 with combine's alone pushed. Not
    timed between more. Dispatches, which gain less, would need memory for every rank's rows;
    combine does either way."""
    return "pull_push" if num_ranks > 1 and not (has_expert_workspaces or is_virtual) else "pull"


def default_tagged_tokens(
    row_bytes: int,
    top_k: int,
    num_ranks: int,
    *,
    workspaces_of: str | None,
    with_hooks: bool,
    is_virtual: bool = False,
) -> int:
    """Batches up to which tagged words are worth their bytes, half as many again as those of the
    rows. With more than a few ranks and not in workspaces, memory sets the limit.

    Args:
        row_bytes: of a dispatch's row.
        workspaces_of: the output layout, where exchanges are in workspaces.
    """
    if workspaces_of is not None and is_virtual:
        num_bytes = tagged_bytes_of_virtual_ranks(num_ranks, workspaces_of, with_hooks)
        if num_bytes == 0:
            return 0
    elif workspaces_of == "rank_major":
        num_bytes = tagged_bytes_in_rank_major_workspaces(num_ranks, with_hooks)
    elif num_ranks > FEW_RANKS:
        return max(1, MAX_TAGGED_TOKENS // num_ranks)
    else:
        num_bytes = TAGGED_BYTES
    message_bytes = _native.tagged_header_bytes(top_k) + _native.tagged_row_bytes(row_bytes)
    return min(MAX_TAGGED_TOKENS, max(1, num_bytes // message_bytes))


def tagged_bytes_in_rank_major_workspaces(num_ranks: int, with_hooks: bool) -> int:
    """`TAGGED_BYTES` where tagged rows are copied once more than others. Between two GPUs 64 and
    128 float8 tokens take 12.8 and 18.1 us instead of 14.1 and 18.8 in one kernel each way, 16.9
    and 21.0 instead of 15.4 and 20.1 with hooks; between four 22.0 and 36.4 instead of 24.0 and
    37.4, 25.2 and 41.0 instead of 26.3 and 40.9. In bfloat16 32 and 64 tokens take between four
    17.7 and 27.4 instead of 18.0 and 27.0, 20.6 and 31.7 instead of 19.5 and 29.9. (Between more
    nobody has timed it.)"""
    if num_ranks > FEW_RANKS:
        return 200 << 10
    if num_ranks > 2:
        return (704 if with_hooks else 1408) << 10
    return (352 if with_hooks else 2816) << 10


def tagged_bytes_of_virtual_ranks(num_ranks: int, workspaces_of: str, with_hooks: bool) -> int:
    """`TAGGED_BYTES` in workspaces of ranks that share a GPU. Between eight on one H200 1, 4 and 6
    tokens (hidden 7168, float8, top-8) take by expert 11.4, 12.5 and 15.0 us instead of 13.9, 13.6
    and 14.4, rank-major 9.0, 10.4 and 11.4 instead of 10.2, 10.6 and 11.1; between four 8 and 16
    tokens 11.1 and 13.5 instead of 12.2 and 13.5, and 9.4 and 10.8 instead of 9.7 and 10.4. With
    hooks between eight 1, 2 and 4 tokens take 13.8, 14.7 and 14.8 instead of 14.6, 14.9 and 14.8,
    and 12.1, 12.5 and 13.4 instead of 11.5, 11.9 and 11.8."""
    if with_hooks:
        return 0 if workspaces_of == "rank_major" else 32 << 10
    return (144 if num_ranks <= FEW_RANKS else 64) << 10


def agreed_network(network: NetworkConfig | None) -> dict[str, Any]:
    """For `Group.agree`, field by field, so that what differs is named."""
    if network is None:
        return {"network": None}
    return {"network": "given"} | {f"network.{n}": v for n, v in asdict(network).items()}


def dtype_name(dtype: Any) -> str:
    """Of a dtype as of anything else, which `check_choice` refuses later."""
    return str(dtype).removeprefix("torch.")


def check_choice(name: str, value: Any, choices: dict[Any, Any]) -> None:
    if value not in choices:
        got = repr(value) if isinstance(value, str) else value
        allowed = " or ".join(repr(c) if isinstance(c, str) else str(c) for c in choices)
        raise ValueError(f"{name} is {got}, expected {allowed}.")


def check_row_alignment(hidden: int, dtypes: tuple[torch.dtype, ...]) -> None:
    """Raises `ValueError` for rows that the CUDA kernels cannot move."""
    for dtype in dtypes:
        row_bytes = hidden * dtype.itemsize
        if row_bytes % CUDA_ROW_ALIGNMENT != 0:
            raise ValueError(
                f"hidden is {hidden}, so rows of {dtype} have {row_bytes} bytes; on CUDA that must "
                f"be a multiple of {CUDA_ROW_ALIGNMENT}. Pass a multiple of "
                f"{CUDA_ROW_ALIGNMENT // dtype.itemsize}, with zeros behind the row."
            )


def check_dispatch_dtype(
    dtype: torch.dtype, dispatch_dtype: torch.dtype, scale_format: str
) -> None:
    """Raises `ValueError` for rows that cannot travel so."""
    check_choice("scale_format", scale_format, SCALE_FORMATS)
    if dispatch_dtype not in (dtype, torch.float8_e4m3fn):
        raise ValueError(
            f"dispatch_dtype is {dispatch_dtype}, expected {dtype}, which is the dtype, or "
            "torch.float8_e4m3fn."
        )
    if dispatch_dtype == dtype and scale_format != "float32":
        raise ValueError(
            f"scale_format is {scale_format!r}, but rows of {dtype} have no scales. Leave it out, "
            "or pass dispatch_dtype=torch.float8_e4m3fn."
        )


def device_type(device: str | torch.device) -> str:
    """Of a device that torch does not know, its name: `check_settings` refuses it, in company."""
    try:
        return torch.device(device).type
    except RuntimeError:
        return str(device)


def usable_device(device: str | torch.device) -> torch.device:
    """The device, with its index. Raises `ValueError` where no kernels can run on it."""
    kind = device_type(device)
    if kind == "cpu":
        return torch.device("cpu")
    if kind != "cuda":
        raise ValueError(f"device is {str(device)!r}, expected 'cpu' or a CUDA device.")
    if not _native.has_cuda:
        raise ValueError(
            f"device is {str(device)!r}, but this build is CPU-only. Build it where nvcc is, with "
            "EP_BACKEND_CUDA=ON."
        )
    if not torch.cuda.is_available():
        raise ValueError(f"device is {str(device)!r}, but torch sees no CUDA device.")
    index = torch.device(device).index
    return torch.device("cuda", torch.cuda.current_device() if index is None else index)


def check_num_sms(num_sms: int | None, device: torch.device) -> None:
    if num_sms is not None and device.type == "cuda":
        num_present = torch.cuda.get_device_properties(device).multi_processor_count
        check_int("num_sms", num_sms, 1, num_present, f"{device} has so many.")


def check_waits(timeout_secs: float, spin_us: float | None) -> None:
    if not isinstance(timeout_secs, (int, float)) or not 0 < timeout_secs <= MAX_TIMEOUT_SECS:
        raise ValueError(
            f"timeout_secs is {timeout_secs!r}, expected more than 0, at most "
            f"{MAX_TIMEOUT_SECS:.0f}."
        )
    if spin_us is None:
        return
    if not isinstance(spin_us, (int, float)) or not 0 <= spin_us <= MAX_SPIN_US:
        raise ValueError(
            f"spin_us is {spin_us!r}, expected 0 to {MAX_SPIN_US:.0f}: who spins hears no Ctrl-C."
        )
