//! Names and addresses as machines come, go and lie about them. A connection from 127.0.0.1 proves
//! nothing, so where the source matters the request is handed to the CA as the listener does it: with
//! the canonical address it came from. What binds, who waits and who takes over is decided by the
//! real CA on a real store, with a clock the test moves.

use std::{net::Ipv4Addr, time::Duration};

use ca_server::{
    enroll::enroll,
    issue::issue,
    leave::leave,
    store::{ABSENT_AFTER_MS, Caller, Store as _, StoreError, records::AuditKind},
    sync::sync,
};
use node_agent::keys::PrivateKey;
use raymtls_proto::{address::NodeAddress, leaf::LeafFacts, v1};
use raymtls_tests::{Deployment, ask, node_leaf};

const DAY: Duration = Duration::from_secs(86_400);
const MINUTE: Duration = Duration::from_secs(60);

/// A machine at an address of the network, with a key of its own.
struct Machine {
    address: &'static str,
    key: PrivateKey,
}

/// A machine that is in.
struct Inside {
    answer: v1::EnrollResponse,
    caller: Caller,
}

impl Machine {
    fn at(address: &'static str) -> Self {
        Self { address, key: PrivateKey::generate().unwrap() }
    }

    /// Enrols as a worker with no word of its addresses.
    async fn joins(&self, ca: &Deployment, token: &str, name: &str) -> Result<Inside, String> {
        self.claims(ca, token, name, &[]).await
    }

    async fn claims(
        &self,
        ca: &Deployment,
        token: &str,
        name: &str,
        addresses: &[&str],
    ) -> Result<Inside, String> {
        self.asks(ca, ask(token, "c1", name, addresses, &self.key)).await
    }

    async fn asks(&self, ca: &Deployment, request: v1::EnrollRequest) -> Result<Inside, String> {
        let source = source(self.address);
        let peer = source.map_or_else(|| Ipv4Addr::LOCALHOST.into(), NodeAddress::ip);
        let answer = enroll(&ca.ca, request, peer).await.map_err(word)?;
        let leaf_der = &answer.identity.as_ref().unwrap().leaf_der;
        let caller = Caller {
            cluster: "c1".parse().unwrap(),
            node: answer.node_name.parse().unwrap(),
            serial: LeafFacts::parse(leaf_der).unwrap().serial,
            source,
        };
        Ok(Inside { answer, caller })
    }
}

impl Inside {
    async fn leaf(&self, ca: &Deployment) -> Result<LeafFacts, String> {
        let request = node_leaf(&PrivateKey::generate().unwrap());
        let answer = issue(&ca.ca, self.caller.clone(), request).await.map_err(word)?;
        Ok(LeafFacts::parse(&answer.leaf.unwrap().leaf_der).unwrap())
    }

    /// The agent's sign of life.
    async fn syncs(&self, ca: &Deployment) -> Result<(), String> {
        self.syncs_from(ca, self.caller.source).await
    }

    async fn syncs_from(&self, ca: &Deployment, from: Option<NodeAddress>) -> Result<(), String> {
        let caller = Caller { source: from, ..self.caller.clone() };
        sync(&ca.ca, caller, v1::SyncRequest::default()).await.map(drop).map_err(word)
    }
}

/// The word of a refusal and its text.
fn word(error: StoreError) -> String {
    let refusal = error.refusal();
    format!("{}: {refusal}", refusal.reason().as_str())
}

/// As the listener takes it from a connection.
fn source(address: &str) -> Option<NodeAddress> {
    NodeAddress::new(address.parse().unwrap()).ok()
}

async fn refused(answer: Result<Inside, String>, starts: &str, says: &str) {
    let Err(text) = answer else { panic!("let in, where {starts} was due") };
    assert!(text.starts_with(starts) && text.contains(says), "{text}");
}

async fn one_cluster() -> Deployment {
    let deployment = Deployment::start().await;
    deployment.cluster("c1", DAY).await;
    deployment
}

fn request(change: impl FnOnce(&mut v1::CreateTokenRequest)) -> v1::CreateTokenRequest {
    let mut request = v1::CreateTokenRequest {
        cluster: "c1".to_owned(),
        role: v1::Role::Worker.into(),
        uses: 1,
        ..v1::CreateTokenRequest::default()
    };
    change(&mut request);
    request
}

