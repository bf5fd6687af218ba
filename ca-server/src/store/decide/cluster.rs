//! The control authority and the clusters: their records, issuers and CRLs.

use raymtls_proto::{identity::ClusterId, v1};

use super::{event, member};
use crate::{
    refusal::Refusal,
    store::{
        Authority, Revocations, StoreError, layout,
        records::{
            AuditKind, AuditRecord, CaKey, ClusterRecord, ControlRecord, CrlSet, RevocationRecord,
        },
        view::View,
    },
};

/// Clusters of one deployment, at most.
const CLUSTERS_MAX: usize = 10_000;
/// Entries of one CRL, at most: 49 bytes each.
const CRL_ENTRIES_MAX: usize = 100_000;

/// Puts the control authority in place.
///
/// # Errors
/// One is there.
pub fn initialize(view: &mut View<'_>, record: &ControlRecord) -> Result<(), StoreError> {
    if control(view)?.is_some() {
        let name = record.trust_domain.clone();
        return Err(Refusal::AlreadyExists { what: "control authority", name }.into());
    }
    view.put(layout::CONTROL.to_vec(), record);
    view.audit(AuditRecord {
        detail: format!("trust domain {}", record.trust_domain),
        ..event("ca", AuditKind::Initialized, "", "")
    });
    Ok(())
}

/// The control authority.
///
/// # Errors
/// The record does not decode.
pub fn control(view: &View<'_>) -> Result<Option<ControlRecord>, StoreError> {
    view.get(layout::CONTROL)
}

/// Creates a cluster.
///
/// # Errors
/// One of that name is there.
pub fn create(
    view: &mut View<'_>,
    actor: &str,
    mut record: ClusterRecord,
) -> Result<ClusterRecord, StoreError> {
    let key = layout::cluster(&record.cluster);
    if view.get_raw(&key)?.is_some() {
        return Err(Refusal::AlreadyExists { what: "cluster", name: record.cluster }.into());
    }
    if list(view)?.len() >= CLUSTERS_MAX {
        let text = format!("this CA has {CLUSTERS_MAX} clusters, the most it can list");
        return Err(Refusal::RequestInvalid(text).into());
    }
    let version = record.next_version();
    record.settings_version = version;
    record.bundle_version = version;
    record.ray_token_version = version;
    record.control_crl_version = version;
    view.put(key, &record);
    view.audit(event(actor, AuditKind::ClusterCreated, &record.cluster, ""));
    Ok(record)
}

/// Replaces a cluster's settings if they still are `before`.
///
/// # Errors
/// No such cluster; somebody else changed them meanwhile.
pub fn set(
    view: &mut View<'_>,
    actor: &str,
    cluster: &ClusterId,
    before: &v1::Settings,
    after: &v1::Settings,
) -> Result<ClusterRecord, StoreError> {
    let mut record = get(view, cluster)?;
    if record.settings() != before {
        let text = "somebody else changed the settings meanwhile: look at them and set again";
        return Err(Refusal::SettingInvalid(text.to_owned()).into());
    }
    if before == after {
        return Ok(record);
    }
    record.settings = Some(after.clone());
    record.settings_version = record.next_version();
    put(view, &record);
    if before.trust_ranges != after.trust_ranges {
        member::tell_all(view, cluster)?;
        record = get(view, cluster)?;
    }
    view.audit(AuditRecord {
        detail: format!("{after:?}"),
        ..event(actor, AuditKind::ClusterSet, cluster.as_str(), "")
    });
    Ok(record)
}

/// One cluster.
///
/// # Errors
/// `NotFound`.
pub fn get(view: &View<'_>, cluster: &ClusterId) -> Result<ClusterRecord, StoreError> {
    let key = layout::cluster(cluster.as_str());
    let record: Option<ClusterRecord> = view.get(&key)?;
    let record =
        record.ok_or_else(|| Refusal::NotFound { what: "cluster", name: cluster.to_string() })?;
    if record.cluster != cluster.as_str() {
        // Moved below another's key by somebody else than us.
        let key = String::from_utf8_lossy(&key).into_owned();
        return Err(StoreError::Damaged { key, why: "it is another cluster's".to_owned() });
    }
    Ok(record)
}

