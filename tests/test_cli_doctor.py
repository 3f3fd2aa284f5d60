"""`kvcached doctor`: what it looks at, and that each failure says what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from faults import FaultyDriver, every

from kvcached_plugins import contract, doctor
from kvcached_plugins.doctor import FAIL, NOTE, OK, Finding
from kvcached_vmm.account import Account
from kvcached_vmm.driver import Driver
from kvcached_vmm.errors import ContractError, DeviceUnsupported
from kvcached_vmm.host_driver import HostDriver
from kvcached_vmm.units import MIB

Join = Callable[..., Account]


class Gpu(HostDriver):
    """Host memory that says it is a GPU."""

    device = "GPU-1"  # type: ignore[assignment]


@pytest.fixture
def nvidia(tmp_path: Path) -> Path:
    """What the driver of a machine with two GPUs says."""
    folder = tmp_path / "nvidia"
    for name in ("0000:01:00.0", "0000:02:00.0"):
        (folder / "gpus" / name).mkdir(parents=True)
    (folder / "version").write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27 2025\n"
        "GCC version:  gcc version 13.3.0\n"
    )
    return folder


def findings(
    folder: Path,
    nvidia: Path = Path("/nowhere"),
    open_gpu: Callable[[int], Driver] = lambda _: Gpu(64 * MIB),
    **environment: str,
) -> dict[str, Finding]:
    found = doctor.examine(None, {"KVCACHED_DIR": str(folder), **environment}, nvidia, open_gpu)
    by_subject = {finding.subject: finding for finding in found}
    for finding in by_subject.values():
        if finding.state == FAIL:
            assert finding.advice or finding.found.endswith("."), "a failure says what to do"
    return by_subject


def states(found: dict[str, Finding], *subjects: str) -> list[str]:
    return [found[subject].state for subject in subjects]


def test_a_machine_on_which_all_is_well(folder: Path, nvidia: Path, join: Join) -> None:
    join("llama").report(0, 0, MIB)
    found = findings(folder, nvidia, ENABLE_KVCACHED="1")
    assert (
        states(
            found,
            *("ENABLE_KVCACHED", "settings", "ledger folder", "ledger host", "NVIDIA driver"),
            *("GPU 0", "GPU 1", "host memory", "our plugins"),
        )
        == [OK] * 9
    )
    assert found["NVIDIA driver"].found == "580.65.06, 2 GPUs"
    assert found["GPU 0"].found.startswith("GPU-1, 64 MiB of 64 MiB free; memory can be mapped")
    assert found["ledger host"].found.startswith("1 engine, 0 B of 100 MiB used, 1 waiting")


def test_without_a_gpu_host_memory_is_shared(folder: Path) -> None:
    found = findings(folder)
    assert found["GPU"].state == NOTE
    assert "GPU 0" not in found
    assert (found["ENABLE_KVCACHED"].state, found["ENABLE_KVCACHED"].advice != "") == (NOTE, True)


def test_settings_that_are_wrong(folder: Path) -> None:
    found = findings(folder, ENABLE_KVCACHED="perhaps", KVCACHED_MAX="all", VLLM_PLUGINS="lora")
    assert states(found, "ENABLE_KVCACHED", "settings") == [FAIL, FAIL]
    assert "KVCACHED_MAX='all'" in found["settings"].found
    assert "ledger folder" not in found, "the settings do not say which folder"


def test_folders_that_engines_cannot_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = tmp_path / "absent" / "deeper"
    assert findings(absent)["ledger folder"].state == OK
    assert not absent.parent.exists()
    monkeypatch.setattr(doctor.os, "access", lambda *_: False)
    assert findings(absent)["ledger folder"].state == FAIL
    public = tmp_path / "public"
    public.mkdir(mode=0o755)
    assert "is not private" in findings(public)["ledger folder"].found


def test_a_ledger_that_cannot_be_read(folder: Path, join: Join) -> None:
    join("llama")
    (folder / "GPU-1.ledger").write_bytes(b"x")
    (folder / "GPU-1.ledger").chmod(0o600)
    assert states(findings(folder), "ledger host", "ledger GPU-1") == [OK, FAIL]


def test_an_engine_that_does_not_report(folder: Path, join: Join) -> None:
    account = join("llama")
    account._use = account._use._replace(heartbeat=1.0)
    account._save()
    found = findings(folder)["ledger host"]
    assert found.state == NOTE
    assert "llama (pid" in found.found


def failing(message: str, last_good: int = -1) -> Callable[[int], Driver]:
    def open_gpu(ordinal: int) -> Driver:
        if ordinal > last_good:
            raise DeviceUnsupported(message)
        return Gpu(64 * MIB)

    return open_gpu


def test_gpus_that_cannot_be_used(folder: Path, nvidia: Path) -> None:
    found = findings(folder, nvidia, failing("cuda-python is not installed, install it."))
    assert states(found, "GPU 0", "GPU 1") == [FAIL, FAIL]
    hidden = failing("GPU 1 cannot be used: cuDeviceGet failed: CUDA_ERROR_INVALID_DEVICE", 0)
    found = findings(folder, nvidia, hidden, CUDA_VISIBLE_DEVICES="0")
    assert states(found, "GPU 0", "GPU 1") == [OK, NOTE]
    assert found["GPU 1"].found == "this process sees 1 of 2 GPUs (CUDA_VISIBLE_DEVICES=0)"
    full = failing("cuDevicePrimaryCtxRetain failed: CUDA_ERROR_OUT_OF_MEMORY")
    assert findings(folder, nvidia, full)["GPU 0"].state == NOTE


@pytest.mark.parametrize("call", ["reserve", "create", "map", "allow", "unmap", "release", "free"])
def test_memory_that_cannot_be_mapped_is_left_as_it_was(call: str) -> None:
    driver = FaultyDriver(Gpu(64 * MIB))
    driver.fail(every(call))
    (found,) = doctor._try_driver("GPU 0", driver)
    assert found.state == (NOTE if call == "create" else FAIL)
    if call in ("reserve", "create", "map", "allow"):
        assert (driver.reserved, driver.mapped, driver.handles) == ({}, {}, set())


def test_an_engine_that_is_not_as_we_expect(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contract, "installed", lambda engine: (Path("/nowhere"), "0.32.0"))
    found = findings(folder)
    assert found["vllm"].state == FAIL
    assert "0.32" in found["vllm"].advice
    monkeypatch.setattr(contract, "installed", lambda engine: (Path("/nowhere"), "9.9.0"))
    assert "9.9.0 is not known" in findings(folder)["vllm"].found


def test_no_engine_at_all(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def installed(engine: str) -> tuple[Path, str]:
        raise ContractError(f"{engine} is not installed")

    monkeypatch.setattr(contract, "installed", installed)
    found = findings(folder)
    assert states(found, "vllm", "sglang", "engines") == [NOTE, NOTE, FAIL]


@pytest.mark.parametrize(("engine", "title"), [("vllm", "vLLM"), ("sglang", "SGLang")])
def test_a_plugin_that_its_engine_would_not_load(
    folder: Path, monkeypatch: pytest.MonkeyPatch, engine: str, title: str
) -> None:
    def installed(asked: str) -> tuple[Path, str]:
        if asked != engine:
            raise ContractError(f"{asked} is not installed")
        return Path("/nowhere"), "9.9.0"

    def entry_points(group: str) -> tuple[SimpleNamespace, ...]:
        return (SimpleNamespace(name="kvcached"),) if group.startswith(engine) else ()

    subject, variable = f"{title} plugin", f"{engine.upper()}_PLUGINS"
    monkeypatch.setattr(contract, "installed", installed)
    monkeypatch.setattr(doctor.metadata, "entry_points", entry_points)
    found = findings(folder)
    assert found[subject].state == OK
    assert {"vLLM plugin", "SGLang plugin"} & found.keys() == {subject}
    assert findings(folder, **{variable: "lora, kvcached"})[subject].state == OK
    assert findings(folder, **{variable: "lora"})[subject].found.startswith(f"{variable}=lora")
    monkeypatch.setattr(doctor.metadata, "entry_points", lambda group: ())
    lost = findings(folder)[subject]
    assert (lost.state, "not registered" in lost.found) == (FAIL, True)


def test_a_plugin_of_others_that_cannot_be_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plugins() -> None:
        raise RuntimeError("hook 'kvcached_dets' does not exist")

    monkeypatch.setattr(doctor.hub, "plugins", plugins)
    assert "kvcached_dets" in findings(folder)["our plugins"].found


@pytest.mark.parametrize("spoilt", [False, True])
def test_the_command_fails_if_a_check_does(
    kvcached: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, spoilt: bool
) -> None:
    found = [Finding("a", OK, "fine"), Finding("b", FAIL if spoilt else NOTE, "x " * 80, "do it")]
    monkeypatch.setattr("kvcached_plugins.cli.doctor.examine", lambda directory: iter(found))
    ran = kvcached("doctor")
    assert ran.status == spoilt
    lines = ran.out.splitlines()
    assert lines[0] == "ok   a: fine"
    assert "     -> do it" in lines
    assert lines[-1] == ("1 of 2 checks failed." if spoilt else "Nothing is in the way.")
    assert all(len(line) <= 80 for line in lines)
    ran = kvcached("doctor", "--json")
    assert json.loads(ran.out)[0] == {"subject": "a", "state": "ok", "found": "fine", "advice": ""}
