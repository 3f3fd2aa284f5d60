"""A start that cannot be elastic stops with one sentence: what, which value, what to do."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import pytest

from integration.conftest import elastic_env
from integration.engine import Ran, run_script
from integration.sglang_engine import needs_sglang, serve_sglang, with_shim

pytestmark = [pytest.mark.engine, needs_sglang]

# Imports SGLang's server once, then starts it once per case in a child process.
STARTER = """
import json, os, runpy, signal, sys
import sglang.launch_server, sglang.srt.entrypoints.http_server

cases, logs = json.load(open(sys.argv[1])), sys.argv[2]
codes = {}
for name, (variables, command) in cases.items():
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        signal.alarm(100)
        log = os.open(f"{logs}/{name}.log", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.update(variables)
        sys.argv = command
        runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)
        os._exit(0)
    codes[name] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
print("CODES", json.dumps(codes))
"""


class Mistake(NamedTuple):
    """What is wrong with a start, and what the refusal has to name."""

    words: tuple[str, ...]
    variables: Mapping[str, str] = MappingProxyType({})
    arguments: tuple[str, ...] = ()


# Every argument that is refused: tests/test_sglang_plugin.py.
MISTAKES = {
    "neither on nor off": Mistake(
        ("ENABLE_KVCACHED='maybe'", "one of"), {"ENABLE_KVCACHED": "maybe"}
    ),
    "no size": Mistake(("KVCACHED_BUDGET='plenty'", "a size"), {"KVCACHED_BUDGET": "plenty"}),
    "poison that has to know blocks": Mistake(
        ("KVCACHED_POISON='nan'", "set it to large"), {"KVCACHED_POISON": "nan"}
    ),
    "a host cache": Mistake(
        ("HiCache", "unset ENABLE_KVCACHED"), {}, ("--enable-hierarchical-cache",)
    ),
    "a tiny budget": Mistake(("16 tokens", "raise KVCACHED_BUDGET"), {"KVCACHED_BUDGET": "64KiB"}),
}


@pytest.fixture(scope="module")
def starts(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ran]:
    folder = tmp_path_factory.mktemp("starts")
    cases = {}
    for name, mistake in MISTAKES.items():
        variables = {**elastic_env(folder / "ledger"), **mistake.variables}
        cases[name] = (variables, [*serve_sglang(model)[2:], "--port", "0", *mistake.arguments])
    (folder / "starter.py").write_text(STARTER)
    (folder / "spec.json").write_text(json.dumps(cases))
    command = [sys.executable, str(folder / "starter.py"), str(folder / "spec.json"), str(folder)]
    ran = run_script(command, folder / "log", env=with_shim(), timeout_s=400)
    codes = re.search(r"CODES (.*)", ran.output)
    assert codes, ran.end()
    return {
        name: Ran(code, (folder / f"{name}.log").read_text(errors="replace"))
        for name, code in json.loads(codes[1]).items()
    }


def refusal(ran: Ran) -> str:
    """The sentence that a start ended with; fails on another sentence or on none.

    A child process that refuses says so, and its parent says the same.
    """
    assert ran.code > 0, ran.end()
    assert "Traceback" not in ran.output, ran.end()
    sentences = {line for line in ran.output.splitlines() if line.startswith("kvcached: ")}
    assert len(sentences) == 1, ran.end()
    return sentences.pop()


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_refused(name: str, starts: dict[str, Ran]) -> None:
    sentence = refusal(starts[name])

    assert [word for word in MISTAKES[name].words if word not in sentence] == [], sentence


def test_an_unknown_version_of_sglang_is_refused(model: Path, tmp_path: Path) -> None:
    spec = find_spec("sglang")
    assert spec is not None
    assert spec.origin is not None
    site = tmp_path / "site"
    (site / "sglang").mkdir(parents=True)
    for entry in Path(spec.origin).parent.iterdir():
        if entry.name not in ("_version.py", "version.py", "__pycache__"):
            (site / "sglang" / entry.name).symlink_to(entry)
    text = '__version__ = version = "0.9.9"\n'
    (site / "sglang" / "_version.py").write_text(text)
    (site / "sglang" / "version.py").write_text(text)
    metadata = site / "sglang-0.9.9.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: sglang\nVersion: 0.9.9\n")
    env = with_shim(elastic_env(tmp_path / "ledger"))
    env["PYTHONPATH"] = f"{site}:{env['PYTHONPATH']}"

    ran = run_script(serve_sglang(model), tmp_path / "log", env=env, timeout_s=120)

    sentence = refusal(ran)
    assert "sglang 0.9.9 " in sentence
    assert sentence.endswith("unset ENABLE_KVCACHED")
