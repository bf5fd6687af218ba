#!/usr/bin/env bash
# Everything on one machine: a CA, a real Ray cluster of a head and two workers over mutual TLS, a job,
# isolation, refusals, a renewal, a revocation. `quickstart.sh --help` says how to use it.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$ROOT/scripts/lib/say.sh"
. "$ROOT/scripts/lib/need.sh"
. "$ROOT/scripts/lib/hosts.sh"
. "$ROOT/scripts/quickstart/control.sh"
. "$ROOT/scripts/quickstart/ray.sh"
. "$ROOT/scripts/quickstart/shows.sh"
. "$ROOT/scripts/quickstart/isolation.sh"

KEEP=no
BUILD=yes
MORE=no
PURGE=no

usage() {
  cat <<TEXT
usage: scripts/quickstart.sh [--keep] [--more] [--no-build]
       scripts/quickstart.sh --down [--purge]

Starts a CA, three Ray hosts with an agent each (network namespaces on this machine), a Ray cluster over
mutual TLS and a job; shows whom TLS and whom the network refuses, a renewal under the running job and a
revocation; ends with a table of what it saw. As root. Without root it runs one host and says what that cannot show.

  --keep       leave everything up and say how to look at it
  --down       end the hosts and remove their state; what was downloaded and the logs of tests stay
  --purge      with --down: remove $BASE too, virtual environments with it; it lists the Debian packages it leaves
  --more       also the checks of the test suite, such as Ray Client from outside the cluster
  --no-build   take the binaries as they are
  --help       this text

environment
  RAY_VERSION       version of Ray (default 2.60.0)
  RAYMTLS_BIN_DIR   folder of ca-server, ca-admin and node-agent (default target/release)

examples
  scripts/quickstart.sh
  scripts/quickstart.sh --keep && scripts/quickstart/on head ray status && scripts/quickstart.sh --down
  scripts/quickstart.sh --down --purge

Exit code 0 only if everything held. Logs: $LOGS
TEXT
}

main() {
  local act=up
  while [ $# -gt 0 ]; do
    case $1 in
      --keep) KEEP=yes ;;
      --no-build) BUILD=no ;;
      --more) MORE=yes ;;
      --down) act=down ;;
      --purge) PURGE=yes ;;
      -h | --help) usage; exit 0 ;;
      *) usage >&2; exit 64 ;;
    esac
    shift
  done
  [ "$PURGE" = no ] || [ "$act" = down ] || { usage >&2; exit 64; }
  if [ "$(id -u)" != 0 ]; then
    . "$ROOT/scripts/quickstart/one-host.sh"
    "one_host_$act"
    return
  fi
  need_base
  take_turn
  "$act"
}

# One quickstart at a time: the hosts have fixed names.
take_turn() {
  exec 9>"$BASE/quickstart.lock"
  flock -n 9 || die "another quickstart is running; wait for it, or end it and run: scripts/quickstart.sh --down"
}

up() {
  trap on_exit EXIT
  trap 'exit 130' INT TERM
  clear_up
  install -d -m 0755 "$LOGS" "$STATE/bin" "$STATE/lib"

  step "Installing what is missing"
  install_needs
  step "Building ca-server, ca-admin and node-agent"
  build
  step "Making hosts: $(printf '%s ' "${HOSTS[@]}")"
  make_hosts
  step "Starting the CA on $(address ca), with the clusters demo and other"
  start_ca
  create_cluster demo
  # The head opens the Ray Client port: part of the port plan only if the cluster says so.
  run 30 "$LOGS/ca-admin.log" "cluster set demo" ca_admin cluster set demo ray-client=on \
    "admin-ranges=$ADMIN_RANGE" "scraper-ranges=$SCRAPER_RANGE" --yes
  create_cluster other
  step "Enrolling the hosts, starting their agents"
  enrol_hosts
  step "Starting the Ray head as uid $RAY_UID on $(address head)"
  DASHBOARD_HOST=$(address head)
  start_head
  step "Starting two Ray workers"
  start_workers
  step "1. A job with a task on every host, an actor and a large object"
  show_job
  step "2. Whom TLS and Ray's token refuse, without isolation"
  show_refusals
  step "3. Isolation under the running job: audit, then enforce"
  show_isolation
  step "4. Whom the network refuses"
  show_network_refusals
  step "5. Renewal on all hosts under the running job"
  show_renewal
  if [ "$MORE" = yes ]; then
    step "More: what the tests ask beyond that"
    show_more
  fi
  step "6. Revocation of worker2"
  show_cut worker2
  show_revocation worker2
  step_end
  conclude
}

