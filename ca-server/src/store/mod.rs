//! What the CA remembers. [`Store`] is a list of verbs, each a whole decision: atomic, and durable
//! when it returns. One conformance suite runs against every backend.
//!
//! A verb that plans changes nothing; the verb that commits decides the same again, so that what was
//! true before signing and no longer is true loses (`Refusal` or a lost race), never half happens.

pub mod conformance;
pub mod decide;
pub mod kv;
pub mod layout;
pub mod memory;
pub mod record;
pub mod records;
pub mod sled;
pub mod view;

use std::{fmt::Debug, sync::Arc};

use async_trait::async_trait;
use raymtls_proto::{
    address::NodeAddress,
    identity::{ClusterId, DnsName, NodeName, Role},
    serial::Serial,
    token::TokenId,
    v1,
};
use thiserror::Error;
use time::OffsetDateTime;
use tokio::sync::watch;

use crate::refusal::Refusal;
pub use decide::block::{Blocked, Reach};
use records::{
    AuditKind, AuditRecord, BlockRecord, CaKey, CertificateRecord, Checkpoint, ClusterRecord,
    ControlRecord, CrlSet, MemberRecord, NodeRecord, RestoresRecord, RevocationRecord, TokenRecord,
};

/// Format this code writes and reads.
pub const FORMAT: u32 = 1;
/// Rows of a page at most.
pub const PAGE_ROWS_MAX: usize = 200;
/// A node that was not heard of for this long is absent: its name and addresses may be taken over.
/// Contact is put on record every [`CONTACT_COARSE_MS`], so a node is absent 15 to 18 minutes after
/// its last word.
pub const ABSENT_AFTER_MS: i64 = 15 * 60 * 1_000 + CONTACT_COARSE_MS;
/// How old a contact on record may get before a newer one is written.
pub const CONTACT_COARSE_MS: i64 = 3 * 60 * 1_000;
/// Identities one node may be issued within the life of an identity. An honest agent renews daily;
/// what is issued may all have to stand on a CRL one day.
pub const IDENTITIES_MAX: u32 = 4_096;
/// Certificates of all live leaf keys of one node, at most.
pub const LEAVES_MAX: u32 = 8_192;
/// Leaf keys of one node, since it enrolled, whose certificates have not expired, at most.
pub const LEAF_KEYS_MAX: usize = 32;

/// Nodes revoked in one decision, at most: for each of them all nodes of the cluster are looked
/// through, and other decisions wait meanwhile.
pub const NODES_REVOKED_MAX: usize = 32;

/// Pairs of a backup, in the order in which they are to be written; `None` deletes.
pub type BackupPairs = Vec<(Vec<u8>, Option<Vec<u8>>)>;

/// Why a verb did not do what it was asked.
#[derive(Debug, Error)]
pub enum StoreError {
    /// The decision is no.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// Nothing can be committed: the writer has stopped, or too much waits for it.
    #[error("the store is unavailable: {0}")]
    Unavailable(String),
    /// A record does not decode.
    #[error("the record at {key:?} is damaged: {why}; restore a backup")]
    Damaged {
        /// Its key.
        key: String,
        /// What the decoder says.
        why: String,
    },
    /// The store cannot be opened.
    #[error("{0}")]
    Open(String),
}

impl StoreError {
    /// What the caller is told.
    #[must_use]
    pub fn refusal(&self) -> Refusal {
        match self {
            Self::Refused(refusal) => refusal.clone(),
            Self::Unavailable(_) | Self::Open(_) => Refusal::StoreUnavailable,
            Self::Damaged { .. } => Refusal::Internal,
        }
    }
}

/// Whose CA keys, issuers and CRLs.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Authority {
    /// The control authority.
    Control,
    /// A cluster's.
    Cluster(ClusterId),
}

