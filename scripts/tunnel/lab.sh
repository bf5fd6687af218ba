# shellcheck shell=bash
# Tunnel mode on hosts of its own: what test.sh, full.sh and bench.sh share. Sourced after lib/say.sh, lib/need.sh,
# lib/hosts.sh; runs nothing by itself. A script sets PREFIX, STATE and LOGS, then sources this.

. "$ROOT/scripts/quickstart/control.sh"
. "$ROOT/scripts/quickstart/ray.sh"

BIN=$(cd "${RAYMTLS_BIN_DIR:-$ROOT/target/release}" 2>/dev/null && pwd) || die "there is no ${RAYMTLS_BIN_DIR:-$ROOT/target/release}: build first"
BINARIES=(ca-server ca-admin node-agent ray-tunnel)
# ray-tunnel runs as this bare uid on each host; another user of the same host has this one.
TUNNEL_UID=61010
# shellcheck disable=SC2034
OTHER_UID=61002
# A port of the plan that Ray does not come to, for flows of our own.
# shellcheck disable=SC2034
FLOW_PORT=10100
CLUSTER=demo
LEAF_LIFE=60

LOAD_LOG=$(host_dir head)/home/load.jsonl
LOAD_STOP=$(host_dir head)/home/load-stop
LOAD_PID=""
PYTHON=$VENV/bin/python

