"""The stage of the packet filter's tests: hosts as network namespaces on a bridge of their own, stand-in
listeners, probes, and what the port table declares. It tests nothing by itself.

A test names its hosts in HOSTS, calls hosts_up(), and down() in the end whatever happened.
"""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
HOST = HERE / "host.py"
PORTS = HERE.parent / "ports"
PREFIX = f"rmiso{os.getpid()}"
PYTHON = sys.executable

COMMAND_SECONDS_MAX = 60
# So much of what a failed command said is shown.
EXCERPT_MAX = 600
# How long a connection that should open may take on a loaded machine; and one that should not, below the
# second after which TCP sends a SYN again, so that it is one packet. Was it open all the same and only
# slow, then fewer packets were refused than the counters must show.
OPEN_SECONDS_MAX = 15
REFUSED_SECONDS = 0.7
# Ports that no plan has: open to everybody, whatever is enforced.
UNPLANNED = [22, 6380]

# Name: last part of its addresses.
HOSTS = {}

failed = []
children = []


def v4(host):
    return f"10.78.0.{HOSTS[host]}"


def v6(host):
    return f"fd00:78::{HOSTS[host]:x}"


def run(*command, text=None, check=True, **more):
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=COMMAND_SECONDS_MAX, **more)
    if check and done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}: exit {done.returncode}\n{(done.stdout + done.stderr)[:EXCERPT_MAX]}")
    return done


def on(host, *command):
    return ("ip", "netns", "exec", f"{PREFIX}-{host}", *map(str, command))


def start(host, *arguments):
    child = subprocess.Popen(
        on(host, PYTHON, HOST, *arguments), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    children.append(child)
    return child


def ready(child):
    if child.stdout.readline() != "ready\n":
        raise SystemExit(f"{child.args}: did not come up")


def judge(claim, seen, wanted=True):
    right = seen == wanted
    print(f"   {'ok' if right else 'FAILED'}: {claim}" + ("" if right else f": {seen}, wanted {wanted}"[:300]), flush=True)
    if not right:
        failed.append(claim)


def hosts_up():
    run("ip", "netns", "add", f"{PREFIX}-bridge")
    run("ip", "-n", f"{PREFIX}-bridge", "link", "add", "br0", "type", "bridge")
    run("ip", "-n", f"{PREFIX}-bridge", "link", "set", "br0", "up")
    for host, number in HOSTS.items():
        netns = f"{PREFIX}-{host}"
        run("ip", "netns", "add", netns)
        run("ip", "-n", netns, "-batch", "-", text="link set lo up\n")
        run("ip", "-n", f"{PREFIX}-bridge", "link", "add", f"p{number}", "type", "veth", "peer", "name", "eth0", "netns", netns)
        run("ip", "-n", f"{PREFIX}-bridge", "link", "set", f"p{number}", "master", "br0", "up")
        run("ip", "-n", netns, "-batch", "-", text=(
            f"addr add {v4(host)}/24 dev eth0\naddr add {v6(host)}/64 dev eth0 nodad\nlink set eth0 up\n"))
        # Each host counts the connections it begins, and those that reach it past the policy.
        run(*on(host, "nft", "-f", "-"), text=(
            "table inet watch {\n counter sent {}\n counter arrived {}\n"
            " chain sent { type filter hook output priority 300; tcp flags & (syn | ack) == syn counter name sent; }\n"
            " chain arrived { type filter hook input priority 300; tcp flags & (syn | ack) == syn counter name arrived; }\n}\n"))


def listen_everywhere(ports):
    listeners = [start(host, "listen", *map(str, sorted(ports))) for host in HOSTS]
    for listener in listeners:
        ready(listener)


def down(*_):
    for child in children:
        child.kill()
    for name in run("ip", "netns", "list", check=False).stdout.split("\n"):
        name = name.split(" ")[0]
        left = re.fullmatch(r"rmiso(\d+)-.*", name)
        # Ours, and those of a run that was killed.
        if left and (left[1] == str(os.getpid()) or not Path(f"/proc/{left[1]}").exists()):
            for pid in run("ip", "netns", "pids", name, check=False).stdout.split():
                run("kill", "-KILL", pid, check=False)
            run("ip", "netns", "del", name, check=False)


# What is declared, and what is seen


def table(plan):
    rows = []
    for line in (PORTS / f"{plan}.tsv").read_text().splitlines():
        if not line.startswith("#"):
            name, host, callers, first, last = line.split("\t")
            rows.append((name, host, set(callers.split(",")), int(first), int(last)))
    return rows


def ports_on(role, plan="default"):
    """Port: who may reach it. Of a range the ends and the middle."""
    found = {}
    for _, host, callers, first, last in table(plan):
        if host == "node" or role == "head":
            for port in {first, (first + last) // 2, last}:
                found[port] = callers
    return found


def every_port():
    return {port for plan in ("default", "second") for port in ports_on("head", plan)} | set(UNPLANNED)


def ask(source, targets):
    child = start(source, "probe")
    child.stdin.write("".join(json.dumps(target) + "\n" for target in targets))
    child.stdin.close()
    return child


def answers(source, targets):
    return json.loads(ask(source, targets).stdout.read())


def probe(cells):
    """Probes each (source, target, port), which is wanted open or not, over both families, all sources at once."""
    asked = {}
    for (source, target, port), wanted in cells.items():
        for address in (v4, v6):
            asked.setdefault(source, []).append((target, port, address, OPEN_SECONDS_MAX if wanted else REFUSED_SECONDS))
    running = {source: ask(source, [(a(t), p, s) for t, p, a, s in probes]) for source, probes in asked.items()}
    seen = {}
    for source, child in running.items():
        for (target, port, address, _), answer in zip(asked[source], json.loads(child.stdout.read()), strict=True):
            seen[source, target, port, address.__name__] = answer
    return seen


def compare(claim, wanted, seen):
    wrong = [cell for cell, answer in seen.items() if answer != wanted[cell[:3]]]
    for cell in wrong[:5]:
        print(f"   | {cell}: {'open' if seen[cell] else 'refused'}")
    opened = sum(seen.values())
    judge(f"{claim}: {len(seen)} probes, {opened} open, {len(seen) - opened} refused, {len(wrong)} wrong", len(wrong), 0)


def counter(host, name, of="watch"):
    text = run(*on(host, "nft", "list", "counter", "inet", of, name)).stdout
    return int(re.search(r"packets (\d+)", text)[1])


def wait_until(what, holds, seconds=30):
    """Asks again and again; says what never came to be."""
    until = time.monotonic() + seconds
    while not (seen := holds()):
        if time.monotonic() > until:
            raise SystemExit(f"   gave up after {seconds} s waiting for {what}")
        time.sleep(0.05)
    return seen
