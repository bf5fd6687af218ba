//! Whatever comes in whatever order: no block ever covers an address of a node that is a member.

use proptest::{
    prelude::*,
    test_runner::{Config, RngAlgorithm, TestRng, TestRunner},
};
use raymtls_proto::{identity::Role, v1};
use time::OffsetDateTime;

use super::{
    InMemory, MemoryEngine,
    fixture::{Ca, MINUTE_MS, SECRET, START_MS, at, c1, name},
};
use crate::store::{
    Caller, EnrollAsk, Enrolled, LeafAsk, LeafKind, Revoking, records::MemberRecord,
};

/// Drawn in each run; ten times as many in the long one.
const CASES: u32 = 200;
const STEPS: usize = 40;
const NODES: usize = 4;
const ADDRESSES: u8 = 3;

#[derive(Clone, Debug)]
enum Step {
    Enrol { node: usize, source: u8, claims: Option<u8>, role: Role, shared: bool, old: bool },
    Call { node: usize, source: u8 },
    Leaf { node: usize },
    Leave { node: usize },
    Revoke { node: usize },
    Reinstate { node: usize },
    Forget { node: usize },
    Pass { minutes: i64 },
    Lapse,
}

fn step() -> impl Strategy<Value = Step> {
    let (node, source) = (0..NODES, 0..ADDRESSES);
    let role = prop_oneof![3 => Just(Role::Worker), 1 => Just(Role::Driver)];
    let enrol = (
        node.clone(),
        source.clone(),
        proptest::option::of(source.clone()),
        role,
        any::<bool>(),
        any::<bool>(),
    );
    prop_oneof![
        6 => enrol.prop_map(|(node, source, claims, role, shared, old)| {
            Step::Enrol { node, source, claims, role, shared, old }
        }),
        3 => (node.clone(), source).prop_map(|(node, source)| Step::Call { node, source }),
        3 => node.clone().prop_map(|node| Step::Leaf { node }),
        1 => node.clone().prop_map(|node| Step::Leave { node }),
        4 => node.clone().prop_map(|node| Step::Revoke { node }),
        3 => node.clone().prop_map(|node| Step::Reinstate { node }),
        1 => node.prop_map(|node| Step::Forget { node }),
        3 => prop_oneof![Just(1), Just(20), Just(600)].prop_map(|minutes| Step::Pass { minutes }),
        1 => Just(Step::Lapse),
    ]
}

struct World {
    ca: Ca,
    now_ms: i64,
    drawn: u8,
    enrolled: Vec<Option<Enrolled>>,
    blocks_seen: u32,
    /// Who got a leaf in the last step, and an address it called from.
    certified: Option<(String, String)>,
}

impl World {
    async fn new() -> Self {
        let ca = Ca::new(&InMemory(MemoryEngine::new())).await;
        Self {
            ca,
            now_ms: 0,
            drawn: 0,
            enrolled: vec![None; NODES],
            blocks_seen: 0,
            certified: None,
        }
    }

