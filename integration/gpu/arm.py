"""One engine in this process, stock or elastic, doing the work that a spec file names.

Run by onoff.py as a child: ``python -m integration.gpu.arm SPEC``. Everything it learns goes line
by line into the event log, the answers into files beside it.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any

from integration.gpu import workload
from integration.gpu.checkpoint import fill
from integration.gpu.record import EventLog, write_json
from integration.gpu.workload import Answer, Json, Request

BEST = 5
"""How many of the likeliest tokens are kept per position where answers are compared."""


def reseed(worker: Any) -> int:
    """Give every weight a seeded value under which tokens depend on all of the KV cache.

    The engine's own dummy weights are so small that attention adds nothing to the residual stream
    in bfloat16: greedy tokens would be equal whatever the KV cache held. These keep the variance of
    what passes through; larger gains would amplify rounding until runs cannot be compared. Returns
    the number of parameters.
    """
    import torch

    count = 0
    with torch.no_grad():
        for name, weight in worker.model_runner.get_model().named_parameters():
            count += weight.numel()
            fill(name, weight)
    return count


class Engine:
    """A ``vllm.LLM`` and the event log that says what it does."""

    def __init__(self, spec: Json) -> None:
        self.spec = spec
        self.log = EventLog(Path(spec["events"]))
        begin = time.time()
        import vllm

        imported = time.time()
        self.llm = vllm.LLM(**spec["engine"])
        ready = time.time()
        config = self.llm.llm_engine.vllm_config
        self.log.add(
            "ready",
            vllm=vllm.__version__,
            import_s=round(imported - begin, 2),
            engine_s=round(ready - imported, 2),
            startup_s=round(ready - spec["launched"], 2),
            blocks=config.cache_config.num_gpu_blocks,
            block_size=config.cache_config.block_size,
            max_num_seqs=config.scheduler_config.max_num_seqs,
            async_scheduling=config.scheduler_config.async_scheduling,
            cudagraph_mode=str(config.compilation_config.cudagraph_mode),
            torch_gpu=_torch_memory(),
        )
        if spec["reseed"]:
            parameters = self.llm.collective_rpc(reseed)[0]
            self.log.add("reseeded", parameters=parameters)
        self.vocab = min(config.model_config.get_vocab_size(), 120_000)

    def generate(self, requests: list[Request]) -> tuple[list[Answer], float]:
        """All requests at once; the answers and the seconds they took."""
        prompts = [{"prompt_token_ids": request.prompt} for request in requests]
        params = [_greedy(request, best=None) for request in requests]
        begin = time.perf_counter()
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        took = time.perf_counter() - begin
        return [_answer(output) for output in outputs], took

    def drip(
        self, requests: list[Request], first: int, per_step: int
    ) -> tuple[list[Answer], float]:
        """Some at once, then a few with each step that gave tokens; the clock decides nothing."""
        engine = self.llm.llm_engine
        waiting = list(enumerate(requests))[::-1]
        answers: dict[int, Answer] = {}
        begin = time.perf_counter()
        batch = first
        while waiting or engine.has_unfinished_requests():
            for _ in range(min(batch, len(waiting))):
                index, request = waiting.pop()
                prompt: Any = {"prompt_token_ids": request.prompt}
                engine.add_request(str(index), prompt, _greedy(request, best=BEST))
            outputs = engine.step()
            batch = per_step if outputs else 0
            if not engine.has_unfinished_requests():
                batch = first
            for output in outputs:
                if output.finished:
                    answers[int(output.request_id.split("-")[0])] = _answer(output)
        return [answers[i] for i in range(len(requests))], time.perf_counter() - begin

    def counters(self) -> Json:
        """Preemptions and prefix-cache hits as the engine counted them."""
        found: Json = {}
        with contextlib.suppress(Exception):
            for metric in self.llm.get_metrics():
                if any(word in metric.name for word in ("preempt", "prefix_cache")):
                    value = getattr(metric, "value", None)
                    if value is not None:
                        found[metric.name] = found.get(metric.name, 0) + value
        return found

    def keep(self, name: str, answers: list[Answer]) -> None:
        path = Path(self.spec["events"]).with_suffix(f".{name}.json")
        path.write_text(json.dumps(workload.pack(answers)))


def _torch_memory() -> Json | None:
    import torch

    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    return {"used_bytes": total - free, "torch_reserved_bytes": torch.cuda.memory_reserved()}


def _greedy(request: Request, best: int | None) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=0.0,
        max_tokens=request.max_tokens,
        ignore_eos=True,
        detokenize=False,
        logprobs=best,
        output_kind=RequestOutputKind.FINAL_ONLY if best is None else RequestOutputKind.CUMULATIVE,
    )


def _answer(output: Any) -> Answer:
    completion = output.outputs[0]
    tops = [
        [(token, round(entry.logprob, 5)) for token, entry in position.items()]
        for position in completion.logprobs or []
    ]
    return Answer(list(completion.token_ids), tops)


def throughput(engine: Engine, work: Json) -> None:
    """Part A: is context felt, mixed requests for comparison, saturated repetitions, drain."""
    log, vocab = engine.log, engine.vocab
    pair, _ = engine.generate(workload.context_pair(work["prompt_len"], vocab, seed=3))
    log.add("context", early_tokens_change_answers=pair[0].tokens != pair[1].tokens)
    requests = workload.mixed(work["mixed"], work["longest"], work["max_tokens"], vocab, seed=1)
    answers, took = engine.generate(requests)
    engine.keep("mixed", answers)
    log.add("mixed", seconds=round(took, 3), digest=workload.digest(answers))
    count, max_tokens = work["saturated"], work["max_tokens"]
    engine.generate(workload.uniform(8, work["prompt_len"], 8, vocab, seed=4))
    log.add("load")
    for rep in range(work["reps"]):
        if rep and time.time() + took + 2 * work["drain_s"] > engine.spec["deadline"]:
            break
        requests = workload.uniform(count, work["prompt_len"], max_tokens, vocab, seed=10 + rep)
        answers, took = engine.generate(requests)
        log.add(
            "rep",
            rep=rep,
            seconds=round(took, 3),
            output_tokens_per_s=round(count * max_tokens / took, 1),
            requests_per_s=round(count / took, 3),
            digest=workload.digest(answers),
        )
        if rep == 0:
            engine.keep("saturated", answers)
    drain(engine, work["drain_s"])


def correctness(engine: Engine, work: Json) -> None:
    """Part C: arrivals in drips, shared prefixes, a budget that forces preemption."""
    log, vocab = engine.log, engine.vocab
    requests = workload.staggered(
        work["requests"], work["longest"], work["max_tokens"], vocab, seed=5
    )
    log.add("load")
    answers, took = engine.drip(requests, first=work["first"], per_step=2)
    engine.keep("staggered", answers)
    log.add("staggered", seconds=round(took, 3), digest=workload.digest(answers))
    log.add("counters", **engine.counters())
    drain(engine, work["drain_s"])


def drain(engine: Engine, seconds: float) -> None:
    """Serve nothing, so that memory can fall; then drop the prefix cache too."""
    engine.log.add("idle")
    time.sleep(seconds)
    engine.log.add("drained", torch_gpu=_torch_memory())
    accepted = bool(engine.llm.reset_prefix_cache())
    time.sleep(seconds)
    engine.log.add("emptied", torch_gpu=_torch_memory(), reset_prefix_cache=accepted)


def main() -> None:
    spec_path = Path(sys.argv[1])
    spec: Json = json.loads(spec_path.read_text())
    engine = Engine(spec)
    work = {"throughput": throughput, "correctness": correctness}[spec["kind"]]
    work(engine, spec["work"])
    engine.log.add("done")
    write_json(spec_path.with_suffix(".done"), {"t": time.time()})


if __name__ == "__main__":
    main()
