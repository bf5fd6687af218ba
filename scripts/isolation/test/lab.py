"""The real programs on the stage: one ca-server, node-agents in the hosts' namespaces, and what their tables
in the kernel hold. It judges nothing.

Everything lies in a folder of its own, which down() removes. Hosts share this machine's files and processes;
only their networks are apart.
"""

import ipaddress
import json
import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

from stage import HERE, children, on, run, v4, v6, wait_until

BIN = Path(os.environ.get("RAYMTLS_BIN_DIR") or HERE.parent.parent.parent / "target/release").resolve()
TRUST_DOMAIN = "isolation.internal"
ENROLL_PORT, NODE_PORT = 7443, 7444
# Longer than any answer should take on a loaded machine.
WAIT_SECONDS = 60

folder = Path(tempfile.mkdtemp(prefix="ray-mtls-isolation-"))
os.chmod(folder, 0o755)
LOGS = folder / "logs"
LOGS.mkdir()


class Ca:
    """The CA on its host; its state outlives a stop."""

    def __init__(self, host):
        self.host = host
        self.dir = folder / "ca"
        self.socket = self.dir / "admin.sock"
        self.child = None
        self.tokens = 0
        self.dir.mkdir(mode=0o700)
        run(*on(host, BIN / "ca-server", "init", "--dir", self.dir / "data", "--trust-domain", TRUST_DOMAIN,
                "--kek-file", self.dir / "kek"))
        at = f"{v4(host)}:"
        (self.dir / "ca.toml").write_text(
            f'kek_file = "{self.dir}/kek"\nadmin_socket = "{self.socket}"\nhttp_listen = "127.0.0.1:7446"\n'
            f'enrollment_listen = "{at}{ENROLL_PORT}"\nenrollment_endpoints = ["{at}{ENROLL_PORT}"]\n'
            f'node_listen = "{at}{NODE_PORT}"\nnode_endpoints = ["{at}{NODE_PORT}"]\n')
        # Moves the CA's clock when it is written to.
        self.clock = self.dir / "clock"
        self.clock.write_text("+0\n")

    def start(self, settable_clock=False):
        command = [BIN / "ca-server", "serve", "--dir", self.dir / "data", "--config", self.dir / "ca.toml"]
        if settable_clock:
            command = ["env", f"FAKETIME_TIMESTAMP_FILE={self.clock}", "FAKETIME_NO_CACHE=1", "DONT_FAKE_MONOTONIC=1",
                       f"LD_PRELOAD={faketime_library()}", *command]
        self.child = daemon(self.host, "ca-server", *command)
        wait_until("the CA to answer", lambda: self.admin("cluster", "list", check=False).returncode == 0, WAIT_SECONDS)

    def stop(self):
        end(self.child)

    def admin(self, *words, check=True):
        return run(BIN / "ca-admin", "--socket", self.socket, *map(str, words), check=check)

    def admin_command(self, *words):
        return [str(BIN / "ca-admin"), "--socket", str(self.socket), *map(str, words)]

    def set(self, cluster, *changes):
        self.admin("cluster", "set", cluster, *changes, "--yes")

    def token(self, cluster, role, name, host):
        """A join file for one node with both of its host's addresses."""
        self.tokens += 1
        join = self.dir / f"join-{self.tokens}"
        self.admin("token", "create", "--cluster", cluster, "--role", role, "--node", name,
                   "--addresses", f"{v4(host)}/32,{v6(host)}/128", "--out", join)
        return join


class Node:
    """One enrolled host with its agent. Of two clusters on one host, each has a Node."""

    def __init__(self, ca, cluster, role, host, name=None):
        self.ca, self.cluster, self.role, self.host = ca, cluster, role, host
        self.name = name or host
        self.dir = folder / f"{cluster}-{self.name}"
        self.socket = self.dir / "agent.sock"
        self.child = None
        self.table = f"raymtls_{cluster}"
        self.enrol()

    def enrol(self):
        """Anew, by a token of its own; what it had before is gone."""
        shutil.rmtree(self.dir, ignore_errors=True)
        self.dir.mkdir()
        join = self.ca.token(self.cluster, self.role, self.name, self.host)
        run(*on(self.host, BIN / "node-agent", "enroll", "--join", join, "--name", self.name, "--role", self.role,
                "--address", v6(self.host), "--state-dir", self.dir / "state", "--tls-dir", self.dir / "tls"))

    def start(self, wait=True):
        self.child = daemon(self.host, f"agent-{self.cluster}-{self.name}", BIN / "node-agent", "run",
                            "--state-dir", self.dir / "state", "--tls-dir", self.dir / "tls", "--socket", self.socket,
                            "--http-listen", "off")
        if wait:
            wait_until(f"the agent of {self.name}", lambda: self.ask("status").returncode == 0, WAIT_SECONDS)

    def stop(self, how=signal.SIGTERM):
        end(self.child, how)

    def ask(self, *words, check=False):
        return run(*on(self.host, BIN / "node-agent", *words, "--socket", self.socket), check=check)

    def status(self):
        """From the agent, or from its file where it is dead."""
        done = run(*on(self.host, BIN / "node-agent", "status", "--socket", self.socket, "--state-dir", self.dir / "state",
                       "-o", "json"), check=False)
        return json.loads(done.stdout)

    def text(self):
        """The table in the kernel; empty where there is none."""
        return run(*on(self.host, "nft", "list", "table", "inet", self.table), check=False).stdout

    def in_force(self):
        text = self.text()
        return "off" if not text else "enforce" if "counter name \"refused\" drop" in text else "audit"

    def holds(self, kind, address):
        """Whether an address is in a set of the table, such as members."""
        family = ipaddress.ip_address(address).version
        return run(*on(self.host, "nft", "get", "element", "inet", self.table, f"{kind}{family}", "{", address, "}"),
                   check=False).returncode == 0

    def holds_all(self, kind, hosts):
        return all(self.holds(kind, address(host)) for host in hosts for address in (v4, v6))

    def counted(self, name):
        listing = json.loads(run(*on(self.host, "nft", "-j", "list", "counters", "table", "inet", self.table)).stdout)
        return next(item["counter"]["packets"] for item in listing["nftables"]
                    if "counter" in item and item["counter"]["name"] == name)


def daemon(host, log, *command):
    with open(LOGS / log, "a") as out:
        child = subprocess.Popen(on(host, *command), stdin=subprocess.DEVNULL, stdout=out, stderr=out)
    children.append(child)
    return child


def end(child, how=signal.SIGTERM):
    child.send_signal(how)
    child.wait(timeout=WAIT_SECONDS)


def faketime_library():
    found = [path for path in Path("/usr/lib").glob("*/faketime/libfaketime.so.1")]
    if not found:
        raise SystemExit("faketime is missing: scripts/test.sh installs what the tests need")
    return found[0]


def clear():
    shutil.rmtree(folder, ignore_errors=True)
