"""Which engines belong to an API server, and how they come to its /metrics."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import types
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY, CollectorRegistry

from kvcached_plugins.vllm import metrics
from kvcached_plugins.vllm.server import own_engines
from kvcached_vmm.account import Account
from kvcached_vmm.ledger import Ledger
from kvcached_vmm.records import AccountView
from kvcached_vmm.units import MIB

ONE = Namespace(api_server_count=None)
TWO = Namespace(api_server_count=2)

STARTS_ANOTHER = """
import subprocess, sys
other = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"])
print(other.pid, flush=True)
other.wait()
"""
"""Both end when nothing more is to be read."""


@pytest.fixture
def account(folder: Path) -> Iterator[Account]:
    account = Ledger.open(folder, "host").join("llama", 64 * MIB)
    yield account
    account.close()


@pytest.fixture
def view(account: Account) -> AccountView:
    return account.view().accounts[0]


def test_an_engine_is_ours_in_this_process_or_below_it(view: AccountView) -> None:
    mine = own_engines(ONE)
    assert mine(view)
    with subprocess.Popen(
        [sys.executable, "-c", STARTS_ANOTHER], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        grandchild = int(child.stdout.readline())
        assert mine(dataclasses.replace(view, pid=child.pid))
        assert mine(dataclasses.replace(view, pid=grandchild))
        child.communicate()
    assert not own_engines(ONE)(dataclasses.replace(view, pid=grandchild))


def test_a_process_is_looked_up_once_and_a_later_one_of_its_number_again(
    monkeypatch: pytest.MonkeyPatch, view: AccountView
) -> None:
    mine = own_engines(ONE)
    assert mine(view)
    monkeypatch.setattr(mine, "_is_below", lambda pid: False)
    assert mine(view)
    assert not mine(dataclasses.replace(view, started=view.started + 1))


def test_what_is_above_or_elsewhere_is_not_ours(view: AccountView) -> None:
    mine = own_engines(ONE)
    assert not mine(dataclasses.replace(view, pid=os.getppid()))
    assert not mine(dataclasses.replace(view, pid=1))
    assert not mine(dataclasses.replace(view, namespace=view.namespace + 1))


def test_one_of_several_api_servers_shares_what_its_parent_started(
    monkeypatch: pytest.MonkeyPatch, view: AccountView
) -> None:
    parent = types.SimpleNamespace(pid=os.getppid())
    monkeypatch.setattr("multiprocessing.parent_process", lambda: parent)
    assert own_engines(TWO).root_pid == os.getppid()
    assert own_engines(TWO)(dataclasses.replace(view, pid=os.getppid()))
    assert own_engines(ONE).root_pid == os.getpid()
    assert own_engines(None).root_pid == os.getpid()
    monkeypatch.setattr("multiprocessing.parent_process", lambda: None)
    assert own_engines(TWO).root_pid == os.getpid()


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch, account: Account, folder: Path) -> Iterator[Any]:
    """A function that builds vLLM's page, with the registry that vLLM would have; its client."""
    fastapi = pytest.importorskip("fastapi", reason="comes with vLLM")
    testclient = pytest.importorskip("starlette.testclient", reason="comes with vLLM")
    monkeypatch.setenv("KVCACHED_DIR", str(folder))
    before = set(REGISTRY._collector_to_names)

    def served(registry: CollectorRegistry) -> Any:
        def get_prometheus_registry() -> CollectorRegistry:
            return registry

        prometheus = types.ModuleType("vllm.v1.metrics.prometheus")
        vars(prometheus)["get_prometheus_registry"] = get_prometheus_registry
        for name in ("vllm", "vllm.v1", "vllm.v1.metrics"):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        monkeypatch.setitem(sys.modules, prometheus.__name__, prometheus)
        app = fastapi.FastAPI()
        app.state.args = ONE

        def original(app: Any) -> str:
            app.add_route("/metrics", lambda _: fastapi.Response("vLLM's"))
            return "made"

        assert metrics.attach_router(original, app) == "made"
        return testclient.TestClient(app)

    yield served
    for collector in set(REGISTRY._collector_to_names) - before:
        REGISTRY.unregister(collector)
    metrics._with_us.discard(REGISTRY)


def test_one_api_server_gets_our_figures_into_its_own_registry(served: Any) -> None:
    for _ in range(2):  # a second app in the process does not register them again
        assert served(REGISTRY).get("/metrics").text == "vLLM's"
        labels = {"device": "host"}
        assert REGISTRY.get_sample_value("kvcached_budget_bytes", labels) == 64 * MIB


def test_several_api_servers_answer_on_our_route(served: Any) -> None:
    answer = served(CollectorRegistry()).get("/metrics")
    assert 'kvcached_budget_bytes{device="host"}' in answer.text
    assert answer.headers["content-type"].startswith("text/plain; version=")
