"""``kvcached contract``: make, check and list the manifests in ``patches/``."""

import io
import json
import os
import ssl
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, NoReturn

import httpx
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kvcached_plugins import contract
from kvcached_vmm.errors import ContractError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

app = typer.Typer(
    help="Which engine versions are supported, and what is checked before anything is replaced.",
    no_args_is_help=True,
)
console = Console()
errors = Console(stderr=True)

# What pip is told about the machine that the wheel is for: sources are the same in all of them, and
# this one may be a Mac, or run a Python that the engine has no wheel for.
_TARGET = [
    "--python-version=3.12",
    *(f"--platform=manylinux_2_{minor}_x86_64" for minor in (28, 31, 34, 35, 39)),
    "--platform=manylinux2014_x86_64",
    "--platform=manylinux1_x86_64",
    "--only-binary=:all:",
    "--no-deps",
]

EngineOption = Annotated[str, typer.Option(help="Which engine: vllm or sglang.")]


@app.command()
def generate(
    engine: EngineOption = "vllm",
    installed: Annotated[
        bool, typer.Option("--installed", help="Describe the installed engine.")
    ] = False,
    wheel: Annotated[
        str, typer.Option(metavar="FILE|VERSION", help="Describe a wheel: a file, or a version.")
    ] = "",
    every: Annotated[
        bool, typer.Option("--all", help="Describe every known version again.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Write here, not to patches/ENGINE/.")] = None,
) -> None:
    """Write an engine version's manifest and say how it differs from the nearest known one.

    Of a published version only the few files that matter are downloaded, once.

    Examples:

    kvcached contract generate --wheel 0.33.0

    kvcached contract generate --wheel ./vllm-0.34.0-cp38-abi3-manylinux_2_28_x86_64.whl

    kvcached contract generate --installed --out mine.toml

    kvcached contract generate --all
    """
    if sum((installed, bool(wheel), every)) != 1 or (every and out):
        _fail("say one of --installed, --wheel FILE|VERSION and --all (--all takes no --out)", 2)
    try:
        if every:
            for name in contract.supported(engine):
                _write(_describe_release(engine, contract.load(engine, name).version), None)
        elif installed:
            root, version = contract.installed(engine)
            _write(contract.generate(engine, root, version), out)
        elif wheel.endswith(".whl"):
            with tempfile.TemporaryDirectory() as folder:
                _extract(Path(wheel), _wanted(engine), Path(folder))
                version = contract.own_version(Path(folder) / engine)
                manifest = contract.generate(engine, Path(folder), version)
            _write(manifest, out)
        else:
            _write(_describe_release(engine, wheel), out)
    except (ContractError, OSError, zipfile.BadZipFile) as error:
        _fail(str(error), 2)


@app.command()
def check(engine: EngineOption = "vllm") -> None:
    """Check the installed engine against its manifest, as a starting engine does.

    Exit status 1 when it differs, with everything that does.

    Example: kvcached contract check && vllm serve MODEL
    """
    try:
        root, version = contract.installed(engine)
    except ContractError as error:
        _fail(str(error), 2)
    try:
        manifest = contract.load(engine, version)
        found = contract.mismatches(manifest, root)
    except ContractError as error:
        _fail(str(error), 1)
    for line in found:
        _say(f"[red]differs[/] {escape(line)}", errors)
    if found:
        _fail(f"{engine} {version} differs from the {manifest.version} that we know", 1)
    _say(
        f"[green]ok[/] {engine} {version} in {root}: {len(manifest.symbols)} symbols in"
        f" {len(manifest.files)} files are as expected",
    )


@app.command("list")
def list_(
    engine: EngineOption = "vllm",
    symbols: Annotated[
        str, typer.Option(metavar="VERSION", help="List what is used of this version, and why.")
    ] = "",
) -> None:
    """List the supported versions, or everything that is used of one.

    Example: kvcached contract list --symbols 0.33
    """
    table = Table(box=None, pad_edge=False)
    try:
        if symbols:
            for heading in ("symbol", "use", "why", "until"):
                table.add_column(heading, overflow="fold")
            for symbol in contract.load(engine, symbols).symbols:
                table.add_row(symbol.name, symbol.kind, symbol.why, symbol.until)
        else:
            for heading in (engine, "described from", "symbols", "files"):
                table.add_column(heading)
            for name in contract.supported(engine):
                known = contract.load(engine, name)
                table.add_row(name, known.version, f"{len(known.symbols)}", f"{len(known.files)}")
    except ContractError as error:
        _fail(str(error), 2)
    console.print(table)


