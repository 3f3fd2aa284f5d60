"""A user's mistake stops the start with one sentence: what, which value, what is accepted."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from integration.engine import Ran, engine_arguments, needs_vllm, run_script

pytestmark = [pytest.mark.engine, needs_vllm]

SERVE = "vllm.entrypoints.openai.api_server"

# Imports vLLM once, then starts its server once per case in a child process: 2 s each, not 12.
STARTER = f"""
import json, os, runpy, signal, sys

spec, logs = json.load(open(sys.argv[1])), sys.argv[2]
import vllm.entrypoints.openai.api_server
import vllm.entrypoints.launchers.api_server.entry
codes = []
for number, variables in enumerate(spec["cases"]):
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)
        log = os.open(f"{{logs}}/{{number}}", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.update(variables)
        sys.argv = ["api_server", *spec["arguments"]]
        runpy.run_module({SERVE!r}, run_name="__main__")
        os._exit(0)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
print("CODES", json.dumps(codes))
"""

NONSENSE = [
    ("ENABLE_KVCACHED", "maybe", "one of"),
    ("KVCACHED_BUDGET", "plenty", "a size"),
    ("KVCACHED_BUDGET", "0", "a size"),
    ("KVCACHED_MAX", "-1GiB", "a size"),
    ("KVCACHED_MIN", "12 apples", "a size"),
    ("KVCACHED_CACHE_MAX", "50%", "a size"),
    ("KVCACHED_CACHE_TTL", "a while", "seconds"),
    ("KVCACHED_CACHE_TTL", "nan", "seconds"),
    ("KVCACHED_DECAY", "-1", "seconds"),
    ("KVCACHED_EXTENT", "0", "a size"),
    ("KVCACHED_RESERVE", "1e9e9", "a size"),
    ("KVCACHED_NAME", "a/b", "printable"),
    ("KVCACHED_DIR", "relative/folder", "absolute"),
    ("KVCACHED_LOG", "loud", "DEBUG"),
]


def case_name(case: tuple[str, str, str]) -> str:
    return f"{case[0]}={case[1]}"


def one_sentence(output: str, *words: str) -> str:
    """The only line of `output` with all of `words`; fails also on a traceback."""
    assert "Traceback" not in output, output[-4000:]
    lines = [line for line in output.splitlines() if all(word in line for word in words)]
    assert len(lines) == 1, f"{len(lines)} lines name {words}:\n{output[-4000:]}"
    return lines[0]


@pytest.fixture(scope="module")
def starts_with_nonsense(
    plugin: None, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Ran]:
    """How a server ended for each case of NONSENSE."""
    folder = tmp_path_factory.mktemp("nonsense")
    starter, spec = folder / "starter.py", folder / "spec.json"
    starter.write_text(STARTER)
    base = {"ENABLE_KVCACHED": "1", "KVCACHED_DIR": str(folder / "ledger")}
    cases = [{**base, variable: value} for variable, value, _ in NONSENSE]
    spec.write_text(json.dumps({"cases": cases, "arguments": engine_arguments(model)}))

    ran = run_script([str(starter), str(spec), str(folder)], folder / "log", timeout_s=240)

    found = re.search(r"CODES (.*)", ran.output)
    assert found, ran.end()
    codes = json.loads(found[1])
    return {
        case_name(case): Ran(code, (folder / str(number)).read_text(errors="replace"))
        for number, (case, code) in enumerate(zip(NONSENSE, codes, strict=True))
    }


@pytest.mark.parametrize("case", NONSENSE, ids=case_name)
def test_nonsense_in_a_variable_is_refused(
    case: tuple[str, str, str], starts_with_nonsense: dict[str, Ran]
) -> None:
    variable, value, accepted = case

    ran = starts_with_nonsense[case_name(case)]

    assert ran.code > 0, ran.output[-2000:]
    assert accepted in one_sentence(ran.output, variable, value)


def serve(model: Path, folder: Path, env: dict[str, str], *arguments: str) -> Ran:
    """Start a server that is expected to refuse; returns how it ended."""
    command = ["-m", SERVE, *engine_arguments(model), *arguments]
    return run_script(command, folder / "log", env=env, timeout_s=90)


def test_a_budget_below_one_request_is_refused(
    model: Path, elastic_env: dict[str, str], tmp_path: Path
) -> None:
    ran = serve(model, tmp_path, {**elastic_env, "KVCACHED_BUDGET": "4MiB"})

    assert ran.code > 0, ran.end()
    assert "4 MiB" in one_sentence(ran.output, "KVCACHED_BUDGET", "2048")


@pytest.mark.parametrize("mistake", ["everybody may write", "a file", "somebody else's"])
def test_a_folder_that_cannot_hold_the_ledger_is_refused(
    mistake: str, model: Path, elastic_env: dict[str, str], tmp_path: Path
) -> None:
    folder = tmp_path / "shared"
    if mistake == "a file":
        folder.write_text("not a folder")
    else:
        folder.mkdir()
    if mistake == "everybody may write":
        folder.chmod(0o777)
    if mistake == "somebody else's":
        if os.geteuid() != 0:
            pytest.skip("only root can give a folder away")
        os.chown(folder, 12345, 12345)

    ran = serve(model, tmp_path, {**elastic_env, "KVCACHED_DIR": str(folder)})

    assert ran.code > 0, ran.end()
    assert "KVCACHED_DIR" in one_sentence(ran.output, str(folder))


def test_a_connector_is_refused(model: Path, elastic_env: dict[str, str], tmp_path: Path) -> None:
    transfer = json.dumps({"kv_connector": "ExampleConnector", "kv_role": "kv_both"})

    ran = serve(model, tmp_path, elastic_env, "--kv-transfer-config", transfer)

    assert ran.code > 0, ran.end()
    assert "connector" in one_sentence(ran.output, "kvcached:", "unset ENABLE_KVCACHED")
