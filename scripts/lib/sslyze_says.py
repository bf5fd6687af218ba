"""Reads what sslyze found at one listener (its JSON) and fails on anything but TLS 1.3 without a finding.

sslyze_says.py NAME FILE
"""

import json
import sys

# Answers of sslyze by test: the one field that counts, and what it must say.
WANTED = {
    "tls_compression": ("supports_compression", False),
    "openssl_ccs_injection": ("is_vulnerable_to_ccs_injection", False),
    "heartbleed": ("is_vulnerable_to_heartbleed", False),
    "robot": ("robot_result", "NOT_VULNERABLE_RSA_NOT_SUPPORTED"),
    "session_renegotiation": ("is_vulnerable_to_client_renegotiation_dos", False),
    "session_resumption": ("tls_ticket_successful_resumptions_count", 0),
}
OLD = ["ssl_2_0", "ssl_3_0", "tls_1_0", "tls_1_1", "tls_1_2"]
SUITES = {"TLS_AES_128_GCM_SHA256", "TLS_AES_256_GCM_SHA384", "TLS_CHACHA20_POLY1305_SHA256"}
CURVES = {"X25519", "secp256r1", "secp384r1"}


def findings(scan: dict):
    """What is wrong, in words; a test that did not end is wrong, too."""

    def result(test: str) -> dict:
        if scan[test]["status"] != "COMPLETED":
            raise ValueError(f"{test} did not end: {scan[test]['error_reason']}")
        return scan[test]["result"]

    def accepted(version: str) -> set:
        suites = result(f"{version}_cipher_suites")["accepted_cipher_suites"]
        return {suite["cipher_suite"]["name"] for suite in suites}

    for version in OLD:
        if suites := accepted(version):
            yield f"{version} is spoken: {sorted(suites)}"
    now = accepted("tls_1_3")
    if not now or not now <= SUITES:
        yield f"suites of TLS 1.3: {sorted(now)}"
    curves = {curve["name"] for curve in result("elliptic_curves")["supported_curves"]}
    if not curves or not curves <= CURVES:
        yield f"curves: {sorted(curves)}"
    for test, (field, wanted) in WANTED.items():
        if (said := result(test)[field]) != wanted:
            yield f"{test}: {field} is {said}"
    for chain in result("certificate_info")["certificate_deployments"]:
        if not chain["received_chain_has_valid_order"]:
            yield "the chain is out of order"
        for certificate in chain["received_certificate_chain"]:
            key, digest = certificate["public_key"], certificate["signature_hash_algorithm"]
            if key["ec_curve_name"] != "secp256r1":
                yield f"a key of another kind: {key['algorithm']} of {key['key_size']} bits"
            if digest["name"] != "sha256":
                yield f"signed with {digest['name']}"


def main() -> int:
    name, path = sys.argv[1:]
    with open(path, encoding="utf-8") as file:
        (scanned,) = json.load(file)["server_scan_results"]
    if scanned["connectivity_status"] != "COMPLETED":
        print(f"{name}: not reached: {scanned['connectivity_error_trace']}", file=sys.stderr)
        return 1
    found = list(findings(scanned["scan_result"]))
    for finding in found:
        print(f"{name}: {finding}", file=sys.stderr)
    asked = scanned["connectivity_result"]["client_auth_requirement"]
    if not found:
        print(f"   {name}: no finding; client certificate: {asked.lower()}")
    return 1 if found else 0


sys.exit(main())