/// A token that allows nothing but the source address.
async fn token(ca: &Deployment) -> String {
    ca.token_with(request(|_| {})).await
}

fn absent() -> Duration {
    Duration::from_millis(ABSENT_AFTER_MS.unsigned_abs())
}

async fn bound(ca: &Deployment, name: &str) -> Vec<(String, bool)> {
    let node = ca.node("c1", name).await;
    node.addresses.into_iter().map(|a| (a.address, a.proved)).collect()
}

#[tokio::test]
async fn the_source_address_is_what_a_node_is_known_by() {
    let ca = one_cluster().await;
    // What the socket says, and what is bound: one form, whatever family the listener speaks.
    for (name, from, known_by) in [
        ("v4", "10.0.0.1", "10.0.0.1"),
        ("mapped", "::ffff:10.0.0.2", "10.0.0.2"),
        ("v6", "FD00:0::A", "fd00::a"),
    ] {
        let token = token(&ca).await;
        let node = Machine::at(from).joins(&ca, &token, name).await.unwrap();
        assert_eq!(node.answer.addresses, [known_by]);
        assert_eq!(bound(&ca, name).await, [(known_by.to_owned(), true)], "proved by the call");
        let facts = node.leaf(&ca).await.unwrap();
        let wanted: std::net::IpAddr = known_by.parse().unwrap();
        assert!(facts.addresses.contains(&wanted), "{:?}", facts.addresses);
    }
    // The same machine by its other spelling is the same address.
    let token = token(&ca).await;
    let other = Machine::at("10.0.0.2").joins(&ca, &token, "other").await;
    refused(other, "ADDRESS_TAKEN", "mapped").await;
    ca.finish().await;
}

#[tokio::test]
async fn a_ca_on_the_heads_host_sees_loopback_and_wants_the_address_named() {
    let ca = one_cluster().await;
    let head = Machine::at("127.0.0.1");
    let plain = token(&ca).await;
    refused(head.joins(&ca, &plain, "head").await, "ADDRESS_NOT_ALLOWED", "--address").await;
    // Naming it is not enough: a token that says so is.
    refused(
        head.claims(&ca, &plain, "head", &["10.0.0.1"]).await,
        "ADDRESS_NOT_ALLOWED",
        "--addresses",
    )
    .await;
    let ranged = ca.token_with(request(|t| t.address_ranges = vec!["10.0.0.1".into()])).await;
    let node = head.claims(&ca, &ranged, "head", &["10.0.0.1"]).await.unwrap();
    assert_eq!(bound(&ca, "head").await, [("10.0.0.1".to_owned(), false)], "claimed, not proved");
    // A call over the network proves it.
    node.syncs_from(&ca, source("10.0.0.1")).await.unwrap();
    assert_eq!(bound(&ca, "head").await, [("10.0.0.1".to_owned(), true)]);
    ca.finish().await;
}

#[tokio::test]
async fn nodes_behind_one_nat_want_addresses_of_their_own() {
    let ca = one_cluster().await;
    let gateway = "192.0.2.1";
    let first = token(&ca).await;
    Machine::at(gateway).joins(&ca, &first, "w1").await.unwrap();
    // The gateway's address is one node's; the second is told what to do instead.
    let second = token(&ca).await;
    refused(Machine::at(gateway).joins(&ca, &second, "w2").await, "ADDRESS_TAKEN", "w1").await;

    // A token that allows the addresses behind the gateway, and shared ones, lets all in.
    let nat = request(|t| {
        t.address_ranges = vec!["10.0.0.0/24".into(), gateway.into()];
        t.uses = 3;
        t.shared_address = true;
    });
    let ca2 = one_cluster().await;
    let nat = ca2.token_with(nat).await;
    for address in ["10.0.0.1", "10.0.0.2", "10.0.0.3"] {
        let machine = Machine::at(gateway);
        let asks = v1::EnrollRequest {
            shared_address: true,
            ..ask(&nat, "c1", "w", &[address], &machine.key)
        };
        let node = machine.asks(&ca2, asks).await.unwrap();
        assert_eq!(node.answer.addresses, [gateway, address]);
        node.leaf(&ca2).await.unwrap();
    }
    ca.finish().await;
    ca2.finish().await;
}

