//! Backups and restores: the pairs of a backup, and what becomes of a restored store. What the nodes
//! hold is newer than the backup: identities that the control authority signed are taken over, unless a
//! CRL that a node held revokes them, and so are the revocations on those CRLs.

use std::collections::{BTreeMap, BTreeSet};

use raymtls_proto::v1;

use super::{address, cluster, event, identity, member, node as nodes, put_certificate};
use crate::{
    refusal::Refusal,
    store::{
        Accepted, Adoption, Authority, Caller, Heard, PAGE_ROWS_MAX, Reach, Revoking, Signed,
        Standing, StoreError, TakenBack, layout,
        records::{
            AddressRecord, AuditHead, AuditKind, AuditRecord, CertificateRecord, IdentityRecord,
            KeyRecord, LeafKeyRecord, NodeRecord, NodeStatus, RestoreRecord, RestoresRecord,
            RevocationRecord, TokenRecord,
        },
        view::View,
    },
};

/// Pairs, and bytes, of one chunk of a backup.
const CHUNK_PAIRS: usize = 512;
const CHUNK_BYTES: usize = 512 * 1024;
/// Pairs read at once.
const READ_PAIRS: usize = 32;
/// First byte of an engine's own keys.
const ENGINES_OWN: u8 = b'~';
/// Restores that are remembered.
const RESTORES_MAX: usize = 64;
/// What a revocation that is taken back says.
const REASON: &str = "revoked after the backup that the CA was restored from";

/// Puts on record that a backup is made.
pub fn note_backup(view: &mut View<'_>, actor: &str) {
    view.audit(event(actor, AuditKind::BackupMade, "", ""));
}

/// The next pairs of everything there is.
///
/// # Errors
/// The medium cannot be read.
pub fn chunk(view: &View<'_>, after: Option<&[u8]>) -> Result<Vec<(Vec<u8>, Vec<u8>)>, StoreError> {
    let (mut chunk, mut bytes) = (Vec::new(), 0);
    let begin = after.and_then(|after| after.first().copied()).unwrap_or(0);
    for first in (begin..=u8::MAX).filter(|first| *first != ENGINES_OWN) {
        let mut after = after.map(<[u8]>::to_vec);
        loop {
            let rows = view.scan_raw(&[first], after.as_deref(), READ_PAIRS)?;
            let ended = rows.len() < READ_PAIRS;
            after = rows.last().map(|(key, _)| key.clone());
            bytes += rows.iter().map(|(key, value)| key.len() + value.len()).sum::<usize>();
            chunk.extend(rows);
            if chunk.len() >= CHUNK_PAIRS || bytes >= CHUNK_BYTES {
                return Ok(chunk);
            }
            if ended {
                break;
            }
        }
    }
    Ok(chunk)
}

/// Marks a store as restored.
///
/// # Errors
/// A record does not decode.
pub fn mark(view: &mut View<'_>, actor: &str, restore: RestoreRecord) -> Result<(), StoreError> {
    let head: Option<AuditHead> = view.get(layout::AUDIT_HEAD)?;
    let mut all: RestoresRecord = view.get(layout::RESTORES)?.unwrap_or_default();
    let last_index = head.map_or(0, |head| head.index);
    all.restores.push(RestoreRecord { last_index, accepted_ms: 0, ..restore });
    if all.restores.len() > RESTORES_MAX {
        all.restores.remove(0);
    }
    view.put(layout::RESTORES.to_vec(), &all);
    view.audit(AuditRecord {
        detail: format!("from a backup that ends with record {last_index}"),
        ..event(actor, AuditKind::Restored, "", "")
    });
    Ok(())
}

/// Ends tokens that may be spent, some at once. Returns where to go on.
///
/// # Errors
/// A record does not decode.
pub fn void_tokens(
    view: &mut View<'_>,
    after: Option<Vec<u8>>,
) -> Result<Option<Vec<u8>>, StoreError> {
    let rows = view.scan::<TokenRecord>(b"t/", after.as_deref(), PAGE_ROWS_MAX)?;
    let last = rows.last().map(|(key, _)| key.clone()).filter(|_| rows.len() == PAGE_ROWS_MAX);
    for (key, mut token) in rows {
        if token.revoked_ms == 0 && token.expires_ms > view.now_ms() {
            token.revoked_ms = view.now_ms();
            view.put(key, &token);
        }
    }
    Ok(last)
}

