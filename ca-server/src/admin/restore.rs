//! What a restored CA has heard from its nodes, and taking it over.

use std::sync::Arc;

use raymtls_proto::v1;
use tracing::{info, warn};

use super::Operator;
use crate::{
    ca::Ca,
    refusal::Refusal,
    restoring::{self, Summary},
    store::{Accepted, Adoption, StoreError, records::NodeStatus},
    upkeep,
};

/// What was heard so far, and what accepting it would come to.
///
/// # Errors
/// A refusal, or the store's failure.
pub async fn show(
    ca: &Ca,
    operator: &Operator,
    _request: v1::GetRestoreRequest,
) -> Result<v1::Restore, StoreError> {
    operator.require(v1::AdminRole::Viewer, None)?;
    if !ca.is_restored() {
        return Ok(last(ca));
    }
    planned(ca).await
}

/// Takes over what was heard, and serves again.
///
/// # Errors
/// A refusal, or the store's failure.
pub async fn accept(
    ca: &Ca,
    operator: &Operator,
    request: v1::AcceptRestoreRequest,
) -> Result<v1::Restore, StoreError> {
    operator.require(v1::AdminRole::Admin, None)?;
    if !ca.is_restored() {
        let text = "no restore waits to be accepted".to_owned();
        return Err(Refusal::RequestInvalid(text).into());
    }
    if request.dry_run {
        return planned(ca).await;
    }
    let mut summary = restoring::summary(ca)?;
    let (now, heard) = (ca.clock.now(), std::mem::take(&mut summary.heard));
    let accepted = ca.store.accept_restore(now, operator.actor.clone(), heard).await?;
    let known = known_nodes(ca).await?;
    ca.restores.store(Arc::new(ca.store.restores().await?));
    info!(
        actor = operator.actor,
        adopted = accepted.adoptions.len(),
        revocations = accepted.revocations.len(),
        "the restore was accepted"
    );
    // The CRLs say so before the first node is told anything.
    for (authority, _) in ca.authorities() {
        if let Err(error) = upkeep::tend(ca, &authority).await {
            warn!(%authority, %error, "CRLs were not signed; tried again in a minute");
        }
    }
    ca.restoring.end();
    Ok(message(last(ca), accepted, summary, known))
}

async fn planned(ca: &Ca) -> Result<v1::Restore, StoreError> {
    let mut summary = restoring::summary(ca)?;
    let heard = std::mem::take(&mut summary.heard);
    let accepted = ca.store.plan_accept(ca.clock.now(), heard).await?;
    Ok(message(last(ca), accepted, summary, known_nodes(ca).await?))
}

/// The newest restore, without what was heard.
fn last(ca: &Ca) -> v1::Restore {
    let restores = ca.restores.load();
    let newest = restores.restores.last();
    v1::Restore {
        pending: restores.pending().is_some(),
        restored_unix: newest.map_or(0, |restore| restore.restored_ms / 1_000),
        backup_unix: newest.map_or(0, |restore| restore.backup_ms / 1_000),
        last_index: newest.map_or(0, |restore| restore.last_index),
        ..v1::Restore::default()
    }
}

/// Nodes that are live on record and have an agent.
async fn known_nodes(ca: &Ca) -> Result<u64, StoreError> {
    let mut count = 0;
    for cluster in ca.store.clusters().await? {
        let Ok(id) = cluster.cluster.parse::<raymtls_proto::identity::ClusterId>() else {
            continue;
        };
        let mut page = String::new();
        loop {
            let nodes = ca.store.nodes(id.clone(), page).await?;
            let live = nodes.rows.iter().filter(|n| n.node_status() == NodeStatus::Live && !n.once);
            count += u64::try_from(live.count()).unwrap_or(0);
            if nodes.next.is_empty() {
                break;
            }
            page = nodes.next;
        }
    }
    Ok(count)
}

fn message(
    restore: v1::Restore,
    accepted: Accepted,
    summary: Summary,
    nodes_known: u64,
) -> v1::Restore {
    let adoptions = u64::try_from(accepted.adoptions.len()).unwrap_or(0);
    let mut notes = summary.notes;
    notes.extend(accepted.revoked_nodes.iter().map(|(cluster, node)| {
        format!("node {node} of cluster {cluster} is revoked: it was, after the backup")
    }));
    let unknown = accepted.revocations.iter().filter(|(_, node)| node.is_empty()).count();
    if unknown > 0 {
        notes.push(format!(
            "{unknown} of the revocations are of certificates that the backup does not know: they stay \
             on the CRLs, and no address is cut off for them"
        ));
    }
    notes.push(
        "not known any more: settings, tokens, clusters, nodes that did not call and addresses cut off \
         since the backup; no token made before it is good"
            .to_owned(),
    );
    v1::Restore {
        nodes: accepted
            .adoptions
            .into_iter()
            .map(|(one, known, why)| node(one, known, why))
            .collect(),
        revocations: accepted
            .revocations
            .into_iter()
            .map(|(taken, node)| v1::TakenBack {
                cluster: taken.authority.cluster().to_owned(),
                serial: taken.serial,
                revoked_unix: taken.revoked_ms / 1_000,
                node,
            })
            .collect(),
        notes,
        nodes_known,
        nodes_heard: summary.in_force + adoptions,
        ..restore
    }
}

fn node(adoption: Adoption, known: bool, left_out: Option<String>) -> v1::AdoptedNode {
    v1::AdoptedNode {
        cluster: adoption.cluster.to_string(),
        name: adoption.node.to_string(),
        role: adoption.role.to_proto().into(),
        addresses: adoption.addresses,
        identity_serial: adoption.identity.serial.as_bytes().to_vec(),
        unknown: !known,
        left_out: left_out.unwrap_or_default(),
    }
}
