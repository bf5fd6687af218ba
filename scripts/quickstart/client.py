"""A driver outside the cluster: Ray Client with the leaf of a `--once` enrolment.

client.py ADDRESS    such as ray://head.demo.internal:10001; prints the address its task ran on
"""

import sys

import ray

# Seconds the task may take.
TASK_MAX = 90


@ray.remote(num_cpus=0, max_retries=0)
def where():
    return ray.util.get_node_ip_address()


ray.init(sys.argv[1], logging_level="WARNING")
print("ran on", ray.get(where.remote(), timeout=TASK_MAX), flush=True)
ray.shutdown()
