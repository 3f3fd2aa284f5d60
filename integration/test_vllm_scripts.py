"""User scripts: the variable unset or false leaves vLLM alone; set inside the script, it counts."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import NamedTuple

import pytest

from integration.conftest import asked_for, cases, elastic_env
from integration.engine import MAX_MODEL_LEN, ONE_PROCESS, Ran, kv_bytes, needs_vllm, run_script

pytestmark = [pytest.mark.engine, needs_vllm]

ENTRY_POINT = {"kvcached_plugins", "kvcached_plugins.vllm", "kvcached_plugins.vllm.plugin"}

SCRIPT = """
import os
import sys

if __name__ == "__main__":
    from vllm import LLM, SamplingParams

    os.environ.update({variables!r})
    llm = LLM(model={model!r}, dtype="float32", enforce_eager=True, **{engine!r})
    greedy = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    prompts = [{{"prompt_token_ids": [7 + i] * 1500}} for i in range(8)]
    for _ in range(2):
        print("TOKENS", [list(each.outputs[0].token_ids) for each in llm.generate(prompts, greedy)])

    import vllm.v1.core.block_pool as defined
    import vllm.v1.core.kv_cache_coordinator as used
    print("STOCK POOL", used.BlockPool is defined.BlockPool)
    print("LAST LINE")
"""


# Python runs it first in every process. Its own lists of imports are slow, or leave out what comes
# by importlib.
SITECUSTOMIZE = """
import os
import sys


class Recorder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.startswith("kvcached"):
            os.write(2, f"IMPORTED {name}\\n".encode())


sys.meta_path.insert(0, Recorder)
"""

MANY_PROCESSES = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
OFF = {
    "unset, many processes": MANY_PROCESSES,
    "false, one process": {**ONE_PROCESS, "ENABLE_KVCACHED": "false"},
}
ON = {"one process": ONE_PROCESS, "many processes": MANY_PROCESSES}
LONG = {"unset, many processes", "many processes"}


class Script(NamedTuple):
    """How a script ended, and the most KV memory that it was seen to hold."""

    ran: Ran
    home: Path
    peak_bytes: int


@pytest.fixture(scope="module")
def scripts(
    request: pytest.FixtureRequest,
    lanes: Executor,
    plugin: None,
    model: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Future[Script]]:
    """The scripts of all tests here, started together."""
    made = {}
    surroundings = {**OFF, **ON}
    for name in asked_for(request, "name"):
        env = surroundings[name]
        home = tmp_path_factory.mktemp("home")
        run = off if name in OFF else on
        made[name] = lanes.submit(run, model, home, env)
    return made


def off(model: Path, home: Path, env: Mapping[str, str]) -> Script:
    """In surroundings where every process says what it imports, and we would leave a trace."""
    (home / "sitecustomize.py").write_text(SITECUSTOMIZE)
    surroundings = {
        "HOME": str(home),
        "XDG_RUNTIME_DIR": str(home),
        "XDG_CACHE_HOME": str(home),
        "VLLM_CACHE_ROOT": str(Path.home() / ".cache" / "vllm"),
        "KVCACHED_DIR": str(home / "kvcached-ledger"),
        "KVCACHED_BUDGET": "nonsense is nobody's business while we are off",
        "PYTHONPATH": str(home),
    }
    return run(model, home, {}, {**surroundings, **env}, kv_cache_memory_bytes=64 << 20)


def on(model: Path, home: Path, env: Mapping[str, str]) -> Script:
    return run(model, home, elastic_env(home / "ledger"), env)


def run(
    model: Path, home: Path, variables: dict[str, str], env: Mapping[str, str], **engine: int
) -> Script:
    """SCRIPT as a file in `home`: it imports vLLM, sets `variables`, then makes `LLM(**engine)`."""
    script = home / "script.py"
    engine = {"max_model_len": MAX_MODEL_LEN, **engine}
    script.write_text(SCRIPT.format(variables=variables, model=str(model), engine=engine))
    sizes = [0]
    ran = run_script(
        [sys.executable, str(script)],
        home / "log",
        env=env,
        watch=lambda pid: sizes.append(kv_bytes(pid)),
    )
    return Script(ran, home, max(sizes))


@pytest.mark.parametrize("name", cases(OFF, LONG))
def test_switched_off_nothing_of_ours_is_imported_or_made(
    name: str, scripts: dict[str, Future[Script]]
) -> None:
    ran, home, peak_bytes = scripts[name].result()

    assert ran.code == 0, ran.end()
    assert set(re.findall(r"IMPORTED (.*)", ran.output)) == ENTRY_POINT
    assert "STOCK POOL True" in ran.output
    assert peak_bytes == 0
    assert [path for path in home.rglob("*") if "kvcached" in path.name] == []


@pytest.mark.parametrize("name", cases(ON, LONG))
def test_the_variable_set_in_a_script_before_the_engine_is_made_counts(
    name: str, scripts: dict[str, Future[Script]]
) -> None:
    ran, _, peak_bytes = scripts[name].result()

    assert ran.code == 0, ran.end()
    assert "LAST LINE" in ran.output
    assert peak_bytes > 0, f"no elastic KV range was seen; {ran.end()}"
    first, second = re.findall(r"TOKENS (.*)", ran.output)
    assert first == second
