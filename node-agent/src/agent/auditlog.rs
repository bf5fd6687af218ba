//! The CA's audit log as this node has seen it: the newest signed checkpoint, kept in the state folder, and
//! what it says of the log that the CA tells of with each Sync. An alarm stops nothing, but in strict
//! mode, where nothing is renewed while there is one, or while the log was not compared since the start.

use raymtls_proto::{
    checkpoint::{self, Verdict},
    v1::{Checkpoint, LogAlarm, LogState, SyncResponse},
};

use super::{ActError, Agent};

/// What is known of the log.
#[derive(Debug, Default)]
pub(super) struct AuditLog {
    kept: Option<Checkpoint>,
    alarm: Option<LogAlarm>,
    /// The CA was heard of it since the start.
    compared: bool,
}

impl AuditLog {
    pub(super) fn with(kept: Option<Checkpoint>) -> Self {
        Self { kept, ..Self::default() }
    }

    /// What goes to the CA with each Sync.
    pub(super) fn kept(&self) -> Option<Checkpoint> {
        self.kept.clone()
    }

    /// What goes into the report.
    pub(super) fn alarm(&self) -> LogAlarm {
        self.alarm.unwrap_or(LogAlarm::Unspecified)
    }

    /// The alarm in words.
    pub(super) fn in_words(&self) -> Option<String> {
        let words = checkpoint::in_words(self.alarm?)?;
        let at = self.kept.as_ref().map_or(0, |kept| kept.index);
        Some(format!("AUDIT LOG ALARM (checkpoint of record {at}): {words}"))
    }
}

impl Agent {
    /// Compares the log with the checkpoint kept here, and keeps the newer one where nothing is wrong.
    /// What contradicts the log stays: it is the proof.
    pub(super) fn hear_log(&mut self, answer: &SyncResponse) {
        let Some(told) = &answer.log else { return };
        let verdict = self
            .audit_log
            .kept
            .as_ref()
            .map_or(Verdict::Whole, |kept| checkpoint::judge(kept, told));
        let alarm = match verdict {
            Verdict::Alarm(alarm) => Some(alarm),
            Verdict::Whole => self.keep_newest(told),
            Verdict::Accepted => {
                tracing::warn!(
                    index = told.kept_up_to,
                    "an operator accepted a restore of the CA: its audit log goes on after this record"
                );
                self.keep_newest(told)
            }
        };
        let changed = alarm != self.audit_log.alarm;
        self.audit_log.alarm = alarm;
        self.audit_log.compared = true;
        if changed {
            match self.audit_log.in_words() {
                Some(why) => tracing::error!(strict = self.config.strict_audit_log, "{why}"),
                None => {
                    tracing::info!("the CA's audit log holds what this node has seen of it again");
                }
            }
            // The CA hears of it.
            self.sync.report_soon();
        }
    }

    fn keep_newest(&mut self, told: &LogState) -> Option<LogAlarm> {
        let newest = told.newest.as_ref()?;
        let goes_on = |kept: &Checkpoint| newest.epoch != kept.epoch || newest.index > kept.index;
        if !self.audit_log.kept.as_ref().is_none_or(goes_on) {
            return None;
        }
        let roots = self.node.control_roots.iter().map(AsRef::as_ref);
        if let Err(why) = checkpoint::check(newest, roots) {
            tracing::debug!(%why, index = newest.index, "the checkpoint was not kept");
            return Some(LogAlarm::BadSignature);
        }
        match self.state.put_checkpoint(newest) {
            Ok(()) => self.audit_log.kept = Some(newest.clone()),
            // The one before it says the same of the log, up to its own record.
            Err(error) => tracing::warn!(%error, "the checkpoint of the audit log was not kept"),
        }
        None
    }

    /// Whether a certificate may be fetched, as far as the log goes.
    pub(super) fn log_permits(&self) -> Result<(), ActError> {
        if !self.config.strict_audit_log {
            return Ok(());
        }
        match self.audit_log.in_words() {
            Some(why) => Err(ActError::AuditLog(why)),
            None if !self.audit_log.compared => Err(ActError::AuditLog(
                "the CA's audit log was not compared with this node's checkpoint since the agent started"
                    .to_owned(),
            )),
            None => Ok(()),
        }
    }
}
