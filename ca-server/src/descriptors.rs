//! File descriptors: as many as the system lets the process have, and how they are shared out, so that
//! connections from outside never take those the store, the operator's socket and the probes need.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Kept for the store, the operator's socket, probes, the runtime and the listeners themselves.
const RESERVE: usize = 64;
/// For connections in any case.
const CONNECTIONS_MIN: usize = 32;
/// Handshakes of one listener at once, however many descriptors there are.
const HANDSHAKES_MAX: usize = 6_144;
/// Connections to the enrolment listener at once.
const ENROLLMENT_MAX: usize = 8_192;
/// Connections to the node listener at once.
const NODES_MAX: usize = 16_384;
/// The limit from which on nodes have all the connections they can get.
const WANTED: u64 = 32_768;
/// Room for fewer nodes than this is worth a word: it bounds the fleet.
const NODES_WORTH_A_WORD: usize = 1_000;

/// Connections at once, by what they are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// Not through their handshake, on each of the two listeners.
    pub handshakes: usize,
    /// Machines that enrol.
    pub enrollment: usize,
    /// Nodes.
    pub nodes: usize,
}

impl Budget {
    /// What can be had with so many descriptors: of eight parts, one for the handshakes of each
    /// listener, one for enrolment, five for nodes, which stay.
    #[must_use]
    pub fn of(descriptors_max: u64) -> Self {
        let descriptors = usize::try_from(descriptors_max).unwrap_or(usize::MAX);
        let part = descriptors.saturating_sub(RESERVE).max(CONNECTIONS_MIN) / 8;
        Self {
            handshakes: part.min(HANDSHAKES_MAX),
            enrollment: part.min(ENROLLMENT_MAX),
            nodes: (5 * part).min(NODES_MAX),
        }
    }

    /// What can be had now.
    #[must_use]
    pub fn now() -> Self {
        Self::of(limit())
    }
}

/// What a process of this system gets in words, where it is little.
#[must_use]
pub fn warning() -> Option<String> {
    warning_of(limit())
}

fn warning_of(limit: u64) -> Option<String> {
    let nodes = Budget::of(limit).nodes;
    (nodes < NODES_WORTH_A_WORD).then(|| {
        format!(
            "at most {limit} open files: room for {nodes} nodes at once; raise the limit \
             (LimitNOFILE={WANTED} in the unit, or ulimit -n) for more"
        )
    })
}

/// Raises the limit to what the system allows without asking. Where that fails the old one holds.
pub fn raise() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    let _ = setrlimit(Resource::Nofile, raised);
}

fn limit() -> u64 {
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_little_room_is_worth_a_word() {
        assert_eq!(warning_of(20_000), None);
        assert_eq!(warning_of(4_096), None);
        let little = warning_of(1_024).unwrap();
        assert!(little.contains("room for 600 nodes"), "{little}");
    }

    #[test]
    fn connections_never_take_the_reserve() {
        for descriptors in [128_u64, 256, 1_024, 16_384, 1_048_576, u64::MAX] {
            let Budget { handshakes, enrollment, nodes } = Budget::of(descriptors);
            let all = 2 * handshakes + enrollment + nodes;
            assert!(all as u64 + RESERVE as u64 <= descriptors, "{descriptors}: {all}");
            assert!(handshakes >= 4 && enrollment >= 4 && nodes >= 20, "{descriptors}");
        }
        assert_eq!(Budget::of(128), Budget { handshakes: 8, enrollment: 8, nodes: 40 });
        assert_eq!(Budget::of(0), Budget { handshakes: 4, enrollment: 4, nodes: 20 });
    }
}
