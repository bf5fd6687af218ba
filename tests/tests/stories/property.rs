//! For every token and every request drawn: what is certified lies inside what the token allows, and
//! nothing of the request but its public key survives. The certificates are read with a parser that
//! did not write them, extension by extension.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr},
    time::Duration,
};

use ca_server::{admin::tokens, enroll::enroll, issue::issue, keys::csr::key_hash, store::Caller};
use node_agent::keys::PrivateKey;
use proptest::{
    prelude::*,
    sample::{select, subsequence},
    test_runner::{Config, RngAlgorithm, TestRng, TestRunner},
};
use raymtls_proto::{
    address::{AddressRange, NodeAddress},
    leaf::LeafFacts,
    v1,
};
use raymtls_tests::{Deployment, ask, held::Held};
use rcgen::{CertificateParams, DistinguishedName, DnType, IsCa, KeyUsagePurpose, SanType};
use x509_parser::{extensions::GeneralName, extensions::ParsedExtension, prelude::*};

/// Drawn in each run; ten times as many in the long one.
const CASES: u32 = 150;
const DAY: Duration = Duration::from_secs(86_400);

const RANGES: [&str; 6] =
    ["10.0.0.0/24", "10.0.1.7", "172.16.0.0/12", "fd00::/8", "2001:db8::/32", "0.0.0.0/0"];
const ADDRESSES: [&str; 14] = [
    "10.0.0.1",
    "10.0.0.255",
    "10.0.1.7",
    "10.0.1.8",
    "172.31.255.255",
    "172.32.0.0",
    "::ffff:10.0.0.1",
    "fd00::1",
    "FD00:0:0::2",
    "2001:db8::5",
    "127.0.0.1",
    "fe80::1",
    "1.2.3.4.5",
    "",
];
const NAMES: [&str; 8] = ["w1", "w2", "head", "W1", "w_1", "", "w-", "xn--hd-bka"];
const PATTERNS: [&str; 4] = ["w*", "w1", "*", "head"];
const DNS: [&str; 9] = [
    "head.example",
    "a.example",
    "*.example",
    "1.2.3.4",
    "Head.example",
    "head.example.",
    "head_1.example",
    "he\u{430}d.example",
    "evil\0.example",
];

/// What a certificate request holds besides its key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Extra {
    Nothing,
    Subject,
    Name,
    Address,
    Ca,
    KeyUsage,
}

#[derive(Clone, Debug)]
struct Drawn {
    token: v1::CreateTokenRequest,
    request: v1::EnrollRequest,
    leaf: v1::IssueLeafRequest,
    source: Option<NodeAddress>,
    extras: (Extra, Extra),
}

#[test]
fn whatever_is_asked_for_issued_names_lie_inside_the_token() {
    draw(CASES);
}

#[test]
#[ignore = "minutes: run by scripts/test.sh --full"]
fn whatever_is_asked_for_issued_names_lie_inside_the_token_at_length() {
    draw(10 * CASES);
}

fn draw(cases: u32) {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let deployment = runtime.block_on(async {
        let deployment = Deployment::start().await;
        deployment.cluster("c1", DAY).await;
        deployment
    });
    let config = Config { cases, failure_persistence: None, ..Config::default() };
    // The same cases in each run: what fails here fails for whoever looks.
    let mut runner =
        TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha));
    let (issued, refused) = (std::cell::Cell::new(0_u32), std::cell::Cell::new(0_u32));
    runner
        .run(&drawn(), |drawn| {
            let good = runtime.block_on(one(&deployment, drawn));
            let counter = if good { &issued } else { &refused };
            counter.set(counter.get() + 1);
            Ok(())
        })
        .unwrap();
    let (issued, refused) = (issued.get(), refused.get());
    println!("{issued} issued, {refused} refused");
    assert!(issued > cases / 20 && refused > cases / 20, "{issued} issued, {refused} refused");
    runtime.block_on(deployment.finish());
}

