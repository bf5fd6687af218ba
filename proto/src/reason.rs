//! Why the CA says no, and what an agent does about it: one word each, one table.

use std::{collections::HashMap, time::Duration};

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

/// `ErrorInfo.domain` of every refusal.
const DOMAIN: &str = "raymtls.v1";

/// What an agent does about a refusal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reaction {
    /// Try again, with backoff or when the server says.
    Retry,
    /// The identity is worth nothing any more: enrol again with a new token.
    Reenrol,
    /// Ask again with a new key, in a new key folder.
    NewKeyFolder,
    /// Nothing the agent can do helps; an operator must.
    Stop,
}

impl Reaction {
    /// Every reaction.
    pub const ALL: &'static [Self] = &[Self::Retry, Self::NewKeyFolder, Self::Reenrol, Self::Stop];

    /// Its name in the documents.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Retry => "retry",
            Self::NewKeyFolder => "new key folder",
            Self::Reenrol => "re-enrol",
            Self::Stop => "stop",
        }
    }

    /// In words, for a person.
    #[must_use]
    pub fn in_words(self) -> &'static str {
        match self {
            Self::Retry => {
                "it tries again: after the time the CA names, else with growing pauses of at most a \
                 minute; `node-agent enroll` does so until its `--timeout`"
            }
            Self::NewKeyFolder => {
                "the daemon makes a new key in a new key folder; the old one stays while it is valid"
            }
            Self::Reenrol => {
                "the daemon renews nothing, deletes nothing and asks every ten minutes whether it is \
                 served again; an operator enrols the host again"
            }
            Self::Stop => {
                "trying again as it is does not help; the daemon deletes nothing and asks again each \
                 minute, since an operator may have put it right; a command ends with exit code 2"
            }
        }
    }
}

macro_rules! reasons {
    ($($(#[doc = $doc:literal])+ $variant:ident = $word:literal, $code:ident, $reaction:ident;)+) => {
        /// A reason word. The word travels in `google.rpc.ErrorInfo`.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Reason {
            $($(#[doc = $doc])+ $variant,)+
        }

        impl Reason {
            /// Every reason, in the order of the table.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// The word on the wire and in logs.
            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word),+ }
            }

            /// The gRPC code it travels with.
            #[must_use]
            pub fn code(self) -> Code {
                match self { $(Self::$variant => Code::$code),+ }
            }

            /// What an agent does about it.
            #[must_use]
            pub fn reaction(self) -> Reaction {
                match self { $(Self::$variant => Reaction::$reaction),+ }
            }

            /// What it means, in a sentence.
            #[must_use]
            pub fn meaning(self) -> &'static str {
                match self { $(Self::$variant => concat!($($doc),+).trim_ascii()),+ }
            }

            fn from_word(word: &str) -> Option<Self> {
                match word { $($word => Some(Self::$variant),)+ _ => None }
            }
        }
    };
}

