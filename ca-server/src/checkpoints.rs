//! Checkpoints of the audit log: signed each second there is something new, given to agents with each
//! Sync, and compared with those that agents kept. A checkpoint of ours that the log contradicts is proof
//! that the store was edited, rolled back or forked; who holds it goes on being served.

use std::{sync::Arc, time::Duration};

use raymtls_proto::{
    checkpoint::{self, Verdict},
    v1::{Checkpoint, LogAlarm, LogState},
};
use tracing::{error, warn};

use crate::{
    ca::Ca,
    keys::signer::SignError,
    store::{AuditState, Authority, Caller, StoreError, unix_ms},
};

/// Least time between two checkpoints.
const EVERY: Duration = Duration::from_secs(1);

/// Signs checkpoints until the server stops.
pub async fn keep(ca: Arc<Ca>) {
    // Before the first look: what comes after it wakes the wait.
    let mut newest = ca.store.watch_audit();
    loop {
        newest.mark_unchanged();
        if let Err(error) = sign_newest(&ca).await {
            error!(%error, "no checkpoint of the audit log was signed; tried again with the next record");
        }
        tokio::select! {
            moved = newest.changed() => if moved.is_err() { return },
            () = ca.stopped() => return,
        }
        tokio::time::sleep(EVERY).await;
    }
}

/// Signs a checkpoint of the newest record, unless there is one, or the store is one that contradicts the
/// last.
///
/// # Errors
/// The store, or the signature.
pub async fn sign_newest(ca: &Ca) -> Result<(), StoreError> {
    if ca.log_fault().is_some() {
        // What vouches against this log must not be replaced by what vouches for it.
        return Ok(());
    }
    let state = ca.store.audit_state().await?;
    let epoch = ca.store.epoch();
    let covers = |last: &Checkpoint| last.index == state.newest_index && last.epoch == epoch;
    if state.newest_index == 0 || state.checkpoint.as_ref().is_some_and(covers) {
        return Ok(());
    }
    let signed = sign(ca, state.newest_index, state.newest_hash)?;
    ca.store.put_checkpoint(signed.clone()).await?;
    ca.checkpoint.store(Some(Arc::new(signed)));
    Ok(())
}

/// Signs a checkpoint at a record.
///
/// # Errors
/// The signature.
pub fn sign(ca: &Ca, index: u64, hash: Vec<u8>) -> Result<Checkpoint, StoreError> {
    let control = ca.authority(&Authority::Control)?;
    let issuer = control.active();
    let mut checkpoint = Checkpoint {
        epoch: ca.store.epoch(),
        index,
        hash,
        at_ms: unix_ms(ca.clock.now()),
        signature: Vec::new(),
        issuer_der: issuer.certificate_der().to_vec(),
    };
    let signed = issuer.sign_message(&checkpoint::signed_bytes(&checkpoint));
    checkpoint.signature = signed.map_err(|error: SignError| crate::sign_failed(error))?;
    Ok(checkpoint)
}

/// What the store's own checkpoint says of its log: asked when it is opened.
///
/// # Errors
/// The store.
pub async fn judge_store(ca: &Ca, state: &AuditState) -> Result<Option<LogAlarm>, StoreError> {
    let Some(last) = &state.checkpoint else { return Ok(None) };
    let root = ca.authority(&Authority::Control)?;
    if let Err(why) = checkpoint::check(last, [root.root_der.as_slice()]) {
        error!(%why, "the store's newest checkpoint of the audit log is not the control authority's");
        return Ok(Some(LogAlarm::BadSignature));
    }
    let hash_at = ca.store.audit_hash_at(last.index).await?;
    let told = LogState {
        hash_at: hash_at.unwrap_or_default(),
        newest: Some(Checkpoint { index: state.newest_index, ..Checkpoint::default() }),
        ..LogState::default()
    };
    Ok(match checkpoint::judge(last, &told) {
        Verdict::Whole | Verdict::Accepted => None,
        Verdict::Alarm(alarm) => Some(alarm),
    })
}

/// What the node is told of the log, and what its checkpoint says of it.
///
/// # Errors
/// The store.
pub async fn compare(
    ca: &Ca,
    caller: &Caller,
    kept: Option<&Checkpoint>,
) -> Result<LogState, StoreError> {
    let newest = ca.checkpoint.load_full().map(|newest| (*newest).clone());
    let Some(kept) = kept.filter(|kept| checkpoint::has_form(kept)) else {
        return Ok(LogState { newest, ..LogState::default() });
    };
    let mut told = LogState { newest, ..LogState::default() };
    told.hash_at = ca.store.audit_hash_at(kept.index).await?.unwrap_or_default();
    let restores = ca.restores.load();
    if kept.epoch != ca.store.epoch()
        && let Some(kept_up_to) = restores.kept_up_to(kept.epoch)
    {
        told.kept_up_to = kept_up_to;
        told.restore_accepted = restores.pending().is_none();
    }
    let alarm = match checkpoint::judge(kept, &told) {
        Verdict::Whole | Verdict::Accepted => LogAlarm::Unspecified,
        Verdict::Alarm(alarm) => proved(ca, caller, kept, alarm),
    };
    ca.contacts.note_log(caller, kept.index, alarm);
    Ok(told)
}

/// An alarm that rests on a checkpoint which this CA's own authority signed; one that nobody signed says
/// nothing.
fn proved(ca: &Ca, caller: &Caller, kept: &Checkpoint, alarm: LogAlarm) -> LogAlarm {
    let actor = caller.actor();
    let told = |reason| ca.quiet.tell(ca.clock.elapsed(), "log", &actor, reason);
    let root = ca.authority(&Authority::Control).map(|control| control.root_der.clone());
    let signed = root.is_ok_and(|root| checkpoint::check(kept, [root.as_slice()]).is_ok());
    if !signed {
        if let Some(left_out) = told("unsigned") {
            warn!(node = actor, left_out, "a node holds a checkpoint that this CA did not sign");
        }
        return LogAlarm::Unspecified;
    }
    if let Some(left_out) = told("contradicted") {
        let why = checkpoint::in_words(alarm).unwrap_or_default();
        error!(node = actor, index = kept.index, left_out, "AUDIT LOG ALARM: {why}");
    }
    alarm
}
