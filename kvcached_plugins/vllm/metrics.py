"""The figures of a server's engines on vLLM's own ``/metrics``."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, CollectorRegistry, generate_latest

from kvcached_plugins.metrics import LedgerCollector
from kvcached_plugins.settings import Settings
from kvcached_plugins.vllm.server import own_engines

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.requests import Request
    from starlette.responses import Response

_with_us: weakref.WeakSet[CollectorRegistry] = weakref.WeakSet()


def attach_router(original: Callable[..., Any], app: FastAPI) -> Any:
    """Show the ledger's figures of this server's engines where vLLM shows its own.

    One API server answers from the process's registry, and ours joins that. Several answer from a
    registry that each scrape makes afresh, out of anybody's reach: there our route comes first, and
    answers from a registry of the same content with ours beside it.
    """
    from vllm.v1.metrics.prometheus import get_prometheus_registry

    registry: CollectorRegistry = get_prometheus_registry()
    if registry not in _with_us:
        mine = own_engines(getattr(app.state, "args", None))
        registry.register(LedgerCollector(Settings.read().directory, mine))
        _with_us.add(registry)
    if registry is not REGISTRY:
        app.add_route("/metrics", _answer_from(registry), include_in_schema=False)
    return original(app)


def _answer_from(registry: CollectorRegistry) -> Callable[[Request], Response]:
    from starlette.responses import Response

    def metrics(_: Request) -> Response:
        return Response(generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    return metrics
