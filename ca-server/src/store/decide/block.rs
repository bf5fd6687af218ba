//! Blocks: addresses of revoked nodes, which their peers cut off and which older tokens cannot
//! certify. Never one that anybody else needs.

use std::{collections::BTreeMap, net::IpAddr};

use ipnet::IpNet;
use raymtls_proto::identity::ClusterId;

use super::{
    cluster,
    member::{self, by_name},
};
use crate::store::{
    StoreError, layout,
    records::{AddressRecord, BlockRecord, ClusterRecord, NodeRecord, NodeStatus},
    view::View,
};

/// Addresses of one cluster cut off at once, at most.
const BLOCKS_MAX: usize = 100_000;
/// Blocks of one cluster looked at in one decision.
const ROWS_MAX: usize = 1_000_000;
/// No token lives longer (30 days).
const TOKEN_LIFE_MAX_MS: i64 = 30 * 24 * 60 * 60 * 1_000;
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
        let record = BlockRecord { until_ms, all_traffic: reach.all_traffic, ..barred(node) };
        let for_good = never_counted(bound, &cluster).or_else(|| needed_by_all(bound, reach));
        let address = bound.address.clone();
        if let Some(why) = for_good {
            blocked.spared.push((address, why));
        } else if let Some(why) = needed(bound, &cluster, &of_others) {
            write(view, &node.cluster, &address, BlockRecord { spared: true, ..record })?;
            blocked.spared.push((address, why));
        } else {
            write(view, &node.cluster, &address, record)?;
            blocked.addresses.push(address);
        }
    }
    changed(view, &node.cluster)?;
    Ok(blocked)
}

/// Bars older tokens from the addresses of a node that could not speak to Ray any more, and cuts nothing
/// off: who is there now is another.
///
/// # Errors
/// No such cluster.
pub(super) fn bar(view: &mut View<'_>, node: &NodeRecord) -> Result<Blocked, StoreError> {
    let mut blocked = Blocked::default();
    let of_others = addresses_of_others(view, node)?;
    for bound in node.addresses.iter().filter(|bound| bound.proved && !bound.lost) {
        if !of_others.contains_key(&bound.address) {
            let record = BlockRecord { lifted: true, ..barred(node) };
            write(view, &node.cluster, &bound.address, record)?;
        }
        let why = "the node was no member and has no leaf that lives".to_owned();
        blocked.spared.push((bound.address.clone(), why));
    }
    changed(view, &node.cluster)?;
    Ok(blocked)
}

fn barred(node: &NodeRecord) -> BlockRecord {
    BlockRecord { node: node.name.clone(), revoked_ms: node.revoked_ms, ..BlockRecord::default() }
}

/// Puts a block in place; what an earlier revocation cuts off there stays cut off.
fn write(
    view: &mut View<'_>,
    cluster: &str,
    address: &str,
    mut record: BlockRecord,
) -> Result<(), StoreError> {
    let key = layout::block(cluster, address);
    let before = view.get::<BlockRecord>(&key)?.filter(|before| before.cuts(view.now_ms()));
    if let Some(before) = before {
        record.until_ms = record.until_ms.max(before.until_ms);
        record.all_traffic |= before.all_traffic;
        (record.lifted, record.spared) = (false, false);
    }
    view.put(key, &record);
    Ok(())
}

/// Why an address of the node was never one to block.
fn never_counted(bound: &AddressRecord, cluster: &ClusterRecord) -> Option<String> {
    if bound.lost {
        return Some("another node is there since".to_owned());
    }
    let counts = bound.proved || cluster.settings().trust_ranges;
    (!counts).then(|| "no call ever came from it".to_owned())
}

fn needed_by_all(bound: &AddressRecord, reach: &Reach) -> Option<String> {
    let ip = bound.address.parse::<IpAddr>().ok()?;
    if ip.is_loopback() || ip.is_unspecified() {
        return Some("it is no machine's alone".to_owned());
    }
    let is_ca = reach.ca.iter().any(|ca| ca.to_canonical() == ip.to_canonical());
    is_ca.then(|| "the CA is reached there".to_owned())
}

