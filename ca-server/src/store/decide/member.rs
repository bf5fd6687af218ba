//! Members: what the agents of a cluster must know of its nodes. Each node has one entry, at the
//! version of the cluster at which it changed last, so that what changed since a version is one scan,
//! and a page of it is a smaller version.

use raymtls_proto::{identity::ClusterId, v1};

use super::{cluster, event, identity::put};
use crate::store::{
    MemberPage, StoreError, layout,
    records::{AuditKind, BlockRecord, ClusterRecord, MemberRecord, NodeRecord, NodeStatus},
    view::View,
};

/// Nodes of one cluster looked at in one decision.
const NODES_MAX: usize = 1_000_000;
/// Addresses of one cluster cut off at once, at most.
const BLOCKS_MAX: usize = 100_000;

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
    cluster::put(view, &cluster);
    if node.member_version != 0 {
        view.delete(layout::member(&node.cluster, node.member_version));
    }
    node.member_version = version;
    let entry = MemberRecord {
        name: node.name.clone(),
        role: node.role,
        state: state.into(),
        addresses: node.addresses.clone(),
    };
    view.put(layout::member(&node.cluster, version), &entry);
    Ok(())
}

/// Takes the nodes out of the member set that were silent for longer than the lease. Returns how many.
///
/// # Errors
/// No such cluster.
pub fn lapse(view: &mut View<'_>, cluster: &ClusterId) -> Result<u32, StoreError> {
    let lease_ms = cluster::get(view, cluster)?.settings().lease_seconds * 1_000;
    let nodes = view.scan::<NodeRecord>(&layout::nodes(cluster.as_str()), None, NODES_MAX)?;
    let mut lapsed = 0;
    for (_, mut node) in nodes {
        let member = node.node_status() == NodeStatus::Live && node.lapsed_ms == 0;
        if member && node.is_out_of_lease(view.now_ms(), view.started_ms(), lease_ms) {
            node.lapsed_ms = view.now_ms();
            tell(view, &mut node)?;
            put(view, &node);
            view.audit(event("ca", AuditKind::MemberLapsed, &node.cluster, &node.name));
            lapsed += 1;
        }
    }
    Ok(lapsed)
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
    let ended = rows.len() <= limit;
    rows.truncate(limit);
    let last = rows.last().map(|(key, _)| &key[prefix.len()..]);
    let last = last.and_then(|rest| rest.try_into().ok()).map(u64::from_be_bytes);
    Ok(MemberPage {
        up_to: last.filter(|_| !ended).unwrap_or(version),
        entries: rows.into_iter().map(|(_, entry)| entry).collect(),
    })
}

/// The addresses to cut off.
///
/// # Errors
/// No such cluster; more of them than agents could take.
pub fn blocks(
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
        .filter(|(_, block)| !block.lifted && block.until_ms > view.now_ms())
        .map(|(key, block)| (String::from_utf8_lossy(&key[prefix.len()..]).into_owned(), block))
        .collect())
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
    blocks_changed(view, cluster)
}

/// The list of blocks is another one.
///
/// # Errors
/// No such cluster.
pub(super) fn blocks_changed(view: &mut View<'_>, cluster: &str) -> Result<(), StoreError> {
    let mut record = by_name(view, cluster)?;
    record.blocks_version = record.next_version();
    cluster::put(view, &record);
    Ok(())
}

fn by_name(view: &View<'_>, cluster: &str) -> Result<ClusterRecord, StoreError> {
    let id: ClusterId = cluster.parse().map_err(|_| StoreError::Damaged {
        key: cluster.to_owned(),
        why: "it is no name of a cluster".to_owned(),
    })?;
    cluster::get(view, &id)
}
