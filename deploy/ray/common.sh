# What head and workers have in common; sourced.
# shellcheck shell=bash

: "${RAY_AUTH_TOKEN_PATH:?must name the file with the token that all hosts of this pool share, readable by you alone}"
[[ -s $RAY_AUTH_TOKEN_PATH ]] || { echo "$RAY_AUTH_TOKEN_PATH: no token in it" >&2; exit 1; }
export RAY_AUTH_TOKEN_PATH RAY_AUTH_MODE=token
# A rank has a GPU of its own and sees the others of its host, to reach their memory.
export RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES=1
ulimit -n 65536 2>/dev/null || ulimit -n "$(ulimit -Hn)"

# Fixed, so that a firewall can name them; without --block, Ray goes on in the background and `ray stop` ends it.
# shellcheck disable=SC2034
common=(
    --node-manager-port 6380 --object-manager-port 6381 --runtime-env-agent-port 6382 --metrics-export-port 6383
    --dashboard-agent-listen-port 6384 --dashboard-agent-grpc-port 6385 --min-worker-port 10002 --max-worker-port 10999
    --object-store-memory 83886080 --disable-usage-stats
)

count_gpus() {
    if command -v nvidia-smi >/dev/null; then nvidia-smi -L | wc -l; else echo 0; fi
}

# ranks_on GPUS: Ray's CPUs are places for ranks, not cores.
ranks_on() {
    echo "${CPUS:-$(($1 > 0 ? $1 : 2))}"
}
