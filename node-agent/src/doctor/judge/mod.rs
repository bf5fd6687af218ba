//! What is wrong, from what was seen: each check a function of the facts. Pure.

mod agent;
mod host;
mod leaf;
mod running;
#[cfg(test)]
mod tests;

use super::{Finding, facts::Facts, files::Group};
use crate::config::Config;

/// All checks, in the order in which they are worth reading.
pub(super) fn judge(facts: &Facts, config: &Config) -> Vec<Finding> {
    let mut all = Vec::new();
    all.extend(agent::judge(facts));
    all.extend(leaf::judge(facts));
    all.extend(host::files(facts, group(facts, config)));
    all.extend(running::judge(facts, config));
    all.extend(host::judge(facts));
    all
}

/// Ray's group: as configured, else as given at enrolment.
pub(super) fn group(facts: &Facts, config: &Config) -> Group {
    match (config.ray_gid, facts.enrolled_gid) {
        (Some(gid), _) | (None, Some(Some(gid))) => Group::Of(gid),
        (None, Some(None)) => Group::None,
        (None, None) => Group::Unknown,
    }
}

/// What is missing where something of another user could not be seen.
fn more_rights(facts: &Facts) -> &'static str {
    if facts.euid == 0 {
        "the capability SYS_PTRACE or DAC_READ_SEARCH is missing: run it as root outside of a container \
         that drops them"
    } else {
        "run it as root: `sudo node-agent doctor`"
    }
}
