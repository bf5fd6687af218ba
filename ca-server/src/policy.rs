//! Which names and addresses a token, and later a node, may have certified. Pure.

use raymtls_proto::{
    address::{AddressRange, NodeAddress},
    identity::{DnsName, NodeName},
};

use crate::{
    refusal::Refusal,
    store::{
        Binding, EnrollAsk, LeafAsk,
        records::{NodeRecord, TokenRecord},
    },
};

/// Addresses or DNS names of one node, at most.
pub const NAMES_MAX: usize = 16;
/// Characters of the key's hash that a generated name ends with.
const GENERATED_LEN: usize = 8;

/// What an enrolment would bind, by the token alone: who holds name and addresses is not asked here.
///
/// # Errors
/// A name, DNS name or address the token does not allow; none at all to certify.
pub fn binding(token: &TokenRecord, ask: &EnrollAsk) -> Result<Binding, Refusal> {
    if ask.shared_address && !token.shared_address {
        return Err(Refusal::AddressNotAllowed(
            "the token does not allow shared addresses: make one with --shared-address".to_owned(),
        ));
    }
    Ok(Binding {
        name: node_name(token, ask)?,
        addresses: addresses(token, ask)?,
        dns_names: dns_names(token, ask)?,
    })
}

fn node_name(token: &TokenRecord, ask: &EnrollAsk) -> Result<NodeName, Refusal> {
    let asked = ask.name.as_str();
    if !token.node_names.is_empty() && !token.node_names.iter().any(|p| matches(p, asked)) {
        return Err(Refusal::TokenNodeMismatch(asked.to_owned()));
    }
    if !token.generate_names {
        return Ok(ask.name.clone());
    }
    let base: String = asked.chars().take(63 - 1 - GENERATED_LEN).collect();
    let suffix = &hex::encode(ask.key_hash)[..GENERATED_LEN];
    let name = format!("{}-{suffix}", base.trim_end_matches('-'));
    name.parse().map_err(|e| Refusal::NameNotAllowed(format!("{e}")))
}

/// A pattern is an exact name, or a beginning followed by one `*`.
fn matches(pattern: &str, name: &str) -> bool {
    match pattern.strip_suffix('*') {
        Some(beginning) => name.starts_with(beginning),
        None => pattern == name,
    }
}

fn addresses(token: &TokenRecord, ask: &EnrollAsk) -> Result<Vec<NodeAddress>, Refusal> {
    let ranges: Vec<AddressRange> =
        token.address_ranges.iter().filter_map(|range| range.parse().ok()).collect();
    let in_ranges = |address: NodeAddress| ranges.iter().any(|range| range.contains(address));
    let mut addresses = Vec::new();
    if let Some(source) = ask.source {
        // Without ranges the source address is the one thing a token allows.
        if !token.any_address && !ranges.is_empty() && !in_ranges(source) {
            return Err(not_in_ranges(source));
        }
        addresses.push(source);
    }
    for &claimed in &ask.addresses {
        if addresses.contains(&claimed) {
            continue;
        }
        if !token.any_address && !in_ranges(claimed) {
            return Err(not_in_ranges(claimed));
        }
        addresses.push(claimed);
    }
    if addresses.is_empty() {
        return Err(Refusal::AddressNotAllowed(
            "no address to certify: the connection comes from a loopback or link-local address and \
             names no other; give --address and a token whose --addresses hold it"
                .to_owned(),
        ));
    }
    if addresses.len() > NAMES_MAX {
        return Err(Refusal::AddressNotAllowed(format!("more than {NAMES_MAX} addresses")));
    }
    Ok(addresses)
}

fn not_in_ranges(address: NodeAddress) -> Refusal {
    Refusal::AddressNotAllowed(format!(
        "address {address} is outside the token's ranges: \
         make a token with --addresses that hold it"
    ))
}

fn dns_names(token: &TokenRecord, ask: &EnrollAsk) -> Result<Vec<DnsName>, Refusal> {
    let allowed = |name: &DnsName| token.dns_names.iter().any(|n| n == name.as_str());
    match ask.dns_names.iter().find(|name| !allowed(name)) {
        Some(name) => Err(Refusal::NameNotAllowed(format!(
            "the token does not allow DNS name {name}: make one with --dns {name}"
        ))),
        // Nothing asked for: all the token has, so that an agent need not know the names.
        None if ask.dns_names.is_empty() => Ok(parsed(&token.dns_names)),
        None => Ok(ask.dns_names.clone()),
    }
}