/// Stands in the names keys are wrapped under: what it says never changes.
impl std::fmt::Display for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Control => f.write_str("control"),
            Self::Cluster(cluster) => write!(f, "cluster/{cluster}"),
        }
    }
}

impl Authority {
    /// The cluster's name; empty for the control authority.
    #[must_use]
    pub fn cluster(&self) -> &str {
        match self {
            Self::Control => "",
            Self::Cluster(cluster) => cluster.as_str(),
        }
    }
}

/// Everything an enrolment asks for, parsed.
#[derive(Clone, Debug)]
pub struct EnrollAsk {
    /// Token presented.
    pub token: TokenId,
    /// SHA-256 of the secret presented.
    pub secret_hash: [u8; 32],
    /// Cluster to join.
    pub cluster: ClusterId,
    /// Role to take.
    pub role: Role,
    /// Name, or base of it.
    pub name: NodeName,
    /// SHA-256 of the key to certify.
    pub key_hash: [u8; 32],
    /// Canonical source address; `None` where the connection comes from an address no node can be
    /// known by (loopback).
    pub source: Option<NodeAddress>,
    /// Further addresses.
    pub addresses: Vec<NodeAddress>,
    /// DNS names.
    pub dns_names: Vec<DnsName>,
    /// The addresses are shared.
    pub shared_address: bool,
    /// No identity is kept.
    pub once: bool,
    /// The token's record where somebody else made it and vouches for it by a signature that was
    /// verified: written with its first use. What is on record comes before it.
    pub vouched: Option<Box<TokenRecord>>,
}

/// What an enrolment comes to, before signing.
#[derive(Clone, Debug)]
pub enum EnrollPlan {
    /// Sign an identity for this.
    Issue(Binding),
    /// The same key spent the token already: the same answer.
    Replay(Box<Enrolled>),
}

/// What is bound to a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Binding {
    /// Its name.
    pub name: NodeName,
    /// Its addresses, the proved one first.
    pub addresses: Vec<NodeAddress>,
    /// Its DNS names.
    pub dns_names: Vec<DnsName>,
}

/// A node and the identity it enrolled with.
#[derive(Clone, Debug)]
pub struct Enrolled {
    /// Settings of its cluster.
    pub settings: v1::Settings,
    /// The node.
    pub node: NodeRecord,
    /// Its identity.
    pub identity: CertificateRecord,
}

/// A certificate signed and not yet on record.
#[derive(Clone, Debug)]
pub struct Signed {
    /// Its serial.
    pub serial: Serial,
    /// The certificate.
    pub certificate_der: Vec<u8>,
    /// When it was signed.
    pub issued_ms: i64,
    /// Its notAfter.
    pub not_after_ms: i64,
    /// Issuer that signed it.
    pub issuer_key_id: Vec<u8>,
    /// Hash of its public key.
    pub key_hash: [u8; 32],
}

/// Who calls, by the identity the connection presented.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// Cluster in the identity.
    pub cluster: ClusterId,
    /// Node in the identity.
    pub node: NodeName,
    /// Serial of the identity.
    pub serial: Serial,
    /// Canonical source address of the connection, if a node can be known by it.
    pub source: Option<NodeAddress>,
}

impl Caller {
    /// As it stands in audit records.
    #[must_use]
    pub fn actor(&self) -> String {
        format!("node:{}/{}", self.cluster, self.node)
    }
}

/// What a renewal of an identity comes to, before signing.
#[derive(Clone, Debug)]
pub enum RenewPlan {
    /// Sign one.
    Issue,
    /// Asked before with the same key: the same answer.
    Replay(Box<CertificateRecord>),
}

/// Everything a leaf is asked for with, parsed.
#[derive(Clone, Debug)]
pub struct LeafAsk {
    /// Profile.
    pub kind: LeafKind,
    /// Addresses; empty for all that are bound.
    pub addresses: Vec<NodeAddress>,
    /// DNS names; empty for all that are bound.
    pub dns_names: Vec<DnsName>,
    /// SHA-256 of the key to certify.
    pub key_hash: [u8; 32],
}

