# Ray's head node, then the service on it, in one container: engine and ranks are children of this Ray, they share a
# folder and memory with the service, and neither is of use without the other.
set -eu
ulimit -n 65536 || ulimit -n hard
# A container that is started again finds the sockets of the Ray before it.
rm -rf "${RAY_TMPDIR:-/tmp}/ray"
# KubeRay makes the command and may quote words of it. Without --block it returns as soon as Ray is up.
start_ray=${KUBERAY_GEN_RAY_START_CMD:?KubeRay sets it in a RayCluster}
eval "${start_ray//--block/}"
folder=/etc/moe-forward/config
if [ -e "$folder/wait_for_gpus.py" ]; then python "$folder/wait_for_gpus.py" "$folder/config.json"; fi
exec moe-forward serve --config "$folder/config.json"
