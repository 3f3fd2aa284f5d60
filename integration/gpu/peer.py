"""kvcached 0.1.6, the published system that we compare with: how it is switched on.

It is a package of the same name as our command, and it listens to the same variable, so an engine
must see one of the two only. It is built on the GPU machine (run.sh, about 27 s) from its own
sources, and supports vLLM up to 0.30. What is set here is what its README asks for, and nothing
that tunes it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path

from integration.gpu.lane import root
from integration.gpu.process import environment

VERSION = "0.1.6"
FOLDER = root() / "peer"
BUILT = "peer.ready"
"""Beside the folder, once the build is done; ``peer.failed`` if it came to nothing."""
HEADROOM = 0.05
"""Of the device, which it leaves free: KVCACHED_GPU_UTILIZATION is 0.95 unless set."""


def hook(folder: Path, work: Path) -> Path:
    """A folder for PYTHONPATH that makes every Python process run the package's ``.pth`` file.

    A folder that is only on PYTHONPATH has no ``.pth`` files run, so its patches would not come,
    and the engine would silently be a stock one.
    """
    made = work / "peer-hook"
    made.mkdir(exist_ok=True)
    (made / "sitecustomize.py").write_text(f"import site\n\nsite.addsitedir({str(folder)!r})\n")
    return made


def without_us(path: str) -> list[str]:
    """The entries of a PYTHONPATH that do not have our plugin installed in them."""
    entries = [entry for entry in path.split(os.pathsep) if entry]
    return [e for e in entries if not any(Path(e).glob("kvcached_plugins-*.dist-info"))]


def peer_environment(
    name: str, extra: Mapping[str, str], cache: Path, folder: Path, work: Path
) -> dict[str, str]:
    """The environment of an engine that kvcached serves, and our plugin does not."""
    env = environment(False, extra, cache)
    kept = without_us(env.get("PYTHONPATH", ""))
    return {
        **{key: value for key, value in env.items() if not key.startswith("KVCACHED_")},
        "PYTHONPATH": os.pathsep.join([str(hook(folder, work)), *kept]),
        "ENABLE_KVCACHED": "true",
        "KVCACHED_AUTOPATCH": "1",
        "KVCACHED_IPC_NAME": f"kvcached_{name}_{os.getpid()}",
    }


def missing(folder: Path, wait_s: float) -> str | None:
    """Why kvcached cannot be run, after waiting for its build; None when it can."""
    ready, failed = folder.with_name(BUILT), folder.with_name("peer.failed")
    until = time.time() + wait_s
    while not ready.exists():
        if failed.exists():
            return f"kvcached {VERSION} could not be built: see {folder}.log"
        if time.time() >= until:
            return f"kvcached {VERSION} is not built in {folder}: run prepare.sh with PEER=1"
        time.sleep(0.2)
    return None


def ballast_bytes(free_bytes: int, total_bytes: int, kv_bytes: int) -> int:
    """How much of the device must be taken away for the rest to be ``kv_bytes`` in kvcached's eyes.

    It has no budget: it takes what is free, but for its headroom. What it maps before the first
    request (its published floor is 0.77 to 1.4 GB for each engine) it has on top.
    """
    return max(0, free_bytes - kv_bytes - int(HEADROOM * total_bytes))
