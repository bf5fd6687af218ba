#!/usr/bin/env python3
"""The packet filter of scripts/isolation/nftables.sh on real kernels' hosts: network namespaces on a
bridge of their own, with stand-in listeners on every port of Ray's plan. Every source, port and family
is probed and compared with what the port table declares. Needs root, nft and ip; about a minute.

No Ray here: that Ray itself works behind these rules is for other tests to show.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from stage import (
    HERE, HOSTS, OPEN_SECONDS_MAX, PORTS, PREFIX, PYTHON, REFUSED_SECONDS, UNPLANNED, answers, ask, children, compare,
    counter, down, every_port, failed, hosts_up, judge, listen_everywhere, on, ports_on, probe, ready, run, start, v4, v6,
)

SCRIPT = HERE.parent / "nftables.sh"

# From the start of the command to the last packet of an established flow. Far above what is seen.
CUT_SECONDS_MAX = 5.0
SETTLE_TRIES_MAX = 20
# A flow that was cut is silent for so long before its end.
SILENT_SECONDS = 0.5
# How long the kernel remembers a connection that was reset, 10 s otherwise; and a wait in which it has
# forgotten, and a listener's keepalive (host.py) has been sent since.
RESET_REMEMBERED_SECONDS = 1
FORGOTTEN_SECONDS = 6
# Connections tried while the table is replaced, over each family, and how long each: 100 at a time (host.py).
KNOCKS, KNOCK_SECONDS = 2000, 0.1

# Name: last part of its addresses.
HOSTS |= {"head-a": 1, "worker-a": 2, "second-a": 3, "head-b": 4, "admin": 5, "scraper": 6, "driver-a": 7, "stranger": 8}
CLUSTERS = {"team-a": ["head-a", "worker-a", "second-a"], "team-b": ["head-b"]}
DRIVERS = {"team-a": ["driver-a"], "team-b": []}
TARGETS = {"head-a": ("team-a", "head"), "worker-a": ("team-a", "worker"), "head-b": ("team-b", "head")}


# The stage


def container_up():
    """Behind head-a, with its dashboard port published under the same and under another number."""
    inner, outer = f"{PREFIX}-inner", f"{PREFIX}-head-a"
    run("ip", "netns", "add", inner)
    run("ip", "-n", outer, "link", "add", "c0", "type", "veth", "peer", "name", "eth0", "netns", inner)
    run("ip", "-n", outer, "-batch", "-", text=(
        "addr add 172.30.0.1/24 dev c0\naddr add fd00:79::1/64 dev c0 nodad\nlink set c0 up\n"))
    run("ip", "-n", inner, "-batch", "-", text=(
        "link set lo up\naddr add 172.30.0.2/24 dev eth0\naddr add fd00:79::2/64 dev eth0 nodad\nlink set eth0 up\n"
        "route add default via 172.30.0.1\nroute add default via fd00:79::1\n"))
    for name in ("ipv4.ip_forward", "ipv6.conf.all.forwarding"):
        run(*on("head-a", "sysctl", "-qw", f"net.{name}=1"))
    run(*on("head-a", "nft", "-f", "-"), text=(
        "table inet runtime {\n chain in { type nat hook prerouting priority dstnat;\n"
        "  meta nfproto ipv4 tcp dport { 8265, 18265 } dnat ip to 172.30.0.2:8265\n"
        "  meta nfproto ipv6 tcp dport { 8265, 18265 } dnat ip6 to [fd00:79::2]:8265\n"
        # Not the container's but the host's own, as kube-proxy does it for a pod with the host's network.
        "  tcp dport 26379 redirect to :6379\n }\n"
        # What the container sends of its own comes from the host, and as it happens from this port.
        " chain out { type nat hook postrouting priority srcnat;\n"
        "  oifname eth0 tcp sport 8265 masquerade to :18265\n }\n}\n"))
    ready(start("inner", "listen", "8265"))
    # A new link is not at once a working one.
    for _ in range(SETTLE_TRIES_MAX):
        if all(answers("head-a", [(address, 8265, REFUSED_SECONDS) for address in ("172.30.0.2", "fd00:79::2")])):
            return
    raise SystemExit("the container behind head-a did not come up")


# What is declared, and what is seen


def words(source, cluster):
    """What a host is to a cluster."""
    return {word for word, members in (
        ("member", CLUSTERS[cluster]), ("driver", DRIVERS[cluster]), ("admin", ["admin"]), ("scraper", ["scraper"]),
    ) if source in members}


def declared():
    """(source, target, port): whether it is open."""
    cells = {}
    for target, (cluster, role) in TARGETS.items():
        for source in HOSTS:
            for port, callers in ports_on(role).items():
                cells[source, target, port] = source == target or bool(callers & words(source, cluster))
            for port in UNPLANNED:
                cells[source, target, port] = True
    return cells


def counters():
    """Connections begun, arrived past the policy, packets refused, over all hosts."""
    return (
        sum(counter(host, "sent") for host in HOSTS),
        sum(counter(host, "arrived") for host in HOSTS),
        sum(counter(target, "refused", f"raymtls_{cluster}") for target, (cluster, _) in TARGETS.items()),
    )


def apply(target, *more, cluster=None, role=None, members=None, admins=("admin",), check=True, before=()):
    own, kind = TARGETS[target]
    cluster = cluster or own
    lists = {
        "--members": members or CLUSTERS[cluster], "--admin-ranges": admins,
        "--scraper-ranges": ["scraper"], "--driver-ranges": DRIVERS[cluster],
    }
    arguments = ["apply", "--cluster", cluster, "--role", role or kind]
    for option, hosts in lists.items():
        if hosts:
            arguments += [option, ",".join(address(host) for host in hosts for address in (v4, v6))]
    return run(*on(target, *before, SCRIPT, *arguments, *more), check=check)


def listing(host, table="raymtls_team-a"):
    """A table with its packet counts; bytes begin at 0 with each load."""
    return re.sub(r" bytes \d+", "", run(*on(host, "nft", "list", "table", "inet", table)).stdout)


# The story


def matrix():
    wanted = declared()
    open_to_all = dict.fromkeys(wanted, True)
    compare("no policy, so the listeners are there", open_to_all, probe(open_to_all))
    for target in TARGETS:
        apply(target, "--audit")
    compare("audit refuses nothing", open_to_all, probe(open_to_all))
    shown = {target: run(*on(target, SCRIPT, "show")).stdout for target in ("head-a", "worker-a")}
    judge("what is shown says role, audit and that it would have been refused",
          [text.startswith(f"team-a: {role}, audit,") and "would have been refused" in text
           for role, text in zip(("head", "worker"), shown.values())], [True, True])
    judge("audit counts what it would refuse", counters()[2] > 0)
    for target in TARGETS:
        run(*on(target, SCRIPT, "clear", "--cluster", TARGETS[target][0]))
        apply(target)
    before = counters()
    seen = probe(wanted)
    compare("enforce", wanted, seen)
    sent, arrived, refused = (after - then for after, then in zip(counters(), before))
    again, closed = sent - len(seen), sum(not answer for answer in seen.values())
    judge(f"{sent} SYNs sent ({again} of them again) = {arrived} let in + {refused} counted as refused", arrived + refused, sent)
    judge(f"the counters refused {closed} connections, as many as the probes saw refused", refused - again, closed)


def reload():
    first = listing("worker-a")
    apply("worker-a")
    judge("loaded twice it is the same table, counters included", listing("worker-a") == first)
    with tempfile.TemporaryDirectory() as folder:
        # Whatever it does not take: the script writes no such table.
        nft = Path(folder) / "nft"
        nft.write_text(f'#!/bin/sh\n[ "$1" != --check ] || echo "no rule" >>"$3"\nexec {shutil.which("nft")} "$@"\n')
        nft.chmod(0o755)
        done = apply("worker-a", check=False, before=("env", f"PATH={folder}:{os.environ['PATH']}"))
    judge("a table that nft does not take leaves the old one as it was",
          ("nft does not take" in done.stderr, listing("worker-a")), (True, first))
    done = apply("worker-a", members=["stranger"], check=False)
    judge("a member list without this host is refused", (done.returncode != 0, listing("worker-a")), (True, first))
    no_gap()


def no_gap():
    """A stranger knocks all the while the table is replaced, and while one is rejected."""
    let_in, refused = counter("worker-a", "arrived"), counter("worker-a", "refused", "raymtls_team-a")
    knocking = ask("stranger", [(address("worker-a"), 6701, KNOCK_SECONDS) for address in (v4, v6) for _ in range(KNOCKS)])
    # The first of them are on their way.
    while counter("worker-a", "refused", "raymtls_team-a") == refused:
        time.sleep(0.05)
    for members in (None, ["stranger"], None, ["stranger"], None):
        apply("worker-a", members=members, check=members is None)
    during = knocking.poll() is None
    opened = sum(json.loads(knocking.stdout.read()))
    judge("no knock is let in while the table is loaded again and again, or one is rejected",
          (during, opened, counter("worker-a", "arrived")), (True, 0, let_in))


def dialled_from():
    """The note about guarded ports that this host may dial from, and the command it offers."""
    said = apply("head-a").stderr
    offered = re.search(r"sysctl -w (\S+)$", said, re.MULTILINE)
    judge("the head's metrics ports are among those it dials from, which is said", "44217-44217,44227-44227" in said)
    if offered:
        run(*on("head-a", "sysctl", "-qw", offered[1]))
        judge("with the ports reserved nothing is said", apply("head-a").stderr, "")


def lockout():
    """A program of sshd's name, on a port that the plan's workers have; nothing else says where SSH comes in."""
    with tempfile.TemporaryDirectory() as folder:
        sshd = Path(folder) / "sshd"
        sshd.symlink_to(os.path.realpath(PYTHON))
        for address, refused in (("0.0.0.0", True), ("127.0.0.1", False)):
            # Without the listeners of the other tests: the port itself.
            code = f"import socket, sys; s = socket.create_server(('{address}', 10022)); print('ready', flush=True); sys.stdin.read()"
            child = subprocess.Popen(on("admin", sshd, "-c", code), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            children.append(child)
            ready(child)
            done = run(*on("admin", SCRIPT, "apply", "--dry-run", "--cluster", "team-a", "--role", "worker", "--members", v4("admin")), check=False)
            judge(f"a plan that covers sshd's port on {address} is {'refused' if refused else 'taken'}",
                  ("covers 10022, SSH" in done.stderr, done.returncode != 0), (refused, refused))
            child.kill()
            child.wait()


def published():
    cells = [(source, "head-a", port) for source in ("admin", "stranger", "head-b") for port in (8265, 18265)]
    container_up()
    run(*on("head-a", SCRIPT, "clear", "--cluster", "team-a"))
    open_to_all = dict.fromkeys(cells, True)
    compare("published ports, no policy", open_to_all, probe(open_to_all))
    apply("head-a")
    wanted = {cell: cell[0] == "admin" for cell in cells}
    compare("published ports (8265, and 18265 to 8265) refuse all but admins", wanted, probe(wanted))
    turned = {(source, "head-a", 26379): source == "worker-a" for source in ("worker-a", "admin", "stranger", "head-b")}
    compare("a port that the host turns to its own 6379 refuses all but members", turned, probe(turned))


def cut():
    """Three flows between two hosts. The peer leaves the members first, and is blocked then: its connection
    to a guarded port ends with the first, ours to it and its own to a port we do not guard with the second."""
    left = ["head-a", "worker-a"]
    for address, family in ((v4, "IPv4"), (v6, "IPv6")):
        apply("worker-a")
        flows = {
            "guarded": start("second-a", "flow", address("worker-a"), 6701),
            "inward": start("second-a", "flow", address("worker-a"), 6379),
            "outward": start("worker-a", "flow", address("second-a"), 6702),
        }
        for flow in flows.values():
            ready(flow)
        time.sleep(0.3)
        unlisted = time.monotonic()
        apply("worker-a", members=left)
        time.sleep(0.5)
        blocked = time.monotonic()
        apply("worker-a", "--blocked", f"{v4('second-a')},{v6('second-a')}", members=left)
        took = round((time.monotonic() - blocked) * 1000)
        time.sleep(2 * SILENT_SECONDS)
        ends = time.monotonic()
        last = {name: float(flow.communicate()[0]) for name, flow in flows.items()}
        judge_cut(f"{family}: no longer a member, its open connection to us is silent", last["guarded"], unlisted, ends)
        judge_cut(f"{family}: blocked (the command took {took} ms), its open connection that ran on is silent", last["inward"], blocked, ends)
        judge_cut(f"{family}: blocked, our open connection to it is silent", last["outward"], blocked, ends)
    judge("the blocked counter moved", counter("worker-a", "blocked", "raymtls_team-a") > 0)
    said = apply("worker-a", "--blocked", ",".join([v4("second-a"), v6("second-a"), v4("head-a")]), members=left, check=False)
    judge("a block of one who is still a member fails, and blocks the others",
          (said.returncode, f"not blocked: {v4('head-a')} is a member" in said.stderr, " 2 blocked;" in said.stdout,
           v4("second-a") in listing("worker-a").split("set blocked4")[1].split("}")[0]), (1, True, True, True))
    cells = {("second-a", "worker-a", 6701): False, ("worker-a", "second-a", 6702): False, ("second-a", "worker-a", 22): True}
    compare("blocked: new connections refused both ways, ports that are not Ray's still work", cells, probe(cells))
    apply("worker-a", members=left)


def judge_cut(claim, last, began, ends):
    """Went on until the command began, and fell silent long before the flow was ended from here."""
    seconds = last - began
    judge(f"{claim} {round(seconds * 1000)} ms after the command began",
          0 < seconds < CUT_SECONDS_MAX and last < ends - SILENT_SECONDS)


def revived():
    """Who began a connection is the kernel's record, and a removed host can have it end: a reset in sequence is
    recorded and then dropped. The server, which knows of no reset, speaks next, and counts as the one that began."""
    forget_resets_soon("worker-a")
    apply("worker-a")
    held = [start("second-a", "hold", address("worker-a"), 6701) for address in (v4, v6)]
    apply_and_reset("worker-a", held, members=["head-a", "worker-a"])
    judge("removed, it resets its connections to us and they stay silent (IPv4, IPv6)", ask_held(held), [False, False])


def picked_up():
    """Connections that are older than the table and than connection tracking, in both directions."""
    run(*on("worker-a", SCRIPT, "clear", "--cluster", "team-a"))
    inward = [start("stranger", "hold", address("worker-a"), 6701) for address in (v4, v6)]
    outward = [start("worker-a", "hold", address("stranger"), 6701) for address in (v4, v6)]
    for one in inward + outward:
        ready(one)
    apply("worker-a")
    time.sleep(FORGOTTEN_SECONDS)
    judge("loaded late: a stranger's connection to us is silent, though we spoke first", ask_held(inward), [False, False])
    judge("loaded late: our own connections go on", ask_held(outward), [True, True])
    apply("worker-a")
    judge("loaded again: our own connections go on", ask_held(outward), [True, True])


def revived_in_container():
    """The same with a published port; needs container_up()."""
    forget_resets_soon("head-a")
    apply("head-a")
    held = [start("admin", "hold", address("head-a"), 18265) for address in (v4, v6)]
    apply_and_reset("head-a", held, admins=())
    judge("removed, it resets its connections to a container and they stay silent", ask_held(held), [False, False])


def forget_resets_soon(host):
    run(*on(host, "sysctl", "-qw", f"net.netfilter.nf_conntrack_tcp_timeout_close={RESET_REMEMBERED_SECONDS}"))


def apply_and_reset(target, held, **lists):
    for one in held:
        ready(one)
    apply(target, **lists)
    say(held, "reset")
    time.sleep(FORGOTTEN_SECONDS)


def ask_held(held):
    """Of each: whether what it sends is echoed."""
    return [json.loads(line) for line in say(held, "ask")]


def say(held, line):
    for one in held:
        one.stdin.write(f"{line}\n")
        one.stdin.flush()
    return [one.stdout.readline() for one in held]


def two_clusters():
    apply("worker-a")
    apply("worker-a", "--ports", PORTS / "second.tsv", cluster="team-b", role="worker", members=["head-b", "worker-a"])
    cells = {}
    for cluster, plan in (("team-a", "default"), ("team-b", "second")):
        for port, callers in ports_on("worker", plan).items():
            for source in ("second-a", "head-b", "admin", "scraper", "stranger"):
                cells[source, "worker-a", port] = bool(callers & words(source, cluster))
    compare("two clusters on one host, each with ports of its own", cells, probe(cells))
    run(*on("worker-a", SCRIPT, "clear", "--cluster", "team-b"))
    cells = {("stranger", "worker-a", 7701): True, ("stranger", "worker-a", 6701): False}
    compare("one cleared, the other stands", cells, probe(cells))
    run(*on("worker-a", SCRIPT, "clear", "--cluster", "team-a"))
    run(*on("worker-a", SCRIPT, "clear", "--cluster", "team-a"))
    tables = run(*on("worker-a", "nft", "list", "tables")).stdout.split("\n")
    judge("cleared, nothing of ours is left", tables, ["table inet watch", ""])


def main():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
    os.environ.pop("SSH_CONNECTION", None)
    began = time.monotonic()
    down()
    try:
        hosts_up()
        every = every_port()
        listen_everywhere(every)
        print(f"   {len(HOSTS)} hosts, {len(every)} ports each, up after {time.monotonic() - began:.1f} s", flush=True)
        matrix()
        reload()
        dialled_from()
        cut()
        revived()
        picked_up()
        two_clusters()
        published()
        revived_in_container()
        lockout()
    finally:
        down()
    print(f"   {len(failed)} failed, {time.monotonic() - began:.1f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
