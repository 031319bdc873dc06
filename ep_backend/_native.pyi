"""Types of the native module (csrc/bindings*.cpp)."""

import enum
from typing import Any, TypedDict

PROTOCOL_VERSION: int
MAX_RANKS: int
MAX_EXPERTS: int
MAX_TOKENS_PER_RANK: int
MAX_TOP_K: int
MAX_BANKS: int
TAGGED_BIT: int
has_cuda: bool

class Phase(enum.Enum):
    DISPATCH = 0
    COMBINE = 1

class Half(enum.Enum):
    SEND = 0
    RECV = 1

class DType(enum.Enum):
    FLOAT32 = 0
    BFLOAT16 = 1
    FLOAT8_E4M3 = 2

class ScaleFormat(enum.Enum):
    FLOAT32 = 0
    POWER_OF_TWO = 1
    UE8M0 = 2

class Transfer(enum.Enum):
    PUSH = 0
    PULL = 1
    PULL_PUSH = 2

class Reduction(enum.Enum):
    RANK = 0
    SOURCE = 1

class OutputLayout(enum.Enum):
    EXPERT_MAJOR = 0
    RANK_MAJOR = 1

class Status(enum.Enum):
    OK = 0
    TIMEOUT = 1
    BUFFER_FAILED = 2
    OUT_OF_ORDER = 3
    NEWER_EPOCH = 4
    CORRUPT = 5
    BAD_EXPERT = 6
    TOO_MANY_ROWS = 8
    NOT_ARRIVED = 9

class LowLatencyConfig:
    num_ranks: int
    num_experts: int
    num_max_tokens_per_rank: int
    hidden: int
    top_k: int
    num_banks: int
    dtype: DType
    dispatch_dtype: DType
    scale_format: ScaleFormat
    transfer: Transfer
    num_max_tagged_tokens: int
    num_workspaces: int
    global_expert_ids: bool
    reduction: Reduction
    combine_dtype: DType
    packs_messages: bool
    def __init__(
        self,
        *,
        num_ranks: int,
        num_experts: int,
        num_max_tokens_per_rank: int,
        hidden: int,
        top_k: int,
        num_banks: int,
        dtype: DType,
        dispatch_dtype: DType,
        scale_format: ScaleFormat,
        transfer: Transfer,
        num_max_tagged_tokens: int,
        num_workspaces: int = 0,
        reduction: Reduction = ...,
        global_expert_ids: bool = False,
        combine_dtype: DType | None = None,
        packs_messages: bool = False,
    ) -> None: ...

class ExpertPartition:
    def __init__(self, num_experts: int, num_ranks: int) -> None: ...
    def num_local_experts(self, rank: int) -> int: ...
    def num_max_local_experts(self) -> int: ...
    def first_expert(self, rank: int) -> int: ...
    def owner(self, expert: int) -> int: ...

