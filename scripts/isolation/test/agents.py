#!/usr/bin/env python3
"""Isolation as node-agent keeps it, on network namespaces: one ca-server, two clusters of three hosts with an
agent each, operators, a scraper, a driver and a stranger. Every source, port and family is probed against the
port table; then two clusters on one host, revocations, reloads, a reboot, dead agents, a first `enforce` that
would cut the CA off, the membership lease. Needs root, nft, ip, faketime and the built programs; a minute and a half.

No Ray here: stand-ins listen on every planned port. The quickstart shows Ray itself behind the same table.

REVOCATIONS and RELOADS in the environment say how often those two are repeated, SILENT=1 has a lease end in real time
(nine minutes: the CA takes a clock that jumps for nobody's silence).
"""

import json
import os
import re
import signal
import subprocess
import sys
import time

import lab
from lab import WAIT_SECONDS, Ca, Node
from stage import (
    HOSTS, PORTS, children, compare, counter, down, every_port, failed, hosts_up, judge, listen_everywhere, on, ports_on,
    probe, ready, run, start, table, v4, v6, wait_until, UNPLANNED,
)

REVOCATIONS = int(os.environ.get("REVOCATIONS", 3))
RELOADS = int(os.environ.get("RELOADS", 20))
# Ten times what is promised for a quiet machine: half a second, and a second.
CUT_SECONDS_MAX = 5.0
MEMBERS_MANY = 10_000
LOAD_SECONDS_MAX = 10.0
# After this long without news an agent's call waits at the CA.
SETTLED_SECONDS = 3.0
# A flow that was cut is silent for so long before its end.
SILENT_SECONDS = 1.0
# The shortest lease; steps of the CA's clock shorter than it, that together go beyond it and beyond the three
# minutes by which the CA's record of a contact may be late.
# The shortest there is; a lapse comes up to three minutes and a look of the CA later.
LEASE, LAPSE_SECONDS_MAX = "5m", 660

HOSTS |= {
    "head-a": 1, "worker-a": 2, "second-a": 3, "head-b": 4, "worker-b": 5, "second-b": 6,
    "admin": 7, "scraper": 8, "driver": 9, "stranger": 10, "many": 11, "ca": 20,
}
CLUSTERS = {"team-a": ["head-a", "worker-a", "second-a"], "team-b": ["head-b", "worker-b", "second-b"]}
PLANS = {"team-a": "default", "team-b": "second"}
nodes = {}


def role_of(host):
    return "head" if host.startswith("head") else "worker"


def both(host):
    return f"{v4(host)}/32,{v6(host)}/128"


# The stage


def clusters_up(ca):
    for cluster, hosts in CLUSTERS.items():
        ca.admin("cluster", "create", cluster, "--max-job", "1h")
        ca.set(cluster, "trust-ranges=on", "ray-client=on", f"admin-ranges={both('admin')}",
               f"scraper-ranges={both('scraper')}", f"driver-ranges={both('driver')}", f"lease={LEASE}",
               *plan_settings(PLANS[cluster]))
        for host in hosts:
            nodes[host] = Node(ca, cluster, role_of(host), host)
            nodes[host].start()


def plan_settings(plan):
    """The port table of a plan as settings; the default needs none."""
    if plan == "default":
        return []
    said = []
    for name, _, _, first, last in table(plan):
        if name == "collective":
            said.append(f"collective-ports={first}-{last}")
        elif name == "worker":
            said += [f"port.worker_min={first}", f"port.worker_max={last}"]
        else:
            said.append(f"port.{name}={first}")
    return said


def set_isolation(ca, cluster, mode, members=None):
    """As an operator does, and waits until each table is what it should be."""
    ca.set(cluster, f"isolation={mode}")
    for host in members or CLUSTERS[cluster]:
        wait_until(f"{mode} on {host}", lambda: nodes[host].in_force() == mode, WAIT_SECONDS)
    if mode != "off":
        settle(cluster, members)


def settle(cluster, members=None):
    members = members or CLUSTERS[cluster]
    for host in members:
        wait_until(f"{host} to know all members", lambda: nodes[host].holds_all("members", members), WAIT_SECONDS)


