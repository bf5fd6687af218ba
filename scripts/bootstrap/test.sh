#!/usr/bin/env bash
# bootstrap-node.sh on real hosts: a CA, a Ray head and a worker in network namespaces. Run, run again,
# killed at many points and run again, taken down. `scripts/check bootstrap` runs it.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
. "$ROOT/scripts/lib/say.sh"
. "$ROOT/scripts/lib/need.sh"
. "$ROOT/scripts/lib/hosts.sh"
# Hosts of its own: it does not meet a quickstart on the same machine.
PREFIX=raymtls-boot
STATE=$BASE/bootstrap
LOGS=$STATE/logs
. "$ROOT/scripts/quickstart/control.sh"
. "$ROOT/scripts/bootstrap/border.sh"

BIN=$(cd "${RAYMTLS_BIN_DIR:-$ROOT/target/debug}" && pwd)
HOSTS=(ca head worker1)
HEAD_NAME=head.$TRUST_DOMAIN
# Points at which a run without Ray is killed, and of one with Ray.
KILLS=${KILLS:-6}
KILLS_WITH_RAY=${KILLS_WITH_RAY:-1}
# What is on a node that is made.
NODE_STATE="1 live, 1 identity, 1 agent, join file gone, nothing half done"
# Seconds a node may take beyond Ray's own start: 15 are promised, ten times that is asserted.
BEYOND_RAY_MAX=150

PORTS=(
  --node-manager-port=6701 --object-manager-port=6702 --runtime-env-agent-port=6703
  --dashboard-agent-grpc-port=6704 --dashboard-agent-listen-port=6705 --metrics-export-port=6706
  --min-worker-port=10002 --max-worker-port=10101
  --num-cpus=1 --object-store-memory=200000000 --disable-usage-stats
)

main() {
  [ "$(id -u)" = 0 ] || die "needs root"
  need_base
  exec 9>"$BASE/bootstrap.lock"
  flock -n 9 || die "another run of this test is there"
  trap clear_away EXIT
  trap 'exit 130' INT TERM
  hosts_down
  rm -rf "$STATE"
  install -d -m 0755 "$LOGS" "$STATE/bin"
  install -m 0755 "$BIN/ca-server" "$BIN/ca-admin" "$STATE/bin"
  need_command ip iproute2
  need_command pgrep procps
  need_command curl curl
  need_command openssl openssl
  need_ray

  step "A CA and two hosts"
  make_hosts
  step "The script refuses what is wrong, with the exit code that says so"
  show_misuse
  step "The program from a URL, the join file from a descriptor"
  show_sources
  step "A plant among the files of Ray's user, at root's own terminal"
  show_plant
  step "Another user on the same node"
  show_other_user
  step "The Slurm prolog and epilog, called by hand for two users"
  show_slurm
  step "Killed at $KILLS points before Ray, and run again each time"
  show_kills
  step "A head and a worker, each by one command"
  show_nodes
  step "The same commands again"
  show_again
  step "Killed $KILLS_WITH_RAY times while Ray starts, and run again"
  show_kills_with_ray
  step "Taken down"
  show_uninstall
  step "The KubeRay example's sidecar, on folders with the modes of an emptyDir"
  show_sidecar
  step_end
  table
  printf '\n%d s in all; ' "$SECONDS"
  ((CHECKS_BROKEN == 0)) || { printf '%d of %d checks FAILED. Logs: %s\n' "$CHECKS_BROKEN" "${#CHECKS[@]}" "$LOGS"; exit 1; }
  printf 'all %d checks held.\n' "${#CHECKS[@]}"
}

make_hosts() {
  local name
  { printf '127.0.0.1 localhost\n%s %s\n' "$(address head)" "$HEAD_NAME"; } >"$STATE/names"
  bridge_up
  for name in "${HOSTS[@]}"; do host_up "$name"; done
  # As a release would bring it.
  # Without the symbols of a debug build, which only cost time here.
  strip -o "$STATE/node-agent" "$BIN/node-agent"
  tar -czf "$STATE/release.tar.gz" -C "$STATE" --transform 's:^:release/bin/:' node-agent
  RELEASE_SHA256=$(sha256sum <"$STATE/release.tar.gz" | cut -d' ' -f1)
  # The script alone, as it lies on a node.
  install -m 0755 "$ROOT/scripts/bootstrap-node.sh" "$STATE/bin/bootstrap-node.sh"
  start_ca
  create_cluster demo
}