class LowLatencyLayout:
    partition: ExpertPartition
    row_bytes: int
    dispatch_row_bytes: int
    num_scales: int
    combine_row_bytes: int
    num_combine_scales: int
    combine_scales_in_row: int
    tagged_row_in_message: int
    tagged_message_bytes: int
    num_bytes: int
    num_outcome_columns: int
    num_outcome_slots: int
    num_answer_words: int
    expert_capacity: int
    signals_offset: int
    credits_offset: int
    workspace_credits_offset: int
    workspace_arrivals_offset: int
    sleepers_offset: int
    counts_offset: int
    headers_offset: int
    inbox_offset: int
    scales_offset: int
    outcome_offset: int
    tagged_inbox_offset: int
    tagged_outcome_offset: int
    workspaces_offset: int
    def __init__(self, config: LowLatencyConfig) -> None: ...
    def signal(self, bank: int, phase: Phase, src_rank: int) -> int: ...
    def credit(self, phase: Phase, peer_rank: int) -> int: ...
    def signal_sleepers(self, phase: Phase, src_rank: int) -> int: ...
    def credit_sleepers(self, phase: Phase, peer_rank: int) -> int: ...
    def counts(self, bank: int, src_rank: int) -> int: ...
    def all_counts(self, bank: int, src_rank: int) -> int: ...
    def header(self, bank: int, src_rank: int, slot: int) -> int: ...
    def inbox_row(self, bank: int, src_rank: int, slot: int) -> int: ...
    def inbox_scales(self, bank: int, src_rank: int, slot: int) -> int: ...
    def staged_row(self, bank: int, token: int) -> int: ...
    def staged_scales(self, bank: int, token: int) -> int: ...
    def outcome(self, bank: int, outcome_slot: int) -> int: ...
    def outbox(self, bank: int, src_rank: int, slot: int) -> int: ...
    def tagged_message(self, bank: int, src_rank: int, slot: int) -> int: ...
    tagged_outcome_stride: int
    def tagged_outcome(self, bank: int, outcome_slot: int) -> int: ...
    def answering_row(self, bank: int, rank: int, slot: int) -> int: ...
    def workspace_credit(self, workspace: int, peer_rank: int) -> int: ...
    def workspace_arrivals(self, src_rank: int) -> int: ...
    def workspace_row(self, workspace: int, row: int) -> int: ...
    def workspace_scales(self, workspace: int, message: int) -> int: ...
    def workspace_topk_idx(self, workspace: int, message: int) -> int: ...
    def workspace_topk_weights(self, workspace: int, message: int) -> int: ...
    def combine_input(self, workspace: int, row: int) -> int: ...

class NetworkLayout:
    message_bytes: int
    num_bytes: int
    arrivals_offset: int
    counts_offset: int
    messages_offset: int
    outcomes_offset: int
    def __init__(self, layout: LowLatencyLayout) -> None: ...
    def arrivals(self, bank: int, phase: Phase, src_rank: int) -> int: ...
    def staged_counts(self, bank: int, dst_rank: int) -> int: ...
    def staged_message(self, bank: int, dst_rank: int, slot: int) -> int: ...
    def staged_outcome(self, bank: int, dst_rank: int, slot: int, entry: int) -> int: ...
    def outcome_bytes(self, num_rows: int) -> int: ...

def pack_signal(epoch: int, count: int) -> int: ...
def signal_epoch(signal: int) -> int: ...
def signal_count(signal: int) -> int: ...
def signal_is_tagged(signal: int) -> bool: ...
def bank_of(epoch: int, num_banks: int) -> int: ...
def credit_admits(credit: int, epoch: int, num_banks: int) -> bool: ...
def may_send(num_sent: int, num_hooked: int, num_banks: int) -> bool: ...
def may_hook(num_sent: int, num_hooked: int) -> bool: ...
def to_e4m3(value: float) -> int: ...
def from_e4m3(value: int) -> float: ...
def scale_for(amax: float, format: ScaleFormat) -> tuple[float, float]: ...
def tagged_header_bytes(top_k: int) -> int: ...
def tagged_row_bytes(row_bytes: int) -> int: ...
def filling(word: int) -> int: ...
def filled(word: int) -> int: ...

class FlightRecord:
    self_rank: int
    peer_rank: int
    phase: Phase
    half: Half
    epoch: int
    expected: int
    seen: int
    waited_ns: int

class OpResult:
    ok: bool
    def __init__(self) -> None: ...
    status: Status
    record: FlightRecord
    token: int
    k: int
    expert: int
    wait_ns: int

BUCKET_LIMITS_NS: tuple[int, ...]

def bucket_of(ns: int) -> int: ...
def counting_ns(num_ranks: int, num_local_experts: int, num_ops: int) -> float: ...

class RankStatistics(TypedDict):
    ops: list[dict[str, Any]]  # by kind, as OpCounters
    wait_ns: list[list[int]]  # [kind][R]
    sent_bytes: list[list[int]]  # [kind][R]
    num_expert_rows: list[int]  # [L]

