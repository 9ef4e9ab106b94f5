#!/usr/bin/env bash
# Build the image for CPUs where there is neither Docker nor a registry, then serve from it as it is meant to run: not
# root, a root file system that is read-only, and SIGTERM in the end.
#
#   docker/prove.sh            as root on Debian, with mmdebstrap and buildah; some minutes and 4 GB under $WORK
#
# WORK=DIR              where it works; default: a temporary folder, removed afterwards
# PYTHON_PREFIX=DIR     an installed Python 3.10 to 3.13, which becomes the base image's /usr/local; default: python3's
# TORCH_WHEEL=FILE      torch for CPUs; default: the Dockerfile's index
#
# The base is a stand-in for python:...-slim: Debian of the same release from Debian's mirror, and PYTHON_PREFIX. Every
# RUN and COPY of the target is done by buildah. Namespaces and cgroups are not: isolation is a chroot.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
PYTHON_PREFIX=${PYTHON_PREFIX:-$(python3 -c 'import sys; print(sys.base_prefix)')}

say() { printf '%s %s\n' "$(date +%T)" "$*" >&2; }
need() { command -v "$1" >/dev/null || { say "needs $1: apt-get install $1"; exit 1; }; }
need mmdebstrap
need buildah

if [[ -z ${WORK:-} ]]; then
    WORK=$(mktemp -d)
    temporary=$WORK
fi
index=
tree=
clean_up() {
    [[ -z $index ]] || kill "$index"
    [[ -z $tree ]] || for at in dev proc tmp var/cache/moe-forward .; do umount "$tree/$at" || true; done
    [[ -z ${temporary:-} ]] || rm -rf "$temporary"
}
trap clean_up EXIT

mkdir -p "$WORK/tmp"
export TMPDIR=$WORK/tmp BUILDAH_ISOLATION=chroot
echo '{"default": [{"type": "insecureAcceptAnything"}]}' >"$WORK/policy.json"
storage=(--root "$WORK/storage" --runroot "$WORK/run" --storage-driver vfs)

say "base: bookworm and $PYTHON_PREFIX"
if [[ ! -e $WORK/base.tar ]]; then
    packages=ca-certificates,libbz2-1.0,libexpat1,libffi8,liblzma5,libncursesw6,libreadline8,libsqlite3-0,libssl3
    mmdebstrap --variant=minbase --include="$packages,libuuid1,zlib1g" bookworm "$WORK/base.tar" \
        http://deb.debian.org/debian 2>"$WORK/base.log"
fi
base=$(buildah "${storage[@]}" from scratch)
mounted=$(buildah "${storage[@]}" mount "$base")
tar -C "$mounted" -xf "$WORK/base.tar"
tar -C "$PYTHON_PREFIX" --exclude=site-packages --exclude=test --exclude=__pycache__ -c bin lib include |
    tar -C "$mounted/usr/local" -x
# Scripts of what was installed there besides name an interpreter that is not in the image.
grep -lIr '^#!' "$mounted/usr/local/bin" | xargs -r rm
mkdir -p "$mounted/usr/local/lib/$(basename "$PYTHON_PREFIX"/lib/python3.*)/site-packages"
chroot "$mounted" ldconfig
chroot "$mounted" /usr/local/bin/python3 -m ensurepip >/dev/null 2>&1
ln -sf python3 "$mounted/usr/local/bin/python"
# This host's certificates, where its way to the package index has one of its own.
cp -L /etc/ssl/certs/ca-certificates.crt "$mounted/etc/ssl/certs/"
printf '[global]\ncert = /etc/ssl/certs/ca-certificates.crt\n' >"$mounted/etc/pip.conf"
buildah "${storage[@]}" commit --signature-policy "$WORK/policy.json" "$base" localhost/python-base >/dev/null 2>&1

arguments=()
if [[ -n ${TORCH_WHEEL:-} ]]; then
    mkdir -p "$WORK/index/torch"
    ln -sf "$TORCH_WHEEL" "$WORK/index/torch/"
    file=$(basename "$TORCH_WHEEL")
    sha256=$(sha256sum "$TORCH_WHEEL" | cut -d' ' -f1)
    printf '<a href="%s#sha256=%s">%s</a>\n' "${file//+/%2B}" "$sha256" "$file" >"$WORK/index/torch/index.html"
    python3 -m http.server --bind 127.0.0.1 --directory "$WORK/index" 8399 >/dev/null 2>&1 &
    index=$!
    arguments+=(--build-arg TORCH_INDEX_URL=http://127.0.0.1:8399 --build-arg "TORCH_SHA256=$sha256")
fi

say "build"
buildah "${storage[@]}" bud --signature-policy "$WORK/policy.json" --layers=false --pull-never \
    --format docker --ignorefile "$root/.dockerignore" \
    --build-arg PYTHON_IMAGE=localhost/python-base "${arguments[@]}" \
    --target runtime-cpu -t localhost/moe-forward:cpu -f "$root/docker/Dockerfile" "$root" >"$WORK/build.log" 2>&1 ||
    { tail -30 "$WORK/build.log" >&2; exit 1; }
grep -E '^STEP|^\[.*STEP' "$WORK/build.log" >&2 || true

say "serve"
made=$(buildah "${storage[@]}" from --pull-never --signature-policy "$WORK/policy.json" localhost/moe-forward:cpu)
# Bound onto itself, so that it can be made read-only.
tree=$WORK/tree
mkdir -p "$tree"
mount --bind "$(buildah "${storage[@]}" mount "$made")" "$tree"
mount -o remount,bind,ro "$tree"
mount -t tmpfs -o mode=1777 tmpfs "$tree/tmp"
mount -t tmpfs -o uid=10001,gid=0,mode=0770 tmpfs "$tree/var/cache/moe-forward"
mount -t proc proc "$tree/proc"
mount -t tmpfs -o mode=0755 tmpfs "$tree/dev"
mkdir -m 1777 "$tree/dev/shm"
for device in "null 3" "zero 5" "full 7" "random 8" "urandom 9"; do
    mknod -m 666 "$tree/dev/${device% *}" c 1 "${device#* }"
done
python3 "$root/docker/prove.py" "$tree" "$(buildah "${storage[@]}" inspect --type image localhost/moe-forward:cpu)"
