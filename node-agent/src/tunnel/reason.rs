//! Why a flow was refused: one word, the same in the log, in the status and, as a number, on the wire.

use std::fmt;

use serde::{Deserialize, Serialize};
use thiserror::Error;

macro_rules! reasons {
    ($($(#[$doc:meta])* $variant:ident = $code:literal, $word:literal;)+) => {
        /// Why a flow was refused, or cut.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(rename_all = "snake_case")]
        pub enum Reason {
            $($(#[$doc])* $variant,)+
        }

        impl Reason {
            /// All of them.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// The word in logs and status.
            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word,)+ }
            }

            /// The number on the wire; never zero, which means connected.
            #[must_use]
            pub fn code(self) -> u8 {
                match self { $(Self::$variant => $code,)+ }
            }

            /// `None` for a number of a newer release.
            #[must_use]
            pub fn from_code(code: u8) -> Option<Self> {
                match code { $($code => Some(Self::$variant),)+ _ => None }
            }
        }
    };
}

reasons! {
    /// The address, or the name in the leaf, is no member's.
    NotAMember = 1, "not_a_member";
    /// The leaf is another node's than the one at this address.
    AddressMismatch = 2, "address_mismatch";
    /// The address is blocked.
    Blocked = 3, "blocked";
    /// The leaf is on a CRL.
    Revoked = 4, "revoked";
    /// The leaf's time is over.
    Expired = 5, "expired";
    /// The leaf's time has not come.
    NotYetValid = 6, "not_yet_valid";
    /// The chain ends at no root of this cluster.
    UnknownIssuer = 7, "unknown_issuer";
    /// The leaf names no node of ours, or may not be used so.
    WrongName = 8, "wrong_name";
    /// The leaf is of another cluster.
    WrongCluster = 9, "wrong_cluster";
    /// The port is none that members may reach.
    PortClosed = 10, "port_closed";
    /// Nothing listens at the port.
    NoListener = 11, "no_listener";
    /// The header is not of this protocol.
    BadHeader = 12, "bad_header";
    /// The peer took too long.
    TooSlow = 13, "too_slow";
    /// The peer showed no certificate.
    NoCertificate = 14, "no_certificate";
    /// The peer does not speak this TLS.
    NoTls = 15, "no_tls";
    /// A bound is reached.
    TooMany = 16, "too_many";
    /// The connection was not redirected here.
    NotCaptured = 17, "not_captured";
    /// The other node's `ray-tunnel` cannot be reached.
    Unreachable = 18, "unreachable";
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A flow that was refused: the word, and what a person needs besides.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{reason}: {why}")]
pub struct Refused {
    /// The word.
    pub reason: Reason,
    /// What was found, and what is wrong with it.
    pub why: String,
}

impl Refused {
    /// For this reason.
    #[must_use]
    pub fn new(reason: Reason, why: impl Into<String>) -> Self {
        Self { reason, why: why.into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_has_one_word_and_one_number_everywhere() {
        for reason in Reason::ALL {
            assert_eq!(Reason::from_code(reason.code()), Some(*reason));
            assert_eq!(serde_json::to_value(reason).unwrap(), reason.as_str());
        }
        assert_eq!(Reason::from_code(0), None);
        assert_eq!(Reason::from_code(200), None);
    }
}