# options NAME: where things are on that host; the file system is shared, so each has its own folders.
options() {
  local dir
  dir=$(host_dir "$1")
  printf '%s\n' --from "$STATE/release.tar.gz" --sha256 "$RELEASE_SHA256" --name "$1" --ray-user "$RAY_UID:$RAY_GID" \
    --prefix "$dir/node/usr" --state-dir "$dir/node/lib/agent" --tls-dir "$dir/node/lib/tls" \
    --socket "$dir/node/run/agent.sock" --log "$dir/node/log/agent.log"
  # shellcheck disable=SC2086
  printf '%s\n' ${JOIN_WORDS:---join $dir/join}
}

# bootstrap NAME WORD...: the script on that host, in a session of its own; its output is in a log.
bootstrap() {
  local name=$1 options
  shift
  mapfile -t options < <(options "$name")
  in_host "$name" setsid --wait env ${CURL_CA:+"CURL_CA_BUNDLE=$CURL_CA"} ${BASH_ENV_FILE:+"BASH_ENV=$BASH_ENV_FILE" "KILL_AT=${KILL_AT:-0}" "COUNT_TO=${COUNT_TO:-/dev/null}"} \
    bash "$STATE/bin/bootstrap-node.sh" "${options[@]}" "$@" >>"$LOGS/bootstrap-$name.log" 2>&1 </dev/null
}

# bring_join NAME ROLE: a token of one use, its file on the host.
bring_join() {
  rm -f "$CA_DIR/join/$1"
  create_token "$1" --cluster demo --role "$2" --node "$1" --dns "$HEAD_NAME"
  install -m 0600 "$CA_DIR/join/$1" "$(host_dir "$1")/join"
}

code_of() {
  local code=0
  "$@" || code=$?
  printf '%s\n' "$code"
}

