//! What is stored, as versioned protobuf: a field is only ever added, with a new tag. Times are
//! milliseconds since 1970 (`_ms`), certificates DER (`_der`), key hashes SHA-256 of the DER
//! SubjectPublicKeyInfo.
//!
//! Nothing here decides; see `decide`.

use prost::Message;
use raymtls_proto::{identity::Role, serial::Serial, v1};
// A record of the audit log is told and exported in the bytes it is stored in: it belongs to the
// contract.
pub use raymtls_proto::v1::{AuditKind, AuditRecord, Checkpoint};

use super::ABSENT_AFTER_MS;

/// The store's own header: read first, written once.
#[derive(Clone, PartialEq, Message)]
pub struct Header {
    /// Format of everything else; a newer one is refused.
    #[prost(uint32, tag = "1")]
    pub format: u32,
    /// Drawn at `init` and at each restore: versions of another epoch mean nothing.
    #[prost(fixed64, tag = "2")]
    pub epoch: u64,
}

/// A CA certificate with its wrapped key.
#[derive(Clone, PartialEq, Message)]
pub struct CaKey {
    /// The certificate.
    #[prost(bytes = "vec", tag = "1")]
    pub certificate_der: Vec<u8>,
    /// PKCS#8, encrypted under the KEK.
    #[prost(bytes = "vec", tag = "2")]
    pub wrapped_key: Vec<u8>,
    // Tag 3 is reserved: a name kept beside the key would move with it, so who unwraps builds it.
    /// notAfter of the certificate.
    #[prost(int64, tag = "4")]
    pub not_after_ms: i64,
    /// Subject key identifier, as in the certificates it signs.
    #[prost(bytes = "vec", tag = "5")]
    pub key_id: Vec<u8>,
}

/// Signed revocation lists of one authority and what they cover.
#[derive(Clone, PartialEq, Message)]
pub struct CrlSet {
    /// The root's CRL first, then one of each live issuer.
    #[prost(bytes = "vec", repeated, tag = "1")]
    pub crls_der: Vec<Vec<u8>>,
    /// Number of the last CRL signed (RFC 5280 5.2.3): never goes back.
    #[prost(uint64, tag = "2")]
    pub number: u64,
    /// How many revocations they cover; fewer than the authority has means they are due.
    #[prost(uint64, tag = "3")]
    pub covers: u64,
    /// When the earliest of them must be replaced.
    #[prost(int64, tag = "4")]
    pub next_update_ms: i64,
    /// Key ids of the issuers they cover.
    #[prost(bytes = "vec", repeated, tag = "5")]
    pub issuers: Vec<Vec<u8>>,
    /// When the root's must be replaced; its key is unwrapped for that alone.
    #[prost(int64, tag = "6")]
    pub root_next_update_ms: i64,
}

/// The control authority: one per deployment.
#[derive(Clone, PartialEq, Message)]
pub struct ControlRecord {
    /// Trust domain of every URI.
    #[prost(string, tag = "1")]
    pub trust_domain: String,
    /// Control root.
    #[prost(message, optional, tag = "2")]
    pub root: Option<CaKey>,
    /// Control issuers, newest first.
    #[prost(message, repeated, tag = "3")]
    pub issuers: Vec<CaKey>,
    /// Revocations of identities so far.
    #[prost(uint64, tag = "4")]
    pub revocations: u64,
}

/// One Ray cluster and its authority.
#[derive(Clone, PartialEq, Message)]
pub struct ClusterRecord {
    /// Its name.
    #[prost(string, tag = "1")]
    pub cluster: String,
    /// Everything an operator can set.
    #[prost(message, optional, tag = "2")]
    pub settings: Option<v1::Settings>,
    /// When it was created.
    #[prost(int64, tag = "3")]
    pub created_ms: i64,
    /// Cluster root.
    #[prost(message, optional, tag = "4")]
    pub root: Option<CaKey>,
    /// Cluster issuers, newest first.
    #[prost(message, repeated, tag = "5")]
    pub issuers: Vec<CaKey>,
    /// Ray's token, encrypted under the KEK.
    #[prost(bytes = "vec", tag = "6")]
    pub wrapped_ray_token: Vec<u8>,
    /// Revocations of Ray leaves so far.
    #[prost(uint64, tag = "7")]
    pub revocations: u64,
    /// Counter of the newest change of any part.
    #[prost(uint64, tag = "8")]
    pub version: u64,
    /// Counters of the newest change of each part.
    #[prost(uint64, tag = "9")]
    pub settings_version: u64,
    /// Roots and CRLs.
    #[prost(uint64, tag = "10")]
    pub bundle_version: u64,
    /// Ray's token.
    #[prost(uint64, tag = "11")]
    pub ray_token_version: u64,
    /// The control CRL, as far as this cluster's agents must know.
    #[prost(uint64, tag = "12")]
    pub control_crl_version: u64,
    /// The addresses to cut off.
    #[prost(uint64, tag = "13")]
    pub blocks_version: u64,
    /// Who knows the nodes as of an older version is to be told all of them: what was forgotten up to
    /// here is not told.
    #[prost(uint64, tag = "14")]
    pub members_from: u64,
    /// Counter of the newest change of a member.
    #[prost(uint64, tag = "15")]
    pub members_version: u64,
    /// The keys of Ray leaves that were revoked without their node.
    #[prost(uint64, tag = "20")]
    pub keys_version: u64,
}

