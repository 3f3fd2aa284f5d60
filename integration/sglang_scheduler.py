"""One stock SGLang scheduler in this process, without a server: `sglang_scheduler.py SPEC OUT`.

The scheduler, its allocators, its prefix cache and its event loop are SGLang's own; only what comes
in and goes out over sockets in a server is put in and taken out by hand. SPEC is JSON:

    {"arguments": {...},        # for ServerArgs
     "requests": [[[ids], n], ...],
     "script": [["run", first, last], ["rival", first, last], ["idle", seconds], ["flush"],
                ["release"], ["resume"], ["until", bytes, seconds], ["wait_for", file]]}

``rival`` is a ``run`` beside a neighbour that takes what is free of the budget while a prompt has
been read in part.

OUT becomes {"tokens": [...], "phases": [{"peak_bytes", "end_bytes", "retractions", ...}]}, one
phase per line of the script.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from array import array
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from integration.engine import kv_bytes

STUCK_S = 900.0

RUNS = ("run", "rival")
"""Lines of a script that send requests, and last until all are answered."""

HOLD_S, REST_S = 1.3, 0.05
"""How long the neighbour of ``rival`` keeps what it took (longer than a batch waits before SGLang
retracts requests of it), and takes nothing then."""


class Rival(threading.Thread):
    """A neighbour in the ledger that takes memory at the worst moments: a scheduler that waits for
    some cannot be in the way, so it has a thread of its own."""

    def __init__(self, scheduler: Any) -> None:
        super().__init__(daemon=True)
        from kvcached_plugins.settings import Settings
        from kvcached_vmm.ledger import Ledger

        self._scheduler = scheduler
        self._memory = scheduler.kvcached.memory
        device = self._memory.arena.driver.device
        self._account = Ledger.open(Settings.read().directory, device).join("rival", None)
        self._over = threading.Event()
        self.start()

    def run(self) -> None:
        unit, size = self._memory.unit_bytes, self._memory.arena.size_bytes
        while not self._over.wait(REST_S):
            held, until = 0, time.monotonic() + HOLD_S
            while self._scheduler.chunked_req is not None and time.monotonic() < until:
                granted = self._account.reserve(size, unit)
                self._account.commit(granted, granted)
                held += granted
                self._over.wait(0.002)
            self._account.release(held)

    def close(self) -> None:
        self._over.set()
        self.join()
        self._account.close()


class Driver:
    """Feeds one scheduler and watches what it holds.

    Its ``turn`` takes the place of the socket that the event loop reads in every round.
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        self.requests = spec["requests"]
        self.script = list(spec["script"])
        self.found: dict[int, Any] = {}
        self.phases: list[dict[str, Any]] = []
        self.counts: Counter[str] = Counter()
        self.pid = os.getpid()
        self.scheduler = self._make(spec["arguments"])
        self._step: list[Any] | None = None
        self._rival: Rival | None = None
        self._next_sample = 0.0

    def run(self) -> None:
        self.scheduler.ingest_requests = self.turn
        self.scheduler.run_event_loop()

    def turn(self) -> list[Any]:
        now = time.monotonic()
        if self._step is None:
            if not self.script:
                self.scheduler.gracefully_exit = True
                return []
            self._begin(self.script.pop(0), now)
        if now >= self._next_sample:
            self._next_sample = now + 0.02
            self._sample()
        last, half_read = self.scheduler.last_batch, self.scheduler.chunked_req
        if half_read is not None and (last is None or half_read not in last.reqs):
            self.counts["left_out"] += 1
        if self._over(now):
            self._sample()
            self.phases[-1]["end_bytes"] = self._bytes
            self.phases[-1]["seconds"] = now - self._began
            self.phases[-1]["counts"] = dict(self.counts)
            self.phases[-1]["state"] = self._state()
            self.counts.clear()
            self._step = None
            if self._rival is not None:
                self._rival.close()
                self._rival = None
        elif now - self._began > STUCK_S:
            raise RuntimeError(f"stuck in {self._step}: {self.phases[-1]}, {self._state()}")
        return []

    def _begin(self, step: list[Any], now: float) -> None:
        self._step, self._began = step, now
        self.phases.append({"step": step[0], "peak_bytes": 0, "most_waiting": 0})
        if step[0] in RUNS:
            for number in range(step[1], step[2]):
                self._submit(number)
            if step[0] == "rival":
                self._rival = Rival(self.scheduler)
        elif step[0] == "flush":
            self.phases[-1]["done"] = self.scheduler.flush_cache()
        elif step[0] in ("release", "resume"):
            from sglang.srt.managers import io_struct

            kinds = {
                "release": io_struct.ReleaseMemoryOccupationReqInput,
                "resume": io_struct.ResumeMemoryOccupationReqInput,
            }
            method = getattr(self.scheduler.weight_updater, f"{step[0]}_memory_occupation")
            method(kinds[step[0]](tags=["kv_cache"]))

    def _over(self, now: float) -> bool:
        assert self._step is not None
        step = self._step
        if step[0] in RUNS:
            return bool(self.scheduler.is_fully_idle())
        if step[0] == "idle":
            return now - self._began >= step[1]
        if step[0] == "until":
            return self._bytes <= step[1] or now - self._began >= step[2]
        if step[0] == "wait_for":
            return Path(step[1]).exists()
        return True

    def _sample(self) -> None:
        self._bytes = kv_bytes(self.pid)
        phase = self.phases[-1]
        phase["peak_bytes"] = max(phase["peak_bytes"], self._bytes)
        phase["most_waiting"] = max(phase["most_waiting"], len(self.scheduler.waiting_queue))

    def _state(self) -> dict[str, Any]:
        scheduler = self.scheduler
        steward = getattr(scheduler, "kvcached", None)
        return {
            "available": scheduler.token_to_kv_pool_allocator.available_size(),
            "evictable": scheduler.tree_cache.evictable_size(),
            "capacity": scheduler.max_total_num_tokens,
            "waiting": len(scheduler.waiting_queue),
            "running": len(scheduler.running_batch.reqs),
            "kvcached": steward.numbers() if steward else None,
        }

    def _submit(self, number: int) -> None:
        from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
        from sglang.srt.sampling.sampling_params import SamplingParams

        prompt, size = self.requests[number]
        sampling = SamplingParams(temperature=0, max_new_tokens=size, ignore_eos=True)
        sampling.normalize(None)
        request = TokenizedGenerateReqInput(
            rid=str(number),
            input_text=None,
            input_ids=array("q", prompt),
            input_embeds=None,
            mm_inputs=None,
            token_type_ids=None,
            sampling_params=sampling,
            return_logprob=False,
            logprob_start_len=-1,
            top_logprobs_num=0,
            token_ids_logprob=None,
            stream=False,
        )
        self.scheduler.process_input_requests([request])

    def _make(self, arguments: dict[str, Any]) -> Any:
        import sglang.srt.managers.scheduler as module
        from sglang.srt.plugins import load_plugins

        load_plugins()
        from integration.sglang_cpu_shim import paging

        paging.install()
        from sglang.srt.runtime_context import publish
        from sglang.srt.server_args import PortArgs, ServerArgs

        server_args = ServerArgs(
            **{
                "device": "cpu",
                "attention_backend": "torch_native",
                "dtype": "float32",
                "skip_tokenizer_init": True,
                "disable_cuda_graph": True,
                "sampling_backend": "pytorch",
                "max_running_requests": 32,
                **arguments,
            }
        )
        server_args.resolve_once()
        ports = PortArgs.init_new(server_args)
        publish(server_args, role="scheduler")
        scheduler = module.Scheduler(server_args, ports, 0, 0, 0, 0, 0, 0, None)
        scheduler.ipc_channels.send_to_detokenizer.socket = None
        scheduler.ipc_channels.send_to_tokenizer.socket = None
        queue = scheduler._add_request_to_queue

        def keep(request: Any, is_retracted: bool = False) -> None:
            self.found[int(request.rid)] = request
            self.counts["retractions"] += is_retracted
            queue(request, is_retracted=is_retracted)

        scheduler._add_request_to_queue = keep
        return scheduler


def main(spec: Path, out: Path) -> None:
    driver = Driver(json.loads(spec.read_text()))
    driver.run()
    found = {
        "tokens": [list(driver.found[number].output_ids) for number in sorted(driver.found)],
        "reasons": [str(driver.found[n].finished_reason) for n in sorted(driver.found)],
        "phases": driver.phases,
    }
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