/// All clusters, by name.
///
/// # Errors
/// A record does not decode.
pub fn list(view: &View<'_>) -> Result<Vec<ClusterRecord>, StoreError> {
    let rows = view.scan(layout::CLUSTERS, None, CLUSTERS_MAX)?;
    Ok(rows.into_iter().map(|(_, record)| record).collect())
}

/// Adds an issuer as the newest and drops those that have expired.
///
/// # Errors
/// No such authority.
pub fn add_issuer(
    view: &mut View<'_>,
    authority: &Authority,
    issuer: &CaKey,
) -> Result<(), StoreError> {
    let now_ms = view.now_ms();
    let renewed = |issuers: &[CaKey]| {
        let live = issuers.iter().filter(|old| old.not_after_ms > now_ms).cloned();
        std::iter::once(issuer.clone()).chain(live).collect()
    };
    match authority {
        Authority::Control => {
            let mut record = control(view)?.ok_or(Refusal::Internal)?;
            record.issuers = renewed(&record.issuers);
            view.put(layout::CONTROL.to_vec(), &record);
        }
        Authority::Cluster(cluster) => {
            let mut record = get(view, cluster)?;
            record.issuers = renewed(&record.issuers);
            put(view, &record);
        }
    }
    view.audit(AuditRecord {
        detail: format!("issuer {}", hex::encode(&issuer.key_id)),
        ..event("ca", AuditKind::IssuerCreated, authority.cluster(), "")
    });
    Ok(())
}

/// What belongs on an authority's CRLs: revocations whose certificates have not expired. Those that
/// have are dropped from the list here.
///
/// # Errors
/// No such authority; more entries than a CRL may have.
pub fn revocations(view: &mut View<'_>, authority: &Authority) -> Result<Revocations, StoreError> {
    let count = match authority {
        Authority::Control => control(view)?.ok_or(Refusal::Internal)?.revocations,
        Authority::Cluster(cluster) => get(view, cluster)?.revocations,
    };
    let prefix = layout::revocations(authority.cluster());
    let rows = view.scan::<RevocationRecord>(&prefix, None, CRL_ENTRIES_MAX + 1)?;
    if rows.len() > CRL_ENTRIES_MAX {
        let text = format!("more than {CRL_ENTRIES_MAX} revocations on one CRL");
        return Err(StoreError::Unavailable(text));
    }
    let mut entries = Vec::with_capacity(rows.len());
    for (key, entry) in rows {
        if entry.not_after_ms > view.now_ms() {
            entries.push(entry);
        } else {
            view.delete(key);
        }
    }
    Ok(Revocations { count, entries })
}

/// Puts signed CRLs in place if their number is newer.
///
/// # Errors
/// No such authority.
pub fn put_crls(
    view: &mut View<'_>,
    authority: &Authority,
    crls: &CrlSet,
) -> Result<(), StoreError> {
    if self::crls(view, authority)?.is_some_and(|old| old.number >= crls.number) {
        return Ok(());
    }
    view.put(layout::crls(authority.cluster()), crls);
    match authority {
        Authority::Control => {
            // Every cluster's agents keep the control CRL.
            for mut record in list(view)? {
                record.control_crl_version = record.next_version();
                put(view, &record);
            }
        }
        Authority::Cluster(cluster) => {
            let mut record = get(view, cluster)?;
            record.bundle_version = record.next_version();
            put(view, &record);
        }
    }
    view.audit(AuditRecord {
        detail: format!("number {}", crls.number),
        ..event("ca", AuditKind::CrlSigned, authority.cluster(), "")
    });
    Ok(())
}

/// The CRLs in place.
///
/// # Errors
/// The record does not decode.
pub fn crls(view: &View<'_>, authority: &Authority) -> Result<Option<CrlSet>, StoreError> {
    view.get(&layout::crls(authority.cluster()))
}

/// Writes a cluster back.
pub(super) fn put(view: &mut View<'_>, record: &ClusterRecord) {
    view.put(layout::cluster(&record.cluster), record);
}
