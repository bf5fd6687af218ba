#!/usr/bin/env bash
# Who may open a connection to Ray's ports of this host: one nftables table for each cluster. It is for
# hosts whose node-agent loads none (no agent there, or isolation=off); under audit and enforce the agent
# puts its own in the place of this one. Nobody tells this script of a new member or of a revoked one: run
# `apply` again with the new list.
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# Bounds of what is read: lines of a list, bytes of a ports file.
LIST_MAX=100000
PORTS_BYTES_MAX=65536
# Lines in the kernel's log, at most, for what is refused.
LOG_RATE="5/second burst 10 packets"
# What a plan may never close, with what listens there.
# never guarded: made from the port table
NEVER_GUARDED=(
  "22 22 SSH"
  "111 111 rpcbind"
  "2049 2049 NFS"
  "6443 6443 the API server of Kubernetes"
  "6817 6819 Slurm"
  "7443 7447 the CA"
  "10250 10250 the kubelet"
  "10255 10257 Kubernetes"
  "10259 10259 Kubernetes"
)
# /never guarded
# Where the CA answers this host.
CA_PORTS=(7443 7444)
# Where the kernel says from which ports this host dials; the same ones for IPv6.
LOCAL_PORTS=/proc/sys/net/ipv4

CLUSTER="" ROLE="" PORTS=$HERE/ports/default.tsv
VERDICT=drop DRY_RUN=no
MEMBERS=() ADMINS=() SCRAPERS=() DRIVERS=() BLOCKED=() CUT=() CA=()
NOT_BLOCKED=0

usage() {
  cat <<TEXT
usage: nftables.sh apply --cluster NAME --role head|worker --members LIST [options]
       nftables.sh show [--cluster NAME]
       nftables.sh clear --cluster NAME

apply puts the table raymtls_NAME in the place of the one before, whole or not at all. It drops on the
cluster's Ray ports alone: SSH and everything else on this host stay as they are.
A LIST is addresses separated by commas, or a file with one a line (# begins a comment).

  --members LIST          addresses of the cluster's hosts, this one's among them
  --admin-ranges LIST     who may reach the dashboard and Ray Client
  --scraper-ranges LIST   who may reach the metrics ports
  --driver-ranges LIST    who may reach Ray Client
  --blocked LIST          whom to cut off at once, in both directions, established or not
  --blocked-all-traffic LIST  the same on every port, not on the cluster's alone
  --ca LIST               addresses of the CA: never blocked, and its answers from 7443 and 7444 always pass
  --ports FILE            the port plan; default $PORTS
  --audit                 count what would be refused, refuse nothing
  --dry-run               print the table, load nothing

examples
  nftables.sh apply --cluster team-a --role worker --members members.txt --audit
  nftables.sh apply --cluster team-a --role head --members 10.0.0.1,10.0.0.2 --admin-ranges 192.0.2.0/28
  nftables.sh show --cluster team-a
  nftables.sh clear --cluster team-a

The table is gone after a reboot: run apply from a unit that starts before Ray does.

Exit codes: 0 done, 1 failed, also where an address to block could not be blocked, 64 wrong usage.
TEXT
}

main() {
  local verb=${1:-}
  [ $# = 0 ] || shift
  case $verb in
    apply | show | clear) ;;
    -h | --help) usage; exit 0 ;;
    *) usage >&2; exit 64 ;;
  esac
  arguments "$@"
  "$verb"
}

arguments() {
  while [ $# -gt 0 ]; do
    case $1 in
      --audit) VERDICT=count; shift; continue ;;
      --dry-run) DRY_RUN=yes; shift; continue ;;
      -h | --help) usage; exit 0 ;;
    esac
    [ $# -ge 2 ] || misuse "$1 needs a value; --help lists the options"
    case $1 in
      --cluster) CLUSTER=$2 ;;
      --role) ROLE=$2 ;;
      --ports) PORTS=$2 ;;
      --members) list MEMBERS "$1" "$2" ;;
      --admin-ranges) list ADMINS "$1" "$2" ;;
      --scraper-ranges) list SCRAPERS "$1" "$2" ;;
      --driver-ranges) list DRIVERS "$1" "$2" ;;
      --blocked) list BLOCKED "$1" "$2" ;;
      --blocked-all-traffic) list CUT "$1" "$2" ;;
      --ca) list CA "$1" "$2" ;;
      *) misuse "unknown option $1; --help lists the options" ;;
    esac
    shift 2
  done
  [ -z "$CLUSTER" ] || [[ $CLUSTER =~ ^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$ ]] ||
    misuse "cluster name $CLUSTER: lower-case letters, digits and inner hyphens, at most 63"
}

