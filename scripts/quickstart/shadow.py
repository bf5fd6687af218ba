"""What a host without certificate and token gets from Ray's HTTP ports, with the standard library alone.

shadow.py status URL    the status of a GET
shadow.py job URL       submits a job to the Jobs API at URL and says as whom it ran, or the status it met

Both say `silent` where nothing comes back.
"""

import json
import socket
import sys
import time
import urllib.error
import urllib.request
from urllib.parse import urlsplit

SILENT_SECONDS = 2
ANSWER_SECONDS = 20
JOB_SECONDS = 60
PROGRAM = "python3 -c 'import os, socket; print(\"ran as uid\", os.getuid(), \"on\", socket.gethostname())'"


def fetch(url, body=None, seconds=ANSWER_SECONDS):
    request = urllib.request.Request(url, data=body, headers={"Content-Type": "application/json"} if body else {})
    with urllib.request.urlopen(request, timeout=seconds) as answer:
        return answer.status, answer.read().decode()


def job(url):
    _, answer = fetch(url, json.dumps({"entrypoint": PROGRAM}).encode())
    name = json.loads(answer)["submission_id"]
    until = time.monotonic() + JOB_SECONDS
    while time.monotonic() < until:
        logs = json.loads(fetch(f"{url}{name}/logs")[1]).get("logs") or ""
        for line in logs.splitlines():
            if line.startswith("ran as"):
                return line
        time.sleep(0.3)
    return f"accepted, and no word of it in {JOB_SECONDS} s"


def is_silent(url):
    """A connection that does not even open, told apart from an answer that is slow."""
    try:
        socket.create_connection((urlsplit(url).hostname, urlsplit(url).port), timeout=SILENT_SECONDS).close()
    except TimeoutError:
        return True
    return False


def main():
    verb, url = sys.argv[1:]
    try:
        if is_silent(url):
            print("silent")
        elif verb == "status":
            print(fetch(url)[0])
        else:
            print(job(url))
    except urllib.error.HTTPError as error:
        print(error.code)
    except OSError as error:
        print(f"no answer: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
