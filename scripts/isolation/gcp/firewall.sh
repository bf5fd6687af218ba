#!/usr/bin/env bash
# Who may reach Ray's ports of one cluster on Google Cloud: VPC firewall rules between service accounts.
# Not tags: whoever may edit an instance may give it a tag. Run it once for each cluster.
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
GCLOUD=${GCLOUD:-gcloud}

# An allow must come before the deny, and both before whatever the network brought along
# (default-allow-internal has 65534).
ALLOW_PRIORITY=900
DENY_PRIORITY=1000
CA_PORTS=tcp:7443,tcp:7444

CLUSTER="" PROJECT="" NETWORK="" PORTS=$HERE/../ports/default.tsv DRY_RUN=no
HEAD="" WORKER="" CA=""
ADMINS="" SCRAPERS="" DRIVERS=""

usage() {
  cat <<TEXT
usage: firewall.sh apply --cluster NAME --project P --network N --head-account SA --worker-account SA [options]
       firewall.sh clear --cluster NAME --project P

Each host runs as its service account; head and workers have different ones, or the head's ports would be
open on workers too. A range list is addresses separated by commas, IPv4 or IPv6.

  --ca-account SA         ca-server runs as it: opens the CA to this cluster's nodes and drivers
  --admin-ranges LIST     who may reach the dashboard and Ray Client
  --scraper-ranges LIST   who may reach the metrics ports
  --driver-ranges LIST    who may reach Ray Client
  --ports FILE            the port plan; default ports/default.tsv
  --dry-run               print the commands, run nothing (and ask Google nothing)

examples
  firewall.sh apply --cluster team-a --project p --network ray --dry-run \\
    --head-account ray-head-a@p.iam.gserviceaccount.com --worker-account ray-worker-a@p.iam.gserviceaccount.com
  firewall.sh clear --cluster team-a --project p
TEXT
}

main() {
  local verb=${1:-}
  [ $# = 0 ] || shift
  case $verb in
    apply | clear) ;;
    -h | --help) usage; exit 0 ;;
    *) usage >&2; exit 64 ;;
  esac
  while [ $# -gt 0 ]; do
    case $1 in
      --dry-run) DRY_RUN=yes; shift; continue ;;
      -h | --help) usage; exit 0 ;;
    esac
    [ $# -ge 2 ] || die "$1 needs a value; --help lists the options"
    case $1 in
      --cluster) CLUSTER=$2 ;;
      --project) PROJECT=$2 ;;
      --network) NETWORK=$2 ;;
      --head-account) HEAD=$2 ;;
      --worker-account) WORKER=$2 ;;
      --ca-account) CA=$2 ;;
      --admin-ranges) ADMINS=$2 ;;
      --scraper-ranges) SCRAPERS=$2 ;;
      --driver-ranges) DRIVERS=$2 ;;
      --ports) PORTS=$2 ;;
      *) die "unknown option $1; --help lists the options" ;;
    esac
    shift 2
  done
  # Rule names are at most 63 characters, with what they say behind the cluster's name.
  [[ $CLUSTER =~ ^[a-z0-9]([a-z0-9-]{0,28}[a-z0-9])?$ ]] ||
    die "--cluster '$CLUSTER': lower-case letters, digits and inner hyphens, at most 30"
  [ -n "$PROJECT" ] || die "--project is missing"
  [ "$DRY_RUN" = yes ] || command -v "$GCLOUD" >/dev/null || die "gcloud is missing: install the Google Cloud CLI, or add --dry-run"
  "$verb"
}

apply() {
  [ -n "$NETWORK" ] || die "--network is missing"
  [ -n "$HEAD" ] || die "--head-account is missing"
  [ -n "$WORKER" ] || die "--worker-account is missing"
  [ "$HEAD" != "$WORKER" ] || die "head and workers both run as $HEAD: the head's ports would be open on workers; give them accounts of their own"
  local list
  for list in "$ADMINS" "$SCRAPERS" "$DRIVERS"; do
    [[ ,$list, != */0,* ]] || die "$list holds everybody; name the ranges"
  done
  # Allows first: a cluster that runs is not cut in between.
  allow_members
  allow_ranges admin "$ADMINS"
  allow_ranges scraper "$SCRAPERS"
  allow_ranges driver "$DRIVERS"
  if [ -n "$CA" ]; then
    rule ca-from-nodes ALLOW "$CA_PORTS" "$CA" accounts "$HEAD,$WORKER"
    by_family ca-from-driver "$CA_PORTS" "$CA" "$DRIVERS"
  fi
  rule deny-v4 DENY "$(ports_of any head)" "$HEAD,$WORKER" ranges 0.0.0.0/0
  rule deny-v6 DENY "$(ports_of any head)" "$HEAD,$WORKER" ranges ::/0
}

