"""The entry point ``vllm.endpoint_plugins: kvcached_endpoint``: limits over vLLM's HTTP server.

    GET /kvcached            this server's engines, their figures and limits, and the budget
    PATCH /kvcached/limits   {"minimum": "1GiB", "maximum": null, "weight": 2, "cache": 268435456}

vLLM loads an endpoint plugin only where ``VLLM_PLUGINS`` names it. That variable is an allow-list
for all plugins, so name the elastic cache beside it, and other plugins that you use:

    VLLM_PLUGINS=kvcached,kvcached_endpoint ENABLE_KVCACHED=1 vllm serve MODEL --api-key ...

Sizes are numbers of bytes or texts such as "2GiB"; ``null`` takes a maximum or the bound of the
cache away; what is not named stays. Limits are of each engine of the server on each of its devices.
Either all of a request is in force when it is answered, or nothing of it.

vLLM's own guard covers a few prefixes and not these paths, so they ask for the server's key
themselves. A server without a key lets everybody who reaches it change its limits.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from kvcached_plugins import OFF, TOGGLE, limits
from kvcached_plugins.limits import NONE, BadLimit, Change
from kvcached_plugins.settings import Settings
from kvcached_plugins.vllm.server import Server, own_engines
from kvcached_vmm.errors import KVCachedError

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.requests import Request
    from starlette.responses import Response

logger = logging.getLogger("vllm.kvcached")

BODY_BYTES = 1 << 16
"""A longer body is refused unread."""

FIELDS = ("minimum", "maximum", "weight", "cache")


class BadRequest(KVCachedError):
    """The request cannot be done; ``status`` is the HTTP status that says so."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


class Endpoint:
    """What vLLM calls an endpoint plugin: it adds our routes if the elastic cache is on."""

    name = "kvcached_endpoint"
    required_tasks: tuple[str, ...] | None = None

    def __init__(self) -> None:
        self._keys: list[bytes] | None = None
        self._server: Server | None = None

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes. They refuse everything until ``init_state`` has been called."""
        if os.environ.get(TOGGLE, "").strip().lower() in OFF:
            logger.info("kvcached: %s is not set, so there is no /kvcached", TOGGLE)
            return
        if "kvcached" not in os.environ.get("VLLM_PLUGINS", "kvcached").split(","):
            logger.warning(
                "kvcached: VLLM_PLUGINS names kvcached_endpoint but not kvcached, so this server's "
                "KV cache is not elastic; name both"
            )
        app.add_route("/kvcached", self._show, methods=["GET"])
        app.add_route("/kvcached/limits", self._change, methods=["PATCH"])

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Learn the server's keys and its engines, before it answers anybody."""
        keys = args.api_key or [os.environ.get("VLLM_API_KEY")]
        self._keys = [_digest(key) for key in keys if key]
        self._server = Server(Settings.read().directory, own_engines(args))

    async def _show(self, request: Request) -> Response:
        from starlette.concurrency import run_in_threadpool

        if not self._may(request):
            return _unauthorized()
        return await run_in_threadpool(self._answer)

    async def _change(self, request: Request) -> Response:
        from starlette.concurrency import run_in_threadpool

        if not self._may(request):
            return _unauthorized()
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > BODY_BYTES:
                return _error(413, f"The body is longer than {BODY_BYTES} bytes.")
        return await run_in_threadpool(self._answer, body)

    def _answer(self, body: bytes | None = None) -> Response:
        """Change what ``body`` says, if there is one; answer with what is in force then."""
        from starlette.responses import JSONResponse

        assert self._server is not None
        try:
            if body is not None:
                self._server.apply(parse(body))
            found = self._server.read()
        except BadRequest as error:
            return _error(error.status, str(error))
        except BadLimit as error:
            return _error(422, str(error))
        except KVCachedError as error:
            return _error(503, str(error))
        return JSONResponse(
            {
                "devices": [
                    {
                        "device": view.device,
                        "budget_bytes": view.budget_bytes,
                        "set_by_user": view.set_by_user,
                        "capacity_bytes": view.capacity_bytes,
                        "used_bytes": view.used_bytes,
                        "free_bytes": view.free_bytes,
                        "engines": [asdict(account) for account in accounts],
                    }
                    for view, accounts in found
                ]
            }
        )

    def _may(self, request: Request) -> bool:
        """Whether the request has one of the server's keys; compared in constant time."""
        if self._keys is None:
            return False
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        digest = _digest(given)
        matches = [secrets.compare_digest(digest, key) for key in self._keys]
        return not self._keys or (scheme.lower() == "bearer" and any(matches))


def parse(body: bytes) -> Change:
    """The change that a JSON object asks for.

    Raises:
        BadRequest: 400 if it is not JSON, 422 if it is not a change.
    """
    try:
        asked = json.loads(body, object_pairs_hook=_each_once)
    except (ValueError, RecursionError):
        raise BadRequest(400, "The body is not JSON.") from None
    if not isinstance(asked, dict) or not asked:
        raise BadRequest(422, f"Give a JSON object with one or more of {', '.join(FIELDS)}.")
    unknown = sorted(asked.keys() - set(FIELDS))
    if unknown:
        raise BadRequest(422, f"{unknown[0]!r} is none of {', '.join(FIELDS)}.")
    given = {**dict.fromkeys(FIELDS), **asked}
    for field in (each for each in asked if asked[each] is None):
        if field not in ("maximum", "cache"):
            raise BadRequest(422, f"{field}: null is not accepted: only maximum and cache take it.")
        given[field] = NONE
    try:
        return limits.change(**given)
    except BadLimit as error:
        raise BadRequest(422, str(error)) from error


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _unauthorized() -> Response:
    answer = _error(401, "Give one of this server's API keys: Authorization: Bearer KEY.")
    answer.headers["WWW-Authenticate"] = "Bearer"
    return answer


def _error(status: int, sentence: str) -> Response:
    from starlette.responses import JSONResponse

    return JSONResponse({"error": {"message": sentence, "code": status}}, status_code=status)


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise BadRequest(422, "Each field may be given once.")
    return dict(pairs)
