//! Ray leaves: what may stand in one, and how old its key may be.

use std::time::Duration;

use raymtls_proto::{address::NodeAddress, identity::Role, v1};

use super::{
    address, check_key_use, check_not_ended, cluster, event,
    identity::{put, require},
    member, put_certificate, revoke_leaf,
};
use crate::{
    policy,
    refusal::Refusal,
    store::{
        Caller, LEAF_KEYS_MAX, LEAVES_MAX, LeafAsk, LeafKind, LeafPlan, Signed, StoreError,
        records::{AuditKind, AuditRecord, LeafKeyRecord, NodeRecord},
        view::View,
    },
};

/// Judges a leaf. Changes nothing.
///
/// # Errors
/// As `identity::still_stands`; a name or address not bound to the node or taken over by another;
/// a key too old, or the identity's; too many live keys; cluster over.
pub fn plan(view: &View<'_>, caller: &Caller, ask: &LeafAsk) -> Result<LeafPlan, StoreError> {
    judge(view, caller, &require(view, caller)?, ask)
}

fn judge(
    view: &View<'_>,
    caller: &Caller,
    node: &NodeRecord,
    ask: &LeafAsk,
) -> Result<LeafPlan, StoreError> {
    let cluster = cluster::get(view, &caller.cluster)?;
    check_not_ended(view, &cluster)?;
    if node.known_role() == Role::Driver && ask.kind == LeafKind::Node {
        let text = "a driver gets driver leaves only: enrol as head or worker for a node's";
        return Err(Refusal::RequestInvalid(text.to_owned()).into());
    }
    let (addresses, dns_names) = policy::leaf_names(node, ask)?;
    for &address in &addresses {
        check_address(view, node, address)?;
    }
    let life_ms = cluster.settings().leaf_life_seconds * 1_000;
    check_key(view, node, ask, life_ms)?;
    let ends_unix = cluster.settings().ends_unix;
    let ends_ms = (ends_unix != 0).then_some(ends_unix * 1_000);
    Ok(LeafPlan { addresses, dns_names, life_ms, ends_ms })
}

/// Records a leaf.
///
/// # Errors
/// As [`plan`]; the plan is not the one that was signed.
pub fn record(
    view: &mut View<'_>,
    caller: &Caller,
    ask: &LeafAsk,
    planned: &LeafPlan,
    leaf: &Signed,
) -> Result<(), StoreError> {
    let mut node = require(view, caller)?;
    if judge(view, caller, &node, ask)? != *planned {
        return Err(Refusal::RaceLost("what the node may have").into());
    }
    note_key(view, &mut node, leaf, planned.life_ms);
    if address::take_back_all(view, &mut node, &caller.actor())? {
        member::tell(view, &mut node)?;
    }
    put(view, &node);
    let kind = certificate_kind(ask.kind);
    put_certificate(view, kind, &caller.cluster, &node.name, leaf)?;
    view.audit(AuditRecord {
        serial: leaf.serial.as_bytes().to_vec(),
        ..event(&caller.actor(), AuditKind::LeafIssued, &node.cluster, &node.name)
    });
    Ok(())
}

/// Whoever comes after the live node that holds an address exclusively waits for it, a node that was
/// away meanwhile too. A driver may share it if it came from there.
fn check_address(
    view: &View<'_>,
    node: &NodeRecord,
    address: NodeAddress,
) -> Result<(), StoreError> {
    let address = address.to_string();
    let proved = || node.addresses.iter().any(|bound| bound.address == address && bound.proved);
    if node.known_role() == Role::Driver && proved() {
        return Ok(());
    }
    if address::holds(view, node, &address)? {
        return Ok(());
    }
    match address::live_holder(view, &node.cluster, &address)? {
        Some(holder) if holder != node.name => {
            Err(Refusal::AddressTaken { address, holder }.into())
        }
        Some(_) | None => Ok(()),
    }
}

fn check_key(
    view: &View<'_>,
    node: &NodeRecord,
    ask: &LeafAsk,
    life_ms: i64,
) -> Result<(), StoreError> {
    check_key_use(view, &ask.key_hash, certificate_kind(ask.kind), &node.cluster, &node.name)?;
    if revoke_leaf::is_revoked(view, &ask.key_hash)? {
        return Err(Refusal::KeyRevoked.into());
    }
    let now_ms = view.now_ms();
    let known = node.leaf_keys.iter().find(|key| key.key_hash == ask.key_hash);
    if known.is_some_and(|key| now_ms - key.first_issued_ms >= life_ms) {
        return Err(Refusal::KeyTooOld.into());
    }
    let live = || node.leaf_keys.iter().filter(|key| key.not_after_ms > now_ms);
    let certificates: u32 = live().map(|key| key.certificates).sum();
    // Each enrolment is a token's word: a host that is made anew for each job begins with none.
    let of_this_life = live().filter(|key| key.first_issued_ms >= node.enrolled_ms).count();
    let what = if known.is_none() && of_this_life >= LEAF_KEYS_MAX {
        "the node has as many live leaf keys as it may have"
    } else if certificates >= LEAVES_MAX {
        "the node has as many live leaves as it may have"
    } else {
        return Ok(());
    };
    let soonest = live().map(|key| key.not_after_ms).min().unwrap_or(now_ms);
    let retry_after = Duration::from_millis((soonest - now_ms).unsigned_abs());
    Err(Refusal::RateLimited { what, retry_after }.into())
}

fn note_key(view: &View<'_>, node: &mut NodeRecord, leaf: &Signed, life_ms: i64) {
    let now_ms = view.now_ms();
    let known = node.leaf_keys.iter_mut().find(|key| key.key_hash == leaf.key_hash);
    if let Some(key) = known {
        key.not_after_ms = key.not_after_ms.max(leaf.not_after_ms);
        key.certificates += 1;
        return;
    }
    // Remembered one more life: a key that was too old does not become young by being forgotten.
    node.leaf_keys.retain(|key| key.not_after_ms + life_ms > now_ms);
    node.leaf_keys.push(LeafKeyRecord {
        key_hash: leaf.key_hash.to_vec(),
        first_issued_ms: leaf.issued_ms,
        not_after_ms: leaf.not_after_ms,
        certificates: 1,
    });
}

fn certificate_kind(kind: LeafKind) -> v1::CertificateKind {
    match kind {
        LeafKind::Node => v1::CertificateKind::RayNode,
        LeafKind::Driver => v1::CertificateKind::RayDriver,
    }
}
