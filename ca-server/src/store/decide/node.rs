//! A node's way out: leaving, being revoked, being forgotten.

use raymtls_proto::{
    clock,
    identity::{ClusterId, NodeName},
    v1,
};
use time::format_description::well_known::Rfc3339;

use super::{
    cluster,
    enroll::{live_holder, release_addresses},
    event,
    identity::{put, require},
    member, record_page,
};
use crate::{
    refusal::Refusal,
    store::{
        Caller, NodeRevoked, Page, StoreError, layout,
        records::{
            AuditKind, AuditRecord, BlockRecord, CertificateRecord, NodeRecord, NodeStatus,
            RevocationRecord, TokenRecord,
        },
        view::View,
    },
};

/// Certificates of one node ever, or nodes of one cluster, looked at in one decision.
const ROWS_MAX: usize = 1_000_000;

/// The caller leaves.
///
/// # Errors
/// As `identity::still_stands`.
pub fn leave(view: &mut View<'_>, caller: &Caller) -> Result<(), StoreError> {
    let mut node = require(view, caller)?;
    release_addresses(view, &node)?;
    node.status = NodeStatus::Left.into();
    node.pending = None;
    member::tell(view, &mut node)?;
    put(view, &node);
    view.audit(event(&caller.actor(), AuditKind::NodeLeft, &node.cluster, &node.name));
    Ok(())
}

/// Revokes a node; revoking it again changes nothing.
///
/// # Errors
/// No such cluster or node.
pub fn revoke(
    view: &mut View<'_>,
    actor: &str,
    cluster: &ClusterId,
    name: &NodeName,
    reason: &str,
    keep_token: bool,
) -> Result<NodeRevoked, StoreError> {
    let mut node = get(view, cluster, name)?;
    if node.node_status() == NodeStatus::Revoked {
        return Ok(NodeRevoked { node, certificates: 0, token_uses_voided: 0 });
    }
    node.status = NodeStatus::Revoked.into();
    node.revoked_ms = view.now_ms();
    node.revoked_reason = reason.to_owned();
    member::tell(view, &mut node)?;
    put(view, &node);
    release_addresses(view, &node)?;
    block_addresses(view, &node)?;
    let certificates = revoke_certificates(view, cluster, &node)?;
    let token_uses_voided = if keep_token { 0 } else { void_tokens(view, actor, &node)? };
    view.audit(AuditRecord {
        detail: reason.to_owned(),
        ..event(actor, AuditKind::NodeRevoked, cluster.as_str(), name.as_str())
    });
    Ok(NodeRevoked { node, certificates, token_uses_voided })
}

/// Forgets a node.
///
/// # Errors
/// No such cluster or node; a revoked one whose leaf still lives.
pub fn forget(
    view: &mut View<'_>,
    actor: &str,
    cluster: &ClusterId,
    name: &NodeName,
) -> Result<(), StoreError> {
    let mut node = get(view, cluster, name)?;
    let until_ms = latest_leaf_end(view, &node)?;
    if node.node_status() == NodeStatus::Revoked && until_ms > view.now_ms() {
        let until = clock::from_unix(until_ms / 1_000).and_then(|at| at.format(&Rfc3339).ok());
        let until = until.unwrap_or_else(|| "a far day".to_owned());
        return Err(Refusal::LeafStillLives { node: node.name, until }.into());
    }
    release_addresses(view, &node)?;
    member::tell_gone(view, &mut node)?;
    view.delete(layout::node(cluster.as_str(), name.as_str()));
    view.audit(event(actor, AuditKind::NodeForgotten, cluster.as_str(), name.as_str()));
    Ok(())
}

/// One node.
///
/// # Errors
/// No such cluster or node.
pub fn get(
    view: &View<'_>,
    cluster: &ClusterId,
    name: &NodeName,
) -> Result<NodeRecord, StoreError> {
    cluster::get(view, cluster)?;
    let node = view.get(&layout::node(cluster.as_str(), name.as_str()))?;
    Ok(node.ok_or_else(|| Refusal::NotFound { what: "node", name: name.to_string() })?)
}

/// Nodes of a cluster, by name.
///
/// # Errors
/// No such cluster, or a cursor that is not one of ours.
pub fn list(
    view: &View<'_>,
    cluster: &ClusterId,
    cursor: &str,
) -> Result<Page<NodeRecord>, StoreError> {
    cluster::get(view, cluster)?;
    record_page(view, &layout::nodes(cluster.as_str()), cursor)
}

