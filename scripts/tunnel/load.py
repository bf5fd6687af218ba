"""A mixed load on a Ray cluster, from one driver that stays the same, and what came of it.

load.py run --log FILE --stop FILE --hosts worker1,worker2 [--pace N]
load.py wait FILE                           until every kind of work went well once
load.py counts FILE [WINDOW]                how many of each kind went well, and how many failed
load.py failed FILE [WINDOW]                how many failed, and the first of them
load.py kept FILE [WINDOW]                  nodes and actors lost
load.py dead FILE HOST SINCE                seconds from SINCE until Ray called the host's node dead
load.py age FILE                            seconds since the load began
load.py first FILE                          seconds from the load's beginning to the first failure

WINDOW is --since T and --until T (seconds of the epoch), and --except FROM-TO as often as needed: work that was
under way in an excepted span does not count.

Actors call each other between the hosts, the driver calls them, new worker processes start, objects of 100 MB and
50 MB move, bursts of tasks run. Ray repeats nothing by itself (max_retries=0, max_restarts=0): what fails is
written down as failed. FILE gets one JSON object a line. Each Ray node carries a custom resource named after its
host. The load asserts nothing.
"""

import argparse
import json
import os
import threading
import time
from pathlib import Path

# Seconds one piece of work may take before it counts as failed.
WORK_SECONDS_MAX = 60
# Seconds between the beginnings of two pieces of the same kind, at pace 1.
EVERY = {"actor": 0.1, "between": 0.5, "fresh": 5.0, "object": 4.0, "moved": 4.0, "tasks": 7.0}
TASKS_A_BURST = 200
OBJECT_MB, MOVED_MB = 100, 50
NODES_EVERY = 0.5
# Seconds after which the load ends by itself.
LOAD_SECONDS_MAX = 3 * 3600
WAIT_SECONDS_MAX = 150
EXCERPT_MAX = 300


class Log:
    """Written by several threads; each piece of work has its beginning and its end."""

    def __init__(self, path):
        self.file = open(path, "w", buffering=1)
        self.lock = threading.Lock()

    def write(self, **record):
        with self.lock:
            self.file.write(json.dumps(record) + "\n")

    def attempt(self, kind, host, act):
        began = time.time()
        try:
            seen, outcome, why = act(), "ok", None
        except Exception as error:  # whatever it is, it belongs in the log
            seen, outcome, why = None, "failed", f"{type(error).__name__}: {error}".replace("\n", " ")[:EXCERPT_MAX]
        self.write(kind=kind, host=host, began=round(began, 3), ended=round(time.time(), 3), outcome=outcome, seen=seen, why=why)


def run(log, stop, hosts, pace):
    import ray

    ray.init(address=os.environ["RAY_ADDRESS"], logging_level="WARNING")

    @ray.remote(num_cpus=0, max_retries=0)
    def nothing():
        return os.getpid()

    @ray.remote(num_cpus=0, max_retries=0)
    def make(megabytes):
        return os.urandom(1_000_000) * megabytes

    @ray.remote(num_cpus=0, max_retries=0)
    def measure(blob):
        return len(blob)

    @ray.remote(num_cpus=0, max_restarts=0, max_task_retries=0)
    class Counter:
        def __init__(self):
            self.count = 0

        def add(self):
            self.count += 1
            return [os.getpid(), self.count]

        def ask(self, other):
            return ray.get(other.add.remote(), timeout=WORK_SECONDS_MAX)

    def on(host, remote, **options):
        return remote.options(resources={host: 0.001}, **options)

    def get(reference):
        return ray.get(reference, timeout=WORK_SECONDS_MAX)

    def size_is(blob, host, megabytes):
        seen = get(on(host, measure).remote(blob))
        if seen != megabytes * 1_000_000:
            raise ValueError(f"{seen} bytes arrived of {megabytes} MB")
        return seen

    def moved(source, target):
        return size_is(on(source, make).remote(MOVED_MB), target, MOVED_MB)

    def burst(host):
        return len(set(get([on(host, nothing).remote() for _ in range(TASKS_A_BURST)])))

    def start_fresh(host):
        """A variable nobody had before makes the raylet start a new worker process."""
        return get(on(host, nothing, runtime_env={"env_vars": {"LOAD_FRESH": str(time.time_ns())}}).remote())

    def nodes():
        return {node["NodeManagerAddress"]: [node["NodeID"][:12], node["Alive"]] for node in ray.nodes()}

    actors = {host: on(host, Counter).remote() for host in hosts}
    asked = {host: on(host, Counter).remote() for host in hosts}
    first, last = hosts[0], hosts[-1]
    blob = os.urandom(1_000_000) * OBJECT_MB
    turn = iter(hosts * (LOAD_SECONDS_MAX * 10))

    work = [("actor", host, lambda host=host: get(actors[host].add.remote())) for host in hosts]
    work += [
        ("between", f"{first}->{last}", lambda: get(asked[first].ask.remote(asked[last]))),
        ("between", f"{last}->{first}", lambda: get(actors[last].ask.remote(actors[first]))),
        ("fresh", "", lambda: start_fresh(next(turn))),
        ("object", last, lambda: size_is(ray.put(blob), last, OBJECT_MB)),
        ("moved", f"{first}->{last}", lambda: moved(first, last)),
        ("tasks", "", lambda: [burst(host) for host in hosts]),
    ]
    ends = time.monotonic() + LOAD_SECONDS_MAX

    def over():
        return stop.exists() or time.monotonic() > ends

    def keep_doing(kind, host, act, every):
        while not over():
            began = time.monotonic()
            log.attempt(kind, host, act)
            time.sleep(max(0.0, every - (time.monotonic() - began)))

    threads = [threading.Thread(target=keep_doing, args=(kind, host, act, EVERY[kind] / pace)) for kind, host, act in work]
    threads.append(threading.Thread(target=keep_doing, args=("nodes", "", nodes, NODES_EVERY)))
    log.write(kind="load", began=time.time(), addresses={h: get(on(h, where(ray)).remote()) for h in hosts})
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.write(kind="end", began=time.time())


