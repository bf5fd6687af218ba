#!/usr/bin/env bash
# What tunnel mode costs: three Ray clusters of a head and a worker at the same time, without TLS, with Ray's own TLS and
# in tunnel mode, measured in turn. `bench.sh --help` says how to use it.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
. "$ROOT/scripts/lib/say.sh"
. "$ROOT/scripts/lib/need.sh"
. "$ROOT/scripts/lib/hosts.sh"
PREFIX=raymtls-bench
STATE=$BASE/tunnel-bench
LOGS=$STATE/logs
HOST_NUMBER=([ca]=4 [p-head]=11 [p-work]=12 [f-head]=21 [f-work]=22 [t-head]=31 [t-work]=32)
. "$ROOT/scripts/tunnel/lab.sh"

ROUNDS=8
KINDS=(plain files tunnel)
# What is promised for this machine's own ratios: tunnel against Ray's TLS in each, and bulk against no TLS.
BAR_OF_TLS=0.85
BAR_BULK=0.60
LEAF_LIFE=3600

usage() {
  cat <<TEXT
usage: scripts/tunnel/bench.sh [--rounds N] [--only plain,files,tunnel]

Starts three Ray clusters (network namespaces on this machine) and measures tasks, actor calls, 100 MB objects and CPU on each
in turn, round after round, in rotating order. As root, with a release build in target/release (RAYMTLS_BIN_DIR names another).
All three use Ray's token; the two in files and in tunnel mode have a certificate authority and agents.

  --rounds N   rounds that count, after one that does not (default $ROUNDS)
  --only LIST  these clusters alone

Prints medians and medians of paired ratios. Exit code 0 only if the bars hold: tunnel at least $BAR_OF_TLS of Ray's own TLS in each,
bulk at least $BAR_BULK of no TLS. Logs: $LOGS
TEXT
}

main() {
  [ "${1:-}" != driver ] || { driver "$2"; return; }
  while [ $# -gt 0 ]; do
    case $1 in
      --rounds) ROUNDS=$2; shift ;;
      --only) IFS=, read -ra KINDS <<<"$2"; shift ;;
      -h | --help) usage; exit 0 ;;
      *) usage >&2; exit 64 ;;
    esac
    shift
  done
  # Without the cluster in tunnel mode the program is not needed.
  [[ " ${KINDS[*]} " == *" tunnel "* ]] || BINARIES=(ca-server ca-admin node-agent)
  lab_up
  step "Hosts, CA, agents"
  make_bench_hosts
  local kind
  for kind in "${KINDS[@]}"; do
    step "Ray, $kind"
    start_cluster "$kind" || start_again "$kind"
  done
  step "$ROUNDS rounds; load average $(load_average)"
  measure
  step_end
  judge_ratios
  table
  ((CHECKS_BROKEN == 0))
}

host_of() { printf '%s-%s\n' "${1:0:1}" "$2"; }

make_bench_hosts() {
  local kind hosts=(ca)
  for kind in "${KINDS[@]}"; do hosts+=("$(host_of "$kind" head)" "$(host_of "$kind" work)"); done
  printf '127.0.0.1 localhost\n' >"$STATE/names"
  bridge_up
  for kind in "${hosts[@]}"; do host_up "$kind"; done
  start_ca
  for kind in "${KINDS[@]}"; do
    case $kind in
      plain) make_token ;;
      files) create_cluster files; enrol_pair files start_agent ;;
      tunnel) create_tunnel_cluster tunnel; enrol_pair tunnel start_tunnel_agent ;;
    esac
  done
}

# Ray's token for the cluster that has no agent.
make_token() {
  local name
  openssl rand -hex 32 >"$STATE/token"
  for name in p-head p-work; do
    install -m 0400 -o "$RAY_UID" -g "$RAY_GID" "$STATE/token" "$(host_dir "$name")/home/ray-token"
  done
}

# enrol_pair KIND START
enrol_pair() {
  local kind=$1 start=$2 head work
  head=$(host_of "$kind" head)
  work=$(host_of "$kind" work)
  create_token "$head" --cluster "$kind" --role head
  create_token "$work" --cluster "$kind" --role worker
  enrol "$head" "$head" --role head
  enrol "$work" "$work"
  "$start" "$head"
  "$start" "$work"
  if [ "$kind" = tunnel ]; then
    wait_for 60 "the tunnel of $head" tunnel_ready "$head"
    wait_for 60 "the tunnel of $work" tunnel_ready "$work"
  fi
}

