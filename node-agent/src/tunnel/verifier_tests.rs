//! Who is taken for whom, by table; the chains themselves are judged in the tests of the program.

use super::*;
use crate::tunnel::{
    reason::Reason,
    rules::tests::{member, sample},
};

fn facts(uris: &[&str]) -> LeafFacts {
    LeafFacts {
        serial: Serial::from_slice(&[1, 2]).unwrap(),
        not_before: time::OffsetDateTime::UNIX_EPOCH,
        not_after: time::OffsetDateTime::UNIX_EPOCH,
        spki_der: Vec::new(),
        issuer_der: Vec::new(),
        subject_der: Vec::new(),
        addresses: Vec::new(),
        dns_names: Vec::new(),
        uris: uris.iter().map(|uri| (*uri).to_owned()).collect(),
        other_names: 0,
        server_auth: true,
        client_auth: true,
        other_eku: false,
        is_ca: false,
        key_usage: None,
        path_len: None,
        authority_key_id: None,
        extensions: Vec::new(),
    }
}

#[test]
fn a_leaf_names_one_node_of_this_cluster() {
    let rules = sample();
    let node = "spiffe://ray.example/cluster/c1/node/w1";
    assert_eq!(node_named(&facts(&[node]), &rules).unwrap().as_str(), "w1");
    for (uris, reason) in [
        (&["spiffe://ray.example/cluster/c2/node/w1"][..], Reason::WrongCluster),
        (&["spiffe://ray.example/cluster/c2/driver/w1"], Reason::WrongCluster),
        (&["spiffe://ray.example/cluster/c1/driver/w1"], Reason::WrongName),
        (&["spiffe://ray.example/cluster/c1/agent/w1"], Reason::WrongName),
        (&["spiffe://ray.example/admin/w1"], Reason::WrongName),
        (&["spiffe://other.example/cluster/c1/node/w1"], Reason::WrongName),
        (&[node, node], Reason::WrongName),
        (&[], Reason::WrongName),
    ] {
        assert_eq!(node_named(&facts(uris), &rules).unwrap_err().reason, reason, "{uris:?}");
    }
}

#[test]
fn a_leaf_counts_at_its_members_addresses_and_nowhere_else() {
    let members = [
        member("w1", &["192.0.2.2", "192.0.2.3"]),
        member("w2", &["192.0.2.4", "192.0.2.9"]),
        member("w3", &["192.0.2.9"]),
    ];
    let (book, revoked) = (AddressBook::of(&members), Revoked::default());
    let leaf = |name: &str| PeerLeaf {
        name: name.parse().unwrap(),
        serial: Serial::from_slice(&[1, 2]).unwrap(),
        issuer_der: Vec::new(),
        not_after_unix: 0,
    };
    for (name, address, is_blocked, reason) in [
        ("w1", "192.0.2.2", false, None),
        ("w1", "192.0.2.3", false, None),
        ("w1", "192.0.2.4", false, Some(Reason::AddressMismatch)),
        ("w1", "192.0.2.5", false, Some(Reason::NotAMember)),
        ("w1", "127.0.0.1", false, Some(Reason::NotAMember)),
        ("w1", "192.0.2.2", true, Some(Reason::Blocked)),
        ("w2", "192.0.2.9", false, Some(Reason::NotAMember)),
        ("gone", "192.0.2.2", false, Some(Reason::AddressMismatch)),
    ] {
        let judge = Judge { book: &book, is_blocked, revoked: &revoked };
        let judged = judge.leaf(&leaf(name), address.parse().unwrap());
        assert_eq!(judged.err().map(|r| r.reason), reason, "{name} at {address}");
    }
}
