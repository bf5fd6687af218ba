# shellcheck shell=bash
# The quickstart without root: no namespaces, so one host, this machine itself, with one Ray head that
# runs as the caller. Sourced last: takes the place of what hosts.sh does with namespaces.

RAY_HOSTS=(head)
RAY_UID=$(id -u)
RAY_GID=$(id -g)
PRIMARY=""
# Short, for Ray's unix sockets.
RAY_TEMP=/tmp/raymtls-$RAY_UID

one_host_up() {
  need_base
  take_turn
  PRIMARY=$(primary_address) ||
    die "this machine has no address but loopback, which the CA certifies for nobody: run as root, or give it an address"
  note "not root: one host, this machine ($PRIMARY), with one Ray head. What this cannot show:"
  note "- three hosts, a large object moved between them, a node of another cluster: those need namespaces"
  note "- isolation: it needs root, and three hosts to show that Ray works behind it"
  note "- the two-key split: Ray runs as the agent's own user here, so every Ray task can read the identity key"
  trap one_host_exit EXIT
  trap 'exit 130' INT TERM
  clear_up
  # Ours from here on: a folder that somebody else made at this name is not taken.
  mkdir -m 0700 "$RAY_TEMP" || die "cannot make $RAY_TEMP, the folder of Ray's sockets: remove what is there"
  install -d -m 0700 "$STATE"
  install -d "$LOGS" "$STATE/bin" "$STATE/lib" "$(host_dir ca)" "$(host_dir head)/home"

  step "Installing what is missing"
  need_command openssl openssl
  need_ray
  step "Building ca-server, ca-admin and node-agent"
  build
  step "Starting the CA on $PRIMARY, with the cluster demo"
  start_ca
  create_cluster demo
  step "Enrolling this host, starting its agent"
  create_token head --cluster demo --role head --node head --addresses "$PRIMARY"
  enrol head head --role head
  start_agent head
  step "Starting the Ray head"
  start_head "$RAY_TEMP"
  step "1. A job"
  show_job
  step "2. Who is refused"
  judge_knock "GCS answers a member" settings head "$(current_leaf head)" "$(tls_dir head)/current/tls.key"
  judge_knock "GCS to a client without a certificate" refused head
  step "3. Renewal under the running job"
  show_renewal
  step "4. Revocation"
  revoke head
  show_revocation head
  step_end
  conclude
}

one_host_down() { down; }

one_host_exit() {
  local code=$?
  trap - EXIT INT TERM
  end_children
  if ((code != 0)); then
    [ -z "$STEP" ] || warn "failed in step: $STEP"
    warn "logs are in $LOGS and $RAY_TEMP/session_latest/logs"
  fi
  if [ "$KEEP" = yes ]; then
    note "left up. To look: $STATE/bin/node-agent status --socket $(agent_socket head)"
    note "To remove it: scripts/quickstart.sh --down"
  else
    hosts_down
    rm -rf "${STATE:?}"/{hosts,bin,lib}
  fi
  exit "$code"
}

# The address this machine would speak from; a UDP socket sends nothing by being connected.
primary_address() {
  python3 -c '
import socket
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
    probe.connect(("192.0.2.1", 9))
    address = probe.getsockname()[0]
if address.startswith("127."):
    raise SystemExit(1)
print(address)' 2>/dev/null
}

address() { printf '%s\n' "$PRIMARY"; }

exec_in_host() {
  shift
  exec 9>&-
  exec env -i "PATH=$STATE/bin:$VENV/bin:/usr/local/bin:/usr/bin:/bin" LANG=C.UTF-8 "HOME=$(host_dir head)/home" \
    PYTHONUNBUFFERED=1 RAY_USAGE_STATS_ENABLED=0 "$MARK" "$@"
}

as_ray() { in_host "$@"; }

# Every process of ours starts with this mark in its environment. ca-server and node-agent show theirs to
# nobody and are known by the paths they were given; Ray's processes write their titles over theirs and are
# known by their open logs.
MARK=RAYMTLS_QUICKSTART=$STATE

host_pids() {
  local process
  for process in /proc/[0-9]*; do
    if grep -qzxF -- "$MARK" "$process/environ" 2>/dev/null || is_daemon "$process/cmdline" ||
      { is_ray "$process/exe" && [ -n "$(find "$process/fd" -lname "$RAY_TEMP/*" -print -quit 2>/dev/null)" ]; }; then
      printf '%s\n' "${process#/proc/}"
    fi
  done
}

# Not whoever reads a log: Ray's own programs, or the Python that runs its workers.
is_ray() {
  case $(readlink "$1" 2>/dev/null) in "$VENV"/* | */python3*) return 0 ;; *) return 1 ;; esac
}

is_daemon() {
  local words
  words=$({ tr '\0' ' ' <"$1"; } 2>/dev/null) || return 1
  [[ $words == "ca-server serve --dir $STATE/"* || $words == "node-agent run --state-dir $STATE/"* ]]
}

hosts_down() {
  host_pids | xargs -r kill -KILL 2>/dev/null || true
  wait_for 10 "the processes of this quickstart to end" none_left
  rm -rf "$RAY_TEMP"
}

none_left() { [ -z "$(host_pids)" ]; }
