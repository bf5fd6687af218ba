//! Members: what the agents of a cluster must know of its nodes. Each node has one entry, at the
//! version of the cluster at which it changed last, so that what changed since a version is one scan,
//! and a page of it ends at a smaller version.

use raymtls_proto::{identity::ClusterId, v1};

use super::{block, cluster, event, identity::put};
use crate::store::{
    CONTACT_COARSE_MS, MemberPage, StoreError, layout,
    records::{AddressRecord, AuditKind, ClusterRecord, MemberRecord, NodeRecord, NodeStatus},
    view::View,
};

/// Nodes of one cluster looked at in one decision.
const NODES_MAX: usize = 1_000_000;
/// How long it is remembered that a name is gone, for agents that were away: one that was away for
/// longer is told everything anew.
const GONE_KEPT_MS: i64 = 24 * 60 * 60 * 1_000;

/// Tells the node's peers what it is now. The caller writes the node.
///
/// # Errors
/// No such cluster.
pub(super) fn tell(view: &mut View<'_>, node: &mut NodeRecord) -> Result<(), StoreError> {
    let state = match node.node_status() {
        NodeStatus::Live if node.lapsed_ms != 0 => v1::MemberState::Lapsed,
        NodeStatus::Live => v1::MemberState::Member,
        NodeStatus::Revoked => v1::MemberState::Revoked,
        NodeStatus::Left | NodeStatus::Unspecified => v1::MemberState::Gone,
    };
    tell_state(view, node, state)
}

/// Tells the peers of a node that is forgotten.
///
/// # Errors
/// No such cluster.
pub(super) fn tell_gone(view: &mut View<'_>, node: &mut NodeRecord) -> Result<(), StoreError> {
    tell_state(view, node, v1::MemberState::Gone)
}

fn tell_state(
    view: &mut View<'_>,
    node: &mut NodeRecord,
    state: v1::MemberState,
) -> Result<(), StoreError> {
    let mut cluster = by_name(view, &node.cluster)?;
    let version = cluster.next_version();
    cluster.members_version = version;
    cluster::put(view, &cluster);
    if node.member_version != 0 {
        view.delete(layout::member(&node.cluster, node.member_version));
    }
    node.member_version = version;
    let trusted = cluster.settings().trust_ranges;
    let counts = |bound: &&AddressRecord| !bound.lost && (bound.proved || trusted);
    let addresses = node.addresses.iter().filter(counts);
    let entry = MemberRecord {
        name: node.name.clone(),
        role: node.role,
        state: state.into(),
        addresses: addresses.map(|bound| bound.address.clone()).collect(),
        told_ms: view.now_ms(),
    };
    view.put(layout::member(&node.cluster, version), &entry);
    Ok(())
}

/// Tells the peers of every live node anew: which of its addresses count was set otherwise.
///
/// # Errors
/// No such cluster.
pub(super) fn tell_all(view: &mut View<'_>, cluster: &ClusterId) -> Result<(), StoreError> {
    for mut node in nodes(view, cluster.as_str())? {
        if node.node_status() == NodeStatus::Live {
            tell(view, &mut node)?;
            put(view, &node);
        }
    }
    Ok(())
}

/// Takes the nodes out of the member set that were silent for longer than the lease, from `since_ms` on
/// at the earliest, and forgets what nobody needs to be told any more. Returns how many lapsed.
///
/// # Errors
/// No such cluster.
pub fn lapse(view: &mut View<'_>, cluster: &ClusterId, since_ms: i64) -> Result<u32, StoreError> {
    let record = cluster::get(view, cluster)?;
    // Contacts are put on record that coarsely.
    let lease_ms = record.settings().lease_seconds * 1_000 + CONTACT_COARSE_MS;
    let mut lapsed = 0;
    for mut node in nodes(view, cluster.as_str())? {
        if node.node_status() != NodeStatus::Live || node.lapsed_ms != 0 {
            continue;
        }
        if node.is_out_of_lease(view.now_ms(), view.started_ms().max(since_ms), lease_ms) {
            node.lapsed_ms = view.now_ms();
            view.audit(event("ca", AuditKind::MemberLapsed, &node.cluster, &node.name));
            lapsed += 1;
        } else if node.member_version != 0 {
            continue;
        }
        // One that an earlier release enrolled was never told.
        tell(view, &mut node)?;
        put(view, &node);
    }
    block::tend(view, cluster)?;
    drop_gone(view, cluster)?;
    Ok(lapsed)
}

fn drop_gone(view: &mut View<'_>, cluster: &ClusterId) -> Result<(), StoreError> {
    let prefix = layout::members(cluster.as_str());
    let rows = view.scan::<MemberRecord>(&prefix, None, NODES_MAX)?;
    let old = |entry: &MemberRecord| {
        entry.state() != v1::MemberState::Member
            && entry.state() != v1::MemberState::Lapsed
            && view.now_ms() - entry.told_ms > GONE_KEPT_MS
    };
    let gone: Vec<Vec<u8>> =
        rows.into_iter().filter(|(_, entry)| old(entry)).map(|(key, _)| key).collect();
    let Some(newest) = gone.last().and_then(|key| version_in(key, &prefix)) else { return Ok(()) };
    let mut record = cluster::get(view, cluster)?;
    record.members_from = record.members_from.max(newest);
    cluster::put(view, &record);
    for key in gone {
        view.delete(key);
    }
    Ok(())
}

/// Up to `limit` changes after a version, oldest first.
///
/// # Errors
/// No such cluster.
pub fn since(
    view: &View<'_>,
    cluster: &ClusterId,
    after: u64,
    limit: usize,
) -> Result<MemberPage, StoreError> {
    let version = cluster::get(view, cluster)?.version;
    let prefix = layout::members(cluster.as_str());
    let from = layout::member(cluster.as_str(), after);
    let mut rows = view.scan::<MemberRecord>(&prefix, Some(&from), limit + 1)?;
    let more = rows.len() > limit;
    rows.truncate(limit);
    let last = rows.last().and_then(|(key, _)| version_in(key, &prefix));
    Ok(MemberPage {
        up_to: last.filter(|_| more).unwrap_or(version),
        more,
        entries: rows.into_iter().map(|(_, entry)| entry).collect(),
    })
}

fn version_in(key: &[u8], prefix: &[u8]) -> Option<u64> {
    key[prefix.len()..].try_into().ok().map(u64::from_be_bytes)
}

/// All nodes of a cluster.
///
/// # Errors
/// A record does not decode.
pub(super) fn nodes(view: &View<'_>, cluster: &str) -> Result<Vec<NodeRecord>, StoreError> {
    let rows = view.scan(&layout::nodes(cluster), None, NODES_MAX)?;
    Ok(rows.into_iter().map(|(_, node)| node).collect())
}

pub(super) fn by_name(view: &View<'_>, cluster: &str) -> Result<ClusterRecord, StoreError> {
    let id: ClusterId = cluster.parse().map_err(|_| StoreError::Damaged {
        key: cluster.to_owned(),
        why: "it is no name of a cluster".to_owned(),
    })?;
    cluster::get(view, &id)
}
