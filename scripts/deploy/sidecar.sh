#!/usr/bin/env bash
# sidecar.sh BIN RAYCLUSTER JOIN: runs the commands of the agent's sidecar in the KubeRay example, as its user,
# on folders with the modes a kubelet gives an emptyDir (0777, and 2777 of fsGroup), and asks for Ray's files as
# Ray's user through a read-only view of the shared one. Needs root and a CA that JOIN's endpoints reach; it
# works in a mount namespace of its own and leaves nothing.
set -euo pipefail

if [ "${4:-}" != inside ]; then
  exec unshare --mount bash "$0" "$@" inside
fi
BIN=$1
AGENT_UID=10001 RAY_UID=1000 GID=100

mount --make-rprivate /
mkdir -p /tmp/sidecar
install -m 0755 "$BIN/node-agent" /tmp/sidecar/node-agent
python3 -c '
import sys, yaml
cluster = next(yaml.safe_load_all(open(sys.argv[1])))
pod = cluster["spec"]["workerGroupSpecs"][0]["template"]["spec"]
print(pod["initContainers"][0]["command"][2])' "$2" >/tmp/sidecar/command
cp "$3" /tmp/sidecar/join

# A pod as the kubelet makes it: two open volumes, and the Secret for root and the group.
volumes() {
  local mode=$1
  mount -t tmpfs -o mode=0755 tmpfs /run
  mount -t tmpfs -o mode=0755 tmpfs /var/lib
  install -d -m "$mode" -g "$GID" /run/ray-mtls /var/lib/ray-mtls
  install -d -m 0755 /run/join /run/ray-view
  install -m 0440 -g "$GID" /tmp/sidecar/join /run/join/join
  mount --bind /run/ray-mtls /run/ray-view
  mount -o remount,bind,ro /run/ray-view
}

as_agent() {
  setpriv --reuid "$AGENT_UID" --regid "$GID" --clear-groups --inh-caps=-all env -i \
    PATH=/tmp/sidecar:/usr/bin:/bin HOME=/ "$@"
}
as_ray() { setpriv --reuid "$RAY_UID" --regid "$GID" --clear-groups --inh-caps=-all "$@"; }

volumes 0777
# Right in an open volume the agent refuses, and says why.
if as_agent node-agent enroll --join /run/join/join --state-dir /var/lib/ray-mtls/agent --tls-dir /run/ray-mtls/tls \
  >/tmp/sidecar/refused 2>&1; then
  echo "the agent kept keys right in an open folder" >&2
  exit 1
fi
grep -q 'chmod go-w /var/lib/ray-mtls' /tmp/sidecar/refused
umount /run/ray-view /run /var/lib
volumes "${MODE:-2777}"

# In the folder of its own it works.
as_agent sh -ec "$(cat /tmp/sidecar/command)" >/tmp/sidecar/log 2>&1 &
agent=$!
trap 'kill "$agent" 2>/dev/null; wait "$agent" 2>/dev/null || true; rm -rf /tmp/sidecar' EXIT
for ((i = 0; i < 100; i++)); do [ ! -e /run/ray-mtls/node/agent.sock ] || break; sleep 0.1; done

check() {
  if "${@:2}" >/tmp/sidecar/out 2>&1; then echo "ok: $1"; else
    echo "FAILED: $1" >&2
    tail -n 5 /tmp/sidecar/out /tmp/sidecar/log >&2
    exit 1
  fi
}
check "Ray's user starts a program through the read-only view" \
  as_ray /run/ray-view/node/bin/node-agent exec --socket /run/ray-view/node/agent.sock -- true
check "and reads the fixed paths" as_ray cat /run/ray-mtls/node/tls/{tls.key,tls.crt,ca.crt,ray_token}
check "but not the identity" as_ray sh -c '! cat /var/lib/ray-mtls/node/agent/identity.pem'
check "and puts nothing in place of the folder" as_ray sh -c '! mv /run/ray-view/node /run/ray-view/other'
check "the copy of the join file is gone" test ! -e /var/lib/ray-mtls/node/join
check "the pod leaves" as_agent node-agent leave --yes --socket /run/ray-mtls/node/agent.sock
