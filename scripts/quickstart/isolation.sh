# shellcheck shell=bash
# Isolation in the quickstart: audit, then enforce, under the running job; whom the network refuses; how soon
# a revocation cuts; and what Ray does without it. Sourced after shows.sh.

ADMIN_RANGE=$(address admin)/32
SCRAPER_RANGE=$(address scraper)/32
DASHBOARD_PORT=8265
RUNTIME_ENV_PORT=6703
METRICS_PORT=6706
# A port of the plan that Ray does not come to, for a flow of our own.
FLOW_PORT=10100
# How long the running job is watched under audit.
AUDIT_SECONDS=3
# A revocation, to the last packet; far above what is seen.
CUT_MS_MAX=5000

# set_isolation CLUSTER MODE HOST...: as an operator does; returns once it is in force on each host.
set_isolation() {
  local cluster=$1 mode=$2 name
  shift 2
  run 30 "$LOGS/ca-admin.log" "cluster set $cluster" ca_admin cluster set "$cluster" "isolation=$mode" --yes
  for name in "$@"; do
    wait_for 60 "isolation=$mode on $name" is_in_force "$name" "$mode" || true
    judge "isolation on $name" "$(in_force "$name")" "$mode"
  done
}

is_in_force() { [ "$(in_force "$1")" = "$2" ]; }

# in_force NAME: what the agent says of its table.
in_force() { agent_field "$1" isolation in_force; }

# agent_field NAME FIELD...: out of what status says.
agent_field() {
  local name=$1
  shift
  agent "$name" status -o json | "$VENV/bin/python" -c '
import json, sys
seen = json.load(sys.stdin)
for field in sys.argv[1:]:
    seen = (seen or {}).get(field)
print(seen)' "$@"
}

# refused_packets: of each Ray host, as its kernel counted.
refused_packets() {
  local name counted=()
  for name in "${RAY_HOSTS[@]}"; do counted+=("$name $(packets_of "$name" raymtls_demo refused)"); done
  printf '%s' "${counted[0]}"
  printf ', %s' "${counted[@]:1}"
}

# packets_of NAME TABLE COUNTER
packets_of() { in_host "$1" nft list counter inet "$2" "$3" | grep -o 'packets [0-9]*' | cut -d ' ' -f 2; }

none_refused() { printf '%s 0' "${RAY_HOSTS[0]}"; printf ', %s 0' "${RAY_HOSTS[@]:1}"; }

# The job runs all the while. Nothing that Ray needs may be refused.
show_isolation() {
  set_isolation demo audit "${RAY_HOSTS[@]}"
  sleep "$AUDIT_SECONDS"
  judge "packets audit would refuse, under the job" "$(refused_packets)" "$(none_refused)"
  set_isolation demo enforce "${RAY_HOSTS[@]}"
  submit_job
  judge "packets refused, under both jobs" "$(refused_packets)" "$(none_refused)"
}

# `ray job submit` from the admin's host, which is no Ray node: over the dashboard, with Ray's token alone.
# What it sends along every node fetches (a runtime environment); it runs tasks on all hosts, an actor, a large object.
submit_job() {
  local answer name second=${RAY_HOSTS[1]} last=${RAY_HOSTS[-1]} token
  token=$(host_dir admin)/home/ray-token
  install -m 0400 -o "$RAY_UID" -g "$RAY_GID" "$(token_file head)" "$token"
  answer=$(as_ray admin env RAY_AUTH_MODE=token "RAY_AUTH_TOKEN_PATH=$token" timeout 120 \
    ray job submit --address "http://$(address head):$DASHBOARD_PORT" --working-dir "$STATE/lib" -- \
    python job.py --show-only --hosts "$(IFS=,; printf '%s' "${RAY_HOSTS[*]}")" 2>&1) || true
  printf '%s\n' "$answer" >>"$LOGS/job-submit.log"
  for name in "${RAY_HOSTS[@]}"; do
    judge "a submitted task on $name" "$(grep -o "a task ran on $name ([0-9.]*)" <<<"$answer")" "a task ran on $name ($(address "$name"))"
  done
  judge "a submitted actor on $second" "$(grep -o "an actor on $second counted to 3" <<<"$answer")" "an actor on $second counted to 3"
  judge "a submitted object to $last" "$(grep -o "100 MB moved from $second to $last" <<<"$answer")" "100 MB moved from $second to $last"
}

