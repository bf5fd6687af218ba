//! A policy as the text `nft -f` loads: one table, replaced whole in one transaction. Pure.
//!
//! The table drops on the cluster's Ray ports only, so that nothing else on the host can be locked
//! out by it. Three chains:
//! - `blocked_in`, `blocked_out` (raw hook, before connection tracking): nothing passes between this
//!   host and a blocked address on a port of the cluster at either end, established or not; nothing at
//!   all between it and an address of the sets `cut4` and `cut6`.
//!   What goes to and comes from the CA's endpoints (`ca4`, `ca6`) passes.
//! - `arriving` (before destination NAT, so that a port which a container runtime publishes under its
//!   own number is seen as it was dialled): who may reach a guarded port of this host. What comes from
//!   the CA's endpoints passes, so that no port plan cuts the agent off from the next one; but for the packet
//!   that opens a connection: who sits at an endpoint, or relays to it, does not reach Ray by it.
//! - `published` (forward): the same, for a port that is published under another number.
//!
//! Each packet is judged, by address and port: what a caller that was taken out of a set sends does not
//! arrive, in the middle of its connections either. Answers to what this host dialled itself pass because
//! they go to a port that is not guarded. The kernel's record of who began a connection decides nothing:
//! a connection that is picked up in the middle counts as begun by whoever is heard first, and a
//! caller can have the record end early by a reset that is recorded and then dropped here. The price: a
//! connection dialled *from* a guarded port gets its answers from that port's callers only.

use std::{
    collections::BTreeSet,
    fmt::{self, Write},
    net::{IpAddr, SocketAddr},
    ops::RangeInclusive,
};

use ipnet::IpNet;
use raymtls_proto::{identity::ClusterId, ports::Caller};

use super::policy::{Policy, Verdict};

/// Lines in the kernel's log, at most, for what is refused.
const LOG_RATE: &str = "5/second burst 10 packets";

/// All packets but the one that opens a connection.
const NOT_OPENING: &str = "tcp flags & (syn | ack) != syn ";

/// Packets counted so far: a replaced table goes on from them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// From or to a blocked address.
    pub blocked: u64,
    /// To a guarded port, from somebody who may not reach it.
    pub refused: u64,
}

/// What tells one load from any other, and from a table that somebody else made: it stands in the
/// table as the name of a counter that counts nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark(pub u64);

/// What the names of marks begin with.
pub(super) const MARK: &str = "load_";

impl fmt::Display for Mark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{MARK}{:016x}", self.0)
    }
}

/// Name of a cluster's table.
#[must_use]
pub fn table_name(cluster: &ClusterId) -> String {
    format!("raymtls_{cluster}")
}

/// The text that removes a cluster's table, there or not.
#[must_use]
pub fn clear(cluster: &ClusterId) -> String {
    let name = table_name(cluster);
    // Declared first, so that deleting what is not there is no error.
    format!("table inet {name}\ndelete table inet {name}\n")
}

/// The text that puts a policy in force, in the place of what the table held before.
#[must_use]
pub fn render(policy: &Policy, counted: Counters) -> String {
    rendered(policy, counted, None)
}

/// The same with a mark in it.
#[must_use]
pub fn render_marked(policy: &Policy, counted: Counters, mark: Mark) -> String {
    rendered(policy, counted, Some(mark))
}

/// How many rules a rendered table has.
#[must_use]
pub fn rules_in(text: &str) -> usize {
    let mut in_chain = false;
    let is_rule = |line: &&str| {
        if line.starts_with("\t\t") {
            return in_chain && !line.starts_with("\t\ttype ");
        }
        in_chain = line.starts_with("\tchain ");
        false
    };
    text.lines().filter(is_rule).count()
}

fn rendered(policy: &Policy, counted: Counters, mark: Option<Mark>) -> String {
    let mut text = clear(&policy.cluster);
    write_table(&mut text, policy, counted, mark).expect("writing into a string");
    text
}

