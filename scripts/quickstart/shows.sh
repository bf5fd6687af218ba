# shellcheck shell=bash
# What the quickstart shows, each as a line of the table: a job, refusals, a renewal, a revocation.
# Sourced after ray.sh.

# Seconds a renewal may take until a new worker process serves it on every host.
RENEWAL_SEEN_MAX=60

show_job() {
  start_job
  wait_for 180 "the job's first results" job_wrote '"phase": "shown"'
  local name second=${RAY_HOSTS[1]:-${RAY_HOSTS[0]}} last=${RAY_HOSTS[-1]}
  for name in "${RAY_HOSTS[@]}"; do
    judge "a task on $name" "$(job_field task "$name" ip)" "$(address "$name")"
  done
  held "an actor on $second" "answered $(grep -c '"kind": "actor"' "$JOB_LOG") calls so far"
  [ "$second" = "$last" ] || held "100 MB from $second to $last" "$(job_field object "$last" seconds) s"
}

# job_field KIND HOST FIELD: from the newest record that went well.
job_field() {
  "$VENV/bin/python" -c '
import json, sys
path, kind, host, field = sys.argv[1:]
records = [json.loads(line) for line in open(path) if line.endswith("\n")]
records = [r for r in records if (r.get("kind"), r.get("host"), r.get("outcome")) == (kind, host, "ok")]
seen = {**records[-1], **(records[-1]["seen"] if isinstance(records[-1]["seen"], dict) else {})} if records else {}
print(seen.get(field, "nothing"))' "$JOB_LOG" "$@"
}

job_has() { [ "$(job_field "$1" "$2" pid)" != nothing ]; }

# The uids of Ray's processes in the three hosts.
ray_uids() {
  local name pid
  for name in "${RAY_HOSTS[@]}"; do
    for pid in $(ray_pids "$name"); do
      awk '$1 == "Uid:" { print "uid " $2 }' "/proc/$pid/status" 2>/dev/null
    done
  done | sort -u | paste -sd ' '
}

# Everything called raylet, gcs_server or ray:: on a host.
ray_pids() {
  local pid
  for pid in $(host_pids "$1"); do
    case $(tr '\0' ' ' 2>/dev/null <"/proc/$pid/cmdline") in
      *raylet* | *gcs_server* | ray::*) printf '%s\n' "$pid" ;;
    esac
  done
}

