#!/usr/bin/env bash
# The systemd units: verified, their exposure bounded, and run for real by a systemd that is process 1 of
# namespaces of its own (boot.sh). The node is made by bootstrap-node.sh, as on a real host. `scripts/check
# units` runs it.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
. "$ROOT/scripts/lib/say.sh"
. "$ROOT/scripts/lib/need.sh"

BIN=$(cd "${RAYMTLS_BIN_DIR:-$ROOT/target/debug}" && pwd)
DIR=/var/tmp/ray-mtls-units
ADDRESS=10.77.9.1
# Ten times what systemd-analyze prints, 0 (closed) to 100. The agent's firewall, and the processes of Ray's user
# that it may see and stop, are 0.7 of it.
# SETUID and SETGID, with which node-agent starts ray-tunnel as its own user, are 0.3 of it.
EXPOSURE_MAX=33
PID=""

main() {
  [ "$(id -u)" = 0 ] || die "needs root"
  need_base
  need_command systemd-analyze systemd
  need_command dbus-daemon dbus
  need_command nft nftables
  need_command ss iproute2
  exec 9>"$BASE/units.lock"
  flock -n 9 || die "another run of this test is there"
  trap clear_away EXIT
  trap 'exit 130' INT TERM
  step "Reading the units"
  judge_units
  if can_boot; then
    step "Booting systemd in namespaces"
    boot
    step "The CA under its unit"
    try_ca
    step "A node made by bootstrap-node.sh under systemd"
    try_node
  else
    note "NOT RUN: this machine lets nobody make a control group or a namespace, so no unit was started"
  fi
  step_end
  table
  ((CHECKS_BROKEN == 0)) || exit 1
}

judge_units() {
  local unit
  install -d "$DIR/read"
  for unit in ca-server node-agent; do
    sed "s:/usr/local/bin:$BIN:" "$ROOT/deploy/systemd/$unit.service" >"$DIR/read/$unit.service"
    judge "systemd-analyze verify $unit" "$(systemd-analyze verify --man=no "$DIR/read/$unit.service" 2>&1 | grep -F "$unit" || true)" ""
    if systemd-analyze security --no-pager --offline=yes --threshold=$EXPOSURE_MAX "$DIR/read/$unit.service" >"$DIR/read/$unit.txt"; then
      held "exposure of $unit" "$(sed -n 's/.*level for [^:]*: \([0-9.]*\).*/\1/p' "$DIR/read/$unit.txt"), at most ${EXPOSURE_MAX%?}.${EXPOSURE_MAX#?}"
    else
      broke "exposure of $unit" "$(tail -n 1 "$DIR/read/$unit.txt")"
    fi
  done
  # Ray's own: what it may do is for its owner to say.
  for unit in ray-head ray-worker; do
    sed "s:/usr/local/bin:$BIN:g" "$ROOT/deploy/systemd/$unit.service" >"$DIR/read/$unit.service"
    judge "systemd-analyze verify $unit" "$(systemd-analyze verify --man=no "$DIR/read/$unit.service" 2>&1 | grep -F "$unit" || true)" ""
  done
}

can_boot() {
  local cgroup=/sys/fs/cgroup
  [ ! -d "$cgroup/unified" ] || cgroup=$cgroup/unified
  mkdir -p "$cgroup/raymtls-units" 2>/dev/null && unshare --mount --pid --fork --cgroup --net true 2>/dev/null
}

boot() {
  local name
  install -d "$DIR/bin"
  install -m 0755 "$ROOT/scripts/bootstrap-node.sh" "$DIR/bin"
  for name in ca-server ca-admin node-agent; do strip -o "$DIR/bin/$name" "$BIN/$name"; done
  setsid "$ROOT/scripts/units/boot.sh" "$DIR" >"$DIR/boot.log" 2>&1 </dev/null 9>&- &
  BOOT=$!
  wait_for 30 "systemd to start" is_up
  inside bash -c "ip link set lo up; ip link add out0 type veth peer name out1; ip link set out0 up; ip link set out1 up
    ip addr add $ADDRESS/24 dev out0"
  held "systemd is process 1" "$(inside cat /proc/1/comm) $(inside systemctl is-system-running --wait || true)"
}

