#!/usr/bin/env bash
# The Slurm example for real: slurmctld on one host, slurmd on two, each a network namespace; prolog, sbatch
# script and epilog of examples/slurm as they are. No cgroups here: proctrack/linuxproc and task/none.
# `scripts/check slurm` runs it.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
. "$ROOT/scripts/lib/say.sh"
. "$ROOT/scripts/lib/need.sh"
. "$ROOT/scripts/lib/hosts.sh"
# Hosts of its own, as in the test of bootstrap-node.sh.
PREFIX=raymtls-slurm
STATE=$BASE/slurm
LOGS=$STATE/logs
. "$ROOT/scripts/quickstart/control.sh"

BIN=$(cd "${RAYMTLS_BIN_DIR:-$ROOT/target/debug}" && pwd)
NODES=(head worker1)
# A user every Debian has, without privileges.
JOB_USER=games
JOB_MAX=240

main() {
  [ "$(id -u)" = 0 ] || die "needs root"
  need_base
  exec 9>"$BASE/slurm.lock"
  flock -n 9 || die "another run of this test is there"
  trap clear_away EXIT
  trap 'exit 130' INT TERM
  hosts_down
  rm -rf "$STATE"
  install -d -m 0755 "$LOGS" "$STATE/bin" "$STATE/slurm/state"
  install -m 0755 "$BIN/ca-server" "$BIN/ca-admin" "$ROOT/scripts/bootstrap-node.sh" "$STATE/bin"
  strip -o "$STATE/node-agent" "$BIN/node-agent"
  need_command ip iproute2
  need_command slurmctld slurmctld slurmd slurm-client munge
  need_ray

  step "A CA, a Slurm controller and two nodes"
  make_hosts
  start_slurm
  step "A job of two nodes: prolog, Ray, a driver, epilog"
  run_job
  step_end
  table
  ((CHECKS_BROKEN == 0)) || exit 1
}

make_hosts() {
  local name
  printf '127.0.0.1 localhost\n' >"$STATE/names"
  for name in ca "${NODES[@]}"; do printf '%s %s\n' "$(address "$name")" "$name" >>"$STATE/names"; done
  bridge_up
  for name in ca "${NODES[@]}"; do host_up "$name"; done
  start_ca
  create_cluster demo
  create_token slurm --cluster demo --role worker --uses 4 --generate-names
  # The same paths on each host, in its own /tmp.
  for name in "${NODES[@]}"; do
    install -d -m 0700 "$(host_dir "$name")/tmp/joins"
    install -m 0600 "$CA_DIR/join/slurm" "$(host_dir "$name")/tmp/joins/$JOB_USER"
  done
}

start_slurm() {
  local name
  head -c 1024 /dev/urandom >"$STATE/munge.key"
  chmod 0400 "$STATE/munge.key"
  slurm_conf >"$STATE/slurm/slurm.conf"
  printf '%s\n' "JOINS=/tmp/joins" "STATE=/tmp/slurm-owner" "BOOTSTRAP=$STATE/bin/bootstrap-node.sh" \
    "OPTIONS='--from $STATE/node-agent ${PLACES[*]}'" >"$STATE/slurm/slurm.env"
  for name in prolog epilog; do
    printf '#!/bin/bash\nexport RAYMTLS_SLURM=%s\nexec %s >>/tmp/%s.log 2>&1\n' "$STATE/slurm/slurm.env" \
      "$ROOT/examples/slurm/$name.sh" "$name" >"$STATE/slurm/$name"
    chmod 0755 "$STATE/slurm/$name"
  done
  for name in ca "${NODES[@]}"; do
    in_host "$name" install -d -m 0755 /tmp/munge
    daemon "$name" "$LOGS/munged-$name.log" munged --foreground --force --key-file "$STATE/munge.key" \
      --socket /tmp/munge/munge.sock --pid-file /tmp/munge/pid --seed-file /tmp/munge/seed --log-file /tmp/munge/log
  done
  for name in ca "${NODES[@]}"; do wait_for 20 "munged on $name" in_host "$name" test -S /tmp/munge/munge.sock; done
  daemon ca "$LOGS/slurmctld.log" slurmctld -D -f "$STATE/slurm/slurm.conf"
  for name in "${NODES[@]}"; do
    daemon "$name" "$LOGS/slurmd-$name.log" env "SLURM_CONF=$STATE/slurm/slurm.conf" \
      slurmd -D -N "$name" -f "$STATE/slurm/slurm.conf"
  done
  wait_for 30 "both nodes to be idle" nodes_are idle
  held "Slurm" "$(slurm sinfo --version): $(slurm sinfo -h -o '%D nodes %T')"
}

PLACES=(--prefix /tmp/node/usr --state-dir /tmp/node/lib/agent --tls-dir /tmp/node/lib/tls
  --socket /tmp/node/run/agent.sock --log /tmp/node/log/agent.log)

