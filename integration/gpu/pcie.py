"""How fast this machine moves pinned host memory to the device and back: the floor of a wake-up.

Run as a child, ``python -m integration.gpu.pcie OUT [cpu]``, so that its context on the device is
gone when servers are measured.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

from integration.gpu.record import GIB, Json, write_json

SIZE_BYTES = 2 * GIB
CPU_BYTES = 64 << 20
ROUNDS = 5


def measure(cpu: bool) -> Json:
    """GiB/s to the device and from it: the median of copies of one large pinned buffer."""
    import torch

    size = CPU_BYTES if cpu else SIZE_BYTES
    device = "cpu" if cpu else "cuda"
    host = torch.ones(size, dtype=torch.uint8, pin_memory=not cpu)
    there = torch.zeros(size, dtype=torch.uint8, device=device)

    def rate(target: torch.Tensor, source: torch.Tensor) -> float:
        seconds = []
        for _ in range(ROUNDS + 1):
            began = time.perf_counter()
            target.copy_(source, non_blocking=True)
            if not cpu:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        return round(size / GIB / statistics.median(seconds[1:]), 2)

    return {
        "to_device_gib_per_s": rate(there, host),
        "from_device_gib_per_s": rate(host, there),
        "bytes": size,
        "rounds": ROUNDS,
    }


if __name__ == "__main__":
    write_json(Path(sys.argv[1]), measure("cpu" in sys.argv[2:]))
