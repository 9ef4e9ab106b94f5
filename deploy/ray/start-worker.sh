#!/usr/bin/env bash
# Start Ray on another host: RAY_AUTH_TOKEN_PATH=FILE deploy/ray/start-worker.sh HEAD_ADDRESS ADDRESS [GPUS]
#
# HEAD_ADDRESS: of the host with start-head.sh. ADDRESS, GPUS, CPUS: as there.
set -euo pipefail
head=${1:?usage: start-worker.sh HEAD_ADDRESS ADDRESS [GPUS]}
address=${2:?usage: start-worker.sh HEAD_ADDRESS ADDRESS [GPUS]}
# shellcheck source=deploy/ray/common.sh
source "$(dirname "$0")/common.sh"
gpus=${3:-$(count_gpus)}
exec ray start --address "$head:6379" --node-ip-address "$address" \
    --num-cpus "$(ranks_on "$gpus")" --num-gpus "$gpus" "${common[@]}"
