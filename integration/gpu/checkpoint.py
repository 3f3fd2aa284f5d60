"""A Llama checkpoint with seeded weights, under which tokens depend on all of the KV cache.

Dummy weights of engines are so small that attention adds nothing that bfloat16 can hold; arm.reseed
says more. This is the same for an engine whose weights cannot be reached once it runs.
"""

from __future__ import annotations

import json
import shutil
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of each parameter of ``LlamaForCausalLM``."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    head = config.get("head_dim") or hidden // heads
    kv = (config.get("num_key_value_heads") or heads) * head
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        yield f"{at}.self_attn.q_proj.weight", (heads * head, hidden)
        yield f"{at}.self_attn.k_proj.weight", (kv, hidden)
        yield f"{at}.self_attn.v_proj.weight", (kv, hidden)
        yield f"{at}.self_attn.o_proj.weight", (hidden, heads * head)
        yield f"{at}.mlp.gate_proj.weight", (inner, hidden)
        yield f"{at}.mlp.up_proj.weight", (inner, hidden)
        yield f"{at}.mlp.down_proj.weight", (hidden, inner)
        yield f"{at}.input_layernorm.weight", (hidden,)
        yield f"{at}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    if not config.get("tie_word_embeddings"):
        yield "lm_head.weight", (config["vocab_size"], hidden)


def fill(name: str, weight: Any) -> None:
    """Give a parameter its seeded values, which keep the variance of what passes through."""
    import torch

    if weight.dim() < 2:
        weight.fill_(0.0 if name.endswith("bias") else 1.0)
        return
    generator = torch.Generator(weight.device).manual_seed(zlib.crc32(name.encode()))
    deviation = 1.0 if "embed" in name else weight.shape[-1] ** -0.5
    weight.normal_(0.0, deviation, generator=generator)


def write(model: Path, folder: Path) -> Path:
    """A copy of the model's folder with ``model.safetensors`` in it, in bfloat16; as large as the
    weights, made on a GPU where there is one. Nothing is done where it is there already."""
    if (folder / "model.safetensors").exists():
        return folder
    import torch
    from safetensors.torch import save_file

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensors = {}
    for name, shape in shapes(json.loads((model / "config.json").read_text())):
        weight = torch.empty(shape, dtype=torch.bfloat16, device=device)
        fill(name, weight)
        tensors[name] = weight.cpu()
    shutil.copytree(model, folder, dirs_exist_ok=True)
    save_file(tensors, folder / "model.safetensors.new", metadata={"format": "pt"})
    (folder / "model.safetensors.new").replace(folder / "model.safetensors")
    return folder


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]))
