"""Shapes and scenarios that nobody listed, drawn by hypothesis. The same for every device, but for
what its kernels refuse."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from ep_backend.settings import CUDA_ROW_ALIGNMENT
from tests.support.routing import ROUTINGS
from tests.support.scenario import Scenario
from tests.support.shapes import Shape

DTYPES = (torch.float32, torch.bfloat16)
SCALE_FORMATS = ("float32", "power_of_two", "ue8m0")
OUTPUT_LAYOUTS = ("expert_major", "rank_major")
REDUCTIONS = ("rank", "source")
NODES = ((2, 2), (3, 2), (2, 3), (1, 4), (1, 2), (2, 4), (2, 1))
"""Ranks of a node, nodes."""


@st.composite
def shapes(
    draw: st.DrawFn,
    max_ranks: int = 5,
    device: str = "cpu",
    in_expert_workspaces: bool = False,
    on_nodes: bool = False,
) -> Shape:
    dtype = draw(st.sampled_from(DTYPES))
    is_float8 = draw(st.booleans())
    cpu = dict(
        num_max_tokens_per_rank=st.integers(1, 9),
        hidden=st.one_of(st.integers(1, 70), st.sampled_from([127, 128, 129, 255, 256, 257, 600])),
        num_experts=st.integers(1, 13),
    )
    is_combine_float8 = not in_expert_workspaces and draw(st.booleans())
    has_float8 = is_float8 or is_combine_float8
    num_elements = CUDA_ROW_ALIGNMENT // (1 if has_float8 else dtype.itemsize)
    cuda = dict(
        num_max_tokens_per_rank=st.sampled_from([1, 3, 9, 40]),
        hidden=st.one_of(
            st.integers(1, 20).map(lambda n: n * num_elements),
            st.sampled_from([256, 608, 2048, 7168]),
        ),
        num_experts=st.integers(1, 40),
        transfer=st.sampled_from(["push", "pull", "pull_push"]),
        num_sms=st.sampled_from([None, None, 4, 16]),
    )
    settings = {name: draw(value) for name, value in (cpu if device == "cpu" else cuda).items()}
    if device == "cuda":
        # Batches on both sides of the limit, all of them, none.
        some = st.sampled_from([None, 0, (settings["num_max_tokens_per_rank"] + 1) // 2])
        settings["num_max_tagged_tokens"] = draw(some)
    output_layout = (
        "expert_major" if in_expert_workspaces else draw(st.sampled_from(OUTPUT_LAYOUTS))
    )
    if in_expert_workspaces:
        settings |= dict(num_workspaces=3, transfer="pull")
    may_be_in_place = device == "cuda" and output_layout == "rank_major" and not is_combine_float8
    if may_be_in_place and draw(st.booleans()):
        # One for each operation that the programs have in flight.
        transfer = draw(st.sampled_from(["pull", "pull_push"]))
        settings |= dict(num_workspaces=5, transfer=transfer)
        settings["expert_ids"] = draw(st.sampled_from(["local", "global"]))
    # Rank-major, the caller reduces.
    reductions = REDUCTIONS if output_layout == "expert_major" else ("rank",)
    if in_expert_workspaces:
        reductions = ("source",)
    num_ranks, nodes = draw(st.integers(1, max_ranks)), {}
    reduction = draw(st.sampled_from(reductions))
    if on_nodes:
        ranks_per_node, num_nodes = draw(st.sampled_from(NODES))
        num_ranks = ranks_per_node * num_nodes
        is_hierarchical = reduction == "rank" and draw(st.integers(0, 3)) > 0
        nodes = dict(ranks_per_node=ranks_per_node, hierarchical=is_hierarchical)
    return Shape(
        num_ranks=num_ranks,
        top_k=draw(st.integers(1, 32)),
        dtype=dtype,
        dispatch_dtype=torch.float8_e4m3fn if is_float8 else None,
        combine_dtype=torch.float8_e4m3fn if is_combine_float8 else None,
        scale_format=draw(st.sampled_from(SCALE_FORMATS)) if is_float8 else "float32",
        output_layout=output_layout,
        reduction=reduction,
        num_banks=draw(st.integers(2, 4)),
        device=device,
        **nodes,
        **settings,
    )


@st.composite
def scenarios(
    draw: st.DrawFn,
    max_ranks: int = 5,
    device: str = "cpu",
    in_expert_workspaces: bool = False,
    on_nodes: bool = False,
) -> Scenario:
    """`in_expert_workspaces`: nothing else, whose ranks must not share a stream. `on_nodes`: ranks
    on one node to four, of one rank to three, in place of `max_ranks`."""
    shape = draw(shapes(max_ranks, device, in_expert_workspaces, on_nodes))
    return draw(scenarios_of(shape))


@st.composite
def scenarios_of(draw: st.DrawFn, shape: Shape) -> Scenario:
    scenario = Scenario(shape)
    tokens = st.integers(0, shape.num_max_tokens_per_rank)
    for _ in range(draw(st.integers(1, 3))):
        scenario.add(
            draw(st.sampled_from(ROUTINGS)),
            draw(st.lists(tokens, min_size=shape.num_ranks, max_size=shape.num_ranks)),
            seed=draw(st.integers(0, 1000)),
            idx_dtype=draw(st.sampled_from([torch.int32, torch.int64])),
            is_quantized=shape.is_float8 and draw(st.booleans()),
        )
    return scenario
