//! Identities: who calls, and the renewal that survives any number of lost replies.

use std::time::Duration;

use raymtls_proto::v1;

use super::{
    check_key_use, check_not_ended, cluster, enroll::revoked, event, member, put_certificate,
};
use crate::{
    keys::profile::AGENT_IDENTITY_LIFE,
    refusal::Refusal,
    store::{
        CONTACT_COARSE_MS, Caller, IDENTITIES_MAX, RenewPlan, Signed, StoreError, layout,
        records::{
            AuditKind, AuditRecord, CertificateRecord, IdentityRecord, NodeRecord, NodeStatus,
        },
        view::View,
    },
};

/// The window in which identities of a node are counted: the life of one.
const IDENTITY_LIFE_MS: i64 = AGENT_IDENTITY_LIFE.whole_seconds() * 1_000;
/// A retired identity in use is put on record at most this often.
const REUSE_EVENT_EVERY_MS: i64 = 60 * 60 * 1_000;

/// Judges a caller. The first call made with a pending identity retires the current one.
///
/// # Errors
/// Unknown, revoked, left; retired, which is an event and stays on record.
pub fn identify(view: &mut View<'_>, caller: &Caller) -> Result<NodeRecord, StoreError> {
    let node = known(view, caller)?;
    judge(view, caller, node)
}

fn judge(
    view: &mut View<'_>,
    caller: &Caller,
    mut node: NodeRecord,
) -> Result<NodeRecord, StoreError> {
    let serial = caller.serial.as_bytes();
    if node.pending.as_ref().is_some_and(|pending| pending.serial == serial) {
        node.identity = node.pending.take();
        view.audit(AuditRecord {
            serial: serial.to_vec(),
            ..event(&caller.actor(), AuditKind::IdentityActivated, &node.cluster, &node.name)
        });
        note_contact(view, caller, &mut node)?;
        put(view, &node);
    } else if node.current().serial != serial {
        return Err(retired(view, caller, node)?.into());
    } else if note_contact(view, caller, &mut node)? {
        put(view, &node);
    }
    Ok(node)
}

/// Judges a caller that a plan was made for a moment ago, as [`identify`] does. One that was retired
/// meanwhile by the node's own next call is late, and nothing suspicious.
///
/// # Errors
/// Unknown, revoked, left, replaced by a newer identity.
pub fn identify_again(view: &mut View<'_>, caller: &Caller) -> Result<(), StoreError> {
    let node = known(view, caller)?;
    if !holds(&node, caller) {
        return Err(Refusal::Superseded.into());
    }
    judge(view, caller, node).map(drop)
}

/// Whether the caller's identity is its live node's current or pending one. Changes nothing.
///
/// # Errors
/// The store's.
pub fn is_in_force(view: &View<'_>, caller: &Caller) -> Result<bool, StoreError> {
    match known(view, caller) {
        Ok(node) => Ok(holds(&node, caller)),
        Err(StoreError::Refused(_)) => Ok(false),
        Err(error) => Err(error),
    }
}

fn holds(node: &NodeRecord, caller: &Caller) -> bool {
    let mut in_force = node.identity.iter().chain(&node.pending);
    in_force.any(|identity| identity.serial == caller.serial.as_bytes())
}

/// Judges a caller that was identified before and waited since.
///
/// # Errors
/// Unknown, revoked, left, replaced by a newer identity.
pub fn still_stands(view: &View<'_>, caller: &Caller) -> Result<(), StoreError> {
    require(view, caller).map(drop)
}

/// Judges a renewal. Changes nothing.
///
/// # Errors
/// As [`still_stands`]; the key is the current identity's.
pub fn plan_renew(
    view: &View<'_>,
    caller: &Caller,
    key_hash: &[u8; 32],
) -> Result<RenewPlan, StoreError> {
    let node = require(view, caller)?;
    if node.current().key_hash == key_hash {
        let text = "the next identity wants a key of its own, not the current one's";
        return Err(Refusal::CsrInvalid(text.to_owned()).into());
    }
    let kind = v1::CertificateKind::AgentIdentity;
    check_key_use(view, key_hash, kind, &node.cluster, &node.name)?;
    match node.pending.as_ref().filter(|pending| pending.key_hash == key_hash) {
        None => {
            check_not_ended(view, &cluster::get(view, &caller.cluster)?)?;
            check_count(view, &node)?;
            Ok(RenewPlan::Issue)
        }
        Some(pending) => {
            let record: CertificateRecord =
                view.get(&layout::certificate(&pending.serial))?.ok_or(Refusal::Internal)?;
            Ok(RenewPlan::Replay(Box::new(record)))
        }
    }
}