def fetch_sources(version: str, engine: str = "vllm") -> Path:
    """A folder with those files of a published engine that ``symbols.toml`` names; cached for good.

    Raises ContractError when the index that pip is configured with has no such wheel.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "kvcached-plugins" / "sources" / f"{engine}-{version}"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    # What the wheel has, so that a file which it lacks is not asked for again.
    index = folder / "files.txt"
    wanted = _wanted(engine)
    if index.exists():
        present = wanted.intersection(index.read_text(encoding="utf-8").splitlines())
        wanted = {name for name in present if not (folder / name).exists()}
        if not wanted:
            return folder
    requirement = f"{engine}=={version}"
    try:
        with httpx.Client(follow_redirects=True, timeout=60, verify=_trust()) as client:
            remote = io.BufferedReader(_RemoteFile(client, _find_wheel(requirement)), 1 << 20)
            names = _extract(remote, wanted, folder)
    except (httpx.HTTPError, OSError, zipfile.BadZipFile):
        # No ranges, or an index with credentials that pip does not tell us: the long way.
        with tempfile.TemporaryDirectory(dir=folder) as whole:
            _pip("download", f"--dest={whole}", *_TARGET, requirement)
            names = _extract(next(Path(whole).glob("*.whl")), wanted, folder)
    _store(index, "\n".join(names).encode())
    return folder


class _RemoteFile(io.RawIOBase):
    """A file on a web server, read in pieces. Raises OSError if the server only sends it whole."""

    def __init__(self, client: httpx.Client, url: str) -> None:
        self._client = client
        self._url = url
        self._at = 0
        self._size = 1
        answer = self._get(0, 1)
        self._size = int(answer.headers["Content-Range"].rpartition("/")[2])

    def _get(self, start: int, stop: int) -> httpx.Response:
        with self._client.stream(
            "GET", self._url, headers={"Range": f"bytes={start}-{stop - 1}"}
        ) as answer:
            answer.raise_for_status()
            if answer.status_code != httpx.codes.PARTIAL_CONTENT:
                raise OSError(f"{self._url} cannot be read in parts")
            answer.read()
            return answer

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = base + offset
        return self._at

    def readinto(self, buffer: "WriteableBuffer") -> int:
        view = memoryview(buffer).cast("B")
        stop = min(self._at + len(view), self._size)
        if stop <= self._at:
            return 0
        content = self._get(self._at, stop).content
        view[: len(content)] = content
        self._at += len(content)
        return len(content)


def _extract(wheel: Path | IO[bytes], wanted: Iterable[str], folder: Path) -> list[str]:
    """Write the wanted files of a wheel below ``folder``; returns the names of all its sources."""
    with zipfile.ZipFile(wheel) as archive:
        entries = {item.filename: item for item in archive.infolist()}
        present = [entries[name] for name in wanted if name in entries]
        for item in sorted(present, key=lambda item: item.header_offset):
            _store(folder / item.filename, archive.read(item))
    return sorted(name for name in entries if name.endswith(".py"))


def _store(path: Path, content: bytes) -> None:
    """Write a file at one stroke: another process may be reading it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_bytes(content)
    part.replace(path)


def _wanted(engine: str) -> set[str]:
    files = {file for use in contract.uses(engine) for file in use.candidates()}
    return {*files, f"{engine}/_version.py"}


def _find_wheel(requirement: str) -> str:
    """The address of a wheel, from the index that pip is configured with."""
    with tempfile.TemporaryDirectory() as folder:
        report = _pip(
            "install", "--dry-run", "--ignore-installed", "--report=-", f"--target={folder}",
            *_TARGET, requirement,
        )  # fmt: skip
    return str(json.loads(report)["install"][0]["download_info"]["url"])


def _pip(*arguments: str) -> str:
    """Run pip quietly; its last line of complaint becomes the error."""
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if "ERROR" in line or "No mod" in line]
        raise ContractError(f"pip: {(said or [done.stderr])[-1].strip()}")
    return done.stdout


def _trust() -> ssl.SSLContext | bool:
    """Certificates to trust: pip's own choice, if it has one."""
    file = os.environ.get("PIP_CERT")
    return ssl.create_default_context(cafile=file) if file else True


def _describe_release(engine: str, version: str) -> contract.Manifest:
    return contract.generate(engine, fetch_sources(version, engine), version)


def _write(manifest: contract.Manifest, out: Path | None) -> None:
    """Say what is different from the nearest known manifest, and write where it belongs.

    A second release of a known series gets a manifest of its own, and only if it needs one.
    """
    engine, version = manifest.engine, manifest.version
    series = contract.series(engine, version)
    nearest = _nearest(engine, version)
    known = contract.load(engine, nearest) if nearest else None
    found = contract.differences(known, manifest) if known else []
    second = (
        known is not None
        and known.version != version
        and contract.series(engine, known.version) == series
    )
    name = version if second or version in contract.supported(engine) else series
    folder = contract.manifests_folder()
    if folder.name == contract.SHIPPED:  # supporting a version takes a review, not just a command
        folder = Path.cwd()
    target = out or folder / engine / f"{name}.toml"
    summary = f"{len(manifest.symbols)} symbols of {engine} {version}"
    if nearest:
        summary += f", {len(found) or 'no'} difference{'' if len(found) == 1 else 's'} to {nearest}"
    if second and not found and out is None:
        _say(f"nothing to write: {summary}, which covers it")
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(manifest.to_toml(), encoding="utf-8")
    _say(f"[green]wrote[/] {target}: {summary}")
    for line in found:
        _say(f"  {escape(line)}")


def _nearest(engine: str, version: str) -> str | None:
    """The known version that is closest: this release, else its series, else the closest series."""

    def distance(name: str) -> tuple[bool, tuple[int, ...]]:
        ours, its = (contract.version_key(contract.series(engine, v)) for v in (name, version))
        return name != version, tuple(abs(a - b) for a, b in zip(ours, its, strict=True))

    return min(contract.supported(engine), key=distance, default=None)


def _say(text: str, to: Console = console) -> None:
    """Print without folding and rich's own colours, which spoil paths and signatures."""
    to.print(text, highlight=False, soft_wrap=True)


def _fail(message: str, status: int) -> NoReturn:
    _say(f"[red]{escape(message)}[/]", errors)
    raise typer.Exit(status)
