"""A user's mistake stops the start with one sentence: what, which value, what is accepted."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from concurrent.futures import Executor, Future
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest

from integration.conftest import elastic_env
from integration.engine import Ran, needs_vllm, run_script, serve_command
from kvcached_plugins.contract import supported

pytestmark = [pytest.mark.engine, needs_vllm]

# Imports vLLM once, then starts its server once per case in a child process: 2 s each, not 10.
STARTER = """
import json, os, runpy, signal, sys

cases, logs = json.load(open(sys.argv[1])), sys.argv[2]
import vllm.entrypoints.openai.api_server
import vllm.entrypoints.launchers.api_server.entry
import vllm.entrypoints.cli.benchmark.main
import vllm.entrypoints.cli.launch
import vllm.entrypoints.cli.serve
codes = {}
for name, (variables, command) in cases.items():
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)
        log = os.open(f"{logs}/{name}.log", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.update(variables)
        if command[1] == "-m":
            sys.argv = command[2:]
            runpy.run_module(sys.argv[0], run_name="__main__")
        else:
            sys.argv = command
            runpy.run_path(sys.argv[0], run_name="__main__")
        os._exit(0)
    codes[name] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
print("CODES", json.dumps(codes))
"""

CONNECTOR = json.dumps({"kv_connector": "ExampleConnector", "kv_role": "kv_both"})


class Mistake(NamedTuple):
    """What is wrong with a start, and what the refusal has to name.

    `spoil` makes the folder of the ledger, which has the name of the case.
    """

    words: tuple[str, ...]
    variables: dict[str, str]
    arguments: tuple[str, ...] = ()
    spoil: Callable[[Path], object] = Path.mkdir


def not_a_folder(path: Path) -> None:
    path.write_text("not a folder")


def for_everybody(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o777)


def given_away(folder: Path) -> None:
    folder.mkdir()
    if os.geteuid() == 0:
        os.chown(folder, 12345, 12345)


# Every variable and many more values of each: tests/test_settings.py.
MISTAKES = {
    "neither on nor off": Mistake(
        ("ENABLE_KVCACHED='maybe'", "one of"), {"ENABLE_KVCACHED": "maybe"}
    ),
    "no size": Mistake(("KVCACHED_BUDGET='plenty'", "a size"), {"KVCACHED_BUDGET": "plenty"}),
    "no time": Mistake(("KVCACHED_CACHE_TTL='nan'", "seconds"), {"KVCACHED_CACHE_TTL": "nan"}),
    "a file": Mistake(("KVCACHED_DIR", "/a file"), {}, spoil=not_a_folder),
    "for everybody": Mistake(("KVCACHED_DIR", "/for everybody"), {}, spoil=for_everybody),
    "given away": Mistake(("KVCACHED_DIR", "/given away"), {}, spoil=given_away),
    "a connector": Mistake(
        ("KV connector", "ExampleConnector", "unset ENABLE_KVCACHED"),
        {},
        ("--kv-transfer-config", CONNECTOR),
    ),
}


class Starts(NamedTuple):
    """How servers ended that were expected to refuse, soon."""

    mistakes: Future[dict[str, Ran]]
    version: Future[Ran]
    budget: Future[Ran]


@pytest.fixture(scope="module")
def starts(
    lanes: Executor, plugin: None, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Starts:
    folder = tmp_path_factory.mktemp("starts")

    def start(name: str, **variables: str) -> Future[Ran]:
        env = {**elastic_env(folder / name), **variables}
        log = folder / f"{name}.log"
        return lanes.submit(run_script, serve_command(model), log, env=env, timeout_s=90)

    return Starts(
        lanes.submit(start_all, MISTAKES, model, tmp_path_factory.mktemp("mistakes")),
        start("version", PYTHONPATH=str(overlay(folder, "0.99.0"))),
        start("budget", KVCACHED_BUDGET="4MiB"),
    )


def start_all(mistakes: dict[str, Mistake], model: Path, folder: Path) -> dict[str, Ran]:
    """Start a server for each of `mistakes`, one after the other, by STARTER."""
    starter, spec = folder / "starter.py", folder / "spec.json"
    starter.write_text(STARTER)
    cases = {}
    for name, mistake in mistakes.items():
        mistake.spoil(folder / name)
        variables = {**elastic_env(folder / name), **mistake.variables}
        cases[name] = (variables, [*serve_command(model), *mistake.arguments])
    spec.write_text(json.dumps(cases))

    command = [sys.executable, str(starter), str(spec), str(folder)]
    ran = run_script(command, folder / "log", timeout_s=240)

    codes = re.search(r"CODES (.*)", ran.output)
    assert codes, ran.end()
    return {
        name: Ran(code, (folder / f"{name}.log").read_text(errors="replace"))
        for name, code in json.loads(codes[1]).items()
    }


def overlay(folder: Path, version: str) -> Path:
    """A folder for PYTHONPATH in which the installed vLLM says that it is another version."""
    spec = find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    site = folder / "site"
    package, metadata = site / "vllm", site / f"vllm-{version}.dist-info"
    package.mkdir(parents=True)
    metadata.mkdir()
    for entry in Path(spec.origin).parent.iterdir():
        if entry.name not in ("_version.py", "__pycache__"):
            (package / entry.name).symlink_to(entry)
    numbers = tuple(map(int, version.split(".")))
    (package / "_version.py").write_text(
        f"__version__ = version = {version!r}\n__version_tuple__ = version_tuple = {numbers}\n"
    )
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n"
    )
    return site


def refusal(ran: Ran) -> str:
    """The sentence that a start ended with; fails on a traceback, on another sentence or on none.

    A child process that refuses says so, and its parent says the same.
    """
    assert ran.code > 0, ran.end()
    assert "Traceback" not in ran.output, ran.end()
    sentences = {line for line in ran.output.splitlines() if line.startswith("kvcached: ")}
    assert len(sentences) == 1, ran.end()
    return sentences.pop()


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_refused(name: str, starts: Starts) -> None:
    if name == "given away" and os.geteuid() != 0:
        pytest.skip("only root can give a folder away")

    sentence = refusal(starts.mistakes.result()[name])

    assert [word for word in MISTAKES[name].words if word not in sentence] == [], sentence


def test_a_budget_below_one_request_is_refused(starts: Starts) -> None:
    sentence = refusal(starts.budget.result())

    assert "KVCACHED_BUDGET is 4 MiB" in sentence
    assert "2048 tokens" in sentence


def test_an_unknown_version_of_vllm_is_refused(starts: Starts) -> None:
    sentence = refusal(starts.version.result())

    assert "vllm 0.99.0 " in sentence
    assert f"supported vllm versions: {', '.join(supported('vllm'))}" in sentence
    assert sentence.endswith("unset ENABLE_KVCACHED")
