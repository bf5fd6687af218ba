//! Every decision of the store, as a function of a [`View`]: what is on record,
//! what is asked, and now. Backends run these; none decides for itself.

mod address;
pub mod audit;
pub mod block;
pub mod certificate;
pub mod cluster;
pub mod enroll;
pub mod identity;
pub mod leaf;
pub mod member;
pub mod node;
pub mod reinstate;
pub mod restore;
pub mod revoke_leaf;
pub mod revoke_nodes;
pub mod token;

use raymtls_proto::{identity::ClusterId, v1};

use super::{
    PAGE_ROWS_MAX, Page, Signed, StoreError, layout,
    record::Record,
    records::{AuditKind, AuditRecord, CertificateRecord, ClusterRecord, KeyRecord},
    view::{View, decode},
};
use crate::refusal::Refusal;

/// One page below `prefix`. A cursor is the rest of the last row's key, in hexadecimal.
fn page(
    view: &View<'_>,
    prefix: &[u8],
    cursor: &str,
) -> Result<(Vec<(Vec<u8>, Vec<u8>)>, String), StoreError> {
    const CURSOR_LEN_MAX: usize = 1_024;
    let rest = (cursor.len() <= CURSOR_LEN_MAX).then(|| hex::decode(cursor).ok()).flatten();
    let rest = rest
        .ok_or_else(|| Refusal::RequestInvalid("the page cursor is not one of ours".to_owned()))?;
    let after = (!rest.is_empty()).then(|| [prefix, &rest].concat());
    let mut rows = view.scan_raw(prefix, after.as_deref(), PAGE_ROWS_MAX + 1)?;
    if rows.len() <= PAGE_ROWS_MAX {
        return Ok((rows, String::new()));
    }
    rows.truncate(PAGE_ROWS_MAX);
    let next = hex::encode(&rows[PAGE_ROWS_MAX - 1].0[prefix.len()..]);
    Ok((rows, next))
}

/// One page of records.
fn record_page<M: Record>(
    view: &View<'_>,
    prefix: &[u8],
    cursor: &str,
) -> Result<Page<M>, StoreError> {
    let (pairs, next) = page(view, prefix, cursor)?;
    let rows =
        pairs.into_iter().map(|(key, value)| decode(&key, &value)).collect::<Result<_, _>>()?;
    Ok(Page { rows, next })
}

/// Writes a certificate with its indexes.
fn put_certificate(
    view: &mut View<'_>,
    kind: v1::CertificateKind,
    cluster: &ClusterId,
    node: &str,
    signed: &Signed,
) -> Result<CertificateRecord, StoreError> {
    let serial = signed.serial.as_bytes();
    let key = layout::certificate(serial);
    if view.get_raw(&key)?.is_some() {
        // 80 random bits within one millisecond: rather a broken random source than chance.
        return Err(StoreError::Unavailable("a serial number came up twice".to_owned()));
    }
    let record = CertificateRecord {
        serial: serial.to_vec(),
        kind: kind.into(),
        cluster: cluster.to_string(),
        node: node.to_owned(),
        certificate_der: signed.certificate_der.clone(),
        issued_ms: signed.issued_ms,
        not_after_ms: signed.not_after_ms,
        issuer_key_id: signed.issuer_key_id.clone(),
        key_hash: signed.key_hash.to_vec(),
        revoked_ms: 0,
        revoked_reason: String::new(),
    };
    view.put(key, &record);
    let used = KeyRecord {
        kind: kind.into(),
        cluster: cluster.to_string(),
        node: node.to_owned(),
        revoked_ms: 0,
    };
    // The same key again, as in each renewal of a leaf: nothing to write.
    if view.get(&layout::key(&record.key_hash))?.as_ref() != Some(&used) {
        view.put(layout::key(&record.key_hash), &used);
    }
    view.put_raw(layout::cluster_certificate(cluster.as_str(), serial), Vec::new());
    view.put_raw(layout::node_certificate(cluster.as_str(), node, serial), Vec::new());
    Ok(record)
}

/// Refuses a key that is known for another purpose or another node: two holders of one key could not
/// be told apart, and Ray's user must not be able to read an identity's.
fn check_key_use(
    view: &View<'_>,
    key_hash: &[u8],
    kind: v1::CertificateKind,
    cluster: &str,
    node: &str,
) -> Result<(), StoreError> {
    let known: Option<KeyRecord> = view.get(&layout::key(key_hash))?;
    if known.is_none_or(|k| k.kind() == kind && k.cluster == cluster && k.node == node) {
        return Ok(());
    }
    let text = "the key is in use for another purpose or by another node: make a new one";
    Err(Refusal::CsrInvalid(text.to_owned()).into())
}

/// Refuses whatever is asked of an ephemeral cluster past its end.
fn check_not_ended(view: &View<'_>, cluster: &ClusterRecord) -> Result<(), Refusal> {
    let ends_unix = cluster.settings().ends_unix;
    if ends_unix != 0 && view.now_ms() >= ends_unix * 1_000 {
        return Err(Refusal::ClusterEnded(cluster.cluster.clone()));
    }
    Ok(())
}

/// An audit record about a node.
fn event(actor: &str, kind: AuditKind, cluster: &str, node: &str) -> AuditRecord {
    AuditRecord {
        actor: actor.to_owned(),
        kind: kind.into(),
        cluster: cluster.to_owned(),
        node: node.to_owned(),
        ..AuditRecord::default()
    }
}
