//! Certificates: listing and showing.

use raymtls_proto::{serial::Serial, v1};

use super::{Operator, clusters, convert};
use crate::{ca::Ca, refusal::Refusal, store::StoreError};

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
    let serial =
        Serial::from_slice(&request.serial).map_err(|e| Refusal::RequestInvalid(format!("{e}")))?;
    let record = ca.store.certificate(serial).await?;
    if scope.is_some_and(|cluster| record.cluster != cluster) {
        return Err(Refusal::CertificateNotFound(serial).into());
    }
    Ok(convert::certificate(record))
}