allow_members() {
  rule nodes-from-members ALLOW "$(ports_of member node)" "$HEAD,$WORKER" accounts "$HEAD,$WORKER"
  rule head-from-members ALLOW "$(ports_of member head)" "$HEAD" accounts "$HEAD,$WORKER"
}

# allow_ranges CALLER LIST: what it may reach on the head, and on every node.
allow_ranges() {
  local caller=$1 list=$2
  by_family "head-from-$caller" "$(ports_of "$caller" head)" "$HEAD" "$list"
  by_family "nodes-from-$caller" "$(ports_of "$caller" node)" "$HEAD,$WORKER" "$list"
}

# by_family NAME PORTS TARGET_ACCOUNTS LIST: a rule takes ranges of one family.
by_family() {
  local name=$1 ports=$2 targets=$3 v4 v6
  [ -n "$ports" ] || return 0
  v4=$(tr , '\n' <<<"$4" | grep -v : | paste -sd, || true)
  v6=$(tr , '\n' <<<"$4" | grep : | paste -sd, || true)
  [ -z "$v4" ] || rule "$name-v4" ALLOW "$ports" "$targets" ranges "$v4"
  [ -z "$v6" ] || rule "$name-v6" ALLOW "$ports" "$targets" ranges "$v6"
}

# rule NAME ACTION PORTS TARGET_ACCOUNTS accounts|ranges SOURCES: made, or brought up to date.
rule() {
  local name=ray-$CLUSTER-$1 action=$2 ports=$3 targets=$4 kind=$5 sources=$6
  local priority=$ALLOW_PRIORITY from=--source-ranges
  [ "$action" = ALLOW ] || priority=$DENY_PRIORITY
  [ "$kind" = ranges ] || from=--source-service-accounts
  local changing=("--priority=$priority" "--rules=$ports" "--target-service-accounts=$targets" "$from=$sources")
  if [ "$DRY_RUN" = no ] && "$GCLOUD" compute firewall-rules describe "$name" "--project=$PROJECT" >/dev/null 2>&1; then
    call compute firewall-rules update "$name" "--project=$PROJECT" "${changing[@]}"
  else
    call compute firewall-rules create "$name" "--project=$PROJECT" "--network=$NETWORK" --direction=INGRESS \
      "--action=$action" "${changing[@]}" --enable-logging
  fi
}

# Every name that apply gives a rule of this cluster, whole: `a` is not the beginning of `a-deny` here.
clear() {
  local names name
  local ours="^ray-$CLUSTER-(nodes-from-members|head-from-members|(nodes|head)-from-(admin|scraper|driver)-v[46]|ca-from-nodes|ca-from-driver-v[46]|deny-v[46])\$"
  local asked=(compute firewall-rules list "--project=$PROJECT" "--filter=name~$ours" "--format=value(name)")
  if [ "$DRY_RUN" = yes ]; then
    call "${asked[@]}"
    return
  fi
  # Once more here: what is deleted does not hang on how Google reads the filter.
  names=$("$GCLOUD" "${asked[@]}" | grep -E -- "$ours" || true)
  # The denials go first: a cluster that runs is not cut in between.
  { grep -e -deny-v <<<"$names" || true; grep -v -e -deny-v <<<"$names" || true; } | while read -r name; do
    [ -z "$name" ] || call compute firewall-rules delete "$name" "--project=$PROJECT" --quiet </dev/null
  done
}

# Printed so that a shell reads it back.
call() {
  local word
  if [ "$DRY_RUN" = no ]; then
    "$GCLOUD" "$@"
    return
  fi
  printf gcloud
  for word in "$@"; do
    if [[ $word =~ ^[A-Za-z0-9@%+=:,./_-]+$ ]]; then printf ' %s' "$word"; else printf ' %q' "$word"; fi
  done
  printf '\n'
}

# ports_of CALLER|any ON: `node` is what each node has, `head` what the head has besides; any: both.
ports_of() {
  local caller=$1 on=$2 name host callers first last found=()
  while IFS=$'\t' read -r name host callers first last; do
    [[ -n $name && $name != \#* ]] || continue
    [[ $first =~ ^[0-9]+$ && $last =~ ^[0-9]+$ ]] || die "$PORTS: the line of $name has no port numbers"
    [[ $caller == any || $host == "$on" ]] || continue
    [[ $caller == any || ,$callers, == *,$caller,* ]] || continue
    if ((first == last)); then found+=("tcp:$first"); else found+=("tcp:$first-$last"); fi
  done <"$PORTS"
  (
    IFS=,
    printf '%s' "${found[*]}"
  )
}

die() {
  printf '%s\n' "$*" >&2
  exit 1
}

main "$@"
