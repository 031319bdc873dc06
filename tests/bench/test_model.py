"""The tiny checkpoint: complete, reproducible, and any text can be its prompt."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import Tokenizer
from typer.testing import CliRunner

from ep_backend.bench.model import TinyMoE, make_model
from ep_backend.cli import app


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), TinyMoE())


def test_same_shape_and_seed_give_the_same_bytes(model: Path, tmp_path: Path) -> None:
    again = make_model(tmp_path / "again", TinyMoE())
    other = make_model(tmp_path / "other", TinyMoE(seed=1))
    for file in model.iterdir():
        assert (again / file.name).read_bytes() == file.read_bytes()
    name = "model.safetensors"
    assert (other / name).read_bytes() != (model / name).read_bytes()


def test_command_line_chooses_the_shape(tmp_path: Path) -> None:
    arguments = ["--experts", "12", "--top-k", "3", "--layers", "1", "--hidden", "192"]
    result = CliRunner().invoke(app, ["make-model", str(tmp_path / "m"), *arguments])
    assert result.exit_code == 0, result.output
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["architectures"] == ["Qwen3MoeForCausalLM"]
    assert (config["num_experts"], config["num_experts_per_tok"]) == (12, 3)
    weights = load_file(tmp_path / "m" / "model.safetensors")
    assert weights["model.layers.0.mlp.gate.weight"].shape == (12, 192)
    assert weights["model.layers.0.mlp.experts.11.down_proj.weight"].shape == (192, 96)
    assert not any(name.startswith("model.layers.1.") for name in weights)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ({"hidden": 100}, "multiple of 64"),
        ({"top_k": 9}, r"expected 1\.\.8"),
        ({"num_layers": 0}, "at least 1"),
    ],
)
def test_impossible_shapes_are_refused(shape: dict[str, int], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        TinyMoE(**shape)


@given(text=st.text(max_size=40))
def test_any_text_survives_the_tokenizer(model: Path, text: str) -> None:
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    encoded = tokenizer.encode(text)
    assert len(encoded.ids) == len(text.encode())
    assert tokenizer.decode(encoded.ids) == text


def test_generated_tokens_are_printable(model: Path) -> None:
    """Logits of all other tokens are 0, which does not win: nothing waits for the rest of a
    character."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    lm_head = load_file(model / "model.safetensors")["lm_head.weight"]
    live = [i for i in range(lm_head.shape[0]) if lm_head[i].abs().max() > 0]
    assert len(live) == 94
    assert all(tokenizer.decode([i]).isprintable() for i in live)