# lab_up: turn, cleared stage, programs.
lab_up() {
  [ "$(id -u)" = 0 ] || die "needs root, for network namespaces"
  need_base
  exec 9>"$STATE.lock"
  flock -n 9 || die "another run of this is there"
  trap lab_down EXIT
  trap 'exit 130' INT TERM
  hosts_down
  rm -rf "$STATE"
  install -d -m 0755 "$LOGS" "$STATE/bin" "$STATE/lib"
  local name
  for name in "${BINARIES[@]}"; do [ -x "$BIN/$name" ] || die "there is no $BIN/$name: build first"; done
  # Ray's uid must reach them, wherever the repository lies.
  install -m 0755 "${BINARIES[@]/#/$BIN/}" "$STATE/bin"
  install -m 0644 "$ROOT"/scripts/tunnel/*.py "$ROOT/scripts/isolation/test/host.py" "$STATE/lib"
  need_command ip iproute2
  need_command nft nftables
  need_command ss iproute2
  need_command openssl openssl
  need_ray
}

lab_down() {
  local code=$?
  trap - EXIT INT TERM
  end_children
  tell_failure "$code"
  hosts_down
  rm -rf "${STATE:?}"/{hosts,bin,lib,names}
  exit "$code"
}

# make_hosts NAME...
make_hosts() {
  local name
  { printf '127.0.0.1 localhost\n%s %s\n' "$(address head)" "$HEAD_NAME"; } >"$STATE/names"
  bridge_up
  for name in "$@"; do host_up "$name"; done
}

# The agent of a host of the cluster in tunnel mode; the hosts share this machine's files, so each has folders of its own.
tunnel_agent_config() {
  local dir
  dir=$(host_dir "$1")
  install -d -m 0755 "$dir/run"
  cat >"$dir/agent.toml" <<TOML
state_dir = "$(agent_state "$1")"
tls_dir = "$(tls_dir "$1")"
socket = "$(agent_socket "$1")"
ray_uid = $RAY_UID
ray_group = "$RAY_GID"

[tunnel]
program = "$STATE/bin/ray-tunnel"
user = $TUNNEL_UID
folder = "$dir/run"
TOML
}

start_tunnel_agent() {
  tunnel_agent_config "$1"
  daemon "$1" "$LOGS/agent-$1.log" node-agent run --config "$(host_dir "$1")/agent.toml"
  wait_for 30 "the agent of $1" agent_answers "$1"
}

# create_tunnel_cluster NAME HEAD_HOST: isolation, token and mode, before any node is there.
create_tunnel_cluster() {
  run 30 "$LOGS/ca-admin.log" "cluster create $1" ca_admin cluster create "$1" --max-job "$MAX_JOB"
  run 30 "$LOGS/ca-admin.log" "cluster set $1" ca_admin cluster set "$1" isolation=enforce ray-token=on --yes
  run 30 "$LOGS/ca-admin.log" "cluster set $1 mode=tunnel" ca_admin cluster set "$1" mode=tunnel "leaf-life=${LEAF_LIFE}s" --yes
}

# field NAME FIELD...: out of what status says; a number in FIELD is an index.
field() {
  local name=$1
  shift
  agent "$name" status -o json 2>/dev/null | "$PYTHON" -c '
import json, sys
seen = json.load(sys.stdin)
for field in sys.argv[1:]:
    seen = (seen or {}).get(field) if isinstance(seen, dict) else seen[int(field)]
print(seen)' "$@"
}

# tunnel_ready NAME: it takes flows, by its own word.
tunnel_ready() { [ "$(tunnel_says "$1" accepting)" = true ]; }

tunnel_socket() { printf '%s/run/control.sock\n' "$(host_dir "$1")"; }

# tunnel_says NAME FIELD...: out of what its ray-tunnel says.
tunnel_says() {
  local name=$1
  shift
  "$PYTHON" "$STATE/lib/wire.py" ask "$(tunnel_socket "$name")" status "$@" 2>/dev/null
}

# tunnel_pids NAME: of ray-tunnel on that host, by its number out here.
tunnel_pids() {
  local pid
  for pid in $(host_pids "$1"); do
    [ "$(cat "/proc/$pid/comm" 2>/dev/null)" != ray-tunnel ] || printf '%s\n' "$pid"
  done
}

tunnel_memory_kib() { awk '$1 == "VmRSS:" { print $2 }' "/proc/$(tunnel_pids "$1" | head -n 1)/status"; }

now() { "$PYTHON" -c 'import time; print(f"{time.time():.3f}")'; }
monotonic() { "$PYTHON" -c 'import time; print(time.monotonic())'; }

load_average() { cut -d ' ' -f 1 /proc/loadavg; }

# The load: one driver on the head, until stop_load.
start_load() {
  rm -f "$LOAD_LOG" "$LOAD_STOP"
  "${WITH_RAY:-with_leaf}" head python "$STATE/lib/load.py" run --log "$LOAD_LOG" --stop "$LOAD_STOP" \
    --hosts "${RAY_HOSTS[1]},${RAY_HOSTS[2]}" --pace "${LOAD_PACE:-1}" >>"$LOGS/load.log" 2>&1 </dev/null &
  LOAD_PID=$!
  load wait >>"$LOGS/load.log" || die "the load did not come up: see $LOGS/load.log and $LOAD_LOG"
  note "load is up, load average $(load_average)"
}

load() {
  local verb=$1
  shift
  "$PYTHON" "$STATE/lib/load.py" "$verb" "$LOAD_LOG" "$@"
}

stop_load() {
  as_ray head touch "$LOAD_STOP"
  finish "$LOAD_PID" 120 "$LOGS/load.log" "the load"
}

# tunnel_cluster_up: CA, the cluster demo in mode tunnel and another one, three Ray hosts with their agents.
# shellcheck disable=SC2153
tunnel_cluster_up() {
  local name
  make_hosts "${HOSTS[@]}"
  install -d -m 0755 "$STATE/job"
  install -m 0644 "$ROOT"/scripts/quickstart/{job,probe}.py "$STATE/job"
  start_ca
  create_tunnel_cluster "$CLUSTER"
  create_cluster other
  create_token head --cluster "$CLUSTER" --role head --node head --dns "$HEAD_NAME"
  create_token workers --cluster "$CLUSTER" --role worker --uses 2
  enrol head head --role head --dns "$HEAD_NAME"
  enrol worker1 workers
  enrol worker2 workers
  for name in "${RAY_HOSTS[@]}"; do start_tunnel_agent "$name"; done
  DASHBOARD_HOST=$(address head)
}
