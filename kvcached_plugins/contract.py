"""Does the installed engine still look the way our replacements expect?

Each supported engine version has a manifest, ``patches/<engine>/<version>.toml``, with every symbol
that we replace or call. ``verify`` compares it with the installed source *as text*: nothing of the
engine is imported and no device is touched, so it may run in any process, before anything else.
"""

import json
import re
import sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from kvcached_plugins.engine_source import SourceFile, file_digest
from kvcached_plugins.engine_source import installed as installed
from kvcached_plugins.engine_source import own_version as own_version
from kvcached_vmm.errors import ContractError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

KINDS = ("replace", "wrap", "subclass", "rely", "call", "attribute")
"""How we use a symbol. ``rely``: we leave it alone, but count on something that its body does."""

SHIPPED = "_patches"
"""What ``patches/`` is called inside the wheel."""

_BODY_MATTERS = frozenset({"replace", "wrap", "subclass", "rely"})
_MEMBERS_MATTER = frozenset({"replace", "subclass", "rely"})


@dataclass(frozen=True)
class Symbol:
    """One symbol of an engine, and why we need it.

    ``digest`` is the SHA-256 of its source text, empty where only the signature matters.
    ``members`` are the names defined in a class that we build on: a method that upstream adds there
    could bypass ours.
    """

    name: str
    file: str
    kind: str
    signature: str
    why: str
    until: str
    digest: str = ""
    members: tuple[str, ...] = ()


@dataclass(frozen=True)
class Manifest:
    """What we need of one engine version.

    ``files`` maps each source file to its SHA-256. Equal files need no parsing.
    """

    engine: str
    version: str
    files: dict[str, str]
    symbols: tuple[Symbol, ...]

    def to_toml(self) -> str:
        """The manifest as the text of its file."""
        lines = [f"engine = {_quote(self.engine)}", f"version = {_quote(self.version)}"]
        lines += ["", "[files]"]
        lines += [f"{_quote(file)} = {_quote(self.files[file])}" for file in sorted(self.files)]
        for symbol in self.symbols:
            lines += ["", "[[symbol]]"]
            for key, value in asdict(symbol).items():
                if isinstance(value, str) and (value or key != "digest"):
                    lines.append(f"{key} = {_quote(value)}")
                elif value:
                    lines += [f"{key} = [", *(f"    {_quote(item)}," for item in value), "]"]
        return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Use:
    """An entry of ``symbols.toml``: names of one module, and what we use them for.

    ``since`` is the first version that has them, ``gone`` the first that no longer does.
    """

    module: str
    names: tuple[str, ...]
    kind: str
    why: str
    until: str
    since: str = ""
    gone: str = ""
    optional: bool = False

    def expected_in(self, version: str) -> bool:
        """Must this version have the names?"""
        key = version_key(version)
        return not (
            self.optional
            or (self.since and key < version_key(self.since))
            or (self.gone and key >= version_key(self.gone))
        )

    def candidates(self) -> tuple[str, str]:
        """The files that may hold the module, relative to the folder of the package."""
        base = self.module.replace(".", "/")
        return f"{base}.py", f"{base}/__init__.py"


_Entry = TypeVar("_Entry", Symbol, Use)


def verify(engine: str = "vllm") -> Manifest:
    """Check the installed engine; returns the manifest that it satisfies.

    Raises ContractError with one sentence that says what differs, what is supported and how to run
    the engine without us.
    """
    root, version = installed(engine)
    manifest = load(engine, version)
    found = mismatches(manifest, root)
    if found:
        more = f" (and {len(found) - 1} more, see `kvcached contract check`)" if found[1:] else ""
        raise ContractError(
            f"{engine} {version} in {root / engine} is not as kvcached-plugins expects it:"
            f" {found[0]}{more}; {_way_out(engine)}"
        )
    return manifest


def manifests_folder() -> Path:
    """Where the manifests are: inside the wheel, or beside the package in a checkout."""
    package = Path(__file__).resolve().parent
    shipped = package / SHIPPED
    return shipped if shipped.is_dir() else package.parent / "patches"


def supported(engine: str) -> tuple[str, ...]:
    """Versions that have a manifest, oldest first: a series ("0.33") or one release ("0.33.1")."""
    names = (path.stem for path in (manifests_folder() / engine).glob("*.toml"))
    return tuple(sorted((name for name in names if name[:1].isdigit()), key=version_key))


def load(engine: str, version: str) -> Manifest:
    """The manifest for a version: the release's own if there is one, else its series'."""
    release = version.partition("+")[0]
    known = supported(engine)
    for name in (release, series(engine, release)):
        if name in known:
            return read(manifests_folder() / engine / f"{name}.toml")
    raise ContractError(f"{engine} {version} is not known to kvcached-plugins; {_way_out(engine)}")


def read(path: Path) -> Manifest:
    """A manifest from its file."""
    data = _parse_toml(path)
    try:
        symbols = tuple(_entry(Symbol, item) for item in data["symbol"])
        manifest = Manifest(
            engine=_string(data["engine"]),
            version=_string(data["version"]),
            files={file: _string(digest) for file, digest in data["files"].items()},
            symbols=symbols,
        )
        unlisted = {symbol.file for symbol in symbols} - manifest.files.keys()
        if unlisted:
            raise KeyError(f"no digest of {min(unlisted)}")
    except (KeyError, TypeError, AttributeError) as error:
        raise ContractError(f"{path} is not a contract manifest: {error}") from error
    return manifest


