//! How often the CA lets itself be asked: enrolments by source address, wrong tokens by source
//! address, enrolments in all, certificates by node. Memory is fixed when the server starts.
//!
//! Nothing here can be filled by those who may not come in, except their own share:
//! - An attempt to enrol costs its *address* one attempt, right after the request was decoded and
//!   before anything is looked up.
//! - A wrong token costs its *address* one of very few wrong tokens. Once they are used up, every
//!   enrolment from that address is refused until they grow back; other addresses do not notice.
//! - The limit of enrolments *in all* is drawn on once the token has proved to be good, and before the
//!   request's signature is verified. Whoever has no token spends none of it, from however many
//!   addresses: a wrong one costs a hash and a look-up, less than the handshake before it.
//! - Certificates of a node are counted by its identity, so that one node's zeal is its own.
//!
//! An IPv6 address counts as its /64: a host has a whole one. Behind a balancer without the PROXY
//! protocol all callers are one address; then the limits by address are the limits in all.
//!
//! What this does not do: bound connections and handshakes (`crowd` does), or outlive a restart.

mod sketch;

use std::{
    fmt,
    net::{IpAddr, Ipv6Addr},
    time::Duration,
};

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
    /// Enrolments from one address.
    pub enrolments_per_address_per_minute: u32,
    /// Enrolments from one address at once.
    pub enrolments_per_address_burst: u32,
    /// Wrong tokens from one address; past them nothing from there is let in.
    pub wrong_tokens_per_address_per_minute: u32,
    /// Wrong tokens from one address at once.
    pub wrong_tokens_per_address_burst: u32,
    /// Enrolments with a good token, in all.
    pub enrolments_per_minute: u32,
    /// Enrolments with a good token at once.
    pub enrolments_burst: u32,
    /// Identities and leaves of one node.
    pub certificates_per_node_per_minute: u32,
    /// Identities and leaves of one node at once.
    pub certificates_per_node_burst: u32,
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
            enrolments_per_minute: 6_000,
            enrolments_burst: 3_000,
            certificates_per_node_per_minute: 30,
            certificates_per_node_burst: 120,
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
            enrolments_per_minute: LIMIT_MAX,
            enrolments_burst: LIMIT_MAX,
            certificates_per_node_per_minute: LIMIT_MAX,
            certificates_per_node_burst: LIMIT_MAX,
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
    pub fn table(&self) -> [(&'static str, u32); 10] {
        [
            ("enrolments_per_address_per_minute", self.enrolments_per_address_per_minute),
            ("enrolments_per_address_burst", self.enrolments_per_address_burst),
            ("wrong_tokens_per_address_per_minute", self.wrong_tokens_per_address_per_minute),
            ("wrong_tokens_per_address_burst", self.wrong_tokens_per_address_burst),
            ("enrolments_per_minute", self.enrolments_per_minute),
            ("enrolments_burst", self.enrolments_burst),
            ("certificates_per_node_per_minute", self.certificates_per_node_per_minute),
            ("certificates_per_node_burst", self.certificates_per_node_burst),
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
    enrolments: Sketch<()>,
    certificates_by_node: Sketch<(String, String)>,
}

impl Default for Limiter {
    fn default() -> Self {
        Self::new(&Limits::default())
    }
}

impl Limiter {
    /// Everything is still allowed.
    #[must_use]
    pub fn new(limits: &Limits) -> Self {
        let rate = Rate::new;
        let per_address =
            rate(limits.enrolments_per_address_per_minute, limits.enrolments_per_address_burst);
        let wrong =
            rate(limits.wrong_tokens_per_address_per_minute, limits.wrong_tokens_per_address_burst);
        let in_all = rate(limits.enrolments_per_minute, limits.enrolments_burst);
        let per_node =
            rate(limits.certificates_per_node_per_minute, limits.certificates_per_node_burst);
        Self {
            enrolments_by_address: Sketch::of_many(per_address),
            wrong_tokens_by_address: Sketch::of_many(wrong),
            enrolments: Sketch::of_one(in_all),
            certificates_by_node: Sketch::of_many(per_node),
        }
    }

    /// Somebody at the address wants to enrol.
    ///
    /// # Errors
    /// `RateLimited`: too many attempts, or too many wrong tokens before.
    pub fn attempt(&self, elapsed: Duration, address: IpAddr) -> Result<(), Refusal> {
        let key = AddressKey::of(address);
        refuse("wrong tokens from this address", self.wrong_tokens_by_address.look(elapsed, &key))?;
        refuse("enrolments from this address", self.enrolments_by_address.take(elapsed, &key))
    }

    /// The token that came from the address was wrong. Calls that are in flight at this moment were
    /// let in before; how many those can be is bounded by the connections of an address.
    pub fn wrong_token(&self, elapsed: Duration, address: IpAddr) {
        // Who asks next is refused; this one has its answer already.
        let _ = self.wrong_tokens_by_address.take(elapsed, &AddressKey::of(address));
    }

    /// Somebody with a good token is about to be enrolled.
    ///
    /// # Errors
    /// `RateLimited`.
    pub fn enrolment(&self, elapsed: Duration) -> Result<(), Refusal> {
        refuse("enrolments in all", self.enrolments.take(elapsed, &()))
    }

    /// The caller wants a certificate for its node.
    ///
    /// # Errors
    /// `RateLimited`.
    pub fn certificate(&self, elapsed: Duration, caller: &Caller) -> Result<(), Refusal> {
        let key = (caller.cluster.to_string(), caller.node.to_string());
        refuse("certificates of this node", self.certificates_by_node.take(elapsed, &key))
    }
}

/// How long until one more is allowed, where none is now.
type Wait = Option<Duration>;

fn refuse(what: &'static str, wait: Wait) -> Result<(), Refusal> {
    match wait {
        None => Ok(()),
        Some(wait) => {
            // Whole seconds: the text says what RetryInfo says.
            let whole = Duration::from_secs(wait.as_millis().div_ceil(1_000) as u64);
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
