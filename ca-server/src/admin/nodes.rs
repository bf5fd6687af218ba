//! Nodes: listing, showing, revoking, taking back, forgetting.

use raymtls_proto::{
    identity::{ClusterId, NodeName},
    v1,
};
use tracing::info;

use super::{Operator, clusters, convert, revocation};
use crate::{
    ca::Ca,
    refusal::Refusal,
    store::{Authority, Reach, Revoking, StoreError, records::NodeRecord, unix_ms},
};

/// Nodes of a cluster.
///
/// # Errors
/// A refusal, or the store's failure.
pub async fn list(
    ca: &Ca,
    operator: &Operator,
    request: v1::ListNodesRequest,
) -> Result<v1::ListNodesResponse, StoreError> {
    operator.require(v1::AdminRole::Viewer, Some(&request.cluster))?;
    let cluster = clusters::id(&request.cluster)?;
    let lease = lease(ca, &cluster).await?;
    let page = ca.store.nodes(cluster, request.page).await?;
    Ok(v1::ListNodesResponse {
        nodes: page.rows.into_iter().map(|node| message(ca, node, lease)).collect(),
        next_page: page.next,
    })
}

/// One node.
///
/// # Errors
/// A refusal, or the store's failure.
pub async fn show(
    ca: &Ca,
    operator: &Operator,
    request: v1::GetNodeRequest,
) -> Result<v1::Node, StoreError> {
    operator.require(v1::AdminRole::Viewer, Some(&request.cluster))?;
    let cluster = clusters::id(&request.cluster)?;
    let node = ca.store.node(cluster.clone(), name(&request.name)?).await?;
    Ok(message(ca, node, lease(ca, &cluster).await?))
}

/// Revokes a node, and signs the CRLs that say so.
///
/// # Errors
/// A refusal, or the store's failure.
pub async fn revoke(
    ca: &Ca,
    operator: &Operator,
    request: v1::RevokeNodeRequest,
) -> Result<v1::RevokeNodeResponse, StoreError> {
    operator.require(v1::AdminRole::Operator, Some(&request.cluster))?;
    let reason = revocation::reason(&request.reason)?;
    let now = ca.clock.now();
    let cluster = clusters::id(&request.cluster)?;
    let (actor, name) = (operator.actor.clone(), name(&request.name)?);
    let revoking = Revoking {
        reason: reason.clone(),
        keep_token: request.keep_token,
        reach: Reach { all_traffic: request.all_traffic, ca: ca.endpoints.addresses() },
    };
    // Its peers hear of it with the commit; the CRLs come after.
    let revoked = ca.store.revoke_node(now, actor, cluster.clone(), name, revoking).await?;
    info!(%cluster, node = request.name, actor = operator.actor, reason, "node revoked");
    let isolation = ca.store.cluster(cluster.clone()).await?.settings().isolation();
    let mut notes =
        revocation::sign_crls(ca, &[Authority::Control, Authority::Cluster(cluster)]).await;
    let mut blocked = revoked.blocked.addresses;
    if blocked.is_empty() {
        // Asked for again: what is cut off since the first time.
        let blocks = ca.store.blocks(now, clusters::id(&request.cluster)?).await?;
        let of_it = blocks.into_iter().filter(|(_, block)| block.node == request.name);
        blocked = of_it.map(|(address, _)| address).collect();
    }
    notes.extend(revocation::notes(&revoked.node, isolation, &blocked, unix_ms(now)));
    Ok(v1::RevokeNodeResponse {
        node: Some(message(ca, revoked.node, 0)),
        certificates_revoked: revoked.certificates,
        token_uses_voided: revoked.token_uses_voided,
        notes,
        blocked_addresses: blocked,
        spared_addresses: spared(revoked.blocked.spared),
        change: Some(revocation::change(ca, revoked.version, now)),
    })
}

fn spared(spared: Vec<(String, String)>) -> Vec<String> {
    spared.into_iter().map(|(address, why)| format!("{address}: {why}")).collect()
}

/// Takes a revoked node back.
///
/// # Errors
/// A refusal, or the store's failure.
pub async fn reinstate(
    ca: &Ca,
    operator: &Operator,
    request: v1::ReinstateNodeRequest,
) -> Result<v1::ReinstateNodeResponse, StoreError> {
    operator.require(v1::AdminRole::Operator, Some(&request.cluster))?;
    let cluster = clusters::id(&request.cluster)?;
    let (now, actor, name) = (ca.clock.now(), operator.actor.clone(), name(&request.name)?);
    let node = ca.store.reinstate_node(now, actor, cluster.clone(), name).await?;
    let change = revocation::newest_change(ca, &cluster, now).await?;
    info!(%cluster, node = request.name, actor = operator.actor, "node reinstated");
    let mut notes = vec![
        "its certificates stay revoked and their keys get no other: enrol it again, with a token \
         made from now on"
            .to_owned(),
    ];
    if node.leaf_not_after_ms() > unix_ms(now) {
        notes.push(format!(
            "nothing cuts its addresses off any more, and Ray accepts its old leaf until {}",
            revocation::moment(node.leaf_not_after_ms())
        ));
    }
    Ok(v1::ReinstateNodeResponse { node: Some(message(ca, node, 0)), change: Some(change), notes })
}

/// Forgets a node.
///
/// # Errors
/// A refusal, or the store's failure.
pub async fn forget(
    ca: &Ca,
    operator: &Operator,
    request: v1::ForgetNodeRequest,
) -> Result<v1::ForgetNodeResponse, StoreError> {
    operator.require(v1::AdminRole::Operator, Some(&request.cluster))?;
    let cluster = clusters::id(&request.cluster)?;
    let now = ca.clock.now();
    ca.store.forget_node(now, operator.actor.clone(), cluster, name(&request.name)?).await?;
    ca.contacts.forget(&request.cluster, &request.name);
    info!(node = request.name, actor = operator.actor, "node forgotten");
    Ok(v1::ForgetNodeResponse {})
}

/// A node as it is shown; `lease` in seconds counts only for a live one.
fn message(ca: &Ca, node: NodeRecord, lease: i64) -> v1::Node {
    let last = ca.contacts.last(&node.cluster, &node.name);
    convert::node(node, last, ca.started, ca.clock.now(), lease)
}

async fn lease(ca: &Ca, cluster: &ClusterId) -> Result<i64, StoreError> {
    Ok(ca.store.cluster(cluster.clone()).await?.settings().lease_seconds)
}

fn name(text: &str) -> Result<NodeName, Refusal> {
    text.parse().map_err(|e| Refusal::RequestInvalid(format!("{e}")))
}
