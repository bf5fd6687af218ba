//! What Ray's processes on a node serve, as the node's agent says: nobody here has checked it.

use std::cmp::Ordering;

use raymtls_proto::v1;
use serde::Serialize;
use time::OffsetDateTime;

use super::moment::Moment;

/// Where one node stands.
#[derive(Debug, Serialize)]
pub(super) struct RunningView {
    pub(super) horizon: Moment,
    recycle_state: &'static str,
    driver_horizon: Moment,
    driver_state: &'static str,
    processes: u32,
    unknown: u32,
    plain_ports: u32,
    looked: Moment,
}

impl RunningView {
    pub(super) fn new(running: &v1::Running) -> Self {
        Self {
            horizon: Moment::from_unix(running.horizon_unix),
            recycle_state: word(running.recycle_state()),
            driver_horizon: Moment::from_unix(running.driver_horizon_unix),
            driver_state: word(running.driver_state()),
            processes: running.processes,
            unknown: running.unknown,
            plain_ports: running.plain_ports,
            looked: Moment::from_unix(running.looked_unix),
        }
    }

    /// In a list: the node's horizon, and its state where somebody must look.
    pub(super) fn short(&self, now: OffsetDateTime) -> String {
        with_state(self.horizon, self.recycle_state, now)
    }

    pub(super) fn lines(&self, now: OffsetDateTime) -> Vec<String> {
        vec![
            format!("node {}", with_state(self.horizon, self.recycle_state, now)),
            format!("drivers {}", with_state(self.driver_horizon, self.driver_state, now)),
            format!(
                "{} processes listen, {} show no leaf of the node, {} ports without TLS",
                self.processes, self.unknown, self.plain_ports
            ),
            format!("looked at {}", self.looked.human(now)),
        ]
    }
}

fn with_state(horizon: Moment, state: &'static str, now: OffsetDateTime) -> String {
    format!("{}, {state}", horizon.human(now))
}

fn word(state: v1::RecycleState) -> &'static str {
    match state {
        v1::RecycleState::Unspecified => "no leaf is served",
        v1::RecycleState::Fresh => "fresh",
        v1::RecycleState::Unknown => "unknown",
        v1::RecycleState::Due => "recycle-due",
        v1::RecycleState::Overdue => "recycle-overdue",
    }
}

/// The earliest first; what is not known last.
pub(super) fn earlier(one: Moment, other: Moment) -> Ordering {
    one.is_none().cmp(&other.is_none()).then(one.cmp(&other))
}

/// Where the nodes of a cluster stand together.
#[derive(Debug, Serialize)]
pub(super) struct FleetView {
    horizon: Moment,
    node: String,
    driver_horizon: Moment,
    driver_node: String,
    nodes_overdue: u32,
    nodes_unknown: u32,
}

impl FleetView {
    pub(super) fn new(horizon: &v1::Horizon) -> Self {
        Self {
            horizon: Moment::from_unix(horizon.unix),
            node: horizon.node.clone(),
            driver_horizon: Moment::from_unix(horizon.driver_unix),
            driver_node: horizon.driver_node.clone(),
            nodes_overdue: horizon.nodes_overdue,
            nodes_unknown: horizon.nodes_unknown,
        }
    }

    pub(super) fn lines(&self, now: OffsetDateTime) -> Vec<String> {
        let on = |what: &str, at: Moment, node: &str| {
            if at.is_none() {
                return format!("{what}: none is known");
            }
            format!("{what}: {} on {node}", at.human(now))
        };
        vec![
            on("first of all nodes", self.horizon, &self.node),
            on("first of all drivers", self.driver_horizon, &self.driver_node),
            format!(
                "{} nodes recycle-overdue, {} nodes not known",
                self.nodes_overdue, self.nodes_unknown
            ),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_known_comes_last() {
        let mut moments = [0, 7, 3].map(Moment::from_unix);
        moments.sort_by(|one, other| earlier(*one, *other));
        assert_eq!(moments, [3, 7, 0].map(Moment::from_unix));
    }

    #[test]
    fn a_node_that_serves_nothing_is_not_called_fresh() {
        let now = raymtls_proto::clock::from_unix(1_764_000_000).unwrap();
        let text = RunningView::new(&v1::Running::default()).short(now);
        assert_eq!(text, "-, no leaf is served");
    }
}
