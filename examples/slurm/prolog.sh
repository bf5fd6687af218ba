#!/usr/bin/env bash
# Slurm prolog (slurm.conf: Prolog=/etc/slurm/prolog.sh, PrologFlags=Alloc), as root on each node of a job
# before it begins: makes the node a member for the user of this job. Ray itself is the job's own affair,
# see ray.sbatch. A node without a join file is none of ours.
#
# /etc/ray-mtls/join (root, 0600) is the join file of a token for many uses; /etc/ray-mtls/slurm.env may
# set JOIN, ROLE, BOOTSTRAP (where the script is) and OPTIONS (words for it). slurmd gives a prolog no PATH.
set -euo pipefail
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin

CONFIG=${RAYMTLS_SLURM:-/etc/ray-mtls/slurm.env}
# shellcheck disable=SC1090
[ ! -r "$CONFIG" ] || . "$CONFIG"
JOIN=${JOIN:-/etc/ray-mtls/join}
[ -r "$JOIN" ] || exit 0

# shellcheck disable=SC2086
"${BOOTSTRAP:-/usr/local/sbin/bootstrap-node.sh}" --join "$JOIN" --keep-join-file --role "${ROLE:-worker}" \
  --ray-user "$SLURM_JOB_UID:$(id -g "$SLURM_JOB_UID")" ${OPTIONS:-} --no-ray
