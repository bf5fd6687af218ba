//! Every way in which the CA says no to a caller, gathered. The text is for the person on the other
//! side: what, why, and what to do next. Faults of our own say nothing here and everything in the
//! log.

use std::time::Duration;

use raymtls_proto::{reason::Reason, serial::Serial};
use thiserror::Error;
use tonic::Status;

use crate::store::ABSENT_AFTER_MS;

/// A refusal.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum Refusal {
    /// Unknown id and wrong secret are one word.
    #[error(
        "the bootstrap token is not known here: check that the join file is of this CA, \
         or make a new one with `ca-admin token create`"
    )]
    TokenUnknown,
    /// Past its time.
    #[error("the bootstrap token has expired: make a new one with `ca-admin token create`")]
    TokenExpired,
    /// Revoked.
    #[error("the bootstrap token was revoked: make a new one with `ca-admin token create`")]
    TokenRevoked,
    /// No use left.
    #[error(
        "all {0} uses of the bootstrap token are spent: \
         make a new one with `ca-admin token create`"
    )]
    TokenSpent(u32),
    /// For another cluster.
    #[error("the bootstrap token is for another cluster than {0:?}")]
    TokenClusterMismatch(String),
    /// For another role.
    #[error("the bootstrap token is for role {allowed}, not {asked}")]
    TokenRoleMismatch {
        /// Role of the token.
        allowed: String,
        /// Role asked for.
        asked: String,
    },
    /// For other names.
    #[error("the bootstrap token is not for a node named {0:?}")]
    TokenNodeMismatch(String),
    /// The ephemeral cluster is over.
    #[error("cluster {0:?} has ended: it was created with --max-life")]
    ClusterEnded(String),
    /// Blocked by a newer revocation.
    #[error(
        "address {address} belongs to node {node:?}, revoked after this token was made: \
         a token made from now on may certify it"
    )]
    AddressBlocked {
        /// Address asked for.
        address: String,
        /// Revoked node.
        node: String,
    },
    /// Name in use.
    #[error(
        "node name {0:?} is held by a live node: it is free once that node leaves, \
         is forgotten, or has been out of touch for {minutes} minutes; to take it over now, \
         make a token with `ca-admin token create --node {0} --replace`",
        minutes = ABSENT_AFTER_MS / 60_000
    )]
    NodeNameTaken(String),
    /// Address in use.
    #[error(
        "address {address} is held by live node {holder:?}: it is free once that node leaves, \
         is forgotten, or has been out of touch for {minutes} minutes",
        minutes = ABSENT_AFTER_MS / 60_000
    )]
    AddressTaken {
        /// Address asked for.
        address: String,
        /// Who holds it.
        holder: String,
    },
    /// Leaf key too old.
    #[error("the leaf key is older than one leaf life: ask again with a new key")]
    KeyTooOld,
    /// Leaf key revoked.
    #[error("the leaf key is revoked: ask again with a new key")]
    KeyRevoked,
    /// CSR of no use.
    #[error("certificate request refused: {0}")]
    CsrInvalid(String),
    /// Name refused.
    #[error("{0}")]
    NameNotAllowed(String),
    /// Address refused.
    #[error("{0}")]
    AddressNotAllowed(String),
    /// Key refused.
    #[error("the key is not an elliptic-curve key on P-256, the one kind that is certified here")]
    KeyNotAllowed,
    /// Request out of bounds.
    #[error("{0}")]
    RequestInvalid(String),
    /// No such identity.
    #[error("this identity is not known here: enrol again with a new join file")]
    IdentityUnknown,
    /// Retired identity.
    #[error(
        "this identity was retired by a newer one: if this node was restored from a copy, \
         enrol again; if not, somebody else holds its newer identity"
    )]
    IdentityReused,
    /// Node revoked.
    #[error("node {node:?} is revoked: {reason}")]
    Revoked {
        /// The node.
        node: String,
        /// The operator's words.
        reason: String,
    },
    /// Node gone.
    #[error("node {0:?} has left its cluster: enrol again with a new join file")]
    NodeLeft(String),
    /// A newer call took over.
    #[error("a newer call of this node took this one's place")]
    Superseded,
    /// The commit found other things than the plan.
    #[error("{0} changed while the certificate was signed: ask again")]
    RaceLost(&'static str),
    /// Role too low.
    #[error("{actor} is {has} here; this call wants {wants}")]
    RoleTooLow {
        /// The caller.
        actor: String,
        /// What it is.
        has: String,
        /// What it would have to be.
        wants: &'static str,
    },
    /// Nothing of that name.
    #[error("there is no {what} {name:?}")]
    NotFound {
        /// Kind of thing.
        what: &'static str,
        /// Its name.
        name: String,
    },
    /// No such certificate.
    #[error("there is no certificate with serial {0}")]
    CertificateNotFound(Serial),
    /// Something of that name is there.
    #[error("{what} {name:?} exists already")]
    AlreadyExists {
        /// Kind of thing.
        what: &'static str,
        /// Its name.
        name: String,
    },
    /// A revoked node cannot be forgotten yet.
    #[error(
        "node {node:?} is revoked and a Ray leaf of it is valid until {until}: \
         forgetting it before would let it back in; try again then"
    )]
    LeafStillLives {
        /// The node.
        node: String,
        /// RFC 3339.
        until: String,
    },
    /// A setting that cannot hold.
    #[error("{0}")]
    SettingInvalid(String),
    /// Too many.
    #[error("too many requests: {what}; try again in {} s", retry_after.as_secs())]
    RateLimited {
        /// The limit that was reached.
        what: &'static str,
        /// When to try again.
        retry_after: Duration,
    },
    /// Only Sync is answered.
    #[error(
        "this CA was restored from a backup and serves again once an operator has run `ca-admin \
         restore accept`"
    )]
    CaRestored,
    /// No commit.
    #[error("the CA cannot commit to its store now")]
    StoreUnavailable,
    /// A fault of ours.
    #[error("the CA failed; its log has the details")]
    Internal,
}