# The story


def words(source, cluster):
    return {word for word, hosts in (
        ("member", CLUSTERS[cluster]), ("driver", ["driver"]), ("admin", ["admin"]), ("scraper", ["scraper"]),
    ) if source in hosts}


def declared():
    """(source, target, port): whether it is open."""
    cells = {}
    for cluster, hosts in CLUSTERS.items():
        for target in hosts:
            for source in HOSTS:
                for port, callers in ports_on(role_of(target), PLANS[cluster]).items():
                    cells[source, target, port] = source == target or bool(callers & words(source, cluster))
                for port in UNPLANNED:
                    cells[source, target, port] = True
    return cells


def matrix(ca):
    wanted = declared()
    for cluster in CLUSTERS:
        set_isolation(ca, cluster, "audit")
    compare("audit refuses nothing", dict.fromkeys(wanted, True), probe(dict.fromkeys(wanted, True)))
    judge("audit counts on each node what it would refuse", [node.counted("refused") > 0 for node in nodes.values()],
          [True] * len(nodes))
    for cluster in CLUSTERS:
        set_isolation(ca, cluster, "enforce")
    before = counters()
    seen = probe(wanted)
    compare("enforce: two clusters of three hosts with an agent each", wanted, seen)
    sent, arrived, refused = (after - then for after, then in zip(counters(), before))
    # Agents speak to the CA meanwhile: connections they begin arrive there.
    again, closed = sent - len(seen), sum(not answer for answer in seen.values())
    judge(f"{sent} SYNs sent ({again} of them no probe's first) = {arrived} let in + {refused} counted as refused",
          arrived + refused, sent)
    judge(f"the agents' tables refused {closed} connections, as many as the probes saw refused", refused, closed)
    statuses()


def counters():
    """Connections begun, arrived past the policy, packets refused, over all hosts."""
    return (
        sum(counter(host, "sent") for host in HOSTS),
        sum(counter(host, "arrived") for host in HOSTS),
        sum(node.counted("refused") for node in nodes.values()),
    )


def statuses():
    """What each agent says of its table is what the kernel says."""
    said = {host: node.status()["isolation"] for host, node in nodes.items()}
    judge("each agent's status says enforce and no problem",
          {(one["in_force"], one["problem"]) for one in said.values()}, {("enforce", None)})
    # An agent looks at its counters every few seconds.
    wait_until("each agent's status to count what its kernel counted", lambda: all(
        node.status()["isolation"]["refused_packets"] == node.counted("refused") for node in nodes.values()), WAIT_SECONDS)


def side_by_side(ca):
    """worker-a is a worker of team-b as well, with an agent of its own and team-b's ports."""
    shared = Node(ca, "team-b", "worker", "worker-a", name="shared")
    shared.start()
    wait_until("team-b's table on worker-a", lambda: shared.in_force() == "enforce", WAIT_SECONDS)
    for node in (shared, nodes["head-b"]):
        wait_until("its members", lambda: node.holds_all("members", ["worker-a", *CLUSTERS["team-b"]]), WAIT_SECONDS)
    cells = {}
    for cluster, extra in (("team-a", []), ("team-b", ["worker-a"])):
        for port, callers in ports_on("worker", PLANS[cluster]).items():
            for source in ("second-a", "head-b", "admin", "scraper", "stranger"):
                cells[source, "worker-a", port] = bool(callers & words(source, cluster))
    cells |= {("worker-a", "head-b", 7379): True, ("worker-a", "head-a", 6379): True}
    compare("two clusters side by side on one host, each with ports of its own", cells, probe(cells))
    run(*on("worker-a", lab.BIN / "node-agent", "leave", "--yes", "--socket", shared.socket))
    shared.stop()
    run(*on("worker-a", "nft", "delete", "table", "inet", shared.table), check=False)
    wait_until("head-b to forget it", lambda: not nodes["head-b"].holds("members", v4("worker-a")), WAIT_SECONDS)
    cells = {("stranger", "worker-a", 7701): True, ("stranger", "worker-a", 6701): False, ("worker-a", "head-b", 7379): False}
    compare("one left, the other stands", cells, probe(cells))