/// The two Ray leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeafKind {
    /// A node's processes.
    Node,
    /// A driver.
    Driver,
}

/// What a leaf comes to, before signing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeafPlan {
    /// Addresses to certify.
    pub addresses: Vec<NodeAddress>,
    /// DNS names to certify.
    pub dns_names: Vec<DnsName>,
    /// How long it lives.
    pub life_ms: i64,
    /// Latest notAfter (an ephemeral cluster's end); `None` for no such bound.
    pub ends_ms: Option<i64>,
}

/// What a revocation did.
#[derive(Clone, Debug)]
pub struct NodeRevoked {
    /// The node after it.
    pub node: NodeRecord,
    /// Certificates revoked, identities and leaves.
    pub certificates: u32,
    /// Uses of its token made void.
    pub token_uses_voided: u32,
    /// What its peers cut off.
    pub blocked: Blocked,
    /// The cluster's version since.
    pub version: u64,
}

/// How a node is revoked.
#[derive(Clone, Debug, Default)]
pub struct Revoking {
    /// Why, in the operator's words.
    pub reason: String,
    /// Leave the unused uses of its token as they are.
    pub keep_token: bool,
    /// How far the block goes.
    pub reach: Reach,
}

/// What revoking the key of a Ray leaf did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeafRevoked {
    /// Serials of the key's unexpired certificates, all on the CRL now, newest first.
    pub serials: Vec<Vec<u8>>,
    /// The node they speak for.
    pub node: String,
    /// When the last of them ends; zero if none is left.
    pub not_after_ms: i64,
}

/// A page of rows and where the next begins.
#[derive(Clone, Debug)]
pub struct Page<T> {
    /// The rows.
    pub rows: Vec<T>,
    /// Cursor of the next page; empty at the end.
    pub next: String,
}

/// A cluster as it stands, durably; `None`: there is none.
pub type Watched = Option<Arc<ClusterRecord>>;

/// Changes among the nodes of a cluster, oldest first.
#[derive(Clone, Debug, PartialEq)]
pub struct MemberPage {
    /// The changes.
    pub entries: Vec<MemberRecord>,
    /// The version they lead to: the cluster's, or an earlier one where more follows.
    pub up_to: u64,
    /// More follows.
    pub more: bool,
}

/// The revocations of an authority.
#[derive(Clone, Debug)]
pub struct Revocations {
    /// How many there were ever: what a CRL made from this covers.
    pub count: u64,
    /// Those whose certificates have not expired.
    pub entries: Vec<RevocationRecord>,
}

/// What is asked of the audit log; what is `None` is not asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AuditAsk {
    /// Cluster concerned.
    pub cluster: Option<String>,
    /// Node concerned.
    pub node: Option<String>,
    /// Certificate concerned.
    pub serial: Option<Vec<u8>>,
    /// Who.
    pub actor: Option<String>,
    /// What.
    pub kind: Option<AuditKind>,
    /// Not before this.
    pub since_ms: Option<i64>,
    /// From the newest back.
    pub newest_first: bool,
    /// Index to go on behind; zero for the beginning.
    pub cursor: u64,
    /// Records at most.
    pub limit: usize,
}

/// A page of the audit log.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AuditPage {
    /// The records that fit, as stored.
    pub records: Vec<Vec<u8>>,
    /// Where the next page begins.
    pub next: u64,
    /// The log goes on there.
    pub more: bool,
    /// Index of the newest record.
    pub newest_index: u64,
    /// Index of the oldest record.
    pub first_index: u64,
}

/// The audit log's two ends and what vouches for it.
#[derive(Clone, Debug, PartialEq)]
pub struct AuditState {
    /// Index of the newest record; zero for none.
    pub newest_index: u64,
    /// Its hash.
    pub newest_hash: Vec<u8>,
    /// Index of the oldest record.
    pub first_index: u64,
    /// The newest checkpoint.
    pub checkpoint: Option<Checkpoint>,
}