is_up() {
  PID=$(pgrep -f '^/lib/systemd/systemd --system --unit=raymtls-units.target' | head -n 1)
  [ -n "$PID" ] && inside systemctl is-active --quiet basic.target 2>/dev/null
}

inside() {
  (
    exec 9>&-
    exec nsenter --target "$PID" --mount --pid --net --uts --ipc --cgroup -- env -i \
      PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 "$@"
  )
}

try_ca() {
  inside bash -ec "
    install -m 0755 $DIR/bin/ca-server $DIR/bin/ca-admin /usr/local/bin
    rm -f /usr/local/bin/node-agent
    useradd --system --create-home ray
    ca-server init --dir /var/lib/ray-mtls/ca --trust-domain units.example --kek-file /etc/ray-mtls/kek
    printf '%s\n' 'kek_file = \"/etc/ray-mtls/kek\"' 'enrollment_endpoints = [\"$ADDRESS:7443\"]' \
      'node_endpoints = [\"$ADDRESS:7444\"]' >/etc/ray-mtls/ca-server.toml
    cp $ROOT/deploy/systemd/ca-server.service /etc/systemd/system/
    systemctl daemon-reload
    systemctl enable --quiet --now ca-server" >>"$DIR/inside.log" 2>&1 || true
  judge "ca-server said that it is ready" "$(state_of ca-server)" "active running notify"
  judge "an operator's call" "$(code_of ca-admin cluster create c1 --max-job 2d)" 0
  judge "the socket's folder and socket" "$(inside stat -c '%a %U' /run/ray-mtls /run/ray-mtls/ca-admin.sock | paste -sd ' ')" \
    "755 root 600 root"
  survives ca-server
  judge "what was made is there after it" "$(inside ca-admin cluster list -o json | grep -c '"c1"')" 1
  inside systemctl stop ca-server
  judge "stopped by its own will" "$(inside systemctl show -p Result --value ca-server)" success
  inside systemctl start ca-server
}

try_node() {
  local options=(--name n1 --ray-user ray --no-ray) code
  code_of ca-admin token create --cluster c1 --role worker --node n1 --out /root/n1.join >/dev/null
  code=$(code_of bootstrap-node.sh --from "$DIR/bin/node-agent" --join /root/n1.join "${options[@]}")
  judge "bootstrap-node.sh under systemd" "$code" 0
  judge "node-agent said that it is ready" "$(state_of node-agent)" "active running notify"
  judge "enabled for the next boot" "$(inside systemctl is-enabled node-agent)" enabled
  judge "its unit is the one of deploy/" "$(unit_difference)" ""
  judge "Ray's user reads its key" "$(code_of runuser -u ray -- cat /var/lib/ray-mtls/tls/current/tls.key)" 0
  judge "Ray's user gets an environment" "$(code_of runuser -u ray -- node-agent exec -- printenv RAY_TLS_SERVER_KEY)" 0
  judge "a key folder made under the unit, for Ray's group" \
    "$(inside stat -L -c '%n %A %G' /var/lib/ray-mtls/tls/k2 2>/dev/null || true)" "/var/lib/ray-mtls/tls/k2 drwxr-x--- ray"
  judge "Ray's user does not read the identity" "$(code_of runuser -u ray -- cat /var/lib/ray-mtls/agent/identity.pem)" 1
  try_limits
  try_ray_flags
  survives node-agent
  judge "a renewal under the unit's limits" "$(code_of node-agent renew)" 0
  local before
  before=$(main_pid node-agent)
  judge "again" "$(code_of bootstrap-node.sh --from "$DIR/bin/node-agent" "${options[@]}")" 0
  judge "and the agent was left alone" "$(main_pid node-agent)" "$before"
  try_revoked
  judge "denials of a system call or a file" "$(inside journalctl --no-pager -o cat | grep -v org.freedesktop.DBus | grep -c -E 'SIGSYS|status=31|Operation not permitted|cannot give' || true)" 0
  judge "uninstall" "$(code_of bootstrap-node.sh --uninstall --yes)" 0
  judge "the unit is gone" "$(inside systemctl show -p LoadState --value node-agent)" not-found
}