# apply: reads the plan, checks that nobody locks himself out, then loads the table in one transaction.
apply() {
  need_cluster
  [[ $ROLE == head || $ROLE == worker ]] || misuse "--role is head or worker, not '$ROLE'"
  ((${#MEMBERS[@]})) || misuse "--members is empty: it would refuse every host of the cluster. Name at least this host"
  read_ports
  never_guarded
  own_address_is_member
  keep_the_innocent
  if [ "$DRY_RUN" = yes ]; then
    render
    all_are_blocked
    return
  fi
  need_nft
  local file counted=()
  file=$(mktemp)
  # shellcheck disable=SC2064 # the name as it is now
  trap "rm -f '$file'" EXIT
  mapfile -t counted < <(packets blocked; packets refused)
  render "${counted[@]}" >"$file"
  nft --check --file "$file" || die "nft does not take the table for $CLUSTER: what it says above names the line; nothing was changed"
  nft --file "$file" || die "nft could not load the table for $CLUSTER; nothing was changed"
  printf 'table %s: %s, %s, %d members, %d blocked; guards %s\n' "$(table_name)" "$ROLE" \
    "$([ "$VERDICT" = drop ] && echo enforce || echo 'audit, refuses nothing')" "${#MEMBERS[@]}" \
    "$((${#BLOCKED[@]} + ${#CUT[@]}))" \
    "$(ports_of any "$ROLE")"
  note_dialled_from
  all_are_blocked
}

show() {
  need_nft
  if [ -n "$CLUSTER" ]; then
    local text
    text=$(nft list table inet "$(table_name)" 2>/dev/null) ||
      die "no table $(table_name): the cluster $CLUSTER is not guarded on this host"
    summary "# "
    printf '%s\n' "$text"
    return
  fi
  local names name
  names=$(nft list tables inet | awk '$3 ~ /^raymtls_/ { print $3 }')
  [ -n "$names" ] || { echo "no cluster is guarded on this host"; return; }
  for name in $names; do
    CLUSTER=${name#raymtls_}
    summary ""
  done
}

# summary PREFIX: role, mode and counters of the table in force, in a line.
summary() {
  local did="refused" mode="enforce" role="worker" chain
  chain=$(nft list chain inet "$(table_name)" judge 2>/dev/null || true)
  if [[ ${chain//\"/} == *"counter name refused return"* ]]; then
    did="would have been refused" mode="audit, refuses nothing"
  fi
  # A head guards every port of the plan.
  [ "$(rules guarded "goto judge")" != "$(rules blocked_ports " dport ")" ] || role="head"
  printf '%s%s: %s, %s: %d packets %s, %d of blocked hosts\n' "$1" "$CLUSTER" "$role" "$mode" \
    "$(packets refused)" "$did" "$(packets blocked)"
}

# rules CHAIN WORDS: how many of the table in force have these words.
rules() { nft list chain inet "$(table_name)" "$1" 2>/dev/null | grep -c -- "$2" || true; }

clear() {
  need_cluster
  need_nft
  render_clear | nft --file - || die "could not remove the table $(table_name)"
  printf 'table %s: gone, the cluster %s is not guarded on this host\n' "$(table_name)" "$CLUSTER"
}

need_cluster() { [ -n "$CLUSTER" ] || misuse "--cluster is missing"; }

need_nft() {
  command -v nft >/dev/null || die "nft is missing: install nftables"
  [ "$(id -u)" = 0 ] || die "needs root: it changes this host's packet filter"
}

table_name() { printf 'raymtls_%s' "$CLUSTER"; }

# packets COUNTER: what the table in force has counted; 0 without one.
packets() {
  nft list counter inet "$(table_name)" "$1" 2>/dev/null |
    awk '$1 == "packets" { seen = $2 } END { print seen + 0 }'
}

# list NAME OPTION TEXT: a file's lines, or what stands between commas, into the array NAME.
list() {
  local -n into=$1
  local option=$2 text=$3 item
  if [ -f "$text" ]; then
    (($(wc -l <"$text") <= LIST_MAX)) || misuse "$option $text: more than $LIST_MAX lines"
    mapfile -t into < <(sed -e 's/#.*//' -e 's/[[:space:]]//g' -e '/^$/d' "$text")
  elif [[ $text == */* && ! $text =~ ^[0-9a-fA-F.:/,]+$ ]]; then
    misuse "$option $text: no such file"
  else
    IFS=, read -r -a into <<<"$text"
  fi
  for item in "${into[@]}"; do
    is_address "$item" || misuse "$option: '$item' is no address, and no file of that name is here"
    case $option in
      --members | --blocked* | --ca) [[ $item != */* ]] || misuse "$option: $item is a range; single addresses only" ;;
      *) [[ $item != */0 ]] || misuse "$option: $item is everybody; name the ranges" ;;
    esac
  done
}

# is_address TEXT: with or without the length of a prefix. Strict: nft asks DNS about what it cannot read.
OCTET='(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])'
IS_V4="^$OCTET(\\.$OCTET){3}(/(3[0-2]|[12]?[0-9]))?\$"
IS_V6='^[0-9a-fA-F]{0,4}(:[0-9a-fA-F]{0,4}){2,7}(/(12[0-8]|1[01][0-9]|[1-9]?[0-9]))?$'
is_address() {
  local colons=${1//[^:]/}
  if [[ $1 =~ $IS_V4 ]]; then return 0; fi
  [[ $1 =~ $IS_V6 && $1 != *:::* && $1 != *::*::* && (${#colons} == 7 || $1 == *::*) && $1 =~ ^(::|[^:]) && $1 =~ (::|[^:])(/[0-9]+)?$ ]]
}

# The plan: one line a port, with where it listens, who may reach it, first and last number.
P_NAME=() P_ON=() P_CALLERS=() P_FIRST=() P_LAST=()
read_ports() {
  local name on callers first last
  [ -f "$PORTS" ] || misuse "--ports $PORTS: no such file"
  (($(stat -c %s "$PORTS") <= PORTS_BYTES_MAX)) || misuse "--ports $PORTS: larger than $PORTS_BYTES_MAX bytes"
  while IFS=$'\t' read -r name on callers first last; do
    [[ -n $name && $name != \#* ]] || continue
    if ! [[ $on =~ ^(head|node)$ && $callers =~ ^(-|(member|admin|scraper|driver)(,(member|admin|scraper|driver))*)$ &&
      $first =~ ^[1-9][0-9]{0,4}$ && $last =~ ^[1-9][0-9]{0,4}$ ]] || ((first > last || last > 65535)); then
      misuse "$PORTS: the line of $name is none of: name, head or node, callers, first, last (between tabs)"
    fi
    P_NAME+=("$name") P_ON+=("$on") P_CALLERS+=("$callers") P_FIRST+=("$first") P_LAST+=("$last")
  done <"$PORTS"
  ((${#P_NAME[@]})) || misuse "$PORTS: no port in it"
}

# A plan that covers SSH, the CA or another service would cut this host off: refused.
never_guarded() {
  local i first last what others=("${NEVER_GUARDED[@]}")
  mapfile -t -O "${#others[@]}" others < <({ printf '%s\n' "${SSH_CONNECTION:-}" | sed "s/.* //"; ssh_ports; } | sed -n 's/^[0-9]\+$/& & SSH/p')
  for i in "${!P_NAME[@]}"; do
    while read -r first last what; do
      ((last < P_FIRST[i] || first > P_LAST[i])) ||
        misuse "the port ${P_NAME[i]} (${P_FIRST[i]}-${P_LAST[i]}) of $PORTS covers $((first > P_FIRST[i] ? first : P_FIRST[i])), $what: who needs it would be shut out"
    done < <(printf '%s\n' "${others[@]}")
  done
}

# ssh_ports: where sshd listens, and where it is told to: under sudo nothing says by which port one came in.
# Not on loopback, which is never guarded and where sshd has what it forwards.
ssh_ports() {
  local sshd
  sshd=$(command -v sshd || echo /usr/sbin/sshd)
  {
    ss -Hltnp 2>/dev/null | awk '/"sshd/ && $4 !~ /^(127\.|\[::1\])/ { print $4 }'
    timeout 5 "$sshd" -T 2>/dev/null | awk '$1 == "port" { print $2 }'
    timeout 5 systemctl show -p Listen --value ssh.socket sshd.socket 2>/dev/null | grep -oE '[0-9.:]*:?[0-9]+ \(Stream\)'
  } | sed -nE 's/^(.*:)?([0-9]+)( .*)?$/\2/p' | sort -un || true
}

# A member list without this host is another cluster's, or old: the head would refuse its own workers.
own_address_is_member() {
  local own member
  for own in $(own_addresses); do
    for member in "${MEMBERS[@]}"; do [ "$member" != "$own" ] || return 0; done
  done
  if [ "$DRY_RUN" = yes ]; then
    printf 'note: no address of this host is in --members\n' >&2
  else
    misuse "no address of this host is in --members ($(own_addresses | tr '\n' ' ')): is it the list of $CLUSTER?"
  fi
}

# A guarded port that this host may also dial from: the answer would come to a guarded port, and be refused.
note_dialled_from() {
  local first last reserved="" i range found=()
  read -r first last <"$LOCAL_PORTS/ip_local_port_range" || return 0
  read -r reserved <"$LOCAL_PORTS/ip_local_reserved_ports" || true
  for i in "${!P_NAME[@]}"; do
    [[ $ROLE != worker || ${P_ON[i]} == node ]] || continue
    ((P_LAST[i] >= first && P_FIRST[i] <= last)) || continue
    for range in ${reserved//,/ }; do
      ((P_FIRST[i] < ${range%-*} || P_LAST[i] > ${range#*-})) || continue 2
    done
    found+=("${P_FIRST[i]}-${P_LAST[i]}")
  done
  ((${#found[@]})) || return 0
  local IFS=,
  printf 'note: this host may dial from guarded ports, and answers to those would be refused; keep it from that:\n  sysctl -w net.ipv4.ip_local_reserved_ports=%s%s\n' \
    "${reserved:+$reserved,}" "${found[*]}" >&2
}

own_addresses() { ip -o addr show scope global 2>/dev/null | awk '{ sub(/\/.*/, "", $4); print $4 }'; }
gateways() { { ip -4 route show default; ip -6 route show default; } 2>/dev/null | awk '{ for (i = 1; i < NF; i++) if ($i == "via") print $(i + 1) }'; }

# A block is never a weapon: it leaves out members, admins, the CA and what this host needs, and says so.
keep_the_innocent() {
  ((${#BLOCKED[@]} + ${#CUT[@]})) || return 0
  local address
  local -A why=()
  for address in "${MEMBERS[@]}"; do key "$address"; why[$KEY]="a member"; done
  for address in "${CA[@]}"; do key "$address"; why[$KEY]="the CA"; done
  for address in $(gateways); do key "$address"; why[$KEY]="this host's gateway"; done
  for address in $(own_addresses); do key "$address"; why[$KEY]="this host"; done
  keep_the_guilty BLOCKED
  keep_the_guilty CUT
}

# keep_the_guilty NAME: takes out of the list NAME whom why, the admin ranges or loopback protect.
keep_the_guilty() {
  local -n listed=$1
  local address bits range kept=()
  for address in "${listed[@]}"; do
    key "$address"
    to_bits "$address"
    bits=$BITS
    local reason=${why[$KEY]:-}
    [[ $address != 127.* && $bits != 6:$(printf '0%.0s' {1..127})1 ]] || reason="loopback"
    for range in "${ADMINS[@]}"; do
      to_bits "$range"
      [[ $bits != "$BITS"* ]] || reason="in the admin range $range"
    done
    if [ -n "$reason" ]; then
      printf 'not blocked: %s is %s\n' "$address" "$reason" >&2
    else
      kept+=("$address")
    fi
  done
  NOT_BLOCKED=$((NOT_BLOCKED + ${#listed[@]} - ${#kept[@]}))
  listed=("${kept[@]}")
}

# Whoever asked for a block and got none must not read success; the others of the list are blocked.
all_are_blocked() {
  ((NOT_BLOCKED == 0)) ||
    die "$NOT_BLOCKED of $((NOT_BLOCKED + ${#BLOCKED[@]} + ${#CUT[@]})) addresses of --blocked are not blocked: take them out of the list that is named above, such as --members, and run this again"
}

# key ADDRESS: in KEY, equal for equal addresses.
key() {
  KEY=$1
  [[ $1 != *:* ]] || { to_bits "$1"; KEY=$BITS; }
}

# to_bits ADDRESS[/LENGTH]: the family and the bits of the prefix, in BITS.
to_bits() {
  local address=${1%/*} length="" part groups=() tail=()
  [[ $1 != */* ]] || length=${1#*/}
  BITS=""
  if [[ $address == *:* ]]; then
    IFS=: read -r -a groups <<<"${address%%::*}"
    if [[ $address == *::* ]]; then
      IFS=: read -r -a tail <<<"${address#*::}"
      while ((${#groups[@]} + ${#tail[@]} < 8)); do groups+=(0); done
    fi
    for part in "${groups[@]}" "${tail[@]}"; do binary $((16#$part)) 16; done
    BITS=6:${BITS:0:${length:-128}}
  else
    IFS=. read -r -a groups <<<"$address"
    for part in "${groups[@]}"; do binary "$part" 8; done
    BITS=4:${BITS:0:${length:-32}}
  fi
}

# binary NUMBER WIDTH: appended to BITS.
binary() {
  local number=$1 bits="" i
  for ((i = 0; i < $2; i++)); do bits=$((number & 1))$bits number=$((number >> 1)); done
  BITS+=$bits
}

# ports_of CALLER|any ROLE|cluster: numbers and ranges as nft writes them.
ports_of() {
  local caller=$1 role=$2 i found=()
  for i in "${!P_NAME[@]}"; do
    [[ $role != worker || ${P_ON[i]} == node ]] || continue
    [[ $caller == any || ,${P_CALLERS[i]}, == *,$caller,* ]] || continue
    if ((P_FIRST[i] == P_LAST[i])); then found+=("${P_FIRST[i]}"); else found+=("${P_FIRST[i]}-${P_LAST[i]}"); fi
  done
  comma "${found[@]}"
}

comma() {
  local text
  printf -v text '%s, ' "$@"
  printf '%s' "${text%, }"
}

render_clear() {
  # Declared first, so that deleting what is not there is no error.
  printf 'table inet %s\ndelete table inet %s\n' "$(table_name)" "$(table_name)"
}

# render [BLOCKED_PACKETS REFUSED_PACKETS]: the table as nft loads it. The chains with a hook:
# - blocked_in, blocked_out (raw, before connection tracking): nothing passes between this host and a
#   blocked address on a port of the cluster at either end, established or not; nothing at all between it
#   and an address of the sets cut4 and cut6; what goes to and comes from the CA's ports passes;
# - arriving (before destination NAT, so a port that a container runtime publishes is seen as it was
#   dialled): who may reach a guarded port of this host; what comes from the CA's ports passes, but for
#   the packet that opens a connection;
# - published (forward): the same for a port that is published under another number, whichever side the
#   kernel takes for the one that began;
# - turned (input): the same for another number that the host turns to a port of its own.
# Ranges stand in the rules: the kernel fills a set of ranges only after the rules that look at it are in
# force, and in that moment a member is refused, or everybody is let in.
render() {
  local end caller
  end="counter name blocked$([ "$VERDICT" = count ] || printf ' drop')"
  render_clear
  printf 'table inet %s {\n' "$(table_name)"
  printf '\tcounter %s { packets %d bytes 0 }\n' blocked "${1:-0}" refused "${2:-0}"
  endpoints
  hosts blocked "${BLOCKED[@]}"
  hosts cut "${CUT[@]}"
  hosts members "${MEMBERS[@]}"
  # Enrolled ones, in the agent's table; here all of them stand in the rules.
  hosts drivers
  raw_chain blocked_in prerouting saddr "$end"
  raw_chain blocked_out output daddr "$end"
  printf '\tchain blocked_ports {\n'
  each_port any cluster "th dport %s $end" "th sport %s $end"
  cat <<'TEXT'
	}
	chain arriving {
		type filter hook prerouting priority mangle; policy accept;
		ip saddr . tcp sport @ca4 tcp flags & (syn | ack) != syn accept
		ip6 saddr . tcp sport @ca6 tcp flags & (syn | ack) != syn accept
		iif lo accept
		fib daddr type != local accept
		meta l4proto tcp jump guarded
	}
	chain published {
		type filter hook forward priority filter; policy accept;
		ct direction original ct status dnat jump guarded
		ct direction reply ct status snat jump guarded
	}
	chain turned {
		type filter hook input priority filter; policy accept;
		iif lo accept
		ct direction original ct status dnat jump guarded
		ct direction reply ct status snat jump guarded
	}
	chain guarded {
TEXT
  each_port any "$ROLE" "tcp dport %s goto judge"
  printf '\t}\n'
  judge
  for caller in member admin scraper driver; do
    may_reach "$caller" || continue
    printf '\tchain %ss_ports {\n' "$caller"
    each_port "$caller" "$ROLE" "tcp dport %s accept"
    printf '\t}\n'
  done
  printf '}\n'
}

# endpoints: the CA's addresses, each with its ports.
endpoints() {
  local address port v4=() v6=()
  for address in "${CA[@]}"; do
    for port in "${CA_PORTS[@]}"; do
      if [[ $address == *:* ]]; then v6+=("$address . $port"); else v4+=("$address . $port"); fi
    done
  done
  set_of ca4 "ipv4_addr . inet_service" "$(comma "${v4[@]}")"
  set_of ca6 "ipv6_addr . inet_service" "$(comma "${v6[@]}")"
}

# hosts NAME ADDRESS...: one set for each family.
hosts() {
  local name=$1 address v4=() v6=()
  shift
  for address in "$@"; do
    if [[ $address == *:* ]]; then v6+=("$address"); else v4+=("$address"); fi
  done
  set_of "${name}4" ipv4_addr "$(comma "${v4[@]}")"
  set_of "${name}6" ipv6_addr "$(comma "${v6[@]}")"
}

set_of() {
  printf '\tset %s {\n\t\ttype %s\n' "$1" "$2"
  [ -z "$3" ] || printf '\t\telements = { %s }\n' "$3"
  printf '\t}\n'
}

# each_port CALLER|any ROLE|cluster FORMAT...: a rule in each of the formats for each range of ports.
each_port() {
  local ranges range format
  IFS=, read -r -a ranges <<<"$(ports_of "$1" "$2")"
  shift 2
  for range in "${ranges[@]}"; do
    for format in "$@"; do
      # shellcheck disable=SC2059 # it is a format
      printf "\t\t$format\n" "${range# }"
    done
  done
}

may_reach() { [ -n "$(ports_of "$1" "$ROLE")" ]; }

raw_chain() {
  local family ca=sport open="tcp flags & (syn | ack) != syn "
  [ "$3" = saddr ] || ca=dport open=""
  printf '\tchain %s {\n\t\ttype filter hook %s priority raw; policy accept;\n' "$1" "$2"
  for family in ip:ca4 ip6:ca6; do
    printf '\t\t%s %s . tcp %s @%s %saccept\n' "${family%:*}" "$3" "$ca" "${family#*:}" "$open"
  done
  for family in ip:cut4 ip6:cut6; do
    printf '\t\t%s %s @%s %s\n' "${family%:*}" "$3" "${family#*:}" "$4"
  done
  for family in ip:blocked4 ip6:blocked6; do
    printf '\t\t%s %s @%s meta l4proto { tcp, udp } jump blocked_ports\n' "${family%:*}" "$3" "${family#*:}"
  done
  printf '\t}\n'
}

# What a guarded port asks of whoever sends to it: each packet is judged, by address and port, so what a
# caller that was taken out of a set sends does not arrive, in the middle of its connections either. Who
# began a connection decides nothing: the kernel's record of that can be made to end, and begins anew with
# whoever is heard first.
judge() {
  local word=refused end="counter name refused drop"
  [ "$VERDICT" = drop ] || { word="would refuse" end="counter name refused return"; }
  printf '\tchain judge {\n'
  by_set members member
  by_range admins admin "${ADMINS[@]}"
  by_range scrapers scraper "${SCRAPERS[@]}"
  by_set drivers driver
  by_range drivers driver "${DRIVERS[@]}"
  printf '\t\tct state new limit rate %s log prefix "ray-mtls %s %s: "\n' "$LOG_RATE" "$CLUSTER" "$word"
  printf '\t\t%s\n\t}\n' "$end"
}

# by_set NAME CALLER: single hosts.
by_set() {
  may_reach "$2" || return 0
  printf '\t\t%s jump %s_ports\n' "ip saddr @${1}4" "$1" "ip6 saddr @${1}6" "$1"
}

# by_range NAME CALLER RANGE...: first those of IPv4.
by_range() {
  local name=$1 caller=$2 range
  shift 2
  may_reach "$caller" || return 0
  for range in "$@"; do [[ $range == *:* ]] || printf '\t\tip saddr %s jump %s_ports\n' "$range" "$name"; done
  for range in "$@"; do [[ $range != *:* ]] || printf '\t\tip6 saddr %s jump %s_ports\n' "$range" "$name"; done
}

die() {
  printf '%s\n' "$*" >&2
  exit 1
}

misuse() {
  printf '%s\n' "$*" >&2
  exit 64
}

main "$@"
