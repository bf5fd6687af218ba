# shellcheck shell=bash
# What bootstrap-node.sh and the Slurm example keep from other users: root's terminal, environment and
# descriptors from whoever has planted code in Ray's files; one user's keys from the next user of a node.
# Sourced by test.sh, which has made worker1 a node; without Ray.

OTHER_UID=61002

# A program in place of Ray and of its Python, as one who may write Ray's files would plant it: it writes down
# what it has of root's, types into the terminal, and says what is expected of it.
plant() {
  cat <<PLANT
#!$VENV/bin/python
import fcntl, os, sys, termios
has = []
try:
    os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY)
    has.append("the terminal")
except OSError:
    pass
# Descriptor 5 is our caller's, and so is every one that is a terminal.
for fd in range(256):
    try:
        if fd > 2 and os.path.realpath("/proc/self/fd/%d" % fd).endswith("/for-root"):
            has.append("descriptor %d" % fd)
        for c in "id -u\n" if os.isatty(fd) else "":
            fcntl.ioctl(fd, termios.TIOCSTI, c)
    except OSError:
        pass
try:
    tty = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY)
    for c in "echo typed by the plant\n":
        fcntl.ioctl(tty, termios.TIOCSTI, c)
except OSError:
    pass
has += sorted(n for n in os.environ if n not in ("PATH", "HOME", "LANG", "LC_CTYPE", "PWD") and not n.startswith("RAY_"))
signals = [int(l.split()[1], 16) for l in open("/proc/self/status") if l.startswith("SigIgn")][0]
if signals & 2:
    has.append("SIGINT ignored")
print("has " + (", ".join(has) or "nothing") + "; uid %d; RAY_PLANT %s" % (os.getuid(), os.environ.get("RAY_PLANT")),
      file=open("$(host_dir worker1)/plant/seen-" + os.path.basename(sys.argv[0]), "w"))
print("\033]0;title\007a task ran here: so the plant says")
PLANT
}

# on_terminal COMMAND: bash on a terminal of its own; then what a root shell would read from it.
# shellcheck disable=SC2016
on_terminal() {
  in_host worker1 python -c '
import os, pty, sys
pid, fd = pty.fork()
if pid == 0:
    os.execvp("bash", ["bash", "-c", sys.argv[1] + """; echo "exit code $?"; IFS= read -r -t 0.3 line; echo "typed: $line" """])
try:
    while data := os.read(fd, 4096):
        sys.stdout.buffer.write(data)
except OSError:
    pass
os.waitpid(pid, 0)' "$1"
}

show_plant() {
  local dir words
  dir=$(host_dir worker1)/plant
  install -d -m 0755 -o "$RAY_UID" -g "$RAY_GID" "$dir"
  plant >"$dir/ray"
  chmod 0755 "$dir/ray"
  cp "$dir/ray" "$dir/python3"
  mapfile -t words < <(options worker1)
  printf 'secret\n' >"$dir/for-root"
  printf -v words '%q ' bash "$STATE/bin/bootstrap-node.sh" "${words[@]}" --env NCCL_PLANT -- "$dir/ray" start
  on_terminal "export AWS_PLANT=1 'BASH_FUNC_f%%=() { :; }' NCCL_PLANT=1 RAY_PLANT=1; $words 5<$dir/for-root" \
    >"$LOGS/plant.log" 2>&1 || true
  judge "with a plant as Ray, at a terminal" "$(tr -d '\r' <"$LOGS/plant.log" | grep '^exit code')" "exit code 0"
  judge "what it typed for root" "$(tr -d '\r' <"$LOGS/plant.log" | grep '^typed:')" "typed: "
  judge "what reaches the terminal of its escapes" "$(grep -c $'\033' "$LOGS/plant.log" || true)" 0
  for words in ray python3; do
    judge "what the plant has as $words" "$(cat "$dir/seen-$words")" "has NCCL_PLANT; uid $RAY_UID; RAY_PLANT 1"
  done
  judge "a signal while Ray starts" "$(interrupt)" "exit code 143, 0 of the start left"
}

# The start has a session of its own, so no signal of the terminal reaches it: the script must end it.
interrupt() {
  local code=0 pid slow
  slow=$(host_dir worker1)/plant/slow
  printf '#!/bin/sh\nexec sleep 77\n' >"$slow"
  chmod 0755 "$slow"
  bootstrap worker1 -- "$slow" start &
  pid=$!
  wait_for 20 "the slow start" in_host worker1 pgrep -f '^sleep 77' >/dev/null
  in_host worker1 pkill -TERM -o -f '^bash [^ ]*/bootstrap-node.sh'
  wait "$pid" || code=$?
  printf 'exit code %s, %s of the start left\n' "$code" "$(in_host worker1 pgrep -c -f '^sleep 77' || true)"
}

