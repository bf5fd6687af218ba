"""Checks the examples against schemas: the cluster launcher's YAML against the one in the installed Ray, the
Kubernetes objects against those of kubernetes-validate. A RayCluster's own fields are not checked: KubeRay's
schema is in neither; its pod templates are, as Pods. What it finds wrong goes to standard error, exit code 1.

usage: check.py ray FILE | check.py kubernetes FILE...
"""

import hashlib
import json
import os
import stat
import sys

import yaml

# The oldest release whose native sidecars are on by default.
KUBERNETES = "1.29"


def main():
    kind, *files = sys.argv[1:]
    wrong = []
    for file in files:
        with open(file, encoding="utf-8") as text:
            objects = [o for o in yaml.safe_load_all(text) if o]
        for o in objects:
            wrong += [f"{file}: {w}" for w in (check_ray(o, file) if kind == "ray" else check_kubernetes(o))]
    for line in wrong:
        print(line, file=sys.stderr)
    sys.exit(1 if wrong else 0)


def check_ray(config, file):
    """The schema, then Ray's own loading of it, which fills in defaults and validates again."""
    import jsonschema
    import ray
    from ray.autoscaler._private.util import prepare_config, validate_config

    with open(os.path.join(os.path.dirname(ray.__file__), "autoscaler/ray-schema.json"), encoding="utf-8") as text:
        schema = json.load(text)
    wrong = [f"{'/'.join(map(str, e.path))}: {e.message}" for e in jsonschema.Draft7Validator(schema).iter_errors(config)]
    if not wrong:
        validate_config(prepare_config(config))
    base = os.path.dirname(file)
    with open(os.path.join(base, "../scripts/bootstrap-node.sh"), "rb") as script:
        seen = hashlib.sha256(script.read()).hexdigest()
    if not any(seen in command for command in config["setup_commands"]):
        wrong.append(f"setup_commands: the hash of scripts/bootstrap-node.sh is {seen}")
    for there, here in config.get("file_mounts", {}).items():
        if not there.startswith("~/"):
            wrong.append(f"file_mounts {there}: not in the ssh user's home, where nobody else makes a folder before")
        if not here.endswith(".join") and not os.path.exists(os.path.join(base, here)):
            wrong.append(f"file_mounts {there}: there is no {here}")
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        if not any("bootstrap-node.sh" in command for command in config[key]):
            wrong.append(f"{key} does not call bootstrap-node.sh")
    if not wrong:
        print(f"{file}: valid for Ray {ray.__version__}")
    return wrong


def check_kubernetes(o):
    import kubernetes_validate

    if o["kind"] == "RayCluster":
        groups = [("head", o["spec"]["headGroupSpec"])] + [(g["groupName"], g) for g in o["spec"]["workerGroupSpecs"]]
        pods = [
            {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, **g["template"]["metadata"]}, "spec": g["template"]["spec"]}
            for name, g in groups
        ]
        return [w for pod in pods for w in check_kubernetes(pod) + check_ray_pod(pod)]
    name = f"{o['kind']} {o['metadata']['name']}"
    if o["kind"] == "StatefulSet":
        labels = o["spec"]["template"]["metadata"]["labels"]
        if labels != o["spec"]["selector"]["matchLabels"]:
            return [f"{name}: its selector is not its pods' labels {labels}"]
    try:
        kubernetes_validate.validate(o, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{name}: {'/'.join(map(str, error.path))}: {error.message}"]
    print(f"{name}: valid for Kubernetes {KUBERNETES}")
    return []


def check_ray_pod(pod):
    """What no schema knows: who can reach what in a pod of the example."""
    spec, name = pod["spec"], pod["metadata"]["name"]
    (agent,) = [c for c in spec["initContainers"] if c["name"] == "node-agent"]
    (ray,) = spec["containers"]
    mounts = {m["name"]: m for m in ray["volumeMounts"]}
    join = next(v["secret"] for v in spec["volumes"] if v["name"] == "join")
    shared = next(v for v in spec["volumes"] if v["name"] == "ray-mtls")
    claims = {
        "the agent is a native sidecar": agent.get("restartPolicy") == "Always",
        "Ray does not mount the join file": "join" not in mounts,
        "Ray does not mount the agent's state": "agent-state" not in mounts,
        "Ray cannot write where the agent writes": mounts["ray-mtls"].get("readOnly") is True,
        "agent and Ray are two users": agent["securityContext"]["runAsUser"] != ray["securityContext"]["runAsUser"],
        "nobody is root": all(c["securityContext"].get("runAsNonRoot") is True for c in (agent, ray)),
        "the join file is for its owner": stat.S_IMODE(join["defaultMode"]) == 0o400,
        "keys lie in memory": shared["emptyDir"]["medium"] == "Memory",
        "Ray starts through exec": ray["command"][1] == "exec",
    }
    return [f"Pod {name}: not so: {claim}" for claim, holds in claims.items() if not holds]


main()