def where(ray):
    return ray.remote(num_cpus=0, max_retries=0)(ray.util.get_node_ip_address)


# What came of it


def records(path, window=None):
    kept = []
    for line in Path(path).read_text().splitlines(keepends=True):
        # The last line may be half written.
        if line.endswith("\n"):
            record = json.loads(line)
            if "outcome" in record and (window is None or inside(record, window)):
                kept.append(record)
    return kept


def inside(record, window):
    if record["ended"] < window.since or record["began"] > window.until:
        return False
    return not any(record["began"] <= to and record["ended"] >= since for since, to in window.spans)


def worked(path, window):
    return [record for record in records(path, window) if record["kind"] != "nodes"]


def counts(path, window):
    said = []
    for kind in EVERY:
        mine = [record for record in worked(path, window) if record["kind"] == kind]
        well = [record for record in mine if record["outcome"] == "ok"]
        slowest = max((record["ended"] - record["began"] for record in well), default=0)
        said.append(f"{kind} {len(well)} ok {len(mine) - len(well)} failed (slowest {slowest:.1f} s)")
    return "; ".join(said)


def failed(path, window):
    bad = [record for record in worked(path, window) if record["outcome"] == "failed"]
    if not bad:
        return "0 failed"
    first = bad[0]
    return f"{len(bad)} failed, the first at {first['began']:.1f}: {first['kind']} {first['host']}: {first['why']}"


def kept(path, window):
    """An actor is lost when its count starts again or its process is another; a node when Ray calls it dead."""
    dead, ids, actors, restarted = set(), {}, {}, 0
    for record in records(path, window):
        if record["outcome"] != "ok":
            continue
        if record["kind"] == "nodes":
            for address, (node, alive) in record["seen"].items():
                if not alive:
                    dead.add(address)
                ids.setdefault(address, set()).add(node)
        elif record["kind"] == "actor":
            pid, _ = record["seen"]
            restarted += actors.setdefault(record["host"], pid) != pid
    lost = len(dead) + sum(len(known) - 1 for known in ids.values())
    return f"{lost} of {len(ids)} nodes lost, {restarted} actor calls answered by another process"


def dead(path, host, since):
    addresses = next(json.loads(line)["addresses"] for line in open(path) if '"load"' in line)
    for record in records(path):
        if record["kind"] == "nodes" and record["outcome"] == "ok" and record["ended"] > since:
            if not record["seen"].get(addresses[host], [None, True])[1]:
                return f"{record['ended'] - since:.1f}"
    return "not yet"


def first(path):
    began = json.loads(open(path).readline())["began"]
    bad = [record["ended"] for record in worked(path, None) if record["outcome"] == "failed"]
    return f"{min(bad) - began:.0f}" if bad else "none"


def wait(path):
    until = time.monotonic() + WAIT_SECONDS_MAX
    while True:
        done = {record["kind"] for record in records(path) if record["outcome"] == "ok"} if Path(path).exists() else set()
        if set(EVERY) <= done:
            return "every kind of work went well"
        if time.monotonic() > until:
            raise SystemExit(f"within {WAIT_SECONDS_MAX} s none of {', '.join(sorted(set(EVERY) - done))} went well: see {path}")
        time.sleep(0.2)


def age(path):
    began = json.loads(open(path).readline())["began"]
    return str(round(time.time() - began))


def span(text):
    since, to = text.split("-")
    return float(since), float(to)


def main():
    parser = argparse.ArgumentParser(description="mixed load on Ray, and what came of it")
    verbs = parser.add_subparsers(dest="verb", required=True)
    runs = verbs.add_parser("run")
    runs.add_argument("--log", required=True)
    runs.add_argument("--stop", required=True, type=Path)
    runs.add_argument("--hosts", required=True)
    runs.add_argument("--pace", type=float, default=1)
    for verb in ("wait", "age", "first", "counts", "failed", "kept", "dead"):
        reads = verbs.add_parser(verb)
        reads.add_argument("file")
        if verb == "dead":
            reads.add_argument("host")
            reads.add_argument("since", type=float)
        elif verb in ("counts", "failed", "kept"):
            reads.add_argument("--since", type=float, default=0)
            reads.add_argument("--until", type=float, default=float("inf"))
            reads.add_argument("--except", type=span, action="append", default=[], dest="spans", metavar="FROM-TO")
    args = parser.parse_args()
    if args.verb == "run":
        run(Log(args.log), args.stop, args.hosts.split(","), args.pace)
    elif args.verb == "dead":
        print(dead(args.file, args.host, args.since))
    elif args.verb in ("wait", "age", "first"):
        print({"wait": wait, "age": age, "first": first}[args.verb](args.file))
    else:
        print({"counts": counts, "failed": failed, "kept": kept}[args.verb](args.file, args))


if __name__ == "__main__":
    main()
