"""Shapes of the normal kernels between nodes on CUDA, and operations on them."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from ep_backend import Group, NormalBuffer, _native
from ep_backend.normal_network import NetworkNormalBuffer
from tests.support.normal import NormalCase, NormalShape, make_case
from tests.support.normal_cuda import How
from tests.support.nvshmem import network_of
from tests.support.routing import ROUTINGS

FLOAT8 = torch.float8_e4m3fn
Operations = list[tuple[NormalCase, How]]


@dataclass(frozen=True)
class NetworkNormalShape:
    """Arguments of a `NormalBuffer` whose ranks are on several nodes."""

    shape: NormalShape
    num_sms: int | None = None

    def num_bytes(self) -> int:
        """The least that gives as many tokens a round."""
        return _native.NormalNetworkLayout(self.shape.node_config()).num_bytes

    def buffer(self, group: Group, timeout_secs: float = 30.0) -> NetworkNormalBuffer:
        shape = self.shape
        assert shape.ranks_per_node is not None
        buffer = NormalBuffer(
            group,
            **shape.arguments(self.num_bytes()),
            timeout_secs=timeout_secs,
            device="cuda",
            num_sms=self.num_sms,
            network=network_of(shape.ranks_per_node),
        )
        assert isinstance(buffer, NetworkNormalBuffer)
        assert buffer.num_tokens_per_round == shape.num_tokens_per_round
        return buffer


def draw_shape(draw: random.Random, num_ranks: int, ranks_per_node: int) -> NetworkNormalShape:
    is_float8 = draw.random() < 0.5
    shape = NormalShape(
        num_ranks,
        hidden=16 * draw.choice([1, 3, 8, 9, 70, 225, 450, 1000]),
        num_experts=draw.randint(1, 13),
        top_k=draw.choice([1, 2, 3, 8, 33, 64]),
        dtype=draw.choice([torch.float32, torch.bfloat16]),
        num_tokens_per_round=draw.choice([7, 16, 100]),
        dispatch_dtype=FLOAT8 if is_float8 else None,
        scale_format=draw.choice(["float32", "power_of_two", "ue8m0"]) if is_float8 else "float32",
        ranks_per_node=ranks_per_node,
    )
    return NetworkNormalShape(shape, num_sms=draw.choice([1, 3, 16]))


def draw_operations(draw: random.Random, shape: NormalShape, count: int) -> Operations:
    operations = []
    for _ in range(count):
        num_tokens = [draw.choice([0, 1, draw.randint(0, 40)]) for _ in range(shape.num_ranks)]
        case = make_case(
            shape,
            draw.choice(ROUTINGS),
            num_tokens,
            seed=draw.randrange(1000),
            idx_dtype=draw.choice([torch.int32, torch.int64]),
            num_biases=draw.randint(0, 2),
            with_weights=draw.random() < 0.5,
            is_quantized=shape.is_float8 and draw.random() < 0.5,
        )
        num_all = sum(num_tokens)
        how = How(
            draw.choice([0, max(1, num_all), num_all + 300]),
            in_place=draw.random() < 0.5,
            has_previous=draw.random() < 0.5,
            is_async=draw.random() < 0.5,
        )
        operations.append((case, how))
    return operations
