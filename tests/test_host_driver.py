"""Host memory with a GPU driver's semantics."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from faults import PAGE, AccessProbe, content, fill, open_files

from kvcached_vmm.driver import DeviceMemory
from kvcached_vmm.errors import DriverError, OutOfMemory
from kvcached_vmm.host_driver import HostDriver
from kvcached_vmm.units import GIB, MIB


def mapped(driver: HostDriver, address: int, size: int) -> None:
    """Map fresh memory at ``address`` and let it be used."""
    handle = driver.create(size)
    driver.map(address, size, handle)
    driver.release(handle)
    driver.allow(address, size)


def resident_bytes(address: int) -> int:
    """Bytes of the kernel mapping at ``address`` that have memory, as the kernel reports it."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    for line in lines:
        bounds = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if bounds and int(bounds[1], 16) <= address < int(bounds[2], 16):
            return next(int(at.split()[1]) * 1024 for at in lines if at.startswith("Rss:"))
    raise AssertionError("nothing is mapped there")


def test_memory_can_be_used_from_allow_to_unmap_and_at_no_other_time(driver: HostDriver) -> None:
    probe = AccessProbe()
    base = driver.reserve(2 * PAGE)
    assert not probe(base)
    handle = driver.create(PAGE)
    driver.map(base, PAGE, handle)
    assert not probe(base), "mapped memory is not accessible before allow"
    driver.allow(base, PAGE)
    assert probe(base)
    assert not probe(base + PAGE)
    driver.unmap(base, PAGE)
    assert not probe(base)
    driver.release(handle)
    driver.free(base, 2 * PAGE)
    probe.close()


