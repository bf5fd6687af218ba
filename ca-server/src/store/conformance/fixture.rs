//! A CA with one cluster, and short words for what the claims do with it.

use std::{
    fmt::Debug,
    sync::atomic::{AtomicU64, Ordering},
};

use raymtls_proto::{
    identity::{ClusterId, NodeName, Role},
    serial::Serial,
    token::TokenId,
    v1,
};
use time::OffsetDateTime;

use super::Place;
use crate::{
    refusal::Refusal,
    store::{
        Authority, Caller, EnrollAsk, EnrollPlan, Enrolled, LeafAsk, LeafKind, NodeRevoked,
        RenewPlan, Revoking, Signed, Store, StoreError,
        records::{
            AuditKind, AuditRecord, CaKey, CertificateRecord, ClusterRecord, ControlRecord,
            NodeRecord, TokenRecord,
        },
    },
};

/// When the tests begin; they count milliseconds from here.
pub(super) const START_MS: i64 = 1_764_000_000_000;
pub(super) const EPOCH: u64 = 42;
pub(super) const MINUTE_MS: i64 = 60 * 1_000;
pub(super) const HOUR_MS: i64 = 60 * MINUTE_MS;
pub(super) const LEAF_LIFE_MS: i64 = 6 * HOUR_MS;
pub(super) const IDENTITY_LIFE_MS: i64 = 30 * 24 * HOUR_MS;
pub(super) const LEASE_MS: i64 = 24 * HOUR_MS;
pub(super) const SECRET: [u8; 32] = [7; 32];

pub(super) struct Ca {
    pub(super) store: Box<dyn Store>,
    drawn: AtomicU64,
}

impl Ca {
    /// With the control authority and cluster `c1`.
    pub(super) async fn new(place: &dyn Place) -> Self {
        let ca = Self { store: place.create(at(0), EPOCH), drawn: AtomicU64::new(1) };
        ca.store.initialize(at(0), control()).await.unwrap();
        ca.create("c1").await;
        ca
    }

    /// The same store after the server was stopped and started.
    pub(super) async fn restart(self, place: &dyn Place, ms: i64) -> Self {
        self.store.close().await;
        let Self { store, drawn } = self;
        drop(store);
        Self { store: place.open(at(ms)), drawn }
    }

    pub(super) async fn create(&self, name: &str) -> ClusterRecord {
        self.store.create_cluster(at(0), "uid:0".to_owned(), cluster(name)).await.unwrap()
    }

    pub(super) async fn cluster(&self) -> ClusterRecord {
        self.store.cluster(c1()).await.unwrap()
    }

    pub(super) async fn version(&self) -> u64 {
        self.cluster().await.version
    }

    /// A worker token for any address, 100 uses and a day, made at the start.
    pub(super) async fn token(&self) -> TokenId {
        self.token_with(|_| {}).await
    }

    pub(super) async fn token_with(&self, change: impl FnOnce(&mut TokenRecord)) -> TokenId {
        let id = TokenId::new(self.draw().to_be_bytes());
        let mut token = TokenRecord {
            id: id.to_string(),
            cluster: "c1".to_owned(),
            role: v1::Role::Worker.into(),
            secret_hash: SECRET.to_vec(),
            created_ms: START_MS,
            expires_ms: START_MS + 24 * HOUR_MS,
            uses: 100,
            any_address: true,
            created_by: "uid:0".to_owned(),
            ..TokenRecord::default()
        };
        change(&mut token);
        let made =
            OffsetDateTime::from_unix_timestamp_nanos(i128::from(token.created_ms) * 1_000_000);
        self.store.create_token(made.unwrap(), token).await.unwrap();
        id
    }

    pub(super) async fn token_record(&self, id: &TokenId) -> TokenRecord {
        let page = self.store.tokens(c1(), String::new()).await.unwrap();
        page.rows.into_iter().find(|token| token.id == id.as_str()).unwrap()
    }

