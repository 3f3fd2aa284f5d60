"""Make a small random-weight model folder: `python integration/models.py DIR`.

The maker itself lives in the package, because `kvcached demo` needs it where there is no checkout.
"""

from __future__ import annotations

import sys
from pathlib import Path

from kvcached_plugins.demo.models import TINY, VOCABULARY, Shape, write_model

__all__ = ["TINY", "VOCABULARY", "Shape", "write_model"]

if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python integration/models.py DIR")
    print(write_model(Path(sys.argv[1])))
