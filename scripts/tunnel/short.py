"""Files for Ray's own TLS that are as short-lived as those in tunnel mode: a throw-away CA, and for each folder a new leaf
of LIFE seconds each EVERY seconds, until the input ends.

short.py LIFE EVERY FOLDER=ADDRESS...

FOLDER/current is a link that is swapped whole; it holds tls.crt, tls.key and ca.crt.
"""

import datetime
import ipaddress
import os
import sys
import threading
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID


def name(text):
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def certificate(subject, key, issuer, issuer_key, life, extensions):
    now = datetime.datetime.now(datetime.timezone.utc)
    built = (x509.CertificateBuilder().subject_name(name(subject)).issuer_name(name(issuer)).public_key(key.public_key())
             .serial_number(x509.random_serial_number()).not_valid_before(now - datetime.timedelta(minutes=10))
             .not_valid_after(now + datetime.timedelta(seconds=life)))
    for extension, critical in extensions:
        built = built.add_extension(extension, critical)
    return built.sign(issuer_key, hashes.SHA256())


def pem(made):
    return made.public_bytes(serialization.Encoding.PEM)


def renew(folder, address, number, authority, authority_key, life):
    key = ec.generate_private_key(ec.SECP256R1())
    addresses = [x509.IPAddress(ipaddress.ip_address(one)) for one in (address, "127.0.0.1")]
    leaf = certificate(f"leaf {number}", key, "short", authority_key, life, [
        (x509.SubjectAlternativeName([*addresses, x509.DNSName("localhost")]), False),
        (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), False),
    ])
    made = folder / f"k{number}"
    made.mkdir(parents=True, mode=0o755)
    (made / "tls.crt").write_bytes(pem(leaf))
    (made / "ca.crt").write_bytes(pem(authority))
    (made / "tls.key").write_bytes(key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    link = folder / "next"
    link.symlink_to(made.name)
    os.rename(link, folder / "current")


def main():
    life, every = int(sys.argv[1]), int(sys.argv[2])
    folders = [text.split("=", 1) for text in sys.argv[3:]]
    authority_key = ec.generate_private_key(ec.SECP256R1())
    authority = certificate("short", authority_key, "short", authority_key, 86_400, [(x509.BasicConstraints(True, None), True)])
    ends = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), ends.set()), daemon=True).start()
    number = 0
    while not ends.is_set():
        for folder, address in folders:
            renew(Path(folder), address, number, authority, authority_key, life)
        if number == 0:
            print("ready", flush=True)
        number += 1
        ends.wait(every)


if __name__ == "__main__":
    main()
