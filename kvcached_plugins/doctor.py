"""What is in the way of an elastic KV cache on this machine, and what to do about it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from kvcached_plugins import TOGGLE, contract, hub
from kvcached_plugins.engine_source import DISTRIBUTIONS
from kvcached_plugins.settings import Settings, default_directory, enabled
from kvcached_vmm.cuda_driver import CudaDriver
from kvcached_vmm.driver import Driver
from kvcached_vmm.errors import ContractError, DriverError, KVCachedError, OutOfMemory
from kvcached_vmm.fairness import SILENCE_SECONDS
from kvcached_vmm.host_driver import HostDriver
from kvcached_vmm.ledger import Ledger, devices
from kvcached_vmm.locks import private_directory
from kvcached_vmm.records import LedgerView
from kvcached_vmm.units import format_size

OK, NOTE, FAIL = "ok", "note", "FAIL"
NVIDIA = Path("/proc/driver/nvidia")
"""Where the NVIDIA driver says its version and lists its GPUs."""

LOADED_FROM = {
    "vllm": ("vLLM", "vllm.general_plugins", "VLLM_PLUGINS"),
    "sglang": ("SGLang", "sglang.srt.plugins", "SGLANG_PLUGINS"),
}
"""By engine: how people call it, the entry points that it loads, and the variable that chooses."""


@dataclass(frozen=True)
class Finding:
    """``state`` is ``ok``, ``note`` (worth knowing, nothing to mend) or ``FAIL``; ``advice`` says
    what to do, where ``found`` does not."""

    subject: str
    state: str
    found: str
    advice: str = ""


def examine(
    directory: Path | None = None,
    environment: Mapping[str, str] | None = None,
    nvidia: Path = NVIDIA,
    open_gpu: Callable[[int], Driver] = CudaDriver,
) -> Iterator[Finding]:
    """Look at everything, one thing after another. Makes no folder and no file."""
    env = os.environ if environment is None else environment
    yield from _switch(env)
    found: Path | None = directory
    try:
        settings = Settings.read(env)
        found = directory or settings.directory
        yield Finding("settings", OK, "every KVCACHED_ variable is understood")
    except KVCachedError as error:
        yield Finding("settings", FAIL, str(error))
        if found is None and not env.get("KVCACHED_DIR"):
            with contextlib.suppress(KVCachedError):
                found = default_directory(env)
    if found is not None:
        yield from _folder(found)
    yield from _gpus(env, nvidia, open_gpu)
    yield from _host()
    yield from _engines(env)
    yield from _plugins()


def _switch(env: Mapping[str, str]) -> Iterator[Finding]:
    try:
        on = enabled(env)
    except KVCachedError as error:
        yield Finding(TOGGLE, FAIL, str(error))
        return
    if on:
        yield Finding(TOGGLE, OK, "on: engines started from here are elastic")
    else:
        yield Finding(
            TOGGLE,
            NOTE,
            "off: engines started from here run as they always did",
            f"to turn the elastic cache on: `{TOGGLE}=1 vllm serve MODEL`, or "
            f"`{TOGGLE}=1 python -m sglang.launch_server --model-path MODEL`",
        )


def _folder(folder: Path) -> Iterator[Finding]:
    subject = "ledger folder"
    if not os.path.lexists(folder):
        above = next(each for each in folder.absolute().parents if each.exists())
        if os.access(above, os.W_OK | os.X_OK):
            yield Finding(subject, OK, f"{folder} will be made by the first engine")
        else:
            yield Finding(
                subject,
                FAIL,
                f"{folder} does not exist and cannot be made: {above} is not writable",
                "set KVCACHED_DIR to a folder of your own",
            )
        return
    try:
        private_directory(folder)
        yield Finding(subject, OK, f"{folder} is private")
        names = devices(folder)
    except KVCachedError as error:
        yield Finding(subject, FAIL, str(error))
        return
    for device in names:
        yield from _ledger(folder, device)


def _ledger(folder: Path, device: str) -> Iterator[Finding]:
    subject = f"ledger {device}"
    try:
        with contextlib.closing(Ledger.open(folder, device)) as ledger:
            view = ledger.snapshot()
    except KVCachedError as error:
        yield Finding(subject, FAIL, str(error))
        return
    waiting = sum(account.waiting_since > 0 for account in view.accounts)
    yield Finding(
        subject,
        OK,
        f"{_count(len(view.accounts), 'engine')}, {format_size(view.used_bytes)} of "
        f"{format_size(view.capacity_bytes)} used"
        + (f", {waiting} waiting (see `kvcached top`)" if waiting else ""),
    )
    yield from _silent(subject, view)


def _silent(subject: str, view: LedgerView) -> Iterator[Finding]:
    now = time.monotonic()
    for account in view.accounts:
        silent_s = now - account.heartbeat
        if silent_s > 5 * SILENCE_SECONDS:
            yield Finding(
                subject,
                NOTE,
                f"{account.name} (pid {account.pid}) has not reported for {silent_s:.0f} s: it "
                "is starting, stopped or overloaded, and gives nothing back meanwhile",
            )


def _gpus(
    env: Mapping[str, str], nvidia: Path, open_gpu: Callable[[int], Driver]
) -> Iterator[Finding]:
    version = ""
    with contextlib.suppress(OSError):
        text = (nvidia / "version").read_text(encoding="utf-8", errors="replace")
        match = re.search(r"\b(\d{3,}\.\d+(?:\.\d+)?)\b", text)
        version = match[1] if match else "of unknown version"
    gpus = 0
    with contextlib.suppress(OSError):
        gpus = len(list((nvidia / "gpus").iterdir()))
    if not version:
        yield Finding(
            "GPU", NOTE, "no NVIDIA driver here: engines for CPUs share host memory instead"
        )
        return
    yield Finding("NVIDIA driver", OK, f"{version}, {_count(gpus, 'GPU')}")
    for ordinal in range(max(1, gpus)):
        subject = f"GPU {ordinal}"
        try:
            yield from _try_driver(subject, open_gpu(ordinal))
        except KVCachedError as error:
            if "INVALID_DEVICE" in str(error) and ordinal:
                visible = env.get("CUDA_VISIBLE_DEVICES")
                why = f" (CUDA_VISIBLE_DEVICES={visible})" if visible is not None else ""
                yield Finding(subject, NOTE, f"this process sees {ordinal} of {gpus} GPUs{why}")
                return
            if "OUT_OF_MEMORY" in str(error):
                yield Finding(subject, NOTE, "full: there is no room to try anything on it now")
                continue
            yield Finding(subject, FAIL, str(error))


def _host() -> Iterator[Finding]:
    yield from _try_driver("host memory", HostDriver())


def _try_driver(subject: str, driver: Driver) -> Iterator[Finding]:
    """Map one granule, and take it away again."""
    try:
        memory = driver.memory()
        said = f"{format_size(memory.free_bytes)} of {format_size(memory.total_bytes)} free"
        if driver.device != "host":
            said = f"{driver.device}, {said}"
        try:
            map_one_granule(driver)
        except OutOfMemory:
            yield Finding(subject, NOTE, f"{said}; full, so mapping memory was not tried")
            return
        yield Finding(subject, OK, f"{said}; memory can be mapped")
    except DriverError as error:
        yield Finding(
            subject,
            FAIL,
            f"memory cannot be mapped: {error}",
            "check the driver's version, and that a container may use the device",
        )


def map_one_granule(driver: Driver) -> None:
    """Do all that an extent needs, once.

    Raises:
        DriverError: a call failed; what was there before is there again.
    """
    size = driver.granularity
    base = driver.reserve(size)
    with contextlib.ExitStack() as undo:
        undo.callback(driver.free, base, size)
        handle = driver.create(size)
        undo.callback(driver.release, handle)
        driver.map(base, size, handle)
        undo.callback(driver.unmap, base, size)
        driver.allow(base, size)
        if driver.device == "host":
            ctypes.memset(base, 1, size)


def _engines(env: Mapping[str, str]) -> Iterator[Finding]:
    found = 0
    for engine in DISTRIBUTIONS:
        try:
            root, version = contract.installed(engine)
        except ContractError:
            yield Finding(engine, NOTE, "not installed for this Python")
            continue
        if not contract.supported(engine):
            yield Finding(
                engine, NOTE, f"{version} is installed; this package has no plugin for it"
            )
            continue
        found += 1
        yield _registered(engine, env)
        known = f"install {engine} {', '.join(contract.supported(engine))} as it was published"
        try:
            manifest = contract.load(engine, version)
            differences = contract.mismatches(manifest, root)
        except ContractError as error:
            yield Finding(engine, FAIL, str(error).partition(";")[0], known)
            continue
        if differences:
            yield Finding(
                engine,
                FAIL,
                f"{version} is not as we expect it: {differences[0]} "
                f"({len(differences)} in all, see `kvcached contract check`)",
                known,
            )
        else:
            yield Finding(
                engine, OK, f"{version}, all {len(manifest.symbols)} symbols as we expect them"
            )
    if not found:
        yield Finding(
            "engines",
            FAIL,
            "no engine that we can extend is installed for this Python",
            "pip install 'kvcached-plugins[vllm]' or 'kvcached-plugins[sglang]', or run the "
            "`kvcached` of the engine's Python",
        )


def _registered(engine: str, env: Mapping[str, str]) -> Finding:
    """Whether an engine that is installed would load our plugin."""
    title, group, variable = LOADED_FROM[engine]
    subject = f"{title} plugin"
    if not any(each.name == hub.PROJECT for each in metadata.entry_points(group=group)):
        return Finding(
            subject,
            FAIL,
            f"not registered ({group}): {title} would not load it",
            f"install kvcached-plugins with pip into the Python that runs {title}",
        )
    chosen = env.get(variable)
    # SGLang takes an empty list for none at all.
    if not chosen and engine == "sglang":
        chosen = None
    if chosen is not None and hub.PROJECT not in map(str.strip, chosen.split(",")):
        return Finding(
            subject,
            FAIL,
            f"{variable}={chosen} keeps {title} from loading it",
            f"add {hub.PROJECT} to {variable}, or unset it",
        )
    return Finding(subject, OK, "registered")


def _plugins() -> Iterator[Finding]:
    try:
        others = len(hub.plugins().get_plugins()) - 1
        yield Finding("our plugins", OK, f"{others} beside the default policy")
    except Exception as error:
        yield Finding(
            "our plugins",
            FAIL,
            f"a plugin of the group `{hub.PROJECT}` cannot be loaded: {error}",
            "update it or uninstall it",
        )


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
