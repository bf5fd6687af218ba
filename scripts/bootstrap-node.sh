#!/usr/bin/env bash
# Makes this machine a node of a Ray cluster with mutual TLS: installs node-agent, enrols, starts the
# agent, waits for the files, starts Ray through the agent and proves the node by a task on it. One file
# without companions: copy it to a node, or let Ray's cluster launcher, cloud-init or a Slurm prolog call
# it. Safe to run again at any time, also after it was killed. It makes no CA and no token.
set -euo pipefail
umask 022

# Longest waits, in seconds.
LOCK_MAX=300
FETCH_MAX=300
ENROL_MAX=90
AGENT_MAX=30
FILES_MAX=60
RAY_MAX=180
PROOF_MAX=60
STOP_MAX=15
# Largest archive and join file that are taken, in bytes.
ARCHIVE_LEN_MAX=536870912
JOIN_LEN_MAX=65536
# An agent log longer than this is set aside once, at the agent's next start.
LOG_LEN_MAX=16777216

FROM=""
SHA256=""
JOIN=""
JOIN_FD=""
KEEP_JOIN_FILE=no
ROLE=worker
NAME=""
ADDRESSES=()
DNS_NAMES=()
RAY_USER=ray
PASSED=()
PREFIX=/usr/local
STATE_DIR=/var/lib/ray-mtls/agent
TLS_DIR=/var/lib/ray-mtls/tls
SOCKET=/run/ray-mtls/agent.sock
LOG=/var/log/ray-mtls-agent.log
UNIT_DIR=/etc/systemd/system
PYTHON=""
WITH_RAY=yes
STAY=no
ACT=up
YES=no
KEEP_IDENTITY=no
DRY_RUN=no
RAY_COMMAND=()
WORK_IS_OURS=no

usage() {
  cat <<'TEXT'
usage: bootstrap-node.sh [OPTION...] -- ray start ...
       bootstrap-node.sh [OPTION...] --no-ray
       bootstrap-node.sh --uninstall [--yes] [--keep-identity] [OPTION...]

Makes this machine a node: installs node-agent, enrols, starts the agent, waits for the TLS files, starts
Ray as its own user through the agent, and proves the node by a task on it. As root. Run it again at any
time: what is done already is not done again. As Ray's user, with an agent running: starts and proves Ray.

  --from FILE|URL     where node-agent comes from: the program or a tar archive that holds it; a URL is
                      https. Without it the one in --prefix is taken
  --sha256 HEX        hash of that file; a URL needs one. Nothing is installed that does not match
  --join FILE         the join file, mode 0600; removed once it is used
  --join-fd N         the join file comes from file descriptor N
  --keep-join-file    leave the file of --join where it is
  --role ROLE         head, worker or driver (default worker)
  --name NAME         name of the node (default: the host's)
  --address IP        an address besides the one the CA sees; may be given again
  --dns NAME          a DNS name for the leaf; may be given again
  --ray-user USER     who runs Ray: a name, or UID:GID (default ray)
  --env NAME          a variable of this environment that Ray gets besides PATH, LANG, LC_*, TZ and RAY_*; may
                      be given again
  --state-dir DIR     the agent's own folder (default /var/lib/ray-mtls/agent)
  --tls-dir DIR       the folder Ray reads (default /var/lib/ray-mtls/tls)
  --socket PATH       the agent's socket (default /run/ray-mtls/agent.sock)
  --prefix DIR        node-agent goes to DIR/bin (default /usr/local)
  --log FILE          the agent's log where systemd does not run (default /var/log/ray-mtls-agent.log)
  --python PATH       the Python that has Ray (default: the one beside `ray`)
  --no-ray            stop once the files are there
  --stay              after the proof stay until Ray ends; on SIGTERM stop Ray (Slurm steps, containers)
  --uninstall         stop the agent, leave the cluster, remove what this script made
  --keep-identity     with --uninstall: do not leave the cluster, keep the folders of identity and keys
  --yes               do not ask
  --dry-run           say what would be done and change nothing; 78 if it can be seen that it would fail
  --help              this text

The word @ray-flags in Ray's command becomes the flags of the cluster's port plan (node-agent ray-flags).

examples
  bootstrap-node.sh --from https://files.example/node-agent.tar.gz --sha256 9f86d0... \
      --join /root/worker.join -- ray start --address=head.ray:6379 @ray-flags
  bootstrap-node.sh --from ./node-agent --join-fd 3 --role head --name head 3<head.join \
      -- /opt/ray/bin/ray start --head @ray-flags
  bootstrap-node.sh --uninstall --yes

Exit codes: 0 done, 1 failed, 2 refused by the CA, 64 usage, 78 configuration.
TEXT
}

main() {
  parse "$@"
  AGENT=$PREFIX/bin/node-agent
  WORK=$(dirname "$STATE_DIR")/bootstrap
  MADE=$WORK/made
  PIDFILE=$WORK/agent.pid
  BEGAN=$(now)
  trap on_exit EXIT
  trap 'exit 130' INT
  trap 'exit 143' TERM
  find_ray_user
  find_environment
  if [ "$DRY_RUN" = yes ]; then
    say_plan
  elif [ "$(id -u)" != 0 ]; then
    up_as_ray
  else
    open_work
    "$ACT"
  fi
}

# --- The command line -------------------------------------------------------------------------------

parse() {
  while [ $# -gt 0 ]; do
    case $1 in
      --keep-join-file) KEEP_JOIN_FILE=yes ;;
      --no-ray) WITH_RAY=no ;;
      --stay) STAY=yes ;;
      --uninstall) ACT=down ;;
      --keep-identity) KEEP_IDENTITY=yes ;;
      --yes) YES=yes ;;
      --dry-run) DRY_RUN=yes ;;
      -h | --help) usage; exit 0 ;;
      --) shift; RAY_COMMAND=("$@"); break ;;
      --*=*)
        set -- "${1%%=*}" "${1#*=}" "${@:2}"
        continue
        ;;
      --?*)
        [ $# -ge 2 ] || misuse "$1 wants a value, or is no option of this script"
        option "$1" "$2"
        shift
        ;;
      *) misuse "$1: Ray's command goes behind --" ;;
    esac
    shift
  done
  judge_options
}