token_file() { sed -n 's/^RAY_AUTH_TOKEN_PATH=//p' "$(tls_dir "$1")/ray.env" | tr -d \"\'; }

# What TLS and the token refuse by themselves, while the network lets everybody come near.
show_http_ports() {
  judge "Jobs API of the head, without the token" "$(status_of stranger "http://$(address head):$DASHBOARD_PORT/api/jobs/")" "401"
  judge "Jobs API of a worker, without the token" \
    "$(status_of stranger "http://$(address worker1):$AGENT_HTTP_PORT/api/job_agent/jobs/")" "401"
}

# status_of NAME URL: as that host sees it; `silent` where nothing comes back.
status_of() { in_host "$1" python "$STATE/lib/shadow.py" status "$2"; }

# Not the certificate decides here: nothing that these send is answered.
show_network_refusals() {
  local leaf
  leaf=$(current_leaf worker1)
  judge_knock "the network to a stranger" silent stranger
  judge_knock "the network to a stranger with a member's leaf" silent stranger "$leaf" "${leaf%.crt}.key"
  leaf=$(current_leaf other)
  judge_knock "the network to a node of another cluster" silent other "$leaf" "${leaf%.crt}.key"
  judge "dashboard to a stranger" "$(status_of stranger "http://$(address head):$DASHBOARD_PORT/api/jobs/")" silent
  judge "a worker's agent port to a stranger" "$(status_of stranger "http://$(address worker1):$AGENT_HTTP_PORT/api/job_agent/jobs/")" silent
  judge "runtime-environment agent to a member" "$(status_of worker1 "http://$(address worker2):$RUNTIME_ENV_PORT/")" silent
  judge "metrics to a member" "$(status_of worker1 "http://$(address head):$METRICS_PORT/metrics")" silent
  judge "metrics to the scraper" "$(status_of scraper "http://$(address head):$METRICS_PORT/metrics")" 200
  judge "dashboard to a member, without the token" "$(status_of worker1 "http://$(address head):$DASHBOARD_PORT/api/jobs/")" 401
  judge "dashboard to the admin, without the token" "$(status_of admin "http://$(address head):$DASHBOARD_PORT/api/jobs/")" 401
}

# Ray without isolation and without its token, on the cluster `other`: its own Jobs API runs what a stranger sends.
show_shadowray() {
  local name
  create_token other2 --cluster other --role worker
  enrol other2 other2
  start_agent other2
  run 30 "$LOGS/ca-admin.log" "cluster set other" ca_admin cluster set other ray-token=off --yes
  wait_for 30 "the token to be off on both hosts" token_is_off other other2
  start_other
  for name in other other2; do
    # Ray runs it on the head, wherever it was sent.
    judge "no isolation, no token: a stranger's job through $name" "$(stranger_job "$name")" "ran as uid $RAY_UID on other"
  done
  set_isolation other enforce other other2
  for name in other other2; do
    judge "isolation, no token: a stranger's job through $name" "$(stranger_job "$name")" silent
  done
  for name in other other2; do as_ray "$name" ray stop --force >>"$LOGS/ray-other.log" 2>&1 || true; done
}

token_is_off() {
  local name
  for name in "$@"; do [ "$(agent_field "$name" settings ray_token)" = False ] || return 1; done
}

# A head and a worker of the cluster `other`.
start_other() {
  run "$RAY_START_MAX" "$LOGS/ray-other.log" "the Ray head of other" start_ray other \
    --temp-dir=/tmp/ray --dashboard-host="$(address other)"
  run "$RAY_START_MAX" "$LOGS/ray-other.log" "the Ray worker of other" start_ray other2 --address="$(address other):$GCS_PORT"
}

# stranger_job NAME: to the dashboard of a head, to the agent of a worker.
stranger_job() {
  local url
  case $1 in
    other) url=http://$(address other):$DASHBOARD_PORT/api/jobs/ ;;
    *) url=http://$(address "$1"):$AGENT_HTTP_PORT/api/job_agent/jobs/ ;;
  esac
  in_host stranger python "$STATE/lib/shadow.py" job "$url"
}

# show_cut NAME: revokes the node while numbered flows run between it and a peer, both ways.
show_cut() {
  local name=$1 peer=worker1 began
  flow_up "$name" "$peer"
  sleep 1
  began=$("$VENV/bin/python" -c 'import time; print(time.monotonic())')
  revoke "$name"
  sleep 1
  flow_down
  judge_cut "its last packet to $peer" "$began" "$LOGS/flow-$peer"
  judge_cut "the last packet of its own" "$began" "$LOGS/flow-$name"
}

# flow_up NAME NAME: a listener on each, and a flow from each to the other.
flow_up() {
  local name other
  rm -f "$STATE/flows-end"
  for name in "$@"; do
    in_host "$name" python "$STATE/lib/host.py" listen "$FLOW_PORT" < <(until_flows_end) >"$LOGS/listen-$name" 2>&1 &
    wait_for 10 "the listener on $name" grep -qs ready "$LOGS/listen-$name"
  done
  for name in "$@"; do
    other=$1
    [ "$name" != "$1" ] || other=$2
    in_host "$name" python "$STATE/lib/host.py" stream "$(address "$other")" "$FLOW_PORT" < <(until_flows_end) >"$LOGS/flow-$name" 2>&1 &
    wait_for 10 "the flow of $name" grep -qs ready "$LOGS/flow-$name"
  done
}

until_flows_end() { until [ -e "$STATE/flows-end" ]; do sleep 0.1; done; }

flow_down() {
  : >"$STATE/flows-end"
  local name
  for name in "$LOGS"/flow-*; do wait_for 20 "the end of the flows" grep -q '"back"' "$name"; done
}

# judge_cut CHECK BEGAN FILE: when the last number came back, after the command's start.
judge_cut() {
  local check=$1 ms
  ms=$("$VENV/bin/python" -c '
import json, sys
flow = json.loads(open(sys.argv[2]).read().splitlines()[-1])
print(round((flow["last"] - float(sys.argv[1])) * 1000) if flow["back"] else "no packet at all")' "$2" "$3")
  if [[ $ms =~ ^-?[0-9]+$ ]] && ((ms < CUT_MS_MAX)); then held "$check" "$ms ms after the command began"; else broke "$check" "$ms ms"; fi
}