# What the agent runs and does for isolation and on a revoked node, under the limits of its unit.
try_limits() {
  local victim
  judge "nft loads a table under the unit's limits" "$(limited 'printf "table inet raymtls_try {}\n" | nft -f - && nft list tables')" "table inet raymtls_try"
  try_isolation
  judge "ss closes sockets under them" "$(limited 'ss -HtKn dst 192.0.2.1 && echo closed')" closed
  inside bash -c 'setsid runuser -u ray -- sleep 300 >/dev/null 2>&1 </dev/null &'
  wait_for 5 "a process of Ray's user" inside pgrep -u ray -x sleep >/dev/null || true
  victim=$(inside pgrep -u ray -x sleep | head -n 1)
  judge "Ray's program is seen under them" "$(limited "readlink /proc/$victim/exe | grep -o 'sleep$'; readlink /proc/$victim/ns/net | grep -c net")" "sleep 1"
  judge "and stopped" "$(limited "kill -TERM $victim && echo stopped")" stopped
}

# What a person sees and removes by hand; the table of another cluster stays.
try_isolation() {
  inside nft -f "$ROOT/node-agent/src/isolation/golden/head-enforce.nft" >>"$DIR/inside.log" 2>&1 || true
  judge "isolation show" "$(inside node-agent isolation show | grep -E '^(cluster|mode)' | tr -s ' ' | sort | paste -sd ';')" \
    "cluster c1;cluster try;mode enforce: refuses;mode unknown"
  judge "isolation clear asks, where it can" "$(code_of node-agent isolation clear)" 64
  judge "isolation clear" "$(code_of node-agent isolation clear --yes)" 0
  judge "once more" "$(code_of node-agent isolation clear --yes)" 0
  judge "and another's stayed" "$(inside nft list tables)" "table inet raymtls_try"
  inside nft delete table inet raymtls_try >>"$DIR/inside.log" 2>&1 || true
  judge "isolation show without a right says which" "$(code_of runuser -u ray -- node-agent isolation show) $(tail -n 1 "$DIR/inside.log" | grep -c NET_ADMIN)" "1 1"
}

# limited SCRIPT: in a service with the limits of node-agent's unit.
limited() {
  local line properties=()
  while IFS= read -r line; do properties+=(-p "$line"); done < <(
    grep -E '^(CapabilityBoundingSet|AmbientCapabilities|NoNewPrivileges|Protect|Private|Restrict|Lock|MemoryDeny|SystemCall|UMask|LimitNOFILE)[A-Za-z]*=' \
      "$ROOT/deploy/systemd/node-agent.service" | grep -v '^Restart')
  inside systemd-run --quiet --wait --pipe "${properties[@]}" bash -c "$1" 2>>"$DIR/inside.log" </dev/null | paste -sd ' '
}

# A stand-in of a raylet, started through the agent as Ray's user, and one of another user: a copy of bash each, which waits
# and is told a port of the plan, as a raylet is.
try_revoked() {
  # shellcheck disable=SC2016
  inside bash -c 'useradd --system other; install -m 0755 /bin/bash /opt/ray/raylet
    wait="mkfifo /tmp/wait.\$\$; read -t 300 _ <>/tmp/wait.\$\$"
    setsid runuser -u ray -- node-agent exec -- /opt/ray/raylet -c "$wait" --node_manager_port=6701 >/dev/null 2>&1 </dev/null &
    RAY_TLS_SERVER_CERT=/var/lib/ray-mtls/tls/k1/tls.crt setsid runuser -u other -- /opt/ray/raylet -c "$wait" --node_manager_port=6701 >/dev/null 2>&1 </dev/null &'
  wait_for 5 "two stand-ins of a raylet" two_raylets || true
  judge "a raylet of Ray's user, and one of another" "$(raylets)" "other ray"
  judge "the node is revoked" "$(code_of ca-admin node revoke --cluster c1 n1 --reason theft --yes)" 0
  wait_for 20 "Ray to be stopped" ray_is_stopped || true
  judge "the agent stopped Ray, under its unit's limits" "$(raylets)" other
  wait_for 5 "the status to say so" says_stopped || true
  judge "and says so" "$(says_stopped && echo said)" said
  judge "exec starts nothing, with the reason" \
    "$(code_of runuser -u ray -- node-agent exec -- touch /tmp/started) $(tail -n 1 "$DIR/inside.log" | grep -c 'nothing was started.*REVOKED.*theft') $(code_of ls /tmp/started)" "2 1 2"
}