def revocations(ca):
    """A worker is revoked while flows of it run both ways, again and again under new names."""
    last_packets, new_connections, commands = [], [], []
    for number in range(REVOCATIONS):
        flow, new, took, said = revoke_once(ca, number % 2)
        last_packets.append(flow)
        new_connections.append(new)
        commands.append(took)
        if number == 0:
            print("\n".join(f"   | {line}" for line in said.splitlines()))
        come_back(ca, number)
    for name, seconds in (("last packet of an established flow", last_packets), ("last new connection let in", new_connections),
                          ("the command's end", commands)):
        print(f"   {name}, ms after the command's start: {percentiles(seconds)}")
    judge(f"{REVOCATIONS} revocations: flows and new connections end within {CUT_SECONDS_MAX:.0f} s",
          max(last_packets + new_connections) < CUT_SECONDS_MAX)


def revoke_once(ca, family):
    address = (v4, v6)[family]
    revoked, peers = nodes["second-a"], [nodes["head-a"], nodes["worker-a"]]
    blocked_before = [peer.counted("blocked") for peer in peers]
    streams = [start("worker-a", "stream", address("second-a"), 6702), start("second-a", "stream", address("worker-a"), 6701),
               start("head-a", "stream", address("second-a"), 6704), start("second-a", "stream", address("head-a"), 6379)]
    knocks = [start("second-a", "knock", address(host), port) for host, port in (("head-a", 6379), ("worker-a", 10002))]
    for child in streams + knocks:
        ready(child)
    time.sleep(0.5)
    began = time.monotonic()
    done = run(*ca.admin_command("node", "revoke", revoked.name, "--cluster", "team-a", "--reason", "a test", "--yes"), check=False)
    took = time.monotonic() - began
    wait_until("the last of them to be blocked", lambda: all(peer.holds("blocked", address("second-a")) for peer in peers), WAIT_SECONDS)
    time.sleep(SILENT_SECONDS)
    ends = time.monotonic()
    flows = [json.loads(child.communicate()[0]) for child in streams]
    new = [json.loads(child.communicate()[0]) for child in knocks]
    ran = all(flow["back"] > 10 and flow["in_order"] for flow in flows) and all(one["opened"] > 10 for one in new)
    silent = max(one["last"] for one in flows) < ends - SILENT_SECONDS / 2 and all(one["refused_since"] > 0 for one in new)
    # The peers' own ends were closed, not left to time out.
    closed = all(flow["error"] for flow in (flows[0], flows[2]))
    unblocked = [peer.name for peer, before in zip(peers, blocked_before) if peer.counted("blocked") == before]
    judge(f"{revoked.name} revoked: its flows ran until then, are silent now, and each peer closed its sockets and counted",
          (done.returncode, ran, silent, closed, unblocked, "it says" in done.stdout), (0, True, True, True, [], False))
    return (max(0.0, *(one["last"] - began for one in flows)), max(0.0, *(one["last_open"] - began for one in new)),
            took, done.stdout)


def come_back(ca, number):
    """The same host with a token made after the revocation: under a name of its own, or reinstated."""
    old = nodes["second-a"]
    old.stop()
    run(*on("second-a", "nft", "delete", "table", "inet", old.table), check=False)
    if number == 0:
        ca.admin("node", "reinstate", old.name, "--cluster", "team-a", "--yes")
        name = old.name
    else:
        name = f"second-a-{number}"
    nodes["second-a"] = Node(ca, "team-a", "worker", "second-a", name=name)
    nodes["second-a"].start()
    settle("team-a")
    for host in ("head-a", "worker-a"):
        wait_until(f"{host} to unblock it", lambda: not nodes[host].holds("blocked", v4("second-a")), WAIT_SECONDS)


def percentiles(seconds):
    ordered = sorted(round(one * 1000) for one in seconds)
    return f"p50 {ordered[len(ordered) // 2]}, longest {', '.join(map(str, ordered[-3:]))} ({len(ordered)} times, load average {os.getloadavg()[0]:.1f})"