show_misuse() {
  local file=$STATE/release.tar.gz url=https://127.0.0.1:1/node-agent
  judge "a URL without a hash" "$(code_of bootstrap head --from $url --sha256= --no-ray)" 64
  judge "a URL without TLS" "$(code_of bootstrap head --from http://127.0.0.1/node-agent --no-ray)" 64
  judge "a descriptor that is bash's own" "$(code_of bootstrap head --join-fd 255 --no-ray)" 64
  judge "no command for Ray" "$(code_of bootstrap head)" 64
  judge "another file than the hash says" "$(code_of bootstrap head --sha256 "${RELEASE_SHA256//[0-9]/0}" --no-ray)" 78
  judge "and nothing was installed" "$(find "$(host_dir head)/node" -name 'node-agent*' | wc -l)" 0
  judge "a host without a join file" "$(code_of bootstrap head --from "$file" --no-ray)" 78
  # A token for another node: the CA's word, and its exit code.
  create_token stray --cluster demo --role worker --node somebody-else
  install -m 0600 "$CA_DIR/join/stray" "$(host_dir head)/join"
  show_dry_runs
  judge "a program that Ray's user cannot run, before a token is used" \
    "$(code_of bootstrap head -- /nowhere/ray start), $(find "$(host_dir head)/node" -name 'enroll.key' | wc -l) keys" "78, 0 keys"
  judge "a token for another node" "$(code_of bootstrap head --no-ray)" 2
  bootstrap head --uninstall --yes
  judge "nothing is left of a node that never was" "$(made head)" 0
  rm -f "$(host_dir head)/join"
}

# What a dry run can see, it says; it changes nothing either way.
show_dry_runs() {
  local join
  join=$(host_dir worker1)/join
  judge "a dry run without a join file" "$(code_of bootstrap worker1 --dry-run --no-ray)" 78
  install -m 0644 "$CA_DIR/join/stray" "$join"
  judge "a dry run with a join file that others read" "$(code_of bootstrap worker1 --dry-run --no-ray)" 78
  chmod 0600 "$join"
  judge "a dry run of what can be" "$(code_of bootstrap worker1 --dry-run -- ray start)" 0
  judge "a dry run from a file that is not there" "$(code_of bootstrap worker1 --dry-run --from /nowhere --no-ray)" 78
  judge "a dry run from another file than the hash says" "$(code_of bootstrap worker1 --dry-run --sha256 "${RELEASE_SHA256//[0-9]/0}" --no-ray)" 78
  judge "a dry run with a Ray that is not there" "$(code_of bootstrap worker1 --dry-run -- /nowhere/ray start)" 78
  judge "files made by all of them" "$(made worker1)" 0
  rm -f "$join"
}

# An https server with a certificate of its own, which curl is told of; the join file never lies on the host.
show_sources() {
  local pid url=https://127.0.0.1:8443/release.tar.gz
  openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 1 -subj /CN=files \
    -addext subjectAltName=IP:127.0.0.1 -keyout "$STATE/url.key" -out "$STATE/url.crt" 2>>"$LOGS/url.log"
  exec_in_host worker1 python -c '
import functools, http.server, ssl, sys
handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=sys.argv[1])
server = http.server.ThreadingHTTPServer(("127.0.0.1", 8443), handler)
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(sys.argv[1] + "/url.crt", sys.argv[1] + "/url.key")
server.socket = context.wrap_socket(server.socket, server_side=True)
server.serve_forever()' "$STATE" >>"$LOGS/url.log" 2>&1 </dev/null &
  pid=$!
  wait_for 10 "the https server" in_host worker1 python -c 'import socket; socket.create_connection(("127.0.0.1", 8443))' 2>/dev/null
  bring_join worker1 worker
  judge "a URL whose server is not trusted" "$(code_of bootstrap worker1 --from $url --no-ray)" 1
  export CURL_CA=$STATE/url.crt
  judge "a URL with another hash" "$(code_of bootstrap worker1 --from $url --sha256 "${RELEASE_SHA256//[0-9]/0}" --no-ray)" 78
  mv "$(host_dir worker1)/join" "$STATE/fd.join"
  judge "a URL, and a join file from a descriptor" "$(JOIN_WORDS="--join-fd 3" code_of bootstrap worker1 --from $url --no-ray 3<"$STATE/fd.join")" 0
  judge "is a node" "$(node_state worker1)" "$NODE_STATE"
  judge "copies of the join file" "$(find "$(host_dir worker1)/node" -name 'join*' | wc -l)" 0
  judge "the secret in a log or list of its own" "$(grep -rlF "$(grep -o 'token.*' "$STATE/fd.join" | grep -o '[A-Za-z0-9_-]\{30,\}' | tail -n 1)" "$(host_dir worker1)/node" "$LOGS" | wc -l)" 0
  kill "$pid" 2>/dev/null || true
  unset CURL_CA
}

# made NAME: how many files and folders there are of the node.
made() { find "$(host_dir "$1")/node" 2>/dev/null | wc -l; }

# Kills the whole process group before its Nth command; without N it counts the commands.
kill_hook() {
  cat <<'HOOK'
set -o functrace
__n=0
trap 'if [ "$BASHPID" = $$ ]; then if ((++__n == KILL_AT)); then kill -KILL -- -$$; fi; [ "$KILL_AT" != 0 ] || echo $__n >$COUNT_TO; fi' DEBUG
HOOK
}

show_kills() {
  local count point i state good=0 killed=0
  BASH_ENV_FILE=$STATE/kill-hook
  kill_hook >"$BASH_ENV_FILE"
  bring_join head head
  KILL_AT=0 COUNT_TO=$STATE/count bootstrap head --role head --dns "$HEAD_NAME" --no-ray
  count=$(cat "$STATE/count")
  note "a whole run is $count commands"
  judge "a whole run" "$(node_state head)" "$NODE_STATE"
  for ((i = 1; i <= KILLS; i++)); do
    BASH_ENV_FILE="" bootstrap head --uninstall --yes
    bring_join head head
    point=$((count * i / (KILLS + 1)))
    # Killed twice at the same point, as by a watchdog; then left alone.
    KILL_AT=$point bootstrap head --role head --dns "$HEAD_NAME" --no-ray || killed=$((killed + ($? == 137)))
    BASH_ENV_FILE="" bootstrap head --role head --dns "$HEAD_NAME" --no-ray || note "the run after the kill at $point failed"
    state=$(node_state head)
    if [ "$state" = "$NODE_STATE" ]; then good=$((good + 1)); else note "after a kill at command $point: $state"; fi
  done
  BASH_ENV_FILE=""
  judge "runs that were really killed" "$killed" "$KILLS"
  judge "ended in the same state" "$good" "$KILLS"
}

# node_state NAME
node_state() {
  local dir half
  dir=$(host_dir "$1")
  half=$(half_done "$dir/node")
  # A running agent replaces its files too: what is there twice was left behind.
  [ -z "$half" ] || { sleep 0.5 && half=$(half_done "$dir/node"); }
  printf '%s live, %s identity, %s agent, join file %s, %s half done\n' \
    "$(ca_admin node list --cluster demo -o json | "$VENV/bin/python" -c '
import json, sys
nodes = json.load(sys.stdin)
nodes = nodes if isinstance(nodes, list) else nodes["nodes"]
print(sum(n["name"] == sys.argv[1] and n["state"] == "live" for n in nodes))' "$1")" \
    "$(find "$dir/node" -name identity.pem | wc -l)" \
    "$(agents "$1")" \
    "$([ -e "$dir/join" ] && echo there || echo gone)" \
    "${half:-nothing}"
}

half_done() { find "$1" \( -name '*.new' -o -name '*.bootstrap' -o -name '.*.tmp' -o -name enroll.key \) -printf '%f ' 2>/dev/null || true; }

# agents NAME: how many daemons run on that host.
agents() { in_host "$1" pgrep -c -f '^[^ ]*/node-agent run ' || true; }

start_words() {
  if [ "$1" = head ]; then
    printf '%s\n' --role head --dns "$HEAD_NAME" -- ray start --head --port=6379 \
      --node-ip-address="$(address head)" --temp-dir=/tmp/ray "${PORTS[@]}"
  else
    printf '%s\n' -- ray start --address="$HEAD_NAME:6379" --node-ip-address="$(address "$1")" "${PORTS[@]}"
  fi
}

# boot NAME WHAT: the whole command, timed by itself; judged by its proof and its seconds.
boot() {
  local words code=0
  mapfile -t words < <(start_words "$1")
  : >"$LOGS/bootstrap-$1.log"
  bootstrap "$1" "${words[@]}" || code=$?
  cp "$LOGS/bootstrap-$1.log" "$LOGS/$2-$1.log"
  ((code == 0)) || tail -n 20 "$LOGS/bootstrap-$1.log" >&2
  judge "$2: $1" "exit code $code, $(grep -c 'a task ran here' "$LOGS/bootstrap-$1.log") proof" "exit code 0, 1 proof"
  sed -n '/^seconds/,$p' "$LOGS/bootstrap-$1.log"
}

# seconds NAME WHAT PHASE
seconds() { awk -v what="$3" '$1 ~ /^[0-9.]+$/ { n = $1; $1 = ""; if (substr($0, 2) == what) print n }' "$LOGS/$2-$1.log"; }

show_nodes() {
  local name beyond
  bootstrap head --uninstall --yes
  bring_join head head
  bring_join worker1 worker
  for name in head worker1; do
    boot "$name" "first run"
    beyond=$(awk "BEGIN { print $(seconds "$name" "first run" "in all") - $(seconds "$name" "first run" "Ray's own start") }")
    if awk "BEGIN { exit !($beyond < $BEYOND_RAY_MAX) }"; then
      held "seconds beyond Ray's own start: $name" "$beyond (load $(cut -d' ' -f1 /proc/loadavg))"
    else
      broke "seconds beyond Ray's own start: $name" "$beyond (load $(cut -d' ' -f1 /proc/loadavg))"
    fi
    judge "state of $name" "$(node_state "$name")" "$NODE_STATE"
    judge "Ray on $name runs as" "$(in_host "$name" pgrep -u "$RAY_UID" -c -x raylet) raylet of uid $RAY_UID" "1 raylet of uid $RAY_UID"
  done
}

show_again() {
  local name before
  for name in head worker1; do
    before=$(in_host "$name" pgrep -x raylet)
    boot "$name" "second run"
    judge "the raylet on $name is the same" "$(in_host "$name" pgrep -x raylet)" "$before"
    judge "state of $name, again" "$(node_state "$name")" "$NODE_STATE"
  done
  in_host worker1 pkill -KILL -f '^[^ ]*/node-agent run '
  bootstrap worker1 --no-ray
  judge "a dead agent is started again" "$(node_state worker1)" "$NODE_STATE"
}

# Random moments while Ray starts; the next run must end what is half there.
show_kills_with_ray() {
  local i words pid code
  mapfile -t words < <(start_words worker1)
  for ((i = 1; i <= KILLS_WITH_RAY; i++)); do
    in_host worker1 pkill -KILL -x raylet || true
    bootstrap worker1 "${words[@]}" &
    pid=$!
    wait_for 30 "Ray to begin to start" test -e "$(host_dir worker1)/node/lib/bootstrap/ray-starting"
    sleep "0.$((RANDOM % 9))"
    ((i % 2)) || sleep 1
    # shellcheck disable=SC2016
    in_host worker1 bash -c 'kill -KILL -- -"$(pgrep -o -f "^bash [^ ]*/bootstrap-node.sh")"'
    code=0; wait "$pid" 2>/dev/null || code=$?
    judge "exit code of killed run $i" "$code" 137
    boot worker1 "after kill $i"
    judge "raylets after kill $i" "$(in_host worker1 pgrep -c -x raylet)" 1
    judge "state after kill $i" "$(node_state worker1)" "$NODE_STATE"
  done
}

show_uninstall() {
  local name
  # Somebody else's file in the same place stays.
  printf 'mine\n' >"$(host_dir worker1)/node/usr/bin/other"
  for name in worker1 head; do
    as_ray "$name" ray stop --force >>"$LOGS/stop.log" 2>&1 || true
    judge "without --yes nobody is asked: $name" "$(code_of bootstrap "$name" --uninstall)" 64
    judge "uninstall of $name" "$(code_of bootstrap "$name" --uninstall --yes)" 0
    judge "it does not say that files stay: $name" "$(grep -c 'all files stay' "$LOGS/bootstrap-$name.log" || true)" 0
    judge "agents on $name" "$(agents "$name")" 0
    judge "again is no error: $name" "$(code_of bootstrap "$name" --uninstall --yes)" 0
  done
  judge "left on head" "$(cd "$(host_dir head)" && find node 2>/dev/null | paste -sd ' ')" ""
  judge "left on worker1: what is not ours" "$(find "$(host_dir worker1)/node" -type f -printf '%f\n')" other
  judge "what the CA says" "$(ca_admin node list --cluster demo -o json | grep -c '"left"')" 2
}

show_sidecar() {
  create_token pod --cluster demo --role worker --uses 2 --generate-names
  install -m 0600 "$CA_DIR/join/pod" "$(host_dir worker1)/join"
  mkdir -p "$STATE/sidecar"
  cp "$STATE/node-agent" "$STATE/sidecar"
  judge "the sidecar's commands" "$(in_host worker1 bash "$ROOT/scripts/deploy/sidecar.sh" "$STATE/sidecar" \
    "$ROOT/deploy/kuberay/raycluster.yaml" "$(host_dir worker1)/join" 2>>"$LOGS/bootstrap-worker1.log" | grep -c '^ok: ')" 6
}

clear_away() {
  local code=$?
  trap - EXIT INT TERM
  end_children
  if ((code != 0)); then
    [ -z "$STEP" ] || warn "failed or interrupted in step: $STEP"
    tail -n 20 "$LOGS"/bootstrap-*.log >&2 || true
  fi
  [ "${KEEP:-no}" = yes ] || { hosts_down && rm -rf "${STATE:?}"/{hosts,bin,names,node-agent,sidecar,release.tar.gz,url.key,url.crt,fd.join}; }
  exit "$code"
}

main "$@"
