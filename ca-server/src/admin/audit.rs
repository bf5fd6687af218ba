//! The audit log as operators read it: pages of what is stored, filtered here, and a wait for what
//! comes; and pruning it.

use std::{sync::Arc, time::Duration};

use raymtls_proto::{clock, v1};
use tokio::time::Instant;
use tracing::info;

use super::{Operator, clusters, watches::Watches};
use crate::{
    ca::Ca,
    checkpoints,
    refusal::Refusal,
    store::{AuditAsk, AuditPage, Authority, PrunePlan, StoreError},
};

/// Longest wait for a record.
pub const WAIT_MAX: Duration = Duration::from_secs(20);
/// Records younger than this are not pruned. An agent that may still call, by an identity of 30 days, holds
/// a checkpoint that is no older than its last call: whoever prunes more is hiding something, and each
/// agent takes it for that.
const PRUNE_AFTER: time::Duration = time::Duration::days(31);
/// Least time between two looks, whatever comes in.
const LOOK_PAUSE: Duration = Duration::from_millis(100);
/// Longest actor anybody asks for, in bytes: one that is longer never acted.
const ACTOR_LEN_MAX: usize = 512;

/// A page of the audit log.
///
/// # Errors
/// A refusal, or the store's failure.
pub async fn list(
    ca: &Ca,
    operator: &Operator,
    waits: &Arc<Watches>,
    request: v1::ListAuditRequest,
) -> Result<v1::ListAuditResponse, StoreError> {
    let scope = (!request.cluster.is_empty()).then_some(request.cluster.as_str());
    operator.require(v1::AdminRole::Viewer, scope)?;
    let wait = Duration::from_secs(request.wait_seconds.into()).min(WAIT_MAX);
    let ask = asked(&request)?;
    if let Some(cluster) = scope {
        // One that is not there has no log: a slip is told.
        ca.store.cluster(clusters::id(cluster)?).await?;
    }
    let page = if wait.is_zero() || ask.newest_first {
        ca.store.audit_page(ask).await?
    } else {
        let _turn = waits.begin(operator)?;
        followed(ca, ask, wait).await?
    };
    let AuditPage { records, next, more, newest_index, first_index } = page;
    let checkpoint = ca.checkpoint.load_full().map(|newest| (*newest).clone());
    let control_root_der = ca.authority(&Authority::Control)?.root_der.clone();
    Ok(v1::ListAuditResponse {
        records,
        next,
        more,
        newest_index,
        first_index,
        checkpoint,
        control_root_der,
    })
}

/// Removes old records, up to a checkpoint that is signed for it.
///
/// # Errors
/// A refusal, or the store's failure.
pub async fn prune(
    ca: &Ca,
    operator: &Operator,
    request: v1::PruneAuditRequest,
) -> Result<v1::PruneAuditResponse, StoreError> {
    operator.require(v1::AdminRole::Admin, None)?;
    let now = ca.clock.now();
    let before = clock::from_unix(request.before_unix).filter(|at| now - *at >= PRUNE_AFTER);
    let before = before.ok_or_else(|| {
        invalid(
            "records of the last 31 days stay: a node that was away for as long may still ask for them",
        )
    })?;
    if ca.log_fault().is_some() {
        return Err(invalid("the log is not what was signed: nothing of it is removed").into());
    }
    let PrunePlan { first_index, keep_from, hash } = ca.store.plan_prune(before).await?;
    let checkpoint = checkpoints::sign(ca, keep_from, hash)?;
    if !request.dry_run {
        let actor = || operator.actor.clone();
        while ca.store.prune_audit(now, actor(), checkpoint.clone()).await? {}
        info!(actor = operator.actor, first_index = keep_from, "audit log pruned");
    }
    let removed = keep_from - first_index;
    Ok(v1::PruneAuditResponse { removed, first_index: keep_from, checkpoint: Some(checkpoint) })
}

/// The first page with a record in it, or what there is when the wait is over.
async fn followed(ca: &Ca, mut ask: AuditAsk, wait: Duration) -> Result<AuditPage, StoreError> {
    let deadline = Instant::now() + wait;
    // Before the first look: what comes after it wakes the wait.
    let mut newest = ca.store.watch_audit();
    loop {
        newest.mark_unchanged();
        let page = ca.store.audit_page(ask.clone()).await?;
        if !page.records.is_empty() || page.more || Instant::now() >= deadline {
            return Ok(page);
        }
        ask.cursor = page.next;
        tokio::select! {
            moved = newest.changed() => if moved.is_err() { return Ok(page) },
            () = tokio::time::sleep_until(deadline) => return Ok(page),
            () = ca.stopped() => return Ok(page),
        }
        tokio::time::sleep(LOOK_PAUSE).await;
    }
}

fn asked(request: &v1::ListAuditRequest) -> Result<AuditAsk, Refusal> {
    let kind = v1::AuditKind::try_from(request.kind)
        .map_err(|_| invalid("this CA knows no such kind of audit record"))?;
    if !matches!(request.serial.len(), 0 | 16) {
        return Err(invalid("a serial number has 16 bytes"));
    }
    if request.actor.len() > ACTOR_LEN_MAX || request.node.len() > ACTOR_LEN_MAX {
        return Err(invalid("no actor and no node has a name that long"));
    }
    if request.newest_first && request.wait_seconds != 0 {
        return Err(invalid("what is to come is waited for from the oldest on"));
    }
    let some = |text: &String| (!text.is_empty()).then(|| text.clone());
    Ok(AuditAsk {
        cluster: some(&request.cluster),
        node: some(&request.node),
        serial: (!request.serial.is_empty()).then(|| request.serial.clone()),
        actor: some(&request.actor),
        kind: (kind != v1::AuditKind::Unspecified).then_some(kind),
        since_ms: (request.since_unix != 0).then(|| request.since_unix.saturating_mul(1_000)),
        newest_first: request.newest_first,
        cursor: request.cursor,
        limit: usize::try_from(request.limit).unwrap_or(usize::MAX),
    })
}

fn invalid(text: &str) -> Refusal {
    Refusal::RequestInvalid(text.to_owned())
}