option() {
  [ -n "$2" ] || misuse "$1 wants a value"
  case $1 in
    --from) FROM=$2 ;;
    --sha256) SHA256=${2,,} ;;
    --join) JOIN=$2 ;;
    --join-fd) JOIN_FD=$2 ;;
    --role) ROLE=$2 ;;
    --name) NAME=$2 ;;
    --address) ADDRESSES+=("$2") ;;
    --dns) DNS_NAMES+=("$2") ;;
    --ray-user) RAY_USER=$2 ;;
    --env) PASSED+=("$2") ;;
    --state-dir) STATE_DIR=$2 ;;
    --tls-dir) TLS_DIR=$2 ;;
    --socket) SOCKET=$2 ;;
    --prefix) PREFIX=$2 ;;
    --log) LOG=$2 ;;
    --python) PYTHON=$2 ;;
    *) misuse "$1 is no option of this script" ;;
  esac
}

judge_options() {
  local path word
  for path in "$STATE_DIR" "$TLS_DIR" "$SOCKET" "$PREFIX" "$LOG"; do
    [[ $path =~ ^/[A-Za-z0-9/._-]+$ ]] ||
      misuse "$path: folders are named from the root on, in letters, digits and /._- (systemd and sh read them)"
  done
  [ "$STATE_DIR" != "$TLS_DIR" ] || misuse "--state-dir and --tls-dir are two folders: Ray reads the second"
  [[ -z $SHA256 || $SHA256 =~ ^[0-9a-f]{64}$ ]] || misuse "--sha256: 64 hexadecimal digits"
  [[ -z $JOIN_FD || $JOIN_FD =~ ^[0-9]{1,4}$ ]] || misuse "--join-fd: the number of an open file descriptor"
  # 9 is the lock's, 255 is bash's own.
  [[ $JOIN_FD != 9 && $JOIN_FD != 255 ]] || misuse "--join-fd $JOIN_FD: this script's own descriptor; take another, 3 for example"
  for word in "${PASSED[@]}"; do
    [[ $word =~ ^[A-Za-z_][A-Za-z0-9_]*$ ]] || misuse "--env $word: the name of a variable alone, its value is taken from the environment"
  done
  [ -z "$JOIN" ] || [ -z "$JOIN_FD" ] || misuse "--join or --join-fd, not both"
  case $ROLE in head | worker | driver) ;; *) misuse "--role: head, worker or driver" ;; esac
  case $FROM in
    https://*) [ -n "$SHA256" ] || misuse "--from a URL needs --sha256: the hash of the file you mean" ;;
    *://*) misuse "--from $FROM: a URL must begin with https://" ;;
  esac
  [ "$ACT" = up ] || return 0
  [ ${#RAY_COMMAND[@]} = 0 ] || [ "$WITH_RAY" = yes ] || misuse "--no-ray or a command behind --, not both"
  [ ${#RAY_COMMAND[@]} != 0 ] || [ "$WITH_RAY" = no ] ||
    misuse "what starts Ray is missing: -- ray start ..., or say --no-ray"
  for word in "${RAY_COMMAND[@]}"; do
    [ "$word" != --block ] || misuse "ray start --block never returns: leave it out and give this script --stay"
  done
}

# find_ray_user: RAY_UID, RAY_GID, RAY_HOME, RAY_ACCOUNT, and which other groups it has: an account's own, for the devices
# they open.
find_ray_user() {
  local entry
  if [[ $RAY_USER =~ ^([0-9]+):([0-9]+)$ ]]; then
    RAY_UID=${BASH_REMATCH[1]} RAY_GID=${BASH_REMATCH[2]}
    entry=$(getent passwd "$RAY_UID" || true)
    RAY_HOME=$(cut -d: -f6 <<<"$entry")
  else
    entry=$(getent passwd "$RAY_USER") ||
      misconfigured "there is no user $RAY_USER on this host: useradd --system --create-home $RAY_USER, or name another with --ray-user"
    IFS=: read -r _ _ RAY_UID RAY_GID _ RAY_HOME _ <<<"$entry"
  fi
  RAY_HOME=${RAY_HOME:-/tmp}
  RAY_ACCOUNT=${entry%%:*}
  RAY_GROUPS=--clear-groups
  [ -z "$entry" ] || RAY_GROUPS=--init-groups
  [ "$RAY_UID" != 0 ] || note "Ray runs as root here: every Ray task can read the agent's identity key"
}

# --- The way up -------------------------------------------------------------------------------------

up() {
  need_ray_command
  keep_to_one_ray_user
  phase "node-agent" install_agent
  phase "enrolment" enrol
  phase "agent" start_agent
  phase "files" wait_for_files
  if [ "$WITH_RAY" = yes ]; then
    phase "Ray's own start" start_ray
    phase "proof by a task" prove
  fi
  say_times
  [ "$STAY" = no ] || stay
}

# Before a use of a token is spent.
need_ray_command() {
  [ "$WITH_RAY" = yes ] || return 0
  can_run "${RAY_COMMAND[0]}" || misconfigured "$(cannot_run)"
  find_python
}

cannot_run() {
  printf 'uid %s cannot run %s: ' "$RAY_UID" "${RAY_COMMAND[0]}"
  case ${RAY_COMMAND[0]} in
    */*) printf 'there is no such program, or that user cannot reach it or its interpreter: install Ray there, or open the folders above it\n' ;;
    *) printf 'it is in no folder of PATH that this user can reach (%s): give its full path, such as /opt/ray/bin/ray\n' "$PATH" ;;
  esac
}

# The agent gives its key folders to Ray's user of the last run: not while another user's Ray uses them.
keep_to_one_ray_user() {
  local before
  before=$(cat "$WORK/ray-user" 2>/dev/null || true)
  if [[ $before =~ ^[0-9]+$ && $before != "$RAY_UID" ]] && pgrep -u "$before" -x raylet >/dev/null; then
    misconfigured "Ray of uid $before runs here with this node's keys, and uid $RAY_UID would get them: end that Ray first, one user at a time on a node"
  fi
  printf '%s\n' "$RAY_UID" >"$WORK/ray-user.new"
  mv "$WORK/ray-user.new" "$WORK/ray-user"
}

# As Ray's user: root has made the node, a prolog for example.
up_as_ray() {
  [ "$ACT" = up ] || die "--uninstall needs root"
  if [ "$(id -u)" != "$RAY_UID" ] || ! agent_answers; then
    die "needs root: only as Ray's own user (--ray-user), with an agent that answers on $SOCKET, it goes on from there"
  fi
  need_ray_command
  find_work_as_ray
  WORK_IS_OURS=yes
  end_session
  phase "files" wait_for_files
  [ "$WITH_RAY" = no ] || { phase "Ray's own start" start_ray; phase "proof by a task" prove; }
  say_times
  [ "$STAY" = no ] || stay
}

# The folder that root made for this user, else one of the session, else one in /tmp, where somebody else may
# have taken the name. Not below the home folder, which hosts may share.
find_work_as_ray() {
  WORK=$(scratch)
  ! is_own_folder "$WORK" || return 0
  WORK=${XDG_RUNTIME_DIR:-/tmp}/ray-mtls-bootstrap-$RAY_UID
  mkdir -m 0700 "$WORK" 2>/dev/null || true
  is_own_folder "$WORK" ||
    misconfigured "$WORK must be a folder of this user, mode 0700: remove what is there, or run this script as root once"
}

is_own_folder() { [ "$(stat -c '%F %u %a' "$1" 2>/dev/null)" = "directory $RAY_UID 700" ]; }

scratch() { printf '%s/bootstrap-%s\n' "$(dirname "$SOCKET")" "$RAY_UID"; }

# Never through a link: root gives it away.
make_scratch() {
  local folder
  folder=$(scratch)
  remember scratch - "$folder"
  mkdir -m 0700 "$folder" 2>/dev/null || true
  [ -L "$folder" ] || [ ! -O "$folder" ] || chown -h "$RAY_UID:$RAY_GID" "$folder"
}

# open_work: this script's own folder, closed to others, and one run at a time.
open_work() {
  [ -d "$WORK" ] || make_work
  [ "$(stat -c '%F %u %a' "$WORK")" = "directory 0 700" ] ||
    misconfigured "$WORK must be a folder of root, mode 0700: it takes the join file of --join-fd"
  exec 9>>"$WORK/lock"
  wait_for "$LOCK_MAX" "another run of this script on this host (lock $WORK/lock)" flock -n 9 ||
    die "another run of this script on this host does not end: look at it with fuser $WORK/lock"
  [ "$WORK/lock" -ef /proc/self/fd/9 ] || die "another run has just removed this node: run again"
  WORK_IS_OURS=yes
  rm -f "$WORK"/*.new
  end_session
  # First of all, so that no program started from here has the descriptor.
  [ -z "$JOIN_FD" ] || take_join_from_descriptor
}

# The folders above it may be missing too. All of them come at once, by a rename, with the list that says so
# in them: no kill leaves one that nobody knows of.
make_work() {
  local first=$WORK above
  while above=$(dirname "$first") && [ ! -d "$above" ]; do first=$above; done
  rm -rf "$first.bootstrap-new"
  if [ "$ACT" = down ]; then
    note "there is nothing of this script here: no $WORK"
    exit 0
  fi
  mkdir -p "$first.bootstrap-new${WORK#"$first"}"
  chmod 0700 "$first.bootstrap-new${WORK#"$first"}"
  above=$(dirname "$WORK")
  while [[ $above/ == "$first"/* ]]; do
    printf 'folder - %s\n' "$above"
    above=$(dirname "$above")
  done | tac >"$first.bootstrap-new${WORK#"$first"}/made"
  mv -T "$first.bootstrap-new" "$first"
}

# A secret: from the descriptor into a closed folder, never through an argument or the environment. An
# empty one is no error on a host that is enrolled.
take_join_from_descriptor() {
  (umask 077 && head -c "$JOIN_LEN_MAX" <&"$JOIN_FD" >"$WORK/join.new") 2>/dev/null ||
    misconfigured "--join-fd $JOIN_FD: no such descriptor is open for reading"
  [ ! -s "$WORK/join.new" ] || { sync "$WORK/join.new" && mv "$WORK/join.new" "$WORK/join"; }
  eval "exec $JOIN_FD<&-"
}

# --- node-agent -------------------------------------------------------------------------------------

install_agent() {
  if [ -z "$FROM" ]; then
    [ -x "$AGENT" ] || misconfigured "there is no $AGENT: say where it comes from with --from FILE|URL"
    note "$("$AGENT" --version), as it is in $AGENT"
    return
  fi
  if [ -n "$SHA256" ] && [ "$(cat "$WORK/installed-from" 2>/dev/null)" = "$SHA256 $(hash_of "$AGENT")" ]; then
    note "$("$AGENT" --version) is installed already, from the file with that hash"
    return
  fi
  fetch "$WORK/archive.new"
  check_hash "$WORK/archive.new"
  unpack "$WORK/archive.new" "$WORK/node-agent.new"
  put_file "$WORK/node-agent.new" "$AGENT" 0755
  printf '%s %s\n' "$(hash_of "$WORK/archive.new")" "$(hash_of "$AGENT")" >"$WORK/installed-from.new"
  mv "$WORK/installed-from.new" "$WORK/installed-from"
  rm -f "$WORK/archive.new" "$WORK/node-agent.new"
  note "$("$AGENT" --version) in $AGENT"
}

# The copy is judged, not the original: nobody swaps it between hash and use.
fetch() {
  case $FROM in
    https://*)
      command -v curl >/dev/null || die "curl is missing: install it, or copy the file here and give --from FILE"
      note "fetching $FROM"
      curl -q --fail --silent --show-error --location --proto '=https' --proto-redir '=https' --tlsv1.2 \
        --connect-timeout 10 --max-time "$FETCH_MAX" --max-redirs 5 --retry 2 \
        --max-filesize "$ARCHIVE_LEN_MAX" --output "$1" -- "$FROM" 9>&- ||
        die "cannot fetch $FROM (limits: $FETCH_MAX s, $ARCHIVE_LEN_MAX bytes): try it with curl by hand"
      ;;
    *)
      [ -f "$FROM" ] || misconfigured "--from $FROM: there is no such file"
      (($(stat -L -c %s "$FROM") <= ARCHIVE_LEN_MAX)) || misconfigured "--from $FROM: longer than $ARCHIVE_LEN_MAX bytes"
      cp -- "$FROM" "$1"
      ;;
  esac
}

check_hash() {
  local seen
  [ -n "$SHA256" ] || return 0
  seen=$(hash_of "$1")
  [ "$seen" = "$SHA256" ] ||
    misconfigured "$FROM has SHA-256 $seen and not $SHA256: nothing was installed; get the right file, or the right hash"
}

hash_of() { if [ -f "$1" ]; then sha256sum <"$1" | cut -d' ' -f1; else printf 'none\n'; fi; }

# unpack ARCHIVE PROGRAM: the archive itself if it is a program, else its one member of that name. Only
# the content is taken out of the archive, no path, no owner, no link.
unpack() {
  local members
  if [ "$(head -c 4 "$1" | od -An -tx1 | tr -d ' \n')" = 7f454c46 ]; then
    cp "$1" "$2"
  else
    members=$(tar -tf "$1" 2>/dev/null | grep -E '(^|/)node-agent$') ||
      misconfigured "$FROM is neither a program nor a tar archive that holds node-agent"
    [ "$(wc -l <<<"$members")" = 1 ] || misconfigured "$FROM holds more than one node-agent: make an archive with one"
    tar -xOf "$1" -- "$members" | head -c "$ARCHIVE_LEN_MAX" >"$2" || misconfigured "$FROM: the archive is damaged"
  fi
  chmod 0755 "$2"
  "$2" --version 2>/dev/null | grep -q '^node-agent ' ||
    misconfigured "the node-agent of $FROM does not run here: it is for another system or a newer glibc"
}

# put_file SOURCE PLACE MODE: by a rename. What somebody else put there is not overwritten.
put_file() {
  local beside
  beside=$(dirname "$2")/.${2##*/}.bootstrap
  if [ -e "$2" ]; then
    [ "$(hash_of "$1")" != "$(hash_of "$2")" ] || return 0
    is_ours "$2" || misconfigured "$2 is there and this script did not put it there: move it away and run again"
  fi
  make_folder_for "$2"
  # Before the file, so that no kill leaves one behind that is not on the list.
  remember file "$(hash_of "$1")" "$2"
  rm -f "$beside"
  install -m "$3" "$1" "$beside"
  sync "$beside"
  mv -f "$beside" "$2"
}

# --- Enrolment --------------------------------------------------------------------------------------

# Asked on each run: node-agent knows an enrolled node, and what is left of an enrolment cut short.
enrol() {
  local join=$JOIN options=() extra code=0
  join=${join:-$WORK/join}
  [ -e "$join" ] || [ -e "$STATE_DIR/node.toml" ] ||
    misconfigured "this host is not enrolled, and there is no join file $JOIN: make one with \`ca-admin token create\` and give it with --join or --join-fd"
  for extra in "${ADDRESSES[@]}"; do options+=(--address "$extra"); done
  for extra in "${DNS_NAMES[@]}"; do options+=(--dns "$extra"); done
  [ -z "$NAME" ] || options+=(--name "$NAME")
  [ "$KEEP_JOIN_FILE" = no ] || options+=(--keep-join-file)
  [ -e "$STATE_DIR" ] || remember tree - "$STATE_DIR"
  [ -e "$TLS_DIR" ] || remember tree - "$TLS_DIR"
  make_folder_for "$STATE_DIR"
  make_folder_for "$TLS_DIR"
  wait_for "$ENROL_MAX" "an enrolment that a killed run left behind" state_is_free || true
  timeout --foreground -k 5 "$ENROL_MAX" "$AGENT" enroll --join "$join" --role "$ROLE" --state-dir "$STATE_DIR" \
    --tls-dir "$TLS_DIR" --ray-group "$RAY_GID" "${options[@]}" >"$WORK/enrolled.new" 2>"$WORK/enrol.log.new" \
    9>&- </dev/null || code=$?
  if ((code != 0)); then
    tail -n 5 "$WORK/enrol.log.new" >&2
    ((code != 124)) || warn "the enrolment took longer than $ENROL_MAX s: is the CA reachable from here?"
    exit "$((code == 124 || code == 137 ? 1 : code))"
  fi
  # The copy of --join-fd, where its token was not used.
  rm -f "$WORK/join"
  note "$(head -n 1 "$WORK/enrolled.new")"
  note "$(grep '^join file' "$WORK/enrolled.new")"
}

# Nobody works on the state folder, or the daemon does.
state_is_free() {
  [ ! -e "$STATE_DIR/lock" ] || [ -n "$(daemon_pid)" ] || under_systemd || flock -n "$STATE_DIR/lock" true 9>&-
}

# --- The agent --------------------------------------------------------------------------------------

under_systemd() { [ -d /run/systemd/system ]; }

start_agent() {
  if under_systemd; then start_unit; else start_daemon; fi
  wait_for "$AGENT_MAX" "the agent to answer on $SOCKET" agent_answers || {
    agent_log 15 >&2
    die "the agent does not answer on $SOCKET after $AGENT_MAX s; its log: $(agent_log_name)"
  }
  make_scratch
}

agent_answers() { "$AGENT" status --socket "$SOCKET" --state-dir "$STATE_DIR" >/dev/null 2>&1 9>&-; }

agent_log() {
  if under_systemd; then journalctl --no-pager -u node-agent -n "$1"; else tail -n "$1" "$LOG"; fi 2>/dev/null || true
}

agent_log_name() { if under_systemd; then printf 'journalctl -u node-agent\n'; else printf '%s\n' "$LOG"; fi; }

start_unit() {
  local unit=$UNIT_DIR/node-agent.service before
  before=$(hash_of "$unit")
  unit_text >"$WORK/unit.new"
  [ "$(dirname "$SOCKET")" = /run/ray-mtls ] || make_folder_for "$SOCKET"
  put_file "$WORK/unit.new" "$unit" 0644
  [ "$before" = "$(hash_of "$unit")" ] || note "wrote $unit"
  systemctl daemon-reload
  systemctl enable --quiet node-agent
  # Starts it, and starts it again where it runs another program or another command line than is there now.
  if systemctl is-active --quiet node-agent && ! agent_is_old; then
    note "the agent runs already"
  else
    systemctl restart --no-block node-agent
    note "the agent starts under systemd"
  fi
}

# The program it runs was replaced, or its unit was written after it began.
agent_is_old() {
  local pid
  pid=$(systemctl show -p MainPID --value node-agent)
  [ "${pid:-0}" != 0 ] || return 0
  [ "$(readlink "/proc/$pid/exe" 2>/dev/null)" = "$AGENT" ] || return 0
  [ "$UNIT_DIR/node-agent.service" -nt "/proc/$pid" ]
}

# Without systemd nobody restarts it but the next run of this script.
start_daemon() {
  local pid command=("$AGENT" run --state-dir "$STATE_DIR" --tls-dir "$TLS_DIR" --socket "$SOCKET"
    --ray-uid "$RAY_UID" --ray-group "$RAY_GID")
  pid=$(daemon_pid)
  if [ -n "$pid" ] && ! runs_as "$pid" "${command[@]}"; then
    note "the agent runs a program that was replaced, or for other folders or another user: starting it again"
    stop_daemon
    pid=""
  fi
  if [ -n "$pid" ]; then
    note "the agent runs already (pid $pid)"
    return
  fi
  [ ! -s "$PIDFILE" ] || note "the agent of an earlier run is dead: starting it again"
  make_folder_for "$SOCKET"
  make_folder_for "$LOG"
  open_log
  # Its own session, so that no signal to this script's group reaches it. It writes its number itself, under
  # a lock that node-agent keeps: a start cut short leaves no second one.
  # shellcheck disable=SC2016
  setsid bash -c 'exec 8>>"$1" && flock -w 5 8 && printf "%s\n" $$ >"$1" && shift && exec "$@"' start-agent \
    "$PIDFILE" "${command[@]}" >>"$LOG" 2>&1 </dev/null 9>&- &
  disown
  note "the agent starts in the background, log in $LOG"
}

# runs_as PID WORD...: that program, with those words and no others.
runs_as() {
  local pid=$1
  shift
  [ "$(readlink "/proc/$pid/exe" 2>/dev/null)" = "$1" ] &&
    [ "$(tr '\0' '\n' <"/proc/$pid/cmdline" 2>/dev/null)" = "$(printf '%s\n' "$@")" ]
}

# Its lines hold names and addresses, no secret; still not for everybody.
open_log() {
  if [ ! -e "$LOG" ]; then
    remember log - "$LOG"
    (umask 027 && : >>"$LOG")
  elif (($(stat -c %s "$LOG") > LOG_LEN_MAX)); then
    mv "$LOG" "$LOG.old"
    (umask 027 && : >>"$LOG")
  fi
}

# daemon_pid: of a node-agent, or of the shell about to become one, on our state folder.
daemon_pid() {
  local pid
  pid=$(head -n 1 "$PIDFILE" 2>/dev/null) || return 0
  [[ $pid =~ ^[0-9]+$ ]] || return 0
  tr '\0' ' ' <"/proc/$pid/cmdline" 2>/dev/null | grep -qF -- " run --state-dir $STATE_DIR " || return 0
  printf '%s\n' "$pid"
}

stop_daemon() {
  local pid
  pid=$(daemon_pid)
  [ -n "$pid" ] || return 0
  kill -TERM "$pid" 2>/dev/null || true
  if ! wait_for "$STOP_MAX" "the agent (pid $pid) to end" gone "$pid"; then
    kill -KILL "$pid" 2>/dev/null || true
    wait_for 5 "the agent (pid $pid) to be gone" gone "$pid" || die "the agent, pid $pid, cannot be stopped"
  fi
}

gone() { [ ! -e "/proc/$1" ] || grep -q '^State:[[:space:]]*Z' "/proc/$1/status" 2>/dev/null; }

# The same hardening as deploy/systemd/node-agent.service.
unit_text() {
  cat <<UNIT
# Written by bootstrap-node.sh, which removes it with --uninstall.

[Unit]
Description=Ray mTLS node agent
After=network-online.target
Wants=network-online.target

[Service]
Type=notify
ExecStart=$AGENT run --state-dir $STATE_DIR --tls-dir $TLS_DIR --socket $SOCKET --ray-uid $RAY_UID --ray-group $RAY_GID
TimeoutStartSec=infinity
TimeoutStopSec=30
Restart=always
RestartSec=2
KillMode=process
RestartPreventExitStatus=64 78
RuntimeDirectory=ray-mtls
RuntimeDirectoryMode=0755
RuntimeDirectoryPreserve=yes
CapabilityBoundingSet=CAP_CHOWN CAP_NET_ADMIN CAP_KILL CAP_SYS_PTRACE CAP_SETUID CAP_SETGID
NoNewPrivileges=yes
ProtectSystem=strict
ReadWritePaths=$(writable_folders)
ProtectHome=yes
PrivateTmp=yes
PrivateDevices=yes
ProtectClock=yes
ProtectControlGroups=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectHostname=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
MemoryDenyWriteExecute=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallErrorNumber=EPERM
UMask=0077
RemoveIPC=yes
KeyringMode=private
LimitCORE=0
LimitNOFILE=4096:262144

[Install]
WantedBy=multi-user.target
UNIT
}

# The agent's two folders, and the socket's where systemd does not make it.
writable_folders() {
  local folder
  folder=$(dirname "$SOCKET")
  [ "$folder" != /run/ray-mtls ] || folder=""
  printf '%s\n' "$STATE_DIR $TLS_DIR${folder:+ $folder}"
}

# --- The files --------------------------------------------------------------------------------------

wait_for_files() {
  wait_for "$FILES_MAX" "Ray's TLS files in $TLS_DIR" files_are_there || {
    agent_log 5 >&2
    die "Ray's user (uid $RAY_UID) cannot read the files in $TLS_DIR after $FILES_MAX s: see \`$AGENT status --socket $SOCKET\` and $(agent_log_name)"
  }
  note "$TLS_DIR/$(readlink "$TLS_DIR/current" 2>/dev/null) is readable by Ray's user"
  name_packages
}

# Isolation is a setting of the cluster, which the agent knows by now. What it runs is named and not
# installed: which package manager a host has, and whether it may be used, is its owner's.
name_packages() {
  local missing=()
  "$AGENT" status --socket "$SOCKET" -o json 2>/dev/null 9>&- | grep -qE '"isolation": "(audit|enforce)"' || return 0
  PATH=$PATH:/usr/sbin:/sbin command -v nft >/dev/null || missing+=(nftables)
  PATH=$PATH:/usr/sbin:/sbin command -v ss >/dev/null || missing+=(iproute2)
  ((${#missing[@]} == 0)) ||
    warn "the cluster's isolation is on and this host cannot load it: install ${missing[*]} (for example apt-get install ${missing[*]})"
}

# Read as Ray's user: a file that Ray cannot open is an empty one to it, without a word.
# shellcheck disable=SC2016
files_are_there() {
  as_ray sh -c 'cat "$1/ray.env" "$1/current/tls.key" "$1/current/tls.crt" "$1/current/ca.crt"' files "$TLS_DIR" \
    >/dev/null 2>&1
}

# --- As Ray's user ----------------------------------------------------------------------------------

# as_ray COMMAND...: as the user that runs Ray. Whoever gets code into that user's files (a module in its home,
# a task) stands behind these commands, so they get nothing of root's: no terminal, into which they could type;
# no variable that is not named; no open descriptor. The caller gives output a file, never the terminal. A
# signal to this script ends them.
as_ray() {
  local child code=0
  # Not to begin with SIGINT ignored, as background commands do: Ray's workers need it.
  set -m
  (
    close_descriptors
    if [ "$(id -u)" = "$RAY_UID" ]; then new_session "$@"; fi
    take_home
    new_session env "${WITHOUT[@]}" setpriv --reuid "$RAY_UID" --regid "$RAY_GID" "$RAY_GROUPS" "$@"
  ) </dev/null &
  child=$!
  set +m
  wait "$child" || code=$?
  rm -f "$WORK/session"
  return "$code"
}

# Takes the place of this shell. The number is written down, so that the session can be ended as one.
# shellcheck disable=SC2016
new_session() {
  exec setsid --wait sh -c 'printf "%s %s\n" "$(cat /proc/sys/kernel/random/boot_id)" $$ >"$1" && shift && exec "$@"' \
    session "$WORK/session" "$@"
}

# end_session: what as_ray left running, in this run or in one that was killed. Daemons of a Ray that has started
# are not in it: the number is forgotten once a command has ended.
end_session() {
  local boot number
  read -r boot number 2>/dev/null <"$WORK/session" || return 0
  rm -f "$WORK/session"
  [ "$boot" = "$(cat /proc/sys/kernel/random/boot_id)" ] && [[ $number =~ ^[1-9][0-9]*$ ]] || return 0
  pkill -KILL -u "$RAY_UID" -s "$number" || true
}

# can_run COMMAND: whether Ray's user reaches the program and what its first line names. It is not run, and what
# looks for it is as far from root as in as_ray.
# shellcheck disable=SC2016
can_run() {
  local look=(sh -c '[ -z "$2" ] || cd "$2" 2>/dev/null || cd /
program=$(command -v -- "$1") && [ -f "$program" ] && [ -x "$program" ] || exit 1
first=$(head -c 256 -- "$program" | tr -d "\0" | head -n 1)
case $first in
  "#!"*) set -f && set -- ${first#"#!"} && [ -x "$1" ] ;;
esac' look "$1")
  if [ "$(id -u)" != 0 ] || [ "$RAY_UID" = 0 ]; then
    "${look[@]}" "" </dev/null >/dev/null 2>&1
    return
  fi
  (
    close_descriptors
    exec setsid --wait env "${WITHOUT[@]}" setpriv --reuid "$RAY_UID" --regid "$RAY_GID" "$RAY_GROUPS" "${look[@]}" "$RAY_HOME"
  ) </dev/null >/dev/null 2>&1
}

# All but input, output, errors, and bash's own, which closes itself.
close_descriptors() {
  local path
  for path in "/proc/$BASHPID/fd"/*; do
    case ${path##*/} in 0 | 1 | 2 | 255) ;; *) eval "exec ${path##*/}>&-" ;; esac
  done
}

take_home() {
  export HOME=$RAY_HOME
  cd "$HOME" 2>/dev/null || cd /
  unset USER LOGNAME OLDPWD
  [ -z "$RAY_ACCOUNT" ] || export USER=$RAY_ACCOUNT LOGNAME=$RAY_ACCOUNT
}

# find_environment: WITHOUT, words of env that take away what is not for Ray's user. Names alone: everybody can
# read the words of a command.
find_environment() {
  local entry name
  WITHOUT=()
  while IFS= read -r -d '' entry; do
    name=${entry%%=*}
    case $name in "" | PATH | HOME | USER | LOGNAME | LANG | LC_* | TZ | RAY_*) continue ;; esac
    [[ " ${PASSED[*]} " == *" $name "* ]] || WITHOUT+=(-u "$name")
  done < <(env -0)
}

with_leaf() { as_ray "$AGENT" exec --socket "$SOCKET" -- "$@"; }

# --- Ray --------------------------------------------------------------------------------------------

# A raylet that a complete start left is left alone. What a start cut short or a dead raylet left is stopped
# first: half a Ray neither works nor lets another begin, its helpers keep the ports.
start_ray() {
  local code=0
  expand_ray_flags
  if [ -n "$(raylet_pid)" ] && [ ! -e "$WORK/ray-starting" ]; then
    note "Ray runs already (raylet pid $(raylet_pid)): not started again"
    return
  fi
  if [ -n "$(ray_pids)" ]; then
    note "an earlier Ray was cut short: stopping what it left"
    stop_ray
  fi
  : >"$WORK/ray-starting"
  note "${RAY_COMMAND[*]}"
  # --foreground: one that takes too long is ended alone; what it has started is for stop_ray.
  with_leaf timeout --foreground -k 5 "$RAY_MAX" "${RAY_COMMAND[@]}" >"$WORK/ray.log" 2>&1 || code=$?
  if ((code != 0)); then
    tail -n 15 "$WORK/ray.log" | printable >&2
    stop_ray
    rm -f "$WORK/ray-starting"
    ((code != 124)) || warn "it did not end within $RAY_MAX s"
    die "Ray did not start (exit code $code): its output is in $WORK/ray.log, its logs in /tmp/ray/session_latest/logs"
  fi
  rm -f "$WORK/ray-starting"
}

# The word @ray-flags in Ray's command: what the agent says of the cluster's port plan. Before the agent runs nobody
# here knows it.
expand_ray_flags() {
  local word flags said whole=()
  for word in "${RAY_COMMAND[@]}"; do
    if [ "$word" = @ray-flags ]; then
      said=$("$AGENT" ray-flags --socket "$SOCKET" 9>&- </dev/null) || die "the ports of the cluster's plan are not known: see \`$AGENT status --socket $SOCKET\`"
      read -ra flags <<<"$said"
      whole+=("${flags[@]}")
    else
      whole+=("$word")
    fi
  done
  RAY_COMMAND=("${whole[@]}")
}

raylet_pid() { pgrep -o -u "$RAY_UID" -x raylet || true; }

# Daemons of Ray, as the programs of its package and the titles of its workers, and a start that still runs.
ray_pids() {
  pgrep -u "$RAY_UID" -f "/site-packages/ray/(core|_private|dashboard|autoscaler|util)|^ray::|$RAY_STARTS" || true
}
RAY_STARTS='^(timeout --foreground -k 5 [0-9]+ |[^ ]*python[0-9.]* )[^ ]*ray start '

stop_ray() {
  pkill -KILL -u "$RAY_UID" -f "$RAY_STARTS" || true
  as_ray timeout -k 5 30 "${RAY_COMMAND[0]:-ray}" stop --force >/dev/null 2>&1 || true
  wait_for "$STOP_MAX" "Ray to end" ray_is_gone || ray_pids | xargs -r kill -KILL 2>/dev/null || true
}

ray_is_gone() { [ -z "$(ray_pids)" ]; }

# `ray start` comes back with 0 from a node on which no task ever runs: only a task proves one.
prove() {
  local code=0
  find_python
  with_leaf timeout -k 5 "$PROOF_MAX" "$PYTHON" -c "$PROOF" "$(ray_address)" "$PROOF_MAX" \
    >"$WORK/proof" 2>"$WORK/proof.log" || code=$?
  if ((code != 0)); then
    tail -n 5 "$WORK/proof.log" | printable >&2
    ((code != 124 && code != 137)) || warn "no task ran on this node within $PROOF_MAX s"
    die "this node is not proved: look at /tmp/ray/session_latest/logs/raylet.err here and gcs_server.err on the head; then \`$AGENT exec --socket $SOCKET -- ray stop\` and run this again"
  fi
  note "$(tail -n 1 "$WORK/proof" | printable)"
}

# The driver's own node is this one; the task may run nowhere else.
# shellcheck disable=SC2016
PROOF='
import os, sys
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR", namespace="bootstrap")
here = ray.get_runtime_context().get_node_id()
mine = [n for n in ray.nodes() if n["NodeID"] == here and n["Alive"]]
if not mine:
    sys.exit("the cluster does not know the node of this driver: " + here)

@ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=False))
def where():
    return ray.get_runtime_context().get_node_id(), os.uname().nodename

