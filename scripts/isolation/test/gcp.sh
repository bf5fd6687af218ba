#!/usr/bin/env bash
# scripts/isolation/gcp/firewall.sh against a stand-in for gcloud that writes down how it was called:
# what two clusters ask for is in gcp.golden, and asked twice the rules are updated, not made anew.
# What Google makes of the calls is not shown here. UPDATE_SNAPSHOT=1 rewrites gcp.golden.
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT

# The rules that exist are the lines of $WORK/rules.
cat >"$WORK/gcloud" <<'STAND_IN'
#!/usr/bin/env bash
set -euo pipefail
work=$(dirname "$0")
touch "$work/rules"
case "$3" in
  describe) grep -qx -- "$4" "$work/rules"; exit ;;
  list)
    [[ " $* " =~ \ --filter=name~([^ ]+)\  ]]
    grep -E -- "${BASH_REMATCH[1]}" "$work/rules" || true
    exit
    ;;
  create) ! grep -qx -- "$4" "$work/rules"; printf '%s\n' "$4" >>"$work/rules" ;;
  update) grep -qx -- "$4" "$work/rules" ;;
  delete) grep -qx -- "$4" "$work/rules"; sed -i "/^$4\$/d" "$work/rules" ;;
  *) echo "the stand-in knows no $3" >&2; exit 2 ;;
esac
printf 'gcloud' >>"$work/calls"
printf ' %s' "$@" >>"$work/calls"
printf '\n' >>"$work/calls"
STAND_IN
chmod +x "$WORK/gcloud"

main() {
  apply team-a --dry-run >"$WORK/printed"
  [ ! -e "$WORK/calls" ] || fail "--dry-run called gcloud"
  apply team-a
  differ "$WORK/printed" "$WORK/calls" "what --dry-run prints is not what is called"
  rm "$WORK/rules"
  apply team-b
  [ -z "${UPDATE_SNAPSHOT:-}" ] || cp "$WORK/calls" "$HERE/gcp.golden"
  differ "$HERE/gcp.golden" "$WORK/calls" "the calls are not those of gcp.golden"

  rm "$WORK/calls"
  apply team-b
  ! grep -q ' create ' "$WORK/calls" || fail "a second apply makes rules anew"
  rm "$WORK/calls"
  gcp clear --cluster team-b --project p
  [ ! -s "$WORK/rules" ] || fail "clear leaves rules behind: $(cat "$WORK/rules")"
  head -n 1 "$WORK/calls" | grep -q -e -deny- || fail "clear takes an allow away before the denials"

  # A cluster whose name begins with another's, and goes on as a rule's does.
  apply a
  apply a-deny
  cp "$WORK/rules" "$WORK/both"
  gcp clear --cluster a --project p
  differ <(grep "ray-a-deny-.*-from-" "$WORK/both"; grep ray-a-deny-deny- "$WORK/both") \
    <(grep -v deny-v "$WORK/rules"; grep deny-v "$WORK/rules") "clear took another cluster's rules, or left its own"

  refused "the head's ports would be open on workers" gcp apply --cluster x --project p --network n --head-account a --worker-account a
  refused "holds everybody" apply team-a --admin-ranges 0.0.0.0/0
  printf '   %d calls for two clusters as in gcp.golden, updated when asked again, removed denials first\n' "$(wc -l <"$HERE/gcp.golden")"
}

gcp() { GCLOUD=$WORK/gcloud "$HERE/../gcp/firewall.sh" "$@"; }

apply() {
  local cluster=$1
  shift
  gcp apply --cluster "$cluster" --project p --network ray --head-account "head-$cluster@p.example" \
    --worker-account "worker-$cluster@p.example" --ca-account ca@p.example --admin-ranges 192.0.2.0/28,2001:db8:a::/64 \
    --scraper-ranges 192.0.2.64/32 --driver-ranges 203.0.113.0/24 "$@"
}

differ() { diff -u "$1" "$2" || fail "$3"; }

refused() {
  local words=$1 said
  shift
  if said=$("$@" 2>&1); then fail "not refused: $*"; fi
  [[ $said == *"$words"* ]] || fail "refused with other words: $said"
}

fail() {
  printf '   FAILED: %s\n' "$*" >&2
  exit 1
}

main