    /// What is refused changes nothing, and is as good a step as any.
    async fn take(&mut self, step: &Step) {
        self.now_ms += 1;
        let ms = self.now_ms;
        match *step {
            Step::Enrol { node, source, claims, role, shared, old } => {
                self.drawn = self.drawn.wrapping_add(1);
                let token = self
                    .ca
                    .token_with(|token| {
                        token.role = role.to_proto().into();
                        token.shared_address = true;
                        token.created_ms = if old { START_MS } else { START_MS + ms };
                        token.expires_ms = i64::MAX;
                    })
                    .await;
                let ask = EnrollAsk {
                    token,
                    secret_hash: SECRET,
                    cluster: c1(),
                    role,
                    name: name(&format!("n-{node}")),
                    key_hash: [self.drawn; 32],
                    source: Some(address(source)),
                    addresses: claims.map(address).into_iter().collect(),
                    dns_names: vec![],
                    shared_address: shared,
                    once: false,
                    vouched: None,
                };
                if let Ok(enrolled) = self.ca.enroll(ms, ask).await {
                    self.enrolled[node] = Some(enrolled);
                }
            }
            Step::Call { node, source } => {
                if let Some(caller) = self.caller(node) {
                    let from = Caller { source: Some(address(source)), ..caller };
                    let _ = self.ca.identify(ms, &from).await;
                }
            }
            Step::Leaf { node } => {
                if let Some(caller) = self.caller(node) {
                    self.drawn = self.drawn.wrapping_add(1);
                    let ask = LeafAsk {
                        kind: LeafKind::Driver,
                        addresses: vec![],
                        dns_names: vec![],
                        key_hash: [self.drawn; 32],
                    };
                    let source = caller.source.map(|source| source.to_string());
                    if self.ca.leaf(ms, &caller, ask).await.is_ok() {
                        self.certified = source.map(|source| (format!("n-{node}"), source));
                    }
                }
            }
            Step::Leave { node } => {
                if let Some(caller) = self.caller(node) {
                    let _ = self.ca.leave(ms, &caller).await;
                }
            }
            Step::Revoke { node } => {
                let revoking = Revoking { reason: "x".to_owned(), ..Revoking::default() };
                let (actor, node) = ("uid:0".to_owned(), name(&format!("n-{node}")));
                let _ = self.ca.store.revoke_node(at(ms), actor, c1(), node, revoking).await;
            }
            Step::Reinstate { node } => {
                let (actor, node) = ("uid:0".to_owned(), name(&format!("n-{node}")));
                let _ = self.ca.store.reinstate_node(at(ms), actor, c1(), node).await;
            }
            Step::Forget { node } => drop(self.ca.forget(ms, &format!("n-{node}")).await),
            Step::Pass { minutes } => self.now_ms += minutes * MINUTE_MS,
            Step::Lapse => drop(self.ca.store.lapse_members(at(ms), c1(), at(0)).await),
        }
    }

    fn caller(&self, node: usize) -> Option<Caller> {
        self.enrolled[node].as_ref().map(Enrolled::caller)
    }

    async fn check(&mut self) -> Result<(), String> {
        let now: OffsetDateTime = at(self.now_ms);
        let blocks = self.ca.store.blocks(now, c1()).await.unwrap();
        let told = self.ca.store.members(c1(), 0, 1_000).await.unwrap().entries;
        for (blocked, block) in blocks {
            self.blocks_seen += 1;
            let has = |entry: &&MemberRecord| {
                entry.state() == v1::MemberState::Member && entry.addresses.contains(&blocked)
            };
            if let Some(innocent) = told.iter().find(has) {
                return Err(format!(
                    "{blocked} of {} is cut off, for {}",
                    innocent.name, block.node
                ));
            }
        }
        if let Some((name, address)) = self.certified.take() {
            let counts =
                |entry: &MemberRecord| entry.name == name && entry.addresses.contains(&address);
            if !told.iter().any(counts) {
                return Err(format!(
                    "{name} has a new leaf for {address} and does not count there"
                ));
            }
        }
        Ok(())
    }
}

fn address(number: u8) -> raymtls_proto::address::NodeAddress {
    format!("10.0.0.{}", number + 1).parse().unwrap()
}

#[test]
fn no_block_ever_covers_a_member() {
    draw(CASES);
}

#[test]
#[ignore = "a minute: run by scripts/test.sh --full"]
fn no_block_ever_covers_a_member_at_length() {
    draw(10 * CASES);
}

fn draw(cases: u32) {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let config = Config { cases, failure_persistence: None, ..Config::default() };
    // The same cases in each run: what fails here fails for whoever looks.
    let mut runner =
        TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha));
    let seen = std::cell::Cell::new(0_u32);
    runner
        .run(&proptest::collection::vec(step(), STEPS), |steps| {
            runtime.block_on(async {
                let mut world = World::new().await;
                for step in &steps {
                    world.take(step).await;
                    world.check().await.map_err(TestCaseError::fail)?;
                }
                seen.set(seen.get() + world.blocks_seen);
                Ok(())
            })
        })
        .unwrap();
    assert!(seen.get() > cases, "only {} blocks were ever looked at", seen.get());
}
