#!/usr/bin/env bash
# Fills .gpu/ (ignored by git) with what the GPU machine lacks. Run here, at any time before a GPU run.
#   integration/gpu/prepare.sh [PYTHON]      a Python with pip; KIT=folder of the engine archive;
#                                            WHEELS= carries none (the image seen in 2026-11 has all)
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

carried=$(du -sb .gpu | cut -f1)
tree=$(git ls-files -z --cached --others --exclude-standard | du -cb --files0-from=- 2>/dev/null | tail -1 | cut -f1)
total=$((carried + tree))
echo ".gpu: $((carried >> 10)) KiB, working tree: $((tree >> 10)) KiB, of $((limit >> 10)) KiB"
ls -l .gpu .gpu/wheels
if [ "$total" -ge "$limit" ]; then
  echo "too large to travel: $total bytes, at most $limit" >&2
  exit 1
fi
