#!/usr/bin/env bash
# test.sh [--keep|--down]: `node-agent recycle` on a real Ray cluster of a head and a worker in network
# namespaces of this machine: the worker recycled under a running job, gcs_server executed again under a
# driver, an actor and tasks, and what it refuses. As root. `scripts/check recycle` runs it.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
. "$ROOT/scripts/lib/say.sh"
. "$ROOT/scripts/lib/need.sh"
. "$ROOT/scripts/lib/hosts.sh"
. "$ROOT/scripts/quickstart/control.sh"
# shellcheck source=/dev/null
. "$ROOT/scripts/quickstart/ray.sh"

BIN=${RAYMTLS_BIN_DIR:-$ROOT/target/debug}
HOSTS=(ca head worker1)
RAY_HOSTS=(head worker1)
KEEP=no

main() {
  case "${1:-}" in
    --keep) KEEP=yes ;;
    --down) DOWN=yes ;;
    "") ;;
    *) die "usage: test.sh [--keep|--down]" ;;
  esac
  [ "$(id -u)" = 0 ] || die "needs root"
  need_base
  exec 9>"$BASE/quickstart.lock"
  flock -n 9 || die "a quickstart or another run of this test is there"
  if [ "${DOWN:-no}" = yes ]; then
    clear_up
    return
  fi
  trap on_exit EXIT
  trap 'exit 130' INT TERM
  clear_up
  install -d -m 0755 "$LOGS" "$STATE/bin" "$STATE/lib"
  step "A CA, a head whose control store is on disk, and a worker"
  cluster_up
  if [ "$KEEP" = yes ]; then
    step_end
    note "left up: scripts/quickstart/on head ..., test.sh --down"
    return
  fi
  step "A job with tasks, actors and a large object; programs that pass for gcs_server"
  start_load
  start_namesakes
  step "What recycle refuses"
  show_refusals
  step "gcs_server alone, under the job"
  show_gcs
  step "The worker, under the job, by a hook"
  show_worker
  step "What the job saw"
  show_load
  step_end
  table
  ((CHECKS_BROKEN == 0)) || exit 1
}

# Ten times what is wanted of a new gcs_server, in seconds.
GCS_MAX=50
JOB_STOP=$(host_dir head)/home/stop
DRAIN=5s

