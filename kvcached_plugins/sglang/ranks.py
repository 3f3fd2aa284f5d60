"""How the ranks of one tensor-parallel group come to the same decisions."""

from __future__ import annotations

from typing import Any

import torch


class Agreement:
    """The least of each number over the ranks of ``group``; what is given if there is but one."""

    def __init__(self, group: Any) -> None:
        self._group = group
        self.ranks = int(torch.distributed.get_world_size(group))

    def __call__(self, *values: int) -> list[int]:
        if self.ranks == 1:
            return list(values)
        least = torch.tensor(values, dtype=torch.int64)
        torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN, group=self._group)
        return [int(value) for value in least.tolist()]
