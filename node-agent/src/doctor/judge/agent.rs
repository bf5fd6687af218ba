//! The daemon, its standing, its contact with the CA, and the clock. Pure.

use super::super::{
    Finding, Level,
    facts::{Agent, Facts},
};
use crate::caclock::{SKEW_REPORTED, skew_text};

pub(super) fn judge(facts: &Facts) -> Vec<Finding> {
    let mut all = vec![daemon(facts), standing(facts), ca(facts), clock(facts)];
    let problems =
        facts.agent.status().map(|status| status.problems.as_slice()).unwrap_or_default();
    all.extend(problems.iter().map(|problem| {
        Finding::new("problem", Level::Warn, problem.as_str(), "see `node-agent status`")
    }));
    all
}

fn daemon(facts: &Facts) -> Finding {
    match &facts.agent {
        Agent::Answers(status) => {
            Finding::ok("daemon", format!("it answers, release {}", status.agent_version))
        }
        Agent::Wrote(status, why) => Finding::new(
            "daemon",
            Level::Fail,
            format!(
                "it does not answer ({why}); it wrote its status {}",
                status.as_of.relative(facts.now)
            ),
            "`systemctl start node-agent`; why it ended: `journalctl -u node-agent`",
        ),
        Agent::Silent(why) => Finding::new(
            "daemon",
            Level::Fail,
            format!("it does not answer, and there is no status of it: {why}"),
            "`systemctl start node-agent`, or name its socket with --socket; on a new host: `node-agent enroll`",
        ),
    }
}

fn standing(facts: &Facts) -> Finding {
    let Some(status) = facts.agent.status() else {
        return Finding::unknown("standing", "only the daemon knows it", "start the daemon");
    };
    if status.standing == "enrolled" {
        return Finding::ok(
            "standing",
            format!("{} ({}) of cluster {} is enrolled", status.node, status.role, status.cluster),
        );
    }
    let why = status.standing_reason.as_deref().unwrap_or("the CA gave no reason");
    Finding::new(
        "standing",
        Level::Fail,
        format!("{}: {why}", status.standing),
        "nothing is renewed any more; what each word wants is in docs/refusals.md",
    )
}

fn ca(facts: &Facts) -> Finding {
    match &facts.ca {
        Ok(heard) => knocked(heard),
        Err(why) => match facts.agent.status().and_then(|status| status.ca.reachable) {
            Some(true) => Finding::ok("ca", "the daemon's last call was answered"),
            Some(false) => Finding::new(
                "ca",
                Level::Fail,
                "the daemon's last call was not answered",
                "`node-agent status`, line CA; as root this command tries each endpoint",
            ),
            None => Finding::unknown(
                "ca",
                format!("its endpoints are not known here: {why}"),
                super::more_rights(facts),
            ),
        },
    }
}

fn knocked(heard: &[(String, Result<(), String>)]) -> Finding {
    let wrong: Vec<&str> =
        heard.iter().filter_map(|(_, r)| r.as_ref().err()).map(String::as_str).collect();
    let good: Vec<&str> =
        heard.iter().filter(|(_, r)| r.is_ok()).map(|(at, _)| at.as_str()).collect();
    if wrong.is_empty() && !good.is_empty() {
        return Finding::ok("ca", format!("it proves itself at {}", good.join(", ")));
    }
    let level = if good.is_empty() { Level::Fail } else { Level::Warn };
    Finding::new(
        "ca",
        level,
        if heard.is_empty() { "no endpoint is known".to_owned() } else { wrong.join("; ") },
        "start the CA, or let this host reach its node port (7444 by default); nothing is renewed meanwhile",
    )
}

fn clock(facts: &Facts) -> Finding {
    match facts.agent.status().and_then(|status| status.clock_skew_seconds) {
        None => Finding::unknown(
            "clock",
            "it was not compared with the CA's yet",
            "start the daemon, and let it reach the CA",
        ),
        Some(skew) if skew.saturating_abs() <= SKEW_REPORTED.whole_seconds() => {
            Finding::ok("clock", "it agrees with the CA's")
        }
        Some(skew) => Finding::new(
            "clock",
            Level::Fail,
            skew_text(skew),
            "set it right: `timedatectl status`; Ray judges leaves by this host's clock",
        ),
    }
}