impl ClusterRecord {
    /// The settings; a record without them was never written.
    #[must_use]
    pub fn settings(&self) -> &v1::Settings {
        self.settings.as_ref().expect("every cluster record is written with settings")
    }

    /// Counter of the newest change that is told at once: any but one of the members.
    #[must_use]
    pub fn pressing_version(&self) -> u64 {
        [
            self.settings_version,
            self.bundle_version,
            self.ray_token_version,
            self.control_crl_version,
            self.blocks_version,
            self.keys_version,
        ]
        .into_iter()
        .max()
        .unwrap_or_default()
    }

    /// Moves the cluster's counter on and returns it.
    pub fn next_version(&mut self) -> u64 {
        self.version += 1;
        self.version
    }
}

/// A bootstrap token, without its secret.
#[derive(Clone, PartialEq, Message)]
pub struct TokenRecord {
    /// Its public id.
    #[prost(string, tag = "1")]
    pub id: String,
    /// The one cluster it is for.
    #[prost(string, tag = "2")]
    pub cluster: String,
    /// The one role it is for.
    #[prost(enumeration = "v1::Role", tag = "3")]
    pub role: i32,
    /// SHA-256 of the secret.
    #[prost(bytes = "vec", tag = "4")]
    pub secret_hash: Vec<u8>,
    /// When it was made.
    #[prost(int64, tag = "5")]
    pub created_ms: i64,
    /// Not valid from here on.
    #[prost(int64, tag = "6")]
    pub expires_ms: i64,
    /// How many keys may spend it.
    #[prost(uint32, tag = "7")]
    pub uses: u32,
    /// How many did.
    #[prost(uint32, tag = "8")]
    pub used: u32,
    /// Exact names, or patterns that end in `*`; none means any name.
    #[prost(string, repeated, tag = "9")]
    pub node_names: Vec<String>,
    /// The CA appends characters of the key's hash to the name asked for.
    #[prost(bool, tag = "10")]
    pub generate_names: bool,
    /// CIDR ranges that may be certified besides the source address.
    #[prost(string, repeated, tag = "11")]
    pub address_ranges: Vec<String>,
    /// Any address may be certified.
    #[prost(bool, tag = "12")]
    pub any_address: bool,
    /// DNS names that may be certified.
    #[prost(string, repeated, tag = "13")]
    pub dns_names: Vec<String>,
    /// May take one exact name over from a live node.
    #[prost(bool, tag = "14")]
    pub replace: bool,
    /// Who made it, as in audit records.
    #[prost(string, tag = "15")]
    pub created_by: String,
    /// Zero: not revoked.
    #[prost(int64, tag = "16")]
    pub revoked_ms: i64,
    /// May certify addresses that other nodes of the same host share.
    #[prost(bool, tag = "17")]
    pub shared_address: bool,
}

/// One spent use of a token: bound to the key that spent it.
#[derive(Clone, PartialEq, Message)]
pub struct UseRecord {
    /// Node that was enrolled.
    #[prost(string, tag = "1")]
    pub node: String,
    /// Identity that was issued.
    #[prost(bytes = "vec", tag = "2")]
    pub serial: Vec<u8>,
    /// When.
    #[prost(int64, tag = "3")]
    pub used_ms: i64,
}

