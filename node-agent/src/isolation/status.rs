//! What the agent says of its isolation: to people, to `status --check` and to metrics.

use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

use super::Verdict;
use crate::moment::Moment;

/// The word for no table.
const OFF: &str = "off";
/// The word for a table that drops.
const ENFORCE: &str = "enforce";

/// One consistent view of the table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct IsolationStatus {
    /// What the settings ask for: `off`, `audit` or `enforce`.
    pub wanted: String,
    /// What this agent has loaded: `off` for no table, `audit` or `enforce`.
    pub in_force: String,
    /// Hosts of the cluster in the table, drivers among them.
    pub members: usize,
    /// Addresses that are cut off.
    pub blocked: usize,
    /// Addresses that the CA lists as blocked and that are not: members', operators', this host's needs.
    pub spared: usize,
    /// Packets of or to blocked addresses.
    pub blocked_packets: u64,
    /// Packets to guarded ports from whoever may not reach them.
    pub refused_packets: u64,
    /// When the table was loaded last.
    pub loaded_at: Option<Moment>,
    /// Sockets that were closed when an address was blocked last.
    pub sockets_closed: u32,
    /// Why it is not what the settings say.
    pub problem: Option<String>,
}

impl Default for IsolationStatus {
    fn default() -> Self {
        Self {
            wanted: OFF.to_owned(),
            in_force: OFF.to_owned(),
            members: 0,
            blocked: 0,
            spared: 0,
            blocked_packets: 0,
            refused_packets: 0,
            loaded_at: None,
            sockets_closed: 0,
            problem: None,
        }
    }
}

impl IsolationStatus {
    /// Whether Ray may start: with `enforce`, not before there is a table.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.wanted != ENFORCE || self.in_force != OFF
    }

    /// For a person, in a line.
    #[must_use]
    pub fn line(&self, applied: Option<&str>, now: OffsetDateTime) -> String {
        if self.in_force == OFF && self.wanted == OFF {
            return "off: whoever reaches this host reaches Ray's ports".to_owned();
        }
        let age = self.loaded_at.map_or_else(|| "never".to_owned(), |at| at.relative(now));
        let wanted = if self.in_force == self.wanted {
            String::new()
        } else {
            format!(" ({} IS WANTED)", self.wanted)
        };
        let spared = match self.spared {
            0 => String::new(),
            spared => {
                format!(" ({spared} NOT BLOCKED: members', operators', or needed by this host)")
            }
        };
        format!(
            "{}{wanted}, version {}, table loaded {age}; {} members, {} blocked{spared}; packets: {} \
             refused, {} of blocked hosts{}",
            self.in_force,
            applied.unwrap_or("none"),
            self.members,
            self.blocked,
            self.refused_packets,
            self.blocked_packets,
            if self.in_force == ENFORCE { "" } else { " (counted, not dropped)" },
        )
    }
}

/// The word for what is loaded.
#[must_use]
pub fn word(in_force: Option<Verdict>) -> &'static str {
    match in_force {
        None => OFF,
        Some(Verdict::Count) => "audit",
        Some(Verdict::Drop) => ENFORCE,
    }
}

#[cfg(test)]
mod tests {
    use time::macros::datetime;

    use super::*;

    #[test]
    fn a_table_that_is_not_what_was_asked_for_is_said_loud() {
        let now = datetime!(2026-11-24 08:00 UTC);
        let mut status = IsolationStatus {
            wanted: "enforce".to_owned(),
            in_force: "audit".to_owned(),
            loaded_at: Some((now - time::Duration::seconds(5)).into()),
            ..IsolationStatus::default()
        };
        let line = status.line(Some("7/3"), now);
        assert!(line.starts_with("audit (enforce IS WANTED), version 7/3, table loaded 5s ago"));
        assert!(line.ends_with("(counted, not dropped)"), "{line}");
        assert!(status.is_ready());
        status.in_force = "off".to_owned();
        assert!(!status.is_ready());
        status.wanted = "audit".to_owned();
        assert!(status.is_ready());
    }
}
