//! Isolation: who may open a connection to Ray's ports of this host, as an nftables table of the
//! cluster's own. [`Policy`] is what to enforce, `ruleset` its text, `trial` how the first one
//! is tried, `capture` what mode tunnel adds; all four are pure.

mod capture;
pub mod host;
#[cfg(test)]
mod netns;
mod policy;
mod ruleset;
pub mod shown;
pub mod status;
pub mod table;
#[cfg(test)]
mod tests;
pub mod trial;

pub use capture::{Capture, PROOF_ADDRESS};
pub use policy::{Policy, Protected, Verdict};
pub use ruleset::{Counters, Mark, clear, render, render_marked, rules_in, table_name};