fn write_table(
    out: &mut String,
    policy: &Policy,
    counted: Counters,
    mark: Option<Mark>,
) -> fmt::Result {
    let name = table_name(&policy.cluster);
    writeln!(out, "table inet {name} {{")?;
    write_counter(out, "blocked", counted.blocked)?;
    write_counter(out, "refused", counted.refused)?;
    if let Some(mark) = mark {
        write_counter(out, &mark.to_string(), 0)?;
    }
    write_endpoints(out, &policy.protected.endpoints)?;
    write_ports(out, "cluster_ports", &policy.cluster_ports())?;
    write_ports(out, "guarded_ports", &policy.guarded_ports())?;
    write_hosts(out, "blocked", &policy.blocked())?;
    write_hosts(out, "cut", &policy.blocked_entirely())?;
    for caller in Caller::ALL {
        write_networks(out, set_of(caller), &policy.networks_of(caller))?;
        write_ports(out, &format!("{}_ports", set_of(caller)), &policy.ports_of(caller))?;
    }
    write_raw_chain(out, policy, Direction::In)?;
    write_raw_chain(out, policy, Direction::Out)?;
    write_arriving(out)?;
    write_published(out)?;
    write_judge(out, policy)?;
    writeln!(out, "}}")
}

#[derive(Clone, Copy)]
enum Direction {
    In,
    Out,
}

fn write_raw_chain(out: &mut String, policy: &Policy, direction: Direction) -> fmt::Result {
    let (chain, hook, side, port) = match direction {
        Direction::In => ("blocked_in", "prerouting", "saddr", "sport"),
        Direction::Out => ("blocked_out", "output", "daddr", "dport"),
    };
    let end = match policy.verdict {
        Verdict::Count => "counter name blocked",
        Verdict::Drop => "counter name blocked drop",
    };
    writeln!(out, "\tchain {chain} {{")?;
    writeln!(out, "\t\ttype filter hook {hook} priority raw; policy accept;")?;
    for (family, set) in [("ip", "ca4"), ("ip6", "ca6")] {
        let open = if matches!(direction, Direction::In) { NOT_OPENING } else { "" };
        writeln!(out, "\t\t{family} {side} . tcp {port} @{set} {open}accept")?;
    }
    for (family, set) in [("ip", "cut4"), ("ip6", "cut6")] {
        writeln!(out, "\t\t{family} {side} @{set} {end}")?;
    }
    for (family, set) in [("ip", "blocked4"), ("ip6", "blocked6")] {
        for port in ["dport", "sport"] {
            writeln!(
                out,
                "\t\t{family} {side} @{set} meta l4proto {{ tcp, udp }} th {port} @cluster_ports {end}"
            )?;
        }
    }
    writeln!(out, "\t}}")
}

fn write_arriving(out: &mut String) -> fmt::Result {
    out.write_str(
        "\tchain arriving {\n\
         \t\ttype filter hook prerouting priority mangle; policy accept;\n",
    )?;
    for (family, set) in [("ip", "ca4"), ("ip6", "ca6")] {
        writeln!(out, "\t\t{family} saddr . tcp sport @{set} {NOT_OPENING}accept")?;
    }
    out.write_str(
        "\t\tiif lo accept\n\
         \t\tfib daddr type != local accept\n\
         \t\ttcp dport @guarded_ports jump judge\n\
         \t}\n",
    )
}

/// What goes to a container is forwarded: judged by the port it arrives at there, whichever side is
/// recorded as having begun. Only where an address was rewritten: what is merely routed is not ours.
fn write_published(out: &mut String) -> fmt::Result {
    out.write_str(
        "\tchain published {\n\
         \t\ttype filter hook forward priority filter; policy accept;\n\
         \t\tct direction original ct status dnat tcp dport @guarded_ports jump judge\n\
         \t\tct direction reply ct status snat tcp dport @guarded_ports jump judge\n\
         \t}\n",
    )
}

