"""What SGLang's scheduler may ask for next."""

from __future__ import annotations

import itertools
from typing import Any

from kvcached_plugins.tenant import QUEUE_LOOK


def pages_of(request: Any, page_size: int) -> int:
    """Pages that hold the tokens that a request has so far."""
    return -(-(len(request.origin_input_ids) + len(request.output_ids)) // page_size)


def uncached_pages(request: Any, page_size: int) -> int:
    """Pages that a request needs beyond the prefix that SGLang has found for it, which has its
    memory already."""
    has_length = hasattr(request, "prefix_len")  # since 0.5.22
    found = request.prefix_len if has_length else len(request.prefix_indices)
    return pages_of(request, page_size) - found // page_size


def queued_pages(scheduler: Any, page_size: int) -> int:
    """What the requests need that wait and could run beside the others."""
    running = int(scheduler.running_batch.batch_size())
    room = min(int(scheduler.max_running_requests) - running, QUEUE_LOOK)
    waiting = itertools.islice(scheduler.waiting_queue, max(0, room))
    return sum(pages_of(request, page_size) for request in waiting)


def demand_pages(scheduler: Any, page_size: int) -> int:
    """Pages that SGLang may allocate in one round, at most; 0 when there is nothing to run.

    A prefill is bounded by its chunk, or by the prefill budget and one request beyond it; it and
    every running request may need one page more than their tokens fill.
    """
    waiting = scheduler.waiting_queue
    batches = {id(b): b for b in (scheduler.running_batch, scheduler.last_batch) if b}
    requests = sum(int(batch.batch_size()) for batch in batches.values())
    if not requests and not waiting and scheduler.chunked_req is None:
        return 0
    bound = scheduler.chunked_prefill_size
    if bound is None:
        bound = scheduler.max_prefill_tokens + scheduler.max_req_len
    tokens = bound if scheduler.chunked_req is not None else 0
    for request in waiting:
        if tokens >= bound:
            break
        tokens += len(request.origin_input_ids) + len(request.output_ids)
        requests += 1
    return int(-(-min(tokens, bound) // page_size) + requests)


def is_idle(scheduler: Any) -> bool:
    """Whether no request runs, waits or has just ended."""
    return bool(
        scheduler.running_batch.is_empty()
        and not scheduler.waiting_queue
        and scheduler.chunked_req is None
        and not scheduler.last_batch
    )
