//! What is wrong, from what was seen: each check a function of the facts. Pure.

mod agent;
mod host;
mod leaf;
mod running;
#[cfg(test)]
mod tests;

use super::{Finding, Level, facts::Facts, files::Group};
use crate::config::Config;

/// All checks, in the order in which they are worth reading.
pub(super) fn judge(facts: &Facts, config: &Config) -> Vec<Finding> {
    let mut all = Vec::new();
    all.extend(agent::judge(facts));
    all.extend(leaf::judge(facts));
    all.extend(host::files(facts, group(facts, config)));
    all.extend(running::judge(facts, config));
    all.extend(host::judge(facts));
    missing(facts, config, all)
}

/// Where the agent's folders are not there, that is the one thing to say, and no right is missing.
fn missing(facts: &Facts, config: &Config, mut all: Vec<Finding>) -> Vec<Finding> {
    let folders = [(&facts.state, &config.state_dir), (&facts.tls, &config.tls_dir)];
    let gone: Vec<String> = folders
        .iter()
        .filter(|(seen, _)| seen.as_ref().is_err_and(|why| why.contains(NOT_THERE)))
        .map(|(_, path)| path.display().to_string())
        .collect();
    if gone.is_empty() {
        return all;
    }
    let untold = |finding: &Finding| {
        finding.level == Level::Unknown
            && (gone.len() == 2
                || ABSENT.iter().any(|absent| finding.what.contains(absent))
                || finding.what == "the TLS folder cannot be read")
    };
    all.retain(|finding| !untold(finding));
    let next =
        "`node-agent enroll` on a new host; where they lie elsewhere: --state-dir and --tls-dir";
    let what = format!("not there: {}; what depends on that is not shown", gone.join(", "));
    all.insert(0, Finding::unknown("enrolment", what, next));
    all
}

/// The system's words for it.
const NOT_THERE: &str = "(os error 2)";
/// What says that no enrolment was found.
const ABSENT: [&str; 3] = [NOT_THERE, "not enrolled", "holds no enrolment"];

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