# knock NAME [CERTIFICATE KEY]: how GCS answers that host; `settings`, `refused` or `silent`, and why.
knock() {
  local name=$1 client=()
  [ $# = 1 ] || client=(--cert "$2" --key "$3")
  in_host "$name" python "$STATE/lib/probe.py" byte "$(address head)" "$GCS_PORT" "${client[@]}"
}

judge_knock() {
  local check=$1 wanted=$2 answer
  shift 2
  answer=$(knock "$@") || answer="no answer: the probe failed"
  if [ "${answer%% *}" = "$wanted" ]; then held "$check" "$answer"; else broke "$check" "$answer"; fi
}

show_refusals() {
  local leaf
  judge "Ray runs as" "$(ray_uids)" "uid $RAY_UID"
  leaf=$(current_leaf worker1)
  judge_knock "GCS answers a member" settings worker1 "$leaf" "${leaf%.crt}.key"
  judge_knock "GCS to a host without a certificate" refused stranger
  judge_knock "GCS to a thief of a member's leaf: let in, as expected, by TLS alone" settings stranger "$leaf" "${leaf%.crt}.key"
  leaf=$(current_leaf other)
  judge "the leaf of a node of another cluster" "$(verified "$leaf")" "valid under its own root"
  judge_knock "GCS to a node of another cluster" refused other "$leaf" "${leaf%.crt}.key"
  show_http_ports
  show_two_keys
}

# verified LEAF: judged by OpenSSL against the roots in its own key folder.
verified() {
  if openssl verify -x509_strict -CAfile "${1%/*}/ca.crt" -untrusted "$1" "$1" >>"$LOGS/openssl.log" 2>&1; then
    printf 'valid under its own root\n'
  else
    printf 'refused by openssl verify: see %s\n' "$LOGS/openssl.log"
  fi
}

# Ray's uid reads its leaf key, and nothing of what the agent keeps for itself.
show_two_keys() {
  local leaf secrets readable file
  leaf=$(current_leaf head)
  judge "Ray's uid reads the leaf key" "$(read_by_ray "${leaf%.crt}.key")" "yes"
  mapfile -t secrets < <(grep -rl -- 'PRIVATE KEY' "$(agent_state head)")
  readable=0
  for file in "${secrets[@]}"; do
    [ "$(read_by_ray "$file")" = no ] || readable=$((readable + 1))
  done
  judge "the agent's own keys Ray's uid reads" "$readable of ${#secrets[@]}" "0 of $((${#secrets[@]} > 0 ? ${#secrets[@]} : 1))"
}

read_by_ray() {
  if as_ray head cat "$1" >/dev/null 2>&1; then printf 'yes\n'; else printf 'no\n'; fi
}

show_renewal() {
  local name
  declare -A before
  for name in "${RAY_HOSTS[@]}"; do
    wait_for 60 "a new worker process on $name" job_has fresh "$name"
    before[$name]=$(serial "$(job_field fresh "$name" leaf)")
    judge "new worker process on $name, before" "$(job_field fresh "$name" served_serial)" "${before[$name]}"
  done
  for name in "${RAY_HOSTS[@]}"; do
    run 60 "$LOGS/renew.log" "node-agent renew on $name" agent "$name" renew
  done
  for name in "${RAY_HOSTS[@]}"; do
    wait_for "$RENEWAL_SEEN_MAX" "a new worker process on $name to serve the renewed leaf" \
      serves_another "$name" "${before[$name]}" || true
    judge "new worker process on $name, after" "$(job_field fresh "$name" served_serial)" \
      "$(renewed_serial "$name" "${before[$name]}")"
  done
  stop_job || broke "the end of the job" "not in order: see $LOGS/job.log"
  judge "the job through the renewal" \
    "$(job_count failed) failed, $(job_count retried) retried" "0 failed, 0 retried"
  held "tasks and calls that went well" "$(job_count ok)"
}

# The serial in the key folder that Ray was given, if it is not the old one.
renewed_serial() {
  local now
  now=$(serial "$(job_field fresh "$1" leaf)")
  if [ "$now" = "$2" ]; then printf 'another than %s\n' "$2"; else printf '%s\n' "$now"; fi
}

serves_another() { [ "$(job_field fresh "$1" served_serial)" != "$2" ]; }

# revoke NAME: what the CA's operator types, with what each peer answers and how soon.
revoke() {
  local node more=() code=0
  node=$(node_name "$1")
  [ "$1" != head ] || more=(--confirm-head "$node")
  ca_admin node revoke "$node" --cluster demo --reason "quickstart: shows a revocation" --yes "${more[@]}" >"$LOGS/revoke.log" 2>&1 || code=$?
  sed 's/^/   | /' "$LOGS/revoke.log"
  judge "revocation of $node" "exit code $code" "exit code 0"
}

# show_revocation NAME: what it means for the node that was revoked.
show_revocation() {
  local name code=0 answer
  name=$(node_name "$1")
  answer=$(agent "$1" renew 2>&1) || code=$?
  printf '%s\n' "$answer" >>"$LOGS/renew.log"
  judge "renewal of revoked $name" "exit code $code, reason $(grep -o -w -m 1 REVOKED <<<"$answer" || printf 'none')" \
    "exit code 2, reason REVOKED"
  wait_for 30 "the agent to stop Ray" no_ray_on "$1" || true
  judge "Ray processes on revoked $name, which its agent stops" "$(ray_pids "$1" | wc -l)" "0"
}

no_ray_on() { [ -z "$(ray_pids "$1")" ]; }

# Beyond the four points: what only a real Ray can prove.
show_more() {
  show_ray_client
  show_identity_at_ray
  show_shadowray
}

# Ray Client from a host of the network that is no Ray node: a driver enrolled with --once, which keeps no identity.
show_ray_client() {
  local answer
  create_token driver --cluster demo --role driver
  enrol driver driver --role driver --once
  answer=$(ray_client_task) || true
  # Ray's proxy forks while gRPC works, and what it forked dies of that now and then: gRPC's own check says so there,
  # whatever the client is told.
  if grep -qs 'Check failed: next_worker->state == KICKED' "$(session_logs head)"/ray_client_server*.err; then
    note "Ray's proxy lost the server it forked for Ray Client; once more"
    answer=$(ray_client_task) || true
  fi
  if [[ $answer == "ran on $NET."* ]]; then
    held "Ray Client from a --once driver" "its task $answer"
  else
    broke "Ray Client from a --once driver" "${answer:-no answer: see $LOGS/client.log}"
  fi
  judge "keys a --once driver keeps for itself" \
    "$(grep -rl -- 'PRIVATE KEY' "$(agent_state driver)" 2>/dev/null | wc -l)" "0"
}

ray_client_task() {
  as_ray driver node-agent exec --env-file "$(tls_dir driver)/ray.env" -- \
    python "$STATE/lib/client.py" "ray://$HEAD_NAME:$RAY_CLIENT_PORT" 2>>"$LOGS/client.log"
}

# The agent's identity opens no Ray port: another root.
show_identity_at_ray() {
  local identity
  identity=$(agent_state worker1)/identity.pem
  judge_knock "GCS to an agent identity" refused worker1 "$identity" "$identity"
}
