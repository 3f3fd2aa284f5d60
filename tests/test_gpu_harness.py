"""The parts of the GPU programs that need neither a GPU nor an engine."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from integration.gpu import harness, neighbours, reclaim, soak, watch
from integration.gpu.bursts import (
    Load,
    Reply,
    figures,
    longest_gap_s,
    prompts,
    ratios,
    schedule,
    spread_ms,
)
from integration.gpu.options import parse_soak
from integration.gpu.watch import Holding, LedgerWatch, Sample
from integration.probe import wait_for_grant
from kvcached_vmm.ledger import Ledger
from kvcached_vmm.records import Counters
from kvcached_vmm.units import GIB, MIB, format_size

LOAD = Load(2, 8, 3)


def test_bursts_take_turns_and_no_two_have_the_same_prompts() -> None:
    phases = schedule(rounds=2)
    assert [phase.label for phase in phases] == [
        *("1-a", "1-b", "1-a-again", "1-both"),
        *("2-a", "2-b", "2-a-again", "2-both"),
    ]
    assert [tuple(phase.seeds) for phase in phases[:4]] == [("a",), ("b",), ("a",), ("a", "b")]
    seeds = [seed for phase in phases for seed in phase.seeds.values()]
    assert len(set(seeds)) == len(seeds) == 10
    firsts = {tuple(prompt[:4]) for seed in seeds for prompt in prompts(LOAD, 1000, seed)}
    assert len(firsts) == LOAD.requests * len(seeds)
    assert prompts(LOAD, 1000, 3) == prompts(LOAD, 1000, 3)


def test_the_default_burst_needs_the_budget_and_two_do_not_fit(tmp_path: Path) -> None:
    o = neighbours.parse(["--out", str(tmp_path)])
    config = {"num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32}
    of_a_token = harness.token_bytes(config | {"num_key_value_heads": 8, "head_dim": 128})
    assert of_a_token == harness.token_bytes(config | {"num_key_value_heads": 8}) == 128 << 10
    peak = o.load.peak_bytes(of_a_token)
    assert peak == 20 * GIB
    assert o.budget // 2 < peak < o.budget < 2 * peak


def test_options_for_a_cpu_give_way_to_what_was_said(tmp_path: Path) -> None:
    words = ["--out", str(tmp_path), "--cpu", "--rounds", "3", "--load", "4x16+2"]
    o = neighbours.parse(words)
    assert (o.rounds, o.load) == (3, Load(4, 16, 2))
    assert o.max_model_len == 512
    o = reclaim.parse(["--out", str(tmp_path), "--sizes", "1GiB,8GiB", "--rounds", "2,1"])
    assert dict(zip(o.sizes, o.rounds, strict=True)) == {GIB: 2, 8 * GIB: 1}
    with pytest.raises(argparse.ArgumentTypeError):
        harness.load("a lot")


def test_spreads_are_in_milliseconds_with_the_nearest_rank() -> None:
    assert spread_ms([]) == {}
    assert spread_ms(n / 1000 for n in range(1, 101)) == {
        "mean": 50.5,
        "median": 50.5,
        "p99": 99.0,
        "max": 100.0,
    }
    assert spread_ms([0.002])["p99"] == 2.0


def test_figures_of_a_burst() -> None:
    good = Reply(100.5, 0.5, [0.1, 0.3], 3, None)
    found = figures([good, good], LOAD, 100.0)
    assert found["failed"] == 0
    assert found["duration_s"] == pytest.approx(1.4)
    assert found["ttft_ms"]["mean"] == 500.0
    assert found["tpot_ms"]["mean"] == 200.0
    assert found["output_tokens_per_s"] == pytest.approx(6 / 1.4, abs=0.1)


@pytest.mark.parametrize(
    "bad", [[], [Reply(100.5, 0.0, [], 0, "no")], [Reply(100.5, 0.5, [0.1], 2, None)]]
)
def test_a_request_that_is_late_short_or_refused_has_failed(bad: list[Reply]) -> None:
    good = Reply(100.5, 0.5, [0.1, 0.3], 3, None)
    found = figures([good, *bad], LOAD, 100.0)
    assert found["failed"] == 1
    assert len(found["errors"]) == len(bad)
    assert figures(bad, LOAD, 100.0)["failed"] == 2


def test_the_longest_wait_for_a_token_beside_a_moment() -> None:
    reply = Reply(10.0, 1.0, [0.1, 0.5, 0.1], 4, None)
    assert longest_gap_s([reply], 11.05, 11.06) == pytest.approx(0.1)
    assert longest_gap_s([reply], 11.3, 11.4) == pytest.approx(0.5)
    assert longest_gap_s([reply], 12.0, 13.0) is None
    assert longest_gap_s([], 0, 1) is None


def test_ratios_compare_what_both_arms_have() -> None:
    one = figures([Reply(0.0, 2.0, [0.1, 0.1], 3, None)], LOAD, 0.0)
    two = figures([Reply(0.0, 1.0, [0.1, 0.1], 3, None)], LOAD, 0.0)
    static = {"1-a": {"engines": {"a": one}}, "1-b": {"engines": {"b": one}}}
    found = ratios(static, {"1-a": {"engines": {"a": two}}})
    assert list(found) == ["1-a"]
    assert found["1-a"]["a"]["mean_ttft_ms"] == 2.0
    assert found["1-a"]["a"]["mean_tpot_ms"] == 1.0


def samples() -> list[Sample]:
    """B holds 10 as cache; A grows from 0 to 20, in a capacity of 24, and waits once."""
    steps = ((0, 10, 0), (10, 10, 5), (14, 10, 0), (19, 4, 0), (20, 3, 0))
    return [
        Sample(
            100 + at / 10,
            24 * GIB,
            {"a": Holding(a * GIB, live=a * GIB, wanted=wanted), "b": Holding(b * GIB)},
        )
        for at, (a, b, wanted) in enumerate(steps)
    ]


def test_a_rise_tells_when_memory_had_moved_and_who_gave_it() -> None:
    found = watch.rise(samples(), "a", 100.0, 101.0)
    assert found["peak_gib"] == 20.0
    assert found["to_50_percent_s"] == pytest.approx(0.1)
    assert found["to_90_percent_s"] == pytest.approx(0.3)
    assert found["live_to_90_percent_s"] == pytest.approx(0.3)
    assert (found["others_at_start_gib"], found["others_least_gib"]) == (10.0, 3.0)
    assert found["samples_waiting"] == 1
    assert watch.rise(samples(), "a", 200.0, 201.0) == {}


def test_too_much_is_noticed_also_if_it_is_only_reserved() -> None:
    seen = samples()
    assert watch.budget_check(seen)["over_budget_bytes"] == 0
    seen.append(Sample(100.6, 24 * GIB, {"a": Holding(24 * GIB, reserved=3)}))
    found = watch.budget_check(seen)
    assert found["over_budget_bytes"] == 3
    assert found["longest_pause_s"] == pytest.approx(0.2)
    assert watch.budget_check([])["samples"] == 0


def test_counters_are_told_as_what_happened_in_between() -> None:
    before = Counters(commits=5, reclaims=1, reclaimed_bytes=GIB, reclaim_seconds=1.0)
    after = Counters(commits=7, reclaims=3, reclaimed_bytes=3 * GIB, reclaim_seconds=1.01)
    found = watch.counted(before, after)
    assert (found["commits"], found["reclaimed_gib"]) == (2, 2.0)
    assert found["mean_reclaim_ms"] == pytest.approx(5.0)
    assert found["mean_wait_ms"] is None


def test_a_watch_sees_engines_come_use_and_trim(folder: Path) -> None:
    looking = LedgerWatch(folder, "host", 0.005)
    assert looking.view() is None
    looking.start()
    starting = Ledger.open(folder, "host").join("a (starting)", GIB)
    account = Ledger.open(folder, "host").join("a", GIB)
    try:
        assert starting.reserve(MIB) == MIB
        assert account.reserve(2 * MIB) == 2 * MIB
        account.commit(2 * MIB, 2 * MIB)
        assert watch.seconds_until(
            lambda: bool(looking.samples) and looking.samples[-1].of("a").used == 3 * MIB, 5.0
        )
        assert looking.samples[-1].used_bytes == 3 * MIB
        assert watch.holdings(looking.view())["a"]["used"] == pytest.approx(3 / 1024, abs=1e-4)
        points = watch.series(looking.samples, looking.samples[0].at, 0.01)
        assert points[-1]["a"][0] == pytest.approx(2 / 1024, abs=1e-4)
        looking.trim()
        assert account.terms.trims == 1
    finally:
        looking.stop()
        account.close()
        starting.close()
    assert not looking.errors


def test_a_probe_waits_for_its_grant_and_gives_back_what_was_not_enough(folder: Path) -> None:
    account = Ledger.open(folder, "host").join("probe", 4 * MIB)
    assert wait_for_grant(account, 4 * MIB, MIB) < 1.0
    assert account.view().used_bytes == 4 * MIB
    account.cancel(4 * MIB)
    with pytest.raises(TimeoutError):
        wait_for_grant(account, 8 * MIB, MIB, timeout_s=0.01)
    assert account.view().used_bytes == 0
    assert account.view().accounts[0].wanted_bytes == 0
    account.close()


def test_memory_moves_between_processes_in_a_floor() -> None:
    from integration.gpu import floor

    found = floor.measure(cpu=True, size_bytes=8 * MIB, extent_bytes=2 * MIB, rounds=2)
    assert found["release_there_ms"]["median"] > 0
    assert found["hand_over_ms"]["median"] >= found["commit_here_ms"]["median"]


def taken(grant_s: float) -> dict[str, Any]:
    return {"began": 10.0, "grant_s": grant_s, "commit_s": 0.002}


def test_goals_are_those_of_sizes_that_were_measured() -> None:
    size = format_size(GIB)
    load = [Reply(9.0, 0.5, [0.02] * 100, 101, None)]
    found: dict[str, Any] = {
        "floor": {size: {"release_there_ms": {"median": 9.0}, "hand_over_ms": {"median": 11.0}}},
        "peers": {
            "idle": {size: reclaim.figure([taken(0.011)] * 3, [])},
            "busy": {size: reclaim.figure([taken(0.031)] * 3, load)},
        },
    }
    idle, busy = reclaim.goals(found)
    assert (idle["grant_ms_at_most"], idle["grant_ms"], idle["met"]) == (12.0, 11.0, True)
    assert (busy["grant_ms_at_most"], busy["grant_ms"], busy["met"]) == (30.0, 31.0, False)
    assert found["peers"]["busy"][size]["longest_step_beside_ms"]["max"] == pytest.approx(20.0)
    assert reclaim.goals({"floor": {}, "peers": {}}) == []


def test_checks_hold_the_elastic_arm_to_its_word(tmp_path: Path) -> None:
    o = neighbours.parse(["--out", str(tmp_path)])
    good = figures([Reply(0.0, 1.0, [0.1] * 2, 3, None)] * 2, LOAD, 0.0)
    elastic = {"phases": {"1-a": {"engines": {"a": good}}}, "ledger": watch.budget_check(samples())}
    found = neighbours.checks(o, 128 << 10, {"elastic": elastic})
    assert neighbours.passed(found), found
    assert not neighbours.passed({**found, "failed_requests": 1})
    assert not neighbours.passed({**found, "over_budget_bytes": 1})
    assert not neighbours.passed({**found, "over_budget_bytes": None})
    assert not neighbours.passed(neighbours.checks(o, 1, {"elastic": elastic}))
    assert not neighbours.passed(neighbours.checks(o, 128 << 10, {}))
    json.dumps(found)


def test_the_device_has_a_say_in_how_much_was_used() -> None:
    marks = [{"at": "warm", "device_gib": 40.0, "ledger": {"a": {"used": 1.0}, "b": {"used": 0.5}}}]
    assert neighbours.device_kv_peak_gib(marks, {"max": 62.0}) == 23.5
    assert neighbours.device_kv_peak_gib([], {"max": 62.0}) is None
    assert neighbours.device_kv_peak_gib(marks, {}) is None


def test_counters_of_an_engine_are_summed_over_their_labels() -> None:
    from integration.gpu.tenants import counters

    text = """# HELP vllm:num_preemptions_total of all
