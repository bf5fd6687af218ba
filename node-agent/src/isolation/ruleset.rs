//! A policy as the text `nft -f` loads: one table, replaced whole in one transaction. Pure.
//!
//! The table drops on the cluster's Ray ports only, so that nothing else on the host can be locked
//! out by it. The chains with a hook:
//! - `blocked_in`, `blocked_out` (raw hook, before connection tracking): nothing passes between this
//!   host and a blocked address on a port of the cluster at either end, established or not; nothing at
//!   all between it and an address of the sets `cut4` and `cut6`.
//!   What goes to and comes from the CA's endpoints (`ca4`, `ca6`) passes.
//! - `arriving` (before destination NAT, so that a port which a container runtime publishes under its
//!   own number is seen as it was dialled): who may reach a guarded port of this host. What comes from
//!   the CA's endpoints passes, so that no port plan cuts the agent off from the next one; but for the packet
//!   that opens a connection: who sits at an endpoint, or relays to it, does not reach Ray by it.
//! - `published` (forward): the same, for a port that is published under another number.
//! - `turned` (input): the same, for another number that the host turns to a port of its own.
//!
//! Each packet is judged, by address and port: what a caller that was taken out of a set sends does not
//! arrive, in the middle of its connections either. Answers to what this host dialled itself pass because
//! they go to a port that is not guarded. The kernel's record of who began a connection decides nothing:
//! a connection that is picked up in the middle counts as begun by whoever is heard first, and a
//! caller can have the record end early by a reset that is recorded and then dropped here. The price: a
//! connection dialled *from* a guarded port gets its answers from that port's callers only.
//!
//! Single addresses are in sets, ranges of addresses and of ports stand in the rules. The kernel shows a
//! set of ranges (`flags interval`, named or not) to packets only at the end of the transaction, when the
//! rules are in force already: for some milliseconds with many members such a set is empty, so that members
//! are refused, or, where it names the guarded ports, everybody is let in. A set of single values has no such moment.

use std::{
    collections::BTreeSet,
    fmt::{self, Write},
    net::{IpAddr, SocketAddr},
    ops::RangeInclusive,
};

use ipnet::IpNet;
use raymtls_proto::{identity::ClusterId, ports::Caller};

use super::{
    capture,
    policy::{Policy, Verdict},
};

/// Lines in the kernel's log, at most, for what is refused.
const LOG_RATE: &str = "5/second burst 10 packets";

/// All packets but the one that opens a connection.
const NOT_OPENING: &str = "tcp flags & (syn | ack) != syn ";

/// As rules and the names of sets tell them apart.
const FAMILIES: [(&str, u8); 2] = [("ip", 4), ("ip6", 6)];

/// The chain that knows this host's guarded ports.
pub(super) const GUARDED: &str = "guarded";

/// Packets counted so far: a replaced table goes on from them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// From or to a blocked address.
    pub blocked: u64,
    /// To a guarded port, from somebody who may not reach it.
    pub refused: u64,
    /// Mode tunnel: opened on this host to Ray's ports by a user who may not.
    pub strangers: u64,
    /// Mode tunnel: opened past the tunnel.
    pub uncaptured: u64,
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
    if policy.capture.is_some() {
        write_counter(out, capture::STRANGERS, counted.strangers)?;
        write_counter(out, capture::UNCAPTURED, counted.uncaptured)?;
    }
    if let Some(mark) = mark {
        write_counter(out, &mark.to_string(), 0)?;
    }
    write_endpoints(out, &policy.protected.endpoints)?;
    write_hosts(out, "blocked", &policy.blocked())?;
    write_hosts(out, "cut", &policy.blocked_entirely())?;
    for caller in Caller::ALL {
        if let Some(hosts) = policy.hosts_of(caller) {
            write_hosts(out, set_of(caller), &hosts)?;
        }
    }
    write_hooked(out, "blocked_in", "prerouting priority raw", &blocked(Direction::In, policy))?;
    write_hooked(out, "blocked_out", "output priority raw", &blocked(Direction::Out, policy))?;
    write_chain(out, "blocked_ports", &blocked_ports(policy))?;
    write_hooked(out, "arriving", "prerouting priority mangle", &arriving())?;
    write_hooked(out, "published", "forward priority filter", &published())?;
    write_hooked(out, "turned", "input priority filter", &turned())?;
    write_chain(out, GUARDED, &guarded(policy))?;
    write_chain(out, "judge", &judge(policy))?;
    for caller in callers(policy) {
        write_chain(out, &ports_chain(caller), &let_in(policy, caller))?;
    }
    write_capture(out, policy)?;
    writeln!(out, "}}")
}

