//! Ray leaves: what may stand in one, and how old its key may be.

use raymtls_proto::{identity::Role, v1};

use super::{
    check_not_ended, cluster,
    enroll::{holds_exclusively, live_holder},
    event,
    identity::{put, require},
    put_certificate,
};
use crate::{
    policy,
    refusal::Refusal,
    store::{
        Caller, LEAF_KEYS_MAX, LeafAsk, LeafKind, LeafPlan, Signed, StoreError,
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
    let node = require(view, caller)?;
    let cluster = cluster::get(view, &caller.cluster)?;
    check_not_ended(view, &cluster)?;
    if node.known_role() == Role::Driver && ask.kind == LeafKind::Node {
        let text = "a driver gets driver leaves only: enrol as head or worker for a node's";
        return Err(Refusal::RequestInvalid(text.to_owned()).into());
    }
    let (addresses, dns_names) = policy::leaf_names(&node, ask)?;
    if holds_exclusively(&node) {
        for address in &addresses {
            let address = address.to_string();
            match live_holder(view, &node.cluster, &address)? {
                Some(holder) if holder != node.name => {
                    return Err(Refusal::AddressTaken { address, holder }.into());
                }
                Some(_) | None => {}
            }
        }
    }
    let life_ms = cluster.settings().leaf_life_seconds * 1_000;
    check_key(view, &node, ask, life_ms)?;
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
    if plan(view, caller, ask)? != *planned {
        return Err(StoreError::Unavailable("the plan changed while the leaf was signed".into()));
    }
    let mut node = require(view, caller)?;
    note_key(view, &mut node, leaf);
    put(view, &node);
    let kind = match ask.kind {
        LeafKind::Node => v1::CertificateKind::RayNode,
        LeafKind::Driver => v1::CertificateKind::RayDriver,
    };
    put_certificate(view, kind, &caller.cluster, &node.name, leaf)?;
    view.audit(AuditRecord {
        serial: leaf.serial.as_bytes().to_vec(),
        ..event(&caller.actor(), AuditKind::LeafIssued, &node.cluster, &node.name)
    });
    Ok(())
}

fn check_key(
    view: &View<'_>,
    node: &NodeRecord,
    ask: &LeafAsk,
    life_ms: i64,
) -> Result<(), Refusal> {
    let identities = node.identity.iter().chain(&node.pending);
    if identities.into_iter().any(|identity| identity.key_hash == ask.key_hash) {
        let text = "a Ray leaf wants a key of its own, not the identity's: Ray's user can read it";
        return Err(Refusal::CsrInvalid(text.to_owned()));
    }
    let now_ms = view.now_ms();
    if let Some(key) = node.leaf_keys.iter().find(|key| key.key_hash == ask.key_hash) {
        if now_ms - key.first_issued_ms >= life_ms {
            return Err(Refusal::KeyTooOld);
        }
        return Ok(());
    }
    let live = node.leaf_keys.iter().filter(|key| key.not_after_ms > now_ms);
    if live.clone().count() >= LEAF_KEYS_MAX {
        let soonest = live.map(|key| key.not_after_ms).min().unwrap_or(now_ms);
        return Err(Refusal::RateLimited {
            what: "the node has 32 leaf keys with valid certificates",
            retry_after: std::time::Duration::from_millis((soonest - now_ms).unsigned_abs()),
        });
    }
    Ok(())
}

fn note_key(view: &View<'_>, node: &mut NodeRecord, leaf: &Signed) {
    let now_ms = view.now_ms();
    let known = node.leaf_keys.iter_mut().find(|key| key.key_hash == leaf.key_hash);
    if let Some(key) = known {
        key.not_after_ms = key.not_after_ms.max(leaf.not_after_ms);
        return;
    }
    node.leaf_keys.retain(|key| key.not_after_ms > now_ms);
    node.leaf_keys.push(LeafKeyRecord {
        key_hash: leaf.key_hash.to_vec(),
        first_issued_ms: leaf.issued_ms,
        not_after_ms: leaf.not_after_ms,
    });
}
