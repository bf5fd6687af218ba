# shellcheck shell=bash
# Hosts on one machine: each a network, mount, pid and host-name namespace of its own with one
# address on a common bridge, so that /tmp, /dev/shm and `ray stop` touch that host alone. The bridge
# has a namespace too: the machine's own network is left as it is. Sourced after need.sh.

PREFIX=raymtls
STATE=$BASE/quickstart
LOGS=$STATE/logs
NET=10.77.0

# Last part of each host's address.
declare -A HOST_NUMBER=([head]=1 [worker1]=2 [worker2]=3 [ca]=4 [stranger]=5 [other]=6 [driver]=7
  [admin]=8 [scraper]=9 [other2]=10)

address() { printf '%s.%s\n' "$NET" "${HOST_NUMBER[$1]}"; }
host_dir() { printf '%s\n' "$STATE/hosts/$1"; }

bridge_up() {
  ip netns add "$PREFIX-bridge"
  ip -n "$PREFIX-bridge" link add br0 type bridge
  ip -n "$PREFIX-bridge" link set br0 up
}

# host_up NAME: joins the host to the bridge and starts its holder.
host_up() {
  local name=$1 netns=$PREFIX-$1 dir
  dir=$(host_dir "$name")
  install -d -m 0755 "$dir"
  install -d -m 1777 "$dir/tmp"
  install -d -m 0700 -o "$RAY_UID" -g "$RAY_GID" "$dir/home"
  ip netns add "$netns"
  ip -n "$netns" link set lo up
  ip -n "$PREFIX-bridge" link add "to-$name" type veth peer name eth0 netns "$netns"
  ip -n "$PREFIX-bridge" link set "to-$name" master br0 up
  ip -n "$netns" addr add "$(address "$name")/24" dev eth0
  ip -n "$netns" link set eth0 up
  setsid nsenter --net="/run/netns/$netns" unshare --mount --uts --pid --fork --mount-proc --kill-child \
    bash -c "$HOLDER" holder "$name" "$dir/tmp" "$STATE/names" >"$LOGS/holder-$name.log" 2>&1 </dev/null 9>&- &
  disown
  wait_for 10 "the holder of $name" host_ready "$name"
}

# First process of a host: gives it its own /tmp, /dev/shm and names, then reaps orphans until killed.
# shellcheck disable=SC2016
HOLDER='set -eu
hostname "$1"
mount --bind "$2" /tmp
mount --bind "$3" /etc/hosts
mount -t tmpfs -o mode=1777,size=1g tmpfs /dev/shm
trap : TERM INT HUP
: >/tmp/.holder-ready
while :; do sleep 3600 & wait $! || true; done'

host_ready() { [ -e "$(host_dir "$1")/tmp/.holder-ready" ] && [ -n "$(holder_pid "$1")" ]; }

# Every process on that host, by its number out here.
host_pids() { ip netns pids "$PREFIX-$1" 2>/dev/null; }

# The host's first process: the one that is number 1 in a pid namespace below ours.
holder_pid() {
  local pid
  for pid in $(host_pids "$1"); do
    if awk '$1 == "NSpid:" && NF > 2 && $NF == 1 { found = 1 } END { exit !found }' "/proc/$pid/status" 2>/dev/null; then
      printf '%s\n' "$pid"
      return 0
    fi
  done
}

# in_host NAME COMMAND...: as root on that host, with a clean environment.
in_host() { (exec_in_host "$@"); }

# Takes the place of this shell; the lock (fd 9) stays behind.
exec_in_host() {
  local pid
  pid=$(holder_pid "$1")
  [ -n "$pid" ] || die "host $1 is not up"
  shift
  exec 9>&-
  exec nsenter --target "$pid" --net --mount --pid --uts -- env -i \
    "PATH=$STATE/bin:$VENV/bin:/usr/sbin:/usr/bin:/sbin:/bin" LANG=C.UTF-8 HOME=/root PYTHONUNBUFFERED=1 "$@"
}

# as_ray NAME COMMAND...: as Ray's uid on that host.
as_ray() {
  local name=$1
  shift
  in_host "$name" setpriv --reuid "$RAY_UID" --regid "$RAY_GID" --clear-groups \
    env "HOME=$(host_dir "$name")/home" RAY_USAGE_STATS_ENABLED=0 "$@"
}

# daemon NAME LOG COMMAND...: left running on that host.
daemon() {
  local name=$1 log=$2
  shift 2
  exec_in_host "$name" setsid "$@" >>"$log" 2>&1 </dev/null &
  disown
}

# hosts_down: every process in our namespaces, then the namespaces. Knows them by name alone, so it
# also clears up after a run that was killed.
hosts_down() {
  local name
  for name in "${!HOST_NUMBER[@]}" bridge; do
    [ -e "/run/netns/$PREFIX-$name" ] || continue
    host_pids "$name" | xargs -r kill -KILL 2>/dev/null || true
    wait_for 10 "the processes on $name to end" host_empty "$name"
    ip netns del "$PREFIX-$name"
  done
}

host_empty() { [ -z "$(host_pids "$1")" ]; }
