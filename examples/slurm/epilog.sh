#!/usr/bin/env bash
# Slurm epilog (slurm.conf: Epilog=/etc/slurm/epilog.sh), as root on each node once a job has ended, however
# it ended: ends what is left of its Ray, leaves the cluster (name and address are free for the next job)
# and removes the agent. A failing epilog drains the node, so a CA that is away leaves the node enrolled: the
# next prolog goes on with it.
set -euo pipefail
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin

CONFIG=${RAYMTLS_SLURM:-/etc/ray-mtls/slurm.env}
# shellcheck disable=SC1090
[ ! -r "$CONFIG" ] || . "$CONFIG"
JOIN=${JOIN:-/etc/ray-mtls/join}
[ -r "$JOIN" ] || exit 0

pkill -KILL -u "$SLURM_JOB_UID" -x raylet || true
pkill -KILL -u "$SLURM_JOB_UID" -x gcs_server || true
# shellcheck disable=SC2086
"${BOOTSTRAP:-/usr/local/sbin/bootstrap-node.sh}" --uninstall --yes --ray-user "$SLURM_JOB_UID:$SLURM_JOB_UID" \
  ${OPTIONS:-} || true
