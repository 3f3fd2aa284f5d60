"""A torch tensor over an arena: the same bytes, whatever is committed."""

from __future__ import annotations

import faulthandler
import os
import signal
from collections.abc import Iterator

import pytest
from faults import PAGE, content, fill

from kvcached_vmm.arena import Arena
from kvcached_vmm.extents import ExtentMap, Region
from kvcached_vmm.host_driver import HostDriver

torch = pytest.importorskip("torch")
tensors = pytest.importorskip("kvcached_vmm.tensors")
CPU = torch.device("cpu")


@pytest.fixture
def arena(driver: HostDriver) -> Iterator[Arena]:
    """Eight extents of a page each, the first committed."""
    arena = Arena(driver, ExtentMap(8, [Region(0, PAGE)], PAGE, 1))
    arena.commit([0])
    yield arena
    arena.close()


def test_a_tensor_over_mostly_empty_memory_costs_none(arena: Arena, driver: HostDriver) -> None:
    tensor = tensors.arena_tensor(arena, 8 * PAGE, CPU)
    assert (tensor.shape, tensor.dtype) == ((8 * PAGE,), torch.int8)
    assert tensor.data_ptr() == arena.base
    assert driver.allocated_bytes == PAGE


def test_tensor_and_arena_are_the_same_bytes(arena: Arena) -> None:
    tensor = tensors.arena_tensor(arena, 8 * PAGE, CPU)
    arena.commit([5])
    tensor[5 * PAGE : 6 * PAGE] = 7
    assert content(arena.base + 5 * PAGE, PAGE) == b"\7" * PAGE
    fill(arena.base, PAGE, 3)
    assert int(tensor[:PAGE].sum()) == 3 * PAGE


def test_views_of_other_types_and_strides_work_on_committed_blocks(arena: Arena) -> None:
    """As engines do: one buffer, a strided view of another type per layer."""
    buffer = tensors.arena_tensor(arena, 8 * PAGE, CPU)
    layers = buffer.view(torch.bfloat16).view(8, 2, -1)
    arena.commit([2])
    layers[2, 0] = 1.5
    layers[2, 1] = -2.0
    assert float(layers[2].float().sum()) == (1.5 - 2.0) * PAGE / 4
    arena.decommit([2])
    arena.commit([2])
    assert float(layers[2].float().sum()) == 0


def test_an_access_to_a_block_that_is_not_committed_is_a_fault(arena: Arena) -> None:
    tensor = tensors.arena_tensor(arena, 8 * PAGE, CPU)
    child = os.fork()
    if not child:
        faulthandler.disable()
        tensor[3 * PAGE] = 1
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGSEGV


def test_part_of_an_arena_may_be_viewed_but_not_more_than_it_has(arena: Arena) -> None:
    assert tensors.arena_tensor(arena, PAGE + 1, CPU).numel() == PAGE + 1
    with pytest.raises(ValueError, match=f"the arena has {8 * PAGE} bytes, not {8 * PAGE + 1}"):
        tensors.arena_tensor(arena, 8 * PAGE + 1, CPU)


def test_a_gpu_tensor_is_asked_for_by_the_address_of_the_arena(
    arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(torch, "as_tensor", lambda data, device: asked.append((data, device)))
    tensors.arena_tensor(arena, 2 * PAGE, torch.device("cuda", 1))
    ((exported, device),) = asked
    assert device == torch.device("cuda", 1)
    interface = exported.__cuda_array_interface__
    assert interface["data"] == (arena.base, False)
    assert (interface["shape"], interface["typestr"]) == ((2 * PAGE,), "|i1")


class Stream:
    """A stand-in for a CUDA stream, which is busy or not."""

    def __init__(self, done: bool) -> None:
        self.done = done

    def query(self) -> bool:
        return self.done


def test_a_stream_that_rests_is_given_no_work_by_a_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    """An event is work as well: a GPU that serves another process would have to turn to it."""
    recorded = []

    class Event:
        def record(self, stream: Stream) -> None:
            recorded.append(stream)

        def query(self) -> bool:
            return recorded[-1].done

    stream = Stream(done=True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    mark = tensors.StreamMarks(torch.device("cuda", 0))
    assert mark().query()
    assert not recorded
    stream.done = False
    waits = mark()
    assert not waits.query()
    stream.done = True
    assert waits.query()
    assert recorded == [stream]
