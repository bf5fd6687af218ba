"""Two looks at a TLS port of Ray, with the standard library alone.

probe.py byte HOST PORT [--cert FILE --key FILE]    does the server speak to this client?
probe.py serial HOST PORT --cert FILE --key FILE    serial of the certificate the port serves

In TLS 1.3 a client takes the handshake for done before the server has judged its certificate, so a
connection proves nothing: `byte` waits for the first byte of HTTP/2 and prints one of
  settings    the server sent its SETTINGS frame: the client is let in
  refused     a TLS alert or the end of the connection came first
  silent      nothing came back at all: the network let nothing through
"""

import argparse
import os
import socket
import ssl
import subprocess
import sys

CONNECT_SECONDS = 10
# Below it nobody is called silent: on this machine's network an answer takes milliseconds.
SILENT_SECONDS = 1.5
# What an HTTP/2 client says first: preface, then an empty SETTINGS frame.
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
FRAME_HEADER_LEN = 9
FRAME_TYPE_AT = 3
SETTINGS = 4


def client_context(cert, key):
    """A TLS client that judges nothing about the server."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    if cert:
        context.load_cert_chain(cert, key)
    return context


def connect(host, port):
    return socket.create_connection((host, port), timeout=CONNECT_SECONDS)


def first_byte(host, port, context):
    """`settings`, or `refused` with the reason."""
    try:
        plain = socket.create_connection((host, port), timeout=SILENT_SECONDS)
    except TimeoutError:
        return "silent", f"for {SILENT_SECONDS} s"
    plain.settimeout(CONNECT_SECONDS)
    try:
        with context.wrap_socket(plain) as stream:
            stream.sendall(PREFACE)
            head = b""
            while len(head) < FRAME_HEADER_LEN:
                got = stream.recv(FRAME_HEADER_LEN - len(head))
                if not got:
                    return "refused", f"end of the connection after {len(head)} bytes"
                head += got
    except ssl.SSLError as error:
        return "refused", error.reason or str(error)
    except ConnectionResetError:
        return "refused", "connection reset"
    if head[FRAME_TYPE_AT] != SETTINGS:
        return "strange", head.hex()
    return "settings", "(let in: it answers by HTTP/2)"


def served_serial(host, port, cert=None, key=None):
    """Serial (upper-case hex, as openssl prints it) of what the port serves; presents this node's leaf."""
    cert = cert or os.environ["RAY_TLS_SERVER_CERT"]
    key = key or os.environ["RAY_TLS_SERVER_KEY"]
    with client_context(cert, key).wrap_socket(connect(host, port)) as stream:
        der = stream.getpeercert(binary_form=True)
    answer = subprocess.run(
        ["openssl", "x509", "-inform", "DER", "-noout", "-serial"], input=der, capture_output=True, check=True
    )
    return answer.stdout.decode().strip().removeprefix("serial=")


def main():
    parser = argparse.ArgumentParser(description="looks at a TLS port of Ray")
    parser.add_argument("look", choices=["byte", "serial"])
    parser.add_argument("host")
    parser.add_argument("port", type=int)
    parser.add_argument("--cert")
    parser.add_argument("--key")
    args = parser.parse_args()
    if args.look == "serial":
        print(served_serial(args.host, args.port, args.cert, args.key))
        return 0
    context = client_context(args.cert, args.key)
    try:
        answer, why = first_byte(args.host, args.port, context)
    except OSError as error:
        # Nobody listens, or no way there: that is no refusal.
        answer, why = "unreachable", str(error)
    print(f"{answer} {why}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
