# shellcheck shell=bash
# The stories, and what they are told with. Sourced by run.

# Seconds a look of the agent may be old, and Ray's start of a worker may take on a busy machine.
LOOK_EVERY=60
SLACK=20
# Seconds a worker is drained for.
DRAIN_SECONDS=5
# Ten times the bar.
GCS_GAP_MAX=50

# --- words the stories are told with

ask() { "$VENV/bin/python" "$STATE/lib/ask.py" "$@"; }

# of_status NAME FIELD...: a field of what the agent says.
of_status() {
  local name=$1
  shift
  agent "$name" status -o json 2>/dev/null | ask status "$@"
}

# horizon_of NAME: seconds of the epoch; 0 while the agent sees none.
horizon_of() {
  local horizon
  horizon=$(of_status "$1" served horizon)
  if [[ $horizon =~ ^[0-9]+$ ]]; then printf '%s\n' "$horizon"; else printf '0\n'; fi
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

# judge_at_most CHECK NUMBER MOST
judge_at_most() {
  if [ "$("$VENV/bin/python" -c 'import sys; print(float(sys.argv[1]) <= float(sys.argv[2]))' "$2" "$3")" = True ]; then
    held "$1" "$2"
  else
    broke "$1" "$2 (wanted: $3 or less)"
  fi
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

# recycle NAME OPTION... [-- COMMAND...]: what an operator types on that host; its exit code. What it says to a person
# and to a program is left in LOGS/recycle-NAME.{log,json}.
recycle() {
  local name=$1
  shift
  in_host "$name" node-agent recycle --state-dir "$(agent_state "$name")" --tls-dir "$(tls_dir "$name")" \
    --socket "$(agent_socket "$name")" --ray-uid "$RAY_UID" --yes -o json "$@" \
    >"$LOGS/recycle-$name.json" 2>"$LOGS/recycle-$name.log" || return $?
}

# recycle_worker NAME OPTION...
recycle_worker() {
  local name=$1
  shift
  ray_words "$name" --address="$(address head):$GCS_PORT"
  recycle "$name" --drain "${DRAIN_SECONDS}s" "$@" -- "$VENV/bin/${RAY_WORDS[0]}" "${RAY_WORDS[@]:1}"
}

# of_recycle NAME FIELD...: of what the last recycle of that host said to a program.
of_recycle() {
  local name=$1
  shift
  ask status "$@" <"$LOGS/recycle-$name.json"
}

# judge_recycle NAME CODE BEGAN: how it went.
judge_recycle() {
  local name=$1 code=$2 began=$3
  judge "recycle of $name, exit code" "$code" 0
  ((code == 0)) || sed 's/^/   | /' "$LOGS/recycle-$name.log" >&2
  held "recycle of $name took" "$(($(now) - began)) s: $(ask steps <"$LOGS/recycle-$name.json")"
}

# --- the stories

tell_stories() {
  declare -gA HORIZON SERVED_FIRST
  local all
  step "A cluster, and leaves of $LIFE s"
  make_cluster
  all=$(IFS=,; printf '%s' "${RAY_HOSTS[*]}")
  step "1. Files are renewed, and what runs serves what it read at its start"
  know_horizons
  # Patience for a host that is recycled.
  start_driver first head --hosts "$all" --patience 90
  wait_for_drivers first "${RAY_HOSTS[@]}"
  judge "the driver on the head, and its job" "$(served_job head)" "$(ask driver "$(log_of first)" job)"
  see_files_renewed
  step "4. gcs_server alone is executed again, under a driver, actors and tasks"
  see_gcs_replaced first
  start_driver second head --hosts worker2 --patience "$SLACK"
  step "2. worker1 is recycled under the driver"
  see_worker_recycled first worker1
  stop_driver first 120 || broke "the driver first" "does not end"
  judge "attempts of the driver that failed, through both" "$(counted first any any failed)" 0
  held "attempts of the driver that went well" "$(counted first any any ok)"
  step "1. The horizon of worker2, which nobody recycled"
  start_driver third worker1 --hosts worker1 --patience 60
  see_it_said_before worker2
  see_horizon_moved worker1
  see_the_end_come second worker2
  judge_at_least "new worker processes on recycled worker1 after that horizon" \
    "$(counted third fresh worker1 ok "${HORIZON[worker2]}")" 2
  judge "of these failed" "$(counted third fresh worker1 failed)" 0
  stop_driver second 90 || broke "the driver second" "does not end"
  stop_driver third 90 || broke "the driver third" "does not end"
}

# wait_for_drivers NAME HOST...: its first new worker process on each.
wait_for_drivers() {
  local driver=$1 name
  shift
  for name in "$@"; do wait_for 90 "a new worker process on $name" has_counted "$driver" fresh "$name" ok; done
}

# What the agent says of the first driver on a host. It looks each minute.
served_job() {
  wait_for $((LOOK_EVERY + SLACK)) "the agent of $1 to see the driver" sees_driver "$1" >&2 || true
  served "$1" driver job
}

sees_driver() { [ "$(served "$1" driver pid)" != nothing ]; }

# see_gcs_replaced DRIVER: nobody is lost, and it serves the new leaf at once.
see_gcs_replaced() {
  local driver=$1 watcher code=0 began log name
  log=$(log_of "$driver")
  in_host worker1 python "$STATE/lib/watch.py" "$(address head)" "$GCS_PORT" "$(current_leaf worker1)" \
    >"$LOGS/watch.log" 2>&1 &
  watcher=$!
  began=$(now)
  recycle head || code=$?
  judge_recycle head "$code" "$began"
  sleep 1
  kill "$watcher" 2>/dev/null || true
  wait "$watcher" 2>/dev/null || true
  judge "leaves the GCS port served meanwhile" "$(ask watched "$LOGS/watch.log" leaves)" 2
  judge_at_most "seconds from the old leaf to the new one (bar 5)" "$(ask watched "$LOGS/watch.log" gap)" "$GCS_GAP_MAX"
  wait_for_more "$driver" fresh "${RAY_HOSTS[@]}"
  for name in "${RAY_HOSTS[@]}"; do
    judge "actor on $name, processes it had" "$(ask pids "$log" actor "$name")" 1
  done
  judge "attempts that failed" "$(counted "$driver" any any failed)" 0
  held "the longest call, and the longest new worker" "$(ask longest "$log" actor any) s, $(ask longest "$log" fresh any) s"
}

# wait_for_more DRIVER KIND HOST...: one that begins from now on and goes well, on each.
wait_for_more() {
  local driver=$1 kind=$2 from name
  shift 2
  from=$(now)
  for name in "$@"; do
    wait_for 120 "$kind on $name" has_counted "$driver" "$kind" "$name" ok "$from" || broke "$kind on $name" "none"
  done
}

# see_worker_recycled DRIVER NAME: what Ray repeats comes back, and the host serves a new leaf.
see_worker_recycled() {
  local driver=$1 name=$2 code=0 began log before
  log=$(log_of "$driver")
  before=$(ask pids "$log" actor "$name")
  began=$(now)
  recycle_worker "$name" || code=$?
  judge_recycle "$name" "$code" "$began"
  wait_for_more "$driver" fresh "$name"
  wait_for_more "$driver" actor "$name"
  judge "the actor on $name came back, processes it had" "$(ask pids "$log" actor "$name")" $((before + 1))
}

# see_horizon_moved NAME: the agent has seen by itself what was recycled.
see_horizon_moved() {
  local name=$1
  wait_for $((LOOK_EVERY + SLACK)) "the agent of $name to see it" serves_later "$name" || true
  judge_at_least "horizon of recycled $name, seconds later than before" \
    $(($(horizon_of "$name") - HORIZON[$name])) 30
  HORIZON[$name]=$(horizon_of "$name")
}

serves_later() { (($(horizon_of "$1") > HORIZON[$1])) && [ "$(served "$1" raylet serial)" != nothing ]; }

# The agent looks after a start; the horizon is that of what was started just now.
know_horizons() {
  local name left
  for name in "${RAY_HOSTS[@]}"; do
    wait_for $((LOOK_EVERY + SLACK)) "the agent of $name to see a raylet" sees_raylet "$name"
    HORIZON[$name]=$(horizon_of "$name")
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

# see_it_said_before NAME: with a third of the life left, whoever can be told has been told.
see_it_said_before() {
  local name=$1 text code=0 left
  sleep_until $((HORIZON[$name] - LIFE / 3 + 2)) "a third of the leaf's life of $name is left"
  text=$(agent "$name" status 2>&1) || true
  judge_has "status of $name" "$text" "RECYCLE OVERDUE"
  judge_has "what fails first on $name" "$text" "fails first"
  judge "moment at which it fails first" "$(of_status "$name" first_failure at)" "${HORIZON[$name]}"
  agent "$name" status --check >/dev/null 2>"$LOGS/check.log" || code=$?
  judge "exit code of status --check" "$code" 1
  judge_at_least "metrics: processes overdue on $name" \
    "$(metric "$name" 'raymtls_agent_ray_processes{class="node",state="recycle-overdue"}')" 1
  left=$(metric "$name" 'raymtls_agent_seconds_to_horizon{class="node"}')
  left=$(($(now) + left - HORIZON[$name]))
  judge_at_most "metrics: seconds to the horizon are off by" "${left#-}" 2
  code=0
  in_host "$name" node-agent doctor --state-dir "$(agent_state "$name")" --tls-dir "$(tls_dir "$name")" \
    --socket "$(agent_socket "$name")" >"$LOGS/doctor-$name.log" 2>&1 || code=$?
  judge_has "doctor on $name (exit code $code)" "$(cat "$LOGS/doctor-$name.log")" "recycle-overdue"
  judge "the CA's list has the first horizon on top" \
    "$(ca_admin node list --cluster demo -o json | ask status nodes 0 claims running horizon)" "$(earliest_horizon)"
}

earliest_horizon() { printf '%s\n' "${HORIZON[@]}" | sort -n | head -n 1; }

# see_the_end_come DRIVER NAME: new workers work until the horizon and not after; what runs goes on.
see_the_end_come() {
  local driver=$1 name=$2 horizon=${HORIZON[$2]} last log
  log=$(log_of "$driver")
  sleep_until $((horizon + SLACK * 3 / 2)) "the horizon of $name has passed by $((SLACK * 3 / 2)) s"
  # The worker process that is started just before has its handshakes just after.
  judge_at_least "new worker processes on $name until $SLACK s before its horizon" \
    "$(counted "$driver" fresh "$name" ok 0 $((horizon - SLACK)))" 5
  judge "of these failed" "$(counted "$driver" fresh "$name" failed 0 $((horizon - SLACK)))" 0
  judge "new worker processes on $name after its horizon" "$(counted "$driver" fresh "$name" ok "$horizon")" 0
  judge_at_least "those that hung, of the ones from $SLACK s before it on" \
    "$(counted "$driver" fresh "$name" failed $((horizon - SLACK)))" 1
  note "what the user sees: $(ask why "$log" fresh "$name")"
  last=$(ask last "$log" fresh "$name" ok)
  held "the last one that worked" "$(printf '%.0f' "$(bc_minus "$last" "$horizon")") s from the horizon"
  judge_at_least "calls of the actor on $name after it, by connections that were there" \
    "$(counted "$driver" actor "$name" ok $((horizon + 5)))" 5
  judge "of these failed" "$(counted "$driver" actor "$name" failed "$horizon")" 0
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