def test_an_access_to_memory_that_is_not_there_kills_the_process(driver: HostDriver) -> None:
    base = driver.reserve(PAGE)
    child = os.fork()
    if not child:
        faulthandler.disable()
        content(base, 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGSEGV
    driver.free(base, PAGE)


def test_memory_goes_back_to_the_kernel_and_comes_back_as_zeros(driver: HostDriver) -> None:
    base = driver.reserve(4 * MIB)
    mapped(driver, base, 4 * MIB)
    fill(base, 4 * MIB, 0xAB)
    assert resident_bytes(base) == 4 * MIB
    driver.unmap(base, 4 * MIB)
    assert resident_bytes(base) == 0
    mapped(driver, base, 4 * MIB)
    assert content(base, 4 * MIB) == bytes(4 * MIB)
    driver.unmap(base, 4 * MIB)
    driver.free(base, 4 * MIB)


def test_memory_lives_while_a_handle_or_a_mapping_refers_to_it(driver: HostDriver) -> None:
    base = driver.reserve(PAGE)
    handle = driver.create(PAGE)
    driver.map(base, PAGE, handle)
    driver.release(handle)
    assert driver.allocated_bytes == PAGE
    driver.unmap(base, PAGE)
    assert driver.allocated_bytes == 0
    handle = driver.create(PAGE)
    driver.map(base, PAGE, handle)
    driver.unmap(base, PAGE)
    assert driver.allocated_bytes == PAGE
    driver.release(handle)
    assert driver.allocated_bytes == 0
    driver.free(base, PAGE)


def test_one_call_gives_access_to_a_run_of_mappings(driver: HostDriver) -> None:
    probe = AccessProbe()
    base = driver.reserve(4 * PAGE)
    for offset, size in ((0, PAGE), (PAGE, 2 * PAGE)):
        driver.map(base + offset, size, driver.create(size))
    driver.allow(base, 3 * PAGE)
    assert probe.pages(base, 4 * PAGE, PAGE) == {0, PAGE, 2 * PAGE}
    with pytest.raises(DriverError, match="not mapped"):
        driver.allow(base, 4 * PAGE)
    for offset, size, handle in ((0, PAGE, 1), (PAGE, 2 * PAGE, 2)):
        driver.unmap(base + offset, size)
        driver.release(handle)
    driver.free(base, 4 * PAGE)
    probe.close()


def test_out_of_memory_is_a_type_of_its_own_and_passes() -> None:
    driver = HostDriver(capacity_bytes=2 * PAGE, granularity=PAGE)
    first = driver.create(2 * PAGE)
    with pytest.raises(OutOfMemory, match=f"create failed: no {PAGE} bytes of host memory"):
        driver.create(PAGE)
    assert driver.allocated_bytes == 2 * PAGE
    assert driver.memory() == DeviceMemory(free_bytes=0, total_bytes=2 * PAGE)
    driver.release(first)
    driver.release(driver.create(2 * PAGE))


def test_wrong_calls_are_refused_and_change_nothing(driver: HostDriver) -> None:
    base = driver.reserve(4 * PAGE)
    handle, other = driver.create(PAGE), driver.create(PAGE)
    driver.map(base, PAGE, handle)
    wrong = {
        "a size between granules": lambda: driver.create(PAGE + 1),
        "no size": lambda: driver.reserve(0),
        "a handle of another size": lambda: driver.map(base + PAGE, 2 * PAGE, other),
        "no such handle": lambda: driver.map(base + PAGE, PAGE, 99),
        "an address that is taken": lambda: driver.map(base, PAGE, other),
        "a handle that is mapped": lambda: driver.map(base + PAGE, PAGE, handle),
        "an address outside": lambda: driver.map(base + 4 * PAGE, PAGE, other),
        "part of a mapping": lambda: driver.unmap(base, 2 * PAGE),
        "nothing to unmap": lambda: driver.unmap(base + PAGE, PAGE),
        "no such handle to release": lambda: driver.release(99),
        "a reservation in use": lambda: driver.free(base, 4 * PAGE),
        "part of a reservation": lambda: driver.free(base, PAGE),
    }
    for what, call in wrong.items():
        with pytest.raises(DriverError):
            call()
        assert driver.allocated_bytes == 2 * PAGE, what
    driver.unmap(base, PAGE)
    driver.release(handle)
    driver.release(other)
    driver.free(base, 4 * PAGE)


@pytest.mark.parametrize(
    "granularity",
    [
        0,
        1000,
        3 * PAGE,
    ],
)
def test_a_granularity_that_cannot_be_mapped_is_refused(granularity: int) -> None:
    with pytest.raises(ValueError, match="power of two of whole pages"):
        HostDriver(granularity=granularity)


def test_addresses_are_aligned_and_cost_no_memory() -> None:
    driver = HostDriver()
    base = driver.reserve(64 * GIB)
    assert base % driver.granularity == 0
    assert driver.allocated_bytes == 0
    assert resident_bytes(base) == 0
    driver.free(base, 64 * GIB)


def test_neighbours_share_one_kernel_mapping(driver: HostDriver) -> None:
    """The kernel allows 65,530 mappings in a process; a large arena must not use them up."""

    def kernel_mappings() -> int:
        return len(Path("/proc/self/maps").read_text().splitlines())

    base = driver.reserve(256 * PAGE)
    before = kernel_mappings()
    for offset in range(0, 256 * PAGE, PAGE):
        mapped(driver, base + offset, PAGE)
    assert kernel_mappings() - before < 8
    for offset in range(0, 256 * PAGE, PAGE):
        driver.unmap(base + offset, PAGE)
    driver.free(base, 256 * PAGE)


def test_a_reservation_given_back_leaves_no_file_open(driver: HostDriver) -> None:
    before = open_files()
    for _ in range(10):
        driver.free(driver.reserve(PAGE), PAGE)
    assert open_files() == before


def test_the_machine_is_asked_when_no_capacity_is_given() -> None:
    memory = HostDriver().memory()
    assert 0 < memory.free_bytes <= memory.total_bytes


def test_threads_may_use_one_driver(driver: HostDriver) -> None:
    base = driver.reserve(4 * 8 * PAGE)
    failures: list[BaseException] = []

    def churn(start: int) -> None:
        try:
            for turn in range(100):
                address = base + start + turn % 8 * PAGE
                mapped(driver, address, PAGE)
                fill(address, PAGE, turn)
                driver.unmap(address, PAGE)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=churn, args=(lane * 8 * PAGE,)) for lane in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    driver.free(base, 4 * 8 * PAGE)


def test_memory_cannot_be_mapped_over_a_mapping_that_starts_before() -> None:
    driver = HostDriver(capacity_bytes=MIB, granularity=PAGE)
    base = driver.reserve(2 * PAGE)
    driver.map(base, 2 * PAGE, driver.create(2 * PAGE))
    with pytest.raises(DriverError):
        driver.map(base + PAGE, PAGE, driver.create(PAGE))


def test_two_threads_cannot_both_take_the_last_memory() -> None:
    meet = threading.Barrier(2, timeout=0.2)

    class Slow(HostDriver):
        def memory(self) -> DeviceMemory:
            answer = super().memory()
            with contextlib.suppress(threading.BrokenBarrierError):
                meet.wait()
            return answer

    driver = Slow(capacity_bytes=PAGE, granularity=PAGE)

    def create() -> None:
        with contextlib.suppress(OutOfMemory):
            driver.create(PAGE)

    threads = [threading.Thread(target=create) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert driver.allocated_bytes == PAGE


def test_a_process_without_file_descriptors_gets_a_driver_error() -> None:
    script = (
        "import resource\n"
        "from kvcached_vmm.errors import DriverError\n"
        "from kvcached_vmm.host_driver import HostDriver\n"
        "driver = HostDriver(capacity_bytes=1 << 20)\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))\n"
        "try:\n    driver.reserve(1 << 20)\n"
        "except DriverError:\n    print('refused')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "refused\n", done.stderr
