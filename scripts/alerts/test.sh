#!/usr/bin/env bash
# test.sh: has promtool read the alert rules, and run what deploy/alerts/ray-mtls.test.yaml says of each:
# one case in which it fires, and one in which it stays silent.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
. "$ROOT/scripts/lib/say.sh"
. "$ROOT/scripts/lib/need.sh"

need_base
need_promtool
cd "$ROOT/deploy/alerts"
"$PROMTOOL" check rules ray-mtls.rules.yaml
"$PROMTOOL" test rules ray-mtls.test.yaml
