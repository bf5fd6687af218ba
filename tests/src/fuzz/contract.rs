//! The words both sides share: names, addresses, the join file.

use std::{
    fmt::{Debug, Display},
    net::IpAddr,
    str::FromStr,
};

use ca_server::admin::tokens::check_pattern;
use raymtls_proto::{
    address::{AddressRange, NodeAddress},
    identity::{AdminName, ClusterId, DnsName, NodeName, Role, Subject, TrustDomain},
    join::JoinFile,
    serial::Serial,
    token::{BootstrapToken, TokenId},
};
use secrecy::ExposeSecret;

use super::{ERROR_LEN_MAX, text};

/// Names of every kind: what is accepted follows the grammar and reads back the same.
pub fn names(data: &[u8]) {
    let Some(text) = text(data) else { return };
    for accepted in [
        round_trip::<NodeName>(text).is_some(),
        round_trip::<ClusterId>(text).is_some(),
        round_trip::<AdminName>(text).is_some(),
    ] {
        assert_eq!(accepted, is_label(text), "{text:?}");
    }
    let labels = text.split('.').all(is_label);
    let domain = round_trip::<TrustDomain>(text);
    assert_eq!(domain.is_some(), labels && text.len() <= 200, "{text:?}");
    let dns = round_trip::<DnsName>(text).is_some();
    let lettered = text.contains(|c: char| c.is_ascii_lowercase());
    assert_eq!(dns, labels && lettered && text.len() <= 253, "{text:?}");
    assert!(!dns || text.parse::<IpAddr>().is_err(), "{text:?} is an address");
    round_trip::<Role>(text);
    round_trip::<TokenId>(text);
    if let Ok(serial) = text.parse::<Serial>() {
        assert_eq!(serial.to_string().parse(), Ok(serial));
    }
    if let Ok(token) = text.parse::<BootstrapToken>() {
        assert_eq!(token.expose().expose_secret(), text, "another text for the same token");
        assert!(!format!("{token:?}").contains(&text[17..]), "the secret is printed");
    }
    uri(text);
    pattern(text);
}

fn uri(text: &str) {
    let domain: TrustDomain = "ray.example".parse().expect("a valid name");
    match Subject::parse(text, &domain) {
        Ok(subject) => assert_eq!(subject.uri(&domain), text, "another URI for the same subject"),
        Err(error) => assert!(error.to_string().len() <= ERROR_LEN_MAX, "{error}"),
    }
}

/// A pattern of node names is a name, or what one could begin with and a `*`.
fn pattern(text: &str) {
    let beginning = text.strip_suffix('*');
    let allowed = match beginning {
        Some(beginning) => beginning.is_empty() || is_label(&format!("{beginning}x")),
        None => is_label(text),
    };
    match check_pattern(text) {
        Ok(()) => assert!(allowed, "{text:?}"),
        Err(refusal) => {
            assert!(!allowed, "{text:?}");
            assert!(refusal.to_string().len() <= ERROR_LEN_MAX, "{refusal}");
        }
    }
}

/// Addresses and ranges: canonical, and none that names no machine.
pub fn addresses(data: &[u8]) {
    let Some(text) = text(data) else { return };
    if let Ok(address) = text.parse::<NodeAddress>() {
        let ip = address.ip();
        assert_eq!(address.to_string().parse(), Ok(address), "{text:?}");
        assert_eq!(ip, ip.to_canonical(), "{text:?} is not canonical");
        assert!(!ip.is_loopback() && !ip.is_unspecified() && !ip.is_multicast(), "{text:?}");
        match ip {
            IpAddr::V4(v4) => assert!(!v4.is_link_local() && !v4.is_broadcast(), "{text:?}"),
            IpAddr::V6(v6) => assert!(!v6.is_unicast_link_local(), "{text:?}"),
        }
        let alone: AddressRange = address.to_string().parse().expect("an address is a range");
        assert!(alone.contains(address), "{text:?}");
    }
    if let Ok(range) = text.parse::<AddressRange>() {
        assert_eq!(range.to_string().parse(), Ok(range), "{text:?}");
    }
    for error in [
        text.parse::<NodeAddress>().err().map(|error| error.to_string()),
        text.parse::<AddressRange>().err().map(|error| error.to_string()),
    ] {
        assert!(error.unwrap_or_default().len() <= ERROR_LEN_MAX);
    }
}

/// The join file: what is read is written and read again the same, and no error holds a secret.
pub fn join(data: &[u8]) {
    let Some(text) = text(data) else { return };
    let file = match JoinFile::parse(text) {
        Ok(file) => file,
        Err(error) => {
            let said = format!("{error} {error:?}");
            assert!(said.len() <= 2 * ERROR_LEN_MAX, "{} bytes of error", said.len());
            return assert!(secrets(text).all(|secret| !said.contains(secret)), "{said}");
        }
    };
    for endpoints in [&file.enrollment_endpoints, &file.node_endpoints] {
        assert!((1..=16).contains(&endpoints.len()));
        assert!(endpoints.iter().all(|endpoint| endpoint.len() <= 255 + 6), "{endpoints:?}");
    }
    if let Some(token) = file.token().map(BootstrapToken::expose) {
        let secret = &token.expose_secret()[17..];
        assert!(!format!("{file:?}").contains(secret), "the secret is printed");
    }
    let written = file.to_text();
    let again = JoinFile::parse(written.expose_secret()).expect("what was written is read");
    assert_eq!(again.to_text().expose_secret(), written.expose_secret(), "written twice");
    assert_eq!(
        again.token().map(BootstrapToken::secret_hash),
        file.token().map(BootstrapToken::secret_hash)
    );
    assert_eq!(again.control_roots, file.control_roots);
    assert_eq!(again.node_endpoints, file.node_endpoints);
    assert_eq!(again.enrollment_endpoints, file.enrollment_endpoints);
    assert_eq!((again.trust_domain, again.cluster), (file.trust_domain, file.cluster));
}

/// Secret halves of everything in the text that looks like a token, wherever it stands.
fn secrets(text: &str) -> impl Iterator<Item = &str> {
    let is_secret = |b: &u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_');
    text.match_indices('.').filter_map(move |(at, _)| {
        let before = text.get(at.checked_sub(16)?..at)?;
        let after = text.get(at + 1..at + 1 + 43)?;
        let fits =
            before.bytes().all(|b| b.is_ascii_hexdigit()) && after.as_bytes().iter().all(is_secret);
        fits.then_some(after)
    })
}

/// Parses, and if that works, reads back what it shows.
fn round_trip<T>(text: &str) -> Option<T>
where
    T: FromStr + Display + Debug + PartialEq,
    T::Err: Display,
{
    match text.parse::<T>() {
        Ok(parsed) => {
            assert_eq!(parsed.to_string(), text, "shown as another text");
            Some(parsed)
        }
        Err(error) => {
            assert!(error.to_string().len() <= ERROR_LEN_MAX, "{error}");
            None
        }
    }
}

/// The grammar of the documentation, said another way than in the product: 1 to 63 of a-z, 0-9 and
/// `-`, no hyphen at either end.
fn is_label(text: &str) -> bool {
    text.chars().all(|c| matches!(c, 'a'..='z' | '0'..='9' | '-'))
        && !text.is_empty()
        && text.len() < 64
        && !text.starts_with('-')
        && !text.ends_with('-')
}