there, host = ray.get(where.remote(), timeout=float(sys.argv[2]))
if there != here or host != os.uname().nodename:
    sys.exit("the task ran on node %s (%s) and not on this one, %s" % (there, host, here))
print("a task ran here: node %s, address %s" % (here[:8], mine[0]["NodeManagerAddress"]))
'

# ray_address: as Ray's own command line names it.
ray_address() {
  local word before="" head=no ip="" port=6379 address=""
  for word in "${RAY_COMMAND[@]}"; do
    case $before in --address) address=$word ;; --node-ip-address) ip=$word ;; --port) port=$word ;; esac
    case $word in
      --head) head=yes ;;
      --address=*) address=${word#*=} ;;
      --node-ip-address=*) ip=${word#*=} ;;
      --port=*) port=${word#*=} ;;
    esac
    before=$word
  done
  if [ "$head" = yes ] && [ -n "$ip" ]; then
    printf '%s:%s\n' "$ip" "$port"
  else
    printf '%s\n' "${address:-auto}"
  fi
}

find_python() {
  local ray
  [ -z "$PYTHON" ] || return 0
  ray=$(command -v "${RAY_COMMAND[0]}" || true)
  PYTHON=$(dirname "${ray:-/usr/bin/ray}")/python3
  [ -x "$PYTHON" ] || PYTHON=$(dirname "${ray:-/usr/bin/ray}")/python
  [ -x "$PYTHON" ] || misconfigured "there is no python beside ${RAY_COMMAND[0]}: name the one that has Ray with --python"
}

