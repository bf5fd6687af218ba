"""What a Ray cluster does in a second, for one cluster after the other, and the ratios between them.

bench.py work --host HOST       a driver: a JSON line {"test": NAME} in, a JSON line {"value": N} out
bench.py compare ROUNDS CLUSTER...
    CLUSTER is NAME=NETNS,NETNS=COMMAND: COMMAND starts the driver of that cluster, whose processes are all in these
    network namespaces. In each round each test runs on each cluster in turn, and the order of the clusters rotates.
    Prints for each test the median of each cluster and the medians of the ratios of one round to each other.

Work is a higher number of tasks, calls or megabytes a second; CPU is what all processes in a cluster's namespaces used
for one test. CPU that the kernel spends on packets outside of a process is not seen.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import time

TICKS = os.sysconf("SC_CLK_TCK")
# How much of each kind one measurement does.
TASKS, SYNC_CALLS, ASYNC_CALLS, OBJECTS, OBJECT_MB = 2000, 1000, 5000, 5, 100
TESTS = {"tasks": "tasks/s", "sync": "sync actor calls/s", "async": "async actor calls/s", "bulk": f"{OBJECT_MB} MB objects, MB/s"}


def work(host):
    import ray

    ray.init(address=os.environ["RAY_ADDRESS"], logging_level="ERROR")

    @ray.remote(num_cpus=0)
    def nothing():
        return 0

    @ray.remote(num_cpus=0)
    def measure(blob):
        return len(blob)

    @ray.remote(num_cpus=0)
    class Answers:
        def nothing(self):
            return 0

    place = {"resources": {host: 0.001}}
    nothing, measure, actor = nothing.options(**place), measure.options(**place), Answers.options(**place).remote()
    blob = os.urandom(1_000_000) * OBJECT_MB

    def tasks():
        ray.get([nothing.remote() for _ in range(TASKS)])
        return TASKS

    def sync():
        for _ in range(SYNC_CALLS):
            ray.get(actor.nothing.remote())
        return SYNC_CALLS

    def calls():
        ray.get([actor.nothing.remote() for _ in range(ASYNC_CALLS)])
        return ASYNC_CALLS

    def bulk():
        spent = 0.0
        for _ in range(OBJECTS):
            held = ray.put(blob)
            began = time.monotonic()
            if ray.get(measure.remote(held)) != len(blob):
                raise SystemExit("the object did not arrive whole")
            spent += time.monotonic() - began
            del held
        return OBJECTS * OBJECT_MB, spent

    does = {"tasks": tasks, "sync": sync, "async": calls, "bulk": bulk}
    ray.get(actor.nothing.remote())
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        began = time.monotonic()
        done = does[json.loads(line)["test"]]()
        amount, seconds = done if isinstance(done, tuple) else (done, time.monotonic() - began)
        print(json.dumps({"value": amount / seconds}), flush=True)


class Cluster:
    def __init__(self, text):
        self.name, spaces, command = text.split("=", 2)
        self.spaces = {os.stat(f"/run/netns/{space}").st_ino for space in spaces.split(",")}
        self.child = subprocess.Popen(shlex.split(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ready(self):
        if not self.answer().get("ready"):
            raise SystemExit(f"the driver of {self.name} did not come up")

    def answer(self):
        # A driver's own lines may come between.
        while line := self.child.stdout.readline():
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit(f"the driver of {self.name} ended")

    def measure(self, test):
        before = self.cpu()
        self.child.stdin.write(json.dumps({"test": test}) + "\n")
        self.child.stdin.flush()
        value = self.answer()["value"]
        cpu, tunnel = spent(before, self.cpu())
        return {"value": value, "cpu": cpu, "tunnel": tunnel}

    def cpu(self):
        """Seconds of each process in the cluster's namespaces, and whether it is ray-tunnel."""
        used = {}
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                if os.stat(f"/proc/{pid}/ns/net").st_ino not in self.spaces:
                    continue
                name, fields = open(f"/proc/{pid}/stat").read().rsplit(")", 1)
            except OSError:
                continue
            fields = fields.split()
            # A number may be given twice: with its start it is one process.
            used[pid, fields[19]] = (int(fields[11]) + int(fields[12])) / TICKS, name.endswith("(ray-tunnel")
        return used


def spent(before, after):
    """Seconds between two looks, in all and in ray-tunnel; what ended meanwhile is not counted."""
    took = [(seconds - before.get(process, (0, False))[0], tunnel) for process, (seconds, tunnel) in after.items()]
    return sum(seconds for seconds, _ in took), sum(seconds for seconds, tunnel in took if tunnel)


def compare(rounds, clusters):
    clusters = [Cluster(text) for text in clusters]
    for cluster in clusters:
        cluster.ready()
    seen = {(test, cluster.name): [] for test in TESTS for cluster in clusters}
    # The first round warms up and is not counted.
    for number in range(rounds + 1):
        turn = number % len(clusters)
        for test in TESTS:
            for cluster in clusters[turn:] + clusters[:turn]:
                measured = cluster.measure(test)
                if number:
                    seen[test, cluster.name].append(measured)
        if number:
            line = ", ".join(f"{test} " + "/".join(f"{seen[test, c.name][-1]['value']:.0f}" for c in clusters) for test in TESTS)
            print(f"   round {number}: {line}; load {os.getloadavg()[0]:.1f}", flush=True)
    for cluster in clusters:
        cluster.child.stdin.close()
    report(seen, [cluster.name for cluster in clusters])


def report(seen, names):
    """Medians, and medians of paired ratios: of the work done, and of the CPU that the same work took."""
    summary = {}
    for test, what in TESTS.items():
        medians = {name: statistics.median(one["value"] for one in seen[test, name]) for name in names}
        print(f"   {what}: " + ", ".join(f"{name} {value:.0f}" for name, value in medians.items()))
        for index, name in enumerate(names[1:], 1):
            for base in names[:index]:
                speed, cpu = ratios(seen[test, name], seen[test, base], "value"), ratios(seen[test, name], seen[test, base], "cpu")
                summary[f"{test} {name}:{base}"] = statistics.median(speed)
                print(f"      {name} : {base} = {statistics.median(speed):.2f} ({min(speed):.2f}-{max(speed):.2f}), CPU {statistics.median(cpu):.2f}")
        tunnels = [(one["tunnel"], one["cpu"]) for name in names for one in seen[test, name] if one["tunnel"]]
        if tunnels:
            mine, whole = (statistics.median(column) for column in zip(*tunnels))
            print(f"      of it in ray-tunnel, both ends: {mine:.2f} of {whole:.2f} CPU seconds")
    print(json.dumps(summary), flush=True)


def ratios(these, those, field):
    return [one[field] / other[field] for one, other in zip(these, those, strict=True)]


def main():
    parser = argparse.ArgumentParser(description="Ray's work in a second, cluster against cluster")
    verbs = parser.add_subparsers(dest="verb", required=True)
    works = verbs.add_parser("work")
    works.add_argument("--host", required=True)
    compares = verbs.add_parser("compare")
    compares.add_argument("rounds", type=int)
    compares.add_argument("clusters", nargs="+")
    args = parser.parse_args()
    if args.verb == "work":
        work(args.host)
    else:
        compare(args.rounds, args.clusters)


if __name__ == "__main__":
    main()
