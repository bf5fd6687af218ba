//! What `ray-tunnel` is told, made from what the CA said and what this node is. Pure: it writes no file
//! and reads no clock.

use std::{net::IpAddr, ops::RangeInclusive, path::Path};

use raymtls_proto::{
    identity::Role,
    ports::{self, Caller, Port, Row},
    v1,
};

use crate::{
    statedir::{Memory, NodeFile},
    tunnel::{
        control::PROOF_PORT,
        rules::{Member, PortRange, Rules, VERSION},
    },
};

/// Grace where the cluster's settings name none, in seconds.
const GRACE_DEFAULT: i64 = 3 * 86_400;

/// When the CA was heard, by this agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Heard {
    pub(crate) at_unix: i64,
    /// It does not answer.
    pub(crate) is_away: bool,
}

/// The rules but for their generation and the moment of writing.
pub(crate) fn rules(
    node: &NodeFile,
    memory: &Memory,
    settings: &v1::Settings,
    key_folder: &Path,
    blocked: impl Iterator<Item = IpAddr>,
    closed: &[u16],
    heard: Heard,
) -> Rules {
    let members = memory.members().filter_map(|(name, peer)| {
        let role = match peer.role {
            Role::Head | Role::Worker => peer.role,
            Role::Driver => return None,
        };
        let addresses = peer.addresses.iter().copied().collect();
        Some(Member { name: name.parse().ok()?, role, addresses })
    });
    Rules {
        version: VERSION,
        generation: 0,
        cluster: node.cluster.clone(),
        trust_domain: node.trust_domain.clone(),
        node: node.node.clone(),
        addresses: node.addresses.clone(),
        key_folder: key_folder.to_owned(),
        members: members.collect(),
        blocked: blocked.collect(),
        outbound_ports: ranges(&outbound_ports(settings), closed),
        inbound_ports: ranges(&inbound_ports(settings, node.role), closed),
        grace_seconds: grace_seconds(settings),
        ca_away_since_unix: heard.is_away.then_some(heard.at_unix),
        heard_unix: heard.at_unix,
        written_unix: 0,
    }
}

/// How long flows go on with a peer whose leaf has ended, while the CA is away.
pub(crate) fn grace_seconds(settings: &v1::Settings) -> u64 {
    u64::try_from(settings.tunnel_grace_seconds.unwrap_or(GRACE_DEFAULT)).unwrap_or_default()
}

/// Ports at which members may be dialled.
pub(crate) fn outbound_ports(settings: &v1::Settings) -> Vec<RangeInclusive<u16>> {
    let plan = settings.port_plan.unwrap_or_default();
    ports::PORTS
        .iter()
        .filter(|row| is_carried(row))
        .filter_map(|row| row.port.range(&plan))
        .collect()
}

/// Ports of this node that members may reach.
pub(crate) fn inbound_ports(settings: &v1::Settings, role: Role) -> Vec<RangeInclusive<u16>> {
    let plan = settings.port_plan.unwrap_or_default();
    let rows = ports::of_role(role.to_proto(), settings).filter(|row| is_carried(row));
    rows.filter_map(|row| row.port.range(&plan)).collect()
}

/// Members have each other's ports, and the HTTP ports too: what `ray job submit`, `ray list` and
/// Prometheus on a member dial is authenticated here as nowhere else. What is for its own host alone is
/// not carried.
fn is_carried(row: &Row) -> bool {
    match row.port {
        Port::RuntimeEnvAgent => false,
        Port::Gcs
        | Port::RayClient
        | Port::Dashboard
        | Port::AutoscalerMetrics
        | Port::DashboardMetrics
        | Port::NodeManager
        | Port::ObjectManager
        | Port::DashboardAgentGrpc
        | Port::DashboardAgentHttp
        | Port::MetricsExport
        | Port::Workers
        | Port::Collectives => row
            .callers
            .iter()
            .any(|c| matches!(c, Caller::Member | Caller::Admin | Caller::Scraper)),
    }
}

/// With holes where a port stays this host's own.
fn ranges(all: &[RangeInclusive<u16>], closed: &[u16]) -> Vec<PortRange> {
    let closed: std::collections::BTreeSet<u16> =
        closed.iter().copied().chain([PROOF_PORT]).collect();
    let mut found = Vec::new();
    for range in all {
        let mut from = u32::from(*range.start());
        let holes = closed.range(range.clone()).map(|port| u32::from(*port));
        for hole in holes.chain([u32::from(*range.end()) + 1]) {
            let last = hole.checked_sub(1).and_then(|last| u16::try_from(last).ok());
            let first = u16::try_from(from).ok();
            found.extend(first.zip(last).and_then(|(min, max)| PortRange::new(min, max)));
            from = hole + 1;
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings() -> v1::Settings {
        v1::Settings {
            port_plan: Some(ports::default_plan()),
            mode: v1::Mode::Tunnel.into(),
            ..v1::Settings::default()
        }
    }

    fn holds(ranges: &[RangeInclusive<u16>], port: u16) -> bool {
        ranges.iter().any(|range| range.contains(&port))
    }

    #[test]
    fn a_node_opens_what_its_role_listens_on_and_never_what_is_its_hosts_own() {
        for (port, head, worker) in [
            (6_379, true, false),
            (8_265, true, false),
            (44_217, true, false),
            (6_701, true, true),
            (6_705, true, true),
            (6_706, true, true),
            (10_050, true, true),
            // For the raylet of the same host; SSH; the agent; the tunnel; Ray Client, which is off.
            (6_703, false, false),
            (22, false, false),
            (7_447, false, false),
            (15_008, false, false),
            (10_001, false, false),
        ] {
            let of = |role| holds(&inbound_ports(&settings(), role), port);
            assert_eq!((of(Role::Head), of(Role::Worker)), (head, worker), "{port}");
        }
        assert!(holds(
            &inbound_ports(&v1::Settings { ray_client: true, ..settings() }, Role::Head),
            10_001
        ));
        assert!(holds(&outbound_ports(&settings()), 6_379));
        assert!(!holds(&outbound_ports(&settings()), 6_703));
    }

    #[test]
    fn a_hole_in_a_range_is_left_out_at_its_ends_and_in_its_middle() {
        let range = |min, max| PortRange::new(min, max).unwrap();
        for (holes, wanted) in [
            (&[][..], vec![range(10, 20)]),
            (&[10], vec![range(11, 20)]),
            (&[20], vec![range(10, 19)]),
            (&[15], vec![range(10, 14), range(16, 20)]),
            (&[14, 15], vec![range(10, 13), range(16, 20)]),
            (&[9, 21], vec![range(10, 20)]),
        ] {
            assert_eq!(ranges(&[10..=20], holes), wanted, "{holes:?}");
        }
        assert_eq!(ranges(&[10..=10], &[10]), []);
        assert_eq!(ranges(&[65_535..=65_535], &[]), [range(65_535, 65_535)]);
        assert_eq!(ranges(&[15_000..=15_010], &[]).len(), 2, "the proof's port is nobody's");
    }

    #[test]
    fn grace_is_three_days_unless_it_is_set_and_may_be_none() {
        assert_eq!(grace_seconds(&settings()), 259_200);
        for (set, wanted) in [(0, 0), (60, 60), (-1, 0)] {
            let settings = v1::Settings { tunnel_grace_seconds: Some(set), ..settings() };
            assert_eq!(grace_seconds(&settings), wanted);
        }
    }
}
