"""One of the two servers of paired.py: its process, its answers and its memory."""

from __future__ import annotations

import argparse
import json
import time
import urllib.request
from pathlib import Path
from typing import Any

from integration.gpu.bench_client import healthy
from integration.gpu.onoff import serve_command
from integration.gpu.process import Child, environment
from integration.gpu.record import Json, plugin_lines
from integration.gpu.workload import Answer, Request


class Reseed:
    """What both servers' workers can do besides (vLLM's ``--worker-extension-cls``)."""

    def kvc_reseed(self) -> str:
        from integration.gpu.arm import reseed

        return str(reseed(self))

    def kvc_memory(self) -> Json:
        """Bytes that this process knows of: torch's, and what the arena has committed."""
        import torch

        found: Json = {}
        if torch.cuda.is_available():
            found["torch_reserved"] = torch.cuda.memory_reserved()
        elastic = getattr(self, "kvcached", None)
        if elastic is not None:
            found["extents_committed"] = len(elastic.arena.committed)
        return found


class Server:
    """One arm: its process, what it said of itself, and its answers."""

    def __init__(self, name: str, port: int, work: Path, o: argparse.Namespace) -> None:
        self.name = name
        self.port = port
        self.folder = work / name
        self.folder.mkdir()
        self.log = self.folder / "server.log"
        self.ready_after_s: float | None = None
        self.found: Json = {}
        arguments = argparse.Namespace(**vars(o))
        arguments.port = port
        arguments.engine_args = {
            "max_num_seqs": o.max_num_seqs,
            "max_num_batched_tokens": 8192,
            "gpu_memory_utilization": o.utilization,
            **({"compilation_config": o.compilation} if o.compilation else {}),
            **({"worker_extension_cls": "integration.gpu.server.Reseed"} if o.reseed else {}),
            **o.engine_args,
        }
        extra = {**o.env, **({"VLLM_SERVER_DEV_MODE": "1"} if o.reseed else {})}
        if name == "on":
            extra |= {"KVCACHED_DIR": str(self.folder / "ledger"), **o.plugin_env}
        env = environment(name == "on", extra, o.cache / "shared")
        env.pop("VLLM_KV_CACHE_LAYOUT", None)
        self.child = Child(serve_command(arguments), self.log, env)

    @property
    def usable(self) -> bool:
        return self.ready_after_s is not None and self.child.returncode is None

    def look(self) -> None:
        if self.ready_after_s is None and healthy(self.port):
            self.ready_after_s = round(time.time() - self.child.launched, 2)

    def post(self, path: str, body: Json, timeout_s: float) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def forget(self, timeout_s: float = 1.0) -> None:
        """Drop the prefix cache."""
        self.post("/reset_prefix_cache", {}, timeout_s)

    def call(self, method: str, timeout_s: float = 20.0) -> Any:
        answer = self.post("/collective_rpc", {"method": method}, timeout_s)
        return answer["results"][0]

    def complete(self, model: str, request: Request, best: int | None, timeout_s: float) -> Answer:
        body = {
            "model": model,
            "prompt": request.prompt,
            "max_tokens": request.max_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "logprobs": best,
            "return_tokens_as_token_ids": best is not None,
            "return_token_ids": True,
        }
        choice = self.post("/v1/completions", body, timeout_s)["choices"][0]
        tops = [
            [(int(token.removeprefix("token_id:")), value) for token, value in top.items()]
            for top in ((choice.get("logprobs") or {}).get("top_logprobs") or [])
        ]
        return Answer(list(choice["token_ids"]), tops)

    def describe(self, status: int | None) -> Json:
        return {
            "command": self.child.command,
            "plugin": self.name,
            "startup_s": self.ready_after_s,
            **self.found,
            "exit_status": status,
            "plugin_log": plugin_lines(self.log),
        }