/// What a node is, apart from being out of touch, which only the clock knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum NodeStatus {
    /// Never written.
    Unspecified = 0,
    /// Enrolled.
    Live = 1,
    /// Went away by its own word.
    Left = 2,
    /// Thrown out.
    Revoked = 3,
}

/// An address bound to a node.
#[derive(Clone, PartialEq, Message)]
pub struct AddressRecord {
    /// Canonical text.
    #[prost(string, tag = "1")]
    pub address: String,
    /// A call came from it.
    #[prost(bool, tag = "2")]
    pub proved: bool,
    /// It counts for another node since.
    #[prost(bool, tag = "3")]
    pub lost: bool,
}

/// One identity certificate of a node.
#[derive(Clone, PartialEq, Message)]
pub struct IdentityRecord {
    /// Its serial.
    #[prost(bytes = "vec", tag = "1")]
    pub serial: Vec<u8>,
    /// Hash of its public key.
    #[prost(bytes = "vec", tag = "2")]
    pub key_hash: Vec<u8>,
    /// Its notAfter.
    #[prost(int64, tag = "3")]
    pub not_after_ms: i64,
}

/// A Ray leaf key of a node: one key folder.
#[derive(Clone, PartialEq, Message)]
pub struct LeafKeyRecord {
    /// Hash of the public key.
    #[prost(bytes = "vec", tag = "1")]
    pub key_hash: Vec<u8>,
    /// First certificate for it.
    #[prost(int64, tag = "2")]
    pub first_issued_ms: i64,
    /// notAfter of its newest certificate.
    #[prost(int64, tag = "3")]
    pub not_after_ms: i64,
    /// Certificates issued for it.
    #[prost(uint32, tag = "4")]
    pub certificates: u32,
}

/// A node of a cluster.
#[derive(Clone, PartialEq, Message)]
pub struct NodeRecord {
    /// Its cluster.
    #[prost(string, tag = "1")]
    pub cluster: String,
    /// Its name.
    #[prost(string, tag = "2")]
    pub name: String,
    /// Its role.
    #[prost(enumeration = "v1::Role", tag = "3")]
    pub role: i32,
    /// What it is.
    #[prost(enumeration = "NodeStatus", tag = "4")]
    pub status: i32,
    /// Addresses bound at enrolment.
    #[prost(message, repeated, tag = "5")]
    pub addresses: Vec<AddressRecord>,
    /// DNS names bound at enrolment.
    #[prost(string, repeated, tag = "6")]
    pub dns_names: Vec<String>,
    /// Its addresses are shared with other nodes.
    #[prost(bool, tag = "7")]
    pub shared_address: bool,
    /// Token it enrolled with.
    #[prost(string, tag = "8")]
    pub token_id: String,
    /// When it enrolled.
    #[prost(int64, tag = "9")]
    pub enrolled_ms: i64,
    /// Newest contact on record; the running server may know a newer one.
    #[prost(int64, tag = "10")]
    pub contact_ms: i64,
    /// The identity in force.
    #[prost(message, optional, tag = "11")]
    pub identity: Option<IdentityRecord>,
    /// The next identity, issued and not yet used.
    #[prost(message, optional, tag = "12")]
    pub pending: Option<IdentityRecord>,
    /// Leaf keys whose certificates have not all expired.
    #[prost(message, repeated, tag = "13")]
    pub leaf_keys: Vec<LeafKeyRecord>,
    /// When it was revoked; zero for never.
    #[prost(int64, tag = "14")]
    pub revoked_ms: i64,
    /// Why, in the operator's words.
    #[prost(string, tag = "15")]
    pub revoked_reason: String,
    /// When a retired identity was last seen in use; zero for never.
    #[prost(int64, tag = "16")]
    pub reused_ms: i64,
    /// Tokens it enrolled with before, newest first.
    #[prost(string, repeated, tag = "17")]
    pub earlier_token_ids: Vec<String>,
    /// Identities issued since the moment after.
    #[prost(uint32, tag = "18")]
    pub identities: u32,
    /// Where the count of identities began.
    #[prost(int64, tag = "19")]
    pub identities_since_ms: i64,
    /// The machine kept no identity: nobody speaks for the node any more.
    #[prost(bool, tag = "20")]
    pub once: bool,
    /// Version of the cluster at which its peers were last told of it; zero for never.
    #[prost(uint64, tag = "21")]
    pub member_version: u64,
    /// Since when it is no member for its silence; zero: it is one, as far as that goes.
    #[prost(int64, tag = "22")]
    pub lapsed_ms: i64,
}

