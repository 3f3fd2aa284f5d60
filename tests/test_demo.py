"""The demo without its servers: what it sends, what it reads, and what it makes of that."""

from __future__ import annotations

import math
from importlib import metadata
from pathlib import Path

import pytest
from rich.console import Console

from kvcached_plugins.demo import engines
from kvcached_plugins.demo.engines import SGLANG, SGLANG_CPU, VLLM, VLLM_CPU, Engine, Metrics
from kvcached_plugins.demo.load import (
    Burst,
    Playback,
    Reply,
    _completion_tokens,
    requests_of,
)
from kvcached_plugins.demo.models import TINY, Shape
from kvcached_plugins.demo.picture import caption
from kvcached_plugins.demo.profiles import GPU, HOST, PROFILES, Profile, installed_profile
from kvcached_plugins.demo.report import as_json, comparison, figures
from kvcached_plugins.demo.sampler import (
    EngineSample,
    Memory,
    Sample,
    elastic_memory,
    static_memory,
)
from kvcached_plugins.demo.screen import Screen
from kvcached_plugins.demo.servers import Server, ServerSpec, _tail
from kvcached_plugins.demo.session import Outcome, elastic, static
from kvcached_vmm.errors import EngineUnsupported
from kvcached_vmm.ledger import Ledger
from kvcached_vmm.units import GIB, MIB