/// Mode tunnel.
fn write_capture(out: &mut String, policy: &Policy) -> fmt::Result {
    let Some(of) = &policy.capture else { return Ok(()) };
    for chain in capture::chains(of, &policy.cluster_ports(), &policy.dialled_ports()) {
        match chain.hook {
            Some((kind, hook)) => write_base(out, chain.name, kind, hook, &chain.rules)?,
            None => write_chain(out, chain.name, &chain.rules)?,
        }
    }
    Ok(())
}

#[derive(Clone, Copy)]
enum Direction {
    In,
    Out,
}

fn blocked(direction: Direction, policy: &Policy) -> Vec<String> {
    let (side, port, opening) = match direction {
        Direction::In => ("saddr", "sport", NOT_OPENING),
        Direction::Out => ("daddr", "dport", ""),
    };
    let end = counted_as_blocked(policy);
    let ca = format!("tcp {port}");
    FAMILIES
        .map(|(ip, v)| format!("{ip} {side} . {ca} @ca{v} {opening}accept"))
        .into_iter()
        .chain(FAMILIES.map(|(ip, v)| format!("{ip} {side} @cut{v} {end}")))
        .chain(FAMILIES.map(|(ip, v)| {
            format!("{ip} {side} @blocked{v} meta l4proto {{ tcp, udp }} jump blocked_ports")
        }))
        .collect()
}

/// A port of the cluster at either end.
fn blocked_ports(policy: &Policy) -> Vec<String> {
    let end = counted_as_blocked(policy);
    let ends = |range: &RangeInclusive<u16>| {
        let ports = ports_text(range);
        ["dport", "sport"].map(|side| format!("th {side} {ports} {end}"))
    };
    policy.cut_ports().iter().flat_map(ends).collect()
}

fn counted_as_blocked(policy: &Policy) -> &'static str {
    match policy.verdict {
        Verdict::Count => "counter name blocked",
        Verdict::Drop => "counter name blocked drop",
    }
}

fn arriving() -> Vec<String> {
    FAMILIES
        .map(|(ip, v)| format!("{ip} saddr . tcp sport @ca{v} {NOT_OPENING}accept"))
        .into_iter()
        .chain(
            ["iif lo accept", "fib daddr type != local accept", "meta l4proto tcp jump guarded"]
                .map(str::to_owned),
        )
        .collect()
}

/// What goes to a container is forwarded: judged by the port it arrives at there, whichever side is
/// recorded as having begun. Only where an address was rewritten: what is merely routed is not ours.
fn published() -> Vec<String> {
    ["original ct status dnat", "reply ct status snat"]
        .map(|rewritten| format!("ct direction {rewritten} jump {GUARDED}"))
        .into()
}

/// The same for what the host turns to a port of its own: `arriving` saw it under another number.
fn turned() -> Vec<String> {
    std::iter::once("iif lo accept".to_owned()).chain(published()).collect()
}

/// A packet is judged once: what `judge` does not drop goes on behind the jump to here.
fn guarded(policy: &Policy) -> Vec<String> {
    let ports = policy.guarded_ports();
    ports.iter().map(|range| format!("tcp dport {} goto judge", ports_text(range))).collect()
}

fn judge(policy: &Policy) -> Vec<String> {
    let (word, end) = match policy.verdict {
        Verdict::Count => ("would refuse", "counter name refused return"),
        Verdict::Drop => ("refused", "counter name refused drop"),
    };
    let cluster = &policy.cluster;
    let mut rules: Vec<String> =
        callers(policy).flat_map(|caller| who_is(policy, caller)).collect();
    rules.push(format!(
        "ct state new limit rate {LOG_RATE} log prefix \"ray-mtls {cluster} {word}: \""
    ));
    rules.push(end.to_owned());
    rules
}

