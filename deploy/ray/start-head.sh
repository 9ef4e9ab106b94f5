#!/usr/bin/env bash
# Start Ray on the host where the service will run: RAY_AUTH_TOKEN_PATH=FILE deploy/ray/start-head.sh ADDRESS [GPUS]
#
# ADDRESS: this host's on the network between the hosts. GPUS: default all.
# CPUS=N: ranks that this host takes; default one for each GPU, or 2 where there is none.
set -euo pipefail
address=${1:?usage: start-head.sh ADDRESS [GPUS]}
# shellcheck source=deploy/ray/common.sh
source "$(dirname "$0")/common.sh"
gpus=${2:-$(count_gpus)}
exec ray start --head --node-ip-address "$address" --port 6379 --include-dashboard=false \
    --num-cpus "$(ranks_on "$gpus")" --num-gpus "$gpus" "${common[@]}"
