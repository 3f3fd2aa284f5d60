"""Stock SGLang for the tests: a scheduler in a process of its own, or a whole server."""

from __future__ import annotations

import importlib.util
import json
import os
import runpy
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from integration.engine import MIB, Request, Server, run_script

SHIM = Path(__file__).with_name("sglang_cpu_shim")
PROGRAM = Path(__file__).with_name("sglang_scheduler.py")

needs_sglang = pytest.mark.skipif(
    importlib.util.find_spec("sglang") is None,
    reason="SGLang is not installed in this environment; `make test-sglang` sets one up",
)

CONTEXT_TOKENS = 2048
CAPACITY_TOKENS = 16384
TOKEN_BYTES = 4096
"""KV of one token of the model in conftest.py: keys and values, 4 layers, 2 heads of 64 floats."""

EXTENT_BYTES = MIB


def with_shim(variables: Mapping[str, str] | None = None) -> dict[str, str]:
    """``variables`` of a process that runs SGLang, with what it lacks on the ``PYTHONPATH``."""
    found = dict(variables or {})
    path = found.get("PYTHONPATH") or os.environ.get("PYTHONPATH")
    return {**found, "PYTHONPATH": os.pathsep.join(filter(None, [path, str(SHIM)]))}


class Scheduled(NamedTuple):
    """What a scheduler produced, and one report per line of its script."""

    tokens: list[list[int]]
    phases: list[dict[str, Any]]
    log: str


def schedule(
    model: Path,
    requests: Sequence[Request],
    script: Sequence[Sequence[Any]],
    folder: Path,
    *,
    env: Mapping[str, str] | None = None,
    timeout_s: float = 1200.0,
    **arguments: Any,
) -> Scheduled:
    """Run ``script`` (see ``sglang_scheduler.py``) on a stock scheduler."""
    folder.mkdir(exist_ok=True)
    defaults = {
        "model_path": str(model),
        "context_length": CONTEXT_TOKENS,
        "max_total_tokens": CAPACITY_TOKENS,
    }
    spec = {"arguments": {**defaults, **arguments}, "requests": requests, "script": script}
    (folder / "spec.json").write_text(json.dumps(spec))
    command = [sys.executable, str(PROGRAM), str(folder / "spec.json"), str(folder / "out.json")]
    ran = run_script(command, folder / "log", env=with_shim(env), timeout_s=timeout_s)
    assert ran.code == 0, ran.end()
    found = json.loads((folder / "out.json").read_text())
    return Scheduled(found["tokens"], found["phases"], ran.output)


def serve_sglang(model: Path) -> list[str]:
    """`python -m sglang.launch_server` with the arguments that every server of these tests gets."""
    return [
        *(sys.executable, "-m", "sglang.launch_server", "--model-path", str(model)),
        *("--served-model-name", "model", "--device", "cpu", "--dtype", "float32"),
        *("--attention-backend", "torch_native", "--sampling-backend", "pytorch"),
        *("--context-length", str(CONTEXT_TOKENS), "--max-total-tokens", str(CAPACITY_TOKENS)),
        *("--skip-tokenizer-init", "--skip-server-warmup", "--log-level", "warning"),
    ]


class SGLangServer(Server):
    """`python -m sglang.launch_server`, with its scheduler and detokenizer."""

    def __init__(
        self, model: Path, log: Path, *, env: Mapping[str, str], arguments: Sequence[str] = ()
    ) -> None:
        super().__init__(model, log, env=with_shim(env), arguments=arguments)

    def command(self, model: Path) -> list[str]:
        return serve_sglang(model)

    def complete(self, request: Request) -> list[int]:
        """The token ids that the server generates greedily for one request."""
        sampling = {"temperature": 0, "max_new_tokens": request.max_tokens, "ignore_eos": True}
        answer = self._http.post(
            "/generate", json={"input_ids": request.prompt, "sampling_params": sampling}
        )
        assert answer.status_code == 200, f"{answer.status_code} {answer.text}\n{self}"
        return [int(token) for token in answer.json()["output_ids"]]

    def elastic(self) -> dict[str, int]:
        """What /server_info says about the elastic cache."""
        answer = self._http.get("/server_info")
        assert answer.status_code == 200, f"{answer.status_code} {answer.text}\n{self}"
        return dict(answer.json()["internal_states"][0]["kvcached"])

    def tell(self, path: str, **body: Any) -> None:
        """POST to an administrator's address."""
        answer = self._http.post(path, json=body)
        assert answer.status_code == 200, f"{path}: {answer.status_code} {answer.text}\n{self}"


_shim: dict[str, Any] = {}


def use_shim() -> None:
    """Let this process import SGLang: for tests of its parts. Done already where the shim is on the
    ``PYTHONPATH``."""
    at_start = getattr(sys.modules.get("sitecustomize"), "__file__", None)
    if not _shim and at_start != str(SHIM / "sitecustomize.py"):
        _shim.update(runpy.run_path(str(SHIM / "sitecustomize.py")))
        sys.path.insert(0, str(SHIM))
