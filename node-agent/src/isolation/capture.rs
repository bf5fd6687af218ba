//! Mode tunnel in the cluster's table: what Ray dials at members goes to this host's `ray-tunnel`, and
//! what could go around it is refused. Pure: rules as text, for `ruleset` to put into the table.
//!
//! - `capture` (nat, output): a connection that Ray's user, root or the agent opens to a member on a port of
//!   the cluster is handed to the tunnel. What the tunnel itself opens is not: its user is no one else's.
//! - `leaving` (filter, output): of packets that open a connection, those which were not captured and should
//!   have been are answered with a reset, so that a rule that is missing above is a refusal and never plaintext:
//!   to a member from whomever; from those who may use Ray, to anybody on a port of the cluster. On this host, Ray's ports
//!   and the tunnel's are for those users alone. UDP on the cluster's ports to members is refused.
//! - `tunnel_in` (before destination NAT): members alone dial the tunnel from outside.
//!
//! All of it is in force whether the rest of the table counts or drops: mode tunnel has no plaintext to fall
//! back to. What goes to the CA's endpoints passes first. Ranges of ports stand in rules and not in sets, for
//! the reason given in `ruleset`.

use std::{collections::BTreeSet, ops::RangeInclusive};

/// An address of the host itself that proves capture where there is no member to dial. The connection never
/// leaves the host, and needs no route.
pub const PROOF_ADDRESS: std::net::Ipv4Addr = std::net::Ipv4Addr::new(127, 0, 0, 2);

/// Who captures what.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capture {
    /// Who may use Ray on this host: its user, root, the agent.
    pub users: BTreeSet<u32>,
    /// The user of `ray-tunnel`.
    pub tunnel_uid: u32,
    /// Port on loopback to which connections are handed.
    pub captured_port: u16,
    /// Port at which other nodes dial this one's tunnel.
    pub inbound_port: u16,
    /// Port that no member has: a connection to it is answered on this host.
    pub proof_port: u16,
}

/// A chain of the table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Chain {
    pub(super) name: &'static str,
    /// Kind, hook and priority, where packets enter here.
    pub(super) hook: Option<(&'static str, &'static str)>,
    pub(super) rules: Vec<String>,
}

/// What refuses a user of this host that may not use Ray.
pub(super) const STRANGERS: &str = "strangers";
/// What refuses a connection that was not captured.
pub(super) const UNCAPTURED: &str = "uncaptured";

const RESET: &str = "reject with tcp reset";

/// The chains, for a cluster of these ports. `ports` are all of the cluster's; `dialled` those of them that
/// members have for each other.
pub(super) fn chains(
    capture: &Capture,
    ports: &[RangeInclusive<u16>],
    dialled: &[RangeInclusive<u16>],
) -> Vec<Chain> {
    let chain = |name, hook, rules| Chain { name, hook, rules };
    vec![
        chain("capture", Some(("nat", "output priority -100")), capture_rules(capture)),
        chain("captured_ports", None, captured_ports(capture, dialled)),
        chain("leaving", Some(("filter", "output priority 0")), leaving_rules(capture)),
        chain("leaving_udp", None, each(ports, "udp", &refused(UNCAPTURED, "reject"))),
        chain("here", None, here_rules(capture, ports)),
        chain("elsewhere", None, elsewhere_rules(capture)),
        chain("not_captured", None, each(ports, "tcp", &refused(UNCAPTURED, RESET))),
        chain("tunnel_in", Some(("filter", "prerouting priority mangle")), inbound_rules(capture)),
    ]
}

fn capture_rules(capture: &Capture) -> Vec<String> {
    let Capture { tunnel_uid, captured_port, proof_port, .. } = capture;
    vec![
        format!("meta skuid {tunnel_uid} return"),
        format!("meta skuid != {} return", user_set(&capture.users)),
        format!("ip daddr {PROOF_ADDRESS} tcp dport {proof_port} redirect to :{captured_port}"),
        "fib daddr type local return".to_owned(),
        "ip daddr @members4 meta l4proto tcp jump captured_ports".to_owned(),
        "ip6 daddr @members6 meta l4proto tcp jump captured_ports".to_owned(),
    ]
}

fn captured_ports(capture: &Capture, dialled: &[RangeInclusive<u16>]) -> Vec<String> {
    let proof = capture.proof_port..=capture.proof_port;
    let all: Vec<_> = dialled.iter().cloned().chain([proof]).collect();
    each(&all, "tcp", &format!("redirect to :{}", capture.captured_port))
}

fn leaving_rules(_: &Capture) -> Vec<String> {
    [
        "ip daddr . tcp dport @ca4 accept",
        "ip6 daddr . tcp dport @ca6 accept",
        "meta l4proto tcp tcp flags & (syn | ack) != syn accept",
        "fib daddr type local meta l4proto tcp goto here",
        "fib daddr type local accept",
        "ip daddr @members4 meta l4proto udp jump leaving_udp",
        "ip6 daddr @members6 meta l4proto udp jump leaving_udp",
        "meta l4proto tcp goto elsewhere",
    ]
    .map(str::to_owned)
    .into()
}

fn here_rules(capture: &Capture, ports: &[RangeInclusive<u16>]) -> Vec<String> {
    let mut users = capture.users.clone();
    users.insert(capture.tunnel_uid);
    let own = capture.captured_port..=capture.captured_port;
    let all: Vec<_> = ports.iter().cloned().chain([own]).collect();
    let mut rules = vec![format!("meta skuid {} accept", user_set(&users))];
    rules.extend(each(&all, "tcp", &refused(STRANGERS, RESET)));
    rules
}

fn elsewhere_rules(capture: &Capture) -> Vec<String> {
    let mut users = capture.users.clone();
    users.insert(capture.tunnel_uid);
    vec![
        "ip daddr @members4 goto not_captured".to_owned(),
        "ip6 daddr @members6 goto not_captured".to_owned(),
        format!("meta skuid {} goto not_captured", user_set(&users)),
    ]
}

fn inbound_rules(capture: &Capture) -> Vec<String> {
    vec![
        "iif lo accept".to_owned(),
        "fib daddr type != local accept".to_owned(),
        format!("tcp dport != {} accept", capture.inbound_port),
        "ip saddr @members4 accept".to_owned(),
        "ip6 saddr @members6 accept".to_owned(),
        format!("tcp dport {} counter name refused drop", capture.inbound_port),
    ]
}

fn each(ports: &[RangeInclusive<u16>], protocol: &str, end: &str) -> Vec<String> {
    let text = |range: &RangeInclusive<u16>| match (range.start(), range.end()) {
        (min, max) if min == max => min.to_string(),
        (min, max) => format!("{min}-{max}"),
    };
    ports.iter().map(|range| format!("{protocol} dport {} {end}", text(range))).collect()
}

fn refused(counter: &str, verdict: &str) -> String {
    format!("counter name {counter} {verdict}")
}

fn user_set(users: &BTreeSet<u32>) -> String {
    let users: Vec<String> = users.iter().map(u32::to_string).collect();
    format!("{{ {} }}", users.join(", "))
}
