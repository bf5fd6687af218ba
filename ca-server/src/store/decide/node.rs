//! A node's way out: leaving, being revoked, being forgotten.

use raymtls_proto::{
    clock,
    identity::{ClusterId, NodeName},
    v1,
};
use time::format_description::well_known::Rfc3339;

use super::{
    address, block, cluster, event,
    identity::{put, require},
    member, record_page,
};
use crate::{
    refusal::Refusal,
    store::{
        Blocked, Caller, NodeRevoked, Page, Revoking, StoreError, layout,
        records::{
            AuditKind, AuditRecord, CertificateRecord, NodeRecord, NodeStatus, RevocationRecord,
            TokenRecord,
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
    address::release_all(view, &node)?;
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
    revoking: &Revoking,
) -> Result<NodeRevoked, StoreError> {
    let Revoking { reason, keep_token, reach } = revoking;
    let mut node = get(view, cluster, name)?;
    let was_member = node.is_member();
    if node.node_status() == NodeStatus::Revoked {
        let version = cluster::get(view, cluster)?.version;
        let blocked = Blocked::default();
        return Ok(NodeRevoked { node, certificates: 0, token_uses_voided: 0, blocked, version });
    }
    node.status = NodeStatus::Revoked.into();
    node.revoked_ms = view.now_ms();
    node.revoked_reason.clone_from(reason);
    member::tell(view, &mut node)?;
    put(view, &node);
    address::release_all(view, &node)?;
    let issued = certificates_of(view, &node)?;
    let leaf_end_ms = latest_leaf_end(&issued);
    let blocked = if was_member || leaf_end_ms > view.now_ms() {
        block::block(view, &node, leaf_end_ms, reach)?
    } else {
        block::bar(view, &node)?
    };
    let certificates = revoke_certificates(view, cluster, &node, issued)?;
    let token_uses_voided = if *keep_token { 0 } else { void_tokens(view, actor, &node)? };
    view.audit(AuditRecord {
        detail: reason.clone(),
        ..event(actor, AuditKind::NodeRevoked, cluster.as_str(), name.as_str())
    });
    let version = cluster::get(view, cluster)?.version;
    Ok(NodeRevoked { node, certificates, token_uses_voided, blocked, version })
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
    let until_ms = latest_leaf_end(&certificates_of(view, &node)?);
    if node.node_status() == NodeStatus::Revoked && until_ms > view.now_ms() {
        let until = clock::from_unix(until_ms / 1_000).and_then(|at| at.format(&Rfc3339).ok());
        let until = until.unwrap_or_else(|| "a far day".to_owned());
        return Err(Refusal::LeafStillLives { node: node.name, until }.into());
    }
    address::release_all(view, &node)?;
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

/// When the last Ray leaf ever issued under a name ends. The node's own record knows only the leaves
/// since its last enrolment.
fn latest_leaf_end(issued: &[CertificateRecord]) -> i64 {
    let leaves = issued.iter().filter(|one| one.kind() != v1::CertificateKind::AgentIdentity);
    leaves.map(|leaf| leaf.not_after_ms).max().unwrap_or(0)
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
    issued: Vec<CertificateRecord>,
) -> Result<u32, StoreError> {
    let (mut identities, mut leaves) = (0, 0);
    for mut record in issued {
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
            taken_back: false,
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
