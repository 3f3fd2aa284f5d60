"""What a block pool is asked for, step by step: made up by rule, or recorded from vLLM's scheduler.

A trace is replayed on a pool that has memory for all of it, so it holds no waiting and no
preemption; and no prefix is asked for twice, for a hit neither takes nor frees a block.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

BLOCK_TOKENS = 16


class Step(NamedTuple):
    """One engine step.

    ``takes`` are sizes, one for each call; takes are numbered through the whole trace from 0. Each
    of ``frees`` is one call: the numbers of the takes whose blocks come back, in their order.
    """

    takes: tuple[int, ...]
    frees: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Trace:
    """Steps, of which the first ``warm_steps`` bring a pool into its usual disorder."""

    name: str
    steps: tuple[Step, ...]
    warm_steps: int

    @property
    def blocks(self) -> int:
        """The most blocks that are live at once."""
        live = most = 0
        sizes: list[int] = []
        for step in self.steps:
            sizes += step.takes
            live += sum(step.takes)
            most = max(most, live)
            live -= sum(sizes[number] for free in step.frees for number in free)
        return most


@dataclass(frozen=True)
class Load:
    """A constant number of active requests; each that ends makes room for the next.

    Sizes are in blocks, drawn evenly between the two bounds. A request takes its prompt at once and
    one block every ``BLOCK_TOKENS`` steps for its output; without a prompt it starts with one.
    """

    name: str
    prompt: tuple[int, int]
    output: tuple[int, int]
    active: int = 200
    grows: bool = True
    seed: int = 0


LOADS = (
    Load("bulk and growth", (8, 128), (8, 32)),
    Load("bulk only", (8, 128), (8, 32), grows=False),
    Load("singles only", (1, 1), (8, 63)),
    Load("long prompts", (512, 512), (8, 32), active=40),
)


def simulated(load: Load, warm_blocks: int, steps: int) -> Trace:
    """``steps`` steps, after as many as it takes to hand out ``warm_blocks``."""
    dice = random.Random(load.seed)
    number = 0
    requests = [_Request(load, dice) for _ in range(load.active)]
    for request in requests:
        request.age = dice.randrange(request.life)
    done: list[Step] = []
    handed_out = warm_steps = 0
    while not warm_steps or len(done) < warm_steps + steps:
        takes: list[int] = []
        frees: list[tuple[int, ...]] = []
        for index, request in enumerate(requests):
            count = request.wants(load.grows)
            if count:
                request.takes.append(number)
                takes.append(count)
                number += 1
            request.age += 1
            if request.age >= request.life:
                frees.append(tuple(request.takes))
                requests[index] = _Request(load, dice)
        done.append(Step(tuple(takes), tuple(frees)))
        handed_out += sum(takes)
        if not warm_steps and handed_out >= warm_blocks:
            warm_steps = len(done)
    return Trace(load.name, tuple(done), warm_steps)


class _Request:
    def __init__(self, load: Load, dice: random.Random) -> None:
        self.prompt = dice.randint(*load.prompt)
        self.life = dice.randint(*load.output) * BLOCK_TOKENS
        self.phase = dice.randrange(BLOCK_TOKENS)
        self.age = 0
        self.takes: list[int] = []

    def wants(self, grows: bool) -> int:
        """How many blocks this step asks for."""
        if not self.takes:
            return self.prompt
        return int(grows and self.age % BLOCK_TOKENS == self.phase)


def recorded(model: Path, warm_steps: int, steps: int, seed: int = 0) -> Trace:
    """What vLLM's own scheduler asks of its pool under a load with chunked prefill.

    Args:
        model: a folder with the configuration of any small model; no weights are loaded.
    """
    from vllm.sampling_params import SamplingParams
    from vllm.v1.request import Request

    dice = random.Random(seed)
    scheduler = make_scheduler(model, num_blocks=32768)
    recorder = _Recorder(scheduler.kv_cache_manager.block_pool)
    done = []
    for step in range(warm_steps + steps):
        if dice.random() < 0.55:
            prompt = [step] * dice.randint(64, 2048)
            output = max(16, min(1024, int(dice.lognormvariate(5.5, 1))))
            params = SamplingParams(max_tokens=output, ignore_eos=True)
            scheduler.add_request(Request(str(step), prompt, params, None))
        take_step(scheduler)
        done.append(recorder.step())
    return Trace("recorded from the scheduler", tuple(done), warm_steps)


class _Recorder:
    """Stands between a scheduler and its stock pool."""

    def __init__(self, pool: Any) -> None:
        self._take, self._free = pool.get_new_blocks, pool.free_blocks
        self._taken_by: dict[int, int] = {}
        self._sizes: list[int] = []
        self._takes: list[int] = []
        self._frees: list[tuple[int, ...]] = []
        pool.get_new_blocks, pool.free_blocks = self._record_take, self._record_free

    def step(self) -> Step:
        """What has been asked for since the last call."""
        step = Step(tuple(self._takes), tuple(self._frees))
        self._takes, self._frees = [], []
        return step

    def _record_take(self, count: int) -> Any:
        blocks = self._take(count)
        self._taken_by.update((block.block_id, len(self._sizes)) for block in blocks)
        self._sizes.append(count)
        self._takes.append(count)
        return blocks

    def _record_free(self, ordered_blocks: Iterable[Any]) -> None:
        blocks = list(ordered_blocks)
        counts: defaultdict[int, int] = defaultdict(int)
        for block in reversed(blocks):
            counts[self._taken_by[block.block_id]] += 1
        assert all(self._sizes[number] == count for number, count in counts.items()), (
            "a call that frees part of what was taken at once cannot be told in a trace"
        )
        self._frees.append(tuple(counts))
        self._free(blocks)


def take_step(scheduler: Any, run: Callable[[Any], object] = id) -> None:
    """One step of vLLM's scheduler, with results made up.

    Args:
        run: given what was scheduled, in place of a worker.
    """
    finish_step(scheduler, scheduler.schedule(), run)


def finish_step(scheduler: Any, scheduled: Any, run: Callable[[Any], object] = id) -> None:
    """The part of a step that follows ``schedule``."""
    from vllm.v1.outputs import ModelRunnerOutput

    run(scheduled)
    names = list(scheduled.num_scheduled_tokens)
    requests = [scheduler.requests[name] for name in names]
    tokens = [[5] if r.num_computed_tokens >= r.num_tokens else [] for r in requests]
    results = ModelRunnerOutput(
        req_ids=names,
        req_id_to_index={name: index for index, name in enumerate(names)},
        sampled_token_ids=tokens,
        logprobs=None,
        prompt_logprobs_dict={},
        pooler_output=[],
    )
    scheduler.update_from_output(scheduled, results)


def make_scheduler(
    model: Path, num_blocks: int, tensors: Sequence[Any] = (), prefix_caching: bool = False
) -> Any:
    """vLLM's scheduler over a pool of ``num_blocks``, without workers.

    Args:
        tensors: how vLLM says that the blocks lie, for those who ask.
    """
    import torch
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    config = EngineArgs(
        model=str(model),
        skip_tokenizer_init=True,
        load_format="dummy",
        dtype="bfloat16",
        max_model_len=8192,
        max_num_seqs=256,
        max_num_batched_tokens=8192,
        enforce_eager=True,
        enable_prefix_caching=prefix_caching,
        async_scheduling=False,
    ).create_engine_config()
    config.cache_config.num_gpu_blocks = num_blocks
    spec = FullAttentionSpec(
        block_size=BLOCK_TOKENS, num_kv_heads=1, head_size=1, dtype=torch.float32
    )
    layout = KVCacheConfig(
        num_blocks=num_blocks,
        kv_cache_tensors=list(tensors),
        kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
    )
    manager = StructuredOutputManager(config)
    return Scheduler(config, layout, manager, block_size=BLOCK_TOKENS)