reasons! {
    /// No such token, or the secret is wrong: the two are not told apart.
    TokenUnknown = "TOKEN_UNKNOWN", Unauthenticated, Stop;
    /// Past its time.
    TokenExpired = "TOKEN_EXPIRED", Unauthenticated, Stop;
    /// Revoked by an operator.
    TokenRevoked = "TOKEN_REVOKED", Unauthenticated, Stop;
    /// All uses are spent by other keys.
    TokenSpent = "TOKEN_SPENT", Unauthenticated, Stop;
    /// For other node names.
    TokenNodeMismatch = "TOKEN_NODE_MISMATCH", PermissionDenied, Stop;
    /// For another role.
    TokenRoleMismatch = "TOKEN_ROLE_MISMATCH", PermissionDenied, Stop;
    /// For another cluster.
    TokenClusterMismatch = "TOKEN_CLUSTER_MISMATCH", PermissionDenied, Stop;
    /// The ephemeral cluster is over.
    ClusterEnded = "CLUSTER_ENDED", PermissionDenied, Stop;
    /// A revocation newer than the token blocks the address.
    AddressBlocked = "ADDRESS_BLOCKED", PermissionDenied, Stop;
    /// Another live node holds the name.
    NodeNameTaken = "NODE_NAME_TAKEN", FailedPrecondition, Retry;
    /// Another live node holds the address.
    AddressTaken = "ADDRESS_TAKEN", FailedPrecondition, Retry;
    /// The leaf key is older than one leaf life.
    KeyTooOld = "KEY_TOO_OLD", FailedPrecondition, NewKeyFolder;
    /// An operator revoked the leaf key.
    KeyRevoked = "KEY_REVOKED", FailedPrecondition, NewKeyFolder;
    /// Unparsable, badly signed, or asking for something.
    CsrInvalid = "CSR_INVALID", InvalidArgument, Stop;
    /// A name of no valid form, or none the token or the node allows.
    NameNotAllowed = "NAME_NOT_ALLOWED", InvalidArgument, Stop;
    /// An address of no valid form, or none the token or the node allows.
    AddressNotAllowed = "ADDRESS_NOT_ALLOWED", InvalidArgument, Stop;
    /// Not a P-256 key.
    KeyNotAllowed = "KEY_NOT_ALLOWED", InvalidArgument, Stop;
    /// A field of the request is missing or out of its bounds.
    RequestInvalid = "REQUEST_INVALID", InvalidArgument, Stop;
    /// No such identity.
    IdentityUnknown = "IDENTITY_UNKNOWN", Unauthenticated, Reenrol;
    /// A retired identity was used again.
    IdentityReused = "IDENTITY_REUSED", Unauthenticated, Reenrol;
    /// The node or certificate is revoked.
    Revoked = "REVOKED", PermissionDenied, Stop;
    /// The node has left.
    NodeLeft = "NODE_LEFT", PermissionDenied, Reenrol;
    /// A newer call of the same identity took this one's place.
    Superseded = "SUPERSEDED", Aborted, Retry;
    /// What was true before signing no longer was at the commit: ask again.
    RaceLost = "RACE_LOST", Aborted, Retry;
    /// The caller's role does not allow it.
    RoleTooLow = "ROLE_TOO_LOW", PermissionDenied, Stop;
    /// Nothing of that name.
    NotFound = "NOT_FOUND", NotFound, Stop;
    /// Something of that name is there.
    AlreadyExists = "ALREADY_EXISTS", AlreadyExists, Stop;
    /// A leaf of the node still lives, so the act must wait.
    LeafStillLives = "LEAF_STILL_LIVES", FailedPrecondition, Stop;
    /// The setting cannot hold.
    SettingInvalid = "SETTING_INVALID", InvalidArgument, Stop;
    /// Too many requests.
    RateLimited = "RATE_LIMITED", ResourceExhausted, Retry;
    /// The CA was restored from a backup, and an operator has not accepted that yet.
    CaRestored = "CA_RESTORED", Unavailable, Retry;
    /// The store cannot commit.
    StoreUnavailable = "STORE_UNAVAILABLE", Unavailable, Retry;
    /// A fault of the CA's own; the details are in its log.
    Internal = "INTERNAL", Internal, Retry;
}

