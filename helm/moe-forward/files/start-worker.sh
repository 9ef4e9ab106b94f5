# A Ray node for ranks. With --block, which KubeRay adds, it ends when one of Ray's processes does.
set -eu
ulimit -n 65536 || ulimit -n hard
rm -rf "${RAY_TMPDIR:-/tmp}/ray"
eval "exec ${KUBERAY_GEN_RAY_START_CMD:?KubeRay sets it in a RayCluster}"