impl Refusal {
    /// The word for it.
    #[must_use]
    pub fn reason(&self) -> Reason {
        match self {
            Self::TokenUnknown => Reason::TokenUnknown,
            Self::TokenExpired => Reason::TokenExpired,
            Self::TokenRevoked => Reason::TokenRevoked,
            Self::TokenSpent(_) => Reason::TokenSpent,
            Self::TokenClusterMismatch(_) => Reason::TokenClusterMismatch,
            Self::TokenRoleMismatch { .. } => Reason::TokenRoleMismatch,
            Self::TokenNodeMismatch(_) => Reason::TokenNodeMismatch,
            Self::ClusterEnded(_) => Reason::ClusterEnded,
            Self::AddressBlocked { .. } => Reason::AddressBlocked,
            Self::NodeNameTaken(_) => Reason::NodeNameTaken,
            Self::AddressTaken { .. } => Reason::AddressTaken,
            Self::KeyTooOld => Reason::KeyTooOld,
            Self::KeyRevoked => Reason::KeyRevoked,
            Self::CsrInvalid(_) => Reason::CsrInvalid,
            Self::NameNotAllowed(_) => Reason::NameNotAllowed,
            Self::AddressNotAllowed(_) => Reason::AddressNotAllowed,
            Self::KeyNotAllowed => Reason::KeyNotAllowed,
            Self::RequestInvalid(_) => Reason::RequestInvalid,
            Self::IdentityUnknown => Reason::IdentityUnknown,
            Self::IdentityReused => Reason::IdentityReused,
            Self::Revoked { .. } => Reason::Revoked,
            Self::NodeLeft(_) => Reason::NodeLeft,
            Self::Superseded => Reason::Superseded,
            Self::RaceLost(_) => Reason::RaceLost,
            Self::RoleTooLow { .. } => Reason::RoleTooLow,
            Self::NotFound { .. } | Self::CertificateNotFound(_) => Reason::NotFound,
            Self::AlreadyExists { .. } => Reason::AlreadyExists,
            Self::LeafStillLives { .. } => Reason::LeafStillLives,
            Self::SettingInvalid(_) => Reason::SettingInvalid,
            Self::RateLimited { .. } => Reason::RateLimited,
            Self::CaRestored => Reason::CaRestored,
            Self::StoreUnavailable => Reason::StoreUnavailable,
            Self::Internal => Reason::Internal,
        }
    }

    /// As it goes to the caller.
    #[must_use]
    pub fn status(&self) -> Status {
        let retry_after = if let Self::RateLimited { retry_after, .. } = self {
            Some(*retry_after)
        } else {
            None
        };
        self.reason().status(&self.to_string(), retry_after)
    }
}
