#!/usr/bin/env bash
# ca-pod.sh BIN MANIFEST: runs the commands of the CA's pod in the Kubernetes example, as its user, on folders
# and a Secret with the modes a kubelet gives them under fsGroup. Needs root; works in a mount namespace of its
# own and leaves nothing.
set -euo pipefail

if [ "${3:-}" != inside ]; then
  exec unshare --mount --net bash "$0" "$@" inside
fi
BIN=$1
USER_ID=10002
ip link set lo up
mount --make-rprivate /
WORK=$(mktemp -d /tmp/ca-pod.XXXXXX)
chmod 0755 "$WORK"
trap 'rm -rf "$WORK"' EXIT
install -m 0755 "$BIN/ca-server" "$BIN/ca-admin" "$WORK"
python3 - "$2" "$WORK" <<'PY'
import sys, yaml
objects = {o["kind"]: o for o in yaml.safe_load_all(open(sys.argv[1]))}
pod = objects["StatefulSet"]["spec"]["template"]["spec"]
open(sys.argv[2] + "/prepare", "w").write(pod["initContainers"][0]["command"][2])
open(sys.argv[2] + "/serve", "w").write("\n".join(pod["containers"][0]["command"]))
open(sys.argv[2] + "/probe", "w").write("\n".join(pod["containers"][0]["readinessProbe"]["exec"]["command"]))
open(sys.argv[2] + "/ca-server.toml", "w").write(objects["ConfigMap"]["data"]["ca-server.toml"])
PY

# The manifest's paths, in a view of this machine's root that is gone with the namespace.
mount -t tmpfs tmpfs /mnt
mkdir /mnt/upper /mnt/work /mnt/root
mount -t overlay overlay -o lowerdir=/,upperdir=/mnt/upper,workdir=/mnt/work /mnt/root
ROOT=/mnt/root
mount --bind /proc $ROOT/proc
mount --rbind /dev $ROOT/dev
mount -t tmpfs -o mode=0755 tmpfs $ROOT/run
install -d -m 2777 -g $USER_ID $ROOT/{data,keys,kek} $ROOT/run/ray-mtls
install -d -m 0755 $ROOT/etc/ray-mtls
install -m 0644 "$WORK/ca-server.toml" $ROOT/etc/ray-mtls
head -c 32 /dev/urandom | od -An -vtx1 | tr -d ' \n' >$ROOT/kek/kek
chown 0:$USER_ID $ROOT/kek/kek
chmod 0440 $ROOT/kek/kek

in_pod() {
  chroot $ROOT setpriv --reuid $USER_ID --regid $USER_ID --clear-groups --inh-caps=-all \
    env -i "PATH=$WORK:/usr/bin:/bin" "$@"
}
mapfile -t serve <"$WORK/serve"
mapfile -t probe <"$WORK/probe"
in_pod sh -ec "$(cat "$WORK/prepare")" >"$WORK/log" 2>&1 || { cat "$WORK/log" >&2; exit 1; }
in_pod "${serve[@]}" >>"$WORK/log" 2>&1 &
server=$!
for ((i = 0; i < 100; i++)); do ! in_pod "${probe[@]}" >/dev/null 2>&1 || break; sleep 0.1; done
in_pod "${probe[@]}" >/dev/null || { tail -n 5 "$WORK/log" >&2; exit 1; }
echo "ok: the CA's pod prepares, serves and answers its probe as uid $USER_ID"
kill "$server"
wait "$server" || true
