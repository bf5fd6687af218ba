//! What a program that holds secrets does first: no core file, no reading of its memory by others of
//! the same user. What it starts has the limits it was given; root reads what it likes.

use std::io;

use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};
use thiserror::Error;

/// What the system refused.
#[derive(Debug, Error)]
pub enum HardenError {
    /// `PR_SET_DUMPABLE`.
    #[error("this process can be read by others of its user: {0}")]
    Readable(io::Error),
    /// `RLIMIT_CORE`.
    #[error("core files cannot be turned off: {0}")]
    Core(io::Error),
}

/// Turns foreign reading and core files off, each of the two even where the other is refused.
///
/// # Errors
/// The system's: worth a warning, and no reason to stop.
pub fn harden() -> Result<(), HardenError> {
    let closed = set_dumpable_behavior(DumpableBehavior::NotDumpable);
    let none = Rlimit { current: Some(0), maximum: Some(0) };
    setrlimit(Resource::Core, none).map_err(|e| HardenError::Core(e.into()))?;
    closed.map_err(|e| HardenError::Readable(e.into()))
}
