//! What is taken from a certificate request: its public key, once it is proved that the caller has
//! the private one. Everything else a request could ask for makes it invalid.

use raymtls_proto::digest::sha256;
use x509_parser::{
    certification_request::X509CertificationRequest, cri_attributes::ParsedCriAttribute,
    oid_registry::OID_SIG_ECDSA_WITH_SHA256, prelude::FromDer, x509::SubjectPublicKeyInfo,
};

use crate::refusal::Refusal;

/// Longest request, in bytes of DER; a P-256 one without extensions has about 200.
pub const CSR_DER_LEN_MAX: usize = 8 * 1_024;

/// A request that reads well and proves nothing yet: who sent it need not hold the private key. Its
/// key is good for looking things up, which costs less than the signature.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnprovedCsr {
    csr_der: Vec<u8>,
    spki_der: Vec<u8>,
}

impl UnprovedCsr {
    /// Reads a PKCS#10 request (RFC 2986).
    ///
    /// # Errors
    /// `CsrInvalid` for anything but one request with an empty subject and no attributes;
    /// `KeyNotAllowed` for another kind of key than P-256.
    pub fn read(csr_der: Vec<u8>) -> Result<Self, Refusal> {
        let csr = parse(&csr_der)?;
        let info = &csr.certification_request_info;
        if info.subject.iter().next().is_some() {
            return Err(invalid("the subject must be empty: names travel in the call, not here"));
        }
        check_attributes(&csr)?;
        check_key(&info.subject_pki)?;
        if csr.signature_algorithm.algorithm != OID_SIG_ECDSA_WITH_SHA256 {
            return Err(invalid("signed with another algorithm than ECDSA with SHA-256"));
        }
        let spki_der = info.subject_pki.raw.to_vec();
        check_encoding(&csr_der, info.raw, &spki_der)?;
        Ok(Self { csr_der, spki_der })
    }

    /// What the key is known by.
    #[must_use]
    pub fn key_hash(&self) -> [u8; 32] {
        key_hash(&self.spki_der)
    }

    /// Verifies the signature: the caller holds the private key.
    ///
    /// # Errors
    /// `CsrInvalid`.
    pub fn prove(self) -> Result<Csr, Refusal> {
        parse(&self.csr_der)?
            .verify_signature()
            .map_err(|_| invalid("its signature does not verify"))?;
        Ok(Csr { spki_der: self.spki_der })
    }
}

/// A verified request: the caller holds the private key of this public one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Csr {
    spki_der: Vec<u8>,
}

impl Csr {
    /// Reads and verifies a request at once.
    ///
    /// # Errors
    /// As [`UnprovedCsr::read`] and [`UnprovedCsr::prove`].
    pub fn verify(csr_der: Vec<u8>) -> Result<Self, Refusal> {
        UnprovedCsr::read(csr_der)?.prove()
    }

    /// SubjectPublicKeyInfo, DER.
    #[must_use]
    pub fn spki_der(&self) -> &[u8] {
        &self.spki_der
    }

    /// What the key is known by.
    #[must_use]
    pub fn key_hash(&self) -> [u8; 32] {
        key_hash(&self.spki_der)
    }
}

/// SHA-256 of a DER SubjectPublicKeyInfo.
#[must_use]
pub fn key_hash(spki_der: &[u8]) -> [u8; 32] {
    sha256(spki_der)
}

fn parse(csr_der: &[u8]) -> Result<X509CertificationRequest<'_>, Refusal> {
    if csr_der.len() > CSR_DER_LEN_MAX {
        return Err(invalid(&format!("longer than {CSR_DER_LEN_MAX} bytes")));
    }
    let (rest, csr) = X509CertificationRequest::from_der(csr_der)
        .map_err(|_| invalid("not a PKCS#10 request in DER"))?;
    if rest.is_empty() { Ok(csr) } else { Err(invalid("bytes after the request")) }
}

fn invalid(why: &str) -> Refusal {
    Refusal::CsrInvalid(why.to_owned())
}

fn check_attributes(csr: &X509CertificationRequest<'_>) -> Result<(), Refusal> {
    let Some(attribute) = csr.certification_request_info.iter_attributes().next() else {
        return Ok(());
    };
    let what = match attribute.parsed_attribute() {
        ParsedCriAttribute::ExtensionRequest(request) => match request.extensions.first() {
            Some(extension) => format!("it requests extension {}", extension.oid),
            None => "it holds an empty extension request".to_owned(),
        },
        ParsedCriAttribute::ChallengePassword(_) => "it holds a challenge password".to_owned(),
        ParsedCriAttribute::UnsupportedAttribute => format!("it holds attribute {}", attribute.oid),
    };
    Err(Refusal::CsrInvalid(format!("{what}; only the public key is used")))
}