/// How an identity stands to what is on record.
///
/// # Errors
/// A record does not decode.
pub fn standing(view: &View<'_>, caller: &Caller) -> Result<Standing, StoreError> {
    let serial = caller.serial.as_bytes();
    let (cluster, name) = (caller.cluster.as_str(), caller.node.as_str());
    if view.get_raw(&layout::revocation("", serial))?.is_some() {
        let reason = "its identity is on the control CRL".to_owned();
        return Ok(Standing::Refused(Refusal::Revoked { node: name.to_owned(), reason }));
    }
    if view.get_raw(&layout::cluster(cluster))?.is_none() {
        return Ok(Standing::Refused(Refusal::IdentityUnknown));
    }
    let record: Option<CertificateRecord> = view.get(&layout::certificate(serial))?;
    let Some(record) = record else { return Ok(Standing::Unknown) };
    let node: Option<NodeRecord> = view.get(&layout::node(cluster, name))?;
    let Some(node) = node else { return Ok(Standing::Refused(Refusal::IdentityUnknown)) };
    let refused = match node.node_status() {
        NodeStatus::Live => {
            let mut held = node.identity.iter().chain(&node.pending);
            if held.any(|identity| identity.serial == serial) {
                return Ok(Standing::InForce);
            }
            Refusal::IdentityReused
        }
        NodeStatus::Left => Refusal::NodeLeft(node.name),
        NodeStatus::Revoked => Refusal::Revoked { node: node.name, reason: record.revoked_reason },
        NodeStatus::Unspecified => Refusal::IdentityUnknown,
    };
    Ok(Standing::Refused(refused))
}

/// Takes over what was heard. Revocations win over adoptions.
///
/// # Errors
/// There is no restore to accept, or a record does not decode.
pub fn accept(view: &mut View<'_>, actor: &str, heard: &Heard) -> Result<Accepted, StoreError> {
    let mut all: RestoresRecord = view.get(layout::RESTORES)?.unwrap_or_default();
    let now_ms = view.now_ms();
    match all.restores.last_mut().filter(|restore| restore.accepted_ms == 0) {
        Some(pending) => pending.accepted_ms = now_ms,
        None => {
            let text = "no restore waits to be accepted".to_owned();
            return Err(Refusal::RequestInvalid(text).into());
        }
    }
    view.put(layout::RESTORES.to_vec(), &all);
    let mut accepted = Accepted::default();
    let revoked = take_back(view, actor, heard, &mut accepted)?;
    revoke_nodes(view, actor, heard, &revoked, &mut accepted)?;
    for adoption in &heard.adoptions {
        let key = layout::node(adoption.cluster.as_str(), adoption.node.as_str());
        let was_known = view.get_raw(&key)?.is_some();
        let left_out = if is_revoked(adoption, &revoked) {
            Some("its identity was revoked after the backup".to_owned())
        } else {
            adopt(view, actor, adoption)?
        };
        accepted.adoptions.push((adoption.clone(), was_known, left_out));
    }
    for (authority, number) in &heard.crl_numbers {
        number_from(view, authority, *number)?;
    }
    let left_out = accepted.adoptions.iter().filter(|(_, _, why)| why.is_some()).count();
    view.audit(AuditRecord {
        detail: format!(
            "{} nodes adopted, {left_out} left out, {} revocations taken back, {} nodes revoked",
            accepted.adoptions.len() - left_out,
            accepted.revocations.len(),
            accepted.revoked_nodes.len()
        ),
        ..event(actor, AuditKind::RestoreAccepted, "", "")
    });
    Ok(accepted)
}

fn is_revoked(adoption: &Adoption, revoked: &BTreeSet<Vec<u8>>) -> bool {
    revoked.contains(adoption.identity.serial.as_bytes().as_slice())
}

