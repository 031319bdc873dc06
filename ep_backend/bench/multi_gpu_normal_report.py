"""The normal kernels' part of the multi-GPU benchmark's document, printed."""

from __future__ import annotations

from typing import Any

from ep_backend.bench.op_cuda_report import print_table

CAPTION = (
    "GB/s: rows that a rank sends over the link; peer copy: as a fraction of a copy of as many "
    "bytes to the next GPU by copy engines; SMs' copy: read plus written, by those of a copy to or "
    "from the next GPU on as many SMs; exact: the host waits for counts; NCCL: an all-to-all of as "
    "many bytes."
)
HEADS = (
    *("tokens", "dtype", "SMs"),
    *("dispatch us", "GB/s", "peer copy", "SMs' copy", "exact us", "cached us", "GB/s", "NCCL us"),
    *("combine us", "GB/s", "peer copy", "SMs' copy", "copied first, us", "NCCL us"),
)


def normal_cells(document: dict[str, Any]) -> list[list[str]]:
    """A line a case that did not fail, under `HEADS`."""
    nccl_us = {
        (row["num_tokens"], row["dtype"]): f"{row['all_to_all']['median_us']:.0f}"
        for row in document.get("nccl", {}).get("normal", [])
    }
    return [_line(case, nccl_us) for case in document["normal"]["cases"] if "error" not in case]


def _line(case: dict[str, Any], nccl_us: dict[tuple[int, str], str]) -> list[str]:
    def us(name: str) -> str:
        return f"{case[name]['median_us']:.0f}"

    def rates(name: str) -> list[str]:
        return [
            f"{case[f'{name}_gbs']:.0f}",
            f"{case[f'{name}_copy_fraction']:.2f}",
            f"{case[f'{name}_sms_copy_fraction']:.2f}",
        ]

    num_tokens, dtype = case["num_tokens"], case["dispatch_dtype"]
    return [
        *(str(num_tokens), dtype, str(case["num_sms"])),
        *(us("dispatch"), *rates("dispatch"), us("exact_dispatch")),
        *(us("cached_dispatch"), f"{case['cached_dispatch_gbs']:.0f}"),
        nccl_us.get((num_tokens, dtype), ""),
        *(us("combine"), *rates("combine"), us("copied_combine")),
        nccl_us.get((num_tokens, "bf16"), ""),
    ]


def print_normal(document: dict[str, Any]) -> None:
    normal = document.get("normal")
    if normal is None:
        return
    gpu, settings = document["machine"], normal["settings"]
    title = (
        f"normal dispatch and combine, {len(document['cards'])} x {gpu['gpu']}, a process each | "
        f"hidden {settings['hidden']}, {settings['num_experts']} experts, top-{settings['top_k']} "
        f"| driver {gpu['driver']}, CUDA {gpu['cuda']}, torch {gpu['torch']}"
    )
    print_table(title, list(HEADS), normal_cells(document), CAPTION)
    for copy in normal.get("copies", []):
        print(
            f"copy of {copy['num_bytes'] / 1e6:.1f} MB to the next GPU, GB/s: by engines "
            f"{copy['engine_gbs']:.0f}; {copy['num_sms']} SMs push {copy['push_gbs']:.0f}, pull "
            f"{copy['pull_gbs']:.0f}"
        )
    for row in document.get("nccl", {}).get("normal", []):
        print(f"NCCL, {row['num_tokens']} tokens, {row['dtype']}: {row['gbs']:.0f} GB/s")
    for case in normal["cases"]:
        if "error" in case:
            print(f"failed: {case['num_tokens']} {case['dispatch_dtype']}: {case['error']}")