fn write_judge(out: &mut String, policy: &Policy) -> fmt::Result {
    writeln!(out, "\tchain judge {{")?;
    for caller in Caller::ALL {
        if policy.ports_of(caller).is_empty() {
            continue;
        }
        let set = set_of(caller);
        for (family, version) in [("ip", 4), ("ip6", 6)] {
            writeln!(out, "\t\t{family} saddr @{set}{version} tcp dport @{set}_ports return")?;
        }
    }
    let (word, end) = match policy.verdict {
        Verdict::Count => ("would refuse", "counter name refused return"),
        Verdict::Drop => ("refused", "counter name refused drop"),
    };
    let cluster = &policy.cluster;
    writeln!(
        out,
        "\t\tct state new limit rate {LOG_RATE} log prefix \"ray-mtls {cluster} {word}: \""
    )?;
    writeln!(out, "\t\t{end}")?;
    writeln!(out, "\t}}")
}

fn set_of(caller: Caller) -> &'static str {
    match caller {
        Caller::Member => "members",
        Caller::Admin => "admins",
        Caller::Scraper => "scrapers",
        Caller::Driver => "drivers",
    }
}

fn write_counter(out: &mut String, name: &str, packets: u64) -> fmt::Result {
    writeln!(out, "\tcounter {name} {{ packets {packets} bytes 0 }}")
}

fn write_endpoints(out: &mut String, endpoints: &BTreeSet<SocketAddr>) -> fmt::Result {
    let canonical: BTreeSet<SocketAddr> = endpoints
        .iter()
        .map(|endpoint| SocketAddr::new(endpoint.ip().to_canonical(), endpoint.port()))
        .collect();
    let of = |v4: bool| {
        let of_family = canonical.iter().filter(move |endpoint| endpoint.is_ipv4() == v4);
        of_family.map(|endpoint| format!("{} . {}", endpoint.ip(), endpoint.port()))
    };
    write_set(out, "ca4", "ipv4_addr . inet_service", false, of(true))?;
    write_set(out, "ca6", "ipv6_addr . inet_service", false, of(false))
}

fn write_ports(out: &mut String, name: &str, ports: &[RangeInclusive<u16>]) -> fmt::Result {
    let elements = ports.iter().map(|range| match (range.start(), range.end()) {
        (min, max) if min == max => min.to_string(),
        (min, max) => format!("{min}-{max}"),
    });
    write_set(out, name, "inet_service", true, elements)
}

/// Single addresses: a hash set, one lookup a packet however many there are.
fn write_hosts(out: &mut String, name: &str, addresses: &BTreeSet<IpAddr>) -> fmt::Result {
    let of = |v4: bool| addresses.iter().filter(move |a| a.is_ipv4() == v4).map(IpAddr::to_string);
    write_set(out, &format!("{name}4"), "ipv4_addr", false, of(true))?;
    write_set(out, &format!("{name}6"), "ipv6_addr", false, of(false))
}

fn write_networks(out: &mut String, name: &str, networks: &[IpNet]) -> fmt::Result {
    let (v4, v6): (Vec<IpNet>, Vec<IpNet>) =
        IpNet::aggregate(&networks.to_vec()).into_iter().partition(|n| n.addr().is_ipv4());
    let texts = |networks: Vec<IpNet>| networks.into_iter().map(network_text);
    write_set(out, &format!("{name}4"), "ipv4_addr", true, texts(v4))?;
    write_set(out, &format!("{name}6"), "ipv6_addr", true, texts(v6))
}

fn network_text(network: IpNet) -> String {
    if network.prefix_len() == network.max_prefix_len() {
        network.addr().to_string()
    } else {
        network.trunc().to_string()
    }
}

fn write_set(
    out: &mut String,
    name: &str,
    kind: &str,
    intervals: bool,
    elements: impl Iterator<Item = String>,
) -> fmt::Result {
    writeln!(out, "\tset {name} {{")?;
    writeln!(out, "\t\ttype {kind}")?;
    if intervals {
        writeln!(out, "\t\tflags interval")?;
    }
    let elements: Vec<String> = elements.collect();
    if !elements.is_empty() {
        writeln!(out, "\t\telements = {{ {} }}", elements.join(", "))?;
    }
    writeln!(out, "\t}}")
}
