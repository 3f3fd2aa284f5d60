"""The CUDA driver against a small fake of cuda.bindings: which calls it makes, and what it says."""

from __future__ import annotations

import enum
import itertools
import sys
import threading
import types
import uuid
from typing import Any

import pytest

from kvcached_vmm.arena import Arena
from kvcached_vmm.cuda_driver import CudaDriver
from kvcached_vmm.driver import DeviceMemory
from kvcached_vmm.errors import DeviceUnsupported, DriverError, OutOfMemory
from kvcached_vmm.extents import ExtentMap, Region
from kvcached_vmm.units import MIB

UUID = uuid.UUID("12345678-9abc-def0-1234-56789abcdef0")
GRANULE = 2 * MIB


class Result(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NO_DEVICE = 100
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_ILLEGAL_ADDRESS = 700


class Names:
    """An enumeration whose members are their own names."""

    def __getattr__(self, name: str) -> str:
        return name


class FakeCuda(types.ModuleType):
    """cuda.bindings.driver, as far as we use it. Answers are tuples that begin with
    a result; after one that is not success, the values are None."""

    CUresult = Result
    CUdevice_attribute = CUmemLocationType = CUmemAllocationType = Names()
    CUmemAccess_flags = CUmemAllocationGranularity_flags = Names()

    def __init__(self, capability: tuple[int, int] = (9, 0), has_vmm: int = 1) -> None:
        super().__init__("cuda.bindings.driver")
        self.calls: list[tuple[Any, ...]] = []
        self.failures: dict[str, Result] = {}
        self.context = threading.local()
        self.handles = itertools.count(70)
        self.attributes = {
            "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR": capability[0],
            "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR": capability[1],
            "CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED": has_vmm,
        }

    def CUmemAllocationProp(self) -> types.SimpleNamespace:  # noqa: N802
        return types.SimpleNamespace(location=types.SimpleNamespace())

    CUmemAccessDesc = CUmemAllocationProp

    def CUdeviceptr(self, address: int) -> int:  # noqa: N802
        return address

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            raise AttributeError(name)

        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append((name, *arguments))
            answer = self.answer(name, arguments)
            if name in self.failures:
                return (self.failures[name], *(None for _ in answer))
            return (Result.CUDA_SUCCESS, *answer)

        return call

    def answer(self, name: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        if name == "cuCtxSetCurrent":
            self.context.current = arguments[0]
        elif name in ("cuMemCreate", "cuMemAddressReserve", "cuMemUnmap", "cuMemGetInfo"):
            assert self.context.current == "context", "no context is current on this thread"
        return {
            "cuDeviceGet": ("gpu",),
            "cuDeviceGetAttribute": (self.attributes.get(str(arguments[0])) if arguments else 0,),
            "cuDeviceGetUuid": (types.SimpleNamespace(bytes=UUID.bytes),),
            "cuDevicePrimaryCtxRetain": ("context",),
            "cuMemGetAllocationGranularity": (GRANULE,),
            "cuMemAddressReserve": (1 << 40,),
            "cuMemCreate": (next(self.handles),) if name == "cuMemCreate" else (),
            "cuMemGetInfo": (3 * MIB, 80 * MIB),
        }.get(name, ())

    def names(self) -> list[str]:
        return [call[0] for call in self.calls]


def install(monkeypatch: pytest.MonkeyPatch, cuda: types.ModuleType | None) -> None:
    """Make ``cuda`` what ``from cuda.bindings import driver`` finds; None: nothing."""
    package, bindings = types.ModuleType("cuda"), types.ModuleType("cuda.bindings")
    package.bindings = bindings  # type: ignore[attr-defined]
    if cuda is not None:
        bindings.driver = cuda  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cuda", package)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None if cuda is None else bindings)
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", cuda)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    install(monkeypatch, fake)
    return fake


def refusal(monkeypatch: pytest.MonkeyPatch, cuda: types.ModuleType | None) -> str:
    """The one sentence with which a GPU is refused."""
    install(monkeypatch, cuda)
    with pytest.raises(DeviceUnsupported) as refused:
        CudaDriver(3)
    text = str(refused.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text


def test_a_gpu_is_known_by_its_uuid_and_its_granularity(cuda: FakeCuda) -> None:
    driver = CudaDriver(3)
    assert driver.device == f"GPU-{UUID}"
    assert driver.granularity == GRANULE
    assert cuda.calls[:2] == [("cuInit", 0), ("cuDeviceGet", 3)]
    (asked,) = [call for call in cuda.calls if call[0] == "cuMemGetAllocationGranularity"]
    assert asked[1].location.id == 3
    assert asked[1].location.type == "CU_MEM_LOCATION_TYPE_DEVICE"
    assert asked[1].type == "CU_MEM_ALLOCATION_TYPE_PINNED"
    assert asked[2] == "CU_MEM_ALLOC_GRANULARITY_MINIMUM"


def test_making_a_driver_takes_no_memory(cuda: FakeCuda) -> None:
    CudaDriver()
    assert not {"cuMemCreate", "cuMemAlloc", "cuMemAddressReserve"} & set(cuda.names())


def test_each_call_is_the_drivers_own_with_its_arguments(cuda: FakeCuda) -> None:
    driver = CudaDriver(3)
    cuda.calls.clear()
    base = driver.reserve(8 * MIB)
    handle = driver.create(2 * MIB)
    driver.map(base, 2 * MIB, handle)
    driver.release(handle)
    driver.allow(base, 2 * MIB)
    driver.unmap(base, 2 * MIB)
    driver.free(base, 8 * MIB)
    assert driver.memory() == DeviceMemory(free_bytes=3 * MIB, total_bytes=80 * MIB)
    access = cuda.calls[5][3][0]
    assert (access.location.id, access.flags) == (3, "CU_MEM_ACCESS_FLAGS_PROT_READWRITE")
    assert cuda.calls == [
        ("cuCtxSetCurrent", "context"),
        ("cuMemAddressReserve", 8 * MIB, GRANULE, 0, 0),
        ("cuMemCreate", 2 * MIB, cuda.calls[2][2], 0),
        ("cuMemMap", base, 2 * MIB, 0, handle, 0),
        ("cuMemRelease", handle),
        ("cuMemSetAccess", base, 2 * MIB, [access], 1),
        ("cuMemUnmap", base, 2 * MIB),
        ("cuMemAddressFree", base, 8 * MIB),
        ("cuMemGetInfo",),
    ]


def test_nothing_ever_waits_for_the_device(cuda: FakeCuda) -> None:
    arena = Arena(CudaDriver(), ExtentMap(4, [Region(0, GRANULE)], GRANULE, 1))
    arena.commit([0, 1, 2])
    arena.close()
    assert not [name for name in cuda.names() if "Synchronize" in name or "Wait" in name]
    assert cuda.names().count("cuMemSetAccess") == 1


def test_every_thread_gets_the_context_once(cuda: FakeCuda) -> None:
    driver = CudaDriver()
    driver.memory()
    driver.memory()
    assert cuda.names().count("cuCtxSetCurrent") == 1
    thread = threading.Thread(target=lambda: (driver.memory(), driver.create(GRANULE)))
    thread.start()
    thread.join()
    assert cuda.names().count("cuCtxSetCurrent") == 2
    assert cuda.names()[-1] == "cuMemCreate"


def test_out_of_memory_is_told_from_other_failures(cuda: FakeCuda) -> None:
    driver = CudaDriver()
    cuda.failures["cuMemCreate"] = Result.CUDA_ERROR_OUT_OF_MEMORY
    with pytest.raises(OutOfMemory, match=r"^cuMemCreate failed: CUDA_ERROR_OUT_OF_MEMORY\.$"):
        driver.create(GRANULE)
    cuda.failures["cuMemCreate"] = Result.CUDA_ERROR_INVALID_VALUE
    with pytest.raises(DriverError) as failed:
        driver.create(GRANULE)
    assert not isinstance(failed.value, OutOfMemory)
    assert (failed.value.call, failed.value.code) == ("cuMemCreate", "CUDA_ERROR_INVALID_VALUE")


def test_an_arena_over_a_full_gpu_leaves_nothing_behind(cuda: FakeCuda) -> None:
    arena = Arena(CudaDriver(), ExtentMap(4, [Region(0, GRANULE)], GRANULE, 1))
    cuda.failures["cuMemSetAccess"] = Result.CUDA_ERROR_OUT_OF_MEMORY
    with pytest.raises(OutOfMemory):
        arena.commit([0, 1])
    names = cuda.names()
    assert names.count("cuMemCreate") == names.count("cuMemRelease") == 2
    assert names.count("cuMemMap") == names.count("cuMemUnmap") == 2
    assert arena.committed_bytes == 0


def test_a_missing_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    told = refusal(monkeypatch, None)
    assert "cuda-python is not installed" in told
    assert "pip install" in told


def test_a_missing_driver_library_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCuda()

    def no_library(_: int) -> None:
        raise RuntimeError("Failed to dlopen libcuda.so.1")

    fake.cuInit = no_library
    told = refusal(monkeypatch, fake)
    assert "GPU 3 cannot be used: Failed to dlopen libcuda.so.1; check" in told
    assert "NVIDIA driver is installed" in told


def test_a_gpu_that_is_not_there_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCuda()
    fake.failures["cuDeviceGet"] = Result.CUDA_ERROR_NO_DEVICE
    told = refusal(monkeypatch, fake)
    assert "CUDA_ERROR_NO_DEVICE" in told
    assert "CUDA_VISIBLE_DEVICES" in told


@pytest.mark.parametrize("capability", [(7, 0), (7, 5)])
def test_a_gpu_older_than_ampere_is_refused_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]
) -> None:
    """Volta faults when pages are mapped beside running kernels (kvcached #465)."""
    told = refusal(monkeypatch, FakeCuda(capability))
    assert f"compute capability {capability[0]}.{capability[1]}" in told
    assert "Ampere" in told
    assert "unset ENABLE_KVCACHED" in told


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (12, 1)])
def test_ampere_and_newer_are_welcome(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]
) -> None:
    install(monkeypatch, FakeCuda(capability))
    assert CudaDriver().granularity == GRANULE


def test_a_new_gpu_without_virtual_memory_is_not_told_that_it_is_old(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert "needs an Ampere GPU" not in refusal(monkeypatch, FakeCuda((9, 0), has_vmm=0))


def test_a_gpu_that_fails_while_it_is_asked_about_itself_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = FakeCuda()
    fake.failures["cuDevicePrimaryCtxRetain"] = Result.CUDA_ERROR_INVALID_VALUE
    assert "GPU 3 cannot be used" in refusal(monkeypatch, fake)
