"""The kernels of ranks on several nodes over a network that reorders all that RDMA may reorder
(stress_network.cpp): thousands of seeds pass, and bugs of order that are seeded into the kernels
are found. A seed that fails once fails always."""

from __future__ import annotations

import functools
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.native.test_sanitizers import (
    CSRC,
    SANITIZERS,
    Run,
    SeededBug,
    compile_with,
    kernels_with,
    run_program,
    skip_without,
)

STRESS = Path(__file__).parent / "stress_network.cpp"
OK = (0, "stress_network: ok\n")


def sources_in(csrc: Path) -> list[Path]:
    return [STRESS, *sorted((csrc / "cpu").glob("*.cpp"))]


def output_for(algorithm: str) -> str:
    """Normal kernels: tokens a round."""
    return "3" if algorithm == "normal" else "expert_major"


def build(directory: Path, csrc: Path = CSRC, optimisation: str = "-O2") -> Path:
    """The program without a sanitizer: fast."""
    gcc = shutil.which("g++")
    if gcc is None:
        pytest.skip("no g++ on PATH: the network was NOT tested")
    program = directory / "stress_network"
    command = [gcc, "-std=c++17", optimisation, "-ffp-contract=off", "-pthread", f"-I{csrc}"]
    command += ["-Wno-missing-field-initializers", "-o", str(program)]
    command += map(str, sources_in(csrc))
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return program


@pytest.fixture(scope="module")
def stress(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The compiled program, as a function of its arguments."""
    return functools.partial(run_program, build(tmp_path_factory.mktemp("network")))


@pytest.mark.parametrize("algorithm", ["flat", "hierarchical", "normal"])
def test_ten_thousand_seeds(stress: Run, algorithm: str) -> None:
    done = stress("turns", algorithm, 4, 2, 0, 10_000, 8, "float32", output_for(algorithm))
    assert (done.returncode, done.stdout) == OK, done.stderr


@pytest.mark.parametrize(
    ("algorithm", "num_ranks", "ranks_per_node", "hidden", "dtype", "output"),
    [
        ("hierarchical", 6, 3, 8, "bfloat16", "expert_major"),
        ("hierarchical", 6, 2, 37, "float32", "rank_major"),
        ("hierarchical", 4, 1, 8, "float32", "expert_major"),
        ("hierarchical", 8, 2, 129, "float8", "expert_major"),
        ("hierarchical", 9, 3, 8, "float32", "rank_major"),  # more ranks than experts
        ("flat", 6, 2, 129, "float8", "rank_major"),
        ("flat", 4, 2, 37, "bfloat16", "source"),
        ("flat", 9, 3, 129, "float8", "source"),
        ("normal", 6, 3, 8, "bfloat16", "4"),
        ("normal", 6, 2, 129, "float8", "7"),
        ("normal", 4, 1, 8, "float32", "1"),
    ],
)
def test_other_shapes(
    stress: Run,
    algorithm: str,
    num_ranks: int,
    ranks_per_node: int,
    hidden: int,
    dtype: str,
    output: str,
) -> None:
    done = stress("turns", algorithm, num_ranks, ranks_per_node, 0, 500, hidden, dtype, output)
    assert (done.returncode, done.stdout) == OK, done.stderr


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_threads_without_a_report(sanitizer: str, tmp_path: Path) -> None:
    skip_without(sanitizer, tmp_path)
    compile_with(SANITIZERS[sanitizer], sources_in(CSRC), tmp_path / "stress")
    for algorithm in ("flat", "hierarchical", "normal"):
        arguments = (6, 3, 0, 40, 129, "float8", output_for(algorithm))
        done = run_program(tmp_path / "stress", "threads", algorithm, *arguments)
        assert (done.returncode, done.stdout) == OK, done.stderr


# `mode`: the algorithms that have it.
SEEDED_BUGS = [
    SeededBug(
        "signal_on_another_queue_pair_than_the_payload",
        "cpu/network.cpp",
        "network_->signal(queue_pair(phase, peer),",
        "network_->signal({self_rank_, peer, 2 + uint32_t(phase)},",
        "flat hierarchical normal",
    ),
    SeededBug(
        "payload_striped_over_two_queue_pairs_with_one_signal",
        "cpu/network.cpp",
        "network_->put(queue_pair(phase, dst_rank),",
        "network_->put({self_rank_, dst_rank, uint32_t(phase) + 2 * uint32_t(staged / 128 % 2)},",
        "flat hierarchical normal",
    ),
    SeededBug(
        "no_wait_for_credit",
        "cpu/low_latency_op.cpp",
        "if (epoch_ <= num_banks) return true;",
        "if (epoch_ > 0) return true;",
        "flat hierarchical",
    ),
    SeededBug(
        "headers_put_behind_their_signal",
        "cpu/multi_node_dispatch.cpp",
        "if (num_messages > 0) {",
        "op.publish_signal(dst_rank, num_messages); if (num_messages > 0) {",
        "flat",
    ),
    SeededBug(
        "one_place_to_stage_every_message_for_a_node",
        "cpu/multi_node_dispatch.cpp",
        "self + layout.node_outbox(op.bank(), view_.remote_idx(dst_rank), slot);",
        "self + layout.node_outbox(op.bank(), view_.remote_idx(dst_rank), 0);",
        "hierarchical",
    ),
    SeededBug(
        "combine_credit_before_a_node_is_added_up",
        "cpu/multi_node_combine.cpp",
        "for (; num_added_up_ < nodes().num_remote(); ++num_added_up_)",
        "op.publish_credits(); for (; num_added_up_ < nodes().num_remote(); ++num_added_up_)",
        "hierarchical",
    ),
    SeededBug(
        "a_hook_that_receives_before_it_forwards",
        "cpu/multi_node_dispatch.cpp",
        "for (; num_forwarded_ < num_remote; ++num_forwarded_) {",
        "if (!unpack_sources(op, params)) return op.result(); "
        "for (; num_forwarded_ < num_remote; ++num_forwarded_) {",
        "hierarchical",
    ),
    SeededBug(
        "routes_behind_their_signal",
        "cpu/normal_nodes.cpp",
        "if (num_for_node_[remote] > 0) {",
        "signal_node(op, round, remote, num_for_node_[remote] | flags); "
        "if (num_for_node_[remote] > 0) {",
        "normal",
    ),
    SeededBug(
        "a_node_is_added_up_before_its_rows_are_there",
        "cpu/normal_nodes_combine.cpp",
        "if (!wait_for(view_.neighbour(i))) return false;",
        "if (i == 0 && !wait_for(view_.neighbour(i))) return false;",
        "normal",
    ),
    SeededBug(
        "normal_credit_before_the_reads",
        "cpu/normal_op.h",
        "if (!receive(step - kAhead)) return false;",
        "publish_credits(step - kAhead); if (!receive(step - kAhead)) return false;",
        "normal",
    ),
]


@pytest.mark.parametrize("bug", SEEDED_BUGS, ids=lambda bug: bug.id)
def test_a_bug_seeded_into_the_kernels_is_found(bug: SeededBug, tmp_path: Path) -> None:
    program = build(tmp_path, kernels_with(bug, tmp_path), "-O0")
    for algorithm in bug.mode.split():
        arguments = (4, 2, 0, 2000, 8, "float32", output_for(algorithm))
        done = run_program(program, "turns", algorithm, *arguments)
        assert done.returncode == 1, algorithm
        # A bank that was overwritten, wrong data, or ranks that wait for each other.
        assert "stress: rank" in done.stderr