/// Whether the enrolment was granted; its claims are judged here.
async fn one(ca: &Deployment, drawn: Drawn) -> bool {
    ca.clock.advance(Duration::from_secs(20 * 60));
    let Drawn { token: wanted, mut request, mut leaf, source, extras } = drawn;
    // A token that cannot be made certifies nothing.
    let Ok(made) = tokens::create(&ca.ca, &ca.operator, wanted.clone()).await else { return false };
    let (key, leaf_key) = (PrivateKey::generate().unwrap(), PrivateKey::generate().unwrap());
    let base = ask(&made.bootstrap_token, "c1", "", &[], &key);
    request.credential = base.credential;
    request.csr_der = csr(&key, extras.0);
    let before = ca.held().await;
    let peer = source.map_or_else(|| Ipv4Addr::LOCALHOST.into(), NodeAddress::ip);
    let Ok(answer) = enroll(&ca.ca, request, peer).await else {
        unchanged(ca, &before).await;
        return false;
    };
    assert_eq!(extras.0, Extra::Nothing, "a request that asks for more was granted");
    let identity_der = answer.identity.unwrap().leaf_der;
    let uri = format!("spiffe://ray.example/cluster/c1/agent/{}", answer.node_name);
    check(&identity_der, &key, &uri, &BTreeSet::new(), &BTreeSet::new());
    allowed(&wanted, source, &answer.node_name, &answer.addresses, &answer.dns_names);

    let caller = Caller {
        cluster: "c1".parse().unwrap(),
        node: answer.node_name.parse().unwrap(),
        serial: LeafFacts::parse(&identity_der).unwrap().serial,
        source,
    };
    leaf.csr_der = csr(&leaf_key, extras.1);
    let before = ca.held().await;
    let Ok(issued) = issue(&ca.ca, caller, leaf.clone()).await else {
        unchanged(ca, &before).await;
        return true;
    };
    assert_eq!(extras.1, Extra::Nothing, "a request that asks for more was granted");
    let mut addresses: BTreeSet<IpAddr> =
        subset(&leaf.addresses, &answer.addresses).iter().map(|a| canonical(a)).collect();
    let mut names: BTreeSet<String> =
        subset(&leaf.dns_names, &answer.dns_names).into_iter().collect();
    addresses.extend(["127.0.0.1", "::1"].map(canonical));
    names.insert("localhost".to_owned());
    let uri = format!("spiffe://ray.example/cluster/c1/node/{}", answer.node_name);
    check(&issued.leaf.unwrap().leaf_der, &leaf_key, &uri, &addresses, &names);
    true
}

/// What was bound is what the token allows.
fn allowed(
    token: &v1::CreateTokenRequest,
    source: Option<NodeAddress>,
    name: &str,
    addresses: &[String],
    dns_names: &[String],
) {
    let fits = |pattern: &String| match pattern.strip_suffix('*') {
        Some(beginning) => name.starts_with(beginning),
        None => name == pattern || token.generate_names && name.starts_with(pattern.as_str()),
    };
    assert!(token.node_names.is_empty() || token.node_names.iter().any(fits), "{name}: {token:?}");
    let ranges: Vec<AddressRange> =
        token.address_ranges.iter().map(|range| range.parse().unwrap()).collect();
    for address in addresses {
        let address: NodeAddress = address.parse().unwrap();
        let in_range = ranges.iter().any(|range| range.contains(address));
        let own = ranges.is_empty() && source == Some(address);
        assert!(token.any_address || in_range || own, "{address}: {token:?}");
    }
    assert!(dns_names.iter().all(|name| token.dns_names.contains(name)), "{dns_names:?}");
}

/// The certificate holds these names and this key, and the extensions of a leaf: no other.
#[allow(clippy::wildcard_enum_match_arm, reason = "x509-parser's enums, not ours")]
fn check(
    certificate_der: &[u8],
    key: &PrivateKey,
    uri: &str,
    addresses: &BTreeSet<IpAddr>,
    dns_names: &BTreeSet<String>,
) {
    let (rest, certificate) = X509Certificate::from_der(certificate_der).unwrap();
    assert!(rest.is_empty());
    assert_eq!(key_hash(certificate.public_key().raw), key_hash(&key.spki_der()), "another key");
    assert_eq!(certificate.subject().iter().count(), 0, "a subject");
    let mut oids: Vec<_> = certificate.extensions().iter().map(|e| e.oid.to_id_string()).collect();
    oids.sort();
    assert_eq!(
        oids,
        ["2.5.29.14", "2.5.29.15", "2.5.29.17", "2.5.29.19", "2.5.29.35", "2.5.29.37"],
        "other extensions"
    );
    let (mut found_addresses, mut found_names) = (BTreeSet::new(), BTreeSet::new());
    for extension in certificate.extensions() {
        match extension.parsed_extension() {
            ParsedExtension::BasicConstraints(constraints) => assert!(!constraints.ca),
            ParsedExtension::KeyUsage(usage) => assert_eq!(usage.flags, 1, "digitalSignature"),
            ParsedExtension::SubjectAlternativeName(names) => {
                for name in &names.general_names {
                    match name {
                        GeneralName::URI(found) => assert_eq!(*found, uri),
                        GeneralName::IPAddress(bytes) => {
                            found_addresses.insert(address(bytes));
                        }
                        GeneralName::DNSName(name) => {
                            found_names.insert((*name).to_owned());
                        }
                        other => panic!("a name of another type: {other}"),
                    }
                }
            }
            _ => {}
        }
    }
    assert_eq!((&found_addresses, &found_names), (addresses, dns_names));
}

