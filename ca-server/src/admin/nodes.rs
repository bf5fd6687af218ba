//! Nodes: listing, showing, revoking, forgetting.

use raymtls_proto::{clock, identity::NodeName, v1};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use tracing::{info, warn};

use super::{Operator, clusters, convert};
use crate::{
    ca::Ca,
    refusal::Refusal,
    store::{Authority, Reach, Revoking, StoreError, records::NodeRecord, unix_ms},
    upkeep,
};

/// Longest reason, in characters.
const REASON_LEN_MAX: usize = 500;

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
    let page = ca.store.nodes(clusters::id(&request.cluster)?, request.page).await?;
    Ok(v1::ListNodesResponse {
        nodes: page.rows.into_iter().map(|node| message(ca, node)).collect(),
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
    let node = ca.store.node(clusters::id(&request.cluster)?, name(&request.name)?).await?;
    Ok(message(ca, node))
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
    let reason = request.reason.trim();
    if reason.is_empty() || reason.chars().count() > REASON_LEN_MAX {
        let text = format!("a reason of 1 to {REASON_LEN_MAX} characters is wanted");
        return Err(Refusal::RequestInvalid(text).into());
    }
    let now = ca.clock.now();
    let cluster = clusters::id(&request.cluster)?;
    let revoking = Revoking {
        reason: reason.to_owned(),
        keep_token: request.keep_token,
        reach: Reach { all_traffic: request.all_traffic, ca: ca.endpoints.addresses() },
    };
    let revoked = ca
        .store
        .revoke_node(now, operator.actor.clone(), cluster.clone(), name(&request.name)?, revoking)
        .await?;
    info!(%cluster, node = request.name, actor = operator.actor, reason, "node revoked");
    let mut notes = notes(&revoked.node, unix_ms(now));
    for authority in [Authority::Control, Authority::Cluster(cluster)] {
        if let Err(error) = upkeep::tend(ca, &authority).await {
            // The revocation stands; the next pass signs them.
            warn!(%authority, %error, "CRLs not signed yet");
            let text = "the CRLs could not be signed yet: tried again within a minute";
            notes.insert(0, text.to_owned());
        }
    }
    Ok(v1::RevokeNodeResponse {
        node: Some(message(ca, revoked.node)),
        certificates_revoked: revoked.certificates,
        token_uses_voided: revoked.token_uses_voided,
        notes,
        blocked_addresses: revoked.blocked.addresses,
        spared_addresses: spared(revoked.blocked.spared),
        change: Some(change(ca, revoked.version, now)),
    })
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

fn notes(node: &NodeRecord, now_ms: i64) -> Vec<String> {
    let until_ms = node.leaf_not_after_ms();
    if until_ms <= now_ms {
        return Vec::new();
    }
    let until = clock::from_unix(until_ms / 1_000).and_then(|at| at.format(&Rfc3339).ok());
    let addresses: Vec<_> = node.addresses.iter().map(|a| a.address.as_str()).collect();
    vec![format!(
        "Ray checks no CRL: its peers accept the node's leaf until {} unless the network keeps it \
         out: on every other host of the cluster run `scripts/isolation/nftables.sh apply` as \
         before, with the node taken out of --members and with --blocked {}",
        until.unwrap_or_else(|| "its end".to_owned()),
        addresses.join(",")
    )]
}

fn spared(spared: Vec<(String, String)>) -> Vec<String> {
    spared.into_iter().map(|(address, why)| format!("{address}: {why}")).collect()
}

/// A change that was asked for at `asked`.
fn change(ca: &Ca, counter: u64, asked: OffsetDateTime) -> v1::Change {
    v1::Change {
        version: Some(v1::SyncVersion { epoch: ca.store.epoch(), counter }),
        asked_unix_ms: unix_ms(asked),
    }
}

fn message(ca: &Ca, node: NodeRecord) -> v1::Node {
    let last = ca.contacts.last(&node.cluster, &node.name);
    convert::node(node, last, ca.started, ca.clock.now())
}

fn name(text: &str) -> Result<NodeName, Refusal> {
    text.parse().map_err(|e| Refusal::RequestInvalid(format!("{e}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::records::{AddressRecord, LeafKeyRecord};

    #[test]
    fn what_keeps_a_revoked_node_out_until_its_leaf_ends_is_named_last() {
        let address = |address: &str| AddressRecord {
            address: address.to_owned(),
            proved: true,
            lost: false,
        };
        let node = NodeRecord {
            addresses: vec![address("10.77.0.7"), address("fd00::7")],
            leaf_keys: vec![LeafKeyRecord { not_after_ms: 60_000, ..Default::default() }],
            ..NodeRecord::default()
        };
        let notes_now = notes(&node, 0);
        let last = notes_now.last().unwrap();
        assert!(last.contains("until 1970-01-01T00:01:00Z"), "{last}");
        assert!(last.contains("scripts/isolation/nftables.sh apply"), "{last}");
        assert!(last.ends_with("--blocked 10.77.0.7,fd00::7"), "{last}");
        assert!(notes(&node, 60_000).is_empty());
    }
}