/// What a leaf would certify: a subset of what is bound to the node.
///
/// # Errors
/// Anything that is not bound.
pub fn leaf_names(
    node: &NodeRecord,
    ask: &LeafAsk,
) -> Result<(Vec<NodeAddress>, Vec<DnsName>), Refusal> {
    let bound: Vec<NodeAddress> =
        node.addresses.iter().filter_map(|bound| bound.address.parse().ok()).collect();
    let bound_names: Vec<DnsName> = parsed(&node.dns_names);
    if let Some(address) = ask.addresses.iter().find(|address| !bound.contains(address)) {
        return Err(Refusal::AddressNotAllowed(format!(
            "address {address} is not bound to node {}: enrol again to change addresses",
            node.name
        )));
    }
    if let Some(name) = ask.dns_names.iter().find(|name| !bound_names.contains(name)) {
        return Err(Refusal::NameNotAllowed(format!(
            "DNS name {name} is not bound to node {}: enrol again to change names",
            node.name
        )));
    }
    let addresses = if ask.addresses.is_empty() { bound } else { ask.addresses.clone() };
    let names = if ask.dns_names.is_empty() { bound_names } else { ask.dns_names.clone() };
    Ok((addresses, names))
}

/// Names in a record were parsed before they were stored.
fn parsed(names: &[String]) -> Vec<DnsName> {
    names.iter().filter_map(|name| name.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use raymtls_proto::{identity::Role, reason::Reason};

    use super::*;

    fn ask(name: &str, source: Option<&str>, claimed: &[&str]) -> EnrollAsk {
        EnrollAsk {
            token: "0000000000000000".parse().unwrap(),
            secret_hash: [7; 32],
            cluster: "c1".parse().unwrap(),
            role: Role::Worker,
            name: name.parse().unwrap(),
            key_hash: [0xab; 32],
            source: source.map(|text| text.parse().unwrap()),
            addresses: claimed.iter().map(|text| text.parse().unwrap()).collect(),
            dns_names: vec![],
            shared_address: false,
            once: false,
            vouched: None,
        }
    }

    fn token(ranges: &[&str]) -> TokenRecord {
        TokenRecord {
            address_ranges: ranges.iter().map(|&range| range.to_owned()).collect(),
            ..TokenRecord::default()
        }
    }

    #[test]
    fn addresses_follow_source_and_ranges() {
        let any = TokenRecord { any_address: true, ..TokenRecord::default() };
        let ranged = token(&["10.0.0.0/24"]);
        let table: [(&str, &TokenRecord, EnrollAsk, Result<Vec<&str>, Reason>); 7] = [
            ("source alone", &token(&[]), ask("a", Some("10.0.0.1"), &[]), Ok(vec!["10.0.0.1"])),
            (
                "claimed without ranges",
                &token(&[]),
                ask("a", Some("10.0.0.1"), &["10.0.0.2"]),
                Err(Reason::AddressNotAllowed),
            ),
            (
                "claimed inside",
                &ranged,
                ask("a", Some("10.0.0.1"), &["10.0.0.2", "10.0.0.1"]),
                Ok(vec!["10.0.0.1", "10.0.0.2"]),
            ),
            (
                "claimed outside",
                &ranged,
                ask("a", Some("10.0.0.1"), &["10.0.1.2"]),
                Err(Reason::AddressNotAllowed),
            ),
            (
                "source outside",
                &ranged,
                ask("a", Some("10.0.1.1"), &[]),
                Err(Reason::AddressNotAllowed),
            ),
            ("none at all", &ranged, ask("a", None, &[]), Err(Reason::AddressNotAllowed)),
            ("any", &any, ask("a", None, &["192.0.2.9"]), Ok(vec!["192.0.2.9"])),
        ];
        for (name, token, ask, expected) in table {
            let got = addresses(token, &ask).map_err(|refusal| refusal.reason());
            let got = got.map(|list| list.iter().map(ToString::to_string).collect::<Vec<_>>());
            let expected = expected.map(|l| l.iter().map(ToString::to_string).collect::<Vec<_>>());
            assert_eq!(got, expected, "{name}");
        }
    }

    #[test]
    fn names_follow_patterns_and_generated_ones_stay_labels() {
        let named = TokenRecord {
            node_names: vec!["head".to_owned(), "w-*".to_owned()],
            ..TokenRecord::default()
        };
        for (name, good) in [("head", true), ("w-1", true), ("w-", false), ("head2", false)] {
            let Ok(_) = name.parse::<NodeName>() else { continue };
            assert_eq!(node_name(&named, &ask(name, None, &[])).is_ok(), good, "{name}");
        }
        let generating = TokenRecord { generate_names: true, ..TokenRecord::default() };
        let long = "a".repeat(63);
        for (base, expected) in
            [("w", "w-abababab".to_owned()), (&long, format!("{}-abababab", "a".repeat(54)))]
        {
            let name = node_name(&generating, &ask(base, None, &[])).unwrap();
            assert_eq!(name.as_str(), expected);
        }
    }
}
