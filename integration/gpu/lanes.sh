#!/usr/bin/env bash
# On a machine with several GPUs, in the repository root: a lane for each GPU, beside each other.
#   integration/gpu/lanes.sh 'COMMANDS OF GPU 0' 'COMMANDS OF GPU 1'
# A command is as for one GPU, such as `integration/gpu/run.sh reclaim`; it sees its own GPU only,
# and has folders, ports and an equal share of the cores of its own, so that what one lane compiles
# does not slow what another measures. $OUT gets lane0.tar.xz and so on, with what each left,
# also when KVC_LANES_S seconds (550) are over: what still runs then is ended.
set -uo pipefail
cd "$(dirname "$0")/../.."
: "${OUT:?the folder for results}"
limit=${KVC_LANES_S:-550}
here=$(mktemp -d /tmp/lanes-XXXXXX)
number=0
share=$(($(nproc) / $#))
for lane in "$@"; do
  mkdir -p "$here/lane$number"
  env CUDA_VISIBLE_DEVICES=$number KVC_ROOT=/tmp/k$number OUT="$here/lane$number" \
    taskset -c "$((number * share))-$((number * share + share - 1))" \
    timeout --kill-after 10 "$limit" bash -c "$lane" >"$here/lane$number/lane.log" 2>&1 &
  number=$((number + 1))
done
wait
for ((lane = 0; lane < number; lane++)); do
  echo "==> lane $lane"
  tail -c 5000 "$here/lane$lane/lane.log"
  tar -C "$here" -cf - "lane$lane" | xz -T0 -3 >"$OUT/lane$lane.tar.xz"
done