#[tokio::test]
async fn a_machine_with_several_nics_is_certified_for_all_its_token_allows() {
    let ca = one_cluster().await;
    let ranges = request(|t| t.address_ranges = vec!["10.0.0.0/16".into(), "fd00::/8".into()]);
    let token = ca.token_with(ranges).await;
    let machine = Machine::at("10.0.0.1");
    let outside = machine.claims(&ca, &token, "w1", &["10.0.1.1", "172.16.0.1"]).await;
    refused(outside, "ADDRESS_NOT_ALLOWED", "172.16.0.1").await;
    let all = ["10.0.1.1", "fd00::1", "::ffff:10.0.0.1", "10.0.1.1"];
    let node = machine.claims(&ca, &token, "w1", &all).await.unwrap();
    // Each once, the proved one first.
    assert_eq!(node.answer.addresses, ["10.0.0.1", "10.0.1.1", "fd00::1"]);
    node.syncs_from(&ca, source("fd00::1")).await.unwrap();
    let proved: Vec<bool> = bound(&ca, "w1").await.into_iter().map(|(_, proved)| proved).collect();
    assert_eq!(proved, [true, false, true]);
    let facts = node.leaf(&ca).await.unwrap();
    assert_eq!(facts.addresses.len(), 5, "three of its own and two of loopback");
    ca.finish().await;
}

#[tokio::test]
async fn a_reimaged_machine_comes_back_with_the_join_file_that_replaces_it() {
    let ca = one_cluster().await;
    let first = token(&ca).await;
    let before = Machine::at("10.0.0.1").joins(&ca, &first, "w1").await.unwrap();
    // The disk is new, so is the key; the old node was heard of a minute ago.
    ca.clock.advance(MINUTE);
    let disk = Machine::at("10.0.0.1");
    let held = ca.held().await;
    let plain = token(&ca).await;
    refused(disk.joins(&ca, &plain, "w1").await, "NODE_NAME_TAKEN", "--replace").await;
    let replace = |name: &str| {
        let name = name.to_owned();
        request(|t| (t.replace, t.node_names) = (true, vec![name]))
    };
    let other = ca.token_with(replace("w2")).await;
    refused(disk.joins(&ca, &other, "w1").await, "TOKEN_NODE_MISMATCH", "w1").await;
    assert_eq!(ca.held().await.certificates, held.certificates);

    let exact = ca.token_with(replace("w1")).await;
    let after = disk.joins(&ca, &exact, "w1").await.unwrap();
    assert_eq!(after.answer.node_name, "w1");
    after.leaf(&ca).await.unwrap();
    // Who had the name before is a stranger, and pages nobody.
    assert!(before.syncs(&ca).await.unwrap_err().starts_with("IDENTITY_UNKNOWN"));
    let reused = AuditKind::IdentityReused;
    assert!(ca.audit_log().await.iter().all(|record| record.kind() != reused));
    // One use: a second machine does not replace it again.
    refused(Machine::at("10.0.0.1").joins(&ca, &exact, "w1").await, "TOKEN_SPENT", "").await;
    ca.finish().await;
}

#[tokio::test]
async fn an_autoscaler_that_reuses_an_address_within_a_minute_is_let_in() {
    let ca = one_cluster().await;
    let group = ca.token_with(request(|t| t.uses = 100)).await;
    let mut names = std::collections::BTreeSet::new();
    // Scaled down with a word to the CA: the address is free at once.
    for _ in 0..5 {
        let node = Machine::at("10.0.0.1").joins(&ca, &group, "gpu").await.unwrap();
        assert!(names.insert(node.answer.node_name.clone()), "a name came twice");
        node.leaf(&ca).await.unwrap();
        leave(&ca.ca, node.caller.clone()).await.unwrap();
        ca.clock.advance(Duration::from_secs(10));
    }
    // Cut off without a word: told who holds it and for how long, and let in when that is over.
    let gone = Machine::at("10.0.0.1").joins(&ca, &group, "gpu").await.unwrap();
    ca.clock.advance(MINUTE);
    let next = Machine::at("10.0.0.1");
    let early = next.joins(&ca, &group, "gpu").await;
    refused(early, "ADDRESS_TAKEN", &gone.answer.node_name).await;
    ca.clock.advance(absent() - MINUTE);
    next.joins(&ca, &group, "gpu").await.unwrap();
    // Or an operator who knows better forgets it.
    let cut = Machine::at("10.0.0.2").joins(&ca, &group, "gpu").await.unwrap();
    let forget =
        v1::ForgetNodeRequest { cluster: "c1".to_owned(), name: cut.answer.node_name.clone() };
    ca_server::admin::nodes::forget(&ca.ca, &ca.operator, forget).await.unwrap();
    Machine::at("10.0.0.2").joins(&ca, &group, "gpu").await.unwrap();
    ca.finish().await;
}

