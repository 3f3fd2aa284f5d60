"""What `vllm serve` shows of its elastic cache over HTTP, with one API server and with two."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from integration.conftest import elastic_env, random_prompt
from integration.engine import MIB, Request, Server, family, needs_vllm, wait_until
from kvcached_vmm.ledger import Ledger
from kvcached_vmm.records import AccountView, LedgerView

pytestmark = [pytest.mark.engine, needs_vllm]

KEY = "the-key-of-this-server"
BUDGET_BYTES = 64 * MIB
FIGURES = ("committed", "reserved", "live", "cached", "wanted", "minimum")


class Servers(NamedTuple):
    """Two servers in one budget: one API process, and two that take turns and ask for a key."""

    single: Server
    several: Server
    folder: Path


@pytest.fixture(scope="module")
def servers(
    plugin: None, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Servers]:
    logs = tmp_path_factory.mktemp("metrics")
    folder = logs / "ledger"
    env = {**elastic_env(folder), "KVCACHED_BUDGET": str(BUDGET_BYTES), "KVCACHED_EXTENT": "2MiB"}
    named = {"VLLM_PLUGINS": "kvcached,kvcached_endpoint", "VLLM_API_KEY": KEY}
    with contextlib.ExitStack() as started:
        single = Server(model, logs / "single.log", env={**env, "KVCACHED_NAME": "single"})
        started.callback(single.stop)
        several = Server(
            model,
            logs / "several.log",
            env={**env, **named, "KVCACHED_NAME": "several"},
            arguments=["--api-server-count", "2"],
        )
        started.callback(several.stop)
        single.wait_ready()
        several.wait_ready()
        yield Servers(single, several, folder)


@pytest.fixture(params=["single", "several"])
def server(request: pytest.FixtureRequest, servers: Servers) -> Server:
    """Each of the two."""
    return servers.single if request.param == "single" else servers.several


def ledger(folder: Path) -> LedgerView:
    with contextlib.closing(Ledger.open(folder, "host")) as found:
        return found.snapshot()


def account_of(server: Server, folder: Path) -> AccountView:
    pids = {process.pid for process in family(server.process.pid)}
    (account,) = [each for each in ledger(folder).accounts if each.pid in pids]
    return account


def figures(server: Server) -> dict[tuple[str, str], float]:
    """Our samples on /metrics over a fresh connection, by their name and the model's."""
    text = httpx.get(f"{server.url}/metrics", timeout=30).text
    samples = [each for f in text_string_to_metric_families(text) for each in f.samples]
    ours = [each for each in samples if each.name.startswith("kvcached_")]
    found = {(each.name, each.labels.get("model_name", "")): each.value for each in ours}
    assert len(found) == len(ours), "a series is there twice"
    assert any(each.name.startswith("vllm:") for each in samples), "vLLM's own figures are gone"
    return found


def send(server: Server, count: int) -> None:
    """Keep the server busy with `count` requests at a time, until all are answered."""
    rng = random.Random(count)
    requests = [Request(random_prompt(700, rng), 40) for _ in range(count)]

    def complete(request: Request) -> None:
        answer = httpx.post(
            f"{server.url}/v1/completions",
            headers={"Authorization": f"Bearer {KEY}"},
            json={"model": "model", "prompt": request.prompt, "max_tokens": request.max_tokens},
            timeout=120,
        )
        assert answer.status_code == 200, f"{answer.text}\n{server}"

    with ThreadPoolExecutor(count) as threads:
        list(threads.map(complete, requests))


def limits(server: Server, json: object, key: str = KEY) -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.patch(f"{server.url}/kvcached/limits", json=json, headers=headers, timeout=30)


def test_figures_rise_under_load_and_are_the_ledgers(server: Server, servers: Servers) -> None:
    name = account_of(server, servers.folder).name
    committed = "kvcached_committed_bytes", name
    live = "kvcached_live_bytes", name
    before = figures(server)[committed]
    with ThreadPoolExecutor(1) as load:
        done = load.submit(send, server, 12)
        peaks = {committed: 0.0, live: 0.0}
        while not done.done():
            now = figures(server)
            peaks = {each: max(peak, now[each]) for each, peak in peaks.items()}
        done.result()
    assert peaks[committed] >= before + 4 * MIB
    assert peaks[live] > 0

    def agree() -> bool:
        """Looked at until nothing changes in between."""
        account, shown = account_of(server, servers.folder), figures(server)
        return all(
            shown[f"kvcached_{each}_bytes", name] == getattr(account, f"{each}_bytes")
            for each in FIGURES
        )

    assert wait_until(agree, 10), f"{figures(server)}\n{account_of(server, servers.folder)}"
    assert figures(server)["kvcached_budget_bytes", ""] == BUDGET_BYTES


def test_only_engines_of_the_server_are_shown(servers: Servers) -> None:
    assert {each.name for each in ledger(servers.folder).accounts} == {"single", "several"}
    for server, name in ((servers.single, "single"), (servers.several, "several")):
        for _ in range(8):  # whichever of its processes answers
            assert {model for _, model in figures(server)} == {name, ""}


def test_no_routes_unless_they_are_named(servers: Servers) -> None:
    assert httpx.get(f"{servers.single.url}/kvcached").status_code == 404
    assert limits(servers.single, {"weight": 2}).status_code == 404


@pytest.mark.parametrize("key", ["", "another key", KEY + "x"])
def test_without_the_key_nothing_is_told_or_done(servers: Servers, key: str) -> None:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    before = account_of(servers.several, servers.folder)
    answer = httpx.get(f"{servers.several.url}/kvcached", headers=headers)
    assert (answer.status_code, "several" in answer.text) == (401, False)
    assert limits(servers.several, {"weight": 3}, key).status_code == 401
    assert account_of(servers.several, servers.folder).weight == before.weight


def test_limits_of_its_own_engines_change_at_once(servers: Servers) -> None:
    answer = limits(servers.several, {"minimum": "4MiB", "maximum": 32 * MIB, "weight": 2})
    assert answer.status_code == 200, answer.text
    account = account_of(servers.several, servers.folder)
    assert (account.minimum_bytes, account.maximum_bytes) == (4 * MIB, 32 * MIB)
    (device,) = answer.json()["devices"]
    assert [each["name"] for each in device["engines"]] == ["several"]
    assert (device["budget_bytes"], device["engines"][0]["weight"]) == (BUDGET_BYTES, 2.0)
    assert figures(servers.several)["kvcached_maximum_bytes", "several"] == 32 * MIB
    assert account_of(servers.single, servers.folder).weight == 1.0
    assert limits(servers.several, {"maximum": None}).status_code == 200
    assert account_of(servers.several, servers.folder).maximum_bytes is None


def test_a_bad_limit_changes_nothing(servers: Servers) -> None:
    before = account_of(servers.several, servers.folder)
    assert limits(servers.several, {"weight": 5, "minimum": "1TiB"}).status_code == 422
    assert limits(servers.several, {"weight": 5, "colour": 1}).status_code == 422
    assert account_of(servers.several, servers.folder).weight == before.weight
    send(servers.several, 2)
