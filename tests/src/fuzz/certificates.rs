//! Certificate requests and certificates.

use std::collections::HashSet;

use ca_server::keys::csr::{CSR_DER_LEN_MAX, UnprovedCsr};
use raymtls_proto::{bundle, digest::sha256, leaf::LeafFacts, serial::Serial};
use rustls::pki_types::CertificateDer;
use x509_parser::{certification_request::X509CertificationRequest, prelude::FromDer};

use super::ERROR_LEN_MAX;

/// A certificate request, its signature not verified: what is accepted is one P-256 key in the one
/// encoding of such a request, and nothing else.
pub fn csr(data: &[u8]) {
    let read = UnprovedCsr::read(data.to_vec());
    assert_eq!(read, UnprovedCsr::read(data.to_vec()), "read twice, two answers");
    let csr = match read {
        Ok(csr) => csr,
        Err(refusal) => return assert!(refusal.to_string().len() <= ERROR_LEN_MAX),
    };
    assert!(data.len() <= CSR_DER_LEN_MAX, "longer than allowed");
    let (rest, parsed) = X509CertificationRequest::from_der(data).expect("x509-parser reads it");
    assert!(rest.is_empty(), "bytes after it");
    let spki_der = parsed.certification_request_info.subject_pki.raw;
    assert_eq!(csr.key_hash(), sha256(spki_der), "another key");
    let point = spki_der.strip_prefix(&P256_SPKI_START).expect("a P-256 key");
    assert_eq!(point.len(), 64, "not one uncompressed point");
    let info_der = [&[0x02, 0x01, 0x00, 0x30, 0x00], spki_der, &[0xa0, 0x00]].concat();
    let info_der = sequence(&info_der);
    assert_eq!(parsed.certification_request_info.raw, info_der, "more, or other, than a key");
    // What follows is the signature, which is verified elsewhere and kept nowhere.
    let content = &data[data.len() - content_len(data)..];
    assert!(content.starts_with(&info_der), "what is signed does not come first");
    assert_eq!(data, sequence(content), "another encoding of it");
}

/// Certificates in PEM and DER: what is read is what an independent parser reads.
pub fn certificate(data: &[u8]) {
    facts(data);
    let certificates = match bundle::certificates_from_pem(data) {
        Ok(certificates) => certificates,
        Err(error) => return assert!(error.to_string().len() <= ERROR_LEN_MAX, "{error}"),
    };
    assert!((1..=32).contains(&certificates.len()), "{} certificates", certificates.len());
    let again = bundle::certificates_to_pem(&certificates);
    let again = bundle::certificates_from_pem(again.as_bytes());
    assert_eq!(again.as_ref(), Ok(&certificates), "PEM does not round trip");
    certificates.iter().for_each(|certificate| facts(certificate));
}

fn facts(certificate_der: &[u8]) {
    let read = LeafFacts::parse(certificate_der);
    assert_eq!(read, LeafFacts::parse(certificate_der), "read twice, two answers");
    let Ok(facts) = read else { return };
    assert_eq!(facts.serial.to_string().parse::<Serial>(), Ok(facts.serial));
    let kinds: HashSet<_> = facts.extensions.iter().map(|(oid, _)| oid).collect();
    assert_eq!(kinds.len(), facts.extensions.len(), "an extension stands twice");
    let certificate_der = CertificateDer::from(certificate_der);
    let Ok(strict) = webpki::EndEntityCert::try_from(&certificate_der) else { return };
    assert_eq!(strict.subject_public_key_info().as_ref(), facts.spki_der, "another key");
    for name in strict.valid_dns_names() {
        assert!(facts.dns_names.iter().any(|known| known == name), "{name:?} was not seen");
    }
}

/// An element in DER: the shortest form of its length (X.690 10.1).
fn element(tag: u8, content: &[u8]) -> Vec<u8> {
    let len = content.len();
    let [.., high, low] = len.to_be_bytes();
    let head = match len {
        0..0x80 => vec![tag, low],
        0x80..0x100 => vec![tag, 0x81, low],
        _ => vec![tag, 0x82, high, low],
    };
    [&head, content].concat()
}

/// Bytes of the one element that `der` holds, behind its length.
fn content_len(der: &[u8]) -> usize {
    match der.get(1) {
        Some(len) if *len < 0x80 => der.len() - 2,
        Some(0x81) => der.len() - 3,
        _ => der.len() - 4,
    }
}

fn sequence(content: &[u8]) -> Vec<u8> {
    element(0x30, content)
}

/// Algorithm and curve of SubjectPublicKeyInfo, and the first byte of an uncompressed point
/// (RFC 5480 2.2).
const P256_SPKI_START: [u8; 27] = [
    0x30, 0x59, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a,
    0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07, 0x03, 0x42, 0x00, 0x04,
];