#[tokio::test]
async fn a_diskless_slurm_node_is_back_under_its_name_after_each_job() {
    let ca = one_cluster().await;
    // The prolog holds one token for the partition; each boot has a new key and the old name.
    let mut partition = request(|t| {
        t.uses = 100;
        t.node_names = vec!["node*".into()];
        t.address_ranges = vec!["10.0.0.0/24".into()];
    });
    partition.generate_names = false;
    let token = ca.token_with(partition).await;
    for _ in 0..3 {
        let node = Machine::at("10.0.0.7").joins(&ca, &token, "node7").await.unwrap();
        assert_eq!(node.answer.node_name, "node7");
        node.leaf(&ca).await.unwrap();
        // The epilog says so.
        leave(&ca.ca, node.caller.clone()).await.unwrap();
        ca.clock.advance(MINUTE);
    }
    // After a crash there was no epilog: it waits until the node counts as absent.
    Machine::at("10.0.0.7").joins(&ca, &token, "node7").await.unwrap();
    ca.clock.advance(absent() - Duration::from_millis(1));
    let early = Machine::at("10.0.0.7").joins(&ca, &token, "node7").await;
    refused(early, "NODE_NAME_TAKEN", "node7").await;
    ca.clock.advance(Duration::from_millis(1));
    Machine::at("10.0.0.7").joins(&ca, &token, "node7").await.unwrap();
    ca.finish().await;
}

#[tokio::test]
async fn a_bad_node_that_claims_the_heads_address_gets_nothing() {
    let ca = one_cluster().await;
    let wide = |t: &mut v1::CreateTokenRequest| t.address_ranges = vec!["10.0.0.0/24".into()];
    let heads = ca
        .token_with(request(|t| {
            wide(t);
            t.role = v1::Role::Head.into();
        }))
        .await;
    let machine = Machine::at("10.0.0.1");
    let head = v1::EnrollRequest {
        role: v1::Role::Head.into(),
        ..ask(&heads, "c1", "head", &[], &machine.key)
    };
    let head = machine.asks(&ca, head).await.unwrap();
    let token = ca.token_with(request(wide)).await;
    let bad = Machine::at("10.0.0.66");
    let held = ca.held().await;
    // At enrolment, by any spelling, or under the head's own name.
    for claim in ["10.0.0.1", "::ffff:10.0.0.1"] {
        refused(bad.claims(&ca, &token, "w1", &[claim]).await, "ADDRESS_TAKEN", "head").await;
    }
    refused(bad.joins(&ca, &token, "head").await, "NODE_NAME_TAKEN", "head").await;
    assert_eq!(ca.held().await, held, "an attempt left something behind");
    // Once in, a leaf for it is not to be had either.
    let inside = bad.joins(&ca, &token, "w1").await.unwrap();
    let claim = v1::IssueLeafRequest {
        addresses: vec!["10.0.0.1".to_owned()],
        ..node_leaf(&PrivateKey::generate().unwrap())
    };
    let answer = issue(&ca.ca, inside.caller.clone(), claim).await.map_err(word);
    assert!(answer.unwrap_err().starts_with("ADDRESS_NOT_ALLOWED"));
    // Nor by calling from there: a call proves what is bound, and binds nothing.
    inside.syncs_from(&ca, source("10.0.0.1")).await.unwrap();
    assert_eq!(bound(&ca, "w1").await, [("10.0.0.66".to_owned(), true)]);
    head.leaf(&ca).await.unwrap();

    // While the head is absent its address can be bound by whoever may have it, but what the head
    // proved and took back is the head's again only when it is free.
    ca.clock.advance(absent());
    let token = ca.token_with(request(wide)).await;
    let squatter = Machine::at("10.0.0.67").claims(&ca, &token, "w2", &["10.0.0.1"]).await.unwrap();
    assert!(head.leaf(&ca).await.unwrap_err().starts_with("ADDRESS_TAKEN"));
    ca.revoke("c1", &squatter.answer.node_name).await;
    head.syncs(&ca).await.unwrap();
    head.leaf(&ca).await.unwrap();
    ca.finish().await;
}

