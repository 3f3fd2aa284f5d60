"""What vLLM's scheduler is about to need, and what a step is for."""

from __future__ import annotations

import itertools
from typing import Any

from kvcached_plugins.tenant import QUEUE_LOOK


def queued_blocks(scheduler: Any, block_tokens: int) -> int:
    """Blocks of ``block_tokens`` that requests need which wait and could run beside the others."""
    room = min(scheduler.max_num_running_reqs - len(scheduler.running), QUEUE_LOOK)
    # All at once: the engine's main thread adds requests meanwhile.
    waiting = tuple(itertools.islice(scheduler.waiting, max(0, room)))
    return int(sum(-(-request.num_tokens // block_tokens) for request in waiting))


def computes_first_token(scheduler_output: Any) -> bool:
    """Whether a step computes a prompt, or a further part of one."""
    known = scheduler_output.scheduled_cached_reqs
    return bool(scheduler_output.scheduled_new_reqs) or 0 in known.num_output_tokens
