"""The process of one rank in the multi-GPU benchmark."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from datetime import datetime, timedelta, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ep_backend import Group
from ep_backend.bench.multi_gpu_case import measure
from ep_backend.bench.multi_gpu_normal import NormalBench, Traffic, copies_of
from ep_backend.bench.multi_gpu_peers import (
    COPY_BYTES,
    copy_gbs,
    new_nccl,
    time_nccl,
    time_normal_nccl,
)
from ep_backend.bench.multi_gpu_settings import Options
from ep_backend.bench.multi_gpu_world import StepFailed, World, WorldLost
from ep_backend.bench.op_cuda_normal_case import NormalCase
from ep_backend.bench.op_cuda_report import machine
from ep_backend.bench.provenance import commit
from ep_backend.network import VARIABLE as NETWORK_VARIABLE

RENDEZVOUS_SECS = 60.0
LAST_WORDS_SECS = 3.0
DOCUMENT = "document.json"


class Progress:
    """The results so far, in a file that the parent process reads: they outlive a crash.

    "running" names what is being measured, None at the end.
    """

    def __init__(self, path: Path, document: dict[str, Any]) -> None:
        self._path = path
        self.document = document

    def save(self, running: str | None) -> None:
        self.document["running"] = running
        draft = self._path.with_suffix(".draft")
        draft.write_text(json.dumps(self.document, indent=2) + "\n")
        draft.replace(self._path)


def rank_main(rank: int, options: Options, directory: Path) -> None:
    """
    Args:
        directory: empty, of this run; rank 0 leaves the results there.
    """
    # All ranks are on this host.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    # Multicast sets up memory on all GPUs of the host, and an all-to-all does not use it.
    os.environ["NCCL_NVLS_ENABLE"] = "0"
    if options.network is not None:
        os.environ[NETWORK_VARIABLE] = options.network
    torch.set_num_threads(1)
    torch.cuda.set_device(rank)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{directory / 'rendezvous'}",
        rank=rank,
        world_size=options.num_gpus,
        timeout=timedelta(seconds=RENDEZVOUS_SECS),
    )
    world = World(Group.from_process_group(timeout_secs=RENDEZVOUS_SECS))
    try:
        _measure_all(world, options, directory)
        world.meet()
    except WorldLost:
        # The parent tells the error of the process that ends first: not this one's.
        time.sleep(LAST_WORDS_SECS)
        raise
    dist.destroy_process_group()


def _measure_all(world: World, options: Options, directory: Path) -> None:
    rank = world.group.self_rank
    progress = Progress(directory / DOCUMENT, _head(options) if rank == 0 else {"cases": []})

    def save(running: str | None) -> None:
        if rank == 0:
            progress.save(running)

    def say(text: str) -> None:
        if rank == 0:
            print(text, file=sys.stderr, flush=True)

    document = progress.document
    cases = options.cases()
    for i, case in enumerate(cases):
        save(str(case))
        try:
            times = measure(world, options.settings, case)
            document["cases"].append(asdict(case) | times.to_json())
            outcome = f"{times.pair.spread.median_us:.2f} us"
        except StepFailed as e:
            document["cases"].append(asdict(case) | {"error": str(e)})
            outcome = str(e)
        say(f"{i + 1} of {len(cases)}: {case}: {outcome}")
        # So that the next buffers, which PyTorch does not allocate, find room.
        gc.collect()
        torch.cuda.empty_cache()
    traffic: dict[int, Traffic] = {}
    if "normal" in options.kinds:
        traffic = _normal(world, options, document, save, say)
    if options.with_copy:
        save("copy")
        document["copy"] = _copy(world)
        say(f"copy: {document['copy']}")
    if options.with_nccl:
        _nccl(world, options, traffic, document, save)
        say(f"nccl: {document['nccl']}")
    save(None)


def _normal(
    world: World, options: Options, document: dict[str, Any], save: Any, say: Any
) -> dict[int, Traffic]:
    """Returns the rows of each number of tokens."""
    settings = options.normal
    cases: list[dict[str, Any]] = []
    document["normal"] = {"settings": asdict(settings), "cases": cases}
    copies = copies_of(world, settings)
    traffic: dict[int, Traffic] = {}

    def report(case: NormalCase, of_case: Traffic, result: dict[str, Any]) -> None:
        traffic[case.num_tokens] = of_case
        cases.append(asdict(case) | asdict(of_case) | result)
        rates = ", ".join(
            f"{name} {result[f'{name}_gbs']:.0f} GB/s ({result[f'{name}_copy_fraction']:.2f})"
            for name in ("dispatch", "cached_dispatch", "combine")
        )
        say(f"{case}: {rates}")

    for num_tokens in settings.num_tokens:
        for dtype in settings.dispatch_dtypes:
            what = f"normal, {num_tokens} tokens, {dtype}"
            save(what)
            try:
                NormalBench(world, settings, num_tokens, dtype).run(copies, report)
            except StepFailed as e:
                case = {"num_tokens": num_tokens, "dispatch_dtype": dtype, "error": str(e)}
                cases.append(case)
                say(f"{what}: {e}")
            document["normal"]["copies"] = copies.to_json()
            gc.collect()
            torch.cuda.empty_cache()
    copies.close()
    return traffic


def _copy(world: World) -> dict[str, Any]:
    """By rank 0, while the others wait."""
    if world.group.num_ranks < 2:
        return {"error": "needs two GPUs"}
    try:
        gbs = world.step(lambda: copy_gbs() if world.group.self_rank == 0 else 0.0)
    except StepFailed as e:
        return {"error": str(e)}
    return {"from_gpu": 0, "to_gpu": 1, "num_bytes": COPY_BYTES, "gbs": gbs}


def _nccl(
    world: World,
    options: Options,
    traffic: dict[int, Traffic],
    document: dict[str, Any],
    save: Any,
) -> None:
    """
    Args:
        traffic: of the normal kernels, by tokens.
    """
    pairs: list[dict[str, Any]] = []
    of_normal: list[dict[str, Any]] = []
    document["nccl"] = {"pairs": pairs, "normal": of_normal}

    def report(rows: list[dict[str, Any]], row: dict[str, Any]) -> None:
        rows.append(row)
        save("nccl")

    save("nccl")
    try:
        document["nccl"]["version"] = ".".join(map(str, torch.cuda.nccl.version()))
        nccl = new_nccl(world)
        if "low-latency" in options.kinds:
            time_nccl(world, nccl, options.settings, partial(report, pairs))
        for of_batch in traffic.values():
            time_normal_nccl(world, nccl, options.normal, of_batch, partial(report, of_normal))
    except StepFailed as e:
        document["nccl"]["error"] = str(e)
    gc.collect()  # graphs with NCCL's kernels must go before its communicators


def _head(options: Options) -> dict[str, Any]:
    num_gpus = options.num_gpus
    return {
        "bench": "multi_gpu",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": options.command,
        "commit": commit(),
        "machine": machine(),
        "cards": [torch.cuda.get_device_name(gpu) for gpu in range(num_gpus)],
        "link": {
            "can_access_peer": [
                [a != b and torch.cuda.can_device_access_peer(a, b) for b in range(num_gpus)]
                for a in range(num_gpus)
            ],
            "topology": _topology(),
        },
        "settings": asdict(options.settings),
        "network": os.environ.get(NETWORK_VARIABLE),
        "cases": [],
    }


def _topology() -> str:
    try:
        done = subprocess.run(
            ["nvidia-smi", "topo", "-m"], capture_output=True, text=True, check=True, timeout=20
        )
    except (OSError, subprocess.SubprocessError) as e:
        return f"unknown: {e}"
    return done.stdout
