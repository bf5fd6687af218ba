"""The job of the quickstart: shows that Ray works on every host, then goes on until told to stop.

job.py --log FILE --stop FILE --hosts head,worker1,worker2
job.py --show-only --hosts head,worker1,worker2    ends after a task on every host, an actor and an object

Each Ray node must carry a custom resource named after its host. Every task has max_retries=0: Ray
repeats nothing by itself. What fails is written down as failed and tried once more by this program,
which writes that down as retried. FILE gets one JSON object a line; the last one is the summary.
"""

import argparse
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ray
from probe import served_serial

# Seconds one task may take, and one beat lasts.
TASK_MAX = 60
BEAT_EVERY = 0.5
# Tasks a beat sends to each host at once.
TASKS_A_BEAT = 10
# Seconds a new worker process stays after its first word, so that its port can be looked at.
FRESH_STAYS = 2
OBJECT_MB = 100
# Seconds after which the job ends by itself.
JOB_MAX = 900


@ray.remote(num_cpus=0, max_retries=0)
def where():
    return {"pid": os.getpid(), "ip": ray.util.get_node_ip_address()}


@ray.remote(num_cpus=0, max_retries=0, num_returns="streaming")
def fresh():
    """First word of a new worker process: its port and the certificate file it was given."""
    yield {
        "pid": os.getpid(),
        "ip": ray.util.get_node_ip_address(),
        "port": own_port(),
        "leaf": os.environ.get("RAY_TLS_SERVER_CERT", ""),
    }
    time.sleep(FRESH_STAYS)


@ray.remote(num_cpus=0, max_retries=0)
def make_object(megabytes):
    return os.urandom(1_000_000) * megabytes


@ray.remote(num_cpus=0, max_retries=0)
def measure_object(blob):
    return len(blob)


@ray.remote(num_cpus=0, max_restarts=0, max_task_retries=0)
class Counter:
    def __init__(self):
        self.count = 0

    def add(self):
        self.count += 1
        return self.count