/// Puts the revocations on record that are not; all serials that are revoked by what was heard.
fn take_back(
    view: &mut View<'_>,
    actor: &str,
    heard: &Heard,
    accepted: &mut Accepted,
) -> Result<BTreeSet<Vec<u8>>, StoreError> {
    let mut revoked = BTreeSet::new();
    let mut counts = BTreeMap::<Authority, u64>::new();
    for taken in &heard.revocations {
        revoked.insert(taken.serial.clone());
        let key = layout::revocation(taken.authority.cluster(), &taken.serial);
        if view.get_raw(&key)?.is_some() || taken.ends_ms <= view.now_ms() {
            continue;
        }
        let record: Option<CertificateRecord> = view.get(&layout::certificate(&taken.serial))?;
        let node = record.as_ref().map(|record| record.node.clone()).unwrap_or_default();
        let known = record.is_some();
        let not_after_ms = match record {
            Some(record) if record.not_after_ms <= view.now_ms() => continue,
            Some(record) => mark_revoked(view, taken, record)?,
            None => taken.ends_ms,
        };
        let revocation = RevocationRecord {
            serial: taken.serial.clone(),
            revoked_ms: taken.revoked_ms,
            not_after_ms,
            issuer_key_id: taken.issuer_key_id.clone(),
            taken_back: !known,
        };
        view.put(key, &revocation);
        *counts.entry(taken.authority.clone()).or_default() += 1;
        accepted.revocations.push((taken.clone(), node));
    }
    for (authority, count) in counts {
        count_revocations(view, &authority, count)?;
        view.audit(AuditRecord {
            detail: format!("{count} revocations"),
            ..event(actor, AuditKind::RevocationsTakenBack, authority.cluster(), "")
        });
    }
    Ok(revoked)
}

/// A certificate on record, and the key of a leaf: it gets no other.
fn mark_revoked(
    view: &mut View<'_>,
    taken: &TakenBack,
    mut record: CertificateRecord,
) -> Result<i64, StoreError> {
    record.revoked_ms = taken.revoked_ms;
    record.revoked_reason = REASON.to_owned();
    view.put(layout::certificate(&record.serial), &record);
    let key = layout::key(&record.key_hash);
    if record.kind() != v1::CertificateKind::AgentIdentity
        && let Some(mut used) = view.get::<KeyRecord>(&key)?
    {
        used.revoked_ms = taken.revoked_ms;
        view.put(key, &used);
    }
    Ok(record.not_after_ms)
}

fn count_revocations(
    view: &mut View<'_>,
    authority: &Authority,
    count: u64,
) -> Result<(), StoreError> {
    match authority {
        Authority::Control => {
            let mut record = cluster::control(view)?.ok_or(Refusal::Internal)?;
            record.revocations += count;
            view.put(layout::CONTROL.to_vec(), &record);
        }
        Authority::Cluster(id) => {
            let mut record = cluster::get(view, id)?;
            record.revocations += count;
            record.keys_version = record.next_version();
            cluster::put(view, &record);
        }
    }
    Ok(())
}

/// Nodes whose identity in force was revoked. Where only an older one was, the node was taken back since
/// and enrolled again.
fn revoke_nodes(
    view: &mut View<'_>,
    actor: &str,
    heard: &Heard,
    revoked: &BTreeSet<Vec<u8>>,
    accepted: &mut Accepted,
) -> Result<(), StoreError> {
    let name_of = |one: &Adoption| (one.cluster.to_string(), one.node.to_string());
    let (out, back): (Vec<_>, Vec<_>) =
        heard.adoptions.iter().partition(|one| is_revoked(one, revoked));
    let back: BTreeSet<_> = back.into_iter().map(name_of).collect();
    let mut names: BTreeSet<_> = out.into_iter().map(name_of).collect();
    for taken in heard.revocations.iter().filter(|taken| taken.authority == Authority::Control) {
        let record: Option<CertificateRecord> = view.get(&layout::certificate(&taken.serial))?;
        names.extend(record.map(|record| (record.cluster, record.node)));
    }
    for (cluster, name) in names.into_iter().filter(|name| !back.contains(name)) {
        let node: Option<NodeRecord> = view.get(&layout::node(&cluster, &name))?;
        if node.is_none_or(|node| node.node_status() != NodeStatus::Live) {
            continue;
        }
        let (Ok(id), Ok(node)) = (cluster.parse(), name.parse()) else {
            let why = "it is no name of a cluster or a node".to_owned();
            return Err(StoreError::Damaged { key: format!("{cluster}/{name}"), why });
        };
        let reach = Reach { all_traffic: false, ca: heard.ca_addresses.clone() };
        let revoking = Revoking { reason: REASON.to_owned(), keep_token: false, reach };
        nodes::revoke(view, actor, &id, &node, &revoking)?;
        accepted.revoked_nodes.push((cluster, name));
    }
    Ok(())
}

