# shellcheck shell=bash
# The certificate side of the quickstart: CA, clusters, bootstrap tokens, agents. Sourced after hosts.sh.

CA_DIR=$(host_dir ca)
ADMIN_SOCKET=$CA_DIR/admin.sock
TRUST_DOMAIN=demo.internal
# Longest job the demo cluster is made for.
MAX_JOB=20d

# Two kinds of folder on each Ray host: the agent's own, closed, and the TLS files Ray reads.
agent_state() { printf '%s/agent\n' "$(host_dir "$1")"; }
tls_dir() { printf '%s/tls\n' "$(host_dir "$1")"; }
agent_socket() { printf '%s/agent.sock\n' "$(host_dir "$1")"; }

ca_admin() { "$STATE/bin/ca-admin" --socket "$ADMIN_SOCKET" "$@"; }

# agent NAME VERB [OPTION...]: asks the host's agent, as root on that host.
agent() {
  local name=$1 verb=$2
  shift 2
  in_host "$name" node-agent "$verb" --socket "$(agent_socket "$name")" "$@"
}

# with_leaf NAME COMMAND...: as Ray's uid on that host, with the TLS files and the token of its agent.
with_leaf() {
  local name=$1
  shift
  as_ray "$name" node-agent exec --socket "$(agent_socket "$name")" -- \
    env "RAY_ADDRESS=$(address head):6379" "$@"
}

start_ca() {
  install -d -m 0700 "$CA_DIR/join"
  run 30 "$LOGS/ca-init.log" "ca-server init" in_host ca ca-server init --dir "$CA_DIR/data" \
    --trust-domain "$TRUST_DOMAIN" --kek-file "$CA_DIR/kek"
  cat >"$CA_DIR/ca.toml" <<TOML
kek_file = "$CA_DIR/kek"
enrollment_listen = "$(address ca):7443"
node_listen = "$(address ca):7444"
http_listen = "127.0.0.1:7446"
admin_socket = "$ADMIN_SOCKET"
enrollment_endpoints = ["$(address ca):7443"]
node_endpoints = ["$(address ca):7444"]
${CA_SETTINGS:-}
TOML
  daemon ca "$LOGS/ca-server.log" ca-server serve --dir "$CA_DIR/data" --config "$CA_DIR/ca.toml"
  wait_for 30 "the CA to answer on $ADMIN_SOCKET" ca_answers
}

ca_answers() { ca_admin cluster list >/dev/null 2>&1; }

create_cluster() {
  run 30 "$LOGS/ca-admin.log" "cluster create $1" ca_admin cluster create "$1" --max-job "$MAX_JOB"
}

# create_token JOIN_NAME OPTION...: the join file goes to the CA host's own folder first.
create_token() {
  local join=$CA_DIR/join/$1
  shift
  run 30 "$LOGS/ca-admin.log" "token create" ca_admin token create --out "$join" "$@"
}

# enrol NAME JOIN_NAME [OPTION...]: brings the join file to the host, as scp would, and spends a use of it. ENROL_AS is
# the node's name where it is not the host's.
enrol() {
  local name=$1 join
  join=$(host_dir "$name")/join
  install -m 0600 "$CA_DIR/join/$2" "$join"
  shift 2
  run 90 "$LOGS/agent-$name.log" "the enrolment of $name" in_host "$name" node-agent enroll --join "$join" \
    --name "${ENROL_AS:-$name}" --state-dir "$(agent_state "$name")" --tls-dir "$(tls_dir "$name")" --ray-group "$RAY_GID" "$@"
}

start_agent() {
  local name=$1
  daemon "$name" "$LOGS/agent-$name.log" node-agent run --state-dir "$(agent_state "$name")" \
    --tls-dir "$(tls_dir "$name")" --socket "$(agent_socket "$name")" --ray-uid "$RAY_UID" --ray-group "$RAY_GID"
  wait_for 30 "the agent of $name" agent_answers "$name"
}

agent_answers() { agent "$1" status >/dev/null 2>&1; }

# current_leaf NAME: the certificate file of the host's newest key folder, as a real path.
current_leaf() { readlink -f "$(tls_dir "$1")/current/tls.crt"; }

# serial CERTIFICATE_FILE: upper-case hex, as openssl prints it.
serial() { openssl x509 -noout -serial -in "$1" | sed 's/^serial=//'; }

# node_name NAME: what the CA calls the host, from the URI in its leaf.
node_name() {
  openssl x509 -noout -ext subjectAltName -in "$(current_leaf "$1")" | grep -o 'URI:[^,]*' | sed 's:.*/::'
}
