# shellcheck shell=bash
# What tunnel mode must hold, each as lines of the table; test.sh and full.sh choose. Sourced after lab.sh.

# A call under way when ray-tunnel dies may fail, and Ray may be this long about it.
CRASH_SECONDS=15
# A restart, and a revocation to the last byte; the short test asserts ten times what is promised.
RESTART_MS_MAX=${RESTART_MS_MAX:-10000}
CUT_MS_MAX=${CUT_MS_MAX:-5000}
# Spans in which something was broken on purpose.
BROKEN=()

refusals() { local count; count=$(tunnel_says "$1" refusals "$2"); printf '%d' "${count/null/0}"; }

wire() {
  local name=$1
  shift
  in_host "$name" python "$STATE/lib/wire.py" "$@"
}

# as_user NAME UID COMMAND...
as_user() {
  local name=$1 uid=$2
  shift 2
  in_host "$name" setpriv --reuid "$uid" --regid "$uid" --clear-groups "$@"
}

# Ray

show_ray() {
  local name
  for name in "${RAY_HOSTS[@]}"; do
    wait_for 60 "the tunnel of $name" tunnel_ready "$name"
  done
  start_head ""
  start_workers
  start_load
  judge "nodes in ray status, asked from a worker" "$(with_leaf worker2 timeout 60 ray status 2>>"$LOGS/ray-status.log" | grep -c ' node_')" 3
  judge "Ray processes with TLS of their own" "$(ray_tls_processes)" 0
}

# Every process of Ray's with RAY_USE_TLS on.
ray_tls_processes() {
  local name pid count=0
  for name in "${RAY_HOSTS[@]}"; do
    for pid in $(host_pids "$name"); do
      ! tr '\0' '\n' 2>/dev/null <"/proc/$pid/environ" | grep -q '^RAY_USE_TLS=1' || count=$((count + 1))
    done
  done
  printf '%d' "$count"
}

# A job by `ray job submit`; it runs a task on each host. Its words are fetched at its end: what carries them meanwhile is
# the dashboard's, which a loaded machine starves.
show_job_submit() {
  local id said
  id=job-$(monotonic)
  job_of_head submit --no-wait --submission-id "$id" --working-dir "$STATE/job" -- \
    python job.py --show-only --hosts "$(IFS=,; printf '%s' "${RAY_HOSTS[*]}")" >>"$LOGS/job-submit.log" 2>&1 || true
  wait_for 300 "the job's end" job_ended "$id" || true
  said=$(job_of_head logs "$id" 2>&1) || true
  printf '%s\n' "$said" >>"$LOGS/job-submit.log"
  judge "a submitted job" "$(grep -o 'job over: [^.]*' <<<"$said" | grep -o '0 failed, 0 retried')" "0 failed, 0 retried"
}

job_of_head() {
  local verb=$1
  shift
  with_leaf head timeout 120 ray job "$verb" --address "http://$(address head):8265" "$@"
}

job_ended() {
  sleep 2
  job_of_head status "$1" 2>&1 | grep -qiE 'succeeded|failed|stopped'
}

# Who is refused

# ports_of NAME: on which something listens there.
ports_of() { in_host "$1" ss -Hltn | awk '{ sub(/.*:/, "", $4); print $4 }' | sort -un; }

show_stranger() {
  local name port targets=""
  for name in "${RAY_HOSTS[@]}"; do
    for port in $(ports_of "$name"); do targets+="$(address "$name") $port"$'\n'; done
  done
  judge "every listening port of three hosts, to a stranger" \
    "$(wire stranger scan <<<"${targets%$'\n'}" | sed 's/ of [0-9]* / of them /')" "0 of them open"
  note "$(grep -c . <<<"$targets") ports were asked"
}

# A second user of a Ray host, on the ports of the plan: local ones and members'.
show_other_user() {
  local target
  for target in "head $GCS_PORT" "worker2 6701" "worker1 6701"; do
    # shellcheck disable=SC2086
    judge "another local user of worker1 to ${target/ /:}" "$(connect_as "$OTHER_UID" $target)" refused
    # shellcheck disable=SC2086
    judge "Ray's user of worker1 to ${target/ /:}" "$(connect_as "$RAY_UID" $target)" open
  done
}

connect_as() { as_user worker1 "$1" python "$STATE/lib/wire.py" connect "$(address "$2")" "$3"; }