class LowLatencyRank:
    def __init__(
        self,
        config: LowLatencyConfig,
        self_rank: int,
        bases: list[int],
        *,
        timeout_ns: int,
        spin_ns: int,
    ) -> None: ...
    def dispatch_send(
        self,
        x: int,
        x_is_quantized: bool,
        x_scales: int,
        topk_idx: int,
        topk_idx_is_int64: bool,
        topk_weights: int,
        num_tokens: int,
        num_partials: int,
        answers: int,
        workspace: int,
        num_slots: int,
    ) -> OpResult: ...
    def dispatch_recv(
        self,
        output: OutputLayout,
        recv_x: int,
        recv_scales: int,
        num_recv_tokens_per_expert: int,
        recv_topk_idx: int,
        recv_topk_weights: int,
        num_messages: int,
        messages: int,
        entries: int,
        workspace: int,
        num_slots: int,
    ) -> OpResult: ...
    def combine_send(
        self,
        expert_out: int,
        num_messages: int,
        messages: int,
        entries: int,
        workspace: int,
    ) -> OpResult: ...
    def combine_recv(
        self,
        out: int,
        num_tokens: int,
        num_partials: int,
        answers: int,
        topk_weights: int,
        workspace: int,
        num_slots: int,
    ) -> OpResult: ...
    def epoch(self, phase: Phase, half: Half) -> int: ...
    def statistics(self) -> RankStatistics: ...

MULTI_NODE_PROTOCOL_VERSION: int

class Nodes:
    num_nodes: int
    def __init__(self, num_ranks: int, ranks_per_node: int) -> None: ...
    def node_of(self, rank: int) -> int: ...
    def rank_in_node(self, rank: int) -> int: ...
    def rank_at(self, node: int, rank_in_node: int) -> int: ...
    def share_node(self, a: int, b: int) -> bool: ...
    def forwarder(self, node: int, rank: int) -> int: ...
    def remote_idx(self, self_node: int, node: int) -> int: ...
    def remote_node(self, self_node: int, idx: int) -> int: ...

class MultiNodeConfig:
    low_latency: LowLatencyConfig
    ranks_per_node: int
    is_hierarchical: bool
    def __init__(
        self, low_latency: LowLatencyConfig, *, ranks_per_node: int, is_hierarchical: bool
    ) -> None: ...

class MultiNodeLayout:
    base: LowLatencyLayout
    num_bytes: int
    header_bytes: int
    scales_bytes: int
    node_message_bytes: int
    combine_bytes: int
    num_columns: int
    node_signals_offset: int
    node_sleepers_offset: int
    node_inbox_offset: int
    node_outbox_offset: int
    node_partials_offset: int
    node_sums_offset: int
    staged_headers_offset: int
    staged_rows_offset: int
    staged_scales_offset: int
    staged_counts_offset: int
    row_outbox_offset: int
    def __init__(self, config: MultiNodeConfig) -> None: ...
    def node_signal(self, bank: int, remote: int) -> int: ...
    def node_signal_sleepers(self, remote: int) -> int: ...
    def node_inbox(self, bank: int, remote: int, slot: int) -> int: ...
    def node_outbox(self, bank: int, remote: int, slot: int) -> int: ...
    def node_partial(self, bank: int, remote: int, partial_slot: int) -> int: ...
    def node_sum(self, bank: int, remote: int, slot: int) -> int: ...
    def remote_rank(self, self_rank: int, peer_rank: int) -> int: ...
    def staged_header(self, bank: int, remote_rank: int, slot: int) -> int: ...
    def staged_row(self, bank: int, token: int) -> int: ...
    def staged_scales(self, bank: int, token: int) -> int: ...
    def staged_counts(self, bank: int, remote_rank: int) -> int: ...
    def row_outbox(self, bank: int, remote_rank: int, i: int) -> int: ...

class NodeNetworkLayout:
    num_bytes: int
    arrivals_offset: int
    def __init__(self, layout: MultiNodeLayout) -> None: ...
    def arrivals(self, bank: int, phase: Phase, remote: int) -> int: ...

class LinkCounters:
    num_puts: int
    put_bytes: int
    num_signals: int

class Network:
    def __init__(
        self, *, num_ranks: int, ranks_per_node: int, seed: int, max_delay_us: int
    ) -> None: ...
    def counters(self, src_rank: int, dst_rank: int) -> LinkCounters: ...
    def flush(self, src_rank: int) -> None: ...