# stay: as long as the raylet lives; TERM and INT stop Ray.
stay() {
  local pid
  pid=$(raylet_pid)
  exec 9>&-
  trap 'note "stopping Ray"; stop_ray; exit 0' TERM INT
  note "staying until Ray ends (raylet pid ${pid:-none})"
  while [ -n "$pid" ] && ! gone "$pid"; do sleep 1 9>&- & wait $! || true; done
  die "Ray ended: its logs are in /tmp/ray/session_latest/logs"
}

# --- The way down -----------------------------------------------------------------------------------

down() {
  consent
  phase "leave" leave_cluster
  phase "agent" remove_agent
  phase "files" remove_files
  say_times
}

consent() {
  local answer
  [ "$YES" = no ] || return 0
  [ -t 0 ] || misuse "nothing was removed: there is no terminal to ask on; add --yes"
  if [ "$KEEP_IDENTITY" = yes ]; then
    printf 'The agent of this node is stopped and removed; its certificates are no longer renewed.\n' >&2
  else
    printf 'This node leaves its cluster for good: its name and addresses become free, its keys are removed.\n' >&2
  fi
  printf 'type yes to do it: ' >&2
  read -r answer
  [ "$answer" = yes ] || die "nothing was removed: the answer was not yes"
}

# leave goes through the agent: one that is dead is started once more for it.
leave_cluster() {
  local code=0
  if [ "$KEEP_IDENTITY" = yes ]; then
    note "the identity is kept"
    return
  fi
  if [ ! -e "$STATE_DIR/identity.pem" ] || [ ! -x "$AGENT" ]; then
    note "this host is not enrolled: nothing to leave"
    return
  fi
  agent_answers || start_agent
  timeout -k 5 60 "$AGENT" leave --socket "$SOCKET" --yes >"$WORK/leave.log" 2>&1 9>&- </dev/null || code=$?
  # By itself the agent leaves its files; here they go next.
  sed 's/; all files stay.*$//; s/^/   /' "$WORK/leave.log"
  case $code in
    0) ;;
    2) note "the CA does not serve this node any more: it goes on" ;;
    *) die "the node has not left and nothing was removed: bring the CA back, or give --keep-identity and take the node out with \`ca-admin node revoke\`" ;;
  esac
}

