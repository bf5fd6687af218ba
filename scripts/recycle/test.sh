#!/usr/bin/env bash
# test.sh [--keep|--down]: `node-agent recycle` on a real Ray cluster of a head and a worker in network
# namespaces of this machine: the worker recycled under a running job, gcs_server executed again under a
# driver, an actor and tasks, and what it refuses. As root. `scripts/check recycle` runs it.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
. "$ROOT/scripts/lib/say.sh"
. "$ROOT/scripts/lib/need.sh"
. "$ROOT/scripts/lib/hosts.sh"
. "$ROOT/scripts/quickstart/control.sh"
# shellcheck source=/dev/null
. "$ROOT/scripts/quickstart/ray.sh"

BIN=${RAYMTLS_BIN_DIR:-$ROOT/target/debug}
HOSTS=(ca head worker1)
RAY_HOSTS=(head worker1)
KEEP=no

main() {
  case "${1:-}" in
    --keep) KEEP=yes ;;
    --down) DOWN=yes ;;
    "") ;;
    *) die "usage: test.sh [--keep|--down]" ;;
  esac
  [ "$(id -u)" = 0 ] || die "needs root"
  need_base
  exec 9>"$BASE/quickstart.lock"
  flock -n 9 || die "a quickstart or another run of this test is there"
  if [ "${DOWN:-no}" = yes ]; then
    clear_up
    return
  fi
  trap on_exit EXIT
  trap 'exit 130' INT TERM
  clear_up
  install -d -m 0755 "$LOGS" "$STATE/bin" "$STATE/lib"
  step "A CA, a head whose control store is on disk, and a worker"
  cluster_up
  [ "$KEEP" = no ] || { step_end; note "left up: scripts/quickstart/on head ..., test.sh --down"; return; }
}

cluster_up() {
  local name
  need_command ip iproute2
  need_command openssl openssl
  need_ray
  install -m 0755 "$BIN"/{ca-server,ca-admin,node-agent} "$STATE/bin"
  { printf '127.0.0.1 localhost\n%s %s\n' "$(address head)" "$HEAD_NAME"; } >"$STATE/names"
  bridge_up
  for name in "${HOSTS[@]}"; do host_up "$name"; done
  start_ca
  create_cluster demo
  create_token head --cluster demo --role head --node head --dns "$HEAD_NAME"
  create_token worker1 --cluster demo --role worker --node worker1
  enrol head head --role head --dns "$HEAD_NAME"
  enrol worker1 worker1
  for name in "${RAY_HOSTS[@]}"; do start_agent "$name"; done
  start_head_on_disk
  run "$RAY_START_MAX" "$LOGS/ray-worker1.log" "the Ray worker" start_ray worker1 --address="$(address head):$GCS_PORT"
}

# Ray keeps its control store in RocksDB, so that gcs_server can end and come back.
start_head_on_disk() {
  local ports=()
  read -ra ports <<<"$(agent head ray-flags --head)"
  run "$RAY_START_MAX" "$LOGS/ray-head.log" "the Ray head" with_leaf head env RAY_gcs_storage=rocksdb \
    "RAY_gcs_storage_path=$(host_dir head)/home/gcs" ray start --head --node-ip-address="$(address head)" \
    --resources='{"head": 1}' --num-cpus=2 --object-store-memory="$OBJECT_STORE_BYTES" --disable-usage-stats \
    --temp-dir=/tmp/ray --dashboard-host=127.0.0.1 "${ports[@]}"
}

clear_up() {
  hosts_down
  rm -rf "${STATE:?}"
}

on_exit() {
  local code=$?
  trap - EXIT INT TERM
  end_children
  if ((code != 0)); then
    [ -z "$STEP" ] || warn "failed or interrupted in step: $STEP"
    keep_ray_logs
    warn "logs are in $LOGS"
  fi
  if [ "$KEEP" = no ]; then
    hosts_down
    rm -rf "${STATE:?}"/{hosts,bin,lib,names}
  fi
  exit "$code"
}

main "$@"
