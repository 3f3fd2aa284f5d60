"""User scripts: the variable unset or false leaves vLLM alone; set inside the script, it counts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from integration.engine import MAX_MODEL_LEN, engine_processes_env, kv_bytes, needs_vllm, run_script

pytestmark = [pytest.mark.engine, needs_vllm]

ENTRY_POINT = {"kvcached_plugins", "kvcached_plugins.vllm", "kvcached_plugins.vllm.plugin"}

SCRIPT = """
import os
import sys

if __name__ == "__main__":
    from vllm import LLM, SamplingParams

    os.environ.update({variables!r})
    llm = LLM(model={model!r}, dtype="float32", enforce_eager=True, **{engine!r})
    greedy = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True)
    prompts = [{{"prompt_token_ids": [7 + i] * 1500}} for i in range(8)]
    for _ in range(2):
        print("TOKENS", [list(each.outputs[0].token_ids) for each in llm.generate(prompts, greedy)])

    import vllm.v1.core.block_pool as defined
    import vllm.v1.core.kv_cache_coordinator as used
    print("STOCK POOL", used.BlockPool is defined.BlockPool)
    print("LAST LINE")
"""


def write_script(folder: Path, model: Path, variables: dict[str, str], **engine: int) -> Path:
    """SCRIPT as a file: it imports vLLM, sets `variables`, then makes `LLM(**engine)`."""
    script = folder / "script.py"
    engine = {"max_model_len": MAX_MODEL_LEN, **engine}
    script.write_text(SCRIPT.format(variables=variables, model=str(model), engine=engine))
    return script


@pytest.mark.parametrize(
    ("switch", "processes"), [(None, "many processes"), ("false", "one process")]
)
def test_switched_off_nothing_of_ours_is_imported_or_made(
    switch: str | None, processes: str, model: Path, plugin: None, tmp_path: Path
) -> None:
    """Python itself lists every import of every process of the engine."""
    home = tmp_path / "home"
    home.mkdir()
    script = write_script(tmp_path, model, {}, kv_cache_memory_bytes=64 << 20)
    env = {
        "HOME": str(home),
        "XDG_RUNTIME_DIR": str(home),
        "XDG_CACHE_HOME": str(home),
        "KVCACHED_DIR": str(home / "kvcached-ledger"),
        "KVCACHED_BUDGET": "nonsense is nobody's business while we are off",
        "PYTHONPROFILEIMPORTTIME": "1",
        **engine_processes_env(processes),
        **({"ENABLE_KVCACHED": switch} if switch else {}),
    }

    ran = run_script([str(script)], tmp_path / "log", env=env)

    assert ran.code == 0, ran.end()
    imported = set(re.findall(r"\| +(kvcached[\w.]*)", ran.output))
    assert "import time:" in ran.output
    assert imported <= ENTRY_POINT
    assert "STOCK POOL True" in ran.output
    assert [path for path in home.rglob("*") if "kvcached" in path.name] == []


@pytest.mark.parametrize("processes", ["one process", "many processes"])
def test_the_variable_set_in_a_script_before_the_engine_is_made_counts(
    processes: str, model: Path, plugin: None, tmp_path: Path
) -> None:
    variables = {"ENABLE_KVCACHED": "1", "KVCACHED_DIR": str(tmp_path / "ledger")}
    script = write_script(tmp_path, model, variables)
    sizes = [0]

    ran = run_script(
        [str(script)],
        tmp_path / "log",
        env=engine_processes_env(processes),
        watch=lambda pid: sizes.append(kv_bytes(pid)),
    )

    assert ran.code == 0, ran.end()
    assert "LAST LINE" in ran.output
    assert max(sizes) > 0, f"no elastic KV range was seen; {ran.end()}"
    first, second = re.findall(r"TOKENS (.*)", ran.output)
    assert first == second
