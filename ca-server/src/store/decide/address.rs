//! Addresses of nodes: who holds one exclusively, and for whom it counts among its peers. A claim alone
//! takes the right to be certified for an address from a node that is out of touch; that the address
//! *counts* for another, only a call from it shows, unless the cluster trusts the ranges of its tokens.

use super::{block, event, member};
use crate::store::{
    StoreError, layout,
    records::{AuditKind, AuditRecord, NodeRecord, NodeStatus},
    view::View,
};

/// A node that enrols takes its addresses. The caller writes the node.
///
/// # Errors
/// No such cluster.
pub(super) fn take_all(
    view: &mut View<'_>,
    node: &mut NodeRecord,
    actor: &str,
) -> Result<(), StoreError> {
    let trusted = member::by_name(view, &node.cluster)?.settings().trust_ranges;
    for index in 0..node.addresses.len() {
        if node.holds_exclusively() {
            take(view, node, index, actor)?;
        }
        if node.addresses[index].proved || trusted {
            settle(view, node, index, actor)?;
        }
    }
    Ok(())
}

/// Makes the node the holder. A live one that only claimed the address is on record as its loser: its
/// next leaf is refused until it enrols without it.
fn take(
    view: &mut View<'_>,
    node: &NodeRecord,
    index: usize,
    actor: &str,
) -> Result<(), StoreError> {
    let bound = &node.addresses[index];
    let loser = live_holder(view, &node.cluster, &bound.address)?;
    let loser = loser.filter(|loser| *loser != node.name && bound.proved);
    let counted = view.get_raw(&layout::counted(&node.cluster, &bound.address))?;
    if let Some(loser) = loser.filter(|loser| counted.as_deref() != Some(loser.as_bytes())) {
        lost(view, node, &loser, &bound.address, actor);
    }
    let key = layout::holder(&node.cluster, &bound.address);
    view.put_raw(key, node.name.as_bytes().to_vec());
    Ok(())
}

fn lost(view: &mut View<'_>, node: &NodeRecord, loser: &str, address: &str, actor: &str) {
    view.audit(AuditRecord {
        detail: format!("{address} is where node {} is", node.name),
        ..event(actor, AuditKind::AddressLost, &node.cluster, loser)
    });
}

/// The node called from an address of its own. Whether its peers are to be told; the caller writes the
/// node.
///
/// # Errors
/// No such cluster.
pub(super) fn called_from(
    view: &mut View<'_>,
    node: &mut NodeRecord,
    source: &str,
    actor: &str,
) -> Result<bool, StoreError> {
    let Some(index) = node.addresses.iter().position(|bound| bound.address == source) else {
        return Ok(false);
    };
    let back = node.addresses[index].lost && is_free(view, node, source)?;
    if back {
        take_back(view, node, index, actor)?;
    }
    if node.addresses[index].proved {
        return Ok(back);
    }
    node.addresses[index].proved = true;
    settle(view, node, index, actor)?;
    Ok(true)
}

/// A node that was away takes those of its addresses back that nobody holds any more. Whether its peers
/// are to be told; the caller writes the node.
///
/// # Errors
/// The store's.
pub(super) fn take_back_all(
    view: &mut View<'_>,
    node: &mut NodeRecord,
    actor: &str,
) -> Result<bool, StoreError> {
    let mut told = false;
    if !node.holds_exclusively() {
        return Ok(told);
    }
    for index in 0..node.addresses.len() {
        let bound = &node.addresses[index];
        if !holds(view, node, &bound.address)? && is_free(view, node, &bound.address)? {
            told |= bound.lost;
            take_back(view, node, index, actor)?;
        }
    }
    Ok(told)
}

/// The address counts for the node: for whoever else it counted, it counts no more, and no block covers
/// it.
fn settle(
    view: &mut View<'_>,
    node: &mut NodeRecord,
    index: usize,
    actor: &str,
) -> Result<(), StoreError> {
    let address = node.addresses[index].address.clone();
    block::lift(view, &node.cluster, &address)?;
    if !node.holds_exclusively() {
        return Ok(());
    }
    let key = layout::counted(&node.cluster, &address);
    let before = view.get_raw(&key)?.filter(|name| name != node.name.as_bytes());
    view.put_raw(key, node.name.as_bytes().to_vec());
    let Some(before) = before else { return Ok(()) };
    let before = layout::node(&node.cluster, &String::from_utf8_lossy(&before));
    let loser = view.get::<NodeRecord>(&before)?;
    // One that came back in a role that shares its address has nothing to lose.
    let loses =
        |loser: &NodeRecord| loser.node_status() == NodeStatus::Live && loser.holds_exclusively();
    let Some(mut loser) = loser.filter(loses) else { return Ok(()) };
    for bound in loser.addresses.iter_mut().filter(|bound| bound.address == address) {
        bound.lost = true;
    }
    member::tell(view, &mut loser)?;
    view.put(before, &loser);
    lost(view, node, &loser.name, &address, actor);
    Ok(())
}

fn take_back(
    view: &mut View<'_>,
    node: &mut NodeRecord,
    index: usize,
    actor: &str,
) -> Result<(), StoreError> {
    let bound = &mut node.addresses[index];
    bound.lost = false;
    let proved = bound.proved;
    view.put_raw(layout::holder(&node.cluster, &bound.address), node.name.as_bytes().to_vec());
    if proved { settle(view, node, index, actor) } else { Ok(()) }
}

/// Whether no other live node holds the address.
fn is_free(view: &View<'_>, node: &NodeRecord, address: &str) -> Result<bool, StoreError> {
    let holder = live_holder(view, &node.cluster, address)?;
    Ok(holder.is_none_or(|holder| holder == node.name))
}

/// Whether the node itself holds the address, as it mostly does.
pub(super) fn holds(view: &View<'_>, node: &NodeRecord, address: &str) -> Result<bool, StoreError> {
    let holder = view.get_raw(&layout::holder(&node.cluster, address))?;
    Ok(holder.is_some_and(|holder| holder == node.name.as_bytes()))
}

/// Gives up the addresses the node holds.
pub(super) fn release_all(view: &mut View<'_>, node: &NodeRecord) -> Result<(), StoreError> {
    for bound in &node.addresses {
        if holds(view, node, &bound.address)? {
            view.delete(layout::holder(&node.cluster, &bound.address));
        }
    }
    Ok(())
}

/// The live node that holds an address exclusively.
pub(super) fn live_holder(
    view: &View<'_>,
    cluster: &str,
    address: &str,
) -> Result<Option<String>, StoreError> {
    let Some(holder) = view.get_raw(&layout::holder(cluster, address))? else {
        return Ok(None);
    };
    let holder = String::from_utf8_lossy(&holder).into_owned();
    let node: Option<NodeRecord> = view.get(&layout::node(cluster, &holder))?;
    let live = node.is_some_and(|node| {
        node.node_status() == NodeStatus::Live && !node.is_absent(view.now_ms(), view.started_ms())
    });
    Ok(live.then_some(holder))
}