class MultiNodeRank:
    def __init__(
        self,
        config: MultiNodeConfig,
        self_rank: int,
        bases: list[int],
        network: Network,
        *,
        timeout_ns: int,
        spin_ns: int,
    ) -> None: ...
    # As LowLatencyRank's; dispatch_recv and combine_send take two addresses more.
    def dispatch_send(self, *args: int) -> OpResult: ...
    def dispatch_recv(self, *args: OutputLayout | int) -> OpResult: ...
    def combine_send(self, *args: int) -> OpResult: ...
    def combine_recv(self, *args: int) -> OpResult: ...
    def epoch(self, phase: Phase, half: Half) -> int: ...
    def statistics(self) -> RankStatistics: ...

NORMAL_PROTOCOL_VERSION: int
NUM_ROUND_BANKS: int

class NormalConfig:
    num_tokens_per_round: int
    def __init__(
        self,
        *,
        num_ranks: int,
        num_experts: int,
        hidden: int,
        top_k: int,
        dtype: DType,
        dispatch_dtype: DType,
        scale_format: ScaleFormat,
        num_tokens_per_round: int,
    ) -> None: ...

class NormalLayout:
    partition: ExpertPartition
    row_bytes: int
    num_scales: int
    num_scale_words: int
    num_bytes: int
    num_max_messages_per_token: int
    def __init__(self, config: NormalConfig) -> None: ...
    @staticmethod
    def num_tokens_that_fit(config: NormalConfig, num_bytes: int) -> int: ...
    def num_rounds(self, num_tokens: int) -> int: ...
    def signal(self, bank: int, phase: Phase, src_rank: int) -> int: ...
    def credit(self, phase: Phase, peer_rank: int) -> int: ...
    def signal_sleepers(self, phase: Phase, src_rank: int) -> int: ...
    def credit_sleepers(self, phase: Phase, peer_rank: int) -> int: ...
    def counts(self, src_rank: int) -> int: ...
    def expert_counts(self, src_rank: int) -> int: ...
    def message(self, bank: int, src_rank: int, slot: int) -> int: ...
    def weights(self, bank: int, src_rank: int, slot: int) -> int: ...
    def token(self, bank: int, src_rank: int, slot: int) -> int: ...
    def row(self, bank: int, src_rank: int, slot: int) -> int: ...
    def scales(self, bank: int, src_rank: int, slot: int) -> int: ...

NORMAL_DEVICE_PROTOCOL_VERSION: int
MAX_DEVICE_RANKS: int
MAX_DEVICE_EXPERTS: int

class NormalDeviceConfig:
    num_rows: int
    def __init__(
        self,
        *,
        num_ranks: int,
        num_experts: int,
        hidden: int,
        top_k: int,
        dtype: DType,
        dispatch_dtype: DType,
        scale_format: ScaleFormat,
        num_rows: int,
        global_expert_ids: bool = False,
    ) -> None: ...

class NormalDeviceLayout:
    partition: ExpertPartition
    num_bytes: int
    num_scales: int
    num_scale_words: int
    num_tokens_per_round: int
    num_max_messages_per_token: int
    def __init__(self, config: NormalDeviceConfig) -> None: ...
    @staticmethod
    def num_rows_that_fit(config: NormalDeviceConfig, num_bytes: int) -> int: ...
    @staticmethod
    def budget_for(config: NormalDeviceConfig) -> int: ...
    def ready(self, phase: Phase, peer_rank: int) -> int: ...
    def done(self, src_rank: int) -> int: ...
    def credit(self, peer_rank: int) -> int: ...
    def round_signal(self, phase: Phase, bank: int, peer_rank: int) -> int: ...
    def round_credit(self, phase: Phase, peer_rank: int) -> int: ...
    def counts(self, src_rank: int) -> int: ...
    def rank_counts(self, src_rank: int) -> int: ...
    def expert_counts(self, src_rank: int) -> int: ...
    def row(self, row: int) -> int: ...
    def scales(self, row: int) -> int: ...
    def topk_idx(self, row: int) -> int: ...
    def topk_weights(self, row: int) -> int: ...
    def src_token(self, row: int) -> int: ...
    def combine_row(self, row: int) -> int: ...
    def combine_weights(self, row: int) -> int: ...
    def staged_row(self, bank: int, peer_rank: int, slot: int) -> int: ...

