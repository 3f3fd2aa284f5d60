#!/usr/bin/env bash
# Fills .gpu/ (ignored by git) with what the GPU machine lacks. Run here, at any time before a GPU run.
#   integration/gpu/prepare.sh [PYTHON]      a Python with pip; KIT=folder of the engine archive;
#                                            WHEELS= carries none (the image seen in 2026-11 has all)
#   ARCHIVE=vllm-0.30.0-sm90.tar.xz PEER=1 integration/gpu/prepare.sh
#                                            the newest vLLM that kvcached 0.1.6 supports, and its
#                                            sources (PEER_SDIST= a copy of them), for colocation.py
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${1:-python3}
kit=${KIT:-../shared/gpukit}
archive=${ARCHIVE:-vllm-0.33.0-sm90.tar.xz}
models=${MODELS:-llama8b llama1b}
limit=$((64 << 20))

exclude=$(git rev-parse --git-path info/exclude)
mkdir -p "$(dirname "$exclude")" .gpu/models .gpu/wheels
grep -qxF '/.gpu/' "$exclude" 2>/dev/null || echo '/.gpu/' >>"$exclude"

# One engine at a time fits the limit: what an earlier call brought is taken out.
for old in .gpu/*-sm90.tar.xz; do
  [ "$(basename "$old")" = "$archive" ] || rm -f "$old"
done
rm -rf .gpu/peer
cmp -s "$kit/$archive" ".gpu/$archive" || cp "$kit/$archive" .gpu/
for model in $models; do
  rm -rf ".gpu/models/$model"
  cp -r "$kit/models/$model" .gpu/models/
done
chmod -R u+w .gpu

# A commit is named without Git there: the working tree travels without .git.
git describe --always --dirty >.gpu/commit
rm -f .gpu/kvcached_plugins-*.whl
"$python" -m pip wheel -q --no-deps --wheel-dir .gpu .
# Pure Python, used there only if the image has no such package.
wheels=${WHEELS-pluggy typer rich click shellingham markdown-it-py mdurl pygments}
for package in $wheels; do
  file=$(echo "$package" | tr - _)
  compgen -G ".gpu/wheels/${file}-*.whl" >/dev/null ||
    "$python" -m pip download -q --no-deps --only-binary=:all: --platform any \
      --python-version 3.12 --implementation py --abi none -d .gpu/wheels "$package"
done

if [ -n "${PEER:-}" ]; then
  mkdir -p .gpu/peer
  if [ -n "${PEER_SDIST:-}" ]; then
    cp "$PEER_SDIST" .gpu/peer/
  else
    # pip asks a source package for its metadata, and this one asks torch for its CUDA version.
    # It is built where torch has one; here an empty torch answers.
    fake=$(mktemp -d)
    trap 'rm -rf "$fake"' EXIT
    mkdir -p "$fake/torch/utils"
    cat >"$fake/torch/__init__.py" <<'PYTHON'
from . import version
__version__ = "2.11.0+cu130"
class _C: _GLIBCXX_USE_CXX11_ABI = True
PYTHON
    printf 'cuda = "13.0"\nhip = None\n' >"$fake/torch/version.py"
    touch "$fake/torch/utils/__init__.py"
    cat >"$fake/torch/utils/cpp_extension.py" <<'PYTHON'
from setuptools import Extension
from setuptools.command.build_ext import build_ext
CUDA_HOME = "/usr/local/cuda"
class BuildExtension(build_ext):
    @classmethod
    def with_options(cls, **_): return cls
def CppExtension(name, sources, **_): return Extension(name, [])
CUDAExtension = CppExtension
def include_paths(*_, **__): return []
library_paths = include_paths
PYTHON
    PYTHONPATH="$fake" "$python" -m pip download -q --no-deps --no-build-isolation \
      --no-binary kvcached -d .gpu/peer kvcached==0.1.6
  fi
  "$python" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 \
    --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
    --platform manylinux2014_x86_64 -d .gpu/peer posix_ipc
fi

carried=$(du -sb .gpu | cut -f1)
tree=$(git ls-files -z --cached --others --exclude-standard | du -cb --files0-from=- 2>/dev/null | tail -1 | cut -f1)
total=$((carried + tree))
echo ".gpu: $((carried >> 10)) KiB, working tree: $((tree >> 10)) KiB, of $((limit >> 10)) KiB"
ls -l .gpu .gpu/*/
if [ "$total" -ge "$limit" ]; then
  results=$(du -sb integration/results | cut -f1)
  echo "too large to travel: $total bytes, at most $limit" >&2
  [ $((total - results)) -ge "$limit" ] ||
    echo "without integration/results it fits: move that folder away for the calls, and back" >&2
  exit 1
fi