VLLM_METRICS = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="demo"} 7.0
vllm:num_requests_waiting{engine="0",model_name="demo"} 3.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="demo",reason="capacity"} 9.0
vllm:kv_cache_usage_perc{engine="0",model_name="demo"} 0.25
vllm:num_preemptions_total{engine="0",model_name="demo"} 1.2e+01
vllm:num_preemptions_created{engine="0",model_name="demo"} 1.76e+09
vllm:cache_config_info{block_size="16",cache_dtype="auto",engine="0",num_gpu_blocks="1000"} 1.0
"""

SGLANG_METRICS = """\
# HELP sglang:num_running_reqs The number of running requests.
sglang:num_running_reqs{engine_type="unified",model_name="demo",tp_rank="0"} 7.0
sglang:num_running_reqs_offline_batch{engine_type="unified",model_name="demo"} 9.0
sglang:num_queue_reqs{engine_type="unified",model_name="demo",tp_rank="0"} 3.0
sglang:token_usage{engine_type="unified",model_name="demo",tp_rank="0"} 0.25
sglang:num_retracted_reqs{engine_type="unified",model_name="demo",tp_rank="0"} 1.0
sglang:num_retracted_requests_total{engine_type="unified",model_name="demo"} 1.2e+01
sglang:max_total_num_tokens{engine_type="unified",model_name="demo"} 16000.0
"""


def server(name: str) -> Server:
    return Server(name, "http://127.0.0.1:1", None, Path("log"), VLLM_CPU)  # type: ignore[arg-type]


def reply(burst: int, first_s: float, done_s: float, due_s: float = 2.0) -> Reply:
    return Reply(burst, burst % 2, due_s, first_s, done_s, tokens=100, error=None)


def sample(at_s: float, *held_mib: int) -> Sample:
    return Sample(at_s, tuple(EngineSample(held * MIB, 0, 0, 0, 0) for held in held_mib))


BURSTS = [Burst(0, 2.0, 2, (1, 1), (1, 1), 0), Burst(1, 10.0, 1, (1, 1), (1, 1), 1)]


def outcome() -> Outcome:
    return Outcome(
        "elastic",
        ["A", "B"],
        samples=[sample(0, 8, 8), sample(1, 16, 8), sample(3, 100, 8), sample(20, 8, 24)],
        replies=[reply(0, 2.5, 4.0), reply(0, 3.5, 5.0), reply(1, 10.25, 12.0, due_s=10.0)],
        preemptions=[1, 2],
    )


@pytest.mark.parametrize(
    ("engine", "text"),
    [(VLLM, VLLM_METRICS), (VLLM_CPU, VLLM_METRICS), (SGLANG_CPU, SGLANG_METRICS)],
    ids=["vllm", "vllm-cpu", "sglang"],
)
def test_metrics_are_read_by_their_whole_names(engine: Engine, text: str) -> None:
    assert engine.metrics(text) == Metrics(
        running=7, waiting=3, preemptions=12, kv_usage=0.25, pool_tokens=16_000
    )


@pytest.mark.parametrize("engine", [VLLM, SGLANG], ids=["vllm", "sglang"])
def test_metrics_that_are_not_there_are_zero(engine: Engine) -> None:
    assert engine.metrics("") == Metrics()
    text = 'vllm:cache_config_info{block_size="None",num_gpu_blocks="12"} 1.0'
    assert engine.metrics(text) == Metrics()


def test_a_static_engine_holds_its_whole_pool() -> None:
    read = static_memory(kv_bytes_per_token=10)
    found = read([server("A")], [Metrics(pool_tokens=16_000, kv_usage=0.25)])
    assert found == [Memory(160_000, 40_000, 0)]


def test_elastic_memory_is_what_the_ledger_says_of_each_name(folder: Path) -> None:
    accounts = {
        name: Ledger.open(folder, "host").join(name, GIB) for name in ("A", "B (starting)", "C")
    }
    for mib, account in enumerate(accounts.values(), start=1):
        account.commit(account.reserve(mib * MIB), mib * MIB)
    accounts["A"].report(live_bytes=5, cached_bytes=6)
    read = elastic_memory(folder)
    servers = [server("B"), server("A"), server("D")]
    assert read(servers, []) == [Memory(2 * MIB, 0, 0), Memory(MIB, 5, 6), Memory(0, 0, 0)]
    for account in accounts.values():
        account.close()
    assert read(servers, []) == [Memory(0, 0, 0)] * 3


EVERY = [profile for profiles in PROFILES.values() for profile in profiles]
every_profile = pytest.mark.parametrize("profile", EVERY, ids=lambda each: each.engine.device)


@every_profile
def test_a_burst_fits_one_engine_with_the_budget_and_not_one_with_half(profile: Profile) -> None:
    budget = profile.budget_bytes
    for burst in profile.bursts(budget, seconds=60):
        requests = requests_of(burst, profile.shape.vocabulary)
        tokens = sum(len(request.prompt) + request.output_tokens for request in requests)
        assert budget / 2 < tokens * profile.shape.kv_bytes_per_token < budget
        longest = max(len(request.prompt) + request.output_tokens for request in requests)
        assert longest <= engines.LONGEST_TOKENS
    assert profile.smallest_budget_bytes <= budget


def test_bursts_come_in_turn_and_never_fewer_than_two() -> None:
    bursts = HOST.bursts(HOST.budget_bytes, seconds=4 * HOST.period_s)
    assert [burst.engine for burst in bursts] == [0, 1, 0, 1]
    due = [burst.at_s for burst in bursts]
    assert due == pytest.approx([2 + index * HOST.period_s for index in range(4)])
    assert len({burst.seed for burst in bursts}) == 4
    assert len(HOST.bursts(HOST.smallest_budget_bytes, seconds=0)) == 2


def test_requests_are_the_same_for_the_same_seed_and_share_no_prefix() -> None:
    burst = Burst(0, 0.0, 20, (16, 32), (4, 8), seed=3)
    requests = requests_of(burst, vocabulary=100)
    assert requests == requests_of(burst, vocabulary=100)
    assert requests != requests_of(burst._replace(seed=4), vocabulary=100)
    assert len({tuple(request.prompt[:16]) for request in requests}) == 20
    assert all(16 <= len(request.prompt) <= 32 for request in requests)
    assert all(4 <= request.output_tokens <= 8 for request in requests)
    assert all(2 <= token < 100 for request in requests for token in request.prompt)


def test_the_usage_record_ends_a_stream() -> None:
    stream = (
        b'data: {"choices":[{"text":"x"}],"usage":null}\n\n'
        b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":42}}\n\n'
        b"data: [DONE]\n\n"
    )
    assert _completion_tokens(stream) == 42
    assert _completion_tokens(stream[10:]) == 42
    assert _completion_tokens(b"data: [DONE]\n\n") == 0
    assert _completion_tokens(b"") == 0


def test_the_profile_is_that_of_the_installed_engine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    installed: set[str] = set()

    def version(name: str) -> str:
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return "0.32.0"

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(engines, "NVIDIA", tmp_path / "no driver")
    with pytest.raises(EngineUnsupported, match="No vLLM in this environment"):
        installed_profile("vllm")
    with pytest.raises(EngineUnsupported, match=r"No SGLang in this.*ENGINE=sglang"):
        installed_profile("sglang")
    installed |= {"vllm", "sglang"}
    assert installed_profile("vllm") is GPU
    assert installed_profile("sglang").engine is SGLANG_CPU
    installed.add("vllm-cpu")
    assert installed_profile("vllm") is HOST
    monkeypatch.setattr(engines, "NVIDIA", tmp_path)
    assert installed_profile("sglang").engine is SGLANG


def test_figures_are_counted_from_when_a_burst_was_due() -> None:
    found = figures(outcome(), BURSTS)
    assert found.burst_done_s == [3.0, 2.0]
    assert found.burst_done_mean_s == 2.5
    assert found.ttft_mean_s == pytest.approx((0.5 + 1.5 + 0.25) / 3, abs=1e-3)
    assert found.ttft_p99_s == 1.5
    assert found.output_tokens == 300
    assert found.output_tokens_per_s == 30.0
    assert (found.preemptions, found.failed) == (3, 0)
    assert found.held_before_bytes == 24 * MIB
    assert found.held_peak_bytes == 108 * MIB
    assert found.held_peak_of_one_bytes == 100 * MIB
    assert found.held_mean_bytes == (16 + 24 + 108 + 32) / 4 * MIB
    assert found.held_last_bytes == 32 * MIB


def test_a_burst_without_an_answer_has_no_time() -> None:
    found = outcome()
    found.replies = [reply(0, 2.5, 4.0)._replace(error="HTTP 500", tokens=0)]
    got = figures(found, BURSTS)
    assert got.failed == 1
    assert all(math.isnan(seconds) for seconds in (*got.burst_done_s, got.ttft_mean_s))
    comparison(got, figures(outcome(), BURSTS))
    assert as_json({}, BURSTS, [found])["elastic"]["figures"] is None
    assert as_json({}, BURSTS, [found])["elastic"]["errors"] == ["HTTP 500"]


def test_the_comparison_says_who_is_better_whoever_that_is() -> None:
    ours, theirs = outcome(), outcome()
    theirs.replies = [
        one._replace(first_token_s=one.due_s + 2 * one.ttft_s, done_s=one.done_s)
        for one in theirs.replies
    ]
    text = _text(comparison(figures(ours, BURSTS), figures(theirs, BURSTS)))
    assert "2.00x faster" in text
    assert "equal" in text
    assert "slower" not in text
    text = _text(comparison(figures(theirs, BURSTS), figures(ours, BURSTS)))
    assert "2.00x slower" in text


def test_everything_measured_is_in_the_json() -> None:
    found = as_json({"vllm": "0.32.0"}, BURSTS, [outcome()])
    assert found["setup"] == {"vllm": "0.32.0"}
    assert [burst["at_s"] for burst in found["bursts"]] == [2.0, 10.0]
    assert found["elastic"]["figures"]["output_tokens"] == 300
    assert found["elastic"]["samples"][0] == [0, *([8 * MIB, 0, 0, 0, 0] for _ in range(2))]


@every_profile
def test_both_modes_start_stock_engines_with_the_memory_that_is_theirs(
    profile: Profile, tmp_path: Path
) -> None:
    models, budget = [tmp_path / "A", tmp_path / "B"], profile.budget_bytes
    ours = elastic(profile, models, budget, tmp_path / "ledger")
    theirs = static(profile, models, budget + 3)
    half = {
        "vllm": ["--kv-cache-memory-bytes", str(budget // 2)],
        "sglang": ["--max-total-tokens", str(budget // 2 // profile.shape.kv_bytes_per_token)],
    }[profile.engine.name]
    for spec in ours.specs:
        assert spec.env["ENABLE_KVCACHED"] == "1"
        assert spec.env["KVCACHED_BUDGET"] == str(budget)
        assert spec.env["KVCACHED_NAME"] == spec.name
        assert half[0] not in spec.arguments
    for spec in theirs.specs:
        assert spec.env["ENABLE_KVCACHED"] == "0"
        assert spec.arguments[-2:] == half
        assert spec.arguments[:-2] == list(profile.engine.arguments)
    every: list[ServerSpec] = [*ours.specs, *theirs.specs]
    assert len({spec.name for spec in every}) == 4
    assert all("--load-format" in spec.arguments for spec in every)
    for spec in every:
        assert spec.engine.command(spec.model)[-1] == str(spec.model)


def test_a_dead_engine_is_explained_by_its_first_error(tmp_path: Path) -> None:
    log = tmp_path / "log"
    lines = ["INFO fine", "(main) WARNING Error: no", "ValueError: the cause", *"abcdefghijklmno"]
    log.write_text("\n".join(lines))
    tail = _tail(log, lines=3)
    assert tail.splitlines()[1:] == ["ValueError: the cause", "m", "n", "o"]
    log.write_text("a\nb\n")
    assert _tail(log).splitlines()[1:] == ["a", "b"]


def test_a_plain_screen_prints_a_line_now_and_then() -> None:
    console = Console(record=True, width=200, force_terminal=False)
    playback = Playback(2)
    playback.progress[0].sent, playback.progress[0].done = 5, 2
    with Screen(console, ["A", "B"], 256 * MIB) as screen:
        screen.waiting("starting", 0.0)
        screen.waiting("starting", 1.0)
        for at_s in (10.0, 10.5, 12.5):
            screen.show("elastic", sample(at_s, 8, 16), playback)
    lines = console.export_text().splitlines()
    assert [line.split(" | ")[0] for line in lines] == [
        "starting ... 0 s",
        "elastic  10.0 s",
        "elastic  12.5 s",
    ]
    assert "A: 8 MiB held" in lines[1]
    assert "2/5 done" in lines[1]


def test_sizes_in_words() -> None:
    assert TINY.kv_bytes_per_token == 2048
    assert Shape(32, 4096, 14336, 32, 8, 128).kv_bytes_per_token == 128 * 1024
    assert caption("a GPU", 2 * GIB, 7) == (
        "Two models on a GPU, 2 GiB of KV memory in all; bursts of 7 requests in turn"
    )


def _text(table: object) -> str:
    console = Console(record=True, width=120, force_terminal=False, quiet=False)
    console.print(table)
    return console.export_text()