remove_agent() {
  if under_systemd && is_ours "$UNIT_DIR/node-agent.service" && [ -e "$UNIT_DIR/node-agent.service" ]; then
    systemctl disable --quiet --now node-agent || true
  fi
  stop_daemon
  rm -f "$SOCKET" "$PIDFILE" "$(dirname "$SOCKET")/status.json"
  note "the agent is stopped"
}

# What is on the list and still as it was made, last made first; folders only where they are empty.
remove_files() {
  local kind hash path
  while read -r kind hash path; do
    case $kind in
      file) remove_file "$hash" "$path" ;;
      log) rm -f "$path" "$path.old" ;;
      scratch) rm -rf -- "$path" ;;
      tree) [ "$KEEP_IDENTITY" = yes ] || rm -rf -- "$path" ;;
      folder) [ "$path" = "$WORK" ] || rmdir "$path" 2>/dev/null || true ;;
    esac
  done < <(tac "$MADE")
  ! under_systemd || systemctl daemon-reload
  remove_work
}

remove_file() {
  [ -e "$2" ] || return 0
  if grep -qxF "file $(hash_of "$2") $2" "$MADE"; then rm -f "$2"; else note "kept $2: it is not as this script made it"; fi
}

# With a kept identity the list keeps what is left to remove.
remove_work() {
  local path
  if [ "$KEEP_IDENTITY" = yes ]; then
    grep '^tree ' "$MADE" >"$WORK/made.new" || true
    mv "$WORK/made.new" "$MADE"
    note "kept: $STATE_DIR and $TLS_DIR"
    return
  fi
  mapfile -t folders < <(sed -n 's/^folder - //p' "$MADE" | tac)
  rm -rf "${WORK:?}"
  for path in "${folders[@]}"; do rmdir "$path" 2>/dev/null || true; done
  note "removed what this script made"
}

