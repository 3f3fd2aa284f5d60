#!/usr/bin/env bash
# On the GPU machine, in the repository root, with .gpu/ carried along (see prepare.sh):
#   integration/gpu/run.sh PROGRAM [ARGUMENTS]   or  exec COMMAND...
# PROGRAM is a module of this folder: onoff, paired, vmm_cost, neighbours, reclaim, colocation,
# overhead, footprint, activation, density.
# Results go to $OUT. Arguments after the first are those of the Python program. Several runs may
# follow one another in one call: each has its own clock, unless KVC_START is set.
set -euo pipefail
export KVC_START=${KVC_START:-$(date +%s)}
cd "$(dirname "$0")/../.."
root=$PWD
k=${KVC_ROOT:-/tmp/k}
: "${OUT:?the folder for results}"
what=${1:?a program of integration/gpu, such as paired, or exec}
shift

mkdir -p "$k"
# Without an archive, what an earlier call unpacked is used; KVC_ARCHIVE= says so where there is one.
archive=${KVC_ARCHIVE-$(cd .gpu && compgen -G 'vllm-*-sm90.tar.xz' || true)}
if [ -n "$archive" ] && [ "$(cat "$k/site.ready" 2>/dev/null)" != "$archive" ]; then
  rm -rf "$k/site" "$k/site.ready"
  tar xf ".gpu/$archive" -C "$k"
  python3 -m compileall -q -j 16 "$k/site" >/dev/null 2>&1 || true
  echo "$archive" >"$k/site.ready"
fi
# kvcached is built beside whatever comes first (27 s); colocation.py waits for it. Its folder must
# not be the one that it is built in, and our plugin must not be where it is (see peer.py).
if [ -d .gpu/peer ] && ! [ -f "$k/peer.ready" ]; then
  rm -rf "$k/peer" "$k/peer-source" "$k/peer.failed"
  mkdir -p "$k/peer-source"
  tar xf .gpu/peer/kvcached-*.tar.gz -C "$k/peer-source" --strip-components 1
  (
    export CUDA_HOME=${CUDA_HOME:-/usr/local/cuda}
    build=(python3 -m pip install -q --no-index --no-deps --no-cache-dir --target "$k/peer")
    if (cd "$k/peer-source" && "${build[@]}" --no-build-isolation .) &&
      "${build[@]}" .gpu/peer/posix_ipc-*.whl; then touch "$k/peer.ready"; else touch "$k/peer.failed"; fi
  ) >"$k/peer.log" 2>&1 &
fi
rm -rf "$k/models" "$k/plug"
cp -r .gpu/models "$k/models"
install=(python3 -m pip install -q --no-deps --no-index --no-cache-dir --target "$k/plug")
"${install[@]}" .gpu/kvcached_plugins-*.whl
for wheel in .gpu/wheels/*.whl; do
  [ -e "$wheel" ] || continue
  package=$(basename "$wheel" | cut -d- -f1)
  python3 -c "import importlib.metadata as m; m.version('$package')" 2>/dev/null ||
    "${install[@]}" "$wheel"
done

export PYTHONPATH="$k/plug:$k/site:$root" PYTHONUNBUFFERED=1
if [ -z "${KVC_COMMIT:-}" ] && [ -f .gpu/commit ]; then
  KVC_COMMIT=$(cat .gpu/commit)
  export KVC_COMMIT
fi
export VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 VLLM_USE_FLASHINFER_SAMPLER=0
unset ENABLE_KVCACHED
echo "prepared after $(($(date +%s) - KVC_START)) s"
set -o pipefail
case $what in
  exec) "$@" 2>&1 | tee -a "$OUT/run.log" ;;
  *) python3 -P -m "integration.gpu.$what" --out "$OUT" "$@" 2>&1 | tee -a "$OUT/run.log" ;;
esac