impl NodeRecord {
    /// Its status as a word.
    #[must_use]
    pub fn node_status(&self) -> NodeStatus {
        self.status()
    }

    /// The identity in force.
    #[must_use]
    pub fn current(&self) -> &IdentityRecord {
        self.identity.as_ref().expect("every node record is written with an identity")
    }

    /// Whether nobody has heard of it for too long, or can any more: its identity has ended. Only
    /// time in which the CA was serving counts as silence.
    #[must_use]
    pub fn is_absent(&self, now_ms: i64, started_ms: i64) -> bool {
        let newest = self.pending.as_ref().unwrap_or_else(|| self.current());
        let silent_ms = now_ms - self.contact_ms.max(started_ms);
        silent_ms >= ABSENT_AFTER_MS || now_ms >= newest.not_after_ms
    }

    /// Whether its peers know it as one of them.
    #[must_use]
    pub fn is_member(&self) -> bool {
        self.node_status() == NodeStatus::Live && self.lapsed_ms == 0
    }

    /// Whether it was silent for longer than the lease. Only time in which the CA was serving counts.
    /// A machine that kept no identity cannot be heard of: it is a member while its leaf lives.
    #[must_use]
    pub fn is_out_of_lease(&self, now_ms: i64, started_ms: i64, lease_ms: i64) -> bool {
        let silent_ms = now_ms - self.contact_ms.max(started_ms);
        let lives = self.once && self.leaf_not_after_ms() > now_ms;
        silent_ms >= lease_ms && !lives
    }

    /// Whether no other live node may have its addresses: a driver's may be a gateway's.
    #[must_use]
    pub fn holds_exclusively(&self) -> bool {
        !self.shared_address && self.known_role() != Role::Driver
    }

    /// Its role; every record is written with one.
    #[must_use]
    pub fn known_role(&self) -> Role {
        Role::from_proto(self.role).expect("every node record is written with a role")
    }

    /// Latest notAfter of any Ray leaf of the node; zero for none.
    #[must_use]
    pub fn leaf_not_after_ms(&self) -> i64 {
        self.leaf_keys.iter().map(|key| key.not_after_ms).max().unwrap_or(0)
    }
}

/// An address that a revocation blocks for older tokens.
#[derive(Clone, PartialEq, Message)]
pub struct BlockRecord {
    /// The revoked node.
    #[prost(string, tag = "1")]
    pub node: String,
    /// When it was revoked.
    #[prost(int64, tag = "2")]
    pub revoked_ms: i64,
    /// When the last leaf of the node ends: nothing needs to be cut off after that.
    #[prost(int64, tag = "3")]
    pub until_ms: i64,
    /// Another node was certified for the address since, or the revoked one was taken back: it is not
    /// cut off any more. Older tokens stay barred from it.
    #[prost(bool, tag = "4")]
    pub lifted: bool,
    /// On every port, not on the cluster's alone.
    #[prost(bool, tag = "5")]
    pub all_traffic: bool,
    /// Another needs the address: it is looked at again until the time is over.
    #[prost(bool, tag = "6")]
    pub spared: bool,
}

impl BlockRecord {
    /// Whether the address is to be cut off.
    #[must_use]
    pub fn cuts(&self, now_ms: i64) -> bool {
        !self.lifted && !self.spared && self.until_ms > now_ms
    }
}

/// What a node's peers were told of it, at one version of the cluster.
#[derive(Clone, PartialEq, Message)]
pub struct MemberRecord {
    /// Its name.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Its role.
    #[prost(enumeration = "v1::Role", tag = "2")]
    pub role: i32,
    /// What it is to them.
    #[prost(enumeration = "v1::MemberState", tag = "3")]
    pub state: i32,
    /// Those of its addresses that count.
    #[prost(string, repeated, tag = "4")]
    pub addresses: Vec<String>,
    /// When they were told.
    #[prost(int64, tag = "5")]
    pub told_ms: i64,
}

