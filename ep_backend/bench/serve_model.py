"""A random Qwen3-MoE of a real model's width, for servers on GPUs: about 30 GB of bfloat16.

Weights are drawn a layer at a time, several layers at once, and written as they lie in memory.
Words are the tokens: a prompt of random tokens stays what it is when it is decoded and encoded.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from ep_backend.bench import model as tiny

Shapes = dict[str, tuple[int, ...]]
# Layers in flight; each holds 1.2 GB on its GPU and on the host.
NUM_GPU_WORKERS = 6


@dataclass(frozen=True)
class RandomMoE:
    """Shape of the model; widths are those of Qwen3-30B-A3B, in half of its layers."""

    num_layers: int = 24
    hidden: int = 2048
    num_experts: int = 128
    top_k: int = 8
    moe_intermediate: int = 768
    num_heads: int = 32
    num_kv_heads: int = 4
    head_dim: int = 128
    vocab_size: int = 16384
    std: float = 0.02
    seed: int = 0

    def files(self) -> Iterator[tuple[str, Shapes]]:
        """Name and tensors of every file: the layers, then what is outside of them."""
        num_files = self.num_layers + 1
        for layer in range(self.num_layers):
            yield f"model-{layer + 1:05}-of-{num_files:05}.safetensors", self._layer_shapes(layer)
        outside = {
            "model.embed_tokens.weight": (self.vocab_size, self.hidden),
            "lm_head.weight": (self.vocab_size, self.hidden),
            "model.norm.weight": (self.hidden,),
        }
        yield f"model-{num_files:05}-of-{num_files:05}.safetensors", outside

    @property
    def num_bytes(self) -> int:
        return sum(2 * math.prod(s) for _, shapes in self.files() for s in shapes.values())

    def _layer_shapes(self, layer: int) -> Shapes:
        prefix = f"model.layers.{layer}"
        q_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        shapes: Shapes = {
            f"{prefix}.self_attn.q_proj.weight": (q_size, self.hidden),
            f"{prefix}.self_attn.k_proj.weight": (kv_size, self.hidden),
            f"{prefix}.self_attn.v_proj.weight": (kv_size, self.hidden),
            f"{prefix}.self_attn.o_proj.weight": (self.hidden, q_size),
            f"{prefix}.mlp.gate.weight": (self.num_experts, self.hidden),
        }
        for expert in range(self.num_experts):
            name = f"{prefix}.mlp.experts.{expert}"
            shapes |= {
                f"{name}.gate_proj.weight": (self.moe_intermediate, self.hidden),
                f"{name}.up_proj.weight": (self.moe_intermediate, self.hidden),
                f"{name}.down_proj.weight": (self.hidden, self.moe_intermediate),
            }
        return shapes | {
            f"{prefix}.input_layernorm.weight": (self.hidden,),
            f"{prefix}.post_attention_layernorm.weight": (self.hidden,),
            f"{prefix}.self_attn.q_norm.weight": (self.head_dim,),
            f"{prefix}.self_attn.k_norm.weight": (self.head_dim,),
        }


def make_random_model(directory: Path, shape: RandomMoE, device: str = "cpu") -> Path:
    """Writes the checkpoint; the same shape, seed and kind of device give the same bytes. Returns
    `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    word_tokenizer(shape.vocab_size).save(str(directory / "tokenizer.json"))
    files = dict(shape.files())
    documents = {
        "tokenizer_config.json": tiny.tokenizer_config(),
        "config.json": model_config(shape),
        "generation_config.json": {"eos_token_id": shape.vocab_size - 1, "do_sample": False},
        "model.safetensors.index.json": {
            "metadata": {"total_size": shape.num_bytes},
            "weight_map": {name: file for file, shapes in files.items() for name in shapes},
        },
    }
    for name, document in documents.items():
        (directory / name).write_text(json.dumps(document, indent=2) + "\n")

    def write(index: int, file: str) -> None:
        gpu = f"cuda:{index % torch.cuda.device_count()}" if device == "cuda" else "cpu"
        values = _draw(files[file], shape.std, shape.seed + index, torch.device(gpu))
        _write_safetensors(directory / file, files[file], values)

    num_workers = NUM_GPU_WORKERS if device == "cuda" else len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(num_workers) as pool:
        for done in [pool.submit(write, i, file) for i, file in enumerate(files)]:
            done.result()
    return directory


def model_config(shape: RandomMoE) -> dict:
    base = tiny.TinyMoE(shape.num_layers, shape.hidden, shape.num_experts, shape.top_k)
    return tiny.config_of(base, shape.vocab_size) | {
        "head_dim": shape.head_dim,
        "intermediate_size": 3 * shape.hidden,
        "moe_intermediate_size": shape.moe_intermediate,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "torch_dtype": "bfloat16",
    }


def word_tokenizer(vocab_size: int) -> Tokenizer:
    """Token i is the word `w<i>`, the last token ends a text."""
    vocabulary = {f"w{i}": i for i in range(vocab_size - 1)} | {tiny.END_OF_TEXT: vocab_size - 1}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token=tiny.END_OF_TEXT))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([tiny.END_OF_TEXT])
    return tokenizer


def _draw(shapes: Shapes, std: float, seed: int, device: torch.device) -> torch.Tensor:
    """All tensors of a file, one behind the other, bfloat16 on the CPU: matrices are normal, then
    come the norms, which are ones."""
    sizes = [math.prod(shape) for shape in shapes.values()]
    num_normal = sum(math.prod(shape) for shape in shapes.values() if len(shape) > 1)
    values = torch.ones(sum(sizes), dtype=torch.bfloat16, device=device)
    values[:num_normal].normal_(0.0, std, generator=torch.Generator(device).manual_seed(seed))
    return values.cpu()


def _write_safetensors(path: Path, shapes: Shapes, values: torch.Tensor) -> None:
    """By hand: safetensors' `save_file` takes its tensors one by one under the interpreter lock."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        file.write(values.view(torch.uint8).numpy().data)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m ep_backend.bench.serve_model",
        description=f"Writes a random Qwen3-MoE, {RandomMoE().num_bytes / 1e9:.0f} GB.",
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="Draws weights.")
    parser.add_argument("--layers", type=int, default=RandomMoE.num_layers)
    given = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    make_random_model(given.directory, RandomMoE(num_layers=given.layers), given.device)


if __name__ == "__main__":
    main()
