"""The figures of a server's schedulers on SGLang's own ``/metrics``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvcached_plugins.own_engines import OwnEngines
from kvcached_plugins.refusal import Refusal
from kvcached_plugins.settings import Settings

if TYPE_CHECKING:
    from fastapi import FastAPI


def add_prometheus_middleware(original: Callable[..., None], app: FastAPI) -> None:
    """Answer on SGLang's route from a registry of the same content with the ledger's figures of
    this server beside it: the one that SGLang makes is out of anybody's reach."""
    # Not at the top: SGLang says in the environment where its processes keep their figures, and
    # prometheus_client looks there once, when it is imported.
    from prometheus_client import CollectorRegistry, make_asgi_app, multiprocess

    from kvcached_plugins.metrics import LedgerCollector

    original(app)
    route: Any = app.routes[-1]
    if getattr(route, "path", None) != "/metrics":
        raise Refusal(
            "SGLang did not add its /metrics where we expected it; leave --enable-metrics out, or "
            "unset ENABLE_KVCACHED."
        )
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    registry.register(LedgerCollector(Settings.read().directory, OwnEngines()))
    route.app = make_asgi_app(registry=registry)
