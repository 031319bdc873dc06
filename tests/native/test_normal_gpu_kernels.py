"""The normal kernels that GPUs run, of one node and between nodes, compiled for a CPU
(gpu_on_cpu/), have the bits of the CPU's, with a copy engine that is early or late and over a
network that delivers in any order; and bugs that are seeded into them are found. No CUDA."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.native.gpu_programs import NUM_SEEDS, NUM_SEEDS_FOR_A_BUG, Program, build, stress
from tests.native.test_sanitizers import SeededBug

BUFFERS = "extern __shared__ __align__(128) std::byte buffers[];"
FIXED_BUFFERS = "__align__(128) static std::byte buffers[1 << 18];"
LINKS = Program(
    "normal_links",
    ("cuda/normal_dispatch.cu", "cuda/normal_combine.cu"),
    (
        ("cuda/normal_dispatch.cu", BUFFERS, FIXED_BUFFERS),
        ("cuda/normal_combine.cu", BUFFERS, FIXED_BUFFERS),
        ("cuda/normal_route.cuh", "kSendWarps = 16;", "kSendWarps = 2;"),
        ("cuda/normal_rank.cuh", "kNumFewTokens = 512;", "kNumFewTokens = 11;"),
        ("cuda/normal_rows.cuh", "<14336, 0, 14336 / 128, 14>", "<2048, 0, 2048 / 128, 2>"),
        (
            "cuda/normal_rows.cuh",
            "<8192, 8192 / sizeof(T), 8192 / sizeof(T) / 128, kSendWarps>",
            "<4096, 4096 / sizeof(T), 4096 / sizeof(T) / 128, kSendWarps>",
        ),
        ("cuda/normal_send.cuh", "kNumSenders = 256;", "kNumSenders = 3;"),
        ("cuda/normal_send.cuh", "kNumLinkSMs = 9;", "kNumLinkSMs = 1;"),
        ("cuda/normal_send.cuh", "kNumOwnSMs = 8;", "kNumOwnSMs = 1;"),
        ("cuda/normal_send.cuh", "kNumLeastOwnSMs = 7;", "kNumLeastOwnSMs = 1;"),
        ("cuda/normal_pull.cuh", "kPullWarps = 12;", "kPullWarps = 2;"),
        ("cuda/normal_pull.cuh", "kPieceBytes = 7168;", "kPieceBytes = 1024;"),
    ),
)
NODES = Program(
    "normal_nodes",
    ("nvshmem/normal_counts.cu", "nvshmem/normal_dispatch.cu", "nvshmem/normal_combine.cu"),
    (
        ("nvshmem/normal_launch.cuh", "kNodeThreads = 512;", "kNodeThreads = 64;"),
        (
            "nvshmem/normal_counts.cu",
            "extern __shared__ uint32_t num_listed[];",
            "__shared__ uint32_t num_listed[4096];",
        ),
    ),
)
PROGRAMS = (LINKS, NODES)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
def test_the_bits_are_those_of_the_cpus_kernels(
    program: Program, objects_of_cpu: list[Path], tmp_path: Path
) -> None:
    done = stress(build(program, objects_of_cpu, tmp_path), NUM_SEEDS)
    assert (done.returncode, done.stdout) == (0, f"stress_{program.name}: ok\n"), done.stderr


SEEDED_BUGS = [
    (
        LINKS,
        SeededBug(
            "few_tokens_are_not_numbered_from_0",
            "cuda/normal_route.cuh",
            "scratch_.before[r] = 0;",
            "scratch_.before[r] = 1;",
        ),
    ),
    (
        LINKS,
        SeededBug(
            "rows_of_warps_that_do_not_send_are_left_out",
            "cuda/normal_send.cuh",
            "role_.num_blocks} * num_warps();",
            "role_.num_blocks} * Rows::kNumWarps;",
        ),
    ),
    (
        LINKS,
        SeededBug(
            "a_last_group_of_few_channels_has_no_scale",
            "cuda/normal_rows.cuh",
            "scale * kLanesPerScale < num_vectors",
            "first + lane % kCount * kWarp < num_vectors",
        ),
    ),
    (
        LINKS,
        SeededBug(
            "a_chunk_is_overwritten_while_it_leaves",
            "cuda/normal_send.cuh",
            "        ptx::bulk_wait_read();\n        load(token, first);",
            "        load(token, first);",
        ),
    ),
    (
        LINKS,
        SeededBug(
            "rows_are_published_while_they_leave",
            "cuda/normal_send.cuh",
            "    ptx::bulk_wait_written();\n",
            "    ptx::bulk_wait_read();\n",
        ),
    ),
    (
        NODES,
        SeededBug(
            "messages_are_read_when_their_signal_is_there",
            "nvshmem/normal_op.cuh",
            "if (seen >= count) return seen;",
            "return count;",
        ),
    ),
    (
        NODES,
        SeededBug(
            "no_wait_for_credit",
            "nvshmem/normal_op.cuh",
            "if (!op.wait_for_bank(step)) return false;",
            "",
        ),
    ),
    (
        NODES,
        SeededBug(
            "a_node_is_added_up_before_its_rows_are_there",
            "nvshmem/normal_combine.cu",
            "ok = wait_for_rows(round, r, round_count(round, r));",
            "ok = r == op_.view().neighbour(thread);",
        ),
    ),
]


@pytest.mark.parametrize(
    ("program", "bug"),
    SEEDED_BUGS,
    ids=[f"{program.name}-{bug.id}" for program, bug in SEEDED_BUGS],
)
def test_a_bug_seeded_into_the_kernels_is_found(
    program: Program, bug: SeededBug, objects_of_cpu: list[Path], tmp_path: Path
) -> None:
    done = stress(build(program, objects_of_cpu, tmp_path, bug), NUM_SEEDS_FOR_A_BUG)
    assert done.returncode == 1
    # Wrong data, or words that contradict each other.
    assert "stress: rank" in done.stderr
