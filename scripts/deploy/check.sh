#!/usr/bin/env bash
# The examples against schemas: the cluster launcher's YAML, the Kubernetes manifests; the launcher's setup
# commands with a script that somebody swapped; the commands of the CA's pod on folders as it has them.
# `scripts/check deploy` runs it; the sidecar's are part of `bootstrap`.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
. "$ROOT/scripts/lib/say.sh"
. "$ROOT/scripts/lib/need.sh"

BIN=$(cd "${RAYMTLS_BIN_DIR:-$ROOT/target/debug}" && pwd)
KUBERNETES_VALIDATE_VERSION=1.37.0
CHECKER=$BASE/kubernetes-validate

need_base
need_ray
if [ "$(cat "$CHECKER/.complete" 2>/dev/null)" != "$KUBERNETES_VALIDATE_VERSION" ]; then
  rm -rf "$CHECKER"
  "$(find_python)" -m venv "$CHECKER"
  PIP_ROOT_USER_ACTION=ignore run "$INSTALL_MAX" "$BASE/logs/pip.log" "kubernetes-validate $KUBERNETES_VALIDATE_VERSION" \
    "$CHECKER/bin/python" -m pip install --quiet "kubernetes-validate==$KUBERNETES_VALIDATE_VERSION"
  printf '%s\n' "$KUBERNETES_VALIDATE_VERSION" >"$CHECKER/.complete"
fi
"$VENV/bin/python" "$ROOT/scripts/deploy/check.py" ray "$ROOT/examples/ray-up.yaml"
"$VENV/bin/python" -c '
import sys, yaml
print("\0".join(yaml.safe_load(open(sys.argv[1]))["setup_commands"]), end="\0")' "$ROOT/examples/ray-up.yaml" |
  "$ROOT/scripts/deploy/launcher.sh" "$ROOT/scripts/bootstrap-node.sh"
"$CHECKER/bin/python" "$ROOT/scripts/deploy/check.py" kubernetes "$ROOT"/deploy/kuberay/*.yaml
PATH=$VENV/bin:$PATH "$ROOT/scripts/deploy/ca-pod.sh" "$BIN" "$ROOT/deploy/kuberay/ca-server.yaml"