async fn unchanged(ca: &Deployment, before: &Held) {
    assert_eq!(ca.held().await, *before, "a refused request left something behind");
}

/// What a leaf holds of what is bound: what was asked for, or all.
fn subset(asked: &[String], bound: &[String]) -> Vec<String> {
    if asked.is_empty() { bound.to_vec() } else { asked.to_vec() }
}

fn canonical(text: &str) -> IpAddr {
    text.parse::<IpAddr>().unwrap().to_canonical()
}

fn address(bytes: &[u8]) -> IpAddr {
    match <[u8; 4]>::try_from(bytes) {
        Ok(v4) => v4.into(),
        Err(_) => <[u8; 16]>::try_from(bytes).unwrap().into(),
    }
}

fn csr(key: &PrivateKey, extra: Extra) -> Vec<u8> {
    let pair = rcgen::KeyPair::from_pem(&key.to_pem()).unwrap();
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    match extra {
        Extra::Nothing => {}
        Extra::Subject => params.distinguished_name.push(DnType::CommonName, "head"),
        Extra::Name => {
            params.subject_alt_names = vec![SanType::DnsName("evil.example".try_into().unwrap())];
        }
        Extra::Address => {
            params.subject_alt_names = vec![SanType::IpAddress([10, 9, 9, 9].into())];
        }
        Extra::Ca => params.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained),
        Extra::KeyUsage => params.key_usages = vec![KeyUsagePurpose::KeyCertSign],
    }
    params.serialize_request(&pair).unwrap().der().to_vec()
}

fn texts<const N: usize>(
    all: [&'static str; N],
    count: std::ops::RangeInclusive<usize>,
) -> impl Strategy<Value = Vec<String>> {
    subsequence(all.to_vec(), count)
        .prop_map(|texts| texts.into_iter().map(ToOwned::to_owned).collect())
}

/// Mostly few and good ones, so that a good part is granted.
fn drawn() -> impl Strategy<Value = Drawn> {
    let token = (
        texts(PATTERNS, 0..=2),
        texts(RANGES, 0..=3),
        texts(DNS, 0..=1),
        any::<(bool, bool)>(),
        1_u32..3,
    );
    let request = (
        select(NAMES.to_vec()),
        texts(ADDRESSES, 0..=2),
        prop_oneof![3 => Just(Vec::new()), 1 => texts(DNS, 0..=2)],
        prop_oneof![4 => select(ADDRESSES[..10].to_vec()), 1 => Just("127.0.0.1")],
    );
    let leaf = (
        prop_oneof![3 => Just(Vec::new()), 1 => texts(ADDRESSES, 1..=2)],
        prop_oneof![3 => Just(Vec::new()), 1 => texts(DNS, 1..=1)],
    );
    let extra = || {
        let all = [Extra::Subject, Extra::Name, Extra::Address, Extra::Ca, Extra::KeyUsage];
        prop_oneof![5 => Just(Extra::Nothing), 1 => select(all.to_vec())]
    };
    (token, request, leaf, (extra(), extra())).prop_map(|(token, request, leaf, extras)| {
        let (node_names, address_ranges, dns_names, (any_address, generate_names), uses) = token;
        let (name, addresses, asked_names, source) = request;
        Drawn {
            token: v1::CreateTokenRequest {
                cluster: "c1".to_owned(),
                role: v1::Role::Worker.into(),
                uses,
                node_names,
                generate_names,
                address_ranges,
                any_address,
                dns_names,
                ..v1::CreateTokenRequest::default()
            },
            request: v1::EnrollRequest {
                cluster: "c1".to_owned(),
                role: v1::Role::Worker.into(),
                node_name: name.to_owned(),
                addresses,
                dns_names: asked_names,
                ..v1::EnrollRequest::default()
            },
            leaf: v1::IssueLeafRequest {
                purpose: v1::LeafPurpose::Node.into(),
                addresses: leaf.0,
                dns_names: leaf.1,
                ..v1::IssueLeafRequest::default()
            },
            source: NodeAddress::new(source.parse().unwrap()).ok(),
            extras,
        }
    })
}