NORMAL_NODE_PROTOCOL_VERSION: int

class NormalNodeConfig:
    def __init__(self, normal: NormalConfig, ranks_per_node: int) -> None: ...

class NormalNodeLayout:
    base: NormalLayout
    num_bytes: int
    num_columns: int
    counts_stride: int
    route_bytes: int
    dispatch_bytes: int
    weights_in_message: int
    row_in_message: int
    node_signals_offset: int
    node_sleepers_offset: int
    node_counts_offset: int
    staged_counts_offset: int
    node_routes_offset: int
    staged_routes_offset: int
    node_inbox_offset: int
    node_outbox_offset: int
    def __init__(self, config: NormalNodeConfig) -> None: ...
    @staticmethod
    def num_tokens_that_fit(config: NormalNodeConfig, num_bytes: int) -> int: ...
    def node_signal(self, bank: int, phase: Phase, remote: int) -> int: ...
    def node_signal_sleepers(self, phase: Phase, remote: int) -> int: ...
    def node_counts(self, remote: int, rank_in_node: int) -> int: ...
    def staged_counts(self, remote: int, rank_in_node: int) -> int: ...
    def node_route(self, bank: int, remote: int, slot: int) -> int: ...
    def staged_route(self, bank: int, remote: int, slot: int) -> int: ...
    def node_inbox(self, bank: int, remote: int, slot: int) -> int: ...
    def node_outbox(self, bank: int, remote: int, slot: int) -> int: ...

NORMAL_NETWORK_PROTOCOL_VERSION: int

class Arrival(enum.Enum):
    DISPATCH = 0
    ROUTES = 1
    SUMS = 2

class NormalNetworkLayout:
    nodes: NormalNodeLayout
    num_bytes: int
    arrivals_offset: int
    def __init__(self, config: NormalNodeConfig) -> None: ...
    @staticmethod
    def num_tokens_that_fit(config: NormalNodeConfig, num_bytes: int) -> int: ...
    def arrivals(self, bank: int, kind: Arrival, remote: int) -> int: ...

class NormalRank:
    def __init__(
        self,
        config: NormalConfig,
        self_rank: int,
        bases: list[int],
        *,
        timeout_ns: int,
        spin_ns: int,
    ) -> None: ...
    def exchange_counts(
        self,
        topk_idx: int,
        topk_idx_is_int64: bool,
        num_tokens: int,
        num_messages: int,
        messages: int,
        num_rounds: int,
        num_rows: int,
        num_recv_tokens_per_expert: int,
    ) -> OpResult: ...
    def dispatch(
        self,
        x: int,
        x_is_quantized: bool,
        x_scales: int,
        is_cached: bool,
        topk_idx: int,
        topk_idx_is_int64: bool,
        topk_weights: int,
        num_tokens: int,
        num_messages: int,
        messages: int,
        num_rounds: int,
        num_rows: int,
        per_round: int,
        recv_x: int,
        recv_scales: int,
        recv_topk_idx: int,
        recv_topk_weights: int,
        recv_src_tokens: int,
    ) -> OpResult: ...
    def combine(
        self,
        x: int,
        has_topk_weights: bool,
        topk_weights: int,
        bias_0: int,
        bias_1: int,
        num_tokens: int,
        num_messages: int,
        messages: int,
        num_rounds: int,
        num_rows: int,
        per_round: int,
        out: int,
        combined_topk_weights: int,
    ) -> OpResult: ...
    def epoch(self, phase: Phase) -> int: ...
    def statistics(self) -> RankStatistics: ...

# Only where has_cuda is true.