cluster_up() {
  local name
  need_command ip iproute2
  need_command openssl openssl
  need_ray
  install -m 0755 "$BIN"/{ca-server,ca-admin,node-agent} "$STATE/bin"
  install -m 0644 "$ROOT"/scripts/recycle/*.py "$STATE/lib"
  { printf '127.0.0.1 localhost\n%s %s\n' "$(address head)" "$HEAD_NAME"; } >"$STATE/names"
  bridge_up
  for name in "${HOSTS[@]}"; do host_up "$name"; done
  start_ca
  create_cluster demo
  create_token head --cluster demo --role head --node head --dns "$HEAD_NAME"
  create_token worker1 --cluster demo --role worker --node worker1
  enrol head head --role head --dns "$HEAD_NAME"
  enrol worker1 worker1
  for name in "${RAY_HOSTS[@]}"; do start_agent "$name"; done
  start_head_on_disk
  run "$RAY_START_MAX" "$LOGS/ray-worker1.log" "the Ray worker" start_ray worker1 --address="$(address head):$GCS_PORT"
}

# recycle HOST OPTION...: what it prints goes to $LOGS/recycle.out and .err; its exit code is the answer.
recycle() {
  local name=$1 code=0
  shift
  in_host "$name" node-agent recycle --state-dir "$(agent_state "$name")" --tls-dir "$(tls_dir "$name")" \
    --socket "$(agent_socket "$name")" --ray-uid "$RAY_UID" -o json "$@" >"$LOGS/recycle.out" 2>"$LOGS/recycle.err" </dev/null 7>"$LOGS/foreign" || code=$?
  cat "$LOGS/recycle.err" >>"$LOGS/recycle-all.log"
  printf '%s\n' "$code"
}

# said EXPRESSION: of the JSON document that recycle printed last.
said() { "$VENV/bin/python" -c "import json,sys; r = json.load(open(sys.argv[1])); print($1)" "$LOGS/recycle.out" 2>&1; }

start_load() {
  rm -f "$JOB_STOP"
  with_leaf head python "$STATE/lib/job.py" "$JOB_STOP" >"$LOGS/load.log" 2>"$LOGS/load.err" </dev/null &
  wait_for 60 "the job to begin" grep -q '"ok"' "$LOGS/load.log"
}

start_namesakes() {
  with_leaf head python "$STATE/lib/namesake.py" "$(host_dir head)/home" >"$LOGS/namesakes.log" 2>"$LOGS/namesakes.err" </dev/null &
  wait_for 60 "programs that pass for gcs_server" grep -q ' ' "$LOGS/namesakes.log"
  read -r -a NAMESAKES <"$LOGS/namesakes.log"
}

# On the worker: no word how Ray starts, and a driver that would end with it.
show_refusals() {
  judge "no start is known" "$(recycle worker1 --yes) $(said "r['outcome'], len(r['plan']['refusals'])")" "1 refused 1"
  with_leaf worker1 python -c 'import ray, time; ray.init(log_to_driver=False); print("up", flush=True); time.sleep(300)' \
    >"$LOGS/driver.log" 2>&1 </dev/null &
  DRIVER=$!
  wait_for 60 "a driver on the worker" grep -q '^up' "$LOGS/driver.log"
  judge "a driver on the node is named" "$(recycle worker1 --yes -- ray start) $(said "r['outcome'], [h['why'] for h in r['plan']['harms']]")" \
    "1 refused ['it runs on this node, and ends with its raylet']"
  judge "with its address, job and command" "$(said "[text in r['plan']['harms'][0]['who'] for text in ('driver pid ', ' on $(address worker1) (job ', 'python')]")" \
    "[True, True, True]"
  host_kill worker1 "time.sleep(300)"
  wait "$DRIVER" 2>/dev/null || true
  wait_for 30 "Ray to forget that driver" nobody_is_hurt
  judge "then nobody is hurt" "$(recycle worker1 --dry-run -- ray start)" 0
  judge "whoever is not root is told so" "$(as_ray worker1 node-agent recycle --dry-run >/dev/null 2>&1 || echo $?)" 64
}

nobody_is_hurt() { [ "$(recycle worker1 --dry-run -- ray start)" = 0 ]; }

# host_kill HOST TEXT: ends what has this on its command line there.
host_kill() {
  local pid
  for pid in $(host_pids "$1"); do
    if tr '\0' ' ' <"/proc/$pid/cmdline" 2>/dev/null | grep -qF -- "$2"; then kill "$pid" 2>/dev/null || true; fi
  done
}

show_gcs() {
  local old new
  judge "programs that pass for gcs_server" "$(namesakes_alive)" 2
  old=$(gcs_pid)
  what_it_is "$old" >"$LOGS/gcs-before"
  judge "recycle on the head" "$(recycle head --yes) $(said "r['scope'], r['outcome']")" "0 gcs_server done"
  new=$(gcs_pid)
  what_it_is "$new" >"$LOGS/gcs-after"
  judge "it is another process" "$([ -n "$new" ] && [ "$new" != "$old" ] && echo yes)" yes
  judge "like the one before it in all but the paths of TLS" "$(diff "$LOGS/gcs-before" "$LOGS/gcs-after" || true)" ""
  judge "it holds nothing that the caller of recycle had open" "$(find "/proc/$new/fd" -lname "$LOGS/foreign" | wc -l)" 0
  judge "in a mount namespace, groups, limits and a priority of its own" \
    "$(grep -cE '^(nice 3|Groups:.*61077|Umask:.0027|Max open files +5000 +5001|words .*gcs_server)' "$LOGS/gcs-after") $([ "$(readlink /proc/"$new"/ns/mnt)" != "$(readlink /proc/"$(holder_pid head)"/ns/mnt)" ] && echo apart)" "5 apart"
  judge "its leaf is a new one" "$(said "len(r['new_serials']) == 1 and r['new_serials'][0] not in r['old_serials']")" True
  judge "after at most $GCS_MAX s" "$(said "sum(d['seconds'] for d in r['done'] if d['step'] in ('replace', 'prove_served')) <= $GCS_MAX")" True
  note "the new leaf was served $(said "round(sum(d['seconds'] for d in r['done'] if d['step'] in ('replace', 'prove_served')), 1)") s after the old gcs_server was told to end"
  judge "what passes for gcs_server lives on" "$(namesakes_alive)" 2
  judge "and was named" "$(said "[w for w in r['plan']['warnings'] if 'gcs_server' in w and 'left alone' in w].__len__()")" 1
}

namesakes_alive() {
  local pid count=0
  for pid in "${NAMESAKES[@]}"; do in_host head kill -0 "$pid" 2>/dev/null && count=$((count + 1)); done
  printf '%s\n' "$count"
}

# gcs_pid: Ray's own, by its number out here.
gcs_pid() {
  local pid
  for pid in $(host_pids head); do
    case $(readlink "/proc/$pid/exe" 2>/dev/null) in */ray/core/src/ray/gcs/gcs_server) printf '%s\n' "$pid" ;; esac
  done
}

