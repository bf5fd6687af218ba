#!/usr/bin/env python3
"""The NetworkPolicies of scripts/isolation/kubernetes/, read as Kubernetes documents them, against what
the port table declares: two clusters, the CA and everybody around them, every source, target and port. CA, head
and worker of the first cluster are the pods of deploy/kuberay/.

A simulation: no Kubernetes runs here, and whether a cluster's network plugin enforces policies at all
is for that cluster to show. What a policy uses beyond the words below is an error, not a guess.
"""

import ipaddress
import sys
from pathlib import Path

import yaml

HERE = Path(__file__).resolve().parent
MANIFESTS = sorted((HERE.parent / "kubernetes").glob("*.yaml"))
DEPLOY = HERE.parents[2] / "deploy/kuberay"
CA_PORTS = {7443, 7444}
CLUSTERS = ("team-a", "team-b")


def ray(cluster, kind):
    labels = {"ray.io/is-ray-node": "yes", "ray.io/cluster": cluster, "ray.io/node-type": kind}
    return {"namespace": cluster, "labels": labels}


def deployed():
    """The pods of deploy/kuberay: the labels its files give them, and those that KubeRay adds."""
    objects = [o for path in DEPLOY.glob("*.yaml") for o in yaml.safe_load_all(path.read_text()) if o]
    (ca,) = [o for o in objects if o["kind"] == "StatefulSet"]
    (cluster,) = [o for o in objects if o["kind"] == "RayCluster"]
    name, namespace = cluster["metadata"]["name"], cluster["metadata"].get("namespace", "default")
    places = {"ca": {"namespace": ca["metadata"]["namespace"], "labels": ca["spec"]["template"]["metadata"]["labels"]}}
    for kind, group in (("head", cluster["spec"]["headGroupSpec"]), ("worker", cluster["spec"]["workerGroupSpecs"][0])):
        own = group["template"].get("metadata", {}).get("labels", {})
        places[f"{kind}-{CLUSTERS[0]}"] = {"namespace": namespace, "labels": own | ray(name, kind)["labels"]}
    return places


# A pod, or an address outside.
PLACES = {
    "dns": {"namespace": "kube-system", "labels": {"k8s-app": "kube-dns"}},
    "admin": {"namespace": "ray-admin", "labels": {}},
    "scraper": {"namespace": "monitoring", "labels": {}},
    "stranger": {"namespace": "default", "labels": {}},
    # Labels of a Ray node in a namespace that is not the cluster's.
    "pretender": {"namespace": "default", "labels": ray("team-a", "head")["labels"]},
    # In the cluster's namespace, and no Ray node.
    "neighbour": {"namespace": "team-a", "labels": {}},
    # A second cluster that somebody started in team-a's namespace.
    "lodger": {"namespace": "team-a", "labels": ray("lodger", "worker")["labels"]},
    "metadata": {"address": "169.254.169.254"},
    "internet": {"address": "203.0.113.7"},
    "internet6": {"address": "2001:db8::7"},
}
for name in CLUSTERS:
    PLACES |= {f"{kind}-{name}": ray(name, kind) for kind in ("head", "worker")}
    PLACES[f"second-{name}"] = ray(name, "worker")
    PLACES[f"driver-{name}"] = {"namespace": f"{name}-drivers", "labels": {}}

# The first cluster and the CA are the example's own, not what this file thinks they are.
PLACES |= deployed()


def only(mapping, *words):
    if extra := set(mapping) - set(words):
        raise SystemExit(f"this simulation does not know {sorted(extra)}")


def selects(selector, labels):
    only(selector, "matchLabels")
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())


def peer_matches(peer, place, namespace):
    only(peer, "podSelector", "namespaceSelector", "ipBlock")
    if "ipBlock" in peer:
        only(peer["ipBlock"], "cidr", "except")
        if "address" not in place:
            return False
        address = ipaddress.ip_address(place["address"])
        inside = lambda cidr: address in ipaddress.ip_network(cidr)
        return inside(peer["ipBlock"]["cidr"]) and not any(map(inside, peer["ipBlock"].get("except", [])))
    if "address" in place:
        return False
    if "namespaceSelector" in peer:
        if not selects(peer["namespaceSelector"], {"kubernetes.io/metadata.name": place["namespace"]}):
            return False
    elif place["namespace"] != namespace:
        return False
    return selects(peer.get("podSelector", {}), place["labels"])


