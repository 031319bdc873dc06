"""The low-latency kernels of GPUs, over a network, flat and hierarchical, and on one host, also in
workspaces, compiled for a CPU (gpu_on_cpu/), have the bits of the CPU's, also over a network that
delivers in any order; and bugs of order that are seeded into them are found. No GPU, no CUDA."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.native.gpu_programs import NUM_SEEDS, NUM_SEEDS_FOR_A_BUG, Program, build, stress
from tests.native.test_sanitizers import SeededBug, run_program

KERNELS = (
    "nvshmem/dispatch.cu",
    "nvshmem/combine.cu",
    "nvshmem/hierarchical_dispatch.cu",
    "nvshmem/hierarchical_combine.cu",
    "cuda/low_latency_dispatch.cu",
    "cuda/low_latency_combine.cu",
    "cuda/workspace_rank_major.cu",
    "cuda/workspace_tagged.cu",
    "cuda/workspace_expert_major.cu",
    "cuda/workspace_combine.cu",
    "cuda/workspace_tagged_combine.cu",
    "cuda/workspace_tagged_expert_major.cu",
)
WITH_SHARED = (*(k for k in KERNELS if "workspace" not in k), "cuda/workspace_dispatch.cuh")
SHARED, FIXED_SHARED = "extern __shared__ uint32_t shared[];", "__shared__ uint32_t shared[4096];"
PROGRAM = Program(
    "low_latency_gpu",
    KERNELS,
    (
        ("cuda/rank.cuh", "kThreads = 256;", "kThreads = 64;"),
        *((kernels, SHARED, FIXED_SHARED) for kernels in WITH_SHARED),
    ),
)


def test_the_bits_are_those_of_the_cpus_kernels(objects_of_cpu: list[Path], tmp_path: Path) -> None:
    program = build(PROGRAM, objects_of_cpu, tmp_path)
    done = stress(program, 2 * NUM_SEEDS)  # of four kinds in turn
    assert (done.returncode, done.stdout) == (0, "stress_low_latency_gpu: ok\n"), done.stderr
    for what in ("damage", "stop", "slots"):
        done = run_program(program, what)
        assert done.returncode == 0, done.stderr


SEEDED_BUGS = [
    SeededBug(
        "messages_are_read_when_their_signal_is_there",
        "cuda/rank.cuh",
        "rank_.has_arrived(receiving(), bank_, r, protocol::signal_count(source), speaks);",
        "true;",
    ),
    SeededBug(
        "no_wait_for_credit",
        "cuda/rank.cuh",
        "if (r == rank_.self_rank || !is_peer(r)) continue;",
        "continue;",
    ),
    SeededBug(
        "tagged_words_are_taken_as_they_are",
        "cuda/part.cuh",
        "return words_[0].w == tag && words_[1].w == tag && words_[2].w == tag;",
        "return tag != 0;",
    ),
    SeededBug(
        "headers_are_taken_as_they_are",
        "cuda/dispatch_recv.cuh",
        "return header.w == op_.tag() &&",
        "return",
    ),
    SeededBug(
        "messages_are_forwarded_when_their_signal_is_there",
        "nvshmem/hierarchical_forward.cuh",
        "rank_.has_arrived(op_.receiving(), op_.bank(), src_rank, count, speaks);",
        "true;",
    ),
    SeededBug(
        "neighbours_are_signalled_before_all_is_forwarded",
        "nvshmem/hierarchical_forward.cuh",
        "is_last = ptx::atom_add_acq_rel_gpu(num_finished, 1) == share.num_blocks - 1;",
        "is_last = ptx::atom_add_acq_rel_gpu(num_finished, 1) == 0;",
    ),
    SeededBug(
        "a_node_is_added_up_before_its_rows_are_there",
        "nvshmem/hierarchical_combine.cu",
        "op.may_receive() && combiner.wait_for_neighbours();",
        "op.may_receive();",
    ),
    SeededBug(
        "a_workspace_is_written_before_its_rows_are_read",
        "cuda/workspace_dispatch.cuh",
        "if (r == threadIdx.x && credit_ >= last_epoch_) continue;",
        "continue;",
    ),
    SeededBug(
        "a_dispatch_in_workspaces_is_done_when_the_signals_are_there",
        "cuda/workspace_dispatch.cuh",
        "if (kSends) ok = ok && op.wait_for_arrivals();",
        "",
    ),
    SeededBug(
        "a_block_says_that_its_rows_are_there_before_all_warps_have_sent",
        "cuda/workspace_dispatch.cuh",
        "sender.run(items, fetched, first);\n      if (!is_alone) {\n",
        "if (!is_alone) op.publish_arrivals<false>();\n"
        "      sender.run(items, fetched, first);\n      __syncthreads();\n      if (false) {\n",
    ),
    SeededBug(
        "rows_are_taken_from_blanks",
        "cuda/part.cuh",
        "return words_.vectors[0].w != 0 && words_.vectors[kVectors - 1].w != 0;",
        "return true;",
    ),
    SeededBug(
        "blanks_are_not_made_again",
        "cuda/part.cuh",
        "Piece<kVectors>{}.store(row, num_vectors, piece);",
        "",
    ),
    SeededBug(
        "no_message_comes_where_no_signal_has_come_yet",
        "cuda/workspace_dispatch.cuh",
        "return protocol::signal_epoch(signal) == op.epoch() &&",
        "return",
    ),
    SeededBug(
        "tagged_rows_of_experts_are_placed_before_counts_are_there",
        "cuda/workspace_tagged_expert_major.cu",
        "ok = op.have_tag(address, r, &word);",
        "ok = true;",
    ),
    SeededBug(
        "a_tagged_message_is_placed_before_its_header_is_there",
        "cuda/workspace_tagged_expert_major.cu",
        "return header.w == op.tag() && (!is_there() || entry.w == op.tag()) &&",
        "return (!is_there() || entry.w == op.tag()) &&",
    ),
    SeededBug(
        "rows_in_workspaces_are_added_up_before_they_are_there",
        "cuda/workspace_combine.cu",
        "const bool ok = op.start_recv(",
        "const bool ok = [&](auto...) { return op.may_receive(); }(",
    ),
]


@pytest.mark.parametrize("bug", SEEDED_BUGS, ids=lambda bug: bug.id)
def test_a_bug_seeded_into_the_kernels_is_found(
    bug: SeededBug, objects_of_cpu: list[Path], tmp_path: Path
) -> None:
    done = stress(build(PROGRAM, objects_of_cpu, tmp_path, bug), NUM_SEEDS_FOR_A_BUG)
    assert done.returncode == 1
    # Wrong data, or words that contradict each other.
    assert "stress: rank" in done.stderr
