"""Where a program's GPU, files and ports are. With two GPUs, two programs run beside each other.

``CUDA_VISIBLE_DEVICES`` names one GPU by its number, ``KVC_ROOT`` a folder of its own for what
`run.sh` unpacks, as `lanes.sh` sets them. Standard library only.
"""

from __future__ import annotations

import os
from pathlib import Path

FIRST_PORT = 18080
PORTS = 200
"""Of each lane."""


def gpu_index() -> int:
    """Number of the first visible GPU, as the driver's own tools count."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip()
    return int(first) if first.isdigit() else 0


def root() -> Path:
    """The folder that run.sh unpacks engine, plugin and models to."""
    return Path(os.environ.get("KVC_ROOT", "/tmp/k"))


def sglang_site() -> Path:
    """The folder with SGLang that sglang.sh unpacks, beside the one with vLLM."""
    return Path(f"{root()}-sglang") / "site"


def first_port() -> int:
    return FIRST_PORT + PORTS * gpu_index()