show_other_user() {
  # Somebody has taken the name in /tmp.
  in_host worker1 setpriv --reuid nobody --clear-groups mkdir -m 0777 "/tmp/ray-mtls-bootstrap-$RAY_UID"
  judge "as Ray's user, with its name in /tmp taken" "$(code_of bootstrap_as_ray)" 0
  judge "a second user on the node" "$(code_of bootstrap worker1 --ray-user "$OTHER_UID:$OTHER_UID" --no-ray)" 0
  judge "has an agent that answers it" "$(agents worker1) agent, $(in_host worker1 pgrep -c -f " --ray-uid $OTHER_UID ") for it" \
    "1 agent, 1 for it"
  judge "and the first user's Ray" "$(user_while_ray_runs)" "exit code 78, group $OTHER_UID"
  bootstrap worker1 --uninstall --yes
}

bootstrap_as_ray() {
  local dir
  dir=$(host_dir worker1)/node
  as_ray worker1 bash "$STATE/bin/bootstrap-node.sh" --ray-user "$RAY_UID:$RAY_GID" --prefix "$dir/usr" \
    --state-dir "$dir/lib/agent" --tls-dir "$dir/lib/tls" --socket "$dir/run/agent.sock" --no-ray \
    >>"$LOGS/bootstrap-worker1.log" 2>&1 </dev/null
}

# A raylet in name alone: what the script goes by.
user_while_ray_runs() {
  local code pid
  ln -sf "$(command -v sleep)" "$(host_dir worker1)/tmp/raylet"
  in_host worker1 setpriv --reuid "$OTHER_UID" --clear-groups /tmp/raylet 30 &
  pid=$!
  wait_for 5 "a raylet of the other user" in_host worker1 pgrep -u "$OTHER_UID" -x raylet >/dev/null
  code=$(code_of bootstrap worker1 --no-ray)
  printf 'exit code %s, group %s\n' "$code" "$(stat -L -c %g "$(host_dir worker1)/node/lib/tls/current/tls.key")"
  kill "$pid" 2>/dev/null || true
  in_host worker1 pkill -KILL -u "$OTHER_UID" -x raylet || true
  wait "$pid" 2>/dev/null || true
}

# slurm prolog|epilog JOB USER: as slurmd calls it.
slurm() {
  in_host worker1 env RAYMTLS_SLURM="$STATE/slurm.env" SLURM_JOB_ID="$2" SLURM_JOB_UID="$(id -u "$3")" \
    bash "$ROOT/examples/slurm/$1.sh" >>"$LOGS/slurm.log" 2>&1 </dev/null
}

# Two users every Debian has, each with a group of its own; a third whose group is shared.
show_slurm() {
  local dir user words
  dir=$(host_dir worker1)
  mapfile -t words < <(JOIN_WORDS=" " options worker1 | grep -v -x -e --ray-user -e "$RAY_UID:$RAY_GID" -e --name -e worker1)
  printf '%s\n' "JOINS=$dir/joins STATE=$dir/slurm BOOTSTRAP=$STATE/bin/bootstrap-node.sh" "OPTIONS='${words[*]}'" >"$STATE/slurm.env"
  install -d -m 0700 "$dir/joins"
  rm -f "$CA_DIR"/join/{games,news}
  for user in games news; do
    create_cluster "u-$user"
    create_token "$user" --cluster "u-$user" --role worker --uses 4 --generate-names
    install -m 0600 "$CA_DIR/join/$user" "$dir/joins/$user"
  done
  judge "the prolog of a job" "$(code_of slurm prolog 7 games), $(slurm_owner)" "0, 1 live in u-games, 0 live in u-news, key of group games"
  judge "a second job of another user beside it" "$(code_of slurm prolog 8 news), $(slurm_owner)" \
    "0, 1 live in u-games, 0 live in u-news, key of group games"
  judge "and its epilog" "$(code_of slurm epilog 8 news), $(slurm_owner)" "0, 1 live in u-games, 0 live in u-news, key of group games"
  judge "a user without a join file" "$(code_of slurm prolog 9 man), $(slurm_owner)" "0, 1 live in u-games, 0 live in u-news, key of group games"
  judge "the first job's epilog" "$(code_of slurm epilog 7 games), $(slurm_owner)" "0, 0 live in u-games, 0 live in u-news, key of group none"
  # An epilog that never came, and another user's job: the boot is another one by now.
  code_of slurm prolog 10 games >/dev/null
  sed -i 's/ [^ ]*$/ another-boot/' "$dir/slurm/owner"
  judge "the next user of a node left behind" "$(code_of slurm prolog 11 news), $(slurm_owner)" \
    "0, 0 live in u-games, 1 live in u-news, key of group news"
  code_of slurm epilog 11 news >/dev/null
  printf 'GROUP=users\n' >>"$STATE/slurm.env"
  judge "a group that users share" "$(code_of slurm prolog 12 games), $(slurm_owner)" \
    "1, 0 live in u-games, 0 live in u-news, key of group none"
  rm -rf "$dir/slurm" "$dir/joins"
}

slurm_owner() {
  local user
  for user in games news; do
    printf '%s live in u-%s, ' "$(ca_admin node list --cluster "u-$user" -o json | grep -c '"live"' || true)" "$user"
  done
  printf 'key of group %s\n' "$(stat -L -c %G "$(host_dir worker1)/node/lib/tls/current/tls.key" 2>/dev/null || echo none)"
}
