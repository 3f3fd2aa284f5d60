"""Loads, service levels and arms of the GPU benchmarks: what needs neither a GPU nor an engine."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from integration.gpu import (
    arms,
    colocation,
    density,
    footprint,
    machine,
    overhead,
    peer,
    slo,
    traffic,
)
from integration.gpu.burst_client import Streamed
from integration.gpu.bursts import Reply
from integration.gpu.slo import CUT_OFF, Point, Slo
from integration.gpu.traffic import Ask
from integration.gpu.watch import Holding, Sample
from kvcached_vmm.units import GIB, MIB

LEVEL = Slo(ttft_s=0.5, tpot_s=0.05, share=0.99)
GOOD = Reply(100.0, 0.2, [0.02, 0.02], 3, None)


def test_a_steady_load_has_its_rate_and_is_the_same_for_the_same_seed() -> None:
    asks = traffic.steady(50.0, 40.0, 8, 2, seed=1)
    assert len(asks) == pytest.approx(2000, rel=0.1)
    assert all(0 <= one.at_s <= two.at_s < 40.0 for one, two in itertools.pairwise(asks))
    assert traffic.steady(50.0, 40.0, 8, 2, seed=1) == asks
    assert traffic.steady(50.0, 40.0, 8, 2, seed=2) != asks
    assert len(traffic.steady(0.001, 1.0, 8, 2, seed=1)) == 1


def test_peaks_come_in_turn_and_each_is_highest_in_its_middle() -> None:
    plan = traffic.peaks(["a", "b", "c"], 60.0, 30.0, 8, 2, seed=1)
    for number, asks in enumerate(plan.values()):
        moments = [ask.at_s - 30.0 * number for ask in asks]
        assert all(0 <= at < 30.0 for at in moments)
        assert len(moments) == pytest.approx(900, rel=0.15), "half of the peak on average"
        thirds = [sum(10 * i <= at < 10 * (i + 1) for at in moments) for i in range(3)]
        assert thirds[1] > 2 * max(thirds[0], thirds[2])
    assert traffic.ends_s(plan) > 85.0
    apart = traffic.peaks(["a", "b", "c"], 60.0, 30.0, 8, 2, seed=1, gap_s=16.0)
    later = [ask.at_s - before.at_s for ask, before in zip(apart["c"], plan["c"], strict=True)]
    assert later == pytest.approx([32.0] * len(later))
    assert traffic.ends_s({}) == 0.0


def test_prompts_share_what_they_were_told_to_share_and_nothing_else() -> None:
    asks = traffic.prefixed([Ask(0.0, 40, 4)] * 60, 3, 24, seed=1, share=0.5)
    made = traffic.prompts(asks, 5000, seed=2)
    assert [len(prompt) for prompt in made] == [40] * 60
    plain = [p for a, p in zip(asks, made, strict=True) if a.prefix is None]
    heads = {tuple(p[:24]) for a, p in zip(asks, made, strict=True) if a.prefix is not None}
    assert 15 < len(plain) < 45
    assert len(heads) == 3
    assert len({tuple(p[:24]) for p in plain}) == len(plain)
    assert len({tuple(p[24:]) for p in made}) == 60


def test_staggered_answers_differ_by_orders_of_magnitude() -> None:
    asks = traffic.staggered(traffic.at_once(400, 8, 1), 16, 2048, seed=1)
    lengths = sorted(ask.output_tokens for ask in asks)
    assert 16 <= lengths[0] < 20
    assert 1600 < lengths[-1] <= 2048
    assert 130 < lengths[200] < 250, "the median lies in the middle of the logarithmic scale"
    assert traffic.peak_bytes([Ask(0, 10, 6)] * 2, 4) == 128


def test_a_request_is_within_its_level_only_if_both_bounds_hold() -> None:
    assert LEVEL.holds(GOOD)
    assert not LEVEL.holds(GOOD._replace(first_s=0.6))
    assert not LEVEL.holds(GOOD._replace(gaps_s=[0.06, 0.06]))
    assert not LEVEL.holds(GOOD._replace(error="no"))


def test_who_is_cut_off_before_the_first_token_counts_with_the_time_waited() -> None:
    waiting = Reply(101.0, 0.0, [], 0, CUT_OFF)
    running = Reply(101.0, 3.0, [0.1], 0, CUT_OFF)
    found = slo.served([GOOD, waiting, running], 4, LEVEL, 100.0, 111.0)
    assert (found["completed"], found["cut_off"], found["failed"]) == (1, 2, 1)
    assert found["within_slo"] == 1
    assert found["ttft_lower_bounds"] == 1
    assert found["ttft_ms"]["max"] == 10_000.0
    assert found["ttft_ms"]["mean"] == pytest.approx((200 + 10_000 + 3000) / 3, abs=0.01)
    assert found["tpot_ms"]["mean"] == 20.0
    nothing = slo.served([], 2, LEVEL, 100.0, 111.0)
    assert (nothing["failed"], nothing["ttft_ms"], nothing["output_tokens_per_s"]) == (2, {}, None)


def test_an_arm_leaves_its_level_at_the_first_rate_that_fails() -> None:
    points = [Point(30, 100, 50), Point(10, 100, 100), Point(20, 100, 99), Point(40, 100, 100)]
    assert slo.leaves(points, 0.99) == {"holds_to": 20, "fails_from": 30}
    assert slo.leaves(points[1:2], 0.99) == {"holds_to": 10, "fails_from": None}
    assert slo.leaves(points[:1], 0.99) == {"holds_to": None, "fails_from": 30}
    assert slo.leaves([], 0.99) == {"holds_to": None, "fails_from": None}


def test_a_sweep_that_is_cut_short_is_coarse_and_not_one_sided() -> None:
    order = slo.sweep_order([24, 36, 48, 60, 72])
    assert order[:3] == [48, 72, 24]
    assert sorted(order) == [24, 36, 48, 60, 72]
    assert slo.sweep_order([5, 5, 3]) == [3, 5]


def test_a_hopeless_rate_ends_the_sweep_upwards() -> None:
    fine = slo.served([GOOD] * 20, 20, LEVEL, 100.0, 110.0)
    late = slo.served([GOOD._replace(first_s=9.0)] * 20, 20, LEVEL, 100.0, 110.0)
    cut = slo.served([GOOD] * 10 + [Reply(100.0, 0.1, [], 0, CUT_OFF)] * 10, 20, LEVEL, 100, 110)
    assert [slo.saturated(each, 10.0, LEVEL) for each in (fine, late, cut)] == [False, True, True]


def test_a_stream_is_whole_short_or_an_error() -> None:
    def stream(*lines: bytes) -> Reply:
        streamed = Streamed(10.0, 2)
        for number, line in enumerate(lines):
            streamed.take(line, 11.0 + number)
        return streamed.reply()

    token = b'data: {"choices": [{"text": "x"}]}\n'
    end = b'data: {"choices": [], "usage": {"completion_tokens": 2}}\n'
    assert stream(token, b"\n", token, end, b"data: [DONE]\n") == Reply(10.0, 1.0, [2.0], 2, None)
    assert stream(token, token).error == "0 tokens came back"
    assert "busy" in str(stream(b'data: {"error": "busy"}\n').error)


def test_goals_of_the_colocation_are_of_the_best_rate_and_the_worst() -> None:
    def arm(p99: dict[str, float]) -> dict[str, dict[str, object]]:
        times = {rate: {"mean": value / 2, "p99": value} for rate, value in p99.items()}
        return {r: {"ttft_ms": t, "tpot_ms": {}, "within_slo": 3} for r, t in times.items()}

    ratios = colocation.ratios(arm({"8": 100, "16": 9000, "24": 1}), arm({"8": 110, "16": 300}))
    assert list(ratios) == ["8", "16"]
    assert ratios["16"] == {"mean_ttft_ms": 30.0, "p99_ttft_ms": 30.0, "within_slo": 1.0}
    found = colocation.goals(ratios)
    assert (found["best_p99_ttft_static_over_ours"], found["best_at"]) == (30.0, 16.0)
    assert found["best_met"]
    assert found["worst_p99_ttft_ours_over_static"] == pytest.approx(1.1, abs=0.001)
    assert not found["worst_met"]
    assert colocation.goals({}) == {}


def test_arms_of_an_earlier_call_stand_beside_new_ones_only_if_they_met_the_same(
    tmp_path: Path,
) -> None:
    before = colocation.parse(["--out", str(tmp_path), "--arms", "static,ours"])
    earlier = {
        "gpu": {"uuid": "GPU-1"},
        "versions": {"vllm": "0.30.0"},
        "date_utc": "2026-11-26",
        "parameters": {name: str(value) for name, value in vars(before).items()},
        "arms": {"static": {"rates": {}}, "kvcached": {"rates": {}}},
    }
    o = colocation.parse(["--out", str(tmp_path / "b"), "--arms", "kvcached", "--rates", "8"])
    same = {"uuid": "GPU-1"}, {"vllm": "0.30.0"}
    assert colocation.joined(earlier, *same, o) == {"static": {"rates": {}, "of_run": "2026-11-26"}}
    with pytest.raises(ValueError, match="another device"):
        colocation.joined(earlier, {"uuid": "GPU-2"}, same[1], o)
    with pytest.raises(ValueError, match="another vLLM"):
        colocation.joined(earlier, same[0], {"vllm": "0.33.0"}, o)
    o.seconds = 5.0
    with pytest.raises(ValueError, match="another seconds"):
        colocation.joined(earlier, *same, o)


def test_the_published_set_up_gives_a_third_of_the_budget_too_little(tmp_path: Path) -> None:
    o = colocation.parse(["--out", str(tmp_path), "--arms", "static,ours,kvcached"])
    assert o.arms == ["static", "ours", "kvcached"]
    assert (o.engines, o.budget) == (3, 24 * GIB)
    ask = traffic.at_once(1, o.prompt_tokens, o.output_tokens)
    assert traffic.peak_bytes(ask, 128 << 10) * o.max_num_seqs > 2 * o.budget / 3
    with pytest.raises(argparse.ArgumentTypeError, match="no such arm: mine"):
        arms.kinds("static,mine")


def test_overhead_tells_the_ratio_of_medians_and_names_the_worst_workload(tmp_path: Path) -> None:
    def run(ttft: float, rate: float) -> dict[str, object]:
        times = {"mean": ttft, "median": ttft, "p99": ttft}
        return {"ttft_ms": times, "tpot_ms": times, "output_tokens_per_s": rate}

    rounds = {
        "1": {"off": run(50, 100), "on": run(60, 100)},
        "2": {"off": run(50, 100), "on": run(50, 99)},
        "3": {"off": run(50, 100), "on": run(50, 98)},
        "4": {"off": run(50, 100)},
    }
    found = overhead.compare(rounds)
    assert found["rounds"] == 3
    assert found["on_over_off"]["mean_ttft_ms"] == 1.0
    assert [each["mean_ttft_ms"] for each in found["of_each_round"]] == [1.2, 1.0, 1.0]
    slow = overhead.compare({"1": rounds["1"]})
    told = overhead.goals({"saturated": found, "light": slow, "20/s": slow}, {"light"})
    assert told["throughput"] == {"on_over_off": 0.99, "at_least": 0.995, "met": False}
    assert (told["mean_ttft"]["workload"], told["mean_ttft"]["met"]) == ("light", False)
    assert overhead.compare({}) == {}


def test_where_requests_waited_is_what_the_engine_counted_meanwhile() -> None:
    names = [f"request_{part}_time_seconds_sum" for part in ("queue", "prefill")]
    before = {names[0]: 1.0, names[1]: 2.0, "request_prefill_time_seconds_count": 10.0}
    after = {names[0]: 1.02, names[1]: 2.5, "request_prefill_time_seconds_count": 20.0}
    assert overhead.in_engine(before, after) == {"queue": 2.0, "prefill": 50.0}
    assert overhead.in_engine(after, after) == overhead.in_engine({}, {}) == {}


def test_a_slow_machine_is_told_from_a_slow_engine() -> None:
    first = machine.Look(1.0, 1980, 0, (100, 0, 50, 800, 50, 0, 0, 0))
    last = machine.Look(2.0, 1200, 4, (150, 0, 60, 810, 60, 0, 0, 20))
    found = machine.summary([first, last])
    assert found["sm_mhz"] == {"least": 1200, "median": 1590}
    assert found["clock_reasons"] == "0x4"
    assert (found["processors_busy"], found["processors_stolen"]) == (0.8, 0.2)
    assert machine.summary([first]) == {}
    assert len(machine.ticks()) == 8


def test_each_engine_of_several_gets_each_workload() -> None:
    two, three = overhead.in_turn(["a", "b"], 2), overhead.in_turn(["a", "b", "c"], 2)
    assert [next(two) for _ in range(8)] == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert [next(three) for _ in range(6)] == ["a", "b", "c", "a", "b", "c"]
    alone = overhead.in_turn(["a"], 2)
    assert [next(alone) for _ in range(3)] == ["a", "a", "a"]


def test_workloads_of_the_overhead_are_what_their_names_say(tmp_path: Path) -> None:
    o = overhead.parse(["--out", str(tmp_path)])
    works = {work.name: work.asks(5) for work in overhead.workloads(o)}
    assert len(works[overhead.SATURATED]) == 256
    assert {ask.at_s for ask in works[overhead.SATURATED]} == {0.0}
    assert all(ask.prefix is not None for ask in works["common prefixes, 12/s"])
    lengths = [ask.output_tokens for ask in works["staggered answers, 4/s"]]
    assert max(lengths) > 8 * min(lengths)
    assert {ask.prompt_tokens for ask in works["long prompts, 2/s"]} == {6000}
    for asks in works.values():
        assert max(ask.prompt_tokens + ask.output_tokens for ask in asks) <= o.max_model_len


def test_footprint_is_over_what_blocks_with_content_would_take() -> None:
    def at(moment: float, committed: int, live: int, cached: int) -> Sample:
        held = Holding(committed * MIB, live=live * MIB, cached=cached * MIB)
        return Sample(moment, GIB, {"a": held})

    seen = [at(0, 100, 80, 0), at(1, 60, 40, 10), at(2, 30, 8, 12), at(3, 4, 0, 0)]
    assert footprint.over_floor(seen, "a") == round(194 / 150, 4)
    assert footprint.over_floor(seen[3:], "a") is None
    assert [each["ratio"] for each in footprint.falling(seen, "a", (0.5, 0.1))] == [1.2, 1.5]
    assert footprint.falling([], "a") == []


def test_the_next_engine_takes_what_those_before_it_took() -> None:
    assert density.fits(40 * GIB, 2 * GIB, 38 * GIB, engines=2) == 2
    assert density.fits(17 * GIB, 2 * GIB, 38 * GIB, engines=2) == 0
    assert density.goals([{"waves": [{}]}]) == {}
    found = density.goals([{"waves": [{"kv_idle_bytes_most": 40 * MIB}]}])
    assert (found["idle_kv_bytes"], found["met"]) == (40 * MIB, False)


def test_kvcached_is_switched_on_and_we_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With both an engine would be neither; with none it would be stock, and nobody would know."""
    ours, engine = tmp_path / "plug", tmp_path / "site"
    (ours / "kvcached_plugins-0.1.0.dist-info").mkdir(parents=True)
    engine.mkdir()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ours), str(engine)]))
    monkeypatch.setenv("KVCACHED_DIR", "/somewhere")
    env = peer.peer_environment("a", {"OMP_NUM_THREADS": "1"}, tmp_path, tmp_path / "p", tmp_path)
    other = peer.peer_environment("b", {}, tmp_path, tmp_path / "p", tmp_path)
    assert (env["ENABLE_KVCACHED"], env["KVCACHED_AUTOPATCH"]) == ("true", "1")
    assert "KVCACHED_DIR" not in env
    assert env["KVCACHED_IPC_NAME"] != other["KVCACHED_IPC_NAME"]
    assert env["PYTHONPATH"].split(os.pathsep)[1:] == [str(engine)]
    assert env["OMP_NUM_THREADS"] == "1"


