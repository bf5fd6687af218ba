# shellcheck shell=bash
# The long stories: three leaf lives with every node recycled in each, and a driver that is older than its
# leaf. Sourced by run after tell.sh; `run --full` tells them.

# Leaf lives that the cluster lives through.
LIVES=3
# Seconds between two recycles of the head, if nothing takes longer: workers must have two minutes left then.
CYCLE=180
# How long a task with an object is waited for.
HANG_SECONDS=30

tell_three_lives() {
  # Two recycles of the head, with both workers between them, fit into a leaf also on a busy machine.
  MAX_JOB=3m
  LIFE=360
  step "2. $LIVES leaf lives: each node in turn, a fresh driver each time"
  make_new_cluster
  see_three_lives
}

tell_of_an_old_driver() {
  MAX_JOB=2m
  LIFE=240
  step "3. A driver that is older than its leaf, while a worker is recycled"
  make_new_cluster
  see_an_old_driver
}

make_new_cluster() {
  hosts_down
  rm -rf "${STATE:?}/hosts"
  make_cluster
}

# Between two drivers the head as a whole, under each driver the workers.
see_three_lives() {
  local began cycle=0 driver name code since
  began=$(now)
  while (($(now) - began < LIVES * LIFE)); do
    cycle=$((cycle + 1))
    since=$(now)
    ((cycle == 1)) || recycle_whole_head
    driver=cycle$cycle
    start_driver "$driver" head --hosts "$(IFS=,; printf '%s' "${RAY_HOSTS[*]}")" --patience 120
    wait_for_drivers "$driver" "${RAY_HOSTS[@]}"
    for name in worker1 worker2; do
      code=0
      recycle_timed "$name" recycle_worker || code=$?
      judge "recycle of $name, exit code" "$code" 0
      wait_for_more "$driver" fresh "$name"
    done
    wait_for_more "$driver" actor "${RAY_HOSTS[@]}"
    sleep_until $((since + CYCLE)) "the end of driver $cycle, $(($(now) - began)) s after the first leaf"
    stop_driver "$driver" 150 || broke "driver $cycle" "does not end"
    judge_cycle "$driver" "$cycle"
  done
  held "leaf lives the cluster has lived through" "$("$VENV/bin/python" -c "print(round(($(now) - $began) / $LIFE, 1))") of $LIFE s"
}

judge_cycle() {
  local driver=$1 log
  log=$(log_of "$driver")
  judge "driver $2, attempts that failed" "$(counted "$driver" any any failed)" 0
  held "driver $2, attempts that went well" "$(counted "$driver" any any ok), $(counted "$driver" fresh any ok) of them new worker processes"
  judge "driver $2, processes its actors had on head, worker1, worker2" \
    "$(ask pids "$log" actor head), $(ask pids "$log" actor worker1), $(ask pids "$log" actor worker2)" "1, 2, 2"
  held "driver $2, the longest call, and the longest new worker" \
    "$(ask longest "$log" actor any) s, $(ask longest "$log" fresh any) s"
}

recycle_timed() {
  local name=$1 began code=0
  shift
  began=$(now)
  "$1" "$name" "${@:2}" || code=$?
  note "recycle of $name: $(($(now) - began)) s: $(ask steps <"$LOGS/recycle-$name.json")"
  ((code == 0)) || sed 's/^/   | /' "$LOGS/recycle-$name.log" >&2
  return "$code"
}

# No driver is there: a maintenance window, as an operator would choose it.
recycle_whole_head() {
  local code=0
  ray_words head --temp-dir=/tmp/ray --dashboard-host="$DASHBOARD_HOST"
  recycle_timed head recycle --whole-head -- "$VENV/bin/${RAY_WORDS[0]}" "${RAY_WORDS[@]:1}" || code=$?
  judge "recycle of the whole head, exit code" "$code" 0
}

# It owns an object of 20 MB. Its leaf ends, and nothing happens; then a worker comes back, and cannot reach it.
see_an_old_driver() {
  local code=0 ends pid from log
  start_driver old head --hosts worker1 --patience "$HANG_SECONDS" --put
  wait_for_drivers old worker1
  # Their leaves outlast the driver's.
  recycle_timed worker1 recycle_worker || broke "recycle of worker1" "failed"
  recycle_timed worker2 recycle_worker || broke "recycle of worker2" "failed"
  log=$(log_of old)
  wait_for $((LOOK_EVERY + SLACK)) "the agent of the head to see the driver" sees_driver head || true
  ends=$(served head driver horizon)
  pid=$(served head driver pid)
  sleep_until $((ends - LIFE / 3 - 10)) "a new leaf for gcs_server"
  recycle_timed head recycle || code=$?
  judge "gcs_server is executed again, exit code" "$code" 0
  sleep_until $((ends - LIFE / 3 + 5)) "a third of the driver's leaf is left"
  judge_has "status of the head" "$(agent head status)" "DRIVER ALARM"
  sleep_until $((ends + 10)) "the driver's leaf has ended"
  judge_at_least "its tasks with the object, after that, by connections that were there" \
    "$(counted old object worker1 ok $((ends + 3)))" 1
  code=0
  recycle_worker worker1 || code=$?
  judge "recycle of worker1, exit code" "$code" 1
  judge "what came of it" "$(of_recycle worker1 outcome)" refused
  judge_has "it names the driver and its job" "$(cat "$LOGS/recycle-worker1.log")" "driver pid $pid on $(address head) (job $(ask driver "$log" job)"
  code=0
  recycle_timed worker1 recycle_worker --force || code=$?
  judge "with --force, exit code" "$code" 0
  from=$(now)
  sleep_until $((from + HANG_SECONDS * 2 + SLACK)) "what becomes of the driver's tasks"
  judge "its tasks with the object that went well since" "$(counted old object worker1 ok "$from")" 0
  judge_at_least "of these hung for $HANG_SECONDS s: $(ask why "$log" object worker1)" "$(counted old object worker1 failed "$from")" 1
  held "its tasks without the object since" "$(counted old task worker1 ok "$from") went well, $(counted old task worker1 failed "$from") failed"
  judge_at_least "lines CERTIFICATE_VERIFY_FAILED in Ray's logs on worker1" \
    "$(lines_of grep -rh CERTIFICATE_VERIFY_FAILED "$(session_logs worker1)")" 1
  stop_driver old 150 || note "the driver is ended with its host"
}
