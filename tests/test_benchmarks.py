"""The benchmarks in short: do they run, and are we within sight of our goals? CI is noisy, so the
bounds on time are loose; ``make bench`` holds us to the goals."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pool_state import check_pool

from integration.benchmarks import churn, ledger_ops, ledger_storm
from integration.benchmarks.traces import LOADS, Load, Step, Trace, simulated
from kvcached_vmm.account import Account
from kvcached_vmm.ledger import Ledger

has_vllm = importlib.util.find_spec("vllm") is not None
RESULTS = Path(churn.__file__).parent.parent / "results"
NOISE = 0.1
"""By how much ratios with prefix caching differ from run to run on a busy machine."""

needs_vllm = pytest.mark.skipif(not has_vllm, reason="vllm is not installed")


def test_a_churn_pins_little_more_than_what_is_live() -> None:
    scenario = replace(churn.SCENARIOS[0], steps=2500)
    assert churn.churn(scenario) <= churn.GOAL


@pytest.mark.parametrize("seed", range(3))
def test_a_few_long_answers_do_not_hold_what_many_needed(seed: int) -> None:
    """Prior art held 4.6 times what was live after such a load, and 1.4 at best."""
    assert churn.after_load(seed) <= churn.GOAL
    assert churn.after_load(seed, churn.SHARED) > churn.GOAL, "a load that shows nothing"


@needs_vllm
def test_vllms_scheduler_gives_long_requests_extents_of_their_own() -> None:
    """The same at eight times the pace, in a process of its own, which the plugin changes."""
    command = [sys.executable, "-m", "integration.benchmarks.tail", "--speed", "8"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


def check(trace: Trace) -> None:
    """Every take is freed at most once, after it was made."""
    freed: Counter[int] = Counter()
    taken = 0
    for step in trace.steps:
        taken += len(step.takes)
        for free in step.frees:
            assert all(number < taken for number in free)
            freed.update(free)
    assert not freed or max(freed.values()) == 1


@pytest.mark.parametrize("load", LOADS, ids=lambda load: load.name)
def test_a_simulated_trace_is_one_that_an_engine_could_make(load: Load) -> None:
    trace = simulated(load, warm_blocks=1000, steps=300)
    check(trace)
    assert len(trace.steps) == trace.warm_steps + 300
    assert sum(sum(step.takes) for step in trace.steps[: trace.warm_steps]) >= 1000
    assert simulated(load, 1000, 300) == trace


def test_loads_differ_in_what_their_names_say() -> None:
    sizes = {
        load.name: Counter(size for step in simulated(load, 1, 1000).steps for size in step.takes)
        for load in LOADS
    }
    assert set(sizes["singles only"]) == {1}
    assert 1 not in sizes["bulk only"]
    assert set(sizes["long prompts"]) == {1, 512}
    assert sizes["bulk and growth"][1] > sum(sizes["bulk and growth"].values()) / 2


def test_a_trace_knows_how_many_blocks_it_needs() -> None:
    steps = (Step((4, 1), ()), Step((2,), ((0, 1),)), Step((3,), ()))
    assert Trace("three steps", steps, 0).blocks == 7


@needs_vllm
@pytest.mark.parametrize(
    "prefix_caching",
    [
        False,
        True,
    ],
)
def test_taking_and_freeing_cost_about_what_they_cost_in_vllm(prefix_caching: bool) -> None:
    from integration.benchmarks import pool_ops

    recorded = json.loads((RESULTS / "bench-pool.json").read_text())["figures"]
    before = next(
        figure["ratio"]
        for figure in recorded
        if figure["trace"] == LOADS[0].name and figure["prefix_caching"] == prefix_caching
    )
    trace = simulated(replace(LOADS[0], active=20), warm_blocks=3500, steps=300)
    ratios = []
    for _ in range(4):
        found = pool_ops.compare(trace, prefix_caching, repetitions=5, num_blocks=3500)
        assert found.ratio <= found.ratio_with_hooks
        ratios.append(found.ratio)
        if found.ratio <= 1.2 * before + NOISE:
            return
    pytest.fail(f"over stock: {ratios}, but {before} in bench-pool.json")


@needs_vllm
def test_a_replay_asks_both_pools_for_the_same_and_leaves_what_is_live() -> None:
    from integration.benchmarks import pool_ops

    trace = simulated(replace(LOADS[0], active=20), warm_blocks=500, steps=200)
    sizes = [size for step in trace.steps for size in step.takes]
    freed = [number for step in trace.steps for free in step.frees for number in free]
    live = sum(sizes) - sum(sizes[number] for number in freed)
    for make in (pool_ops.stock_pool, pool_ops.elastic_pool):
        for prefix_caching in (False, True):
            pool, hooks = make(3000, prefix_caching)
            costs = pool_ops.replay(trace, pool, hooks)
            assert pool.get_num_free_blocks() == 2999 - live
            assert [len(times) for times in costs] == [200, 200, 200]
            assert bool(len(pool.cached_block_hash_to_block)) == prefix_caching
            if make is pool_ops.elastic_pool:
                check_pool(pool.elastic)


@needs_vllm
def test_a_recorder_notes_what_a_pool_is_asked_for() -> None:
    from integration.benchmarks import pool_ops
    from integration.benchmarks.traces import _Recorder

    pool: Any = pool_ops.stock_pool(100, False)[0]
    recorder = _Recorder(pool)
    prompt = pool.get_new_blocks(5)
    other = pool.get_new_blocks(2)
    grown = pool.get_new_blocks(1)
    assert recorder.step() == Step((5, 2, 1), ())
    pool.free_blocks(reversed(prompt + grown))
    pool.free_blocks(reversed(other))
    assert recorder.step() == Step((), ((0, 2), (1,)))
    assert pool.get_num_free_blocks() == 99


def test_ledger_operations_leave_nothing_in_use(folder: Path) -> None:
    found = ledger_ops.alone(folder, accounts=3, calls=50)
    assert [figure.operation for figure in found] == [
        "reserve + cancel",
        "reserve + commit + release",
        "report",
        "snapshot",
        "reserve + cancel, one waits",
    ]
    assert all(0 < figure.least_us <= figure.median_us <= figure.p99_us for figure in found)
    assert all(figure.p99_us <= figure.worst_us for figure in found)
    assert found[0].median_us < 20 * ledger_ops.GOAL_US
    ledger = Ledger.open(folder, ledger_ops.DEVICE)
    assert ledger.snapshot().accounts == ()
    ledger.close()


def test_processes_contend_for_one_ledger(folder: Path) -> None:
    found = ledger_ops.contended(folder, processes=2, calls=20)
    assert [figure.calls for figure in found] == [40, 40]


def test_a_peer_is_soon_granted_what_a_killed_engine_had(folder: Path) -> None:
    found = ledger_ops.inherited(folder, kills=3)
    assert found.calls == 3
    assert found.median_us <= ledger_ops.GOAL_INHERITED_US


def test_goals_that_are_missed_are_named() -> None:
    fast = ledger_ops.figure("reserve", 1, 1, [1000])
    slow = ledger_ops.figure("reserve", 1, 1, [200_000_000])
    crowd = replace(slow, contending_processes=ledger_ops.PROCESSES)
    assert ledger_ops.missed([fast, fast]) == []
    assert len(ledger_ops.missed([slow, crowd, slow])) == 3


@pytest.mark.parametrize("by_user", [False, True])
def test_a_storm_leaves_budget_and_guarantees_whole_and_the_ledger_true(
    folder: Path, by_user: bool
) -> None:
    with ledger_storm.storm(folder, processes=4, seed=by_user, by_user=by_user) as raging:
        found = raging.outcome(operations=4000)
    assert found.over_committed_bytes == 0
    assert found.passed, found
    assert found.kills > 0
    assert found.checks_under_the_lock >= 4000


def test_a_storm_notices_one_who_takes_more_than_there_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checks of the storm are checked: here grants do not look at what others use."""
    monkeypatch.setattr(Account, "_grant", lambda self, wanted, unit, free: wanted // unit * unit)
    with ledger_storm.storm(folder, processes=3, seed=1) as raging:
        found = raging.outcome(operations=1500)
    assert found.over_committed_bytes > 0
    assert found.broken_maxima + found.broken_guarantees > 0
    assert not found.passed