# what_it_is PID: everything a process that takes another's place must share with it.
what_it_is() {
  grep -E '^(Umask|Uid|Gid|Groups|Cap|NoNewPrivs|Seccomp|Cpus_allowed_list)' "/proc/$1/status"
  cat "/proc/$1/limits" "/proc/$1/cgroup" "/proc/$1/oom_score_adj"
  printf 'nice %s\n' "$(sed 's/.*) //' "/proc/$1/stat" | cut -d ' ' -f 17)"
  printf '%s\n' "$(readlink "/proc/$1/ns/"{mnt,net,uts,ipc,pid,user,cgroup} "/proc/$1/fd/"{0,1,2} "/proc/$1/"{cwd,root,exe})"
  printf 'words %s\n' "$(tr '\0' ' ' <"/proc/$1/cmdline")"
  tr '\0' '\n' <"/proc/$1/environ" | sed 's:/k[0-9]*/:/k/:' | sort
}

# The hook for a node without a service manager, as an operator would install it.
show_worker() {
  local hooks
  hooks=$(host_dir worker1)/recycle
  install -D -m 0755 "$ROOT/scripts/recycle/plain/start" "$hooks/start"
  cat >"$hooks/ray.conf" <<CONF
PATH=$STATE/bin:$VENV/bin:\$PATH
AS_RAY="setpriv --reuid $RAY_UID --regid $RAY_GID --clear-groups env HOME=$(host_dir worker1)/home"
RAY_START="ray start --address=$(address head):$GCS_PORT --resources={\"worker1\":1} --num-cpus=1 --object-store-memory=$OBJECT_STORE_BYTES --disable-usage-stats"
CONF
  judge "recycle on the worker" "$(recycle worker1 --yes --hooks "$hooks" --drain "$DRAIN") $(said "r['scope'], r['outcome'], r['failure']")" "0 node done None"
  judge "all of it serves new leaves" "$(said "len(r['new_serials']) > 0 and not set(r['new_serials']) & set(r['old_serials'])")" True
  note "it took $(said "round(sum(d['seconds'] for d in r['done']), 1)") s: $(said "', '.join(f\"{d['step']} {d['seconds']}\" for d in r['done'])")"
}

show_load() {
  as_ray head touch "$JOB_STOP"
  wait_for 150 "the job to end" grep -q summary "$LOGS/load.log" || true
  judge "failed rounds" "$(sed -n 's/.*"failed": \(\[.*\]\), "head_actors.*/\1/p' "$LOGS/load.log")" "[]"
  judge "the head's actor was never started again" "$(sed -n 's/.*"head_actors": \([0-9]*\).*/\1/p' "$LOGS/load.log")" 1
  judge "the worker's actor came back once" "$(sed -n 's/.*"worker_actors": \([0-9]*\).*/\1/p' "$LOGS/load.log")" 2
  note "$(tail -n 1 "$LOGS/load.log")"
}

# Ray keeps its control store in RocksDB, so that gcs_server can end and come back. It runs as a service would start
# it: with mount and host-name namespaces, groups, limits and a priority of its own.
start_head_on_disk() {
  local ports=() home
  home=$(host_dir head)/home
  read -ra ports <<<"$(agent head ray-flags --head)"
  # shellcheck disable=SC2016
  run "$RAY_START_MAX" "$LOGS/ray-head.log" "the Ray head" in_host head unshare --mount --uts \
    prlimit --nofile=5000:5001 --memlock=8388608 nice -n 3 setpriv --reuid "$RAY_UID" --regid "$RAY_GID" --groups "$RAY_GID,61077" \
    env "HOME=$home" RAY_USAGE_STATS_ENABLED=0 RAY_gcs_storage=rocksdb "RAY_gcs_storage_path=$home/gcs" \
    bash -c 'umask 0027; cd "$HOME"; exec "$@"' ray node-agent exec --socket "$(agent_socket head)" -- ray start --head \
    --node-ip-address="$(address head)" --resources='{"head": 1}' --num-cpus=2 --object-store-memory="$OBJECT_STORE_BYTES" \
    --disable-usage-stats --temp-dir=/tmp/ray --dashboard-host=127.0.0.1 "${ports[@]}"
}

clear_up() {
  hosts_down
  rm -rf "${STATE:?}"
}

on_exit() {
  local code=$?
  trap - EXIT INT TERM
  end_children
  tell_failure "$code"
  if [ "$KEEP" = no ]; then
    hosts_down
    rm -rf "${STATE:?}"/{hosts,bin,lib,names}
  fi
  exit "$code"
}

main "$@"