def port_matches(port, protocol, number):
    only(port, "protocol", "port", "endPort")
    return port.get("protocol", "TCP") == protocol and port["port"] <= number <= port.get("endPort", port["port"])


def allows(policies, place, other, direction, protocol, number):
    """A pod that no policy selects for a direction is open in it; else some rule must let it."""
    if "address" in place:
        return True
    rules, side, key = ("ingress", "from", "Ingress") if direction == "in" else ("egress", "to", "Egress")
    chosen = [
        policy for policy in policies
        if policy["metadata"]["namespace"] == place["namespace"]
        and key in policy["spec"]["policyTypes"]
        and selects(policy["spec"]["podSelector"], place["labels"])
    ]
    return not chosen or any(
        (not rule.get(side) or any(peer_matches(peer, other, policy["metadata"]["namespace"]) for peer in rule[side]))
        and (not rule.get("ports") or any(port_matches(port, protocol, number) for port in rule["ports"]))
        for policy in chosen
        for rule in policy["spec"].get(rules, [])
    )


def seen(policies, source, target, protocol, number):
    a, b = PLACES[source], PLACES[target]
    return allows(policies, a, b, "out", protocol, number) and allows(policies, b, a, "in", protocol, number)


def plan():
    rows = []
    for line in (HERE.parent / "ports/default.tsv").read_text().splitlines():
        if not line.startswith("#"):
            _, host, callers, first, last = line.split("\t")
            rows.append((host, set(callers.split(",")), range(int(first), int(last) + 1)))
    return rows


def is_ray(place):
    kind, _, cluster = place.partition("-")
    return cluster if kind in ("head", "worker", "second") else None


def words(source, cluster):
    named = {"admin": "admin", "scraper": "scraper", f"driver-{cluster}": "driver"}
    return "member" if is_ray(source) == cluster else named.get(source)


def declared(rows, source, target, protocol, number):
    """What the port table and the documents say. `lodger` wears no known cluster's label: cut off whole."""
    from_ray, to_ray = is_ray(source), is_ray(target)
    if source == "ca" or target == "lodger" or source == "lodger":
        return False
    if to_ray:
        if protocol != "TCP":
            return False
        role = target.partition("-")[0]
        return any(
            number in ports and words(source, to_ray) in callers and (host == "node" or role == "head")
            for host, callers, ports in rows
        )
    if target == "ca":
        known = from_ray or source in ("admin", *(f"driver-{name}" for name in CLUSTERS))
        return bool(known) and protocol == "TCP" and number in CA_PORTS
    if from_ray:
        return target == "dns" and number == 53
    return True


def main():
    policies = [policy for path in MANIFESTS for policy in yaml.safe_load_all(path.read_text()) if policy]
    rows = plan()
    edges = {number for _, _, ports in rows for number in (ports[0], ports[len(ports) // 2], ports[-1], ports[-1] + 1)}
    probes = [("TCP", n) for n in sorted(edges | CA_PORTS | {22, 53, 80, 443, 6703, 8000})] + [("UDP", 53), ("UDP", 6379)]
    wrong, opened, count = [], 0, 0
    for source in PLACES:
        for target in PLACES:
            if source == target:
                continue
            for protocol, number in probes:
                got = seen(policies, source, target, protocol, number)
                count, opened = count + 1, opened + got
                if got != declared(rows, source, target, protocol, number):
                    wrong.append(f"{source} -> {target} {protocol} {number}: {'open' if got else 'refused'}")
    for line in wrong[:10]:
        print(f"   | {line}")
    guarded = sum(bool(is_ray(place)) for place in PLACES)
    print(
        f"   {len(policies)} policies, {len(PLACES)} places ({guarded} of them Ray's), {count} combinations "
        f"simulated: {opened} open, {count - opened} refused, {len(wrong)} not as declared"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
