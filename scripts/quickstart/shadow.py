"""What a host without certificate and token gets from Ray's HTTP ports, with the standard library alone.

shadow.py status URL    the status of a GET
shadow.py job URL       submits a job to the Jobs API at URL and says as whom and where it ran, or the status it met

Both say `silent` where nothing comes back.
"""

import json
import socket
import sys
import urllib.error
import urllib.request
from urllib.parse import urlsplit

SILENT_SECONDS = 1.5
ANSWER_SECONDS = 20
JOB_SECONDS = 60
# It says what it is on a connection back to the stranger: where Ray keeps its output does not matter then.
PROGRAM = """python3 -c 'import os, socket
s = socket.create_connection(("{address}", {port}))
s.sendall("ran as uid {{}} on {{}}".format(os.getuid(), socket.gethostname()).encode())'"""


def fetch(url, body=None, seconds=ANSWER_SECONDS):
    request = urllib.request.Request(url, data=body, headers={"Content-Type": "application/json"} if body else {})
    with urllib.request.urlopen(request, timeout=seconds) as answer:
        return answer.status, answer.read().decode()


def job(url):
    with socket.create_server((own_address(url), 0)) as server:
        server.settimeout(JOB_SECONDS)
        address, port = server.getsockname()
        fetch(url, json.dumps({"entrypoint": PROGRAM.format(address=address, port=port)}).encode())
        try:
            return server.accept()[0].recv(200).decode()
        except TimeoutError:
            return f"accepted, and no word of it in {JOB_SECONDS} s"


def own_address(url):
    """The address from which this host speaks to it; a UDP socket sends nothing by being connected."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((urlsplit(url).hostname, urlsplit(url).port))
        return probe.getsockname()[0]


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
