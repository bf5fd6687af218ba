#!/usr/bin/env bash
# test.sh: has promtool read the alert rules, and run what deploy/alerts/ray-mtls.test.yaml says of each:
# one case in which it fires, and one in which it stays silent. The Grafana dashboard's expressions are read
# as rules, too: what does not parse is no panel.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
. "$ROOT/scripts/lib/say.sh"
. "$ROOT/scripts/lib/need.sh"

need_base
need_promtool
cd "$ROOT/deploy/alerts"
"$PROMTOOL" check rules ray-mtls.rules.yaml
"$PROMTOOL" test rules ray-mtls.test.yaml

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 - "$ROOT/deploy/grafana/ray-mtls.json" >"$folder/dashboard.yaml" <<'PYTHON'
import json, sys
panels = json.load(open(sys.argv[1]))["panels"]
asked = [target["expr"] for panel in panels for target in panel.get("targets", [])]
rules = [{"record": f"panel:{number}", "expr": expression} for number, expression in enumerate(asked)]
print(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
PYTHON
"$PROMTOOL" check rules "$folder/dashboard.yaml"