def test_every_process_of_a_kvcached_engine_runs_its_pth_file(tmp_path: Path) -> None:
    folder, work = tmp_path / "peer", tmp_path / "work"
    folder.mkdir()
    work.mkdir()
    (folder / "its.pth").write_text("import os; os.environ['PATCHED'] = 'yes'\n")
    env = peer.peer_environment("a", {}, tmp_path, folder, work)
    told = subprocess.run(
        [sys.executable, "-c", "import os; print(os.environ.get('PATCHED'))"],
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert told.stdout.strip() == "yes"


def test_a_kvcached_that_is_not_built_is_named_and_not_measured(tmp_path: Path) -> None:
    folder = tmp_path / "peer"
    assert "PEER=1" in str(peer.missing(folder, 0.0))
    (tmp_path / "peer.failed").touch()
    assert "could not be built" in str(peer.missing(folder, 5.0))
    (tmp_path / peer.BUILT).touch()
    assert peer.missing(folder, 0.0) is None


def test_the_ballast_leaves_kvcached_the_budget_and_its_headroom() -> None:
    total, free, budget = 140 * GIB, 90 * GIB, 24 * GIB
    left = free - peer.ballast_bytes(free, total, budget)
    assert left == budget + int(peer.HEADROOM * total)
    assert peer.ballast_bytes(10 * GIB, total, budget) == 0


def test_requests_reach_the_client_as_they_were_planned() -> None:
    asks = traffic.steady(5.0, 2.0, 8, 2, seed=1)
    assert [Ask(*each) for each in json.loads(json.dumps(asks))] == asks
