"""What runs on a stand-in host: listeners in place of Ray, probes, and a flow that says when it stopped.

    host.py listen PORT...        answers "+" on each port, IPv4 and IPv6, then echoes; says "ready"
    host.py probe                 JSON lines [address, port, seconds] in; a JSON list of true (open) or false out
    host.py flow ADDRESS PORT     echoes back and forth until its input ends; says when the last came

Times are of the monotonic clock, which all namespaces of a machine share.
"""

import asyncio
import json
import socket
import sys
import threading
import time

PROBES_AT_ONCE = 100
FLOW_EVERY = 0.002


async def listen(ports):
    async def serve(reader, writer):
        try:
            writer.write(b"+")
            while data := await reader.read(64):
                writer.write(data)
        except OSError:
            pass
        finally:
            writer.close()

    for port in ports:
        sock = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind(("::", port))
        await asyncio.start_server(serve, sock=sock, backlog=256)
    print("ready", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


async def open_to(address, port, seconds, gate):
    """Open means that the listener's first byte came, not that a connection seemed to stand."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    async with gate:
        loop = asyncio.get_running_loop()
        with socket.socket(family, socket.SOCK_STREAM) as sock:
            sock.setblocking(False)

            async def talk():
                await loop.sock_connect(sock, (address, port))
                return await loop.sock_recv(sock, 1)

            try:
                return await asyncio.wait_for(talk(), seconds) == b"+"
            except (asyncio.TimeoutError, OSError):
                return False


async def probe():
    gate = asyncio.Semaphore(PROBES_AT_ONCE)
    asked = [json.loads(line) for line in sys.stdin]
    print(json.dumps(await asyncio.gather(*(open_to(*target, gate) for target in asked))))


def flow(address, port):
    last = None
    sock = socket.create_connection((address, port), timeout=5)
    sock.settimeout(0.05)
    print("ready", flush=True)
    input_ends = threading.Thread(target=sys.stdin.read, daemon=True)
    input_ends.start()
    while input_ends.is_alive():
        try:
            sock.send(b".")
            if sock.recv(64):
                last = time.monotonic()
        except TimeoutError:
            pass
        except OSError:
            break
        time.sleep(FLOW_EVERY)
    print(json.dumps(last), flush=True)


if __name__ == "__main__":
    verb, *rest = sys.argv[1:]
    if verb == "listen":
        asyncio.run(listen([int(port) for port in rest]))
    elif verb == "probe":
        asyncio.run(probe())
    elif verb == "flow":
        flow(rest[0], int(rest[1]))
    else:
        sys.exit(__doc__)
