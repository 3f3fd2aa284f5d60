"""`kvcached demo` with each engine that is installed here: small, but with all that it does."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from integration.engine import MIB, needs_vllm, run_script
from integration.sglang_engine import needs_sglang, with_shim
from kvcached_plugins.demo import picture

pytestmark = [pytest.mark.engine, pytest.mark.demo]

BUDGET_BYTES = 64 * MIB
COMMAND = [sys.executable, "-c", "from kvcached_plugins.cli import main; main()", "demo"]


@pytest.mark.parametrize(
    "engine",
    [pytest.param("vllm", marks=needs_vllm), pytest.param("sglang", marks=needs_sglang)],
)
def test_two_engines_share_a_budget_that_a_split_wastes(engine: str, tmp_path: Path) -> None:
    options = {
        "--engine": engine,
        "--budget": f"{BUDGET_BYTES // MIB}MiB",
        "--seconds": "1",
        "--json": str(tmp_path / "demo.json"),
        "--out": str(tmp_path / "demo.png"),
    }
    command = [*COMMAND, *(word for option in options.items() for word in option)]
    variables = with_shim() if engine == "sglang" else {}

    ran = run_script(command, tmp_path / "log", env=variables, timeout_s=500)

    assert ran.code == 0, ran.end()
    found = json.loads((tmp_path / "demo.json").read_text())
    elastic, static = (found[mode]["figures"] for mode in ("elastic", "static"))
    assert elastic["failed"] == static["failed"] == 0
    assert elastic["output_tokens"] == static["output_tokens"] > 0
    assert elastic["held_before_bytes"] <= BUDGET_BYTES // 8
    assert BUDGET_BYTES // 2 < elastic["held_peak_of_one_bytes"] <= BUDGET_BYTES
    assert elastic["held_last_bytes"] <= BUDGET_BYTES // 8
    held = static["held_before_bytes"], static["held_last_bytes"]
    assert held[0] == held[1]
    assert 0.9 * BUDGET_BYTES < held[0] <= BUDGET_BYTES, "a split is taken as a whole, and kept"
    assert (tmp_path / "demo.png").exists() == picture.can_draw()
    assert "One budget for both" in ran.output
