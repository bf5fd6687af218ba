#!/usr/bin/env python3
"""The nginx configurations of scripts/isolation/nginx/ in a real nginx on loopback, in front of a stand-in
for the dashboard: who gets through and who does not, and that what is refused never reaches the dashboard.

Changed for the test: the paths, the port, and the dashboard's port; the rest is the committed text.
"""

import base64
import http.server
import os
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

CONFIGS = Path(__file__).resolve().parent.parent / "nginx"
NAME = "ray.example.com"
SECONDS_MAX = 10
failed = []
reached = []


class Dashboard(http.server.BaseHTTPRequestHandler):
    def answer(self):
        self.rfile.read(int(self.headers.get("content-length") or 0))
        reached.append((self.command, self.path, self.headers.get("Host"), self.headers.get("Authorization")))
        self.send_response(200)
        self.send_header("content-length", "9")
        self.end_headers()
        self.wfile.write(b"dashboard")

    do_GET = do_POST = do_DELETE = answer

    def log_message(self, *_):
        pass


def run(*command, **more):
    subprocess.run(command, check=True, capture_output=True, timeout=60, **more)


def make_keys(folder):
    for ca in ("admins-ca", "other-ca", "server-ca"):
        run("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1",
            "-subj", f"/CN={ca}", "-keyout", f"{ca}.key", "-out", f"{ca}.pem", cwd=folder)
    for leaf, ca, use in (("server", "server-ca", "serverAuth"), ("admin", "admins-ca", "clientAuth"), ("other", "other-ca", "clientAuth")):
        run("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1",
            "-CA", f"{ca}.pem", "-CAkey", f"{ca}.key", "-subj", f"/CN={leaf}", "-addext", "basicConstraints=critical,CA:FALSE",
            "-addext", f"extendedKeyUsage={use}", "-addext", f"subjectAltName=DNS:{NAME}",
            "-keyout", f"{leaf}.key", "-out", f"{leaf}.pem", cwd=folder)
    hashed = subprocess.run(["openssl", "passwd", "-6", "-stdin"], input="right\n", text=True, capture_output=True, check=True).stdout
    (folder / "admins.htpasswd").write_text(f"anna:{hashed}")
    os.chmod(folder, 0o755)
    os.chmod(folder / "admins.htpasswd", 0o644)


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def start_nginx(folder, config, port, dashboard):
    text = (CONFIGS / config).read_text()
    for old, new in (
        ("/etc/nginx/ray/", f"{folder}/"), ("listen 8443", f"listen 127.0.0.1:{port}"),
        ("listen [::]:8443", f"listen [::1]:{port}"), ("127.0.0.1:8265", f"127.0.0.1:{dashboard}"),
    ):
        if old not in text and "htpasswd" not in old:
            raise SystemExit(f"{config}: {old} is not in it")
        text = text.replace(old, new)
    (folder / config).write_text(text)
    main = folder / f"main-{config}"
    temporary = "".join(f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    main.write_text(
        f"daemon off; master_process off; pid {folder}/{config}.pid; error_log {folder}/error.log;\n"
        f"events {{}}\nhttp {{ access_log off; {temporary}\ninclude {folder / config}; }}\n"
    )
    child = subprocess.Popen(["nginx", "-e", f"{folder}/error.log", "-c", main], stderr=subprocess.PIPE)
    until = time.monotonic() + SECONDS_MAX
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return child
        except OSError:
            if child.poll() is not None or time.monotonic() > until:
                child.kill()
                raise SystemExit(f"nginx with {config} did not start: {child.stderr.read().decode()}")
            time.sleep(0.05)


class Client:
    def __init__(self, folder, port):
        self.folder, self.port = folder, port

    def ask(self, leaf=None, sni=NAME, host=None, method="GET", address="127.0.0.1", headers=None):
        """The status; `handshake` or `closed` where there is none."""
        context = ssl.create_default_context(cafile=self.folder / "server-ca.pem")
        if sni != NAME:
            context.check_hostname = False
        if leaf:
            context.load_cert_chain(self.folder / f"{leaf}.pem", self.folder / f"{leaf}.key")
        lines = {"Host": host or f"{NAME}:{self.port}", "Connection": "close", "Content-Length": "0"} | (headers or {})
        request = f"{method} /api/jobs/ HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in lines.items()) + "\r\n"
        with socket.create_connection((address, self.port), timeout=SECONDS_MAX) as raw:
            try:
                tls = context.wrap_socket(raw, server_hostname=sni)
            except (ssl.SSLError, ConnectionError):
                return "handshake"
            return self.status(tls, request)

    def plain(self):
        with socket.create_connection(("127.0.0.1", self.port), timeout=SECONDS_MAX) as raw:
            return self.status(raw, f"GET / HTTP/1.1\r\nHost: {NAME}\r\nConnection: close\r\n\r\n")

    @staticmethod
    def status(sock, request):
        try:
            sock.sendall(request.encode())
            words = sock.recv(4096).split(b" ")
        except (ssl.SSLError, ConnectionError):
            return "closed"
        return int(words[1]) if len(words) > 1 else "closed"


def judge(claim, seen, wanted):
    passed = len(reached)
    right = seen == wanted and passed == (wanted == 200)
    print(f"   {'ok' if right else 'FAILED'}: {claim}: {seen}" + ("" if right else f", wanted {wanted}; {passed} reached the dashboard"))
    reached.clear()
    if not right:
        failed.append(claim)


# What holds for both, once somebody has shown who he is by KNOWN.
def names_and_pages(ask, how):
    judge(f"{how}: lets an admin through", ask(), 200)
    judge(f"{how}: over IPv6 too", ask(address="::1"), 200)
    judge(f"{how}: another Host is refused", ask(host="evil.example"), REFUSED_HOST)
    judge(f"{how}: the address as Host is refused", ask(host="127.0.0.1"), REFUSED_HOST)
    judge(f"{how}: another name in TLS is refused", ask(sni="evil.example"), "handshake")
    judge(f"{how}: no name in TLS is refused", ask(sni=None), "handshake")
    for method in ("GET", "POST", "DELETE"):
        page = {"Sec-Fetch-Site": "cross-site"}
        judge(f"{how}: {method} that another site's page began is refused", ask(method=method, headers=page), 403)
    judge(f"{how}: so is one with another Origin", ask(method="POST", headers={"Origin": "https://evil.example"}), 403)
    judge(f"{how}: and one whose Origin only begins like ours", ask(method="POST", headers={"Origin": f"https://{NAME}.evil.example"}), 403)
    own = {"Sec-Fetch-Site": "same-origin", "Origin": f"https://{NAME}:8443"}
    judge(f"{how}: the dashboard's own page may POST", ask(method="POST", headers=own), 200)


REFUSED_HOST = "closed"


def main():
    dashboard = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Dashboard)
    threading.Thread(target=dashboard.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_keys(folder)
        children = []
        try:
            for config in ("dashboard.conf", "dashboard-password.conf"):
                port = free_port()
                children.append(start_nginx(folder, config, port, dashboard.server_address[1]))
                client = Client(folder, port)
                if config == "dashboard.conf":
                    judge("certificate: without one", client.ask(), 400)
                    judge("certificate: of another CA", client.ask(leaf="other"), 400)
                    names_and_pages(lambda **how: client.ask(leaf="admin", **how), "certificate")
                else:
                    said = lambda word: {"Authorization": "Basic " + base64.b64encode(word.encode()).decode()}
                    judge("password: without one", client.ask(), 401)
                    judge("password: a wrong one", client.ask(headers=said("anna:wrong")), 401)
                    client.ask(headers=said("anna:right"))
                    kept = [seen[3] for seen in reached]
                    reached.clear()
                    judge("password: is not handed on", "kept back" if kept == [None] else kept, "kept back")
                    names_and_pages(
                        lambda headers=None, **how: client.ask(headers=said("anna:right") | (headers or {}), **how), "password")
                judge("without TLS", client.plain(), 400)
        finally:
            for child in children:
                child.terminate()
                child.wait(timeout=SECONDS_MAX)
    print(f"   {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
