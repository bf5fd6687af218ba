#!/usr/bin/env bash
# Tunnel mode under a real Ray: a CA, a head, two workers and a stranger in network namespaces, leaves of a minute that are
# renewed each 20 s. `scripts/check tunnel` runs it; full.sh beside it is the long version.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
. "$ROOT/scripts/lib/say.sh"
. "$ROOT/scripts/lib/need.sh"
. "$ROOT/scripts/lib/hosts.sh"
PREFIX=raymtls-tunnel
STATE=$BASE/tunnel
LOGS=$STATE/logs
HOST_NUMBER+=([spare]=11 [spare2]=12)
. "$ROOT/scripts/tunnel/lab.sh"
. "$ROOT/scripts/quickstart/shows.sh"
. "$ROOT/scripts/tunnel/checks.sh"

HOSTS=(ca head worker1 worker2 stranger spare spare2 other)
# How long the load runs before anything is broken: two leaf lives.
ROTATION_SECONDS=${ROTATION_SECONDS:-125}

main() {
  lab_up
  step "CA, hosts, agents; leaves last $LEAF_LIFE s"
  tunnel_cluster_up
  step "Ray in mode tunnel, and the load"
  show_ray
  step "Who is refused, under the load"
  enrol_spares
  show_wrong_leaves
  show_stranger
  show_other_user
  step "A submitted job"
  show_job_submit
  show_expired_leaf
  step "Through $((ROTATION_SECONDS / LEAF_LIFE)) leaf lives"
  show_rotation "$ROTATION_SECONDS"
  step "Handover to a new ray-tunnel on each host"
  show_handover 8
  step "kill -9 of ray-tunnel"
  kill_tunnel worker1
  step "Revocation of worker2"
  revoke_under_load worker2
  conclude
}

main "$@"
