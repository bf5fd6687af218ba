//! Revoking the key of a Ray leaf: all its certificates go on the CRL, and it gets no other. The node
//! stays what it is, and no address is blocked.

use raymtls_proto::{identity::ClusterId, serial::Serial, v1};

use super::{certificate, cluster, event, node};
use crate::{
    refusal::Refusal,
    store::{
        LeafRevoked, StoreError, layout,
        records::{
            AuditKind, AuditRecord, CertificateRecord, KeyRecord, NodeRecord, RevocationRecord,
        },
        view::View,
    },
};

/// Revokes the key that a Ray leaf is for; doing it again changes nothing.
///
/// # Errors
/// No such certificate in the cluster, or an identity's.
pub fn revoke(
    view: &mut View<'_>,
    actor: &str,
    cluster: &ClusterId,
    serial: &Serial,
    reason: &str,
) -> Result<LeafRevoked, StoreError> {
    let asked = certificate::get(view, serial)?;
    if asked.cluster != cluster.as_str() {
        return Err(Refusal::CertificateNotFound(*serial).into());
    }
    if !is_ray_leaf(&asked) {
        let text = format!(
            "{serial} is no Ray leaf but the identity of node {:?}: revoke the node",
            asked.node
        );
        return Err(Refusal::RequestInvalid(text).into());
    }
    // The node itself may have been forgotten: its certificates are not.
    let holder = NodeRecord {
        cluster: asked.cluster.clone(),
        name: asked.node.clone(),
        ..NodeRecord::default()
    };
    let mut living: Vec<_> = node::certificates_of(view, &holder)?
        .into_iter()
        .filter(|record| record.key_hash == asked.key_hash && record.not_after_ms > view.now_ms())
        .collect();
    living.reverse();
    let revoked = LeafRevoked {
        serials: living.iter().map(|record| record.serial.clone()).collect(),
        node: asked.node.clone(),
        not_after_ms: living.iter().map(|record| record.not_after_ms).max().unwrap_or_default(),
    };
    if is_revoked(view, &asked.key_hash)? {
        return Ok(revoked);
    }
    let mut count = 0;
    for record in living.into_iter().filter(|record| record.revoked_ms == 0) {
        put_on_crl(view, cluster, record, reason);
        count += 1;
    }
    mark(view, &asked.key_hash)?;
    let mut record = cluster::get(view, cluster)?;
    record.revocations += count;
    record.keys_version = record.next_version();
    cluster::put(view, &record);
    view.audit(AuditRecord {
        serial: asked.serial,
        detail: reason.to_owned(),
        ..event(actor, AuditKind::LeafKeyRevoked, cluster.as_str(), &asked.node)
    });
    Ok(revoked)
}

/// Whether a key gets no certificate any more.
///
/// # Errors
/// The store.
pub(super) fn is_revoked(view: &View<'_>, key_hash: &[u8]) -> Result<bool, StoreError> {
    let known: Option<KeyRecord> = view.get(&layout::key(key_hash))?;
    Ok(known.is_some_and(|key| key.revoked_ms != 0))
}

/// From here on the key gets no certificate, whatever becomes of its node.
///
/// # Errors
/// The store.
pub(super) fn mark(view: &mut View<'_>, key_hash: &[u8]) -> Result<(), StoreError> {
    let key = layout::key(key_hash);
    if let Some(mut known) = view.get::<KeyRecord>(&key)?.filter(|known| known.revoked_ms == 0) {
        known.revoked_ms = view.now_ms();
        view.put(key, &known);
    }
    Ok(())
}

pub(super) fn is_ray_leaf(record: &CertificateRecord) -> bool {
    match record.kind() {
        v1::CertificateKind::RayNode | v1::CertificateKind::RayDriver => true,
        v1::CertificateKind::AgentIdentity
        | v1::CertificateKind::AdminIdentity
        | v1::CertificateKind::Unspecified => false,
    }
}

fn put_on_crl(
    view: &mut View<'_>,
    cluster: &ClusterId,
    mut record: CertificateRecord,
    reason: &str,
) {
    record.revoked_ms = view.now_ms();
    reason.clone_into(&mut record.revoked_reason);
    view.put(layout::certificate(&record.serial), &record);
    let revocation = RevocationRecord {
        serial: record.serial.clone(),
        revoked_ms: record.revoked_ms,
        not_after_ms: record.not_after_ms,
        issuer_key_id: record.issuer_key_id,
        taken_back: false,
    };
    view.put(layout::revocation(cluster.as_str(), &record.serial), &revocation);
}