/// Blocks the addresses the node called from, for its peers and for older tokens, but never one that
/// another live node has. One it only claimed may be another machine's, which its own revocation must
/// not shut out.
fn block_addresses(view: &mut View<'_>, node: &NodeRecord) -> Result<(), StoreError> {
    let until_ms = latest_leaf_end(view, node)?;
    for bound in node.addresses.iter().filter(|bound| bound.proved) {
        if address_of_another(view, node, &bound.address)? {
            continue;
        }
        let block = BlockRecord {
            node: node.name.clone(),
            revoked_ms: node.revoked_ms,
            until_ms,
            lifted: false,
        };
        view.put(layout::block(&node.cluster, &bound.address), &block);
    }
    member::blocks_changed(view, &node.cluster)
}

fn address_of_another(
    view: &View<'_>,
    node: &NodeRecord,
    address: &str,
) -> Result<bool, StoreError> {
    if live_holder(view, &node.cluster, address)?.is_some() {
        return Ok(true);
    }
    // Shared addresses have no holder on record: look at every node.
    let nodes = view.scan::<NodeRecord>(&layout::nodes(&node.cluster), None, ROWS_MAX)?;
    Ok(nodes.iter().any(|(_, other)| {
        other.name != node.name
            && other.node_status() == NodeStatus::Live
            && !other.is_absent(view.now_ms(), view.started_ms())
            && other.addresses.iter().any(|bound| bound.address == address)
    }))
}

/// When the last Ray leaf ever issued under the name ends. The node's own record knows only the
/// leaves since its last enrolment.
fn latest_leaf_end(view: &View<'_>, node: &NodeRecord) -> Result<i64, StoreError> {
    let mut latest_ms = 0;
    for record in certificates_of(view, node)? {
        if record.kind() != v1::CertificateKind::AgentIdentity {
            latest_ms = latest_ms.max(record.not_after_ms);
        }
    }
    Ok(latest_ms)
}

pub(super) fn certificates_of(
    view: &View<'_>,
    node: &NodeRecord,
) -> Result<Vec<CertificateRecord>, StoreError> {
    let prefix = layout::node_certificates(&node.cluster, &node.name);
    let keys = view.scan_raw(&prefix, None, ROWS_MAX + 1)?;
    if keys.len() > ROWS_MAX {
        let text = format!("node {} has more than {ROWS_MAX} certificates", node.name);
        return Err(StoreError::Unavailable(text));
    }
    keys.iter()
        .filter_map(|(key, _)| view.get(&layout::certificate(&key[prefix.len()..])).transpose())
        .collect()
}

fn revoke_certificates(
    view: &mut View<'_>,
    cluster: &ClusterId,
    node: &NodeRecord,
) -> Result<u32, StoreError> {
    let (mut identities, mut leaves) = (0, 0);
    for mut record in certificates_of(view, node)? {
        if record.revoked_ms != 0 || record.not_after_ms <= view.now_ms() {
            continue;
        }
        record.revoked_ms = view.now_ms();
        record.revoked_reason.clone_from(&node.revoked_reason);
        view.put(layout::certificate(&record.serial), &record);
        let authority = if record.kind() == v1::CertificateKind::AgentIdentity {
            identities += 1;
            ""
        } else {
            leaves += 1;
            cluster.as_str()
        };
        let revocation = RevocationRecord {
            serial: record.serial.clone(),
            revoked_ms: record.revoked_ms,
            not_after_ms: record.not_after_ms,
            issuer_key_id: record.issuer_key_id,
        };
        view.put(layout::revocation(authority, &record.serial), &revocation);
    }
    let mut control = cluster::control(view)?.ok_or(Refusal::Internal)?;
    control.revocations += u64::from(identities);
    view.put(layout::CONTROL.to_vec(), &control);
    let mut record = cluster::get(view, cluster)?;
    record.revocations += u64::from(leaves);
    record.next_version();
    cluster::put(view, &record);
    Ok(identities + leaves)
}

/// Makes what is left of the node's tokens void: whoever spoke for this node may hold a join file.
fn void_tokens(view: &mut View<'_>, actor: &str, node: &NodeRecord) -> Result<u32, StoreError> {
    let mut voided = 0;
    for id in std::iter::once(&node.token_id).chain(&node.earlier_token_ids) {
        let key = layout::token(id);
        let Some(mut token) = view.get::<TokenRecord>(&key)? else { continue };
        let unused = token.uses.saturating_sub(token.used);
        if unused == 0 || token.revoked_ms != 0 || token.expires_ms <= view.now_ms() {
            continue;
        }
        voided += unused;
        token.revoked_ms = view.now_ms();
        view.put(key, &token);
        view.audit(AuditRecord {
            token_id: token.id.clone(),
            detail: format!("{unused} unused uses void: node {} revoked", node.name),
            ..event(actor, AuditKind::TokenRevoked, &node.cluster, &node.name)
        });
    }
    Ok(voided)
}