impl Reason {
    /// What an operator does next. The CA's own sentence, which travels with the word, names the
    /// node, the address or the limit; this is what remains to be said for every case of it.
    #[must_use]
    pub fn next_step(self) -> &'static str {
        match self {
            Self::TokenUnknown => {
                "check that the join file is of this CA and whole, or make a new one with \
                 `ca-admin token create`"
            }
            Self::TokenExpired | Self::TokenRevoked | Self::TokenSpent => {
                "make a new join file with `ca-admin token create`"
            }
            Self::TokenNodeMismatch => {
                "give `node-agent enroll` a `--name` the token allows, or make a token for this \
                 name with `--node`"
            }
            Self::TokenRoleMismatch => {
                "give `node-agent enroll` the `--role` of the token, or make a token of the other \
                 role"
            }
            Self::TokenClusterMismatch => {
                "the join file names another cluster than its token is for: make a new one, and do \
                 not edit it"
            }
            Self::ClusterEnded => "make a new cluster with `ca-admin cluster create`",
            Self::AddressBlocked => {
                "if the address is another machine's by now, make a token after the revocation; \
                 such a token may certify it"
            }
            Self::NodeNameTaken => {
                "wait until the holder is absent, let it leave, or forget it with `ca-admin node \
                 forget`; `ca-admin token create --replace` takes one exact name over from a live \
                 holder"
            }
            Self::AddressTaken => {
                "wait until the holder is absent, let it leave, or forget it with `ca-admin node \
                 forget`; nodes that share a host's address want `--shared-address`"
            }
            Self::KeyTooOld => "nothing: what starts next serves the new key",
            Self::KeyRevoked => {
                "start again what still serves the old key: Ray accepts it until its leaf ends"
            }
            Self::CsrInvalid | Self::KeyNotAllowed => {
                "use `node-agent` of this release; a request made by another program must hold a \
                 P-256 key, an empty subject and no extension"
            }
            Self::NameNotAllowed => {
                "use a name of the form the sentence gives, or make a token that allows it with \
                 `--dns`"
            }
            Self::AddressNotAllowed => {
                "make a token whose `--addresses` hold the address, and enrol again"
            }
            Self::RequestInvalid => {
                "compare the releases of the CA and of the caller; upgrade the CA first"
            }
            Self::IdentityUnknown => {
                "enrol the host again with a new join file; if every node says so, the CA's state \
                 is another one than before"
            }
            Self::IdentityReused => {
                "if the host was restored from a copy, enrol it again; if not, somebody else holds \
                 its identity: revoke the node"
            }
            Self::Revoked => {
                "if it was meant, take the host off the network; if not, take the node back with \
                 `ca-admin node reinstate` and enrol it again with a new token"
            }
            Self::NodeLeft => "enrol the host again with a new join file, if it is to come back",
            Self::Superseded => {
                "nothing for a single time; if it goes on, two agents run with one identity: stop \
                 the copy"
            }
            Self::RaceLost => "nothing: the next try decides anew",
            Self::RoleTooLow => {
                "let root on the CA's host do it; `operator_group` gives the role of operator alone"
            }
            Self::NotFound => "look the name up with the `list` of its kind",
            Self::AlreadyExists => "use what is there, or take another name",
            Self::LeafStillLives => {
                "wait until the moment it names, or take the node back with `ca-admin node reinstate`"
            }
            Self::SettingInvalid => {
                "put the value right; `ca-admin cluster set --dry-run` tries it"
            }
            Self::RateLimited => {
                "nothing for a single time; if it goes on, look for a host that enrols or renews \
                 without end"
            }
            Self::CaRestored => {
                "look at `ca-admin restore show`, and accept it with `ca-admin restore accept` once the \
                 nodes have called"
            }
            Self::StoreUnavailable => {
                "look at the CA's log and disk: it exits when a write fails, and its service starts \
                 it anew"
            }
            Self::Internal => "read the CA's log of that moment and report it",
        }
    }

    /// The gRPC status for this reason. `message` is for a person: what, why, and what to do next.
    #[must_use]
    pub fn status(self, message: &str, retry_after: Option<Duration>) -> Status {
        let mut details = ErrorDetails::with_error_info(self.as_str(), DOMAIN, HashMap::new());
        if retry_after.is_some() {
            details.set_retry_info(retry_after);
        }
        Status::with_error_details(self.code(), message, details)
    }

    /// The reason in a status. `None`: not a refusal of the CA, or a word of a newer one; either
    /// way an agent retries.
    #[must_use]
    pub fn of(status: &Status) -> Option<Self> {
        let info = status.get_details_error_info()?;
        (info.domain == DOMAIN).then(|| Self::from_word(&info.reason)).flatten()
    }
}

/// What an agent does about any failed call.
#[must_use]
pub fn reaction(status: &Status) -> Reaction {
    Reason::of(status).map_or(Reaction::Retry, Reason::reaction)
}

/// How long the server asks the caller to wait, at most an hour.
#[must_use]
pub fn retry_after(status: &Status) -> Option<Duration> {
    const RETRY_AFTER_MAX: Duration = Duration::from_secs(3_600);
    let delay = status.get_details_retry_info()?.retry_delay?;
    Some(delay.min(RETRY_AFTER_MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_survives_the_wire() {
        for reason in Reason::ALL {
            let status = reason.status("text", Some(Duration::from_secs(7)));
            assert_eq!(Reason::of(&status), Some(*reason));
            assert_eq!(status.code(), reason.code());
            assert_eq!(retry_after(&status), Some(Duration::from_secs(7)));
        }
    }

    #[test]
    fn an_unknown_word_means_retry() {
        let details = ErrorDetails::with_error_info("SOMETHING_NEW", DOMAIN, HashMap::new());
        let status = Status::with_error_details(Code::PermissionDenied, "no", details);
        assert_eq!(reaction(&status), Reaction::Retry);
        assert_eq!(reaction(&Status::permission_denied("a proxy says no")), Reaction::Retry);
    }

    #[test]
    fn a_word_of_another_domain_is_not_ours() {
        let details = ErrorDetails::with_error_info("REVOKED", "example.com", HashMap::new());
        let status = Status::with_error_details(Code::PermissionDenied, "no", details);
        assert_eq!(Reason::of(&status), None);
    }
}
