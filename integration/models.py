"""Make a small random-weight model folder: `python integration/models.py DIR`.

The maker itself lives in the package, because `kvcached demo` needs it where there is no checkout.
"""

from __future__ import annotations

import sys
from pathlib import Path

from kvcached_plugins.demo.models import TINY, VOCABULARY, Shape, write_model

__all__ = ["CACHE_HEAVY", "TINY", "VOCABULARY", "Shape", "write_model"]

CACHE_HEAVY = Shape(layers=4, hidden=128, intermediate=128, heads=16, kv_heads=16, head_dim=128)
"""Much KV cache for little work: 32 KiB a token in 16 bits."""

if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python integration/models.py DIR")
    print(write_model(Path(sys.argv[1])))