class NormalNodeRank:
    def __init__(
        self,
        config: NormalNodeConfig,
        self_rank: int,
        bases: list[int],
        network: Network,
        *,
        timeout_ns: int,
        spin_ns: int,
    ) -> None: ...
    # As NormalRank's.
    def exchange_counts(self, *args: int) -> OpResult: ...
    def dispatch(self, *args: int) -> OpResult: ...
    def combine(self, *args: int) -> OpResult: ...
    def epoch(self, phase: Phase) -> int: ...
    def statistics(self) -> RankStatistics: ...

CUDA_MAX_EXPERTS: int

class DeviceMemory:
    address: int
    def __init__(self, num_bytes: int) -> None: ...
    def ipc_handle(self) -> bytes: ...

class PeerMemory:
    address: int
    def __init__(self, ipc_handle: bytes) -> None: ...

class CudaStatistics:
    num_ops: list[int]
    wait_ns: list[int]
    num_expert_rows: list[int]

class CudaLowLatencyRank:
    def __init__(
        self,
        config: LowLatencyConfig,
        self_rank: int,
        bases: list[int],
        *,
        timeout_ns: int,
        num_sms: int,
        shares_gpu: bool,
    ) -> None: ...
    # As LowLatencyRank's, with the stream behind them.
    def dispatch_send(self, *args: int) -> OpResult: ...
    def dispatch_recv(self, *args: OutputLayout | int) -> OpResult: ...
    def combine_send(self, *args: int) -> OpResult: ...
    def combine_recv(self, *args: int) -> OpResult: ...
    # Send and receive at once: the arguments of both, then the stream.
    def dispatch(self, *args: OutputLayout | int) -> OpResult: ...
    def combine(self, *args: int) -> OpResult: ...
    def report(self) -> OpResult: ...
    def statistics(self) -> CudaStatistics: ...

class CudaEvent:
    """Of the device that is current when it is made. Streams are the handles of CUDA's."""

    def __init__(self) -> None: ...
    def record(self, stream: int) -> None: ...
    def wait(self, stream: int) -> None:
        """Lets the stream wait for what was recorded last; at once, where nothing was."""

    def has_happened(self) -> bool: ...

class CudaCounterReader:
    """Of the device that is current when it is made."""

    def read(self, counters: int, count: int) -> list[int]:
        """64-bit words at an address of the device."""

class DispatchStart(enum.Enum):
    ROUTE = 0
    CACHED = 1
    RESUME = 2

class CombineInput(enum.Enum):
    ELSEWHERE = 0
    COMBINE_ROWS = 1
    RECEIVED_ROWS = 2

class CudaNormalRank:
    def __init__(
        self,
        config: NormalDeviceConfig,
        self_rank: int,
        bases: list[int],
        *,
        timeout_ns: int,
        num_max_sms: int,
        shares_gpu: bool,
    ) -> None: ...
    # csrc/bindings_cuda_normal.cpp says what they take; the stream is last.
    def dispatch(self, *args: DispatchStart | int) -> OpResult: ...
    def unpack(self, *args: int) -> OpResult: ...
    def combine(self, *args: CombineInput | int) -> OpResult: ...
    def wait_for_counts(self, ticket: int, stream: int) -> OpResult: ...
    def counts(self) -> tuple[int, int, bool, list[int]]: ...
    def report(self) -> OpResult: ...
    def epochs(self) -> int: ...

def cuda_dispatch_layout(
    topk_idx: int,
    topk_idx_is_int64: bool,
    num_tokens: int,
    top_k: int,
    partition: ExpertPartition,
    num_tokens_per_rank: int,
    num_tokens_per_expert: int,
    is_token_in_rank: int,
    stream: int,
) -> None: ...
def cuda_copy_on_sms(dst: int, src: int, num_bytes: int, num_sms: int, stream: int) -> None: ...
def cuda_copy_by_engine(dst: int, src: int, num_bytes: int, stream: int) -> None: ...
def cuda_fill_on_sms(dst: int, num_bytes: int, num_sms: int, stream: int) -> None: ...
def cuda_protocol_mismatches(config: LowLatencyConfig) -> int: ...
