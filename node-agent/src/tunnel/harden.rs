//! What the process must not be able to do, whoever takes it over: it is no root, has no capability,
//! gains none, and leaves its keys in no core.

use std::io;

use rustix::{
    process::{DumpableBehavior, Resource, Rlimit, getrlimit, set_dumpable_behavior, setrlimit},
    thread::capabilities,
};
use thiserror::Error;

/// Why the process may not start.
#[derive(Debug, Error)]
pub(super) enum HardenError {
    /// It is root.
    #[error("ray-tunnel does not run as root: start it as a user of its own, without capabilities")]
    Root,
    /// It has capabilities.
    #[error("ray-tunnel does not run with capabilities, and has {0:#x}: start it without any")]
    Capabilities(u64),
    /// The system says no.
    #[error("ray-tunnel cannot give up its powers: {0}")]
    Io(#[from] io::Error),
}

/// Gives up what is not needed; returns how many descriptors there may be.
///
/// # Errors
/// See [`HardenError`].
pub(crate) fn harden() -> Result<usize, HardenError> {
    if rustix::process::getuid().is_root() || rustix::process::geteuid().is_root() {
        return Err(HardenError::Root);
    }
    let sets = capabilities(None).map_err(io::Error::from)?;
    let held = sets.effective | sets.permitted | sets.inheritable;
    if !held.is_empty() {
        return Err(HardenError::Capabilities(held.bits()));
    }
    rustix::thread::set_no_new_privs(true).map_err(io::Error::from)?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(io::Error::from)?;
    let none = Rlimit { current: Some(0), maximum: Some(0) };
    setrlimit(Resource::Core, none).map_err(io::Error::from)?;
    let limit = getrlimit(Resource::Nofile);
    let all = Rlimit { current: limit.maximum, maximum: limit.maximum };
    setrlimit(Resource::Nofile, all).map_err(io::Error::from)?;
    let descriptors = limit.maximum.unwrap_or(u64::MAX);
    Ok(usize::try_from(descriptors).unwrap_or(usize::MAX))
}
