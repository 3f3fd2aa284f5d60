"""Figures that do not depend on how busy the machine is, against those of the last release.

    python -m integration.benchmarks.guard [--json FILE] [--against FILE]

Time on a machine that others share says little about a change of a fifth. So this counts: bytes
that the pool keeps committed for what is live, under simulated loads and one that was recorded from
vLLM's scheduler; bytes that it commits to do so; and, for each ledger operation, lines of Python
executed and calls into C. All of it is the same in each run with the same Python. A test compares
it with ``integration/results/bench-guard.json``: a fifth more fails.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import lzma
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from integration.benchmarks import churn, ledger_ops
from integration.benchmarks.traces import Step, Trace
from integration.gpu.record import MemorySampler, facts, write_json
from kvcached_vmm.extents import EXTENT_BYTES, ExtentMap, Region, blocks_per_extent
from kvcached_vmm.fence import StepClock
from kvcached_vmm.ledger import Ledger
from kvcached_vmm.policy import Policy
from kvcached_vmm.pool import ElasticPool
from kvcached_vmm.units import MIB

LIMIT = 1.2
"""A figure that has grown by more than this is a regression."""
RECORDED = Path(__file__).with_name("recorded.json.xz")
"""2,500 steps of vLLM's scheduler, by ``traces.recorded(model, 0, 2500, seed=3)``."""
STEP_S = 0.02
STEPS = 4000
"""Of each simulated load: two bursts and two lulls."""
CALLS = 20


def recorded() -> Trace:
    """The trace that comes with the repository."""
    steps = json.loads(lzma.decompress(RECORDED.read_bytes()))
    return Trace(
        "recorded from the scheduler",
        tuple(Step(tuple(takes), tuple(map(tuple, frees))) for takes, frees in steps),
        0,
    )


class Counting(churn.Plenty):
    """A budget that never runs out, and adds up what was committed."""

    def __init__(self) -> None:
        self.committed_bytes = 0

    def commit(self, granted_bytes: int, used_bytes: int, extents: int) -> None:
        self.committed_bytes += used_bytes


def replayed(trace: Trace) -> tuple[float, float]:
    """Committed over live blocks, and bytes committed in all over the most that were live."""
    region = Region(0, churn.BLOCK_BYTES)
    count = trace.blocks + 4096
    span = blocks_per_extent([region], 2 * MIB, EXTENT_BYTES)
    seconds = 0.0
    clock, budget = StepClock(), Counting()
    pool = ElasticPool(
        [churn.Block(index) for index in range(count)],
        ExtentMap(count, [region], 2 * MIB, span),
        budget,
        clock,
        lambda blocks: None,
        Policy(),
        now=lambda: seconds,
    )
    taken: list[list[churn.Block]] = []
    committed = live = 0
    for step in trace.steps:
        seconds += STEP_S
        for size in step.takes:
            pool.prepare(size)
            taken.append(pool.take(size))
        pool.settle()
        pool.released(pool.tick())
        clock.finish(clock.launch())
        for free in step.frees:
            pool.put([block for number in free for block in reversed(taken[number])])
        committed += pool.committed_bytes // churn.BLOCK_BYTES
        live += pool.live_blocks
    return committed / live, budget.committed_bytes / (trace.blocks * churn.BLOCK_BYTES)


def footprints() -> dict[str, float]:
    """What the pool keeps for what is live, under each load."""
    found = {
        f"committed over live, {scenario.name}": churn.churn(replace(scenario, steps=STEPS))
        for scenario in churn.SCENARIOS
    }
    ratio, traffic = replayed(recorded())
    found["committed over live, recorded"] = ratio
    found["committed in all over the most live, recorded"] = traffic
    return {name: round(value, 4) for name, value in found.items()}


def counted(action: Callable[[], object]) -> tuple[int, int]:
    """Lines of Python and calls into C of ``CALLS`` calls, on average; the first does not count."""
    lines = calls = 0

    def trace(frame: Any, event: str, argument: Any) -> Any:
        nonlocal lines
        lines += event == "line"
        return trace

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event == "c_call"

    action()
    before_trace, before_profile = sys.gettrace(), sys.getprofile()
    try:
        sys.settrace(trace)
        for _ in range(CALLS):
            action()
        sys.settrace(None)
        sys.setprofile(profile)
        for _ in range(CALLS):
            action()
    finally:
        sys.setprofile(before_profile)
        sys.settrace(before_trace)
    return round(lines / CALLS), round(calls / CALLS)


def ledger_work(directory: Path) -> dict[str, float]:
    """Lines and C calls of each ledger operation, alone and among 15 others, one of which waits."""
    found: dict[str, float] = {}
    with contextlib.ExitStack() as leaving:

        def join(number: int) -> Any:
            ledger = Ledger.open(directory, ledger_ops.DEVICE)
            account = ledger.join(f"engine-{number}", ledger_ops.BUDGET_BYTES)
            leaving.callback(account.close)
            return account

        def count(who: str, actions: Mapping[str, Callable[[], object]]) -> None:
            for name, action in actions.items():
                lines, calls = counted(action)
                found[f"ledger: {name}, {who}, lines"] = lines
                found[f"ledger: {name}, {who}, C calls"] = calls

        ours = join(0)
        actions = {
            **ledger_ops.operations(ours),
            "report": lambda: ours.report(0, 0),
            "snapshot": ours.view,
        }
        count("alone", actions)
        others = [join(number) for number in range(1, ledger_ops.ACCOUNTS)]
        for account in others:
            account.commit(account.reserve(ledger_ops.UNIT_BYTES), ledger_ops.UNIT_BYTES)
        count("16 accounts", actions)
        others[0].report(0, 0, ledger_ops.UNIT_BYTES)
        count("one waits", ledger_ops.operations(ours))
    return found


def measure(directory: Path) -> dict[str, float]:
    """All figures; ``directory`` is an empty folder for a ledger."""
    return {**footprints(), **ledger_work(directory)}


def regressions(before: Mapping[str, float], now: Mapping[str, float]) -> list[str]:
    """One sentence for each figure that has grown by more than ``LIMIT``, or is gone."""
    told = []
    for name, old in before.items():
        new = now.get(name)
        if new is None:
            told.append(f"{name}: is no longer measured; write the baseline anew")
        elif new > old * LIMIT:
            told.append(f"{name}: {old:g} before, {new:g} now, {new / old:.2f} times as much")
    return told


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures here: a new baseline")
    parser.add_argument("--against", type=Path, help="a baseline to compare with")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder))
    for name, value in figures.items():
        print(f"{name:60s} {value:10g}")
    told = []
    if options.against:
        told = regressions(json.loads(options.against.read_text())["figures"], figures)
        print(*told, sep="\n")
    if options.json:
        write_json(options.json, {**facts(MemorySampler()), "limit": LIMIT, "figures": figures})
    return 1 if told else 0


if __name__ == "__main__":
    raise SystemExit(main())