def reloads(_):
    """The table of an agent with 10,000 members, loaded again and again on a host without an agent, under a member's
    numbered flow and as many segments of a member and of a stranger as there can be. Each of the member's that comes
    to the host gets past the table, none of the stranger's does: counted before it and behind it, by tables that stay."""
    text = nodes["worker-a"].text()
    name, loads = "raymtls_team-a", []
    many = "".join(f"10.{100 + n // 16_384}.{n // 64 % 256}.{n % 64 * 4 + 1}, " for n in range(MEMBERS_MANY))
    grown = re.sub(r"(set members4 {.*?elements = {)", rf"\1 {many}", text, count=1, flags=re.DOTALL)
    loaded = f"table inet {name}\ndelete table inet {name}\n{grown}"
    on_many = lambda *command, **more: run(*on("many", *command), **more)
    on_many("nft", "-f", "-", text=loaded)
    floods = {"second-a": "member", "stranger": "stranger"}
    on_many("nft", "-f", "-", text=before_and_behind(floods))
    stream = start("worker-a", "stream", v4("many"), 6701)
    flooding = [start(host, "flood", v4("many"), 6702) for host in floods]
    for child in [stream, *flooding]:
        ready(child)
    for _ in range(RELOADS):
        began = time.monotonic()
        on_many("nft", "-f", "-", text=loaded)
        loads.append(time.monotonic() - began)
    for child in flooding:
        child.communicate()
    time.sleep(0.3)
    flow = json.loads(stream.communicate()[0])
    member, member_in, stranger, stranger_in = (
        counter("many", f"{who}_{where}", "passing") for who in floods.values() for where in ("before", "behind"))
    print(f"   a load with {MEMBERS_MANY} members, ms: {percentiles(loads)}; longest silence of the flow "
          f"{flow['longest_gap'] * 1000:.0f} ms, {flow['sent_again']} of its segments sent again")
    judge(f"{RELOADS} loads with {MEMBERS_MANY} members: the flow's {flow['sent']} numbers all came back in order",
          (flow["back"], flow["in_order"], flow["back"] > RELOADS, flow["error"]), (flow["sent"], True, True, None))
    judge(f"{RELOADS} loads: of a member's {member} segments none is refused", (member - member_in, member > RELOADS), (0, True))
    judge(f"{RELOADS} loads: of a stranger's {stranger} segments none is let in", (stranger_in, stranger > RELOADS), (0, True))
    on_many("nft", "delete", "table", "inet", "passing")
    judge(f"a load takes less than {LOAD_SECONDS_MAX:.0f} s", max(loads) < LOAD_SECONDS_MAX)
    judge("a stranger is refused by it", probe({("stranger", "many", 6701): False}),
          {("stranger", "many", 6701, "v4"): False, ("stranger", "many", 6701, "v6"): False})


def before_and_behind(sources):
    """A table that counts the floods of these hosts before any table of ours, and behind."""
    counters = "".join(f"counter {who}_before {{}}\ncounter {who}_behind {{}}\n" for who in sources.values())
    rules = lambda where: "".join(
        f"ip saddr {v4(host)} tcp dport 6702 counter name {who}_{where}\n" for host, who in sources.items())
    return (f"table inet passing {{\n{counters}"
            f"chain before {{\ntype filter hook prerouting priority -450;\n{rules('before')}}}\n"
            f"chain behind {{\ntype filter hook input priority 300;\n{rules('behind')}}}\n}}\n")


