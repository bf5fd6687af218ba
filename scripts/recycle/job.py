"""Load for scripts/recycle/test.sh: tasks that Ray may repeat and an actor that it may start again, until FILE is
there; then one JSON line: what came back, what failed, the actor's restarts, the longest round in seconds.

job.py FILE
"""

import json
import os
import sys
import time

import ray

# Seconds one round may take: a worker is drained, stopped and started in it.
ROUND_MAX = 120
JOB_MAX = 600


@ray.remote(num_cpus=0, max_retries=-1)
def work(number):
    time.sleep(0.1)
    return number


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class Counter:
    def __init__(self):
        self.count = 0

    def add(self):
        self.count += 1
        return self.count, os.getpid()


def main():
    ray.init(log_to_driver=False)
    counters = [Counter.options(resources={host: 0.001}).remote() for host in ("head", "worker1")]
    blob = ray.put(os.urandom(20_000_000))
    end, ok, failed, longest, processes = time.monotonic() + JOB_MAX, 0, [], 0, set()
    while not os.path.exists(sys.argv[1]) and time.monotonic() < end:
        began = time.monotonic()
        here = work.options(resources={"worker1": 0.001})
        calls = [here.remote(n) for n in range(4)] + [work.remote(n) for n in range(4)] + [here.remote(blob)]
        try:
            ray.get(calls, timeout=ROUND_MAX)
            for name, (_, pid) in zip(("head", "worker1"), ray.get([c.add.remote() for c in counters], timeout=ROUND_MAX)):
                processes.add((name, pid))
            ok += len(calls) + len(counters)
        except Exception as error:  # counted, whatever it is
            failed.append(f"{type(error).__name__}: {str(error)[:200]}")
        longest = max(longest, time.monotonic() - began)
        print(json.dumps({"ok": ok, "failed": len(failed)}), flush=True)
        time.sleep(0.2)
    of = lambda host: len([1 for name, _ in processes if name == host])
    summary = {"ok": ok, "failed": failed, "head_actors": of("head"), "worker_actors": of("worker1")}
    print(json.dumps({"summary": summary, "longest": round(longest, 1)}), flush=True)


main()
