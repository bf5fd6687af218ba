//! Certificates: listing, showing, revoking those of one key.

use raymtls_proto::{serial::Serial, v1};
use tracing::info;

use super::{Operator, clusters, convert, revocation};
use crate::{
    ca::Ca,
    refusal::Refusal,
    store::{Authority, StoreError},
};

/// Certificates of a cluster or of one of its nodes.
///
/// # Errors
/// A refusal, or the store's failure.
pub async fn list(
    ca: &Ca,
    operator: &Operator,
    request: v1::ListCertificatesRequest,
) -> Result<v1::ListCertificatesResponse, StoreError> {
    operator.require(v1::AdminRole::Viewer, Some(&request.cluster))?;
    let node = (!request.node.is_empty()).then(|| request.node.parse()).transpose();
    let node = node.map_err(|e| Refusal::RequestInvalid(format!("{e}")))?;
    let cluster = clusters::id(&request.cluster)?;
    let page = ca.store.certificates(cluster, node, request.page).await?;
    Ok(v1::ListCertificatesResponse {
        certificates: page.rows.into_iter().map(convert::certificate).collect(),
        next_page: page.next,
    })
}

/// One certificate.
///
/// # Errors
/// A refusal, or the store's failure.
pub async fn show(
    ca: &Ca,
    operator: &Operator,
    request: v1::GetCertificateRequest,
) -> Result<v1::Certificate, StoreError> {
    let scope = (!request.cluster.is_empty()).then_some(request.cluster.as_str());
    operator.require(v1::AdminRole::Viewer, scope)?;
    let serial = serial(&request.serial)?;
    let record = ca.store.certificate(serial).await?;
    if scope.is_some_and(|cluster| record.cluster != cluster) {
        return Err(Refusal::CertificateNotFound(serial).into());
    }
    Ok(convert::certificate(record))
}

/// Revokes the key of a Ray leaf, and signs the CRLs that say so. It blocks no address.
///
/// # Errors
/// A refusal, or the store's failure.
pub async fn revoke(
    ca: &Ca,
    operator: &Operator,
    request: v1::RevokeCertificateRequest,
) -> Result<v1::RevokeCertificateResponse, StoreError> {
    operator.require(v1::AdminRole::Operator, Some(&request.cluster))?;
    let reason = revocation::reason(&request.reason)?;
    let cluster = clusters::id(&request.cluster)?;
    let serial = serial(&request.serial)?;
    let (now, actor) = (ca.clock.now(), operator.actor.clone());
    let revoked = ca.store.revoke_leaf(now, actor, cluster.clone(), serial, reason.clone()).await?;
    let change = revocation::newest_change(ca, &cluster, now).await?;
    info!(%cluster, node = revoked.node, %serial, actor = operator.actor, reason, "key revoked");
    let mut notes = revocation::sign_crls(ca, &[Authority::Cluster(cluster)]).await;
    if revoked.not_after_ms != 0 {
        notes.push(format!(
            "Ray checks no CRL: its processes accept the leaf until {}; no address is blocked, and \
             node {} stays a member: `ca-admin node revoke` cuts it off",
            revocation::moment(revoked.not_after_ms),
            revoked.node
        ));
        notes.push(format!(
            "node {} starts a new key folder; what runs there serves the old leaf until it is \
             started again",
            revoked.node
        ));
    }
    Ok(v1::RevokeCertificateResponse {
        serials: revoked.serials,
        node: revoked.node,
        not_after_unix: revoked.not_after_ms / 1_000,
        change: Some(change),
        notes,
    })
}

fn serial(bytes: &[u8]) -> Result<Serial, Refusal> {
    Serial::from_slice(bytes).map_err(|e| Refusal::RequestInvalid(format!("{e}")))
}