def reboot(ca):
    """As after a reboot with the CA away: no table, and the agent starts."""
    node = nodes["worker-a"]
    node.stop()
    run(*on("worker-a", "nft", "delete", "table", "inet", node.table))
    ca.stop()
    there = f"nft list table inet {node.table} >/dev/null 2>&1 && echo table || echo none"
    # Asks from before the daemon is there; what exec starts looks for the table itself.
    execs = subprocess.Popen(on("worker-a", "bash", "-c", (
        f"for try in $(seq 200); do {lab.BIN}/node-agent exec --socket {node.socket} -- bash -c '{there}' 2>/dev/null && exit; sleep 0.02; done")),
        stdout=subprocess.PIPE, text=True)
    children.append(execs)
    node.start(wait=False)
    answered = None
    until = time.monotonic() + WAIT_SECONDS
    while answered is None and time.monotonic() < until:
        if node.socket.exists() and node.ask("status").returncode == 0:
            answered = node.in_force()
    judge("rebooted with the CA away: the table is there before the agent answers", answered, "enforce")
    judge("and what exec starts finds it", execs.communicate(timeout=WAIT_SECONDS)[0].split(), ["table"])
    cells = {("stranger", "worker-a", 6701): False, ("head-a", "worker-a", 6701): True}
    compare("it refuses and lets in as before", cells, probe(cells))
    ca.start()
    # Each comes back after a pause of its own.
    for one in nodes.values():
        wait_until(f"{one.name} to reach the CA", lambda: one.status()["ca"]["reachable"], WAIT_SECONDS)


def cut_off_newcomer(ca):
    """A node that never held enforce, and that a CA which answered a moment before does not hear any more when it
    does: no new connection of it gets through. What becomes of it takes half a minute: see newcomer_went_back."""
    host = "second-b"
    set_isolation(ca, "team-b", "audit")
    nodes[host].ask("leave", "--yes", check=True)
    nodes[host].stop()
    node = nodes[host] = Node(ca, "team-b", "worker", host, name="newcomer")
    node.start()
    wait_until("audit on the newcomer", lambda: node.in_force() == "audit", WAIT_SECONDS)
    # The call that waits at the CA is to bring the setting.
    time.sleep(SETTLED_SECONDS)
    make_deaf(host)
    ca.set("team-b", "isolation=enforce")
    wait_until("enforce on the newcomer", lambda: node.in_force() == "enforce", WAIT_SECONDS)
    for other in ("head-b", "worker-b"):
        wait_until(f"enforce on {other}", lambda: nodes[other].in_force() == "enforce", WAIT_SECONDS)


def newcomer_went_back(ca):
    host = "second-b"
    node = nodes[host]
    wait_until("the newcomer to go back", lambda: node.status()["isolation"]["in_force"] == "audit", WAIT_SECONDS)
    judge("the CA is gone after the first enforce: it counts only, and status says why",
          (node.in_force(), "the CA was not reached" in (node.status()["isolation"]["problem"] or "")), ("audit", True))
    make_hear()
    node.stop()
    node.start()
    ca.set("team-b", f"scraper-ranges={both('scraper')},192.0.2.1/32")
    wait_until("enforce once the CA can be heard", lambda: node.in_force() == "enforce", WAIT_SECONDS)
    loaded = node.status()["isolation"]["loaded_at"]
    wait_until("the trial to be over", lambda: "stays from now on" in (lab.LOGS / "agent-team-b-newcomer").read_text(), WAIT_SECONDS)
    # The next load comes by the call that waits at the CA by then; the calls after it are not heard.
    time.sleep(SETTLED_SECONDS)
    make_deaf(host)
    ca.set("team-b", f"scraper-ranges={both('scraper')}")
    wait_until("a later load", lambda: node.status()["isolation"]["loaded_at"] != loaded, WAIT_SECONDS)
    run(*on(host, "ss", "-tK", "dst", v4("ca")))
    wait_until("the CA to be out of reach", lambda: node.status()["ca"]["reachable"] is False, WAIT_SECONDS)
    judge("a later load without the CA never opens", node.in_force(), "enforce")
    make_hear()
    dials_from_guarded_ports(node)


def dials_from_guarded_ports(node):
    """The CA's answers come to the workers' ports, and the CA is no member: its endpoint passes first."""
    run(*on(node.host, "sysctl", "-qw", "net.ipv4.ip_local_port_range=11002 11101"))
    node.stop()
    node.start()
    wait_until("the CA to be heard through guarded ports", lambda: node.status()["ca"]["reachable"], WAIT_SECONDS)
    judge("no table cuts an agent off from its CA", (node.in_force(), node.status()["ca"]["reachable"]), ("enforce", True))
    run(*on(node.host, "sysctl", "-qw", "net.ipv4.ip_local_port_range=32768 60999"))


