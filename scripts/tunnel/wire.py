"""Stand-ins around a tunnel, one a verb; what they see is one line.

wire.py dial PEER PORT LEAF KEY ROOTS [ASKED]    as a node would: TLS to PEER:15008 with that leaf, the header of a flow to
                                                 ASKED:PORT (by itself PEER:PORT), the peer's answer
wire.py serve ADDRESS LEAF KEY                   a peer at ADDRESS:15008 with that leaf, until its input ends; one line for
                                                 each that knocks
wire.py connect ADDRESS PORT                     plain TCP: open, refused or silent
wire.py scan                                     lines "address port" in; which of them are open
wire.py hold ADDRESS PORT COUNT                  so many connections that do nothing, until its input ends
wire.py ask SOCKET WORD [FIELD...]               what a ray-tunnel says at its control socket, or one field of it

The leaf's file is its chain. Nothing is judged here.
"""

import json
import socket
import ssl
import struct
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

INBOUND_PORT = 15008
ALPN = "raymtls-tunnel/1"
VERSION, FLOW = 1, 0
HEADER, ANSWER = struct.Struct("!BBH16sI"), struct.Struct("!BBH")
# The numbers on the wire, from 1.
REASONS = (
    "not_a_member address_mismatch blocked revoked expired not_yet_valid unknown_issuer wrong_name wrong_cluster port_closed "
    "no_listener bad_header too_slow no_certificate no_tls too_many not_captured"
).split()
SECONDS_MAX = 10
SCAN_SECONDS, SCANS_AT_ONCE = 1.5, 64
# Connections of `hold` that are opened at once.
HOLDS_AT_ONCE = 32


def context(side, leaf, key):
    made = ssl.SSLContext(side)
    made.minimum_version = ssl.TLSVersion.TLSv1_3
    made.set_alpn_protocols([ALPN])
    if leaf != "none":
        made.load_cert_chain(leaf, key)
    return made


def mapped(address):
    if ":" in address:
        return socket.inet_pton(socket.AF_INET6, address)
    return bytes(10) + b"\xff\xff" + socket.inet_pton(socket.AF_INET, address)


def words(error):
    """The alert's name alone, where there is one."""
    text = getattr(error, "reason", None) or str(error) or type(error).__name__
    return text.lower().replace(" ", "_")


def dial(peer, port, leaf, key, roots, asked=None):
    made = context(ssl.PROTOCOL_TLS_CLIENT, leaf, key)
    made.check_hostname = False
    made.load_verify_locations(roots)
    try:
        with socket.create_connection((peer, INBOUND_PORT), timeout=SECONDS_MAX) as plain, made.wrap_socket(plain) as tls:
            tls.sendall(HEADER.pack(VERSION, FLOW, int(port), mapped(asked or peer), 0))
            answer = b""
            while len(answer) < ANSWER.size:
                if not (more := tls.recv(ANSWER.size - len(answer))):
                    return "closed"
                answer += more
            code = ANSWER.unpack(answer)[1]
            return "connected" if code == 0 else f"answer {REASONS[code - 1] if code <= len(REASONS) else code}"
    except TimeoutError:
        return "silent"
    except ssl.SSLError as error:
        return f"alert {words(error)}"
    except OSError as error:
        return f"reset {words(error)}"


def serve(address, leaf, key):
    made = context(ssl.PROTOCOL_TLS_SERVER, leaf, key)
    # Any client is asked for a certificate and none is verified: only what it says of ours matters.
    made.verify_mode = ssl.CERT_NONE
    listener = socket.create_server((address, INBOUND_PORT))

    def one(plain):
        plain.settimeout(SECONDS_MAX)
        try:
            with made.wrap_socket(plain, server_side=True) as tls:
                said = tls.recv(HEADER.size)
                if not said:
                    print("knock: closed", flush=True)
                    return
                print(f"knock: header of {len(said)} bytes", flush=True)
                tls.sendall(ANSWER.pack(VERSION, 0, 0) + b"stolen")
        except OSError as error:
            print(f"knock: alert {words(error)}", flush=True)

    def forever():
        while True:
            threading.Thread(target=one, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=forever, daemon=True).start()
    print("ready", flush=True)
    sys.stdin.read()


def connect(address, port):
    """Open means that it stays so or says something: a redirected connection opens before its peer answered."""
    try:
        sock = socket.create_connection((address, int(port)), timeout=SECONDS_MAX)
    except TimeoutError:
        return "silent"
    except OSError:
        return "refused"
    with sock:
        sock.settimeout(SCAN_SECONDS)
        try:
            return "open" if sock.recv(1) else "closed"
        except TimeoutError:
            return "open"
        except OSError:
            return "refused"


def reached(target):
    address, port = target.split()
    try:
        socket.create_connection((address, int(port)), timeout=SCAN_SECONDS).close()
        return target
    except OSError:
        return None


def scan():
    targets = sys.stdin.read().splitlines()
    with ThreadPoolExecutor(SCANS_AT_ONCE) as pool:
        seen = [word for word in pool.map(reached, targets) if word]
    return f"{len(seen)} of {len(targets)} open" + "".join(f", {word}" for word in seen[:5])


def hold(address, port, count):
    def one(_):
        sock = socket.create_connection((address, int(port)), timeout=SECONDS_MAX)
        sock.settimeout(SECONDS_MAX)
        sock.recv(1)
        return sock

    with ThreadPoolExecutor(HOLDS_AT_ONCE) as pool:
        held = list(pool.map(one, range(int(count))))
    print(f"holding {len(held)}", flush=True)
    sys.stdin.read()


def ask(path, word, *fields):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(SECONDS_MAX)
        sock.connect(path)
        request = {"version": 1, "ask": word}
        if word == "drain":
            request["deadline_seconds"], fields = int(fields[0]), fields[1:]
        sock.sendall(json.dumps(request).encode() + b"\n")
        said = json.loads(sock.makefile().readline())
    if said.get("answer") == "error":
        raise SystemExit(said["message"])
    for field in fields:
        said = said.get(field) if said else None
    return said if isinstance(said, str) else json.dumps(said)


VERBS = {"dial": dial, "serve": serve, "connect": connect, "scan": scan, "hold": hold, "ask": ask}

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in VERBS:
        sys.exit(__doc__)
    seen = VERBS[sys.argv[1]](*sys.argv[2:])
    if seen is not None:
        print(seen, flush=True)
