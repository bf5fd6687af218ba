//! Revoking several nodes at once: their peers are told once, not once for each. What is done to each is
//! in [`node`].

use raymtls_proto::identity::{ClusterId, NodeName};

use super::{cluster, node};
use crate::{
    refusal::Refusal,
    store::{
        NODES_REVOKED_MAX, Revoking, StoreError,
        records::{NodeRecord, NodeStatus},
        view::View,
    },
};

/// Revokes those of the nodes that are there and not revoked yet, and names them.
///
/// # Errors
/// No such cluster, or more nodes than one decision takes.
pub fn revoke(
    view: &mut View<'_>,
    actor: &str,
    cluster: &ClusterId,
    names: &[NodeName],
    revoking: &Revoking,
) -> Result<Vec<NodeRecord>, StoreError> {
    cluster::get(view, cluster)?;
    if names.len() > NODES_REVOKED_MAX {
        let text = format!("at most {NODES_REVOKED_MAX} nodes are revoked in one decision");
        return Err(Refusal::RequestInvalid(text).into());
    }
    let mut revoked = Vec::new();
    for name in names {
        match node::get(view, cluster, name) {
            Ok(node) if node.node_status() == NodeStatus::Revoked => {}
            Ok(_) => revoked.push(node::revoke(view, actor, cluster, name, revoking)?.node),
            // Forgotten since somebody read of it.
            Err(StoreError::Refused(Refusal::NotFound { .. })) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(revoked)
}
