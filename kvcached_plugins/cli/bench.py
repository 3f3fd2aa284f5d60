"""`kvcached bench`: what mapping memory costs on this machine, with advice."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from typing import Annotated, Any

import typer

from kvcached_plugins import bench as measuring
from kvcached_plugins.bench import CALLS, CUDA_EXTENTS, HOST_EXTENTS, Costs, Link
from kvcached_plugins.cli import figures
from kvcached_plugins.cli.figures import short
from kvcached_vmm.cuda_driver import CudaDriver
from kvcached_vmm.driver import Driver
from kvcached_vmm.errors import DeviceUnsupported, SettingsError
from kvcached_vmm.extents import EXTENT_BYTES
from kvcached_vmm.host_driver import HostDriver
from kvcached_vmm.units import GIB, format_size, parse_size

HEADINGS = ("EXTENT", *(call.upper() for call in CALLS), "COMMIT 1G", "RELEASE 1G")


def bench(
    device: Annotated[
        str | None,
        typer.Option(metavar="host|cuda:N", help="What to measure.", show_default="a GPU if any"),
    ] = None,
    size: Annotated[
        str,
        typer.Option(metavar="SIZE", help="How much to commit; at most a quarter of what is free."),
    ] = "1GiB",
    as_json: Annotated[bool, typer.Option("--json", help="One object; sizes in bytes.")] = False,
) -> None:
    """Measure what committing and releasing memory costs on this machine.

    Each driver call (median, microseconds), and committing and releasing
    1 GiB, for each size of extents; for a GPU also how fast host memory
    copies to it and back. Ends with advice: which extents suit, and whether
    offloading KV to host memory would pay. Takes a few seconds. Engines on
    the same GPU make figures worse, and this makes theirs worse.

      kvcached bench

      kvcached bench --device host --size 256MiB --json

    Exit status: 0; 2 if the device cannot be used, or for a mistake.
    """
    try:
        size_bytes = parse_size(size)
    except ValueError as error:
        raise SettingsError(f"--size: {error}.") from error
    driver, ordinal = open_device(device)
    on_gpu = ordinal is not None
    costs = measuring.measure(driver, CUDA_EXTENTS if on_gpu else HOST_EXTENTS, size_bytes)
    link = measuring.measure_link(ordinal) if ordinal is not None else None
    if as_json:
        typer.echo(json.dumps(_object(driver, costs, link)))
    else:
        _print(driver, costs, link, on_gpu)


def open_device(device: str | None) -> tuple[Driver, int | None]:
    """The driver of a device by its name, and its number if it is a GPU.

    Raises:
        SettingsError: no device has such a name.
        DeviceUnsupported: it cannot be used.
    """
    if device is None:
        try:
            return CudaDriver(0), 0
        except DeviceUnsupported:
            return HostDriver(), None
    if device == "host":
        return HostDriver(), None
    match = re.fullmatch(r"cuda(?::(\d{1,3}))?", device)
    if match is None:
        raise SettingsError(f"--device: {device!r} is none of host, cuda, cuda:0, cuda:1, ...")
    ordinal = int(match[1] or 0)
    return CudaDriver(ordinal), ordinal


def _print(driver: Driver, costs: list[Costs], link: Link | None, on_gpu: bool) -> None:
    memory = driver.memory()
    typer.echo(
        f"{driver.device}: {format_size(memory.free_bytes)} of {format_size(memory.total_bytes)} "
        f"free, mappings of {format_size(driver.granularity)} at least"
    )
    typer.echo("Microseconds of a driver call; milliseconds to commit and to release 1 GiB:")
    rows = [
        (
            short(each.extent_bytes),
            *(f"{each.calls_s[call] * 1e6:.1f}" for call in CALLS),
            f"{each.commit_s * GIB / each.size_bytes * 1e3:.2f}",
            f"{each.return_s * GIB / each.size_bytes * 1e3:.2f}",
        )
        for each in costs
    ]
    for line in figures.table(HEADINGS, rows, figures.terminal_width(), ()):
        typer.echo(line)
    last = costs[-1]
    typer.echo(
        f"Reserving {format_size(last.size_bytes)} of addresses: {last.reserve_s * 1e6:.0f} us"
    )
    if not on_gpu:
        first_s = last.touch_s * GIB / last.size_bytes
        typer.echo(
            f"First use of 1 GiB (the kernel finds and clears pages): {first_s * 1e3:.0f} ms"
        )
    if link:
        typer.echo(
            f"Host to GPU {link.to_device / 1e9:.1f} GB/s, GPU to host "
            f"{link.to_host / 1e9:.1f} GB/s (pinned), matrix product {link.flop_per_s / 1e12:.0f} "
            "TFLOP/s (bfloat16)"
        )
    typer.echo()
    for sentence in _advice(costs, link, on_gpu):
        figures.paragraph(sentence)


def _advice(costs: list[Costs], link: Link | None, on_gpu: bool) -> list[str]:
    best = measuring.best_extent(costs)
    said = [
        f"Extents: {format_size(best)} is the smallest size whose cost per GiB is within "
        f"{measuring.ENOUGH:g} times the least. Larger ones hardly get cheaper and come free "
        f"later; the default is about {format_size(EXTENT_BYTES)}, less for small budgets "
        "(KVCACHED_EXTENT sets it)."
    ]
    if link:
        said += measuring.offload_advice(link)
    elif on_gpu:
        said.append("Copy rates were not measured: torch is not installed or cannot use this GPU.")
    return said


def _object(driver: Driver, costs: list[Costs], link: Link | None) -> dict[str, Any]:
    """What was measured; seconds, bytes and rates per second."""
    memory = driver.memory()
    return {
        "version": 1,
        "device": driver.device,
        "granularity_bytes": driver.granularity,
        "free_bytes": memory.free_bytes,
        "total_bytes": memory.total_bytes,
        "extents": [{**asdict(each), "size_bytes": each.size_bytes} for each in costs],
        "advised_extent_bytes": measuring.best_extent(costs),
        "link": asdict(link) if link else None,
        "advice": _advice(costs, link, driver.device != "host"),
    }
