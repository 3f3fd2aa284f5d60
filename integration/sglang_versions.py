"""Other releases of SGLang beside the one that the tests pin, on the CPU, off and on.

    .venv-sglang/bin/python -m integration.sglang_versions 0.5.17     # after make test-sglang

Lays the published wheel of each release over the environment of the tests, without what it
requires, and starts its stock server twice. Prints whether the tokens are the same, and what the KV
range holds under load, after a flush, asleep and idle. A release may need other packages than those
that are there; then it does not start, off or on.
"""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from integration.conftest import elastic_env, random_prompt, write_test_model
from integration.engine import MIB, Request, wait_until
from integration.sglang_engine import EXTENT_BYTES, SHIM, SGLangServer

BUDGET_BYTES = 12 * MIB


def overlay(version: str, folder: Path) -> Path:
    """A folder with the published wheel of a release, for PYTHONPATH."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    command = [*pip, "download", "--no-deps", f"--dest={folder}", f"sglang=={version}"]
    subprocess.run(command, check=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder / "site")
    return folder / "site"


def compare(version: str, model: Path, folder: Path) -> dict[str, object]:
    """What one release does, elastic against stock."""
    site = overlay(version, folder)
    rng = random.Random(3)
    requests = [Request(random_prompt(rng.randint(30, 300), rng), 24) for _ in range(16)]
    path = {"PYTHONPATH": f"{site}:{SHIM}"}
    stock = SGLangServer(model, folder / "off.log", env=path)
    try:
        stock.wait_ready()
        expected = stock.complete_all(requests, concurrency=16)
    finally:
        stock.stop()
    env = {
        **path,
        **elastic_env(folder / "ledger"),
        "KVCACHED_BUDGET": f"{BUDGET_BYTES}",
        "KVCACHED_EXTENT": f"{EXTENT_BYTES}",
        "KVCACHED_CACHE_TTL": "3",
    }
    server = SGLangServer(model, folder / "on.log", env=env)
    try:
        server.wait_ready()
        found: dict[str, object] = {"same": server.complete_all(requests, 16) == expected}
        found["loaded"] = server.kv_bytes()
        server.tell("/flush_cache")
        wait_until(lambda: server.kv_bytes() <= EXTENT_BYTES, 10.0)
        found["flushed"] = server.kv_bytes()
        server.tell("/release_memory_occupation", tags=["kv_cache"])
        found["asleep"] = server.kv_bytes()
        server.tell("/resume_memory_occupation", tags=["kv_cache"])
        found["same again"] = server.complete_all(requests, 16) == expected
        wait_until(lambda: server.kv_bytes() <= EXTENT_BYTES, 20.0)
        found["idle"] = server.kv_bytes()
    finally:
        server.stop()
    return found


def main() -> None:
    with tempfile.TemporaryDirectory() as root:
        model = Path(root) / "model"
        model.mkdir()
        write_test_model(model)
        for version in sys.argv[1:]:
            folder = Path(root) / version
            folder.mkdir()
            print(version, compare(version, model, folder), flush=True)


if __name__ == "__main__":
    main()
