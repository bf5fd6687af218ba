"""What runs on a stand-in host: listeners in place of Ray, probes, and a flow that says when it stopped.

    host.py listen PORT...        answers "+" on each port, IPv4 and IPv6, then echoes; says "ready"
    host.py probe                 JSON lines [address, port, seconds] in; a JSON list of true (open) or false out
    host.py flow ADDRESS PORT     echoes back and forth until its input ends; says when the last came
    host.py stream ADDRESS PORT   numbers sent on one connection until its input ends, one every 5 ms whether the one
                                  before came back or not; says how many came back, in order, and when the last
    host.py flood ADDRESS PORT    segments of no connection, as many as it can until its input ends; says how many
    host.py knock ADDRESS PORT    new connections one after the other until its input ends; says when the last
                                  that was let in began, and how many were let in and refused since
    host.py hold ADDRESS PORT     a connection kept open; per line of input: "reset" sends the other end a reset
                                  in sequence past our own kernel, which keeps the connection; "ask" says true
                                  if what is sent now is echoed

Times are of the monotonic clock, which all namespaces of a machine share.
"""

import asyncio
import json
import socket
import struct
import sys
import threading
import time

PROBES_AT_ONCE = 100
FLOW_EVERY = 0.002
STREAM_EVERY = 0.005
# What was sent last may come back this long after the input's end.
STREAM_DRAIN_SECONDS = 1
NUMBER = struct.Struct("!Q")
KNOCK_SECONDS = 0.2
# The listener asks after a silent peer this often, as a server with keepalive does.
KEEPALIVE_SECONDS = 2
KEEPALIVES_MAX = 100
ASK_SECONDS = 3
FLOOD_SECONDS_MAX = 300
FLOOD_AT_ONCE = 200
# linux/tcp.h, struct tcp_info: segments sent again so far.
TCP_INFO, TOTAL_RETRANS_AT = 11, 100
# linux/tcp.h: reads the next sequence number of a connection.
TCP_REPAIR, TCP_REPAIR_QUEUE, TCP_QUEUE_SEQ = 19, 20, 21
SEND_QUEUE, REPAIR_OFF_QUIETLY = 2, -1


async def listen(ports):
    async def serve(reader, writer):
        try:
            writer.write(b"+")
            while (data := await reader.read(64)) and not writer.is_closing():
                writer.write(data)
        except OSError:
            pass
        finally:
            writer.close()

    for port in ports:
        sock = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_SECONDS)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_SECONDS)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVES_MAX)
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


def stream(address, port):
    sock = socket.create_connection((address, port), timeout=5)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    greeted = sock.recv(1) == b"+"
    sock.settimeout(STREAM_DRAIN_SECONDS)
    came = {"back": 0, "in_order": True, "last": None, "longest_gap": 0.0}

    def receive():
        held = b""
        try:
            while data := sock.recv(4096):
                held += data
                now = time.monotonic()
                if came["last"]:
                    came["longest_gap"] = max(came["longest_gap"], now - came["last"])
                came["last"] = now
                while len(held) >= NUMBER.size:
                    came["in_order"] &= NUMBER.unpack(held[: NUMBER.size])[0] == came["back"]
                    came["back"] += 1
                    held = held[NUMBER.size:]
        except OSError:
            pass

    receiver = threading.Thread(target=receive, daemon=True)
    receiver.start()
    print("ready" if greeted else "not greeted", flush=True)
    input_ends = threading.Thread(target=sys.stdin.read, daemon=True)
    input_ends.start()
    sent, error = 0, None
    while input_ends.is_alive():
        try:
            sock.send(NUMBER.pack(sent))
            sent += 1
        except OSError as gone:
            error = str(gone)
            break
        time.sleep(STREAM_EVERY)
    input_ends.join()
    receiver.join()
    again = int.from_bytes(sock.getsockopt(socket.IPPROTO_TCP, TCP_INFO, 104)[TOTAL_RETRANS_AT:], sys.byteorder)
    print(json.dumps({**came, "sent": sent, "sent_again": again, "error": error}), flush=True)


def flood(address, port):
    sock = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP)
    # A reset: nobody answers it. Whether its checksum is right is looked at behind the packet filter.
    segment = struct.pack("!HHIIHHHH", port, port, 1, 0, 0x5004, 0, 0, 0)
    print("ready", flush=True)
    input_ends = threading.Thread(target=sys.stdin.read, daemon=True)
    input_ends.start()
    sent, until = 0, time.monotonic() + FLOOD_SECONDS_MAX
    while input_ends.is_alive() and time.monotonic() < until:
        for _ in range(FLOOD_AT_ONCE):
            sock.sendto(segment, (address, 0))
        sent += FLOOD_AT_ONCE
        # The other thread's turn.
        time.sleep(0)
    print(json.dumps(sent), flush=True)


def knock(address, port):
    seen = {"last_open": None, "opened": 0, "refused_since": 0}
    print("ready", flush=True)
    input_ends = threading.Thread(target=sys.stdin.read, daemon=True)
    input_ends.start()
    while input_ends.is_alive():
        began = time.monotonic()
        try:
            with socket.create_connection((address, port), timeout=KNOCK_SECONDS) as sock:
                opened = sock.recv(1) == b"+"
        except OSError:
            opened = False
        if opened:
            seen |= {"last_open": began, "opened": seen["opened"] + 1, "refused_since": 0}
        else:
            seen["refused_since"] += 1
        time.sleep(STREAM_EVERY)
    print(json.dumps(seen), flush=True)


def hold(address, port):
    sock = socket.create_connection((address, port), timeout=5)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    greeted = sock.recv(1) == b"+"
    print("ready" if greeted and echoed(sock) else "not echoed", flush=True)
    for line in sys.stdin:
        if line == "reset\n":
            reset(sock)
            print("reset", flush=True)
        else:
            print(json.dumps(echoed(sock)), flush=True)


def echoed(sock):
    sock.settimeout(ASK_SECONDS)
    try:
        sock.send(b"?")
        return sock.recv(1) == b"?"
    except OSError:
        return False


def reset(sock):
    own, other = sock.getsockname(), sock.getpeername()
    family = sock.family
    sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
    sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR_QUEUE, SEND_QUEUE)
    sequence = sock.getsockopt(socket.IPPROTO_TCP, TCP_QUEUE_SEQ) & 0xFFFFFFFF
    sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, REPAIR_OFF_QUIETLY)
    ends = socket.inet_pton(family, own[0]) + socket.inet_pton(family, other[0])
    rst, words = 0x5004, "!HHIIHHHH"
    header = [own[1], other[1], sequence, 0, rst, 0, 0, 0]
    length = struct.calcsize(words)
    summed = struct.unpack(f"!{len(ends) // 2 + 2 + length // 2}H",
                           ends + struct.pack("!HH", socket.IPPROTO_TCP, length) + struct.pack(words, *header))
    total = sum(summed)
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    header[6] = ~total & 0xFFFF
    with socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_TCP) as raw:
        raw.sendto(struct.pack(words, *header), (other[0], 0))


if __name__ == "__main__":
    verb, *rest = sys.argv[1:]
    if verb == "listen":
        asyncio.run(listen([int(port) for port in rest]))
    elif verb == "probe":
        asyncio.run(probe())
    elif verb == "flow":
        flow(rest[0], int(rest[1]))
    elif verb == "stream":
        stream(rest[0], int(rest[1]))
    elif verb == "flood":
        flood(rest[0], int(rest[1]))
    elif verb == "knock":
        knock(rest[0], int(rest[1]))
    elif verb == "hold":
        hold(rest[0], int(rest[1]))
    else:
        sys.exit(__doc__)
