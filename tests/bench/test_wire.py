"""`ep-backend bench wire`: what the network counts is what the formulas say."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from ep_backend.bench.wire_formula import (
    PHASES,
    Copies,
    WireShape,
    bytes_of_copy,
    network_traffic,
    node_traffic,
)
from ep_backend.bench.wire_run import ALGORITHMS, count
from ep_backend.cli import app
from tests.support.routing import ROUTINGS, make_routing
from tests.support.shapes import Shape
from tests.support.strategies import NODES, REDUCTIONS


def shape_of(
    num_nodes: int = 4,
    ranks_per_node: int = 8,
    num_tokens: int = 128,
    hidden: int = 7168,
    num_experts: int = 256,
    top_k: int = 8,
    is_float8: bool = True,
    is_combine_float8: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    reduction: str = "rank",
) -> WireShape:
    float8 = torch.float8_e4m3fn
    return WireShape(
        num_nodes,
        ranks_per_node,
        num_tokens,
        hidden,
        num_experts,
        top_k,
        dtype,
        float8 if is_float8 else dtype,
        float8 if is_combine_float8 else dtype,
        reduction,
    )


@settings(max_examples=100)
@given(
    st.sampled_from(NODES),
    st.builds(
        dict,
        num_tokens=st.integers(1, 6),
        hidden=st.sampled_from([1, 20, 128, 130, 300]),
        num_experts=st.integers(1, 13),
        top_k=st.integers(1, 9),
        is_float8=st.booleans(),
        is_combine_float8=st.booleans(),
        dtype=st.sampled_from([torch.float32, torch.bfloat16]),
        reduction=st.sampled_from(REDUCTIONS),
    ),
    st.sampled_from(ROUTINGS),
    st.integers(0, 1000),
)
def test_counters_equal_the_formulas(
    nodes: tuple[int, int], sizes: dict[str, int], routing: str, seed: int
) -> None:
    shape = shape_of(ranks_per_node=nodes[0], num_nodes=nodes[1], **sizes)  # type: ignore[arg-type]
    drawn = Shape(shape.num_ranks, num_experts=shape.num_experts, top_k=shape.top_k)
    generator = torch.Generator().manual_seed(seed)
    topk_idx = [
        make_routing(routing, drawn, (seed + rank) % (shape.num_tokens + 1), generator)
        for rank in range(shape.num_ranks)
    ]
    copies = Copies.of_routing(topk_idx, shape)
    for scheme in shape.schemes:
        if scheme not in ALGORITHMS:
            continue
        hierarchical = ALGORITHMS[scheme]
        counted = count(shape, hierarchical, topk_idx, seed)
        # On one node there is nothing to be hierarchical about.
        told = "per_rank" if shape.num_nodes == 1 else scheme
        for phase in PHASES:
            assert counted[phase]["rdma"] == network_traffic(told, phase, copies, shape), phase
            assert counted[phase]["shm"] == node_traffic(told, phase, copies, shape), phase


@pytest.mark.parametrize(
    ("num_nodes", "per_expert", "per_rank", "per_node"), [(2, 4.0, 3.3, 1.0), (4, 6.0, 5.5, 2.7)]
)
def test_copies_that_are_expected_of_eight_experts(
    num_nodes: int, per_expert: float, per_rank: float, per_node: float
) -> None:
    shape = shape_of(num_nodes)
    expected = Copies.expected(shape)
    num_tokens = shape.num_tokens * shape.num_ranks
    assert expected.remote("per_expert") / num_tokens == pytest.approx(per_expert)
    assert expected.remote("per_rank") / num_tokens == pytest.approx(per_rank, abs=0.05)
    assert expected.remote("per_node") / num_tokens == pytest.approx(per_node, abs=0.05)
    # Of nodes by hand: each of the N - 1 others is missed by all eight with this chance.
    rest = shape.num_experts - shape.num_experts // num_nodes
    missed = math.prod((rest - i) / (shape.num_experts - i) for i in range(8))
    assert expected.remote("per_node") / num_tokens == pytest.approx((num_nodes - 1) * (1 - missed))


def test_drawn_routings_have_the_expected_copies() -> None:
    shape = shape_of(num_nodes=3, ranks_per_node=2, num_tokens=2000, num_experts=20, top_k=3)
    drawn = Shape(6, num_experts=20, top_k=3)
    generator = torch.Generator().manual_seed(0)
    topk_idx = [make_routing("uniform", drawn, 2000, generator) for _ in range(6)]
    found, expected = Copies.of_routing(topk_idx, shape), Copies.expected(shape)
    for name in (field.name for field in fields(Copies) if field.name != "batches"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=0.03), name
    assert found.batches == pytest.approx(expected.batches)


def test_bytes_of_copies() -> None:
    shape = shape_of()
    row = 7168 + 56 * 4
    header = 128  # 16, and eight times 12
    assert bytes_of_copy("per_expert", "dispatch", shape) == row + 16
    assert bytes_of_copy("per_rank", "dispatch", shape) == row + header
    assert bytes_of_copy("per_node", "dispatch", shape) == row + header
    for scheme in ("per_expert", "per_rank", "per_node"):
        assert bytes_of_copy(scheme, "combine", shape) == 2 * 7168


def test_the_command_prints_copies_floors_and_what_virtual_ranks_have_counted(
    tmp_path: Path,
) -> None:
    path = tmp_path / "wire.json"
    arguments = ["bench", "wire", "--nodes", "2", "--ranks-per-node", "8", "--json", str(path)]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    document = json.loads(path.read_text())
    cases = {(case["scheme"], case["phase"]): case for case in document["cases"]}
    per_expert, per_node = cases["per_expert", "dispatch"], cases["per_node", "dispatch"]
    assert round(per_expert["copies_per_token"], 1) == 4.0
    assert round(per_node["copies_per_token"], 1) == 1.0
    # 128 tokens of 7408 bytes and four copies, at 50 GB/s.
    assert per_expert["floor_us"] == pytest.approx(128 * 4 * (7168 + 224 + 16) / 50e3)
    for line in ("DeepEP", "4.00", "1.00", "75.9"):
        assert line in result.output
    assert {row["scheme"] for row in document["counted"]} == {"per_rank", "per_node"}
    for row in document["counted"]:
        assert row["counted"] == row["formula"]


def test_rows_that_are_added_up_at_home_are_as_many_as_experts() -> None:
    shape = shape_of(num_nodes=2, reduction="source")
    copies = Copies.expected(shape)
    for phase, copies_of_a_token in (("dispatch", 3.3), ("combine", 4.0)):
        counted = copies.remote_in(phase, "per_rank", shape) / (16 * 128)
        assert counted == pytest.approx(copies_of_a_token, abs=0.05)
    arguments = ["bench", "wire", "--nodes", "2", "--ranks-per-node", "2", "--reduction", "source"]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "hierarchical" not in result.output
    assert result.output.count("equal") == 4


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--experts", "4"], "num_experts is 4, expected at least 8"),
        (["--reduction", "home"], "reduction is 'home'"),
        (["--nodes", "1"], "num_nodes is 1, expected at least 2"),
        (["--dtype", "float16"], "dtype is 'float16'"),
        (["--nic-gbs", "0"], "nic_gbs is 0"),
    ],
)
def test_impossible_settings_are_refused(arguments: list[str], expected: str) -> None:
    result = CliRunner().invoke(app, ["bench", "wire", *arguments], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert expected in result.output
