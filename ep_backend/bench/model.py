"""A tiny Qwen3-MoE checkpoint with random weights, and the byte-level tokenizer that goes with it.

It is a real model to an engine: config, safetensors, tokenizer. Weights are scaled up so that
different prompts take different experts and the best token leads by a margin: greedy decoding in
float32 then gives the same tokens wherever the arithmetic is the same up to rounding.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

HEAD_DIM = 32
END_OF_TEXT = "<|endoftext|>"
# Gains over 1/sqrt(fan_in). With 1 everywhere, random models repeat one token whatever the prompt;
# with weak attention they fall into cycles of two or three. With these and the default shape, the
# demo's answers have 19 or more distinct tokens of 32, and the best logit leads by 0.02 or more.
ATTENTION_GAIN = 2.0
QK_NORM = 1.5
EXPERT_GAIN = 2.0
ROUTER_GAIN = 2.0
LM_HEAD_GAIN = 4.0


@dataclass(frozen=True)
class TinyMoE:
    """Shape of the model."""

    num_layers: int = 2
    hidden: int = 128
    num_experts: int = 8
    top_k: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        if self.hidden < 2 * HEAD_DIM or self.hidden % (2 * HEAD_DIM) != 0:
            raise ValueError(
                f"hidden is {self.hidden}, expected a multiple of {2 * HEAD_DIM}: two query heads "
                f"of {HEAD_DIM} share a key head."
            )
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"top_k is {self.top_k}, expected 1..{self.num_experts} (experts).")
        if self.num_layers < 1:
            raise ValueError(f"num_layers is {self.num_layers}, expected at least 1.")

    @property
    def num_heads(self) -> int:
        return self.hidden // HEAD_DIM

    @property
    def num_kv_heads(self) -> int:
        return self.num_heads // 2

    @property
    def intermediate(self) -> int:
        return self.hidden // 2


def make_model(directory: Path, shape: TinyMoE) -> Path:
    """Writes the checkpoint; the same shape and seed give the same bytes. Returns `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer, vocabulary = _byte_tokenizer()
    tokenizer.save(str(directory / "tokenizer.json"))
    _write_json(directory / "tokenizer_config.json", tokenizer_config())
    _write_json(directory / "config.json", config_of(shape, vocab_size=len(vocabulary)))
    _write_json(
        directory / "generation_config.json",
        {"eos_token_id": vocabulary[END_OF_TEXT], "do_sample": False},
    )
    save_file(
        _weights(shape, vocabulary), directory / "model.safetensors", metadata={"format": "pt"}
    )
    return directory


def _byte_tokenizer() -> tuple[Tokenizer, dict[str, int]]:
    """One token a byte, no merges: any text can be a prompt, every token is one character."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate(alphabet)}
    vocabulary[END_OF_TEXT] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer, vocabulary


def tokenizer_config() -> dict:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
    }


def config_of(shape: TinyMoE, vocab_size: int) -> dict:
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": vocab_size - 1,
        "decoder_sparse_step": 1,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": 0.02,
        "intermediate_size": 2 * shape.hidden,
        "max_position_embeddings": 4096,
        "mlp_only_layers": [],
        "moe_intermediate_size": shape.intermediate,
        "norm_topk_prob": True,
        "num_attention_heads": shape.num_heads,
        "num_experts": shape.num_experts,
        "num_experts_per_tok": shape.top_k,
        "num_hidden_layers": shape.num_layers,
        "num_key_value_heads": shape.num_kv_heads,
        "output_router_logits": False,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "rope_theta": 10000.0,
        "router_aux_loss_coef": 0.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": vocab_size,
    }


def _weights(shape: TinyMoE, vocabulary: dict[str, int]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(shape.seed)

    def matrix(num_out: int, num_in: int, gain: float = 1.0) -> torch.Tensor:
        return torch.randn(num_out, num_in, generator=generator) * (gain / num_in**0.5)

    hidden, vocab_size = shape.hidden, len(vocabulary)
    q_size, kv_size = shape.num_heads * HEAD_DIM, shape.num_kv_heads * HEAD_DIM
    lm_head = matrix(vocab_size, hidden, LM_HEAD_GAIN)
    # Rows of zeros give logit 0, which never wins: generated text is printable ASCII, so every
    # streamed token shows at once.
    for symbol, token in vocabulary.items():
        if not (len(symbol) == 1 and "!" <= symbol <= "~"):
            lm_head[token] = 0.0
    weights = {
        "model.embed_tokens.weight": torch.randn(vocab_size, hidden, generator=generator),
        "model.norm.weight": torch.ones(hidden),
        "lm_head.weight": lm_head,
    }
    for layer in range(shape.num_layers):
        prefix = f"model.layers.{layer}"
        weights |= {
            f"{prefix}.input_layernorm.weight": torch.ones(hidden),
            f"{prefix}.post_attention_layernorm.weight": torch.ones(hidden),
            f"{prefix}.self_attn.q_proj.weight": matrix(q_size, hidden),
            f"{prefix}.self_attn.k_proj.weight": matrix(kv_size, hidden),
            f"{prefix}.self_attn.v_proj.weight": matrix(kv_size, hidden, ATTENTION_GAIN),
            f"{prefix}.self_attn.o_proj.weight": matrix(hidden, q_size, ATTENTION_GAIN),
            f"{prefix}.self_attn.q_norm.weight": torch.full((HEAD_DIM,), QK_NORM),
            f"{prefix}.self_attn.k_norm.weight": torch.full((HEAD_DIM,), QK_NORM),
            f"{prefix}.mlp.gate.weight": matrix(shape.num_experts, hidden, ROUTER_GAIN),
        }
        for expert in range(shape.num_experts):
            name = f"{prefix}.mlp.experts.{expert}"
            weights |= {
                f"{name}.gate_proj.weight": matrix(shape.intermediate, hidden, EXPERT_GAIN),
                f"{name}.up_proj.weight": matrix(shape.intermediate, hidden, EXPERT_GAIN),
                f"{name}.down_proj.weight": matrix(hidden, shape.intermediate, EXPERT_GAIN),
            }
    return weights


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
