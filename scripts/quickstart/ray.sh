# shellcheck shell=bash
# The Ray side of the quickstart: a head and two workers on pinned ports, and the job. Sourced after
# control.sh.

RAY_HOSTS=(head worker1 worker2)
# The name in the head's leaf; every host knows it.
HEAD_NAME=head.$TRUST_DOMAIN
GCS_PORT=6379
# shellcheck disable=SC2034
RAY_CLIENT_PORT=10001
# shellcheck disable=SC2034  # not every script that sources this looks at it
AGENT_HTTP_PORT=6705
OBJECT_STORE_BYTES=600000000
RAY_START_MAX=150
# Variables a node is started with besides the agent's.
RAY_SETTINGS=()
# Loopback, as Ray does by itself, unless the network is closed.
DASHBOARD_HOST=127.0.0.1

JOB_LOG=$(host_dir head)/home/job.jsonl
JOB_STOP=$(host_dir head)/home/stop
JOB_PID=""

# ray_words NAME OPTION...: into RAY_WORDS, how one Ray node is started on the ports of the cluster's plan.
ray_words() {
  local name=$1 ports=() head=()
  shift
  [[ " $* " == *" --address="* ]] || head=(--head)
  read -ra ports <<<"$(agent "$name" ray-flags "${head[@]}")"
  RAY_WORDS=(ray start --node-ip-address="$(address "$name")" --resources="{\"$name\": 1}"
    --num-cpus=1 --object-store-memory="$OBJECT_STORE_BYTES" --disable-usage-stats "${ports[@]}" "$@")
}

# start_ray NAME OPTION...: one Ray node, as Ray's uid, through the agent.
start_ray() {
  ray_words "$@"
  with_leaf "$1" env "${RAY_SETTINGS[@]}" "${RAY_WORDS[@]}"
}

# start_head [TEMP_DIR]: a head's option alone; its short path keeps Ray's unix sockets under the kernel's limit.
start_head() {
  run "$RAY_START_MAX" "$LOGS/ray-head.log" "the Ray head" start_ray head \
    --temp-dir="${1:-/tmp/ray}" --dashboard-host="$DASHBOARD_HOST"
}

# Both workers at once; the first dials the head by the name in the head's leaf, the second by address.
start_workers() {
  local first second
  start_ray worker1 --address="$HEAD_NAME:$GCS_PORT" >>"$LOGS/ray-worker1.log" 2>&1 </dev/null &
  first=$!
  start_ray worker2 --address="$(address head):$GCS_PORT" >>"$LOGS/ray-worker2.log" 2>&1 </dev/null &
  second=$!
  finish "$first" "$RAY_START_MAX" "$LOGS/ray-worker1.log" "the Ray worker on worker1"
  finish "$second" "$RAY_START_MAX" "$LOGS/ray-worker2.log" "the Ray worker on worker2"
}

# start_job: in the background on the head's host; it goes on until stop_job.
start_job() {
  rm -f "$JOB_LOG" "$JOB_STOP"
  with_leaf head python "$STATE/lib/job.py" --log "$JOB_LOG" --stop "$JOB_STOP" \
    --hosts "$(IFS=,; printf '%s' "${RAY_HOSTS[*]}")" > >(sed -u 's/^/   job: /') 2>>"$LOGS/job.log" </dev/null &
  JOB_PID=$!
}

# job_wrote TEXT: the log holds it; a job that ended early stops the wait.
job_wrote() {
  grep -q -- "$1" "$JOB_LOG" 2>/dev/null && return 0
  ! ended "$JOB_PID" || die "the job ended before its time: see $LOGS/job.log and $JOB_LOG"
  return 1
}

stop_job() {
  as_ray head touch "$JOB_STOP"
  finish "$JOB_PID" 90 "$LOGS/job.log" "the job"
}

# job_count WORD: ok, failed or retried, from the summary the job wrote itself.
job_count() { grep '"summary"' "$JOB_LOG" | grep -o "\"$1\": [0-9]*" | grep -o '[0-9]*$'; }

# session_logs NAME: the folder of Ray's own logs; the link to it is absolute inside the host.
session_logs() { printf '%s%s/logs' "$(host_dir "$1")" "$(readlink "$(host_dir "$1")/tmp/ray/session_latest" 2>/dev/null || true)"; }

# tell_failure CODE [WORDS]: of a script that ends so: its step, and where the logs are. Ray's are kept.
tell_failure() {
  (($1 != 0)) || return 0
  [ -z "$STEP" ] || warn "failed or interrupted in step: $STEP"
  keep_ray_logs
  warn "logs are in $LOGS${2:-}"
}

# Ray's own logs, where a failed run leaves them for reading.
keep_ray_logs() {
  local name session
  for name in "${RAY_HOSTS[@]}"; do
    session=$(session_logs "$name")
    [ -d "$session" ] && cp -r "$session" "$LOGS/ray-session-$name"
  done
  return 0
}
