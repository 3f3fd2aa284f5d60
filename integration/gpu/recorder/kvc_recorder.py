"""A vLLM plugin that records each step of an engine core, with or without an elastic cache.

Not part of the product: ``overhead --steps`` puts this folder on the path of its servers. One JSON
object a line goes to the file that ``KVC_STEPS`` names, when the engine is idle, so that writing
holds up nobody; ``steps.py`` says what they hold. Times are of ``time.perf_counter``; recording
costs a step some 30 us, in both arms.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable
from typing import Any

ENOUGH_ROWS = 1000
"""Written at once, when no request is there."""


def register() -> None:
    """Record from the moment on at which the engine serves: all wrappers are in place then."""
    path = os.environ.get("KVC_STEPS")
    if not path:
        return
    from vllm.v1.engine.core import EngineCoreProc

    original = EngineCoreProc.run_busy_loop

    def run_busy_loop(core: Any) -> Any:
        recorder = Recorder(core, path)
        try:
            return original(core)
        finally:
            recorder.write()

    EngineCoreProc.run_busy_loop = run_busy_loop


class Recorder:
    """Wraps what an engine core calls in a step; the parts of a worker only if it is in this
    process."""

    def __init__(self, core: Any, path: str) -> None:
        import torch

        self._path = path
        self._event = torch.cuda.Event if torch.cuda.is_available() else None
        self._synchronize = torch.cuda.synchronize
        self._scheduler = core.scheduler
        self._step: dict[str, Any] = {}
        self._launched: dict[int, dict[str, Any]] = {}
        self._rows: list[dict[str, Any]] = []
        self._schedule, self._update = core.scheduler.schedule, core.scheduler.update_from_output
        core.scheduler.schedule = self._on_schedule
        core.scheduler.update_from_output = self._on_update
        worker = getattr(getattr(core.model_executor, "driver_worker", None), "worker", None)
        if worker is not None:
            self._on(worker, "execute_model", "launch", device=True)
            self._on(worker, "sample_tokens", "sample", device=True)
            memory = getattr(worker, "kvcached", None)
            if memory is not None:
                self._on(memory, "before_step", "before")
                self._on(core.kvcached, "stepped", "after")

    def _on(self, owner: Any, name: str, part: str, device: bool = False) -> None:
        original: Callable[..., Any] = getattr(owner, name)
        now, make = time.perf_counter, self._event if device else None

        def timed(*args: Any, **kwargs: Any) -> Any:
            row = self._step
            marks = row.setdefault("marks", [])
            if make is not None and not marks:
                marks.append(_recorded(make))
            began = now()
            result = original(*args, **kwargs)
            ended = now()
            row.setdefault(part, []).append((began, ended))
            if make is not None:
                marks.append(_recorded(make))
            return result

        setattr(owner, name, timed)

    def _on_schedule(self, *args: Any, **kwargs: Any) -> Any:
        self._step = row = {}
        began, at = time.perf_counter(), time.time()
        output = self._schedule(*args, **kwargs)
        row |= {"schedule": [(began, time.perf_counter())], "at": at}
        new = output.scheduled_new_reqs
        row["tokens"], row["running"] = (
            output.total_num_scheduled_tokens,
            len(output.num_scheduled_tokens),
        )
        row["waited_s"] = [at - self._scheduler.requests[n.req_id].arrival_time for n in new]
        if row["tokens"]:
            row["of"] = output  # keeps its identity
            self._launched[id(output)] = row
        return output

    def _on_update(self, output: Any, *args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        result = self._update(output, *args, **kwargs)
        row = self._launched.pop(id(output), None)
        if row is not None:
            del row["of"]
            row["results"] = [(began, time.perf_counter())]
            self._rows.append(row)
            if len(self._rows) >= ENOUGH_ROWS and not self._scheduler.has_unfinished_requests():
                self.write()
        return result

    def write(self) -> None:
        """Append what was recorded to the file."""
        rows, self._rows = self._rows, []
        if self._event is not None:
            self._synchronize()
        with open(self._path, "a") as file:
            for row in rows:
                marks = row.pop("marks", [])
                pairs = itertools.pairwise(marks)
                row["device_ms"] = [one.elapsed_time(other) for one, other in pairs]
                file.write(json.dumps(row) + "\n")


def _recorded(make: Callable[..., Any]) -> Any:
    mark = make(enable_timing=True)
    mark.record()
    return mark