    /// As a request handler does it: plan, sign, commit.
    pub(super) async fn enroll(&self, ms: i64, ask: EnrollAsk) -> Result<Enrolled, StoreError> {
        match self.store.plan_enroll(at(ms), ask.clone()).await? {
            EnrollPlan::Replay(enrolled) => Ok(*enrolled),
            EnrollPlan::Issue(binding) => {
                let identity = self.sign(ms, ask.key_hash, IDENTITY_LIFE_MS);
                self.store.enroll(at(ms), ask, binding, identity).await
            }
        }
    }

    /// A node of its own token, its name, address and key by number.
    pub(super) async fn node(&self, ms: i64, number: u8) -> Enrolled {
        let token = self.token_with(|token| token.created_ms = START_MS + ms).await;
        self.enroll(ms, ask(&token, number)).await.unwrap()
    }

    pub(super) fn sign(&self, ms: i64, key_hash: [u8; 32], life_ms: i64) -> Signed {
        let drawn = self.draw();
        let mut random = [0; 10];
        random[2..].copy_from_slice(&drawn.to_be_bytes());
        let issued_ms = START_MS + ms;
        Signed {
            serial: Serial::new(issued_ms.unsigned_abs(), random),
            certificate_der: format!("certificate {drawn}").into_bytes(),
            issued_ms,
            not_after_ms: issued_ms + life_ms,
            issuer_key_id: b"issuer".to_vec(),
            key_hash,
        }
    }

    pub(super) async fn identify(
        &self,
        ms: i64,
        caller: &Caller,
    ) -> Result<NodeRecord, StoreError> {
        self.store.identify(at(ms), caller.clone()).await
    }

    pub(super) async fn renew(
        &self,
        ms: i64,
        caller: &Caller,
        key_hash: [u8; 32],
    ) -> Result<CertificateRecord, StoreError> {
        match self.store.plan_renew(at(ms), caller.clone(), key_hash).await? {
            RenewPlan::Replay(record) => Ok(*record),
            RenewPlan::Issue => {
                let identity = self.sign(ms, key_hash, IDENTITY_LIFE_MS);
                self.store.renew(at(ms), caller.clone(), identity).await
            }
        }
    }

    pub(super) async fn leaf(
        &self,
        ms: i64,
        caller: &Caller,
        ask: LeafAsk,
    ) -> Result<Signed, StoreError> {
        let plan = self.store.plan_leaf(at(ms), caller.clone(), ask.clone()).await?;
        let leaf = self.sign(ms, ask.key_hash, plan.life_ms);
        self.store.record_leaf(at(ms), caller.clone(), ask, plan, leaf.clone()).await?;
        Ok(leaf)
    }

    pub(super) async fn leave(&self, ms: i64, caller: &Caller) -> Result<(), StoreError> {
        self.store.leave(at(ms), caller.clone()).await
    }

    pub(super) async fn revoke(&self, ms: i64, node: &str) -> NodeRevoked {
        self.revoke_keeping(ms, node, false).await
    }

    pub(super) async fn revoke_keeping(&self, ms: i64, node: &str, keep: bool) -> NodeRevoked {
        let (actor, reason) = ("uid:0".to_owned(), "stolen".to_owned());
        let revoking = Revoking { reason, keep_token: keep, ..Revoking::default() };
        self.store.revoke_node(at(ms), actor, c1(), name(node), revoking).await.unwrap()
    }

    pub(super) async fn forget(&self, ms: i64, node: &str) -> Result<(), StoreError> {
        self.store.forget_node(at(ms), "uid:0".to_owned(), c1(), name(node)).await
    }

    pub(super) async fn record(&self, node: &str) -> NodeRecord {
        self.store.node(c1(), name(node)).await.unwrap()
    }

    pub(super) async fn revoked_serials(&self, ms: i64, authority: Authority) -> Vec<Vec<u8>> {
        let revocations = self.store.revocations(at(ms), authority).await.unwrap();
        revocations.entries.into_iter().map(|entry| entry.serial).collect()
    }

    /// All audit records.
    pub(super) async fn log(&self) -> Vec<AuditRecord> {
        let mut log: Vec<AuditRecord> = Vec::new();
        loop {
            let after = log.last().map_or(0, |record| record.index);
            let page = self.store.audit(after, 100).await.unwrap();
            if page.is_empty() {
                return log;
            }
            log.extend(page);
        }
    }

