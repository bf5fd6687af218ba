//! Blocks: addresses of revoked nodes, which their peers cut off and which older tokens cannot
//! certify. Never one that anybody else needs.

use std::{collections::BTreeMap, net::IpAddr};

use ipnet::IpNet;
use raymtls_proto::identity::ClusterId;

use super::{cluster, member::by_name};
use crate::store::{
    StoreError, layout,
    records::{BlockRecord, ClusterRecord, NodeRecord},
    view::View,
};

/// Addresses of one cluster cut off at once, at most.
const BLOCKS_MAX: usize = 100_000;
/// Nodes of one cluster looked at in one decision.
const NODES_MAX: usize = 1_000_000;
/// A block lasts at least this long: some of Ray's ports ask for no leaf.
const BLOCK_MIN_MS: i64 = 24 * 60 * 60 * 1_000;

/// How far the block of a revoked node goes.
#[derive(Clone, Debug, Default)]
pub struct Reach {
    /// Every port, not the cluster's alone.
    pub all_traffic: bool,
    /// What the CA itself is reached at.
    pub ca: Vec<IpAddr>,
}

/// What was cut off, and what was not.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Blocked {
    /// Addresses cut off.
    pub addresses: Vec<String>,
    /// Addresses of the node left alone, each with the reason.
    pub spared: Vec<(String, String)>,
}

/// Blocks the addresses the node called from, but never one that somebody else needs. One it only
/// claimed may be another machine's, which its own revocation must not shut out, unless the cluster
/// trusts the ranges of its tokens.
///
/// # Errors
/// No such cluster.
pub(super) fn block(
    view: &mut View<'_>,
    node: &NodeRecord,
    leaf_end_ms: i64,
    reach: &Reach,
) -> Result<Blocked, StoreError> {
    let cluster = by_name(view, &node.cluster)?;
    let of_others = addresses_of_others(view, node)?;
    let until_ms = leaf_end_ms.max(view.now_ms() + BLOCK_MIN_MS);
    let mut blocked = Blocked::default();
    for bound in &node.addresses {
        let address = bound.address.clone();
        let why = if bound.lost {
            Some("it was certified to another node since".to_owned())
        } else if bound.proved || cluster.settings().trust_ranges {
            spared(&address, &cluster, &of_others, reach)
        } else {
            Some("no call ever came from it".to_owned())
        };
        if let Some(why) = why {
            blocked.spared.push((address, why));
            continue;
        }
        let record = BlockRecord {
            node: node.name.clone(),
            revoked_ms: node.revoked_ms,
            until_ms,
            lifted: false,
            all_traffic: reach.all_traffic,
        };
        view.put(layout::block(&node.cluster, &address), &record);
        blocked.addresses.push(address);
    }
    changed(view, &node.cluster)?;
    Ok(blocked)
}

fn spared(
    address: &str,
    cluster: &ClusterRecord,
    of_others: &BTreeMap<String, String>,
    reach: &Reach,
) -> Option<String> {
    if let Some(other) = of_others.get(address) {
        return Some(format!("it is also live node {other}'s"));
    }
    let ip = address.parse::<IpAddr>().ok()?;
    if ip.is_loopback() || ip.is_unspecified() {
        return Some("it is no machine's alone".to_owned());
    }
    if reach.ca.iter().any(|ca| ca.to_canonical() == ip.to_canonical()) {
        return Some("the CA is reached there".to_owned());
    }
    let admins = cluster.settings().admin_ranges.iter();
    let mut ranges = admins.filter_map(|range| range.parse::<IpNet>().ok());
    ranges
        .find(|range| range.contains(&ip))
        .map(|range| format!("it lies in the admin range {range}"))
}

/// Those of the node's addresses that another member has, with its name.
fn addresses_of_others(
    view: &View<'_>,
    node: &NodeRecord,
) -> Result<BTreeMap<String, String>, StoreError> {
    let nodes = view.scan::<NodeRecord>(&layout::nodes(&node.cluster), None, NODES_MAX)?;
    let others = nodes.iter().map(|(_, other)| other);
    let mut found = BTreeMap::new();
    for other in others.filter(|other| other.name != node.name && other.is_member()) {
        for bound in other.addresses.iter().filter(|bound| !bound.lost) {
            if node.addresses.iter().any(|own| own.address == bound.address) {
                found.insert(bound.address.clone(), other.name.clone());
            }
        }
    }
    Ok(found)
}

/// The addresses to cut off.
///
/// # Errors
/// No such cluster; more of them than agents could take.
pub fn list(
    view: &View<'_>,
    cluster: &ClusterId,
) -> Result<Vec<(String, BlockRecord)>, StoreError> {
    cluster::get(view, cluster)?;
    let prefix = layout::blocks(cluster.as_str());
    let rows = view.scan::<BlockRecord>(&prefix, None, BLOCKS_MAX + 1)?;
    if rows.len() > BLOCKS_MAX {
        let text = format!("more than {BLOCKS_MAX} blocked addresses in cluster {cluster}");
        return Err(StoreError::Unavailable(text));
    }
    Ok(rows
        .into_iter()
        .filter(|(_, block)| block.cuts(view.now_ms()))
        .map(|(key, block)| (String::from_utf8_lossy(&key[prefix.len()..]).into_owned(), block))
        .collect())
}

/// Ends the blocks whose time is over. Tokens older than the revocation stay barred.
///
/// # Errors
/// No such cluster.
pub(super) fn expire(view: &mut View<'_>, cluster: &ClusterId) -> Result<(), StoreError> {
    let prefix = layout::blocks(cluster.as_str());
    let over = |block: &BlockRecord| !block.lifted && !block.cuts(view.now_ms());
    let rows = view.scan::<BlockRecord>(&prefix, None, BLOCKS_MAX)?;
    let rows: Vec<_> = rows.into_iter().filter(|(_, block)| over(block)).collect();
    if rows.is_empty() {
        return Ok(());
    }
    for (key, block) in rows {
        view.put(key, &BlockRecord { lifted: true, ..block });
    }
    changed(view, cluster.as_str())
}

/// Ends the block of an address that was certified to another node since; tokens older than the
/// revocation stay barred from it.
///
/// # Errors
/// No such cluster.
pub(super) fn lift(view: &mut View<'_>, cluster: &str, address: &str) -> Result<(), StoreError> {
    let key = layout::block(cluster, address);
    let Some(mut block) = view.get::<BlockRecord>(&key)?.filter(|block| !block.lifted) else {
        return Ok(());
    };
    block.lifted = true;
    view.put(key, &block);
    changed(view, cluster)
}

/// Ends the blocks of a node that is taken back.
///
/// # Errors
/// No such cluster.
pub(super) fn lift_of(view: &mut View<'_>, node: &NodeRecord) -> Result<(), StoreError> {
    for bound in &node.addresses {
        let key = layout::block(&node.cluster, &bound.address);
        let block = view.get::<BlockRecord>(&key)?;
        if block.is_some_and(|block| block.node == node.name) {
            lift(view, &node.cluster, &bound.address)?;
        }
    }
    Ok(())
}

/// The list of blocks is another one.
fn changed(view: &mut View<'_>, cluster: &str) -> Result<(), StoreError> {
    let mut record = by_name(view, cluster)?;
    record.blocks_version = record.next_version();
    cluster::put(view, &record);
    Ok(())
}
