"""The decode benchmark: what it is asked for, what it measures, and that wrong results show."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ep_backend import _native, virtual_world
from ep_backend.bench import decode, decode_cuda
from ep_backend.bench.decode_rank import CheckFailed, DecodeRank, Experts
from ep_backend.bench.decode_settings import MODELS, Case, DecodeSettings, parse_arguments
from ep_backend.bench.decode_times import CaseRow, Times
from ep_backend.bench.provenance import commit, this_machine

HAS_GPU = _native.has_cuda and torch.cuda.is_available()
SMALL = DecodeSettings(num_tokens=(3,), num_layers=2, num_repeats=2)
CPU = torch.device("cpu")


def test_a_batch_of_one_token_is_not_split() -> None:
    settings, output = parse_arguments(["--tokens", "1,8", "--ranks", "2,4", "--json", "x.json"])
    assert output == Path("x.json")
    cases = settings.cases()
    assert Case(2, 1, 1) in cases
    assert Case(4, 8, 2) in cases
    assert len(cases) == 2 * (1 + 2)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model", "gpt-2"], "'deepseek-v3' or"),
        (["--device", "tpu"], "'cpu' or 'cuda'"),
        (["--ranks", "17"], "at most 16, an expert a rank"),
        (["--tokens", "0"], "positive"),
        (["--layers", "0"], "at least 1"),
        (["--layout", "expert_workspace"], "only CUDA has"),
        (["--gpu-per-rank"], "with device 'cpu'"),
    ],
)
def test_impossible_settings_are_refused(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_arguments(arguments)
    assert caught.value.code == 2
    assert expected in capsys.readouterr().err


def test_what_follows_from_the_times() -> None:
    parts = {"step": [9e3, 8e3, 1e6], "exchange": [4e3] * 3, "experts": [7e3] * 3}
    times = Times.of_steps(parts, num_layers=2, relative_error=0.01)
    assert (times.step, times.exchange, times.experts) == (4.5, 2.0, 3.5)
    assert times.exchange_share == pytest.approx(1 / 4.5)
    assert times.hidden == pytest.approx(0.5)  # one of two milliseconds shows
    assert CaseRow(Case(2, 8, 2), times, num_model_layers=58).ms_per_token == 58 * 4.5
    assert replace(times, step=3.0).hidden == 1.0
    assert replace(times, step=30.0).hidden == 0.0


def test_an_experts_weights_are_the_same_on_every_rank() -> None:
    shape = MODELS["tiny"]
    low, high = (
        Experts(shape, experts, 1, torch.float32, CPU) for experts in (range(8), range(8, 16))
    )
    x = torch.randn(shape.hidden)
    assert torch.equal(low.of_token(x, 9), high.of_token(x, 9))
    rows = high(x.expand(8, 1, -1), torch.ones(8, dtype=torch.int32))
    assert torch.allclose(rows[1, 0], low.of_token(x, 9), atol=1e-5)


@pytest.mark.parametrize("num_micro_batches", [1, 2])
def test_a_wrong_step_is_noticed(num_micro_batches: int) -> None:
    case = Case(2, 3, num_micro_batches)

    def run(group: object) -> tuple[float, str]:
        rank = DecodeRank(SMALL, case, group, CPU)  # type: ignore[arg-type]
        rank.run("step")
        error = rank.check()
        rank.batches[-1].out[0, 0] += 10
        with pytest.raises(CheckFailed) as caught:
            rank.check()
        return error, str(caught.value)

    for rank, (error, text) in enumerate(virtual_world(2).run(run)):
        assert error < 0.02
        assert f"a token of rank {rank} is wrong" in text


def test_a_run_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = f"--tokens 1,4 --layers 1 --repeats 2 --output {tmp_path / 'x.json'}"
    assert decode.main(line.split()) == 0
    assert "MoE layers of a decode step, tiny" in capsys.readouterr().out
    document = json.loads((tmp_path / "x.json").read_text())
    assert document["commit"] == commit()
    assert document["command"].endswith(" --tokens 1,4 --layers 1 --repeats 2")
    assert this_machine().items() <= document["machine"].items()
    assert [case["num_micro_batches"] for case in document["cases"]] == [1, 1, 2]
    for case in document["cases"]:
        times = case["ms_per_layer"]
        assert times["exchange"] > 0
        assert times["experts"] > 0
        assert 0 < times["relative_error"] < 0.02
        assert case["ms_per_token"] == pytest.approx(2 * times["step"])


def test_a_broken_combine_fails_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EP_BACKEND_FAULT", "drop-remote-contributions")
    assert decode.main(["--tokens", "4", "--layers", "1", "--repeats", "1"]) == 1
    assert "is wrong by" in capsys.readouterr().err


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert decode.main(["--device", "cuda"]) == 1
    assert "needs a GPU" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize(
    "num_ranks", [1, pytest.param(2, marks=pytest.mark.gpus(2))], ids=["1-gpu", "2-gpus"]
)
@pytest.mark.parametrize("layout", ["expert_major", "expert_workspace"])
def test_a_gpu_a_rank(layout: str, num_ranks: int, tmp_path: Path) -> None:
    if not HAS_GPU:
        pytest.skip("no GPU: nothing was run")
    line = (
        f"--device cuda --gpu-per-rank --ranks {num_ranks} --layout {layout} --tokens 5 --layers 2 "
        f"--repeats 2 --output {tmp_path / 'x.json'}"
    )
    assert decode.main(line.split()) == 0
    cases = json.loads((tmp_path / "x.json").read_text())["cases"]
    assert [case["num_micro_batches"] for case in cases] == [1, 2]
    for case in cases:
        assert case["ms_per_layer"]["exchange"] > 0
        assert 0 < case["ms_per_layer"]["relative_error"] < 0.02


@pytest.mark.gpu
def test_more_ranks_than_gpus_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    if not HAS_GPU:
        pytest.skip("no GPU: nothing was run")
    assert decode.main(["--device", "cuda", "--gpu-per-rank", "--ranks", "16"]) == 1
    assert "16 ranks, this host has" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["expert_major", "expert_workspace"])
@pytest.mark.parametrize("num_micro_batches", [1, 2])
def test_a_step_on_a_gpu(layout: str, num_micro_batches: int) -> None:
    if not HAS_GPU:
        pytest.skip("no GPU: nothing was run")
    settings = replace(SMALL, device="cuda", layout=layout)
    for num_ranks in (1, 2):
        times = decode_cuda.measure(settings, Case(num_ranks, 5, num_micro_batches))
        assert times.relative_error < 0.02


def test_the_kernel_of_experts_leaves_unfilled_rows_alone() -> None:
    """In Triton's interpreter, which cannot multiply bfloat16."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("no triton: the experts' kernel was NOT run")
    program = """
import torch
from ep_backend.bench.decode_gemm import masked_mlp
rows, up, down = (torch.randn(*n).half() for n in ((3, 70, 128), (3, 128, 512), (3, 256, 128)))
up, down = up * 128**-0.5, down * 256**-0.5
counts = torch.tensor([0, 1, 65], dtype=torch.int32)
out = masked_mlp(rows, up, down, counts, torch.full_like(rows, torch.nan))
for i, n in enumerate(counts.tolist()):
    gate, value = (rows[i, :n].float() @ up[i].float()).chunk(2, dim=-1)
    expected = (torch.nn.functional.silu(gate) * value) @ down[i].float()
    torch.testing.assert_close(out[i, :n].float(), expected, rtol=0.01, atol=0.01)
    assert out[i, n:].isnan().all()
"""
    subprocess.run(
        [sys.executable, "-c", program], check=True, env=os.environ | {"TRITON_INTERPRET": "1"}
    )


@pytest.mark.gpu
def test_experts_on_a_gpu_equal_those_on_the_cpu() -> None:
    if not HAS_GPU:
        pytest.skip("no GPU: nothing was run")
    shape, device = MODELS["tiny"], torch.device("cuda")
    experts = Experts(shape, range(4), 1, torch.bfloat16, device)
    rows = torch.randn(4, 70, shape.hidden, device=device).bfloat16()
    counts = torch.tensor([0, 1, 65, 70], dtype=torch.int32, device=device)
    out = torch.full_like(rows, torch.nan)
    assert experts(rows, counts, out) is out
    for i, n in enumerate(counts.tolist()):
        expected = experts._mlp(rows[i, :n], experts.up[i], experts.down[i])
        torch.testing.assert_close(out[i, :n], expected, rtol=0.05, atol=0.05)
        assert out[i, n:].isnan().all()