/// One issued certificate.
#[derive(Clone, PartialEq, Message)]
pub struct CertificateRecord {
    /// Its serial.
    #[prost(bytes = "vec", tag = "1")]
    pub serial: Vec<u8>,
    /// Its profile.
    #[prost(enumeration = "v1::CertificateKind", tag = "2")]
    pub kind: i32,
    /// Cluster of its subject.
    #[prost(string, tag = "3")]
    pub cluster: String,
    /// Node it speaks for.
    #[prost(string, tag = "4")]
    pub node: String,
    /// The certificate.
    #[prost(bytes = "vec", tag = "5")]
    pub certificate_der: Vec<u8>,
    /// When it was issued.
    #[prost(int64, tag = "6")]
    pub issued_ms: i64,
    /// Its notAfter.
    #[prost(int64, tag = "7")]
    pub not_after_ms: i64,
    /// Key id of the issuer that signed it.
    #[prost(bytes = "vec", tag = "8")]
    pub issuer_key_id: Vec<u8>,
    /// Hash of its public key.
    #[prost(bytes = "vec", tag = "9")]
    pub key_hash: Vec<u8>,
    /// When it was revoked; zero for never.
    #[prost(int64, tag = "10")]
    pub revoked_ms: i64,
    /// Why.
    #[prost(string, tag = "11")]
    pub revoked_reason: String,
}

impl CertificateRecord {
    /// Its serial; every record is written with one.
    #[must_use]
    pub fn known_serial(&self) -> Serial {
        Serial::from_slice(&self.serial).expect("every certificate record is written with a serial")
    }
}

/// An entry of a CRL to be.
#[derive(Clone, PartialEq, Message)]
pub struct RevocationRecord {
    /// Revoked certificate.
    #[prost(bytes = "vec", tag = "1")]
    pub serial: Vec<u8>,
    /// When.
    #[prost(int64, tag = "2")]
    pub revoked_ms: i64,
    /// The entry goes when the certificate has expired.
    #[prost(int64, tag = "3")]
    pub not_after_ms: i64,
    /// Issuer whose CRL it belongs on.
    #[prost(bytes = "vec", tag = "4")]
    pub issuer_key_id: Vec<u8>,
    /// It was taken back from a CRL at a restore, and the certificate is not on record.
    #[prost(bool, tag = "5")]
    pub taken_back: bool,
}

/// Where the audit log ends.
#[derive(Clone, PartialEq, Message)]
pub struct AuditHead {
    /// Index of the newest record; zero for none.
    #[prost(uint64, tag = "1")]
    pub index: u64,
    /// Its hash; 32 zero bytes for none.
    #[prost(bytes = "vec", tag = "2")]
    pub hash: Vec<u8>,
}

/// The restores a store went through, oldest first.
#[derive(Clone, PartialEq, Message)]
pub struct RestoresRecord {
    /// Each of them.
    #[prost(message, repeated, tag = "1")]
    pub restores: Vec<RestoreRecord>,
}

/// A restore from a backup.
#[derive(Clone, PartialEq, Message)]
pub struct RestoreRecord {
    /// Epoch of the store that was backed up.
    #[prost(fixed64, tag = "1")]
    pub epoch_before: u64,
    /// Last record of the audit log in the backup.
    #[prost(uint64, tag = "2")]
    pub last_index: u64,
    /// When the backup was made.
    #[prost(int64, tag = "3")]
    pub backup_ms: i64,
    /// When it was restored.
    #[prost(int64, tag = "4")]
    pub restored_ms: i64,
    /// When an operator accepted it; zero for not yet.
    #[prost(int64, tag = "5")]
    pub accepted_ms: i64,
}

impl RestoresRecord {
    /// The restore that waits for an operator.
    #[must_use]
    pub fn pending(&self) -> Option<&RestoreRecord> {
        self.restores.last().filter(|restore| restore.accepted_ms == 0)
    }

    /// Up to which record the log of an epoch is this one's still, where that epoch ended in a restore.
    #[must_use]
    pub fn kept_up_to(&self, epoch: u64) -> Option<u64> {
        let at = self.restores.iter().position(|restore| restore.epoch_before == epoch)?;
        self.restores[at..].iter().map(|restore| restore.last_index).min()
    }
}

/// What a public key is used for, by its hash: one key, one purpose, one node.
#[derive(Clone, PartialEq, Message)]
pub struct KeyRecord {
    /// Profile of its certificates.
    #[prost(enumeration = "v1::CertificateKind", tag = "1")]
    pub kind: i32,
    /// Cluster of its node.
    #[prost(string, tag = "2")]
    pub cluster: String,
    /// Its node.
    #[prost(string, tag = "3")]
    pub node: String,
    /// When it was revoked: never certified again. Zero for never.
    #[prost(int64, tag = "4")]
    pub revoked_ms: i64,
}