# --- The list of what this script made ---------------------------------------------------------------

# Lines `KIND HASH PATH`, each written before the thing is made.
remember() {
  ! grep -qxF "$1 $2 $3" "$MADE" || return 0
  printf '%s %s %s\n' "$1" "$2" "$3" >>"$MADE"
  sync "$MADE"
}

is_ours() { awk -v path="$1" '$1 == "file" && $3 == path { found = 1 } END { exit !found }' "$MADE"; }

# make_folder_for PATH: the folders above it, those that are missing.
make_folder_for() {
  local folder
  folder=$(dirname "$1")
  [ ! -d "$folder" ] || return 0
  make_folder_for "$folder"
  remember folder - "$folder"
  mkdir -m 0755 "$folder"
}

# --- What would be done ------------------------------------------------------------------------------

say_plan() {
  printf 'nothing is changed; '
  if [ "$ACT" = down ]; then
    printf 'this would be undone:\n'
    [ "$KEEP_IDENTITY" = yes ] || printf '  leave the cluster with the identity in %s\n' "$STATE_DIR"
    printf '  stop the agent\n'
    sed 's/^\([a-z]*\) [^ ]* /  remove the \1 /' "$MADE" 2>/dev/null || printf '  no list of made files in %s\n' "$WORK"
    return
  fi
  printf 'this would be done:\n'
  printf '  node-agent  %s from %s\n' "$AGENT" "${FROM:-where it is}"
  printf '  join file   %s\n' "$(join_words)"
  printf '  enrolment   role %s, state in %s%s\n' "$ROLE" "$STATE_DIR" \
    "$([ ! -e "$STATE_DIR/node.toml" ] || printf ' (enrolled already)')"
  if under_systemd; then
    printf '  agent       this unit as %s/node-agent.service\n' "$UNIT_DIR"
    unit_text | sed 's/^/    | /'
  else
    printf '  agent       in the background, log %s, socket %s\n' "$LOG" "$SOCKET"
  fi
  printf '  files       %s, readable by uid %s\n' "$TLS_DIR" "$RAY_UID"
  [ "$WITH_RAY" = no ] || printf '  Ray         as uid %s: %s\n  proof       a task on this node\n' "$RAY_UID" "${RAY_COMMAND[*]}"
  judge_plan
}