/// Records the next identity as pending.
///
/// # Errors
/// As [`plan_renew`].
pub fn renew(
    view: &mut View<'_>,
    caller: &Caller,
    identity: &Signed,
) -> Result<CertificateRecord, StoreError> {
    if let RenewPlan::Replay(record) = plan_renew(view, caller, &identity.key_hash)? {
        return Ok(*record);
    }
    let mut node = require(view, caller)?;
    if view.now_ms() - node.identities_since_ms >= IDENTITY_LIFE_MS {
        (node.identities, node.identities_since_ms) = (0, view.now_ms());
    }
    node.identities += 1;
    node.pending = Some(IdentityRecord {
        serial: identity.serial.as_bytes().to_vec(),
        key_hash: identity.key_hash.to_vec(),
        not_after_ms: identity.not_after_ms,
    });
    put(view, &node);
    let record = put_certificate(
        view,
        v1::CertificateKind::AgentIdentity,
        &caller.cluster,
        &node.name,
        identity,
    )?;
    view.audit(AuditRecord {
        serial: record.serial.clone(),
        ..event(&caller.actor(), AuditKind::IdentityRenewed, &node.cluster, &node.name)
    });
    Ok(record)
}

/// Each identity that has not expired may have to stand on a CRL.
fn check_count(view: &View<'_>, node: &NodeRecord) -> Result<(), Refusal> {
    let ends_ms = node.identities_since_ms + IDENTITY_LIFE_MS;
    if node.identities < IDENTITIES_MAX || view.now_ms() >= ends_ms {
        return Ok(());
    }
    Err(Refusal::RateLimited {
        what: "the node was issued as many identities as it may have",
        retry_after: Duration::from_millis((ends_ms - view.now_ms()).unsigned_abs()),
    })
}

/// The caller's node, with the identity in force and none other.
pub(super) fn require(view: &View<'_>, caller: &Caller) -> Result<NodeRecord, StoreError> {
    let node = known(view, caller)?;
    if node.current().serial != caller.serial.as_bytes() {
        return Err(Refusal::Superseded.into());
    }
    Ok(node)
}

/// The caller's node, if it is in the cluster.
fn known(view: &View<'_>, caller: &Caller) -> Result<NodeRecord, StoreError> {
    let key = layout::node(caller.cluster.as_str(), caller.node.as_str());
    let node: NodeRecord = view.get(&key)?.ok_or(Refusal::IdentityUnknown)?;
    match node.node_status() {
        NodeStatus::Live => Ok(node),
        NodeStatus::Revoked => Err(revoked(&node).into()),
        NodeStatus::Left => Err(Refusal::NodeLeft(node.name).into()),
        NodeStatus::Unspecified => Err(Refusal::IdentityUnknown.into()),
    }
}

/// An identity of the node that is neither current nor pending. One from before the node's last
/// enrolment belongs to the machine that had the name then: unknown, and nothing suspicious.
fn retired(
    view: &mut View<'_>,
    caller: &Caller,
    mut node: NodeRecord,
) -> Result<Refusal, StoreError> {
    let record: Option<CertificateRecord> =
        view.get(&layout::certificate(caller.serial.as_bytes()))?;
    if record.is_none_or(|record| record.issued_ms < node.enrolled_ms) {
        return Ok(Refusal::IdentityUnknown);
    }
    if node.reused_ms == 0 || view.now_ms() - node.reused_ms >= REUSE_EVENT_EVERY_MS {
        node.reused_ms = view.now_ms();
        put(view, &node);
        view.keep();
        let from = caller.source.map_or_else(String::new, |source| format!("from {source}"));
        view.audit(AuditRecord {
            serial: caller.serial.as_bytes().to_vec(),
            detail: from,
            ..event(&caller.actor(), AuditKind::IdentityReused, &node.cluster, &node.name)
        });
    }
    Ok(Refusal::IdentityReused)
}

/// Notes the contact, and what its source address proves. Whether the record is to be written.
fn note_contact(
    view: &mut View<'_>,
    caller: &Caller,
    node: &mut NodeRecord,
) -> Result<bool, StoreError> {
    let source = caller.source.map(|source| source.to_string());
    let returned = node.lapsed_ms != 0;
    let mut told = returned;
    for bound in &mut node.addresses {
        if !bound.proved && source.as_ref() == Some(&bound.address) {
            bound.proved = true;
            told = true;
        }
    }
    let coarse = view.now_ms() - node.contact_ms >= CONTACT_COARSE_MS;
    if coarse || returned {
        node.contact_ms = view.now_ms();
    }
    if returned {
        node.lapsed_ms = 0;
        view.audit(event(&caller.actor(), AuditKind::MemberReturned, &node.cluster, &node.name));
    }
    if told {
        member::tell(view, node)?;
    }
    Ok(coarse || told)
}

pub(super) fn put(view: &mut View<'_>, node: &NodeRecord) {
    view.put(layout::node(&node.cluster, &node.name), node);
}