slurm_conf() {
  cat <<CONF
ClusterName=raymtls
SlurmctldHost=ca
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=/tmp/munge/munge.sock
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
StateSaveLocation=$STATE/slurm/state
SlurmdSpoolDir=/tmp/slurmd
SlurmctldPidFile=/tmp/slurmctld.pid
SlurmdPidFile=/tmp/slurmd.pid
SlurmdParameters=config_overrides
SelectType=select/cons_tres
ReturnToService=2
KillWait=20
Prolog=$STATE/slurm/prolog
Epilog=$STATE/slurm/epilog
PrologFlags=Alloc
PrologEpilogTimeout=90
NodeName=head NodeAddr=$(address head) CPUs=2 RealMemory=1000
NodeName=worker1 NodeAddr=$(address worker1) CPUs=2 RealMemory=1000
PartitionName=all Nodes=head,worker1 Default=YES State=UP
CONF
}

slurm() { in_host head env "SLURM_CONF=$STATE/slurm/slurm.conf" "$@"; }

nodes_are() { [ "$(slurm sinfo -h -N -o %T 2>/dev/null | sort | uniq -c | xargs)" = "2 $1" ]; }

run_job() {
  local id driver
  driver=$STATE/driver.py
  cat >"$driver" <<'PY'
import os
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

ray.init(log_to_driver=False, logging_level="ERROR")

@ray.remote(num_cpus=0)
def where():
    return os.uname().nodename, os.getuid()

nodes = [n["NodeID"] for n in ray.nodes() if n["Alive"]]
tasks = [where.options(scheduling_strategy=NodeAffinitySchedulingStrategy(n, soft=False)).remote() for n in nodes]
print("tasks ran on", sorted(ray.get(tasks, timeout=60)), flush=True)
PY
  chmod 0644 "$driver"
  id=$(slurm setpriv --reuid "$JOB_USER" --regid "$JOB_USER" --init-groups env HOME=/tmp \
    "BOOTSTRAP=$STATE/bin/bootstrap-node.sh" AGENT=/tmp/node/usr/bin/node-agent SOCKET=/tmp/node/run/agent.sock \
    "BOOTSTRAP_OPTIONS=--prefix /tmp/node/usr --tls-dir /tmp/node/lib/tls" \
    "RAY_OPTIONS=--num-cpus=1 --object-store-memory=200000000" RAY_USAGE_STATS_ENABLED=0 \
    sbatch --parsable --chdir=/tmp --output=/tmp/job.log "$ROOT/examples/slurm/ray.sbatch" python "$driver")
  note "job $id"
  wait_for "$JOB_MAX" "the job to end" job_ended "$id" || true
  cp "$(host_dir head)/tmp/job.log" "$LOGS/job.log" 2>/dev/null || true
  judge "the job ended" "$(slurm scontrol show job "$id" | grep -o 'JobState=[A-Z]* ' | xargs) $(slurm scontrol show job "$id" |
    grep -o ' ExitCode=[0-9:]*' | xargs)" "JobState=COMPLETED ExitCode=0:0"
  judge "a task on each node, as the job's user" "$(grep -o 'tasks ran on .*' "$LOGS/job.log")" \
    "tasks ran on [('head', $(id -u $JOB_USER)), ('worker1', $(id -u $JOB_USER))]"
  judge "nodes proved by bootstrap-node.sh" "$(grep -c 'a task ran here' "$LOGS/job.log")" 2
  judge "steps that stopped their Ray" "$(grep -c 'stopping Ray' "$LOGS/job.log")" 2
  wait_for 60 "the epilogs to end" nodes_are idle || true
  judge "nodes that left the cluster" "$(ca_admin node list --cluster demo -o json | grep -c '"left"')" 2
  for name in "${NODES[@]}"; do
    judge "left on $name" "$(cd "$(host_dir "$name")/tmp" && find node 2>/dev/null | paste -sd ' ')" ""
    judge "Ray on $name" "$(in_host "$name" pgrep -c -x raylet || true)" 0
  done
}

job_ended() { ! slurm squeue -h -j "$1" 2>/dev/null | grep -q .; }

clear_away() {
  local code=$? name
  trap - EXIT INT TERM
  end_children
  if ((code != 0)); then
    [ -z "$STEP" ] || warn "failed or interrupted in step: $STEP"
    for name in "${NODES[@]}"; do cp "$(host_dir "$name")"/tmp/{prolog,epilog,job}.log "$LOGS" 2>/dev/null || true; done
    tail -n 15 "$LOGS"/{job,prolog,epilog,slurmctld}.log >&2 || true
  fi
  [ "${KEEP:-no}" = yes ] || { hosts_down && rm -rf "${STATE:?}"/{hosts,bin,names,node-agent,slurm,munge.key}; }
  exit "$code"
}

main "$@"