/// What pruning the audit log comes to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PrunePlan {
    /// Index of the oldest record now.
    pub first_index: u64,
    /// Index of the oldest record that stays.
    pub keep_from: u64,
    /// Its hash.
    pub hash: Vec<u8>,
}

/// How an identity that chains to the control authority stands to what a restored store has on record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Its live node's current or pending one.
    InForce,
    /// It was issued after the backup.
    Unknown,
    /// It is on record, and no call is served with it: why.
    Refused(Refusal),
}

/// An identity that a restored store does not know, and what its node showed.
#[derive(Clone, Debug)]
pub struct Adoption {
    /// Its cluster.
    pub cluster: ClusterId,
    /// Its node.
    pub node: NodeName,
    /// What the node is by its own word; a driver by its leaves.
    pub role: Role,
    /// Where it called from.
    pub source: Option<NodeAddress>,
    /// The identity.
    pub identity: Signed,
    /// Its leaves that have not ended.
    pub leaves: Vec<(v1::CertificateKind, Signed)>,
    /// What they certify.
    pub addresses: Vec<String>,
    /// The same.
    pub dns_names: Vec<String>,
}

/// A revocation on a CRL that a restored store does not have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TakenBack {
    /// Whose CRL.
    pub authority: Authority,
    /// What it revokes.
    pub serial: Vec<u8>,
    /// When.
    pub revoked_ms: i64,
    /// Who signed the CRL.
    pub issuer_key_id: Vec<u8>,
    /// When that issuer ends: nothing it signed lives longer.
    pub ends_ms: i64,
}

/// What a restored CA heard from its nodes.
#[derive(Clone, Debug, Default)]
pub struct Heard {
    /// Identities it does not know.
    pub adoptions: Vec<Adoption>,
    /// Revocations it may not know.
    pub revocations: Vec<TakenBack>,
    /// The greatest number of a CRL of each authority.
    pub crl_numbers: Vec<(Authority, u64)>,
    /// Addresses of the CA: no block covers them.
    pub ca_addresses: Vec<std::net::IpAddr>,
}

/// What accepting a restore comes to.
#[derive(Clone, Debug, Default)]
pub struct Accepted {
    /// Each adoption: whether the store knew the node, and why it was left out, if it was.
    pub adoptions: Vec<(Adoption, bool, Option<String>)>,
    /// Revocations that were not on record, with the node where it is known.
    pub revocations: Vec<(TakenBack, String)>,
    /// Nodes that are revoked by them, with their clusters.
    pub revoked_nodes: Vec<(String, String)>,
}

/// Running totals of a store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StoreCounts {
    /// Decisions made, reads included.
    pub jobs: u64,
    /// Groups of decisions.
    pub groups: u64,
    /// Groups that wrote: each of them one flush to the disk.
    pub commits: u64,
    /// Time all commits took.
    pub commit_micros: u64,
    /// Decisions that wait now.
    pub queued: u64,
}

