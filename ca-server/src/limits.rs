//! How often the CA lets itself be asked: enrolments by source address, by token and in all, wrong
//! tokens by source address, certificates and Syncs by node. Memory is fixed when the server starts.
//!
//! Nothing here can be used up by those who may not come in, except their own share:
//! - A wrong token costs its *address* one of very few wrong tokens. Once they are used up, whoever
//!   sends a wrong one from there is told to come later; a good one is let in all the same. What a wrong
//!   token costs the CA is a hash and one look at the store, less than the call it came in.
//! - A good token costs its *address* an enrolment, before anything else is looked up.
//! - Once the request's signature is proved, it costs its *token* one, and then *all* one. A token has
//!   half of what there is in all, so that whoever holds one leaves as much to the others.
//! - Certificates and Syncs are counted by *node*, for an identity in force. A retired, revoked or
//!   unknown one has a count of its own, by its serial, and spends nothing of the node's.
//!
//! An IPv6 address counts as its /64. Whoever has a large network can fill the counts by address with
//! wrong tokens, and can do no more by that than have others' wrong tokens called too many. Behind a
//! balancer without the PROXY protocol all callers are one address; then the limits by address are the
//! limits in all.
//!
//! What this does not do: bound connections and handshakes (`crowd` does), or outlive a restart.

pub mod quiet;
mod sketch;

use std::{
    fmt,
    net::{IpAddr, Ipv6Addr},
    time::Duration,
};

use raymtls_proto::{serial::Serial, token::TokenId};
use serde::Deserialize;

use self::sketch::Sketch;
use crate::{refusal::Refusal, store::Caller};

/// Highest value of a limit.
const LIMIT_MAX: u32 = 1_000_000;
const MINUTE_US: u64 = 60_000_000;
/// A refused caller is told to wait at least this long: what is free sooner is not worth the call.
const RETRY_AFTER_MIN: Duration = Duration::from_secs(1);

/// The `[limits]` table of the configuration. A burst is what may come at once after a pause; the
/// rate is what grows back.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Enrolments with a good token from one address.
    pub enrolments_per_address_per_minute: u32,
    /// The same at once.
    pub enrolments_per_address_burst: u32,
    /// Wrong tokens from one address; past them a wrong one is told to come later.
    pub wrong_tokens_per_address_per_minute: u32,
    /// Wrong tokens from one address at once.
    pub wrong_tokens_per_address_burst: u32,
    /// Enrolments with one token.
    pub enrolments_per_token_per_minute: u32,
    /// Enrolments with one token at once.
    pub enrolments_per_token_burst: u32,
    /// Enrolments with a good token, in all.
    pub enrolments_per_minute: u32,
    /// Enrolments with a good token at once.
    pub enrolments_burst: u32,
    /// Identities and leaves of one node.
    pub certificates_per_node_per_minute: u32,
    /// Identities and leaves of one node at once.
    pub certificates_per_node_burst: u32,
    /// Syncs of one node: a handful, and one more for each change.
    pub syncs_per_node_per_minute: u32,
    /// Syncs of one node at once.
    pub syncs_per_node_burst: u32,
    /// Connections of one address to the enrolment listener.
    pub enrollment_connections_per_address: u32,
    /// Connections of one address that are not through their handshake, on each listener.
    pub handshakes_per_address: u32,
}

impl Default for Limits {
    /// A thousand nodes behind one address join within a minute; an array of three thousand jobs on
    /// hosts of their own starts at once.
    fn default() -> Self {
        Self {
            enrolments_per_address_per_minute: 1_000,
            enrolments_per_address_burst: 1_000,
            wrong_tokens_per_address_per_minute: 20,
            wrong_tokens_per_address_burst: 30,
            enrolments_per_token_per_minute: 6_000,
            enrolments_per_token_burst: 3_000,
            enrolments_per_minute: 12_000,
            enrolments_burst: 6_000,
            certificates_per_node_per_minute: 30,
            certificates_per_node_burst: 120,
            syncs_per_node_per_minute: 60,
            syncs_per_node_burst: 30,
            enrollment_connections_per_address: 2_048,
            handshakes_per_address: 1_024,
        }
    }
}

