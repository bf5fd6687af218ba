"""A driver whose actor starts programs that pass for gcs_server by their name: a copy of another program in the
session's own environment, whose parent goes away, and one that only says so. It prints their pids and stays.

namesake.py FOLDER
"""

import os
import shutil
import subprocess
import sys
import time

import ray


@ray.remote(num_cpus=0, resources={"head": 0.001})
class Namesakes:
    """An actor: its children live as long as it does."""

    def start(self, folder):
        copy = os.path.join(folder, "gcs_server")
        shutil.copy("/bin/sleep", copy)
        os.chmod(copy, 0o755)
        begin = 'setsid "$1" 300 >/dev/null 2>&1 </dev/null & echo $!'
        alone = subprocess.run(["sh", "-c", begin, "sh", copy], capture_output=True, text=True, check=True).stdout
        said = subprocess.Popen(["bash", "-c", "exec -a gcs_server sleep 300"])
        return alone.strip(), str(said.pid)


ray.init(log_to_driver=False)
actor = Namesakes.remote()
print(*ray.get(actor.start.remote(sys.argv[1])), flush=True)
time.sleep(300)
