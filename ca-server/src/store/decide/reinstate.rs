//! Taking a revoked node back: it may enrol again, and its addresses are cut off no more. What was
//! revoked stays revoked: its certificates, their keys, and for its addresses every token made before.

use raymtls_proto::identity::{ClusterId, NodeName};

use super::{block, event, identity::put, member, node, revoke_leaf};
use crate::{
    refusal::Refusal,
    store::{
        StoreError,
        records::{AuditKind, AuditRecord, NodeRecord, NodeStatus},
        view::View,
    },
};

/// Takes a revoked node back, as one that has left.
///
/// # Errors
/// No such cluster or node, or it is not revoked.
pub fn reinstate(
    view: &mut View<'_>,
    actor: &str,
    cluster: &ClusterId,
    name: &NodeName,
) -> Result<NodeRecord, StoreError> {
    let mut record = node::get(view, cluster, name)?;
    if record.node_status() != NodeStatus::Revoked {
        let text =
            format!("node {:?} is not revoked: there is nothing to take back", name.as_str());
        return Err(Refusal::RequestInvalid(text).into());
    }
    // Whoever holds such a key must not get a new certificate for it from the node that comes back.
    for certificate in node::certificates_of(view, &record)? {
        if revoke_leaf::is_ray_leaf(&certificate) && certificate.revoked_ms != 0 {
            revoke_leaf::mark(view, &certificate.key_hash)?;
        }
    }
    block::lift_of(view, &record)?;
    let was_for = std::mem::take(&mut record.revoked_reason);
    record.status = NodeStatus::Left.into();
    record.revoked_ms = 0;
    record.pending = None;
    member::tell(view, &mut record)?;
    put(view, &record);
    view.audit(AuditRecord {
        detail: format!("was revoked: {was_for}"),
        ..event(actor, AuditKind::NodeReinstated, cluster.as_str(), name.as_str())
    });
    Ok(record)
}