join_words() {
  if [ -n "$JOIN" ]; then
    printf '%s%s\n' "$JOIN" "$([ "$KEEP_JOIN_FILE" = yes ] || printf ', removed once it is used')"
  else
    printf '%s\n' "${JOIN_FD:+from descriptor $JOIN_FD}"
  fi
}

# What can be seen from here without a change. Not seen: the CA, a URL, what an archive holds.
judge_plan() {
  local faults=() fault
  case $FROM in
    "") [ -x "$AGENT" ] || faults+=("there is no $AGENT: say where it comes from with --from FILE|URL") ;;
    https://*) ;;
    *)
      if [ ! -f "$FROM" ] || [ ! -r "$FROM" ]; then
        faults+=("--from $FROM: there is no such file, or it cannot be read")
      elif [ -n "$SHA256" ] && [ "$(hash_of "$FROM")" != "$SHA256" ]; then
        faults+=("--from $FROM: its SHA-256 is $(hash_of "$FROM") and not $SHA256")
      fi
      ;;
  esac
  judge_join
  if [ "$WITH_RAY" = yes ] && ! can_run "${RAY_COMMAND[0]}"; then faults+=("$(cannot_run)"); fi
  for fault in "${faults[@]}"; do warn "$fault"; done
  ((${#faults[@]} == 0)) || exit 78
}

# judge_join: adds to the caller's faults. An enrolled host needs none; the agent takes one that is its user's alone.
judge_join() {
  if [ -n "$JOIN_FD" ]; then
    [ -e "/proc/$$/fd/$JOIN_FD" ] || faults+=("--join-fd $JOIN_FD: no such descriptor is open for reading")
  elif [ -e "$STATE_DIR/node.toml" ] || [ -e "$WORK/join" ]; then
    :
  elif [ -z "$JOIN" ]; then
    faults+=("this host is not enrolled, and no join file is given: --join FILE or --join-fd N")
  elif [ ! -f "$JOIN" ] || [ ! -r "$JOIN" ]; then
    faults+=("--join $JOIN: there is no such file, or it cannot be read")
  elif [[ $(stat -L -c %a "$JOIN") != *00 ]]; then
    faults+=("--join $JOIN has mode $(stat -L -c %a "$JOIN") and holds a secret: chmod 0600 $JOIN, and think of who has read it")
  fi
}

# --- What a person reads -----------------------------------------------------------------------------

PHASE=""
TIMES=()

# phase NAME FUNCTION
phase() {
  local began
  began=$(now)
  PHASE=$1
  printf '== %s\n' "$1"
  "$2"
  TIMES+=("$(seconds_since "$began")  $1")
  PHASE=""
}

say_times() {
  printf 'seconds\n'
  printf '%7s\n' "${TIMES[@]}"
  printf '%s  in all\n' "$(seconds_since "$BEGAN")"
}

# Microseconds.
now() { printf '%s\n' "${EPOCHREALTIME//[.,]/}"; }

seconds_since() {
  local ms=$((($(now) - $1) / 1000))
  printf '%4d.%02d' $((ms / 1000)) $((ms % 1000 / 10))
}

# wait_for LIMIT_SECONDS WHAT COMMAND...
wait_for() {
  local limit=$1 what=$2 began=$SECONDS said=$SECONDS
  shift 2
  until "$@"; do
    ((SECONDS - began < limit)) || return 1
    if ((SECONDS - said >= 4)); then
      note "waiting for $what: $((SECONDS - began)) s of at most $limit"
      said=$SECONDS
    fi
    sleep 0.1 9>&-
  done
}

# What another user's program said, for a terminal: no control characters, no more than a screen.
printable() { head -c 8192 | LC_ALL=C tr -cd '\n\t -~'; }

note() { printf '   %s\n' "$*"; }
warn() { printf 'bootstrap-node: %s\n' "$*" >&2; }

die() {
  warn "$*"
  exit 1
}

misuse() {
  warn "$* (--help says more)"
  exit 64
}

misconfigured() {
  warn "$*"
  exit 78
}

on_exit() {
  local code=$?
  trap - EXIT INT TERM
  # Not those of another run, which we have waited for.
  if [ "$WORK_IS_OURS" = yes ]; then
    end_session
    [ "$(id -u)" != 0 ] || rm -f "$WORK"/*.new
  fi
  if ((code != 0)) && [ -n "$PHASE" ]; then
    warn "it ended in: $PHASE (exit code $code); once the cause is away, run the same command again: it goes on from there"
  fi
  exit "$code"
}

main "$@"