    /// How many records of a kind there are.
    pub(super) async fn logged(&self, kind: AuditKind) -> usize {
        self.log().await.iter().filter(|record| record.kind() == kind).count()
    }

    fn draw(&self) -> u64 {
        self.drawn.fetch_add(1, Ordering::Relaxed)
    }
}

pub(super) fn at(ms: i64) -> OffsetDateTime {
    let nanos = i128::from(START_MS + ms) * 1_000_000;
    OffsetDateTime::from_unix_timestamp_nanos(nanos).unwrap()
}

pub(super) fn c1() -> ClusterId {
    "c1".parse().unwrap()
}

pub(super) fn name(name: &str) -> NodeName {
    name.parse().unwrap()
}

/// The key of a number, as its hash.
pub(super) fn key(number: u8) -> [u8; 32] {
    [number; 32]
}

pub(super) fn address(number: u8) -> String {
    format!("10.0.0.{number}")
}

/// What node `n-NUMBER` asks with a token: from its own address, with its own key.
pub(super) fn ask(token: &TokenId, number: u8) -> EnrollAsk {
    EnrollAsk {
        token: token.clone(),
        secret_hash: SECRET,
        cluster: c1(),
        role: Role::Worker,
        name: name(&format!("n-{number}")),
        key_hash: key(number),
        source: Some(address(number).parse().unwrap()),
        addresses: vec![],
        dns_names: vec![],
        shared_address: false,
        once: false,
        vouched: None,
    }
}

pub(super) fn leaf_ask(number: u8) -> LeafAsk {
    LeafAsk { kind: LeafKind::Node, addresses: vec![], dns_names: vec![], key_hash: key(number) }
}

/// The node calling with an identity of it.
pub(super) fn caller(node: &NodeRecord, identity: &CertificateRecord) -> Caller {
    Caller {
        cluster: node.cluster.parse().unwrap(),
        node: node.name.parse().unwrap(),
        serial: identity.known_serial(),
        source: Some(node.addresses[0].address.parse().unwrap()),
    }
}

impl Enrolled {
    pub(super) fn caller(&self) -> Caller {
        caller(&self.node, &self.identity)
    }
}

pub(super) fn refusal<T: Debug>(answer: Result<T, StoreError>) -> Refusal {
    match answer {
        Err(StoreError::Refused(refusal)) => refusal,
        other => panic!("a refusal was expected, not {other:?}"),
    }
}

pub(super) fn race_lost<T: Debug>(answer: Result<T, StoreError>) -> &'static str {
    let refusal = refusal(answer);
    let Refusal::RaceLost(what) = refusal else {
        panic!("the race should have been lost, not {refusal}");
    };
    what
}

pub(super) fn ca_key(name: &str, not_after_ms: i64) -> CaKey {
    CaKey {
        certificate_der: b"certificate".to_vec(),
        wrapped_key: b"wrapped".to_vec(),
        not_after_ms,
        key_id: name.as_bytes().to_vec(),
    }
}

pub(super) fn control() -> ControlRecord {
    ControlRecord {
        trust_domain: "ray.test".to_owned(),
        root: Some(ca_key("control-root", i64::MAX)),
        issuers: vec![ca_key("control-1", START_MS + HOUR_MS)],
        revocations: 0,
    }
}

pub(super) fn cluster(name: &str) -> ClusterRecord {
    ClusterRecord {
        cluster: name.to_owned(),
        settings: Some(v1::Settings {
            leaf_life_seconds: LEAF_LIFE_MS / 1_000,
            lease_seconds: LEASE_MS / 1_000,
            ..v1::Settings::default()
        }),
        created_ms: START_MS,
        root: Some(ca_key("root", i64::MAX)),
        issuers: vec![ca_key("issuer-1", START_MS + HOUR_MS)],
        wrapped_ray_token: b"wrapped".to_vec(),
        ..ClusterRecord::default()
    }
}