vllm:num_preemptions_total{engine="0",model_name="m"} 3.0
vllm:request_success_total{finished_reason="length"} 2.0
vllm:request_success_total{finished_reason="stop"} 1.0
vllm:request_success_created{finished_reason="stop"} 1.7e9
"""
    assert counters(text) == {"num_preemptions": 3.0, "request_success": 3.0}


def test_a_soak_gives_memory_back_at_once_and_passes_only_if_nothing_differs(
    tmp_path: Path,
) -> None:
    o = parse_soak(["--out", str(tmp_path)], "")
    assert o.plugin_env["KVCACHED_DECAY"] == o.plugin_env["KVCACHED_RESERVE"] == "0"
    assert o.plugin_env["KVCACHED_POISON"] == "nan"
    assert o.env == {"VLLM_BATCH_INVARIANT": "1"}
    servers = {arm: {"exit_status": None} for arm in soak.ARMS}
    good = {"compared": {"requests": 9, "differing": 0}, "failed": 0, "servers": servers}
    assert soak.passed(good)
    assert not soak.passed({**good, "compared": {"requests": 9, "differing": 1}})
    assert not soak.passed({**good, "compared": {"requests": 0, "differing": 0}})
    assert not soak.passed({**good, "failed": 1})
    assert not soak.passed({**good, "servers": {"off": servers["off"], "on": {"exit_status": -9}}})
