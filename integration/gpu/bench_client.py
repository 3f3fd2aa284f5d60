"""Runs vLLM's own serving benchmark several times in one process.

``vllm bench serve`` takes some 15 s to import on each start; here that happens once, while the
server starts. Each run is what the command line in its event says. Run by serving.py as a child.
"""

from __future__ import annotations

import json
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

from integration.gpu.record import EventLog


def healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def may_begin(spec: dict[str, Any]) -> bool:
    """The server answers, or, with several, whoever started us says so by making a file."""
    return Path(spec["go"]).exists() if "go" in spec else healthy(spec["port"])


def main() -> None:
    spec: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    log = EventLog(Path(spec["events"]))
    from vllm.benchmarks import serve
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    serve.add_cli_args(parser)
    log.add("imported")
    while not may_begin(spec):
        if time.time() > spec["deadline"]:
            raise SystemExit("the server did not come up in time")
        time.sleep(0.2)
    skipped = set()
    for run in spec["runs"]:
        late = time.time() + run["expected_s"] > spec["deadline"]
        if late or run.get("only_with") in skipped:
            skipped.add(run["label"])
            log.add("skipped", label=run["label"])
            continue
        if "port" in run and not healthy(run["port"]):
            log.add("run_failed", label=run["label"], error="the server does not answer")
            continue
        log.add("run_begin", label=run["label"], command=run["arguments"])
        try:
            serve.main(parser.parse_args(run["arguments"]))
            log.add("run_end", label=run["label"])
        except Exception as error:
            log.add("run_failed", label=run["label"], error=f"{type(error).__name__}: {error}")
    log.add("done")


if __name__ == "__main__":
    main()
