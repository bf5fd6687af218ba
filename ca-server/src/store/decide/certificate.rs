//! Reading certificates; they are written by the decisions that issue them.

use raymtls_proto::{
    identity::{ClusterId, NodeName},
    serial::Serial,
};

use super::{cluster, page};
use crate::{
    refusal::Refusal,
    store::{Page, StoreError, layout, records::CertificateRecord, view::View},
};

/// One certificate.
///
/// # Errors
/// `CertificateNotFound`.
pub fn get(view: &View<'_>, serial: &Serial) -> Result<CertificateRecord, StoreError> {
    let record = view.get(&layout::certificate(serial.as_bytes()))?;
    Ok(record.ok_or(Refusal::CertificateNotFound(*serial))?)
}

/// Certificates of a cluster or of one of its nodes, by time of issue.
///
/// # Errors
/// No such cluster, or a cursor that is not one of ours.
pub fn list(
    view: &View<'_>,
    cluster: &ClusterId,
    node: Option<&NodeName>,
    cursor: &str,
) -> Result<Page<CertificateRecord>, StoreError> {
    cluster::get(view, cluster)?;
    let prefix = match node {
        Some(node) => layout::node_certificates(cluster.as_str(), node.as_str()),
        None => layout::cluster_certificates(cluster.as_str()),
    };
    let (keys, next) = page(view, &prefix, cursor)?;
    let rows = keys
        .iter()
        .filter_map(|(key, _)| view.get(&layout::certificate(&key[prefix.len()..])).transpose())
        .collect::<Result<_, _>>()?;
    Ok(Page { rows, next })
}