two_raylets() { [ "$(raylets)" = "other ray" ]; }
says_stopped() { inside node-agent status | grep -q '^Ray  *1 stopped (raylet [0-9]*) .*this node is revoked$'; }
ray_is_stopped() { [ "$(raylets)" = other ]; }
raylets() { inside ps -o user= -C raylet | sort | paste -sd ' ' | tr -s ' '; }

# Stand-ins of ray and its python write down what they are started with: the flags are those of the plan.
try_ray_flags() {
  # shellcheck disable=SC2016
  inside bash -c 'install -d -m 0777 /opt/ray && for p in ray python3; do printf "%s\n" "#!/bin/sh" \
    "echo \"\$@\" >/opt/ray/$p.started; echo a task ran here" >/opt/ray/$p && chmod 0755 /opt/ray/$p; done'
  judge "bootstrap-node.sh with @ray-flags" \
    "$(code_of bootstrap-node.sh --from "$DIR/bin/node-agent" --name n1 --ray-user ray -- /opt/ray/ray start --address=head:6379 @ray-flags)" 0
  judge "Ray was told the plan" "$(inside cat /opt/ray/ray.started)" \
    "start --address=head:6379 --node-ip-address=$ADDRESS --node-manager-port=6701 --object-manager-port=6702 --runtime-env-agent-port=6703 --dashboard-agent-grpc-port=6704 --dashboard-agent-listen-port=6705 --metrics-export-port=6706 --min-worker-port=10002 --max-worker-port=10101"
  judge "a worker is no head" "$(code_of node-agent ray-flags --head)" 1
  judge "the flags are known without the agent" "$(inside systemctl stop node-agent; inside runuser -u ray -- node-agent status 2>/dev/null | grep -c 'DAEMON.*does not answer'; inside node-agent ray-flags | wc -w; inside systemctl start node-agent)" "1
9"
}

state_of() {
  inside systemctl show -p ActiveState,SubState,Type "$1" | sort | sed 's/^[^=]*=//' | paste -sd ' '
}
main_pid() { inside systemctl show -p MainPID --value "$1"; }

# survives UNIT: killed, it is back by itself, another process.
survives() {
  local before
  before=$(main_pid "$1")
  inside kill -KILL "$before"
  wait_for 20 "$1 to be back" is_another "$1" "$before" || true
  judge "$1 killed is back" "$(is_another "$1" "$before" && state_of "$1")" "active running notify"
}

is_another() { [ "$(main_pid "$1")" != "$2" ] && [ "$(state_of "$1")" = "active running notify" ]; }

code_of() {
  local code=0
  inside "${@/#bootstrap-node.sh/$DIR/bin/bootstrap-node.sh}" >>"$DIR/inside.log" 2>&1 </dev/null || code=$?
  printf '%s\n' "$code"
}

# What the unit that bootstrap-node.sh writes says otherwise, but for the paths it was given; nothing where they
# agree. A unit that cannot be read is a difference.
unit_difference() {
  local shipped written
  shipped=$(plain <"$ROOT/deploy/systemd/node-agent.service") || { echo "no unit in deploy/"; return; }
  written=$(inside cat /etc/systemd/system/node-agent.service | plain) || { echo "no unit was written"; return; }
  diff <(printf '%s\n' "$shipped") <(printf '%s\n' "$written") || true
}

plain() { grep -v -E '^(#|$|ExecStart=|ReadWritePaths=)'; }

clear_away() {
  local code=$?
  trap - EXIT INT TERM
  if ((code != 0)); then
    [ -z "$STEP" ] || warn "failed or interrupted in step: $STEP"
    tail -n 20 "$DIR/inside.log" "$DIR/boot.log" 2>/dev/null >&2 || true
    [ -z "$PID" ] || inside journalctl --no-pager -o cat -n 30 >&2 || true
  fi
  [ -z "${BOOT:-}" ] || { [ -z "$PID" ] || kill -KILL "$PID" 2>/dev/null || true; wait "$BOOT" 2>/dev/null || true; }
  rm -rf "${DIR:?}"
  sleep 0.5
  rmdir /sys/fs/cgroup{/unified,}/raymtls-units 2>/dev/null || true
  exit "$code"
}

main "$@"
