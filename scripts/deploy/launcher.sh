#!/usr/bin/env bash
# launcher.sh SCRIPT: runs the setup commands of the cluster launcher's example, given on standard input with a
# zero byte behind each, as the ssh user's shell would, with SCRIPT as it is and with one that somebody swapped on
# the host. What lies in root's folder then is what root would run. No ssh and no sudo here: a stand-in runs the
# words as they are. Needs root; works in a mount namespace of its own and leaves nothing.
set -euo pipefail

if [ "${2:-}" != inside ]; then
  exec unshare --mount bash "$0" "$1" inside
fi
mount --make-rprivate /
SCRIPT=$(mktemp)
trap 'umount "$HOME"; rm -rf "$SCRIPT" "$SCRIPT.home"' EXIT
cp "$1" "$SCRIPT"
mapfile -t -d '' COMMANDS
mkdir "$SCRIPT.home"
export HOME=$SCRIPT.home
mount -t tmpfs -o mode=0700 tmpfs /root
mount -t tmpfs -o mode=0755 tmpfs "$HOME"
mkdir "$HOME/bin" "$HOME/raymtls"
printf '#!/bin/sh\nexec "$@"\n' >"$HOME/bin/sudo"
chmod +x "$HOME/bin/sudo"
: >"$HOME/raymtls/head.join"
: >"$HOME/raymtls/worker.join"

# set_up: the commands until one fails, as the launcher does.
set_up() {
  local command
  for command in "${COMMANDS[@]}"; do PATH=$HOME/bin:$PATH bash -c "$command" >/dev/null 2>&1 || return 1; done
}

check() {
  if "${@:2}"; then echo "ok: $1"; else
    echo "FAILED: $1" >&2
    exit 1
  fi
}
is_the_script() { cmp -s "$SCRIPT" /root/raymtls/bootstrap-node.sh; }
swapped_is_refused() {
  printf 'touch /root/owned\n' >>"$HOME/raymtls/bootstrap-node.sh"
  ! set_up && { [ ! -e /root/raymtls/bootstrap-node.sh ] || is_the_script; }
}

cp "$SCRIPT" "$HOME/raymtls/bootstrap-node.sh"
check "the launcher's setup takes no script that was swapped on the host" swapped_is_refused
cp "$SCRIPT" "$HOME/raymtls/bootstrap-node.sh"
check "and takes the one it names" set_up
check "which is what root runs" is_the_script
check "and still is after another swap" swapped_is_refused
