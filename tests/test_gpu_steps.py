"""What the recorder of steps writes, and what becomes of it."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch", reason="torch is not installed")

from integration.gpu import steps
from integration.report import sections

sys.path.insert(0, str(steps.RECORDER))
from kvc_recorder import Recorder  # type: ignore[import-not-found]


class Engine:
    """An engine core with a worker in its process, and what the plugin attaches to that."""

    def __init__(self) -> None:
        memory = SimpleNamespace(before_step=lambda: time.sleep(0.05))
        self.kvcached = SimpleNamespace(stepped=lambda: time.sleep(0.05))
        self.worker = SimpleNamespace(kvcached=memory, sample_tokens=lambda: time.sleep(0.002))
        self.worker.execute_model = self._execute
        self.model_executor = SimpleNamespace(driver_worker=SimpleNamespace(worker=self.worker))
        self.scheduler = SimpleNamespace(
            schedule=lambda output: output,
            update_from_output=lambda output: time.sleep(0.001),
            requests={"new": SimpleNamespace(arrival_time=time.time() - 0.5)},
            has_unfinished_requests=lambda: False,
        )

    def _execute(self) -> None:
        self.worker.kvcached.before_step()
        time.sleep(0.01)

    def step(self, *new: str) -> None:
        output: Any = SimpleNamespace(
            scheduled_new_reqs=[SimpleNamespace(req_id=name) for name in new],
            total_num_scheduled_tokens=7,
            num_scheduled_tokens={"a": 7},
        )
        self.scheduler.schedule(output)
        self.worker.execute_model()
        self.worker.sample_tokens()
        self.scheduler.update_from_output(output)
        self.kvcached.stepped()


def test_parts_of_a_step_are_told_apart(tmp_path: Path) -> None:
    engine = Engine()
    recorder = Recorder(engine, str(tmp_path / "steps"))
    engine.step()
    engine.step("new")
    recorder.write()
    [_, prompt] = steps.read(tmp_path / "steps")
    assert 10 <= prompt["launch"] < 50, "what is ours in it counts by itself"
    assert min(prompt["before"], prompt["after"]) >= 50
    assert 2 <= prompt["sample"] < 50
    assert (prompt["prompts"], prompt["tokens"], prompt["running"]) == (1, 7, 1)
    assert 500 <= prompt["waited"] < prompt["in_engine"] - 50


def test_what_elastic_engines_add_is_told_for_prompts_that_came_alone(tmp_path: Path) -> None:
    def row(at: float, schedule_ms: float, *waited_s: float) -> str:
        times = {"schedule": [(0.0, schedule_ms / 1e3)], "results": [(0.01, 0.011)]}
        known = {"at": at, "tokens": 1, "running": 1, "device_ms": []}
        return json.dumps(times | known | {"waited_s": waited_s}) + "\n"

    files = {name: tmp_path / name for name in ("off", "on", "on-2", "on-3")}
    files["off"].write_text(row(1, 1) + row(2, 2, 0.1) + row(3, 9, 0.1) + row(9, 7))
    files["on"].write_text(row(1, 1) + row(2, 4, 0.1))
    files["on-2"].write_text(row(4, 1) + row(5, 6, 0.1))
    windows = {"off": [(0.0, 8.0)], "on": [(0.0, 3.0)], "on-2": [(3.0, 6.0)]}
    recorded = {name: steps.read(file) for name, file in files.items()}
    found = steps.compared(recorded, windows)
    assert found["on"]["prompt"]["steps"] == 2
    assert found["added_ms"]["prompt"]["schedule"] == pytest.approx(3.0)
    assert found["on"]["engines"]["on-2"]["schedule"] == pytest.approx(6.0)
    assert "on-3" not in found["on"]["engines"]
    assert found["off"]["decode"]["steps"] == 0
    told = "\n".join(sections.steps(found))
    assert "| schedule | 2.000 | 5.000 |" in told
    told = "\n".join(sections.steps(found | {"workloads": {"light": found}}))
    assert "| light | 1; 2 |" in told
    assert sections.steps({}) == []
