#!/usr/bin/env bash
# Slurm prolog (slurm.conf: Prolog=/etc/slurm/prolog.sh, PrologFlags=Alloc), as root on each node of a job
# before it begins: makes the node a member for the user of this job. Ray itself is the job's own affair,
# see ray.sbatch. A user without a join file gets nothing, and no harm.
#
# A cluster is one circle of trust: a job keeps its leaf and its token, which are good until they end, also
# after its node has left. So no cluster is for two users: /etc/ray-mtls/join.d/USER (root, 0600) is the join
# file of a token for many uses in a cluster of that user alone. For jobs that must not reach each other
# make a cluster for each job (`ca-admin cluster create job-4711 --max-life 26h`, its join file as
# join.d/job-4711): everything in it ends with it.
#
# Run as it is by a real Slurm: slurmctld and two slurmd in network namespaces of one machine, without cgroups
# (`scripts/check slurm`), and by hand for two users (`scripts/check bootstrap`). Not run on a site's cluster.
#
# One job at a time on a node has Ray: a second one beside it gets nothing (ray.sbatch is --exclusive).
# /etc/ray-mtls/slurm.env may set JOINS, STATE, ROLE, BOOTSTRAP (where the script is), OPTIONS (words for it)
# and GROUP, a group of the job's user alone: its members read the key. slurmd gives a prolog no PATH.
set -euo pipefail
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin

CONFIG=${RAYMTLS_SLURM:-/etc/ray-mtls/slurm.env}
# shellcheck disable=SC1090
[ ! -r "$CONFIG" ] || . "$CONFIG"
USER_NAME=$(id -un "$SLURM_JOB_UID")
JOIN=${JOINS:-/etc/ray-mtls/join.d}/job-$SLURM_JOB_ID
[ -r "$JOIN" ] || JOIN=${JOINS:-/etc/ray-mtls/join.d}/$USER_NAME
[ -r "$JOIN" ] || exit 0
GROUP=${GROUP:-$(id -gn "$SLURM_JOB_UID")}
STATE=${STATE:-/var/lib/ray-mtls-slurm}
BOOTSTRAP=${BOOTSTRAP:-/usr/local/sbin/bootstrap-node.sh}
BOOT=$(cat /proc/sys/kernel/random/boot_id)

# A private group bears its user's name and has no other member.
IFS=: read -r _ _ GID MEMBERS < <(getent group "$GROUP")
if [ "$GROUP" != "$USER_NAME" ] && [ "$GROUP" != "$USER_NAME-ray" ] || [ "${MEMBERS:-$USER_NAME}" != "$USER_NAME" ]; then
  echo "group $GROUP is not one of $USER_NAME alone, and its members would read the key: make a group $USER_NAME-ray and set GROUP" >&2
  exit 1
fi

# owner: JOB JOIN-FILE UID BOOT, for as long as the node is a member.
install -d -m 0700 "$STATE"
exec 9>>"$STATE/lock"
flock -w 120 9
if read -r job join uid boot 2>/dev/null <"$STATE/owner" && [ "$job" != "$SLURM_JOB_ID" ]; then
  if [ "$job" != ended ] && [ "$boot" = "$BOOT" ]; then
    echo "job $job has Ray on this node: job $SLURM_JOB_ID gets no membership here"
    exit 0
  fi
  # Left behind, by a CA that was away or a node that went down. Another's identity is never used.
  if [ "$join $uid" != "$JOIN $SLURM_JOB_UID" ]; then
    # shellcheck disable=SC2086
    "$BOOTSTRAP" --uninstall --yes --ray-user "$uid:$uid" ${OPTIONS:-} 9>&-
  fi
fi
printf '%s %s %s %s\n' "$SLURM_JOB_ID" "$JOIN" "$SLURM_JOB_UID" "$BOOT" >"$STATE/owner.new"
mv "$STATE/owner.new" "$STATE/owner"
# shellcheck disable=SC2086
"$BOOTSTRAP" --join "$JOIN" --keep-join-file --role "${ROLE:-worker}" \
  --ray-user "$SLURM_JOB_UID:$GID" ${OPTIONS:-} --no-ray 9>&-
