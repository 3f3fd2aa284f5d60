"""Make a small random-weight model folder: `python integration/models.py DIR`.

The maker itself lives in the package, because `kvcached demo` needs it where there is no checkout.
"""

from __future__ import annotations

import sys
from pathlib import Path

from kvcached_plugins.demo.models import TINY, VOCABULARY, Shape, write_model

__all__ = ["CACHE_HEAVY", "LLAMA_1B", "LLAMA_8B", "TINY", "VOCABULARY", "Shape", "write_model"]

CACHE_HEAVY = Shape(layers=4, hidden=128, intermediate=128, heads=16, kv_heads=16, head_dim=128)
"""Much KV cache for little work: 32 KiB a token in 16 bits."""

LLAMA_8B = Shape(layers=32, hidden=4096, intermediate=14336, heads=32, kv_heads=8, head_dim=128)
"""Llama-3.1-8B but for its vocabulary: 128 KiB of KV a token in 16 bits."""

LLAMA_1B = Shape(layers=16, hidden=2048, intermediate=8192, heads=32, kv_heads=8, head_dim=64)
"""Llama-3.2-1B but for its vocabulary: 32 KiB of KV a token in 16 bits."""

if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python integration/models.py DIR")
    print(write_model(Path(sys.argv[1])))
