//! What must hold of everything that is parsed from outside, whatever the bytes: one function a
//! target. A target panics where a property is broken. libFuzzer runs them from `fuzz/`; the stories
//! replay the corpus and a bounded number of mutations of it with the same functions.
//!
//! None of them opens a socket or a file.

mod agent;
mod ca;
mod certificates;
mod contract;
mod mutate;
mod tunnel;

pub use agent::local;
pub use ca::{config, proxy, report, settings, store};
pub use certificates::{certificate, csr};
pub use contract::{addresses, join, names};
pub use mutate::Mutator;
pub use tunnel::tunnel;

/// A target: its name, which is that of its corpus folder too, and its function.
pub type Target = (&'static str, fn(&[u8]));

/// Every target.
pub const TARGETS: [Target; 12] = [
    ("addresses", addresses),
    ("certificate", certificate),
    ("config", config),
    ("csr", csr),
    ("join", join),
    ("local", local),
    ("names", names),
    ("proxy", proxy),
    ("report", report),
    ("settings", settings),
    ("store", store),
    ("tunnel", tunnel),
];

/// Longest text of an error, in bytes: what came from outside does not make it grow.
const ERROR_LEN_MAX: usize = 2_000;

fn text(data: &[u8]) -> Option<&str> {
    std::str::from_utf8(data).ok()
}