#[tokio::test]
async fn a_machine_at_an_address_beats_one_that_only_claims_it() {
    let ca = one_cluster().await;
    let wide = |t: &mut v1::CreateTokenRequest| t.address_ranges = vec!["10.0.0.0/24".into()];
    // Before the head is there, a node claims where it will be.
    let token = ca.token_with(request(wide)).await;
    let early = Machine::at("10.0.0.66");
    let early = early.claims(&ca, &token, "early", &["10.0.0.1", "10.0.0.2"]).await.unwrap();
    // Another claim does not beat it.
    let token = ca.token_with(request(wide)).await;
    let other = Machine::at("10.0.0.67").claims(&ca, &token, "other", &["10.0.0.1"]).await;
    refused(other, "ADDRESS_TAKEN", "early").await;
    // The machine itself does, and has it from then on.
    let head = Machine::at("10.0.0.1").joins(&ca, &token, "head").await.unwrap();
    head.leaf(&ca).await.unwrap();
    assert!(early.leaf(&ca).await.unwrap_err().starts_with("ADDRESS_TAKEN"));
    let log = ca.store.audit(0, 1_000).await.unwrap();
    let lost: Vec<_> = log.iter().filter(|r| r.kind() == AuditKind::AddressLost).collect();
    assert_eq!(lost.len(), 1, "who lost what to whom is on record once");
    assert_eq!((lost[0].node.as_str(), lost[0].detail.contains("10.0.0.1")), ("early", true));
    // What a node has proved is beaten by nobody.
    early.syncs_from(&ca, source("10.0.0.2")).await.unwrap();
    let token = ca.token_with(request(wide)).await;
    refused(Machine::at("10.0.0.2").joins(&ca, &token, "late").await, "ADDRESS_TAKEN", "early")
        .await;
    ca.finish().await;
}

#[tokio::test]
async fn a_token_made_before_a_revocation_never_certifies_what_it_blocks() {
    let ca = one_cluster().await;
    let old = ca.token_with(request(|t| t.uses = 10)).await;
    let kept = token(&ca).await;
    let node = Machine::at("10.0.0.1").joins(&ca, &old, "w").await.unwrap();
    ca.clock.advance(Duration::from_millis(1));
    ca.revoke("c1", &node.answer.node_name).await;
    let held = ca.held().await;
    let thief = Machine::at("10.0.0.1");
    // Its own token is void, and an older one of another node does not help.
    refused(thief.joins(&ca, &old, "w").await, "TOKEN_REVOKED", "token create").await;
    refused(thief.joins(&ca, &kept, "fresh").await, "ADDRESS_BLOCKED", "made from now on").await;
    assert_eq!(ca.held().await, held);
    // The refused one is still good elsewhere.
    Machine::at("10.0.0.2").joins(&ca, &kept, "fresh").await.unwrap();
    ca.clock.advance(Duration::from_millis(1));
    let new = token(&ca).await;
    Machine::at("10.0.0.1").joins(&ca, &new, "next").await.unwrap();
    ca.finish().await;
}

#[tokio::test]
async fn generated_names_are_told_apart_by_their_keys() {
    let ca = one_cluster().await;
    let group = ca.token_with(request(|t| t.uses = 3)).await;
    let long = "a".repeat(63);
    let (first, second) = (Machine::at("10.0.0.1"), Machine::at("10.0.0.2"));
    let one = first.joins(&ca, &group, &long).await.unwrap().answer.node_name;
    let two = second.joins(&ca, &group, &long).await.unwrap().answer.node_name;
    assert_ne!(one, two);
    assert_eq!((one.len(), two.len()), (63, 63));
    // The same machine asking again is the same node.
    assert_eq!(first.joins(&ca, &group, &long).await.unwrap().answer.node_name, one);
    assert_eq!(ca.held().await.nodes, 2);
    ca.finish().await;
}
