"""What `node-agent recycle` asks Ray, in Ray's own words (Ray 2.60). It runs as Ray's user, is read from standard
input, and answers with JSON on the last line of standard output.

survey ADDRESS                     nodes, drivers and actors that the control store knows
drain ADDRESS NODE SECONDS         no new work for a node
task ADDRESS NODE...               a task on each of these nodes, that only this one can run
"""

import json
import os
import sys
import time

# Answers are bounded here and by the reader.
LISTED_MAX = 10000
TEXT_MAX = 200
CALL_MAX = 15
TASK_MAX = 60

# ActorTableData.ActorState and GcsNodeInfo.GcsNodeState.
ALIVE = 2
NODE_ALIVE = 0


def cut(text):
    return str(text)[:TEXT_MAX]


def survey(address):
    import asyncio

    import ray

    client = ray._raylet.GcsClient(address=address)
    nodes = client.get_all_node_info(timeout=CALL_MAX)
    jobs = client.get_all_job_info(timeout=CALL_MAX, skip_is_running_tasks_field=True)
    actors = asyncio.run(all_actors(client))
    alive = [(node_id.hex(), node) for node_id, node in nodes.items() if node.state == NODE_ALIVE]
    return {
        "nodes": [
            {
                "id": node_id,
                "ip": cut(node.node_manager_address),
                "port": node.node_manager_port,
            }
            for node_id, node in alive[:LISTED_MAX]
        ],
        "drivers": [driver(job) for job in jobs.values() if not job.is_dead][:LISTED_MAX],
        "actors": actors[:LISTED_MAX],
    }


def driver(job):
    where, told = job.driver_address, job.config.metadata
    return {
        "job": job.job_id.hex(),
        "submission": cut(told.get("job_submission_id", "")),
        "job_name": cut(told.get("job_name", "")),
        "entrypoint": cut(job.entrypoint),
        "ip": cut(where.ip_address or job.driver_ip_address),
        "port": where.port,
        "pid": job.driver_pid,
        "node": where.node_id.hex(),
    }


async def all_actors(client):
    """Those that would be lost with their node: alive, and never started again."""
    found = await client.async_get_all_actor_info(None, timeout=CALL_MAX)
    actors = []
    for actor in found.values():
        node = actor.address.node_id
        if actor.state == ALIVE and actor.max_restarts == 0 and node:
            actors.append(
                {
                    "class": cut(actor.class_name),
                    "name": cut(actor.name),
                    "job": actor.job_id.hex(),
                    "node": node.hex(),
                    "restarts": actor.max_restarts,
                }
            )
    return actors


def drain(address, node, seconds):
    import ray
    from ray.core.generated import autoscaler_pb2

    client = ray._raylet.GcsClient(address=address)
    deadline = int(time.time() * 1000) + int(seconds) * 1000
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    accepted, why = client.drain_node(node, reason, "node-agent recycle", deadline)
    return {"accepted": bool(accepted), "why": cut(why)}


def task(address, *nodes):
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ray.init(address=address, log_to_driver=False, logging_level="ERROR", namespace="node-agent-recycle")

    @ray.remote(num_cpus=0, max_retries=0)
    def where():
        return ray.get_runtime_context().get_node_id()

    begun = []
    for node in nodes:
        pinned = NodeAffinitySchedulingStrategy(node_id=node, soft=False)
        begun.append((node, where.options(scheduling_strategy=pinned).remote()))
    until = time.monotonic() + TASK_MAX
    answers = [ran(node, task, until) for node, task in begun]
    # In order: or Ray logs a driver that was lost.
    ray.shutdown()
    return answers


def ran(node, task, until):
    import ray

    try:
        on = ray.get(task, timeout=max(0.1, until - time.monotonic()))
        return {"node": node, "error": "" if on == node else f"it ran on {cut(on)}"}
    except Exception as error:  # whatever Ray says is the answer
        return {"node": node, "error": cut(f"{type(error).__name__}: {error}")}


def main():
    acts = {"survey": survey, "drain": drain, "task": task}
    answer = acts[sys.argv[1]](*sys.argv[2:])
    sys.stdout.flush()
    print("\n" + json.dumps(answer), flush=True)
    # Without waiting for threads of gRPC.
    os._exit(0)


main()