# on_cluster KIND HOST COMMAND...: as Ray's uid, with that cluster's environment.
on_cluster() {
  local kind=$1 name=$2 head
  shift 2
  head="RAY_ADDRESS=$(address "$(host_of "$kind" head)"):$GCS_PORT"
  if [ "$kind" = plain ]; then
    as_ray "$name" env "$head" RAY_AUTH_MODE=token "RAY_AUTH_TOKEN_PATH=$(host_dir "$name")/home/ray-token" "$@"
  else
    as_ray "$name" node-agent exec --socket "$(agent_socket "$name")" -- env "$head" "$@"
  fi
}

start_cluster() {
  local kind=$1 head work flags=(--num-cpus=1 --object-store-memory="$OBJECT_STORE_BYTES" --disable-usage-stats) ports=()
  head=$(host_of "$kind" head)
  work=$(host_of "$kind" work)
  [ "$kind" = plain ] || read -ra ports <<<"$(agent "$head" ray-flags --head)"
  run "$RAY_START_MAX" "$LOGS/ray-$head.log" "the Ray head, $kind" on_cluster "$kind" "$head" ray start --head --temp-dir=/tmp/ray \
    --include-dashboard=false --node-ip-address="$(address "$head")" "${flags[@]}" "${ports[@]:---port=$GCS_PORT}" || return 1
  ports=()
  [ "$kind" = plain ] || read -ra ports <<<"$(agent "$work" ray-flags)"
  run "$RAY_START_MAX" "$LOGS/ray-$work.log" "the Ray worker, $kind" on_cluster "$kind" "$work" ray start --address="$(address "$head"):$GCS_PORT" \
    --node-ip-address="$(address "$work")" --resources='{"work": 1}' "${flags[@]}" "${ports[@]}"
}

# On a starved machine Ray gives its own helpers up; once more from the start.
start_again() {
  local part
  for part in head work; do
    on_cluster "$1" "$(host_of "$1" "$part")" ray stop --force >>"$LOGS/ray-stop.log" 2>&1 || true
  done
  start_cluster "$1"
}

measure() {
  local kind clusters=()
  for kind in "${KINDS[@]}"; do
    clusters+=("$kind=$PREFIX-$(host_of "$kind" head),$PREFIX-$(host_of "$kind" work)=$(driver_command "$kind")")
  done
  "$PYTHON" "$STATE/lib/bench.py" compare "$ROUNDS" "${clusters[@]}" 2>"$LOGS/bench.log" | tee "$LOGS/measured.txt"
}

# One line that starts a cluster's driver from outside the hosts: this script again.
driver_command() { printf '%q driver %q\n' "$ROOT/scripts/tunnel/bench.sh" "$1"; }

driver() {
  on_cluster "$1" "$(host_of "$1" head)" python "$STATE/lib/bench.py" work --host work 2>>"$LOGS/driver-$1.log"
}

judge_ratios() {
  local test
  [[ " ${KINDS[*]} " == *" files tunnel "* ]] || return 0
  for test in tasks sync async bulk; do at_least "$test, tunnel : Ray's TLS" "$(ratio "$test tunnel:files")" "$BAR_OF_TLS"; done
  [[ " ${KINDS[*]} " != *" plain "* ]] || at_least "100 MB objects, tunnel : no TLS" "$(ratio "bulk tunnel:plain")" "$BAR_BULK"
}

ratio() { tail -n 1 "$LOGS/measured.txt" | "$PYTHON" -c 'import json, sys; print(f"{json.load(sys.stdin)[sys.argv[1]]:.2f}")' "$1"; }

at_least() {
  if "$PYTHON" -c 'import sys; sys.exit(float(sys.argv[1]) < float(sys.argv[2]))' "$2" "$3"; then held "$1" "$2"; else broke "$1" "$2 (wanted: at least $3)"; fi
}

# keep_ray_logs NAME: of each cluster.
RAY_HOSTS=(p-head p-work f-head f-work t-head t-work)

main "$@"