impl Limits {
    /// As good as none: for programs that measure something else.
    #[must_use]
    pub fn highest() -> Self {
        Self {
            enrolments_per_address_per_minute: LIMIT_MAX,
            enrolments_per_address_burst: LIMIT_MAX,
            wrong_tokens_per_address_per_minute: LIMIT_MAX,
            wrong_tokens_per_address_burst: LIMIT_MAX,
            enrolments_per_token_per_minute: LIMIT_MAX,
            enrolments_per_token_burst: LIMIT_MAX,
            enrolments_per_minute: LIMIT_MAX,
            enrolments_burst: LIMIT_MAX,
            certificates_per_node_per_minute: LIMIT_MAX,
            certificates_per_node_burst: LIMIT_MAX,
            syncs_per_node_per_minute: LIMIT_MAX,
            syncs_per_node_burst: LIMIT_MAX,
            enrollment_connections_per_address: LIMIT_MAX,
            handshakes_per_address: LIMIT_MAX,
        }
    }

    /// The first key whose value cannot hold, in words.
    ///
    /// # Errors
    /// The key, the value and the bounds.
    pub fn check(&self) -> Result<(), String> {
        let bad = self.table().into_iter().find(|(_, value)| !(1..=LIMIT_MAX).contains(value));
        match bad {
            None => Ok(()),
            Some((key, value)) => {
                Err(format!("limits.{key} = {value}: a limit lies between 1 and {LIMIT_MAX}"))
            }
        }
    }

    /// Keys and values, as the configuration has them.
    #[must_use]
    pub fn table(&self) -> [(&'static str, u32); 14] {
        [
            ("enrolments_per_address_per_minute", self.enrolments_per_address_per_minute),
            ("enrolments_per_address_burst", self.enrolments_per_address_burst),
            ("wrong_tokens_per_address_per_minute", self.wrong_tokens_per_address_per_minute),
            ("wrong_tokens_per_address_burst", self.wrong_tokens_per_address_burst),
            ("enrolments_per_token_per_minute", self.enrolments_per_token_per_minute),
            ("enrolments_per_token_burst", self.enrolments_per_token_burst),
            ("enrolments_per_minute", self.enrolments_per_minute),
            ("enrolments_burst", self.enrolments_burst),
            ("certificates_per_node_per_minute", self.certificates_per_node_per_minute),
            ("certificates_per_node_burst", self.certificates_per_node_burst),
            ("syncs_per_node_per_minute", self.syncs_per_node_per_minute),
            ("syncs_per_node_burst", self.syncs_per_node_burst),
            ("enrollment_connections_per_address", self.enrollment_connections_per_address),
            ("handshakes_per_address", self.handshakes_per_address),
        ]
    }
}

/// Whom an address counts as: itself, or for IPv6 its /64.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AddressKey(IpAddr);

impl AddressKey {
    /// The key of an address in any form.
    #[must_use]
    pub fn of(address: IpAddr) -> Self {
        match address.to_canonical() {
            IpAddr::V4(v4) => Self(v4.into()),
            IpAddr::V6(v6) => {
                let network = u128::from(v6) & (u128::MAX << 64);
                Self(Ipv6Addr::from(network).into())
            }
        }
    }
}

/// What has been asked lately, and what may still be.
#[derive(Debug)]
pub struct Limiter {
    enrolments_by_address: Sketch<AddressKey>,
    wrong_tokens_by_address: Sketch<AddressKey>,
    enrolments_by_token: Sketch<TokenId>,
    enrolments: Sketch<()>,
    certificates_by_node: Sketch<(String, String)>,
    syncs_by_node: Sketch<(String, String)>,
    strays_by_serial: Sketch<Serial>,
}

impl Default for Limiter {
    fn default() -> Self {
        Self::new(&Limits::default())
    }
}

/// What a node asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodeCall {
    /// An identity or a leaf.
    Certificate,
    /// What is new.
    Sync,
    /// To go: once, and nothing comes after it.
    Leave,
}