/// The verbs.
#[async_trait]
pub trait Store: Debug + Send + Sync + 'static {
    /// Epoch of the store: changes at a restore.
    fn epoch(&self) -> u64;

    /// Newest durable version of a cluster; wakes whoever waits when it moves.
    fn watch(&self, cluster: &ClusterId) -> watch::Receiver<Watched>;

    /// Puts the control authority in place. Refused if one is there.
    async fn initialize(
        &self,
        now: OffsetDateTime,
        control: ControlRecord,
    ) -> Result<(), StoreError>;

    /// The control authority; `None` before `initialize`.
    async fn control(&self) -> Result<Option<ControlRecord>, StoreError>;

    /// Creates a cluster with its authority.
    async fn create_cluster(
        &self,
        now: OffsetDateTime,
        actor: String,
        cluster: ClusterRecord,
    ) -> Result<ClusterRecord, StoreError>;

    /// Replaces a cluster's settings if they still are `before`.
    async fn set_cluster(
        &self,
        now: OffsetDateTime,
        actor: String,
        cluster: ClusterId,
        before: v1::Settings,
        after: v1::Settings,
    ) -> Result<ClusterRecord, StoreError>;

    /// One cluster.
    async fn cluster(&self, cluster: ClusterId) -> Result<ClusterRecord, StoreError>;

    /// All clusters, by name.
    async fn clusters(&self) -> Result<Vec<ClusterRecord>, StoreError>;

    /// Adds an issuer to an authority, as the newest, and drops those that have expired.
    async fn add_issuer(
        &self,
        now: OffsetDateTime,
        authority: Authority,
        issuer: CaKey,
    ) -> Result<(), StoreError>;

    /// What belongs on an authority's CRLs.
    async fn revocations(
        &self,
        now: OffsetDateTime,
        authority: Authority,
    ) -> Result<Revocations, StoreError>;

    /// Puts signed CRLs in place if their number is newer.
    async fn put_crls(
        &self,
        now: OffsetDateTime,
        authority: Authority,
        crls: CrlSet,
    ) -> Result<(), StoreError>;

    /// The CRLs in place.
    async fn crls(&self, authority: Authority) -> Result<Option<CrlSet>, StoreError>;

    /// Puts a token on record.
    async fn create_token(&self, now: OffsetDateTime, token: TokenRecord)
    -> Result<(), StoreError>;

    /// Revokes a token: no use is spent from here on.
    async fn revoke_token(
        &self,
        now: OffsetDateTime,
        actor: String,
        cluster: ClusterId,
        token: TokenId,
    ) -> Result<TokenRecord, StoreError>;

    /// Tokens of a cluster.
    async fn tokens(
        &self,
        cluster: ClusterId,
        page: String,
    ) -> Result<Page<TokenRecord>, StoreError>;

    /// Whether there is such a token, by what is written: nothing rests on it but where the call is
    /// counted, and that a wrong one is told so.
    async fn check_token(&self, token: TokenId, secret_hash: [u8; 32]) -> Result<(), StoreError>;

    /// Whether the caller's identity is its live node's current or pending one, by what is written:
    /// nothing rests on it but where the call is counted.
    async fn is_in_force(&self, caller: Caller) -> Result<bool, StoreError>;

    /// Judges an enrolment. `Issue` may rest on what is not durable yet: it is for signing, and
    /// nothing of it leaves before `enroll` has said the same. So do `plan_renew` and `plan_leaf`.
    async fn plan_enroll(
        &self,
        now: OffsetDateTime,
        ask: EnrollAsk,
    ) -> Result<EnrollPlan, StoreError>;

    /// Spends the use, binds the node, records the identity, all or nothing. What `plan_enroll`
    /// answered must still hold; a replay that came in between is answered as one.
    async fn enroll(
        &self,
        now: OffsetDateTime,
        ask: EnrollAsk,
        binding: Binding,
        identity: Signed,
    ) -> Result<Enrolled, StoreError>;

    /// Judges a caller; the first call made with a pending identity retires the current one.
    /// A retired one used again is refused, and the event stays on record.
    async fn identify(&self, now: OffsetDateTime, caller: Caller)
    -> Result<NodeRecord, StoreError>;

    /// Judges a caller that was identified before and waited since: it must not have been revoked,
    /// have left, or have been replaced. A no is durable, a yes was one when the call began.
    async fn still_stands(&self, caller: Caller) -> Result<(), StoreError>;

    /// Judges the caller as `identify` does, then the renewal of its identity. A yes changes
    /// nothing yet: the verb that commits retires the identity before this one.
    async fn plan_renew(
        &self,
        now: OffsetDateTime,
        caller: Caller,
        key_hash: [u8; 32],
    ) -> Result<RenewPlan, StoreError>;

    /// Judges the caller as `identify` does, then records its next identity as pending.
    async fn renew(
        &self,
        now: OffsetDateTime,
        caller: Caller,
        identity: Signed,
    ) -> Result<CertificateRecord, StoreError>;

    /// Judges the caller as `identify` does, then the leaf.
    async fn plan_leaf(
        &self,
        now: OffsetDateTime,
        caller: Caller,
        ask: LeafAsk,
    ) -> Result<LeafPlan, StoreError>;

    /// Judges the caller as `identify` does, then records a leaf.
    async fn record_leaf(
        &self,
        now: OffsetDateTime,
        caller: Caller,
        ask: LeafAsk,
        plan: LeafPlan,
        leaf: Signed,
    ) -> Result<(), StoreError>;

    /// The caller leaves: its name and addresses are free.
    async fn leave(&self, now: OffsetDateTime, caller: Caller) -> Result<(), StoreError>;

    /// Revokes a node: its certificates, its addresses for older tokens, and unless `keep_token`
    /// what is left of its token.
    async fn revoke_node(
        &self,
        now: OffsetDateTime,
        actor: String,
        cluster: ClusterId,
        node: NodeName,
        revoking: Revoking,
    ) -> Result<NodeRevoked, StoreError>;

    /// Revokes several nodes at once, at most [`NODES_REVOKED_MAX`]; those that are revoked already, or
    /// not there, are left out of the answer.
    async fn revoke_nodes(
        &self,
        now: OffsetDateTime,
        actor: String,
        cluster: ClusterId,
        nodes: Vec<NodeName>,
        revoking: Revoking,
    ) -> Result<Vec<NodeRecord>, StoreError>;

    /// Revokes the key of a Ray leaf: its certificates, and that it ever gets another. No address.
    async fn revoke_leaf(
        &self,
        now: OffsetDateTime,
        actor: String,
        cluster: ClusterId,
        serial: Serial,
        reason: String,
    ) -> Result<LeafRevoked, StoreError>;

    /// Takes a revoked node back, as one that has left: it may enrol again with a new token, and its
    /// addresses are cut off no more.
    async fn reinstate_node(
        &self,
        now: OffsetDateTime,
        actor: String,
        cluster: ClusterId,
        node: NodeName,
    ) -> Result<NodeRecord, StoreError>;

    /// Forgets a node; refused while it is revoked and a leaf of it lives.
    async fn forget_node(
        &self,
        now: OffsetDateTime,
        actor: String,
        cluster: ClusterId,
        node: NodeName,
    ) -> Result<(), StoreError>;

    /// One node.
    async fn node(&self, cluster: ClusterId, node: NodeName) -> Result<NodeRecord, StoreError>;

    /// Nodes of a cluster, by name.
    async fn nodes(&self, cluster: ClusterId, page: String)
    -> Result<Page<NodeRecord>, StoreError>;

    /// Up to `limit` changes among a cluster's nodes after a version.
    async fn members(
        &self,
        cluster: ClusterId,
        after: u64,
        limit: usize,
    ) -> Result<MemberPage, StoreError>;

    /// The addresses of a cluster to cut off.
    async fn blocks(
        &self,
        now: OffsetDateTime,
        cluster: ClusterId,
    ) -> Result<Vec<(String, BlockRecord)>, StoreError>;

    /// Takes those nodes of a cluster out of the member set that were silent for longer than the
    /// lease, ends blocks whose time is over, and forgets what nobody needs to be told any more.
    /// Silence counts from `serving_since` at the earliest. Returns how many lapsed.
    async fn lapse_members(
        &self,
        now: OffsetDateTime,
        cluster: ClusterId,
        serving_since: OffsetDateTime,
    ) -> Result<u32, StoreError>;

    /// One certificate.
    async fn certificate(&self, serial: Serial) -> Result<CertificateRecord, StoreError>;

    /// Certificates of a cluster or of one of its nodes, by time of issue.
    async fn certificates(
        &self,
        cluster: ClusterId,
        node: Option<NodeName>,
        page: String,
    ) -> Result<Page<CertificateRecord>, StoreError>;

    /// Up to `limit` audit records after an index.
    async fn audit(&self, after: u64, limit: usize) -> Result<Vec<AuditRecord>, StoreError>;

    /// A page of the audit log, of what is durable. It looks at a bounded part of the log and holds
    /// nobody up who writes.
    async fn audit_page(&self, ask: AuditAsk) -> Result<AuditPage, StoreError>;

    /// Where the audit log begins and ends.
    async fn audit_state(&self) -> Result<AuditState, StoreError>;

    /// The hash of an audit record; `None` where there is none at this index.
    async fn audit_hash_at(&self, index: u64) -> Result<Option<Vec<u8>>, StoreError>;

    /// Puts a signed checkpoint in place, if it names a record of the log and a newer one than the
    /// last.
    async fn put_checkpoint(&self, checkpoint: Checkpoint) -> Result<(), StoreError>;

    /// Which records of the audit log go if all before a moment do, but for the newest of them.
    async fn plan_prune(&self, before: OffsetDateTime) -> Result<PrunePlan, StoreError>;

    /// Removes audit records before the one a signed checkpoint names, a bounded number at once; the
    /// first time with a record of it. Returns whether more are left to remove.
    async fn prune_audit(
        &self,
        now: OffsetDateTime,
        actor: String,
        checkpoint: Checkpoint,
    ) -> Result<bool, StoreError>;

    /// Begins a backup, with a record of it; what is written meanwhile comes through the channel, and
    /// so does what [`Store::backup_chunk`] reads, in an order in which the last word on a key counts.
    async fn begin_backup(
        &self,
        now: OffsetDateTime,
        actor: String,
    ) -> Result<tokio::sync::mpsc::Receiver<BackupPairs>, StoreError>;

    /// Reads the next pairs into the backup: from behind a key, or from the beginning. Returns the last
    /// key read; `None` at the end.
    async fn backup_chunk(&self, after: Option<Vec<u8>>) -> Result<Option<Vec<u8>>, StoreError>;

    /// Ends the backup; the channel has all of it, or this is `false`.
    fn end_backup(&self) -> bool;

    /// How a caller's identity stands in a restored store.
    async fn standing(&self, caller: Caller) -> Result<Standing, StoreError>;

    /// What accepting the restore would come to by what is written. Changes nothing.
    async fn plan_accept(&self, now: OffsetDateTime, heard: Heard) -> Result<Accepted, StoreError>;

    /// Takes over what was heard, all or nothing.
    async fn accept_restore(
        &self,
        now: OffsetDateTime,
        actor: String,
        heard: Heard,
    ) -> Result<Accepted, StoreError>;

    /// The restores this store went through.
    async fn restores(&self) -> Result<RestoresRecord, StoreError>;

    /// Puts on record that the private keys of an authority are about to be written to a file.
    async fn note_key_export(
        &self,
        now: OffsetDateTime,
        actor: String,
        authority: Authority,
        detail: String,
    ) -> Result<(), StoreError>;

    /// Index of the newest durable audit record; wakes whoever waits when it moves.
    fn watch_audit(&self) -> watch::Receiver<u64>;

    /// Whether verbs can still commit.
    fn is_serving(&self) -> bool;

    /// Running totals.
    fn counts(&self) -> StoreCounts;

    /// Commits what is queued and stops.
    async fn close(&self);
}

/// Milliseconds since 1970, as stored.
#[must_use]
pub fn unix_ms(at: OffsetDateTime) -> i64 {
    let ms = at.unix_timestamp_nanos() / 1_000_000;
    i64::try_from(ms).expect("the years the time crate holds fit into 64 bits of milliseconds")
}