/// Those who may reach any port of this host.
fn callers(policy: &Policy) -> impl Iterator<Item = Caller> {
    Caller::ALL.into_iter().filter(|caller| !policy.ports_of(*caller).is_empty())
}

/// By what address a caller is known.
fn who_is(policy: &Policy, caller: Caller) -> Vec<String> {
    let (set, chain) = (set_of(caller), ports_chain(caller));
    let hosts = policy.hosts_of(caller).map(|_| FAMILIES);
    let hosts = hosts.into_iter().flatten().map(|(ip, v)| format!("{ip} saddr @{set}{v}"));
    let (v4, v6): (Vec<IpNet>, Vec<IpNet>) = IpNet::aggregate(&policy.networks_of(caller))
        .into_iter()
        .partition(|network| network.addr().is_ipv4());
    let v4 = v4.into_iter().map(|network| format!("ip saddr {}", network_text(network)));
    let v6 = v6.into_iter().map(|network| format!("ip6 saddr {}", network_text(network)));
    hosts.chain(v4).chain(v6).map(|from| format!("{from} jump {chain}")).collect()
}

/// What a caller may reach; of the rest `judge` hears again.
fn let_in(policy: &Policy, caller: Caller) -> Vec<String> {
    let ports = policy.ports_of(caller);
    ports.iter().map(|range| format!("tcp dport {} accept", ports_text(range))).collect()
}

fn ports_chain(caller: Caller) -> String {
    format!("{}_ports", set_of(caller))
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
    write_set(out, "ca4", "ipv4_addr . inet_service", of(true))?;
    write_set(out, "ca6", "ipv6_addr . inet_service", of(false))
}

fn ports_text(range: &RangeInclusive<u16>) -> String {
    match (range.start(), range.end()) {
        (min, max) if min == max => min.to_string(),
        (min, max) => format!("{min}-{max}"),
    }
}

/// One lookup a packet, however many there are.
fn write_hosts(out: &mut String, name: &str, addresses: &BTreeSet<IpAddr>) -> fmt::Result {
    let of = |v4: bool| addresses.iter().filter(move |a| a.is_ipv4() == v4).map(IpAddr::to_string);
    write_set(out, &format!("{name}4"), "ipv4_addr", of(true))?;
    write_set(out, &format!("{name}6"), "ipv6_addr", of(false))
}

fn network_text(network: IpNet) -> String {
    if network.prefix_len() == network.max_prefix_len() {
        network.addr().to_string()
    } else {
        network.trunc().to_string()
    }
}

/// Of single values alone: see above for why there is no set of ranges.
fn write_set(
    out: &mut String,
    name: &str,
    kind: &str,
    elements: impl Iterator<Item = String>,
) -> fmt::Result {
    writeln!(out, "\tset {name} {{")?;
    writeln!(out, "\t\ttype {kind}")?;
    let elements: Vec<String> = elements.collect();
    if !elements.is_empty() {
        writeln!(out, "\t\telements = {{ {} }}", elements.join(", "))?;
    }
    writeln!(out, "\t}}")
}

/// A chain that packets enter by themselves.
fn write_hooked(out: &mut String, name: &str, hook: &str, rules: &[String]) -> fmt::Result {
    write_base(out, name, "filter", hook, rules)
}

fn write_base(
    out: &mut String,
    name: &str,
    kind: &str,
    hook: &str,
    rules: &[String],
) -> fmt::Result {
    writeln!(out, "\tchain {name} {{")?;
    writeln!(out, "\t\ttype {kind} hook {hook}; policy accept;")?;
    write_rules(out, rules)
}

/// A chain that others send packets to.
fn write_chain(out: &mut String, name: &str, rules: &[String]) -> fmt::Result {
    writeln!(out, "\tchain {name} {{")?;
    write_rules(out, rules)
}

fn write_rules(out: &mut String, rules: &[String]) -> fmt::Result {
    for rule in rules {
        writeln!(out, "\t\t{rule}")?;
    }
    writeln!(out, "\t}}")
}