/// Who else needs the address now.
fn needed(
    bound: &AddressRecord,
    cluster: &ClusterRecord,
    of_others: &BTreeMap<String, String>,
) -> Option<String> {
    if let Some(other) = of_others.get(&bound.address) {
        return Some(format!("it is also live node {other}'s"));
    }
    let ip = bound.address.parse::<IpAddr>().ok()?;
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
    let others = member::nodes(view, &node.cluster)?;
    let mut found = BTreeMap::new();
    for other in others.iter().filter(|other| other.name != node.name && other.is_member()) {
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
    let rows = view.scan::<BlockRecord>(&prefix, None, ROWS_MAX)?;
    let cut: Vec<_> = rows
        .into_iter()
        .filter(|(_, block)| block.cuts(view.now_ms()))
        .map(|(key, block)| (String::from_utf8_lossy(&key[prefix.len()..]).into_owned(), block))
        .collect();
    if cut.len() > BLOCKS_MAX {
        let text = format!("more than {BLOCKS_MAX} blocked addresses in cluster {cluster}");
        return Err(StoreError::Unavailable(text));
    }
    Ok(cut)
}

/// Ends the blocks whose time is over, cuts off what nobody else needs any more, and forgets blocks when
/// no token can be older.
///
/// # Errors
/// No such cluster.
pub(super) fn tend(view: &mut View<'_>, cluster: &ClusterId) -> Result<(), StoreError> {
    let record = cluster::get(view, cluster)?;
    let prefix = layout::blocks(cluster.as_str());
    let mut another = false;
    let mut of_members = None;
    for (key, block) in view.scan::<BlockRecord>(&prefix, None, ROWS_MAX)? {
        let over = block.until_ms <= view.now_ms();
        if (over || block.lifted) && view.now_ms() - block.revoked_ms > TOKEN_LIFE_MAX_MS {
            another |= !block.lifted && !block.spared;
            view.delete(key);
        } else if over && !block.lifted {
            another |= !block.spared;
            view.put(key, &BlockRecord { lifted: true, spared: false, ..block });
        } else if block.spared && !block.lifted {
            let address = String::from_utf8_lossy(&key[prefix.len()..]).into_owned();
            // Read once, however many blocks are spared.
            let of_members = match &of_members {
                Some(known) => known,
                None => of_members.insert(addresses_of_members(view, cluster.as_str())?),
            };
            if !is_needed(view, &record, &block.node, &address, of_members)? {
                another = true;
                view.put(key, &BlockRecord { spared: false, ..block });
            }
        }
    }
    if another { changed(view, cluster.as_str()) } else { Ok(()) }
}

fn is_needed(
    view: &View<'_>,
    cluster: &ClusterRecord,
    node: &str,
    address: &str,
    of_members: &BTreeMap<String, String>,
) -> Result<bool, StoreError> {
    let node = view.get::<NodeRecord>(&layout::node(&cluster.cluster, node))?;
    let Some(node) = node.filter(|node| node.node_status() == NodeStatus::Revoked) else {
        return Ok(true);
    };
    let Some(bound) = node.addresses.iter().find(|bound| bound.address == address) else {
        return Ok(true);
    };
    // It is revoked, so no member is this node.
    Ok(needed(bound, cluster, of_members).is_some())
}

/// Each address that a member of the cluster has, with its name.
fn addresses_of_members(
    view: &View<'_>,
    cluster: &str,
) -> Result<BTreeMap<String, String>, StoreError> {
    let mut found = BTreeMap::new();
    for node in member::nodes(view, cluster)?.into_iter().filter(NodeRecord::is_member) {
        let counted = node.addresses.into_iter().filter(|bound| !bound.lost);
        found.extend(counted.map(|bound| (bound.address, node.name.clone())));
    }
    Ok(found)
}

/// Ends the block of an address that counts for another node since; tokens older than the revocation
/// stay barred from it.
///
/// # Errors
/// No such cluster.
pub(super) fn lift(view: &mut View<'_>, cluster: &str, address: &str) -> Result<(), StoreError> {
    let key = layout::block(cluster, address);
    let Some(mut block) = view.get::<BlockRecord>(&key)?.filter(|block| !block.lifted) else {
        return Ok(());
    };
    (block.lifted, block.spared) = (true, false);
    view.put(key, &block);
    changed(view, cluster)
}

/// A node that had lapsed is back at one of its addresses: nobody else's block covers it.
///
/// # Errors
/// No such cluster.
pub(super) fn lift_at(
    view: &mut View<'_>,
    node: &NodeRecord,
    source: &str,
) -> Result<(), StoreError> {
    let counts = |bound: &AddressRecord| bound.address == source && bound.proved && !bound.lost;
    if node.addresses.iter().any(counts) { lift(view, &node.cluster, source) } else { Ok(()) }
}

/// Ends the blocks of a node that is taken back, where no other revoked node has the address.
///
/// # Errors
/// No such cluster.
pub(super) fn lift_of(view: &mut View<'_>, node: &NodeRecord) -> Result<(), StoreError> {
    for bound in &node.addresses {
        let key = layout::block(&node.cluster, &bound.address);
        let block = view.get::<BlockRecord>(&key)?.filter(|block| block.node == node.name);
        let Some(block) = block else { continue };
        match other_revoked(view, node, &bound.address)? {
            Some(other) => view.put(key, &BlockRecord { node: other, ..block }),
            None => lift(view, &node.cluster, &bound.address)?,
        }
    }
    Ok(())
}

fn other_revoked(
    view: &View<'_>,
    node: &NodeRecord,
    address: &str,
) -> Result<Option<String>, StoreError> {
    let has = |other: &NodeRecord| {
        let counts =
            |bound: &AddressRecord| bound.address == address && bound.proved && !bound.lost;
        other.name != node.name
            && other.node_status() == NodeStatus::Revoked
            && other.addresses.iter().any(counts)
    };
    let mut others = member::nodes(view, &node.cluster)?.into_iter();
    Ok(others.find(has).map(|other| other.name))
}

/// The list of blocks is another one.
fn changed(view: &mut View<'_>, cluster: &str) -> Result<(), StoreError> {
    let mut record = by_name(view, cluster)?;
    record.blocks_version = record.next_version();
    cluster::put(view, &record);
    Ok(())
}