def own_port():
    """The port this process listens on, from /proc."""
    sockets = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            sockets.add(os.readlink(f"/proc/self/fd/{fd}"))
        except OSError:
            continue
    for table in ("/proc/self/net/tcp", "/proc/self/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            listens = fields[3] == "0A"
            if listens and f"socket:[{fields[9]}]" in sockets:
                return int(fields[1].rsplit(":", 1)[1], 16)
    raise RuntimeError("this worker process listens on no port")


class Log:
    """One JSON object a line; written by several threads."""

    def __init__(self, path):
        self.file = open(path, "w", buffering=1)
        self.lock = threading.Lock()
        self.counts = {"ok": 0, "failed": 0, "retried": 0}

    def write(self, **record):
        with self.lock:
            if record.get("outcome"):
                self.counts[record["outcome"]] += 1
            self.file.write(json.dumps({"at": round(time.time(), 3), **record}) + "\n")

    def attempt(self, kind, host, act):
        """Runs `act`; a failure is written down and tried once more."""
        for outcome_before in (None, "failed"):
            if outcome_before:
                self.write(kind=kind, host=host, outcome="retried")
            began = time.monotonic()
            try:
                seen = act()
            except Exception as error:  # whatever it is, it belongs in the log
                self.write(kind=kind, host=host, outcome="failed", why=f"{type(error).__name__}: {error}"[:400])
                continue
            seconds = round(time.monotonic() - began, 3)
            self.write(kind=kind, host=host, outcome="ok", seconds=seconds, seen=seen)
            return seen, seconds
        raise SystemExit(f"{kind} on {host} failed twice; see the log")


def say(words):
    print(words, flush=True)


def on(host, remote, **options):
    return remote.options(resources={host: 0.001}, **options)


def start_fresh(host):
    """A variable nobody had before makes the raylet start a new worker process."""
    return on(host, fresh, runtime_env={"env_vars": {"QUICKSTART_FRESH": str(time.time_ns())}}).remote()


def look_at_fresh(stream):
    """Hears the new process's first word, shakes hands with its port, waits for its end."""
    ready, _ = ray.wait([stream], timeout=TASK_MAX)
    if not ready:
        raise TimeoutError(f"no new worker process within {TASK_MAX} s")
    seen = ray.get(next(stream), timeout=TASK_MAX)
    seen["served_serial"] = served_serial(seen["ip"], seen["port"])
    for _ in stream:
        pass
    return seen


def show(log, hosts):
    """A task on every host, an actor, a large object moved between hosts."""
    for host in hosts:
        seen, seconds = log.attempt(
            "task", host, lambda host=host: ray.get(on(host, where).remote(), timeout=TASK_MAX)
        )
        say(f"a task ran on {host} ({seen['ip']}) after {seconds:.1f} s")
    second, last = hosts[min(1, len(hosts) - 1)], hosts[-1]
    actor = on(second, Counter).remote()
    for _ in range(3):
        count, _ = log.attempt("actor", second, lambda: ray.get(actor.add.remote(), timeout=TASK_MAX))
    say(f"an actor on {second} counted to {count}")
    if second != last:
        move_object(log, second, last)
    log.write(phase="shown")
    return second, actor


def move_object(log, source, target):
    blob = on(source, make_object).remote(OBJECT_MB)
    ray.wait([blob], timeout=TASK_MAX, fetch_local=False)
    size, seconds = log.attempt(
        "object", target, lambda: ray.get(on(target, measure_object).remote(blob), timeout=TASK_MAX)
    )
    if size != OBJECT_MB * 1_000_000:
        raise SystemExit(f"the object arrived with {size} bytes")
    say(f"{OBJECT_MB} MB moved from {source} to {target} in {seconds:.2f} s")


def go_on(log, hosts, actor_host, actor, stop):
    """Tasks and actor calls beat after beat, new worker processes beside them, until the stop file is there."""
    ends = time.monotonic() + JOB_MAX
    broken = threading.Event()

    def over():
        if time.monotonic() > ends:
            raise SystemExit(f"nobody stopped the job within {JOB_MAX} s")
        return broken.is_set() or stop.exists()

    with ThreadPoolExecutor(max_workers=len(hosts)) as beside:
        starters = [beside.submit(keep_starting, log, host, over) for host in hosts]
        try:
            while not over():
                began = time.monotonic()
                beat(log, hosts, actor_host, actor)
                time.sleep(max(0.0, BEAT_EVERY - (time.monotonic() - began)))
        except BaseException:
            broken.set()
            raise
        for starter in starters:
            starter.result()


def beat(log, hosts, actor_host, actor):
    log.attempt("actor", actor_host, lambda: ray.get(actor.add.remote(), timeout=TASK_MAX))
    for host in hosts:
        sent = [on(host, where).remote() for _ in range(TASKS_A_BEAT)]

        def next_answer(host=host, sent=sent):
            return ray.get(sent.pop(0) if sent else on(host, where).remote(), timeout=TASK_MAX)

        for _ in range(TASKS_A_BEAT):
            log.attempt("task", host, next_answer)


def keep_starting(log, host, over):
    """New worker processes on one host, one after the other."""
    while not over():
        log.attempt("fresh", host, lambda: look_at_fresh(start_fresh(host)))


def main():
    parser = argparse.ArgumentParser(description="the job of the quickstart")
    parser.add_argument("--log", default=os.devnull)
    parser.add_argument("--stop", type=Path)
    parser.add_argument("--show-only", action="store_true")
    parser.add_argument("--hosts", required=True)
    args = parser.parse_args()
    if not args.show_only and not args.stop:
        parser.error("--stop or --show-only is needed")
    hosts = args.hosts.split(",")
    log = Log(args.log)
    ray.init(address=os.environ["RAY_ADDRESS"], logging_level="WARNING")
    actor_host, actor = show(log, hosts)
    if not args.show_only:
        go_on(log, hosts, actor_host, actor, args.stop)
    log.write(phase="summary", **log.counts)
    say("job over: {ok} ok, {failed} failed, {retried} retried".format(**log.counts))


if __name__ == "__main__":
    main()