def uses(engine: str) -> tuple[Use, ...]:
    """What we use of an engine, from its ``symbols.toml``: the input of ``generate``."""
    path = manifests_folder() / engine / "symbols.toml"
    data = _parse_toml(path)
    try:
        return tuple(_entry(Use, item) for item in data["use"])
    except (KeyError, TypeError) as error:
        raise ContractError(f"{path} is not a list of symbols: {error}") from error


def generate(engine: str, root: Path, version: str) -> Manifest:
    """Describe the engine whose package lies in ``root``.

    Raises ContractError naming every symbol that this version should have and does not.
    """
    files: dict[str, str] = {}
    symbols: list[Symbol] = []
    missing: list[str] = []
    sources: dict[Path, SourceFile] = {}
    for use in uses(engine):
        file = next((file for file in use.candidates() if (root / file).is_file()), None)
        for name in use.names:
            found = None
            if file is not None:
                source = sources.setdefault(root / file, SourceFile(root / file))
                blank = Symbol(f"{use.module}.{name}", file, use.kind, "", use.why, use.until)
                found = _describe(source, blank, name.split("."))
            if found is not None:
                symbols.append(found)
                files.setdefault(found.file, file_digest(root / found.file))
            elif use.expected_in(version):
                missing.append(f"{use.module}.{name}")
    if missing:
        raise ContractError(f"{engine} {version} lacks {', '.join(missing)}")
    return Manifest(engine, version, files, tuple(symbols))


def mismatches(manifest: Manifest, root: Path) -> list[str]:
    """What the engine in ``root`` does differently; empty when the contract holds."""
    changed = {
        file for file, digest in manifest.files.items() if file_digest(root / file) != digest
    }
    if not changed:
        return []
    sources = {file: SourceFile(root / file) for file in changed if (root / file).is_file()}
    symbols = []
    for symbol in manifest.symbols:
        if symbol.file not in changed:
            symbols.append(symbol)
        elif symbol.file in sources:
            found = _describe(sources[symbol.file], symbol, _path_in_module(symbol))
            symbols += [found] if found else []
    return differences(manifest, replace(manifest, symbols=tuple(symbols)))


def differences(a: Manifest, b: Manifest) -> list[str]:
    """What changed from ``a`` to ``b``, one sentence part per symbol."""
    before = {symbol.name: symbol for symbol in a.symbols}
    after = {symbol.name: symbol for symbol in b.symbols}
    found = []
    for name, old in before.items():
        new = after.get(name)
        if new is None:
            found.append(f"{name} is gone")
        elif new.file != old.file:
            found.append(f"{name} moved from {old.file} to {new.file}")
        elif new.signature != old.signature:
            found.append(f"{name} is now `{new.signature}`, was `{old.signature}`")
        elif new.members != old.members:
            gained = "".join(f" +{item}" for item in new.members if item not in old.members)
            lost = "".join(f" -{item}" for item in old.members if item not in new.members)
            found.append(f"{name} has other members:{gained}{lost}")
        elif new.digest != old.digest:
            found.append(f"{name} has another body")
    return found + [f"{name} is new" for name in after if name not in before]


def series(engine: str, version: str) -> str:
    """The releases that share a manifest: 0.33 for vLLM 0.33.1+cpu, 0.5.15 for SGLang 0.5.15.post1.

    SGLang puts features into what others would call a patch release.
    """
    match = re.match(r"\d+\.\d+\.\d+" if engine == "sglang" else r"\d+\.\d+", version)
    if match is None:
        raise ContractError(f"{version!r} is not a version")
    return match[0]


def version_key(version: str) -> tuple[int, ...]:
    """The numbers of a version, to compare it by."""
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0]))


def _describe(source: SourceFile, symbol: Symbol, path: list[str]) -> Symbol | None:
    """``symbol`` as a source file has it, or None."""
    looks = source.describe(path, symbol.kind in _BODY_MATTERS, symbol.kind in _MEMBERS_MATTER)
    return replace(symbol, **looks._asdict()) if looks else None


def _path_in_module(symbol: Symbol) -> list[str]:
    module = symbol.file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return symbol.name.removeprefix(f"{module}.").split(".")


def _way_out(engine: str) -> str:
    versions = ", ".join(supported(engine)) or "none"
    return (
        f"supported {engine} versions: {versions}; to run {engine} without the elastic KV cache:"
        " unset ENABLE_KVCACHED"
    )


def _parse_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ContractError(f"cannot read {path}: {error}") from error


def _entry(cls: type[_Entry], item: dict[str, Any]) -> _Entry:
    """A Symbol or Use from its table; raises TypeError for a key or a value that it cannot have."""
    types = {field.name: field.type for field in fields(cls)}
    values: dict[str, Any] = {}
    for key, value in item.items():
        values[key] = tuple(value) if isinstance(value, list) else value
        wanted = types.get(key)
        if wanted is not None and not _is_a(values[key], wanted):
            raise TypeError(f"{key} = {value!r} in {item.get('name', item.get('module'))}")
    made = cls(**values)
    if made.kind not in KINDS:
        raise TypeError(f"kind = {made.kind!r} is none of {', '.join(KINDS)}")
    return made


def _is_a(value: object, annotation: object) -> bool:
    if annotation == tuple[str, ...]:
        return isinstance(value, tuple) and all(isinstance(item, str) for item in value)
    return isinstance(annotation, type) and isinstance(value, annotation)


def _string(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a string")
    return value


def _quote(text: str) -> str:
    """A TOML basic string: JSON's, less the one control character that JSON lets through."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