BINARIES=(ca-server ca-admin node-agent)
HOSTS=(ca head worker1 worker2 admin scraper stranger other other2 driver)

install_needs() {
  need_command ip iproute2
  need_command openssl openssl
  need_command nft nftables
  need_ray
}

build() {
  local from=${RAYMTLS_BIN_DIR:-$ROOT/target/release}
  if [ "$BUILD" = yes ] && [ -z "${RAYMTLS_BIN_DIR:-}" ]; then
    need_cargo
    run 3000 "$LOGS/build.log" "the release build" \
      cargo build --manifest-path "$ROOT/Cargo.toml" --locked --release --bins -p ca-server -p node-agent
  fi
  local name
  for name in "${BINARIES[@]}"; do
    [ -x "$from/$name" ] || die "there is no $from/$name: run without --no-build, or build it first"
  done
  # Ray's uid must reach them, wherever the repository lies.
  install -m 0755 "${BINARIES[@]/#/$from/}" "$STATE/bin"
  install -m 0644 "$ROOT"/scripts/quickstart/*.py "$ROOT/scripts/isolation/test/host.py" "$STATE/lib"
}

make_hosts() {
  local name
  { printf '127.0.0.1 localhost\n%s %s\n' "$(address head)" "$HEAD_NAME"; } >"$STATE/names"
  bridge_up
  for name in "${HOSTS[@]}"; do
    host_up "$name"
    note "$(address "$name")  $name"
  done
}

# One token of one use for the head, one of two uses for both workers: the CA makes their names.
enrol_hosts() {
  create_token head --cluster demo --role head --node head --dns "$HEAD_NAME"
  create_token workers --cluster demo --role worker --uses 2
  create_token other --cluster other --role head
  enrol head head --role head --dns "$HEAD_NAME"
  enrol worker1 workers
  enrol worker2 workers
  enrol other other --role head
  local name
  for name in "${RAY_HOSTS[@]}" other; do
    start_agent "$name"
    note "$name is $(node_name "$name"), leaf $(serial "$(current_leaf "$name")")"
  done
}

conclude() {
  table
  printf '\n%d s in all; ' "$SECONDS"
  if ((CHECKS_BROKEN > 0)); then
    printf '%d of %d checks FAILED. Logs: %s\n' "$CHECKS_BROKEN" "${#CHECKS[@]}" "$LOGS"
    exit 1
  fi
  printf 'all %d checks held.\n' "${#CHECKS[@]}"
}

on_exit() {
  local code=$?
  trap - EXIT INT TERM
  end_children
  tell_failure "$code" "; look there first, then run scripts/quickstart.sh --keep to look around in the hosts"
  if [ "$KEEP" = yes ]; then
    say_how_to_look
  else
    hosts_down
    rm -rf "${STATE:?}"/{hosts,bin,lib,names}
  fi
  exit "$code"
}

say_how_to_look() {
  cat <<TEXT

Everything is left up. To look at it:
  scripts/quickstart/on head node-agent status --socket $(agent_socket head)
  scripts/quickstart/on head ray status
  scripts/quickstart/on head ray list nodes
  $STATE/bin/ca-admin --socket $ADMIN_SOCKET node list --cluster demo
  $STATE/bin/ca-admin --socket $ADMIN_SOCKET cert list --cluster demo
To remove it:
  scripts/quickstart.sh --down
TEXT
}

# clear_up: hosts and state of an earlier run.
clear_up() {
  hosts_down
  rm -rf "$STATE"
}

down() {
  clear_up
  if [ "$PURGE" = no ]; then
    note "removed the hosts and $STATE"
    note "left in place: $BASE, with Ray's virtual environment; --down --purge removes it"
    return
  fi
  local packages=""
  [ ! -s "$APT_LIST" ] || packages=$(sort -u "$APT_LIST" | paste -sd ' ')
  rm -rf "${BASE:?}"
  note "removed the hosts and $BASE, Ray's virtual environment with it"
  if [ -n "$packages" ]; then
    note "left in place, installed by these scripts: $packages"
    note "to remove them as well: apt-get remove $packages"
  else
    note "these scripts installed no Debian package"
  fi
  note "the build stays in $ROOT/target: cargo clean removes it"
}

main "$@"
