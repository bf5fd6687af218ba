"""A user's program of the stories: tasks, new worker processes and actors on every host, beat after beat.

driver.py --log FILE --stop FILE --hosts head,worker1 [--patience SECONDS] [--put]

It goes on whatever fails, and writes down each attempt with its beginning and its end: one JSON object a
line, {kind, host, outcome, began, ended}. Ray repeats what a recycled node took along (max_retries,
max_restarts); this program repeats nothing. Kinds:
  fresh   a task that only a worker process can run that did not exist before
  task    one that any worker may run
  actor   a call of an actor that lives on that host, and how often the actor began anew
  object  with --put: a task that is given an object of 20 MB which this driver owns
The first line says who it is: pid, job, and the serial number of the leaf it was started with.
"""

import argparse
import json
import os
import subprocess
import threading
import time
from pathlib import Path

import ray

# Seconds between two attempts of one kind on one host.
BEAT = {"fresh": 3.0, "task": 1.0, "actor": 1.0, "object": 3.0}
OBJECT_BYTES = 20_000_000
# Seconds after which it ends by itself.
ENDS = 1800


@ray.remote(num_cpus=0, max_retries=-1)
def where():
    return os.getpid()


@ray.remote(num_cpus=0, max_retries=-1)
def measure(blob):
    return len(blob)


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class Counter:
    def __init__(self):
        self.count = 0

    def add(self):
        self.count += 1
        return os.getpid()


class Log:
    def __init__(self, path):
        self.file = open(path, "w", buffering=1)
        self.lock = threading.Lock()

    def write(self, **record):
        with self.lock:
            self.file.write(json.dumps(record) + "\n")


def on(host, remote, **options):
    return remote.options(resources={host: 0.001}, **options)


def leaf_serial():
    path = os.environ["RAY_TLS_SERVER_CERT"]
    said = subprocess.run(["openssl", "x509", "-noout", "-serial", "-in", path], check=True, capture_output=True)
    return said.stdout.decode().strip().removeprefix("serial=").lower()


class Beats:
    def __init__(self, log, stop, patience):
        self.log, self.stop, self.patience = log, stop, patience
        self.ends = time.monotonic() + ENDS

    def over(self):
        return self.stop.exists() or time.monotonic() > self.ends

    def attempt(self, kind, host, submit):
        began = time.time()
        record = {"kind": kind, "host": host, "began": round(began, 2)}
        reference = submit()
        try:
            seen = ray.get(reference, timeout=self.patience)
            record.update(outcome="ok", seen=seen)
        except Exception as error:  # whatever it is, it belongs in the log
            record.update(outcome="failed", why=f"{type(error).__name__}: {error}"[:300])
            if kind != "actor":
                ray.cancel(reference, force=True)
        self.log.write(**record, ended=round(time.time(), 2))

    def keep(self, kind, host, submit):
        while not self.over():
            self.attempt(kind, host, submit)
            until = time.monotonic() + BEAT[kind]
            while time.monotonic() < until and not self.over():
                time.sleep(0.2)


def submitters(host, blob):
    def fresh():
        # A variable nobody had before makes the raylet start a new worker process.
        name = {"env_vars": {"STORY_FRESH": str(time.time_ns())}}
        return on(host, where, runtime_env=name).remote()

    actor = on(host, Counter).remote()
    all_kinds = {
        "fresh": fresh,
        "task": lambda: on(host, where).remote(),
        "actor": lambda: actor.add.remote(),
    }
    if blob is not None:
        all_kinds["object"] = lambda: on(host, measure).remote(blob)
    return all_kinds


def main():
    parser = argparse.ArgumentParser(description="a user's program of the stories")
    parser.add_argument("--log", required=True)
    parser.add_argument("--stop", type=Path, required=True)
    parser.add_argument("--hosts", required=True)
    parser.add_argument("--patience", type=float, default=60)
    parser.add_argument("--put", action="store_true")
    args = parser.parse_args()
    log = Log(args.log)
    ray.init(address=os.environ["RAY_ADDRESS"], logging_level="WARNING")
    job = ray.get_runtime_context().get_job_id()
    log.write(kind="driver", pid=os.getpid(), job=job, serial=leaf_serial(), began=round(time.time(), 2))
    blob = ray.put(bytes(OBJECT_BYTES)) if args.put else None
    beats = Beats(log, args.stop, args.patience)
    threads = [
        threading.Thread(target=beats.keep, args=(kind, host, submit))
        for host in args.hosts.split(",")
        for kind, submit in submitters(host, blob).items()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
