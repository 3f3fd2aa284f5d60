"""The results page, the README's figures and the guard against regressions."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest

from integration.benchmarks import guard
from integration.gpu import publish, suite
from integration.report import goals, plots, readme
from integration.report.files import File, Files, Pairs, table
from integration.report.page import NAME, page
from kvcached_vmm.account import Account

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "integration" / "results"
GPU = {"name": "NVIDIA H200", "driver_version": "580"}


def of_gpu(name: str, **data: Any) -> File:
    facts = {"gpu": GPU, "versions": {"vllm": "0.30.0"}, "date_utc": "2026-11-26T10:20:30+00:00"}
    return File(name, {**facts, "command": ["python3", "-m", "x", "--out", "/o"], **data})


def test_the_results_page_says_what_the_files_say() -> None:
    text = page(Files.read(RESULTS))
    assert (RESULTS / NAME).read_text() == text, "run `python -m integration.report`"
    for shown in re.findall(r"\]\(([^)]+\.png)\)", text):
        assert (RESULTS / shown).exists(), f"{shown} is shown and not there"


def test_each_gpu_figure_of_the_readme_is_in_a_file() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    for head, rows in readme.tables(Files.read(RESULTS)).items():
        start = next(i for i, line in enumerate(lines) if line.startswith(head))
        shown = list(itertools.takewhile(lambda line: line.startswith("|"), lines[start + 2 :]))
        assert shown == rows


def test_what_was_not_run_is_said_to_be_not_run() -> None:
    text = page(Files([]))
    assert text.count("| not run |") == len(goals.GOALS)
    assert "there is no `colocation-*.json`" in text


def test_a_goal_is_met_only_if_every_run_meets_it() -> None:
    def met(ratio: float) -> dict[str, Any]:
        return {"throughput": {"on_over_off": ratio, "met": ratio >= 0.995}}

    files = Files([of_gpu("overhead-a.json", goals=met(1.0))])
    row = goals.GOALS[0].row(files)
    assert (row[3], row[4]) == ("1.000", "met")
    both = Files([*files.all, of_gpu("overhead-b.json", goals=met(0.9))])
    assert goals.GOALS[0].row(both)[4] == "**missed**"


def test_a_goal_that_only_earlier_runs_missed_is_not_called_met_without_a_word() -> None:
    earlier, newest = (
        of_gpu(name, goals={"throughput": {"on_over_off": ratio}})
        for name, ratio in (("overhead-a.json", 0.9), ("overhead-b.json", 1.0))
    )
    verdict = goals.GOALS[0].row(Files([earlier, newest]))[4]
    assert verdict == "met by the newest run, **missed** by earlier ones"
    newest.data["versions"] = {"vllm": "0.33.0"}
    assert goals.GOALS[0].row(Files([earlier, newest]))[4] == "**missed**"


def test_a_sweep_over_other_rates_does_not_undo_the_best_rate_of_another() -> None:
    def best(ratio: float, rate: float) -> dict[str, Any]:
        told = {"best_p99_ttft_static_over_ours": ratio, "best_at": rate, "best_met": ratio >= 28}
        return {"goals": told}

    high, low = (
        of_gpu("colocation-a.json", **best(92, 18)),
        of_gpu("colocation-b.json", **best(22, 12)),
    )
    [goal] = [each for each in goals.GOALS if "best ratio" in each.figure]
    row = goal.row(Files([high, low]))
    assert ("92.00x at 18/s" in row[3], "22.00x at 12/s" in row[3], row[4]) == (True, True, "met")
    assert goal.row(Files([low]))[4] == "**missed**"


def test_a_trial_on_a_cpu_counts_for_no_goal() -> None:
    file = of_gpu("overhead-a.json", goals={"throughput": {"on_over_off": 1.0, "met": True}})
    trial = File(file.name, {**file.data, "gpu": {"memory_read_with": "host"}})
    assert goals.GOALS[0].row(Files([trial]))[3] == goals.NOT_RUN


def test_pairs_of_runs_are_averaged_as_ratios_and_have_an_error() -> None:
    def run(*ratios: float, **more: Any) -> File:
        rounds = [{"mean_ttft_ms": ratio} for ratio in ratios]
        return of_gpu("overhead-a.json", workloads={"6/s": {"of_each_round": rounds}}, **more)

    assert Pairs.of([2.0, 0.5]).ratio == pytest.approx(1.0)
    assert str(Pairs.of([1.1])) == "1.10"
    [alone] = [each for each in goals.GOALS if each.figure.startswith("mean TTFT")]
    [in_turns] = [each for each in goals.GOALS if "caches of others" in each.figure]
    small, large = Files([run(1.0, 1.0)]), Files([run(1.2, 1.2, engines=3)])
    told = "1.00 \N{PLUS-MINUS SIGN} 0.00 in 1 workload, torch.compile"
    assert alone.row(small)[3:5] == [told, "met"]
    assert in_turns.row(large)[4] == "**missed**"
    assert alone.row(large)[3] == in_turns.row(small)[3] == goals.NOT_RUN


def test_the_mean_of_a_runs_workloads_does_not_hide_its_worst() -> None:
    works = {"6/s": (0.9, 0.9), "2/s": (1.0, 1.1), "saturated": (3.0, 3.0)}
    told = {name: [{"mean_ttft_ms": each} for each in both] for name, both in works.items()}
    rounds = {name: {"of_each_round": each} for name, each in told.items()}
    files = Files([of_gpu("overhead-a.json", workloads=rounds)])
    mean, worst = (
        goal.row(files)[3:5]
        for goal in goals.GOALS
        if goal.found in (goals.first_token, goals.first_token_at_worst)
    )
    assert mean == ["0.97 \N{PLUS-MINUS SIGN} 0.02 in 2 workloads, torch.compile", "met"]
    assert worst == ["1.05 \N{PLUS-MINUS SIGN} 0.05 at 2/s, torch.compile", "**missed**"]


def test_a_run_is_told_by_its_command_without_its_folder() -> None:
    file = of_gpu("overhead-a.json")
    assert file.command == "python3 -m x"
    assert (file.date, file.device) == ("2026-11-26", "NVIDIA H200, driver 580")


def test_numbers_of_a_table_keep_to_the_right() -> None:
    assert table(["a", "b"], [["x", 12345.6], ["y|z", None]]) == [
        "| a | b |",
        "|---|--:|",
        "| x | 12,346 |",
        "| y\\|z | - |",
    ]


def colocation() -> dict[str, Any]:
    def rate(ttft: float) -> dict[str, Any]:
        times = {"mean": ttft, "p99": 2 * ttft}
        told = {"requests": 9, "within_slo": 5, "preemptions": 0, "ttft_lower_bounds": 1}
        return {"ttft_ms": times, "tpot_ms": times, **told}

    level = {"holds_to": 8.0, "fails_from": None}
    arms = {
        kind: {"rates": {"8": rate(ttft), "16": rate(3 * ttft)}, "slo_requests_per_s": level}
        for kind, ttft in (("static", 900.0), ("ours", 30.0))
    }
    slo = {"ttft_ms_at_most": 500.0, "tpot_ms_at_most": 50.0, "share_at_least": 0.99}
    found = {
        "best_p99_ttft_static_over_ours": 30.0,
        "best_at": 8.0,
        "best_met": True,
        "worst_p99_ttft_ours_over_static": 0.03,
        "worst_at": 16.0,
        "worst_met": True,
    }
    return {"arms": arms, "slo": slo, "goals": found, "notes": ["a server was slow"]}


def test_a_colocation_has_its_table_its_picture_and_what_went_wrong(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    files = Files([of_gpu("colocation-h200.json", **colocation())])
    text = page(files)
    assert "| 16/s, ours | 90.00 | 180.0 (1 not yet) | 90.00 | 9 | 5 | 0 |" in text
    assert "30.00x at 8/s (vllm 0.30.0) | met |" in text
    assert "- a server was slow" in text
    assert plots.draw(files, tmp_path) == ["colocation-h200.png"]
    assert (tmp_path / "colocation-h200.png").read_bytes()[:4] == b"\x89PNG"


def test_an_earlier_result_stays_when_another_is_published(tmp_path: Path) -> None:
    out, results = tmp_path / "out", tmp_path / "results"
    out.mkdir()
    results.mkdir()
    (out / "colocation.json").write_text(json.dumps(of_gpu("x").data))
    (out / "models.json").write_text("{}")
    (out / "density.json").write_text(json.dumps({**of_gpu("x").data, "gpu": {}}))
    written, refused = publish.publish(out, results, replace=False)
    assert written == ["colocation-vllm-0.30.0-h200.json"]
    assert len(refused) == 1
    assert "density.json" in refused[0]
    (out / "colocation.json").write_text(json.dumps({**of_gpu("x").data, "notes": ["worse"]}))
    again, _ = publish.publish(out, results, replace=False)
    assert again == ["colocation-vllm-0.30.0-h200-20261126102030.json"]
    assert len(list(results.iterdir())) == 2
    (out / "colocation.json").write_text(json.dumps({**of_gpu("x").data, "notes": ["a lane"]}))
    beside, _ = publish.publish(out, results, replace=False)
    assert beside == ["colocation-vllm-0.30.0-h200-20261126102030-2.json"]
    assert publish.publish(out, results, replace=False)[0] == beside
    assert publish.publish(out, results, replace=True)[0] == written


@pytest.mark.parametrize(
    ("gpu", "packages", "said"),
    [
        (None, {"vllm", "aiohttp"}, "No NVIDIA GPU here"),
        ("NVIDIA H200", {"aiohttp"}, "vLLM is not installed"),
        ("NVIDIA H200", {"vllm"}, "aiohttp is not installed"),
    ],
)
def test_what_a_machine_lacks_is_said_in_one_sentence(
    gpu: str | None, packages: set[str], said: str
) -> None:
    told = suite.missing(lambda: gpu, lambda name: name in packages)
    assert told is not None
    assert told.startswith(said)
    assert "\n" not in told
    assert suite.missing(lambda: "NVIDIA H200", lambda name: True) is None


def test_each_program_of_the_suite_exists_and_understands_its_arguments(tmp_path: Path) -> None:
    for program in suite.PROGRAMS:
        assert (ROOT / "integration" / "gpu" / f"{program.name}.py").exists()
        words = suite.command(program, tmp_path, tmp_path)
        assert ("--model" in words) == program.takes_model
    assert [each.name for each in suite.chosen("density,paired")] == ["paired", "density"]


def test_neither_footprint_nor_ledger_has_become_worse_by_a_fifth(folder: Path) -> None:
    """The figures are counted and not timed, so that a busy machine changes nothing."""
    baseline = json.loads((RESULTS / "bench-guard.json").read_text())["figures"]
    assert guard.regressions(baseline, guard.measure(folder)) == []


def test_the_guard_notices_a_ledger_that_does_more(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = guard.ledger_work(folder)
    reserve = Account.reserve

    def wasteful(self: Account, *args: Any, **kwargs: Any) -> int:
        granted = reserve(self, *args, **kwargs)
        self.cancel(granted)
        return reserve(self, *args, **kwargs)

    monkeypatch.setattr(Account, "reserve", wasteful)
    told = guard.regressions(before, guard.ledger_work(folder))
    assert any(each.startswith("ledger: reserve + cancel, alone, lines") for each in told)
    assert not any("report" in each for each in told)


def test_a_figure_that_is_no_longer_measured_is_a_regression_too() -> None:
    assert guard.regressions({"a": 10.0, "b": 10.0}, {"a": 12.0, "b": 12.1}) == [
        "b: 10 before, 12.1 now, 1.21 times as much"
    ]
    assert "no longer measured" in guard.regressions({"a": 1.0}, {})[0]


def test_the_guard_counts_the_same_each_time(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("one", "two")]
    for each in folders:
        each.mkdir(mode=0o700)
    once, twice = map(guard.ledger_work, folders)
    assert once == twice
    assert min(once.values()) > 0
