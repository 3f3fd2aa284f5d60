#!/usr/bin/env bash
# On the GPU machine, in the repository root, with .gpu/ carried along. Not run yet.
# Here, before:  ARCHIVE=sglang-0.5.17-sm90.tar.xz integration/gpu/prepare.sh && cp KIT/sglang-env.sh .gpu/
#   integration/gpu/sglang.sh [arguments of integration/gpu/sglang.py]; results go to $OUT.
set -euo pipefail
cd "$(dirname "$0")/../.."
root=$PWD
k=${KVC_ROOT:-/tmp/k}-sglang
: "${OUT:?the folder for results}"

if ! [ -f "$k/site.ready" ]; then
  rm -rf "$k" && mkdir -p "$k/site"
  tar xf .gpu/sglang-*-sm90.tar.xz -C "$k/site"
  python3 -m compileall -q -j 16 "$k/site" >/dev/null 2>&1 || true
  touch "$k/site.ready"
fi
[ "${1:-}" != unpack ] || exit 0  # for `neighbours --second sglang`
rm -rf "$k/models" "$k/plug"
cp -r .gpu/models "$k/models"
install=(python3 -m pip install -q --no-deps --no-index --no-cache-dir --target "$k/plug")
"${install[@]}" .gpu/kvcached_plugins-*.whl
for wheel in .gpu/wheels/*.whl; do
  [ -e "$wheel" ] && "${install[@]}" "$wheel"
done

# shellcheck disable=SC1091
. .gpu/sglang-env.sh "$k/site"
export CUDA_HOME=${CUDA_HOME:-/usr/local/cuda} PYTHONUNBUFFERED=1
export PYTHONPATH="$k/plug:${PYTHONPATH:-$k/site}:$root"
unset ENABLE_KVCACHED
[ -z "${KVC_COMMIT:-}" ] && [ -f .gpu/commit ] && export KVC_COMMIT=$(cat .gpu/commit)
python3 -P -m integration.gpu.sglang --out "$OUT" --model "$k/models/llama8b" "$@"