/// Takes an identity over, with the node where it is not known. `Some` is why not.
fn adopt(
    view: &mut View<'_>,
    actor: &str,
    adoption: &Adoption,
) -> Result<Option<String>, StoreError> {
    let Adoption { cluster, node: name, identity, .. } = adoption;
    let known: Option<NodeRecord> = view.get(&layout::node(cluster.as_str(), name.as_str()))?;
    let newer = |node: &NodeRecord| node.current().not_after_ms > identity.not_after_ms;
    if known.as_ref().is_some_and(|node| node.node_status() == NodeStatus::Live && newer(node)) {
        return Ok(Some("the backup has a newer identity of the node".to_owned()));
    }
    if known.is_none() && adoption.leaves.is_empty() {
        let why = "it showed no leaf, which says where it is: enrol it again";
        return Ok(Some(why.to_owned()));
    }
    put_if_new(view, v1::CertificateKind::AgentIdentity, adoption, identity)?;
    for (kind, leaf) in &adoption.leaves {
        put_if_new(view, *kind, adoption, leaf)?;
    }
    let mut node = node_record(view, adoption, known)?;
    address::take_all(view, &mut node, actor)?;
    member::tell(view, &mut node)?;
    identity::put(view, &node);
    view.audit(AuditRecord {
        serial: identity.serial.as_bytes().to_vec(),
        ..event(actor, AuditKind::NodeAdopted, cluster.as_str(), name.as_str())
    });
    Ok(None)
}

fn put_if_new(
    view: &mut View<'_>,
    kind: v1::CertificateKind,
    adoption: &Adoption,
    signed: &Signed,
) -> Result<(), StoreError> {
    if view.get_raw(&layout::certificate(signed.serial.as_bytes()))?.is_some() {
        return Ok(());
    }
    put_certificate(view, kind, &adoption.cluster, adoption.node.as_str(), signed).map(drop)
}

fn node_record(
    view: &View<'_>,
    adoption: &Adoption,
    known: Option<NodeRecord>,
) -> Result<NodeRecord, StoreError> {
    let Adoption { cluster, node, identity, source, .. } = adoption;
    let mut record = known.unwrap_or_else(|| NodeRecord {
        cluster: cluster.to_string(),
        name: node.to_string(),
        ..NodeRecord::default()
    });
    if record.node_status() != NodeStatus::Live {
        // It enrolled after the backup.
        record.enrolled_ms = identity.issued_ms;
        record.role = adoption.role.to_proto().into();
        record.dns_names.clone_from(&adoption.dns_names);
        record.addresses.clear();
        (record.revoked_ms, record.revoked_reason) = (0, String::new());
    }
    let source = source.map(|source| source.to_string());
    for address in &adoption.addresses {
        let proved = source.as_ref() == Some(address);
        if record.addresses.iter().any(|bound| bound.address == *address) {
            continue;
        }
        // Whoever is there beats whoever only says to be.
        let holder = address::live_holder(view, &record.cluster, address)?;
        if proved || holder.is_none_or(|holder| holder == record.name) {
            let address = address.clone();
            record.addresses.push(AddressRecord { address, proved, ..AddressRecord::default() });
        }
    }
    record.status = NodeStatus::Live.into();
    record.contact_ms = view.now_ms();
    record.lapsed_ms = 0;
    record.pending = None;
    record.identity = Some(IdentityRecord {
        serial: identity.serial.as_bytes().to_vec(),
        key_hash: identity.key_hash.to_vec(),
        not_after_ms: identity.not_after_ms,
    });
    if record.identities_since_ms == 0 {
        (record.identities, record.identities_since_ms) = (1, identity.issued_ms);
    }
    adoption.leaves.iter().for_each(|(_, leaf)| add_leaf_key(&mut record, leaf));
    Ok(record)
}

fn add_leaf_key(record: &mut NodeRecord, leaf: &Signed) {
    match record.leaf_keys.iter_mut().find(|key| key.key_hash == leaf.key_hash) {
        Some(key) => key.not_after_ms = key.not_after_ms.max(leaf.not_after_ms),
        None => record.leaf_keys.push(LeafKeyRecord {
            key_hash: leaf.key_hash.to_vec(),
            first_issued_ms: leaf.issued_ms,
            not_after_ms: leaf.not_after_ms,
            certificates: 1,
        }),
    }
}

/// The next CRL gets a number that is greater than any that was signed.
fn number_from(view: &mut View<'_>, authority: &Authority, number: u64) -> Result<(), StoreError> {
    if let Some(mut set) = cluster::crls(view, authority)?
        && set.number < number
    {
        set.number = number;
        // Due at once, whatever it covers.
        set.next_update_ms = 0;
        view.put(layout::crls(authority.cluster()), &set);
    }
    Ok(())
}
