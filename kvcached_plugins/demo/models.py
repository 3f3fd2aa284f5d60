"""Small models with random weights: a config and a tokenizer, for `--load-format dummy`."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import NamedTuple

BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
VOCABULARY = 2048


class Shape(NamedTuple):
    """The dimensions of a Llama-style decoder."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int = VOCABULARY
    value_bytes: int = 2
    """Of a number in the KV cache: 2 in bfloat16, 4 in float32."""

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of KV cache that one token takes."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.value_bytes


TINY = Shape(layers=4, hidden=256, intermediate=512, heads=4, kv_heads=2, head_dim=64)


def write_model(folder: Path, shape: Shape = TINY) -> Path:
    """Write a folder that vLLM and SGLang load with `--load-format dummy`; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_tokenizer(folder)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": 32768,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "use_cache": True,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return folder


def _write_tokenizer(folder: Path) -> None:
    """Train a byte-level BPE on Python source that every machine has; well under a second."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers import models as tokenizer_models
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(tokenizer_models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        (inspect.getsource(module) for module in (inspect, json)), trainer
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS)
    fast.save_pretrained(str(folder))
