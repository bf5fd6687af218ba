#!/usr/bin/env bash
# Slurm epilog (slurm.conf: Epilog=/etc/slurm/epilog.sh), as root on each node once a job has ended, however
# it ended: ends what is left of its Ray, leaves the cluster (name and address are free for the next job)
# and removes the agent. Only for the job that prolog.sh has made the node for. A failing epilog drains the
# node, so a CA that is away leaves the node enrolled: the same user's next job goes on with it, another's
# first takes it down.
#
# Run as it is by a real Slurm on one machine, and by hand for two users: see prolog.sh. Not run on a site's cluster.
set -euo pipefail
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin

CONFIG=${RAYMTLS_SLURM:-/etc/ray-mtls/slurm.env}
# shellcheck disable=SC1090
[ ! -r "$CONFIG" ] || . "$CONFIG"
STATE=${STATE:-/var/lib/ray-mtls-slurm}
[ -e "$STATE/owner" ] || exit 0
exec 9>>"$STATE/lock"
flock -w 120 9
read -r job join uid boot 2>/dev/null <"$STATE/owner" || exit 0
[ "$job" = "$SLURM_JOB_ID" ] || exit 0

pkill -KILL -u "$SLURM_JOB_UID" -x raylet || true
pkill -KILL -u "$SLURM_JOB_UID" -x gcs_server || true
# shellcheck disable=SC2086
if "${BOOTSTRAP:-/usr/local/sbin/bootstrap-node.sh}" --uninstall --yes --ray-user "$uid:$uid" ${OPTIONS:-} 9>&-; then
  rm -f "$STATE/owner"
else
  printf 'ended %s %s %s\n' "$join" "$uid" "$boot" >"$STATE/owner.new"
  mv "$STATE/owner.new" "$STATE/owner"
fi