impl Limiter {
    /// Everything is still allowed.
    #[must_use]
    pub fn new(limits: &Limits) -> Self {
        let rate = Rate::new;
        let address =
            rate(limits.enrolments_per_address_per_minute, limits.enrolments_per_address_burst);
        let wrong =
            rate(limits.wrong_tokens_per_address_per_minute, limits.wrong_tokens_per_address_burst);
        let token = rate(limits.enrolments_per_token_per_minute, limits.enrolments_per_token_burst);
        let in_all = rate(limits.enrolments_per_minute, limits.enrolments_burst);
        let certificates =
            rate(limits.certificates_per_node_per_minute, limits.certificates_per_node_burst);
        let syncs = rate(limits.syncs_per_node_per_minute, limits.syncs_per_node_burst);
        Self {
            enrolments_by_address: Sketch::of_many(address),
            wrong_tokens_by_address: Sketch::of_many(wrong),
            enrolments_by_token: Sketch::of_many(token),
            enrolments: Sketch::of_one(in_all),
            certificates_by_node: Sketch::of_many(certificates),
            syncs_by_node: Sketch::of_many(syncs),
            strays_by_serial: Sketch::of_many(syncs),
        }
    }

    /// The token that came from the address was wrong.
    ///
    /// # Errors
    /// `RateLimited`, which is then the answer: so were too many before.
    pub fn wrong_token(&self, elapsed: Duration, address: IpAddr) -> Result<(), Refusal> {
        let key = AddressKey::of(address);
        refuse("wrong tokens from this address", self.wrong_tokens_by_address.take(elapsed, &key))
    }

    /// Somebody at the address has a good token and wants to enrol.
    ///
    /// # Errors
    /// `RateLimited`.
    pub fn attempt(&self, elapsed: Duration, address: IpAddr) -> Result<(), Refusal> {
        let key = AddressKey::of(address);
        refuse("enrolments from this address", self.enrolments_by_address.take(elapsed, &key))
    }

    /// Somebody with a good token and a proved key is about to be enrolled.
    ///
    /// # Errors
    /// `RateLimited`.
    pub fn enrolment(&self, elapsed: Duration, token: &TokenId) -> Result<(), Refusal> {
        refuse("enrolments with this token", self.enrolments_by_token.take(elapsed, token))?;
        refuse("enrolments in all", self.enrolments.take(elapsed, &()))
    }

    /// A node calls, with an identity that is in force.
    ///
    /// # Errors
    /// `RateLimited`.
    pub fn node_call(
        &self,
        elapsed: Duration,
        call: NodeCall,
        caller: &Caller,
    ) -> Result<(), Refusal> {
        let key = || (caller.cluster.to_string(), caller.node.to_string());
        match call {
            NodeCall::Certificate => {
                let wait = self.certificates_by_node.take(elapsed, &key());
                refuse("certificates of this node", wait)
            }
            NodeCall::Sync => {
                refuse("Syncs of this node", self.syncs_by_node.take(elapsed, &key()))
            }
            NodeCall::Leave => Ok(()),
        }
    }

    /// Somebody calls with an identity that is not in force.
    ///
    /// # Errors
    /// `RateLimited`.
    pub fn stray(&self, elapsed: Duration, caller: &Caller) -> Result<(), Refusal> {
        let wait = self.strays_by_serial.take(elapsed, &caller.serial);
        refuse("calls with an identity that is not in force", wait)
    }
}

/// How long until one more is allowed, where none is now.
type Wait = Option<Duration>;

fn refuse(what: &'static str, wait: Wait) -> Result<(), Refusal> {
    match wait {
        None => Ok(()),
        Some(wait) => {
            // Whole seconds: the text says what RetryInfo says.
            let whole = Duration::from_secs(wait.as_micros().div_ceil(1_000_000) as u64);
            Err(Refusal::RateLimited { what, retry_after: whole.max(RETRY_AFTER_MIN) })
        }
    }
}

/// So many at once, so many a minute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Rate {
    /// In which one grows back.
    period_us: u64,
    burst: u64,
}

impl Rate {
    fn new(per_minute: u32, burst: u32) -> Self {
        let period_us = MINUTE_US / u64::from(per_minute.max(1));
        Self { period_us, burst: u64::from(burst.max(1)) }
    }

    /// In which everything grows back.
    fn full_us(self) -> u64 {
        self.period_us * self.burst
    }
}

impl fmt::Display for AddressKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            IpAddr::V4(v4) => v4.fmt(f),
            IpAddr::V6(v6) => write!(f, "{v6}/64"),
        }
    }
}

#[cfg(test)]
mod tests;
