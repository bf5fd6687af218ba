# shellcheck shell=bash
# The stories, and what they are told with. Sourced by run.

# Seconds a look of the agent may be old, and Ray's start of a worker may take on a busy machine.
LOOK_EVERY=60
SLACK=20

# --- words the stories are told with

ask() { "$VENV/bin/python" "$STATE/lib/ask.py" "$@"; }

# of_status NAME FIELD...: a field of what the agent says.
of_status() {
  local name=$1
  shift
  agent "$name" status -o json 2>/dev/null | ask status "$@"
}

# served NAME KIND FIELD: of the first process of that kind, as the agent saw it last.
served() { agent "$1" status -o json 2>/dev/null | ask served "$2" "$3"; }

# metric NAME METRIC: as Prometheus reads it.
metric() { in_host "$1" curl -s http://127.0.0.1:7447/metrics | ask metric "$2"; }

now() { date +%s; }

# sleep_until SECONDS_OF_THE_EPOCH WHAT
sleep_until() {
  local left
  left=$(($1 - $(now)))
  note "$2: in $left s"
  ((left <= 0)) || sleep "$left"
}

# start_driver NAME HOST OPTION...: a user's program on that host, under this name, until stop_driver.
start_driver() {
  local name=$1 host=$2 home
  home=$(host_dir "$host")/home
  shift 2
  declare -g "HOST_OF_$name=$host" "LOG_OF_$name=$home/$name.jsonl"
  with_leaf "$host" python "$STATE/lib/driver.py" --log "$home/$name.jsonl" --stop "$home/$name.stop" "$@" \
    >>"$LOGS/driver-$name.log" 2>&1 </dev/null &
  declare -g "PID_OF_$name=$!"
}

log_of() { local variable=LOG_OF_$1; printf '%s\n' "${!variable}"; }
pid_of() { local variable=PID_OF_$1; printf '%s\n' "${!variable}"; }

# stop_driver NAME LIMIT_SECONDS
stop_driver() {
  local host=HOST_OF_$1
  as_ray "${!host}" touch "$(host_dir "${!host}")/home/$1.stop"
  finish "$(pid_of "$1")" "$2" "$LOGS/driver-$1.log" "the driver $1"
}

# counted NAME KIND HOST OUTCOME [FROM [TO]]
counted() { ask count "$(log_of "$1")" "${@:2}"; }

has_counted() { (($(counted "$@") > 0)); }

# lines_of COMMAND...: how many it prints; none is no failure.
lines_of() { { "$@" 2>/dev/null || true; } | wc -l; }

# judge_at_least CHECK NUMBER LEAST
judge_at_least() {
  if (($2 >= $3)); then held "$1" "$2"; else broke "$1" "$2 (wanted: $3 or more)"; fi
}

# judge_has CHECK TEXT PART: shows the line with the part.
judge_has() {
  local line
  if line=$(grep -m 1 -F -- "$3" <<<"$2"); then
    held "$1" "$(sed -E 's/^ +//; s/ +/ /g' <<<"$line")"
  else
    broke "$1" "no $3"
  fi
}

# --- the stories

tell_stories() {
  declare -gA HORIZON SERVED_FIRST
  step "1. Files are renewed, and a host is not recycled"
  know_horizons
  start_driver first head --hosts "$(IFS=,; printf '%s' "${RAY_HOSTS[*]}")" --patience "$SLACK"
  local name
  for name in "${RAY_HOSTS[@]}"; do
    wait_for 60 "a new worker process on $name" has_counted first fresh "$name" ok
  done
  see_files_renewed
  see_it_said_before
  see_the_end_come worker2
  stop_driver first 90 || broke "the driver of story 1" "does not end"
}

# The agent looks after a start; the horizon is that of what was started just now.
know_horizons() {
  local name left
  for name in "${RAY_HOSTS[@]}"; do
    wait_for $((LOOK_EVERY + SLACK)) "the agent of $name to see a raylet" sees_raylet "$name"
    HORIZON[$name]=$(of_status "$name" served horizon)
    SERVED_FIRST[$name]=$(served "$name" raylet serial)
    left=$((HORIZON[$name] - $(now)))
    if ((left > LIFE / 2 && left <= LIFE)); then
      held "horizon of $name" "in $left s, by what its raylet serves"
    else
      broke "horizon of $name" "in $left s"
    fi
  done
}

sees_raylet() { [ "$(served "$1" raylet serial)" != nothing ]; }

# A third of the life later there are new files, and nothing that runs has read them.
see_files_renewed() {
  local name
  for name in "${RAY_HOSTS[@]}"; do
    wait_for $((LIFE / 2)) "the files of $name to be renewed" is_renewed "$name"
    judge "files of $name are renewed, its raylet serves" "$(served "$name" raylet serial)" "${SERVED_FIRST[$name]}"
  done
}

is_renewed() { [ "$(serial "$(current_leaf "$1")" | tr 'A-F' 'a-f')" != "${SERVED_FIRST[$1]}" ]; }

# Two thirds of the life later, with 80 s left: whoever can be told has been told.
see_it_said_before() {
  local text code=0
  sleep_until $((HORIZON[worker2] - LIFE / 3 + 2)) "a third of the leaf's life of worker2 is left"
  text=$(agent worker2 status 2>&1) || true
  judge_has "status of worker2" "$text" "RECYCLE OVERDUE"
  judge_has "what fails first on worker2" "$text" "fails first"
  judge "moment at which it fails first" "$(of_status worker2 first_failure at)" "${HORIZON[worker2]}"
  agent worker2 status --check >/dev/null 2>"$LOGS/check.log" || code=$?
  judge "exit code of status --check" "$code" 1
  judge_at_least "metrics: processes overdue on worker2" \
    "$(metric worker2 'raymtls_agent_ray_processes{class="node",state="recycle-overdue"}')" 1
  local left
  left=$(metric worker2 'raymtls_agent_seconds_to_horizon{class="node"}')
  judge "metrics: seconds to the horizon, and the clock" "$(($(now) + left - HORIZON[worker2]))" 0
  code=0
  in_host worker2 node-agent doctor --state-dir "$(agent_state worker2)" --tls-dir "$(tls_dir worker2)" \
    --socket "$(agent_socket worker2)" >"$LOGS/doctor-worker2.log" 2>&1 || code=$?
  judge_has "doctor on worker2 (exit code $code)" "$(cat "$LOGS/doctor-worker2.log")" "recycle-overdue"
  judge "the CA's list has the first horizon on top" \
    "$(ca_admin node list --cluster demo -o json | ask status nodes 0 claims running horizon)" "$(earliest_horizon)"
}

earliest_horizon() { printf '%s\n' "${HORIZON[@]}" | sort -n | head -n 1; }

# see_the_end_come NAME: new workers work until the horizon and not after; what runs goes on.
see_the_end_come() {
  local name=$1 horizon=${HORIZON[$1]} last first log
  log=$(log_of first)
  sleep_until $((horizon + 2 * SLACK)) "the horizon of $name has passed by $((2 * SLACK)) s"
  # The worker process that is started just before has its handshakes just after.
  judge_at_least "new worker processes on $name until $SLACK s before its horizon" \
    "$(counted first fresh "$name" ok 0 $((horizon - SLACK)))" 5
  judge "of these failed" "$(counted first fresh "$name" failed 0 $((horizon - SLACK)))" 0
  judge "new worker processes on $name after its horizon" "$(counted first fresh "$name" ok "$horizon")" 0
  judge_at_least "of these were tried" "$(counted first fresh "$name" failed "$horizon")" 1
  note "what the user sees: $(ask why "$log" fresh "$name")"
  last=$(ask last "$log" fresh "$name" ok)
  held "the last one that worked" "$(printf '%.0f' "$(bc_minus "$last" "$horizon")") s from the horizon"
  judge_at_least "calls of the actor on $name after it, by connections that were there" \
    "$(counted first actor "$name" ok $((horizon + 5)))" 5
  judge "of these failed" "$(counted first actor "$name" failed "$horizon")" 0
  explain "$name"
}

bc_minus() { "$VENV/bin/python" -c 'import sys; print(float(sys.argv[1]) - float(sys.argv[2]))' "$@"; }

# explain NAME: Ray's log has no word of the reason; doctor --explain, on another host, has.
explain() {
  local name=$1 logs text seen
  logs=$(session_logs "$name")
  seen=$(lines_of grep -rlE 'CERTIFICATE_VERIFY_FAILED|Timed out while waiting for GCS' "$logs")
  judge_at_least "logs of Ray on $name that complain" "$seen" 1
  seen=$(lines_of grep -rhoiE 'certificate (has )?expired|leaf .*ended' "$logs")
  judge "of them say that a certificate has ended" "$seen" 0
  text=$(in_host worker1 node-agent doctor --state-dir "$(agent_state worker1)" --tls-dir "$(tls_dir worker1)" \
    --explain "$(address "$name"):6701" 2>&1) || true
  printf '%s\n' "$text" >>"$LOGS/explain.log"
  judge_has "doctor --explain $(address "$name"):6701 on worker1" "$text" "the leaf it serves ended"
}
