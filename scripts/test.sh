#!/usr/bin/env bash
# Everything the tests need, then the tests: the steps of scripts/check, one after the other, all of
# them even if one fails. Ends with the seconds of each and one line `N passed, N failed`.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$ROOT/scripts/lib/say.sh"
. "$ROOT/scripts/lib/need.sh"

STEPS=(fmt shell build clippy doc deny unit conformance e2e lint tls bins alerts manifests isolation ray stories tunnel bootstrap units deploy)
CARGO_DENY_VERSION=0.20.2
PASSED=0
FAILED=0
ROWS=()

usage() {
  cat <<TEXT
usage: scripts/test.sh [--full]

Installs what the tests need (Debian packages, cargo-deny, virtual environments), then runs
the steps of scripts/check in order: ${STEPS[*]}. As root: the Ray step makes network namespaces.

  --full    more kills of bootstrap-node.sh, the Slurm example, the quickstart as a person runs it with its
            release build, tunnel mode for an hour with its benchmark, and the long stories

examples
  scripts/test.sh
  scripts/check unit      one step alone

Exit code 0 only if every step passed.
TEXT
}

main() {
  while [ $# -gt 0 ]; do
    case $1 in
      --full) STEPS+=(slurm quickstart recycle stories-long tunnel-full full); export KILLS=60 KILLS_WITH_RAY=4 REVOCATIONS=20 RELOADS=100 SILENT=1 ;;
      -h | --help) usage; exit 0 ;;
      *) usage >&2; exit 64 ;;
    esac
    shift
  done
  [ "$(id -u)" = 0 ] || die "needs root, for packages and network namespaces; scripts/check runs single steps without"
  step "Installing what the tests need"
  local began=$SECONDS
  install_needs
  step_end
  ROWS+=("install"$'\t'"$((SECONDS - began)) s"$'\t')

  local name
  for name in "${STEPS[@]}"; do one_step "$name"; done

  printf '\n'
  { printf 'step\tseconds\t\n' && printf '%s\n' "${ROWS[@]}"; } | columns
  printf '\n%d passed, %d failed\n' "$PASSED" "$FAILED"
  ((FAILED == 0))
}

install_needs() {
  need_base
  need_cargo
  need_command ip iproute2
  need_command openssl openssl
  need_command faketime faketime
  need_command shellcheck shellcheck
  need_command certtool gnutls-bin
  need_command nft nftables
  need_nginx
  need_pkilint
  need_sslyze
  need_promtool
  need_manifest_linters
  need_ray
  run "$INSTALL_MAX" "$BASE/logs/cargo.log" "the crates" cargo fetch --locked --manifest-path "$ROOT/Cargo.toml"
  if [ "$(cargo deny --version 2>/dev/null)" != "cargo-deny $CARGO_DENY_VERSION" ]; then
    run "$INSTALL_MAX" "$BASE/logs/cargo.log" "cargo-deny $CARGO_DENY_VERSION" \
      cargo install --locked cargo-deny --version "$CARGO_DENY_VERSION"
  fi
}

# one_step NAME: runs it and writes down how it went. Without a build there is nothing for Ray to try.
one_step() {
  local name=$1 began=$SECONDS verdict=passed
  step "$name"
  if [[ $name =~ ^(ray|stories|tunnel) ]] && [ "${BUILD_FAILED:-no}" = yes ]; then
    verdict="FAILED: not run, the build failed"
  elif ! "$ROOT/scripts/check" "$name"; then
    verdict=FAILED
    [ "$name" != build ] || BUILD_FAILED=yes
  fi
  step_end
  if [ "$verdict" = passed ]; then PASSED=$((PASSED + 1)); else FAILED=$((FAILED + 1)); fi
  ROWS+=("$name"$'\t'"$((SECONDS - began)) s"$'\t'"$verdict")
}

main "$@"
