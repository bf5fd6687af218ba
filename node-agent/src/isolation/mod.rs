//! Isolation: who may open a connection to Ray's ports of this host, as an nftables table of the
//! cluster's own. [`Policy`] is what to enforce, `ruleset` its text; both are pure.

mod policy;
mod ruleset;
pub mod shown;
pub mod table;
#[cfg(test)]
mod tests;

pub use policy::{Policy, Protected, Verdict};
pub use ruleset::{Counters, clear, render, table_name};
