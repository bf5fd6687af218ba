//! What to enforce: sets of addresses by what they may reach, and the one rule that a block is never
//! a weapon. Pure.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    ops::RangeInclusive,
};

use ipnet::IpNet;
use raymtls_proto::{
    identity::{ClusterId, Role},
    ports::{self, Caller, PORTS, Row},
    v1,
};

use super::capture::Capture;
use crate::statedir::Memory;

/// Whoever closes it cannot come and open it again.
const SSH: u16 = 22;

/// What happens to a packet that no rule lets through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is counted and goes on: the setting `audit`.
    Count,
    /// It is counted and dropped: the setting `enforce`.
    Drop,
}

/// What one host enforces for one cluster.
#[derive(Clone, Debug)]
pub struct Policy {
    /// Names the table.
    pub cluster: ClusterId,
    /// What the host is for: decides which ports it has.
    pub role: v1::Role,
    /// The port plan, and whose ranges may reach what.
    pub settings: v1::Settings,
    /// Addresses of the members, this node's own among them.
    pub members: BTreeSet<IpAddr>,
    /// Addresses of enrolled drivers.
    pub drivers: BTreeSet<IpAddr>,
    /// Addresses of revoked nodes, as the CA lists them: cut off on the cluster's ports.
    pub blocked: BTreeSet<IpAddr>,
    /// The same, to be cut off on every port.
    pub blocked_entirely: BTreeSet<IpAddr>,
    /// What no block may hit, whatever the CA lists.
    pub protected: Protected,
    /// Ports of this host that stay open whatever the plan says: those the agent listens on. SSH's is
    /// one of them without being named.
    pub never_guarded: BTreeSet<u16>,
    /// What a packet that no rule lets through meets.
    pub verdict: Verdict,
    /// Mode tunnel: what Ray dials is handed to the tunnel. `None`: Ray speaks TLS itself.
    pub capture: Option<Capture>,
}

/// What this host needs to live: no block ever covers it.
#[derive(Clone, Debug, Default)]
pub struct Protected {
    /// The CA's addresses that the join file gives in numbers. What a name server says is none: it
    /// would spare a revoked node at large.
    pub ca: BTreeSet<IpAddr>,
    /// The CA's endpoints, wherever they are: those given in numbers, and those where a connection of
    /// ours ended at the CA. Packets to and from them pass, whatever the plan and the blocks are.
    pub endpoints: BTreeSet<SocketAddr>,
    /// The gateways of the default routes.
    pub gateways: BTreeSet<IpAddr>,
    /// The host's own addresses.
    pub own: BTreeSet<IpAddr>,
}

impl Policy {
    /// A policy of these settings, without anybody in it.
    #[must_use]
    pub fn of(cluster: &ClusterId, role: Role, settings: v1::Settings, verdict: Verdict) -> Self {
        Self {
            cluster: cluster.clone(),
            role: role.to_proto(),
            settings,
            members: BTreeSet::new(),
            drivers: BTreeSet::new(),
            blocked: BTreeSet::new(),
            blocked_entirely: BTreeSet::new(),
            protected: Protected::default(),
            never_guarded: BTreeSet::new(),
            verdict,
            capture: None,
        }
    }

    /// Takes over who is a member and who is blocked.
    pub fn people(&mut self, memory: &Memory) {
        for (_, peer) in memory.members() {
            match peer.role {
                Role::Head | Role::Worker => self.members.extend(&peer.addresses),
                Role::Driver => self.drivers.extend(&peer.addresses),
            }
        }
        for block in memory.blocks() {
            let set =
                if block.all_traffic { &mut self.blocked_entirely } else { &mut self.blocked };
            set.insert(block.address);
        }
    }

    /// The addresses to cut off: those the CA lists, but neither a live member, nor what the host
    /// needs, nor an operator. The CA subtracts the same by its own knowledge; this is the second
    /// lock, and the only one that knows this host's routes.
    #[must_use]
    pub fn blocked(&self) -> BTreeSet<IpAddr> {
        self.guilty(&self.blocked)
    }

    /// The same of those to be cut off on every port.
    #[must_use]
    pub fn blocked_entirely(&self) -> BTreeSet<IpAddr> {
        self.guilty(&self.blocked_entirely)
    }

    /// How many of the addresses the CA lists are not cut off.
    #[must_use]
    pub fn spared(&self) -> usize {
        let listed = |set: &BTreeSet<IpAddr>| -> BTreeSet<IpAddr> {
            set.iter().map(IpAddr::to_canonical).collect()
        };
        let all = &listed(&self.blocked) | &listed(&self.blocked_entirely);
        all.len() - (&self.blocked() | &self.blocked_entirely()).len()
    }

    /// Ports that the plan would have closed and that stay open.
    #[must_use]
    pub fn left_open(&self) -> Vec<u16> {
        let plan = self.plan();
        let planned: Vec<_> = PORTS.iter().filter_map(|row| row.port.range(&plan)).collect();
        let open = self.never_guarded.iter().copied().chain([SSH]);
        let open: BTreeSet<u16> =
            open.filter(|port| planned.iter().any(|range| range.contains(port))).collect();
        open.into_iter().collect()
    }