def make_deaf(host):
    """The CA's host drops what would open a connection from this one; what is up stays."""
    rules = f"""table inet deaf {{
  chain in {{
    type filter hook prerouting priority raw;
    ip saddr {v4(host)} tcp flags & (syn | ack) == syn drop
    ip6 saddr {v6(host)} tcp flags & (syn | ack) == syn drop
  }}
}}
"""
    run(*on("ca", "nft", "-f", "-"), text=rules)


def make_hear():
    run(*on("ca", "nft", "delete", "table", "inet", "deaf"))


def dead_agent(ca):
    node = nodes["second-a"]
    node.stop(signal.SIGKILL)
    cells = {("stranger", "second-a", 6701): False, ("head-a", "second-a", 6701): True}
    compare("the agent was killed: the last table stays", cells, probe(cells))
    said = run(*on("second-a", lab.BIN / "node-agent", "status", "--socket", node.socket, "--state-dir", node.dir / "state"), check=False)
    line = next((line for line in said.stdout.splitlines() if line.startswith("isolation")), "")
    print(f"   | {line}")
    judge("status without its daemon says how old the table is", bool(re.search(r"enforce.*table loaded \S+.* ago", line)))


def silent_node_lapsed(ca):
    """Its leaf is of no use on the network: neither at its own address nor copied to another."""
    node, peers = nodes["second-a"], [nodes["head-a"], nodes["worker-a"]]
    if os.environ.get("SILENT") != "1":
        print("   (a lease that ends is shown with SILENT=1)")
        node.start()
        settle("team-a")
        return
    wait_until("the silent node to leave its peers' sets",
               lambda: not any(peer.holds("members", v4("second-a")) for peer in peers), LAPSE_SECONDS_MAX)
    judge("silent beyond the lease, a node is no member; those that call are",
          ([peer.holds("members", v6("second-a")) for peer in peers],
           [peer.holds("members", address("head-a")) for peer in peers for address in (v4, v6)]), ([False] * 2, [True] * 4))
    cells = {("second-a", "worker-a", 6701): False, ("stranger", "worker-a", 6701): False, ("head-a", "worker-a", 6701): True}
    compare("its address, and any other that its leaf is copied to, is refused", cells, probe(cells))
    node.start()
    settle("team-a")
    cells = {("second-a", "worker-a", 6701): True, ("second-a", "head-a", 6379): True}
    compare("its first contact brings it back", cells, probe(cells))


def cleared(_):
    node = nodes["second-a"]
    node.stop(signal.SIGKILL)
    run(*on("second-a", lab.BIN / "node-agent", "isolation", "clear", "--yes", "--socket", node.socket, "--state-dir", node.dir / "state"))
    judge("isolation clear removes the table, and nothing else",
          run(*on("second-a", "nft", "list", "tables")).stdout.split("\n"), ["table inet watch", ""])


def main():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
    began = time.monotonic()
    down()
    chosen = sys.argv[1:]
    try:
        hosts_up()
        listen_everywhere(every_port())
        ca = Ca("ca")
        ca.start()
        clusters_up(ca)
        print(f"   {len(HOSTS)} hosts, {len(nodes)} agents, up after {time.monotonic() - began:.1f} s", flush=True)
        if chosen and "matrix" not in chosen:
            for cluster in CLUSTERS:
                set_isolation(ca, cluster, "enforce")
        # What has to wait half a minute does so beside the others.
        for story in (matrix, side_by_side, reboot, cut_off_newcomer, revocations, reloads, dead_agent,
                      newcomer_went_back, silent_node_lapsed, cleared):
            if not chosen or story.__name__ in chosen:
                at = time.monotonic()
                story(ca)
                print(f"   ({story.__name__}: {time.monotonic() - at:.1f} s)", flush=True)
    except BaseException:
        for log in sorted(lab.LOGS.iterdir()):
            print(f"   -- the end of {log.name}")
            print("\n".join(f"   | {line}" for line in log.read_text().splitlines()[-5:]))
        raise
    finally:
        down()
        lab.clear()
    print(f"   {len(failed)} failed, {time.monotonic() - began:.1f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