/// One key, one encoding: what a key is known by is the hash of these bytes, so no other form of the
/// same key may pass.
fn check_key(spki: &SubjectPublicKeyInfo<'_>) -> Result<(), Refusal> {
    let is_p256 = spki.raw.len() == P256_SPKI_LEN && spki.raw.starts_with(&P256_SPKI_START);
    is_p256.then_some(()).ok_or(Refusal::KeyNotAllowed)
}

/// The parser takes lengths in more bytes than DER has them in, and any version. What is signed holds
/// nothing but the key by now, so there is one way to write it.
fn check_encoding(csr_der: &[u8], info_der: &[u8], spki_der: &[u8]) -> Result<(), Refusal> {
    let in_der = info_der == [&INFO_START, spki_der, &NO_ATTRIBUTES].concat()
        && has_shortest_length(csr_der);
    if in_der { Ok(()) } else { Err(invalid("not a PKCS#10 request of version 0 in DER")) }
}

/// X.690 10.1: the length in as few bytes as it can be written in.
fn has_shortest_length(sequence_der: &[u8]) -> bool {
    match sequence_der {
        [0x30, short, content @ ..] if *short < 0x80 => content.len() == usize::from(*short),
        [0x30, 0x81, len, content @ ..] if *len >= 0x80 => content.len() == usize::from(*len),
        [0x30, 0x82, high, low, content @ ..] if *high > 0 => {
            content.len() == usize::from(u16::from_be_bytes([*high, *low]))
        }
        _ => false,
    }
}

/// SEQUENCE of 98 bytes { version 0, empty subject, .. } (RFC 2986 4.1).
const INFO_START: [u8; 7] = [0x30, 0x62, 0x02, 0x01, 0x00, 0x30, 0x00];
/// [0] {}
const NO_ATTRIBUTES: [u8; 2] = [0xa0, 0x00];

/// SEQUENCE { SEQUENCE { id-ecPublicKey, prime256v1 }, BIT STRING { 04, .. } } (RFC 5480).
const P256_SPKI_START: [u8; 27] = [
    0x30, 0x59, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a,
    0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07, 0x03, 0x42, 0x00, 0x04,
];
/// The start and two coordinates of 32 bytes.
const P256_SPKI_LEN: usize = 27 + 64;

#[cfg(test)]
mod tests {
    use raymtls_proto::reason::Reason;
    use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair, SignatureAlgorithm};

    use super::*;

    fn request(change: impl FnOnce(&mut CertificateParams), key: &KeyPair) -> Vec<u8> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        change(&mut params);
        params.serialize_request(key).unwrap().der().to_vec()
    }

    fn key(algorithm: &'static SignatureAlgorithm) -> KeyPair {
        KeyPair::generate_for(algorithm).unwrap()
    }

    #[test]
    fn an_empty_p256_request_gives_its_key() {
        let key = key(&rcgen::PKCS_ECDSA_P256_SHA256);
        let csr = Csr::verify(request(|_| {}, &key)).unwrap();
        assert_eq!(csr.spki_der(), rcgen::PublicKeyData::subject_public_key_info(&key));
    }

    #[test]
    fn anything_more_than_a_key_is_refused() {
        let p256 = key(&rcgen::PKCS_ECDSA_P256_SHA256);
        let good = request(|_| {}, &p256);
        let mut damaged = good.clone();
        *damaged.last_mut().unwrap() ^= 1;
        let trailing = [good.as_slice(), &[0]].concat();
        let table: Vec<(&str, Vec<u8>, Reason)> = vec![
            ("garbage", vec![0x30, 0x80, 1, 2, 3], Reason::CsrInvalid),
            ("empty", vec![], Reason::CsrInvalid),
            ("too long", vec![0x30; CSR_DER_LEN_MAX + 1], Reason::CsrInvalid),
            ("trailing byte", trailing, Reason::CsrInvalid),
            ("wrong signature", damaged, Reason::CsrInvalid),
            (
                "subject",
                request(|p| p.distinguished_name.push(DnType::CommonName, "x"), &p256),
                Reason::CsrInvalid,
            ),
            (
                "asks for a name",
                request(
                    |p| {
                        let name = "evil".try_into().unwrap();
                        p.subject_alt_names = vec![rcgen::SanType::DnsName(name)];
                    },
                    &p256,
                ),
                Reason::CsrInvalid,
            ),
            (
                "asks to be a CA",
                request(
                    |p| p.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained),
                    &p256,
                ),
                Reason::CsrInvalid,
            ),
            ("P-384", request(|_| {}, &key(&rcgen::PKCS_ECDSA_P384_SHA384)), Reason::KeyNotAllowed),
            ("Ed25519", request(|_| {}, &key(&rcgen::PKCS_ED25519)), Reason::KeyNotAllowed),
        ];
        for (name, csr_der, reason) in table {
            let refusal = Csr::verify(csr_der).expect_err(name);
            assert_eq!(refusal.reason(), reason, "{name}: {refusal}");
        }
    }
}
