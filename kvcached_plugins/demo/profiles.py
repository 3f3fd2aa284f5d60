"""What the demo runs on a machine without a GPU, and on one with."""

from __future__ import annotations

from dataclasses import dataclass, replace

from kvcached_plugins.demo.engines import (
    LONGEST_TOKENS,
    SGLANG,
    SGLANG_CPU,
    VLLM,
    VLLM_CPU,
    Engine,
)
from kvcached_plugins.demo.load import Burst
from kvcached_plugins.demo.models import Shape
from kvcached_vmm.errors import EngineUnsupported
from kvcached_vmm.units import GIB, MIB

# How much of the budget one burst asks for. More than half, so that a static split cannot hold
# it; less than all of it, so that one engine can.
BURST_SHARE = 0.85


@dataclass(frozen=True)
class Profile:
    """An engine, a model, a budget, and bursts that fit them."""

    engine: Engine
    shape: Shape
    budget_bytes: int
    prompt_tokens: tuple[int, int]
    output_tokens: tuple[int, int]
    period_s: float

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


HOST = Profile(
    engine=VLLM_CPU,
    shape=Shape(layers=4, hidden=256, intermediate=512, heads=8, kv_heads=8, head_dim=64),
    budget_bytes=256 * MIB,
    prompt_tokens=(128, 384),
    output_tokens=(128, 256),
    period_s=14,
)

GPU = Profile(
    engine=VLLM,
    shape=Shape(layers=32, hidden=2048, intermediate=8192, heads=16, kv_heads=8, head_dim=128),
    budget_bytes=8 * GIB,
    prompt_tokens=(256, 768),
    output_tokens=(192, 320),
    period_s=8,
)

PROFILES = {
    "vllm": (HOST, GPU),
    "sglang": (
        replace(GPU, engine=SGLANG),
        # Its attention on a CPU takes longer: fewer tokens to generate, as much memory.
        replace(
            HOST,
            engine=SGLANG_CPU,
            shape=HOST.shape._replace(value_bytes=4),
            prompt_tokens=(192, 448),
            output_tokens=(64, 128),
        ),
    ),
}
"""By the name of the engine; of those whose engine is usable here, the first is taken."""


def installed_profile(engine: str) -> Profile:
    """The profile for an engine in this environment.

    Raises:
        EngineUnsupported: it is not installed.
    """
    for profile in PROFILES[engine]:
        if profile.engine.version is not None:
            return profile
    title = {"vllm": "vLLM", "sglang": "SGLang"}[engine]
    raise EngineUnsupported(
        f"No {title} in this environment: pip install 'kvcached-plugins[{engine}]' on a machine"
        f" with an NVIDIA GPU, or use `make demo ENGINE={engine}` from a checkout, which sets one"
        " up elsewhere."
    )
