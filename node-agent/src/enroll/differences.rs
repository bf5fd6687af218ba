//! Whether an enrolment that is asked for is the one this machine has: what differs, in words. It asks
//! nobody and writes nothing.

use raymtls_proto::join::JoinFile;

use super::Options;
use crate::{failure::Failure, nodefile::NodeFile};

/// What a join file for another cluster differs in.
pub(super) fn other_cluster(join: &JoinFile, node: &NodeFile) -> Vec<String> {
    let mut differences = Vec::new();
    if join.trust_domain != node.trust_domain {
        differences.push(format!("the join file is of deployment {}", join.trust_domain));
    }
    if join.cluster != node.cluster {
        differences.push(format!("the join file is for cluster {}", join.cluster));
    }
    differences
}

/// What the command asks for that the CA did not bind to this node, or bound otherwise.
pub(super) fn other_binding(options: &Options, node: &NodeFile) -> Vec<String> {
    let mut differences = Vec::new();
    if options.name_given && !is_named(node.node.as_str(), options.name.as_str()) {
        differences.push(format!("name {} is asked for", options.name));
    }
    if options.role != node.role {
        differences.push(format!("role {} is asked for", options.role));
    }
    let asked: Vec<_> = options.addresses.iter().map(|address| address.ip()).collect();
    for address in asked.iter().filter(|address| !node.addresses.contains(address)) {
        differences.push(format!("address {address} is asked for and not bound"));
    }
    // One more is bound than was asked for: the one the connection came from.
    let bound: Vec<_> = node.addresses.iter().filter(|a| !asked.contains(a)).collect();
    if bound.len() > 1 {
        let list = bound.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        differences.push(format!("addresses {list} are bound and not asked for"));
    }
    // Who asks for no DNS name gets all the token has.
    let names: Vec<_> = options.dns_names.iter().map(ToString::to_string).collect();
    for name in names.iter().filter(|name| !node.dns_names.contains(name)) {
        differences.push(format!("DNS name {name} is asked for and not bound"));
    }
    for name in node.dns_names.iter().filter(|name| !names.is_empty() && !names.contains(name)) {
        differences.push(format!("DNS name {name} is bound and not asked for"));
    }
    differences
}

/// Whether a node got its name by asking for `asked`: as it is, or shortened and with a suffix.
fn is_named(node: &str, asked: &str) -> bool {
    let base = asked.get(..SHORTENED_LEN).unwrap_or(asked).trim_end_matches('-');
    let generated = node.rsplit_once('-').is_some_and(|(beginning, suffix)| {
        beginning == base
            && suffix.len() == SUFFIX_LEN
            && suffix.bytes().all(|b| b.is_ascii_hexdigit())
    });
    node == asked || generated
}

/// Refuses what a machine that is enrolled cannot become.
pub(super) fn refuse_differences(node: &NodeFile, differences: &[String]) -> Result<(), Failure> {
    if differences.is_empty() {
        return Ok(());
    }
    let addresses = node.addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    Err(Failure::Usage(format!(
        "this machine is enrolled as {} ({}, {addresses}) of cluster {} of {}, but {}; the join \
         file was not used: run `node-agent leave` first (unless it has left, or is revoked) and \
         move the state folder and the TLS folder away, or give another --state-dir and --tls-dir \
         to enrol beside it",
        node.node,
        node.role,
        node.cluster,
        node.trust_domain,
        differences.join(", ")
    )))
}

/// Hexadecimal digits a name ends with that the CA generated.
const SUFFIX_LEN: usize = 8;
/// The CA shortens longer names to this before the suffix; a dash at the end goes as well.
const SHORTENED_LEN: usize = 63 - 1 - SUFFIX_LEN;