    fn guilty(&self, listed: &BTreeSet<IpAddr>) -> BTreeSet<IpAddr> {
        let admins = ranges(&self.settings.admin_ranges);
        let enrolled = self.members.iter().chain(&self.drivers);
        let members: BTreeSet<IpAddr> = enrolled.map(IpAddr::to_canonical).collect();
        listed
            .iter()
            .map(IpAddr::to_canonical)
            .filter(|address| {
                !members.contains(address)
                    && !self.protected.holds(*address)
                    && !admins.iter().any(|range| range.contains(address))
            })
            .collect()
    }

    /// The single hosts that a caller may be, where the CA lists them.
    #[must_use]
    pub fn hosts_of(&self, caller: Caller) -> Option<BTreeSet<IpAddr>> {
        let enrolled = match caller {
            Caller::Member => &self.members,
            Caller::Driver => &self.drivers,
            Caller::Admin | Caller::Scraper => return None,
        };
        Some(enrolled.iter().map(IpAddr::to_canonical).collect())
    }

    /// The ranges from which a caller may come.
    #[must_use]
    pub fn networks_of(&self, caller: Caller) -> Vec<IpNet> {
        ranges(match caller {
            Caller::Member => &[],
            Caller::Admin => &self.settings.admin_ranges,
            Caller::Scraper => &self.settings.scraper_ranges,
            Caller::Driver => &self.settings.driver_ranges,
        })
    }

    /// The ports of this host that a caller may reach.
    #[must_use]
    pub fn ports_of(&self, caller: Caller) -> Vec<RangeInclusive<u16>> {
        let by_tunnel = match caller {
            // Ray speaks no TLS here: a member comes through the tunnel, a driver not at all.
            Caller::Member | Caller::Driver => self.capture.is_some(),
            Caller::Admin | Caller::Scraper => false,
        };
        if by_tunnel {
            return Vec::new();
        }
        self.ranges_where(|row| row.callers.contains(&caller))
    }

    /// All ports of this host that are guarded.
    #[must_use]
    pub fn guarded_ports(&self) -> Vec<RangeInclusive<u16>> {
        self.ranges_where(|_| true)
    }

    /// All ports of the cluster, wherever they listen: what a block covers at either end.
    #[must_use]
    pub fn cluster_ports(&self) -> Vec<RangeInclusive<u16>> {
        let plan = self.plan();
        self.without_open(PORTS.iter().filter_map(|row| row.port.range(&plan)))
    }

    /// What a block covers at either end: the same, and what the other hosts' tunnels dial.
    #[must_use]
    pub fn cut_ports(&self) -> Vec<RangeInclusive<u16>> {
        let inbound = self.capture.iter().map(|capture| capture.inbound_port);
        self.cluster_ports().into_iter().chain(inbound.map(|port| port..=port)).collect()
    }

    /// Ports at which members dial each other in mode tunnel.
    #[must_use]
    pub fn dialled_ports(&self) -> Vec<RangeInclusive<u16>> {
        self.without_open(crate::tunnelrules::outbound_ports(&self.settings).into_iter())
    }

    fn plan(&self) -> v1::PortPlan {
        self.settings.port_plan.unwrap_or_default()
    }

    /// The ranges, with holes where a port stays open.
    fn without_open(
        &self,
        ranges: impl Iterator<Item = RangeInclusive<u16>>,
    ) -> Vec<RangeInclusive<u16>> {
        let open = self.left_open();
        let pieces = |range: RangeInclusive<u16>| {
            let (mut pieces, mut rest) = (Vec::new(), Some(range));
            for port in &open {
                let Some(range) = rest.take_if(|range| range.contains(port)) else { continue };
                if *range.start() < *port {
                    pieces.push(*range.start()..=port - 1);
                }
                rest = (*port < *range.end()).then(|| port + 1..=*range.end());
            }
            pieces.extend(rest);
            pieces
        };
        ranges.flat_map(pieces).collect()
    }

    fn ranges_where(&self, wanted: impl Fn(&Row) -> bool) -> Vec<RangeInclusive<u16>> {
        let plan = self.plan();
        // Ray Client's port is guarded whether it is on or not: somebody may start it by hand.
        let guarded = v1::Settings { ray_client: true, ..self.settings.clone() };
        let rows = ports::of_role(self.role, &guarded).filter(|row| wanted(row));
        self.without_open(rows.filter_map(|row| row.port.range(&plan)))
    }
}

impl Protected {
    fn holds(&self, address: IpAddr) -> bool {
        let mut needed = [&self.ca, &self.gateways, &self.own].into_iter().flatten();
        address.is_loopback()
            || address.is_unspecified()
            || address.is_multicast()
            || needed.any(|own| own.to_canonical() == address)
    }
}

/// Ranges as the CA stores them; it checked them, so what does not parse is of a newer release.
fn ranges(texts: &[String]) -> Vec<IpNet> {
    texts.iter().filter_map(|text| text.parse().ok()).collect()
}
