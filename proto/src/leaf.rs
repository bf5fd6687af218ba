//! The facts of a certificate, read back with a parser that did not write it. Used by the CA before
//! anything leaves it, and by the agent before anything replaces a file.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use thiserror::Error;
use time::OffsetDateTime;
use x509_parser::{
    extensions::{GeneralName, ParsedExtension},
    prelude::{FromDer, X509Certificate},
};

use crate::serial::Serial;

/// What a certificate says, in types.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeafFacts {
    /// Serial number.
    pub serial: Serial,
    /// First moment of validity.
    pub not_before: OffsetDateTime,
    /// Last moment of validity.
    pub not_after: OffsetDateTime,
    /// SubjectPublicKeyInfo, DER.
    pub spki_der: Vec<u8>,
    /// Issuer name, DER.
    pub issuer_der: Vec<u8>,
    /// Subject name, DER; an empty name is `30 00`.
    pub subject_der: Vec<u8>,
    /// SAN: addresses, in order.
    pub addresses: Vec<IpAddr>,
    /// SAN: DNS names, in order.
    pub dns_names: Vec<String>,
    /// SAN: URIs, in order.
    pub uris: Vec<String>,
    /// SAN entries of any other type: none is ever ours.
    pub other_names: usize,
    /// Extended key usage has id-kp-serverAuth.
    pub server_auth: bool,
    /// Extended key usage has id-kp-clientAuth.
    pub client_auth: bool,
    /// Extended key usages other than these two.
    pub other_eku: bool,
    /// BasicConstraints says CA:TRUE.
    pub is_ca: bool,
    /// Key usage bits as in the DER, bit 0 first (RFC 5280 4.2.1.3); `None` without the extension.
    pub key_usage: Option<u16>,
    /// pathLenConstraint of BasicConstraints.
    pub path_len: Option<u32>,
    /// Authority key identifier.
    pub authority_key_id: Option<Vec<u8>>,
    /// Object identifiers of all extensions, in order, and which are critical.
    pub extensions: Vec<(String, bool)>,
}

/// The bytes are no certificate we can read.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("unreadable certificate: {0}")]
pub struct LeafError(pub &'static str);

impl LeafFacts {
    /// Reads one DER certificate.
    ///
    /// # Errors
    /// Not DER, trailing bytes, an extension twice, a serial longer than 16 bytes.
    pub fn parse(certificate_der: &[u8]) -> Result<Self, LeafError> {
        let (rest, certificate) = X509Certificate::from_der(certificate_der)
            .map_err(|_| LeafError("not an X.509 certificate in DER"))?;
        if !rest.is_empty() {
            return Err(LeafError("bytes after the certificate"));
        }
        // Refuses duplicate extensions as well.
        certificate.extensions_map().map_err(|_| LeafError("an extension stands twice"))?;
        let mut facts = Self {
            serial: Serial::from_slice(strip_sign(certificate.raw_serial()))
                .map_err(|_| LeafError("the serial number is longer than 16 bytes"))?,
            not_before: certificate.validity().not_before.to_datetime(),
            not_after: certificate.validity().not_after.to_datetime(),
            spki_der: certificate.public_key().raw.to_vec(),
            issuer_der: certificate.issuer().as_raw().to_vec(),
            subject_der: certificate.subject().as_raw().to_vec(),
            addresses: Vec::new(),
            dns_names: Vec::new(),
            uris: Vec::new(),
            other_names: 0,
            server_auth: false,
            client_auth: false,
            other_eku: false,
            is_ca: false,
            key_usage: None,
            path_len: None,
            authority_key_id: None,
            extensions: Vec::new(),
        };
        for extension in certificate.extensions() {
            facts.extensions.push((extension.oid.to_id_string(), extension.critical));
            facts.read_extension(extension.parsed_extension())?;
        }
        Ok(facts)
    }

    #[allow(clippy::wildcard_enum_match_arm, reason = "x509-parser's enum, not ours")]
    fn read_extension(&mut self, extension: &ParsedExtension<'_>) -> Result<(), LeafError> {
        match extension {
            ParsedExtension::SubjectAlternativeName(names) => {
                names.general_names.iter().try_for_each(|name| self.read_name(name))?;
            }
            ParsedExtension::ExtendedKeyUsage(usage) => {
                self.server_auth = usage.server_auth;
                self.client_auth = usage.client_auth;
                self.other_eku = usage.any
                    || usage.code_signing
                    || usage.email_protection
                    || usage.time_stamping
                    || usage.ocsp_signing
                    || !usage.other.is_empty();
            }
            ParsedExtension::BasicConstraints(constraints) => {
                self.is_ca = constraints.ca;
                self.path_len = constraints.path_len_constraint;
            }
            ParsedExtension::AuthorityKeyIdentifier(id) => {
                self.authority_key_id = id.key_identifier.as_ref().map(|id| id.0.to_vec());
            }
            ParsedExtension::KeyUsage(usage) => self.key_usage = Some(usage.flags),
            ParsedExtension::ParseError { .. } => {
                return Err(LeafError("an extension does not parse"));
            }
            _ => {}
        }
        Ok(())
    }

    #[allow(clippy::wildcard_enum_match_arm, reason = "x509-parser's enum, not ours")]
    fn read_name(&mut self, name: &GeneralName<'_>) -> Result<(), LeafError> {
        match name {
            GeneralName::DNSName(name) => self.dns_names.push((*name).to_owned()),
            GeneralName::URI(uri) => self.uris.push((*uri).to_owned()),
            GeneralName::IPAddress(bytes) => self.addresses.push(address(bytes)?),
            _ => self.other_names += 1,
        }
        Ok(())
    }
}

/// DER writes a leading zero where the top bit of a positive INTEGER is set.
fn strip_sign(raw: &[u8]) -> &[u8] {
    match raw {
        [0, rest @ ..] if raw.len() == Serial::LEN + 1 => rest,
        _ => raw,
    }
}

fn address(bytes: &[u8]) -> Result<IpAddr, LeafError> {
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        return Ok(Ipv4Addr::from(v4).into());
    }
    let v6 = <[u8; 16]>::try_from(bytes)
        .map_err(|_| LeafError("an address in the SAN is neither 4 nor 16 bytes"))?;
    Ok(Ipv6Addr::from(v6).into())
}