# enrol_spares: members whose hosts have no agent, table or tunnel: what stands there speaks the wire itself.
enrol_spares() {
  create_token spares --cluster "$CLUSTER" --role worker --uses 2
  create_token other --cluster other --role worker
  enrol spare spares
  enrol spare2 spares
  enrol other other
  SPARE_ENDS=$((SECONDS + LEAF_LIFE))
}

# dial_worker1 HOST LEAF_FILE [KEY]: from that host, as a node would.
dial_worker1() {
  local leaf=$2
  wire "$1" dial "$(address worker1)" "$FLOW_PORT" "$leaf" "${leaf%.crt}.key" "$(dirname "$(current_leaf spare)")/ca.crt"
}

dials() { [ "$(dial_worker1 "$1" "$2")" = connected ]; }

# judge_refused CHECK REASON HOST LEAF: worker1 refuses and counts it under that word.
judge_refused() {
  local before said after
  before=$(refusals worker1 "$2")
  said=$(dial_worker1 "$3" "$4")
  after=$(refusals worker1 "$2")
  if [ "$said" != connected ] && ((after > before)); then held "$1" "$said; counted as $2"; else
    broke "$1" "$said; worker1 counted $((after - before)) as $2"
  fi
}

# While the leaves that the spares got at enrolment last.
show_wrong_leaves() {
  local mine theirs
  mine=$(current_leaf spare)
  theirs=$(current_leaf worker1)
  echo_up worker1
  wait_for 30 "worker1 to know the spare" dials spare "$mine" || true
  judge "a member's own leaf from its address" "$(dial_worker1 spare "$mine")" connected
  judge_refused "another member's leaf from its address" address_mismatch spare "$(current_leaf worker2)"
  judge_refused "worker1's own leaf from another address" address_mismatch spare "$theirs"
  make_wrong_ca
  judge_refused "a leaf of the same names from another CA" unknown_issuer spare "$STATE/wrong/tls.crt"
  judge_refused "a leaf of another cluster" wrong_cluster spare "$(current_leaf other)"
  judge_refused "no leaf" no_certificate spare none
  judge "a port that members may not reach" "$(wire spare dial "$(address worker1)" 22 "$mine" "${mine%.crt}.key" "${mine%/*}/ca.crt")" "answer port_closed"
  show_thief_serves "$theirs"
  show_revoked_leaf
}

# The other way: at the spare's address a server with worker1's leaf, and Ray's user of the head dials it.
show_thief_serves() {
  local before after said
  wire spare serve "$(address spare)" "$1" "${1%.crt}.key" < <(until_file "$STATE/thief-ends") >"$LOGS/thief.log" 2>&1 &
  wait_for 10 "the thief" grep -qs ready "$LOGS/thief.log"
  before=$(refusals head address_mismatch)
  said=$(as_user head "$RAY_UID" python "$STATE/lib/wire.py" connect "$(address spare)" "$FLOW_PORT")
  after=$(refusals head address_mismatch)
  : >"$STATE/thief-ends"
  if [ "$said" != open ] && ((after > before)) && ! grep -q header "$LOGS/thief.log"; then
    held "worker1's leaf at another address, dialled" "$said; counted as address_mismatch; the thief: $(grep -m 1 knock "$LOGS/thief.log")"
  else
    broke "worker1's leaf at another address, dialled" "$said; the head counted $((after - before)); the thief: $(paste -sd ';' "$LOGS/thief.log")"
  fi
}

show_revoked_leaf() {
  local leaf
  leaf=$(current_leaf spare2)
  judge "a leaf that is to be revoked" "$(dial_worker1 spare2 "$leaf")" connected
  run 60 "$LOGS/ca-admin.log" "cert revoke" ca_admin cert revoke --cluster "$CLUSTER" "$(serial "$leaf")" --reason "a test" --yes
  wait_for 30 "worker1 to hear of it" refuses_revoked "$leaf" || true
  judge_refused "a revoked leaf" revoked spare2 "$leaf"
}

refuses_revoked() { ! dials spare2 "$1"; }

# Once the leaf of the spare is over.
show_expired_leaf() {
  local left=$((SPARE_ENDS + 2 - SECONDS))
  ((left <= 0)) || sleep "$left"
  judge_refused "an expired leaf" expired spare "$(current_leaf spare)"
}

# A certificate authority of our own that names itself like the real one, with the spare's names.
make_wrong_ca() {
  local dir=$STATE/wrong names
  mkdir -p "$dir"
  names="URI:$(openssl x509 -noout -ext subjectAltName -in "$(current_leaf spare)" | grep -o 'URI:[^,]*' | cut -d : -f 2-),IP:$(address spare)"
  {
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1 -keyout "$dir/ca.key" -out "$dir/ca.crt" -subj "/CN=wrong"
    openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout "$dir/tls.key" -out "$dir/tls.csr" -subj "/"
    openssl x509 -req -in "$dir/tls.csr" -CA "$dir/ca.crt" -CAkey "$dir/ca.key" -days 1 -out "$dir/tls.crt" \
      -extfile <(printf 'subjectAltName=critical,%s\nextendedKeyUsage=clientAuth,serverAuth\nkeyUsage=critical,digitalSignature\nbasicConstraints=critical,CA:FALSE\n' "$names")
  } >>"$LOGS/openssl.log" 2>&1
}

# Flows of our own

# echo_up NAME...: a listener beside Ray's on the flow port.
echo_up() {
  local name
  for name in "$@"; do
    [ ! -e "$STATE/echo-$name" ] || continue
    : >"$STATE/echo-$name"
    as_ray "$name" python "$STATE/lib/host.py" listen "$FLOW_PORT" < <(until_file "$STATE/echo-ends") >"$LOGS/listen-$name" 2>&1 &
    wait_for 10 "the listener on $name" grep -qs ready "$LOGS/listen-$name"
  done
}

# The file, or the stage's end.
until_file() { until [ -e "$1" ] || [ ! -d "$STATE/hosts" ]; do sleep 0.1; done; }

# stream_up FROM TO: numbers, each 5 ms, echoed.
stream_up() {
  local log=$LOGS/stream-$1-$2
  rm -f "$STATE/streams-end"
  as_ray "$1" python "$STATE/lib/host.py" stream "$(address "$2")" "$FLOW_PORT" < <(until_file "$STATE/streams-end") >"$log" 2>&1 &
  wait_for 10 "the flow from $1 to $2" grep -qs ready "$log"
}

# streams_last BEGAN NAME-NAME...: ms from BEGAN to the last number that came back on any of them.
streams_last() {
  local began=$1 name
  shift
  : >"$STATE/streams-end"
  for name in "$@"; do wait_for 20 "the end of the flow $name" grep -q '"back"' "$LOGS/stream-$name"; done
  "$PYTHON" - "$began" "${@/#/$LOGS/stream-}" <<'PY'
import json, sys
flows = [json.loads(open(path).read().splitlines()[-1]) for path in sys.argv[2:]]
if not all(flow["back"] > 3 and flow["in_order"] for flow in flows):
    raise SystemExit("a flow did not run")
print(max(0, round((max(flow["last"] for flow in flows) - float(sys.argv[1])) * 1000)))
PY
}

# Rotation

leaves_made() { ca_admin -o json cert list --cluster "$CLUSTER" | grep -c '"serial"'; }

flows_cut() {
  local name cut=0
  for name in "${RAY_HOSTS[@]}"; do cut=$((cut + $(tunnel_says "$name" flows_cut))); done
  printf '%d' "$cut"
}

# oldest_flow: the youngest of the three hosts' oldest flows, in seconds.
oldest_flow() {
  local name
  for name in "${RAY_HOSTS[@]}"; do tunnel_says "$name" oldest_flow_seconds; done | sort -n | head -n 1
}

# show_rotation SECONDS: the load went on through so many seconds of leaf lives.
show_rotation() {
  local oldest
  wait_for "$1" "the load to run for $1 s" load_is_older "$1"
  oldest=$(oldest_flow)
  judge "the load through $(($(load age) / LEAF_LIFE)) leaf lives, $(leaves_made) leaves made" "$(load failed "${BROKEN[@]}")" "0 failed"
  judge "flows that a tunnel cut meanwhile" "$(flows_cut)" 0
  held "what went well" "$(load counts)"
  if ((oldest > $1 - 15)); then held "oldest flow of each host, at least" "$oldest s, leaves last $LEAF_LIFE s"; else broke "oldest flow" "$oldest s"; fi
}

load_is_older() { (($(load age) >= $1)); }

# Crash, handover

# kill_tunnel NAME: kill -9 under load, of those that drain too; no node and no actor is lost, and the load goes on.
kill_tunnel() {
  local name=$1 old began ms
  mapfile -t old < <(tunnel_pids "$name")
  began=$(now)
  kill -KILL "${old[@]}"
  wait_for 30 "a new ray-tunnel on $name" another_tunnel "$name" "${old[@]}"
  ms=$("$PYTHON" -c 'import sys, time; print(round((time.time() - float(sys.argv[1])) * 1000))' "$began")
  if ((ms < RESTART_MS_MAX)); then held "ray-tunnel of $name after kill -9" "takes flows again after $ms ms"; else broke "ray-tunnel of $name after kill -9" "$ms ms"; fi
  sleep "$CRASH_SECONDS"
  BROKEN+=(--except "$began-$(after "$began" "$CRASH_SECONDS")")
  held "work that failed in the $CRASH_SECONDS s after it" "$(load failed --since "$began" | cut -c 1-160)"
  sleep 3
  judge "nodes and actors after kill -9 on $name" "$(load kept --since "$began")" "0 of 3 nodes lost, 0 actor calls answered by another process"
}

after() { "$PYTHON" -c 'import sys; print(float(sys.argv[1]) + float(sys.argv[2]))' "$1" "$2"; }

# another_tunnel NAME PID...: one that is none of these takes flows.
another_tunnel() {
  local name=$1 pid
  shift
  for pid in $(tunnel_pids "$name"); do
    [[ " $* " == *" $pid "* ]] || { tunnel_ready "$name"; return; }
  done
  return 1
}

# hand_over NAME: a new process takes the sockets, the old one keeps its flows.
hand_over() {
  local name=$1 old
  old=$(tunnel_pids "$name")
  in_host "$name" node-agent tunnel handover --socket "$(agent_socket "$name")" >>"$LOGS/handover.log" 2>&1 || broke "handover on $name" "see $LOGS/handover.log"
  wait_for 30 "a second ray-tunnel on $name" two_tunnels "$name" "$old" || true
  held "handover on $name" "$(tunnel_pids "$name" | wc -l) processes, the old one with its flows"
}

two_tunnels() {
  local pids
  pids=$(tunnel_pids "$1")
  grep -qx "$2" <<<"$pids" && [ "$(wc -l <<<"$pids")" -ge 2 ] && tunnel_ready "$1"
}

# show_handover SECONDS: on all hosts in turn; then so long nothing fails.
show_handover() {
  local name began
  began=$(now)
  for name in "${RAY_HOSTS[@]}"; do hand_over "$name"; done
  sleep "$1"
  judge "the load through handover on all hosts" "$(load failed --since "$began")" "0 failed"
  judge "nodes and actors through it" "$(load kept --since "$began")" "0 of 3 nodes lost, 0 actor calls answered by another process"
}

# Revocation

# revoke_under_load NAME: numbered flows of its own both ways, under the load; then how soon Ray calls the node dead.
revoke_under_load() {
  local name=$1 peer=worker1 node began at ms
  node=$(node_name "$name")
  echo_up "$name" "$peer"
  stream_up "$name" "$peer"
  stream_up "$peer" "$name"
  sleep 1
  at=$(now)
  began=$(monotonic)
  # Members without an agent acknowledge nothing: its exit code is theirs.
  ca_admin node revoke "$node" --cluster "$CLUSTER" --reason "a test" --yes >>"$LOGS/revoke.log" 2>&1 || true
  sleep 1
  judge "peers with an agent that cut $name off" "$(grep -c 'ms, isolation enforce.* flows of its tunnel cut' "$LOGS/revoke.log")" 2
  ms=$(streams_last "$began" "$name-$peer" "$peer-$name")
  judge_cut "last byte on live flows of revoked $name" "$ms"
  BROKEN+=(--except "$at-$(after "$at" 100000)")
  wait_for 90 "Ray to call $name dead" is_dead "$name" "$at" || true
  held "Ray calls the node dead" "$(load dead "$name" "$at") s after the command"
}

judge_cut() {
  if [[ $2 =~ ^[0-9]+$ ]] && (($2 < CUT_MS_MAX)); then held "$1" "$2 ms after the command began"; else broke "$1" "$2 ms"; fi
}

is_dead() { [ "$(load dead "$1" "$2")" != "not yet" ]; }

conclude() {
  step_end
  table
  printf '\n%d s in all, load average %s; ' "$SECONDS" "$(load_average)"
  ((CHECKS_BROKEN == 0)) || { printf '%d of %d checks FAILED. Logs: %s\n' "$CHECKS_BROKEN" "${#CHECKS[@]}" "$LOGS"; exit 1; }
  printf 'all %d checks held.\n' "${#CHECKS[@]}"
}
