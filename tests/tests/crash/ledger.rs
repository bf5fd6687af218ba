//! What the clients were told, against what the store holds.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Mutex, MutexGuard},
};

use ca_server::store::{
    Store,
    kv::KvStore,
    records::{AuditKind, AuditRecord},
};
use raymtls_proto::{leaf::LeafFacts, serial::Serial};

use super::deployment::Deployment;

#[derive(Default)]
pub(crate) struct Ledger(Mutex<Told>);

#[derive(Default)]
struct Told {
    /// Keys that a use was asked for, and the identity that was the answer, if one came.
    keys: BTreeMap<u32, Key>,
    /// Certificates that somebody was given, as given.
    certificates: BTreeMap<Serial, Vec<u8>>,
    /// Those not yet looked for in the store.
    unchecked: Vec<Serial>,
    repeated: u32,
    deaths: u32,
}

/// A key to enrol with.
#[derive(Clone, Default)]
pub(crate) struct Key {
    pub(crate) pem: String,
    pub(crate) answer: Option<Vec<u8>>,
    /// It moved on to a newer identity, or may have: no answer is repeated then.
    pub(crate) renewing: bool,
}

impl Ledger {
    /// Notes a key before it is first used, under its number.
    pub(crate) fn add_key(&self, pem: String) -> u32 {
        let mut told = self.told();
        let number = u32::try_from(told.keys.len()).unwrap();
        told.keys.insert(number, Key { pem, ..Key::default() });
        number
    }

    /// Keys whose answer can be asked for again: lost, or given and not moved on from.
    pub(crate) fn repeatable(&self) -> Vec<(u32, Key)> {
        let told = self.told();
        told.keys
            .iter()
            .filter(|(_, key)| !key.renewing)
            .map(|(n, key)| (*n, key.clone()))
            .collect()
    }

    /// Notes the answer to an enrolment; the same key must always get the same.
    pub(crate) fn enrolled(&self, number: u32, leaf_der: &[u8]) {
        let mut told = self.told();
        let key = told.keys.get_mut(&number).unwrap();
        match &key.answer {
            Some(before) => {
                assert_eq!(before, leaf_der, "key {number} got another answer");
                told.repeated += 1;
            }
            None => {
                key.answer = Some(leaf_der.to_vec());
                told.note(leaf_der);
            }
        }
    }

    pub(crate) fn renews(&self, number: u32) {
        self.told().keys.get_mut(&number).unwrap().renewing = true;
    }

    /// Notes any other certificate that was given.
    pub(crate) fn issued(&self, leaf_der: &[u8]) {
        self.told().note(leaf_der);
    }

    pub(crate) fn acknowledged(&self) -> usize {
        self.told().certificates.len()
    }

    pub(crate) fn summary(&self) -> String {
        let told = self.told();
        format!(
            "{} deaths; {} keys, {} of them answered; {} certificates acknowledged, {} answers repeated",
            told.deaths,
            told.keys.len(),
            told.keys.values().filter(|key| key.answer.is_some()).count(),
            told.certificates.len(),
            told.repeated,
        )
    }

    /// Checks the store a dead server left, as to what is new since the last check.
    pub(crate) async fn check(&self, deployment: &Deployment, how: &str) {
        self.told().deaths += 1;
        let unchecked = std::mem::take(&mut self.told().unchecked);
        let store = deployment.store();
        self.find(&store, &unchecked, how).await;
        self.count(&store, deployment, how).await;
        store.close().await;
    }

    /// Checks the store as to everything that ever was acknowledged.
    pub(crate) async fn check_all(&self, deployment: &Deployment) {
        let all: Vec<_> = self.told().certificates.keys().copied().collect();
        self.told().unchecked = all;
        self.check(deployment, "at the end").await;
        let unanswered = self.told().keys.values().filter(|key| key.answer.is_none()).count();
        assert_eq!(unanswered, 0);
    }

    async fn find(&self, store: &KvStore, serials: &[Serial], how: &str) {
        for &serial in serials {
            let stored = store.certificate(serial).await;
            let stored = stored.unwrap_or_else(|e| panic!("{how}: {serial} was acknowledged: {e}"));
            let given = self.told().certificates[&serial].clone();
            assert_eq!(stored.certificate_der, given, "{how}: {serial}");
        }
    }

    /// Uses, nodes, certificates and audit records must tell one story.
    async fn count(&self, store: &KvStore, deployment: &Deployment, how: &str) {
        let records = store.verify_audit_chain().await.unwrap_or_else(|e| panic!("{how}: {e}"));
        let log = whole_log(store).await;
        assert_eq!(log.len() as u64, records, "{how}");
        let issued = |record: &&AuditRecord| {
            matches!(
                record.kind(),
                AuditKind::Enrolled | AuditKind::IdentityRenewed | AuditKind::LeafIssued
            )
        };
        let serials: Vec<_> = log.iter().filter(issued).map(|record| &record.serial).collect();
        let distinct: BTreeSet<_> = serials.iter().collect();
        assert_eq!(distinct.len(), serials.len(), "{how}: a serial twice");
        assert_eq!(certificates(store).await, serials.len(), "{how}: certificates and audit log");

        let enrolled = log.iter().filter(|record| record.kind() == AuditKind::Enrolled).count();
        let tokens = store.tokens("c1".parse().unwrap(), String::new()).await.unwrap().rows;
        let token = tokens.iter().find(|token| token.id == deployment.join.token_id).unwrap();
        assert_eq!(token.used as usize, enrolled, "{how}: uses and enrolments");
        assert_eq!(nodes(store).await, enrolled, "{how}: nodes and enrolments");
        let told = self.told();
        let answered = told.keys.values().filter(|key| key.answer.is_some()).count();
        assert!(enrolled >= answered, "{how}: {enrolled} enrolments, {answered} answered");
        assert!(enrolled <= told.keys.len(), "{how}: {enrolled} uses, {} keys", told.keys.len());
    }

    fn told(&self) -> MutexGuard<'_, Told> {
        self.0.lock().unwrap()
    }
}

impl Told {
    fn note(&mut self, leaf_der: &[u8]) {
        let serial = LeafFacts::parse(leaf_der).unwrap().serial;
        let before = self.certificates.insert(serial, leaf_der.to_vec());
        assert!(before.is_none_or(|before| before == leaf_der), "serial {serial} twice");
        self.unchecked.push(serial);
    }
}

async fn whole_log(store: &KvStore) -> Vec<AuditRecord> {
    let mut log: Vec<AuditRecord> = Vec::new();
    loop {
        let after = log.last().map_or(0, |record| record.index);
        let page = store.audit(after, 200).await.unwrap();
        if page.is_empty() {
            return log;
        }
        log.extend(page);
    }
}

async fn certificates(store: &KvStore) -> usize {
    let (mut count, mut next) = (0, String::new());
    loop {
        let page = store.certificates("c1".parse().unwrap(), None, next).await.unwrap();
        count += page.rows.len();
        next = page.next;
        if next.is_empty() {
            return count;
        }
    }
}

async fn nodes(store: &KvStore) -> usize {
    let (mut count, mut next) = (0, String::new());
    loop {
        let page = store.nodes("c1".parse().unwrap(), next).await.unwrap();
        count += page.rows.len();
        next = page.next;
        if next.is_empty() {
            return count;
        }
    }
}
