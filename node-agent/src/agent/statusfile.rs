//! When the status file beside the socket is written: at once where something changed, and now and then
//! where nothing did, so that its age tells when the daemon ended.

use std::time::Duration;

use raymtls_proto::durable::{self, Access};
use tokio::time::Instant;

use crate::{
    isolation::status::IsolationStatus,
    status::{Contact, Status},
};

/// Nothing but times and counts is no reason to write sooner.
const WRITE_PAUSE: Duration = Duration::from_secs(10);

/// What was written last.
#[derive(Debug, Default)]
pub(super) struct StatusFile {
    last: Option<(Instant, Status)>,
    failed: bool,
    first_try: Option<Instant>,
}

impl StatusFile {
    pub(super) fn write(&mut self, path: &std::path::Path, status: &Status, now: Instant) {
        if !is_due(self.last.as_ref(), status, now) {
            return;
        }
        // The folder is made with the socket, a moment after the first status.
        let first_try = *self.first_try.get_or_insert(now);
        if now.duration_since(first_try) < WRITE_PAUSE
            && path.parent().is_some_and(|parent| !parent.exists())
        {
            return;
        }
        self.last = Some((now, status.clone()));
        let text = serde_json::to_vec_pretty(status).expect("a status is valid JSON");
        let written = durable::replace(path, &text, Access::PUBLIC);
        if let Err(error) = &written
            && !self.failed
        {
            tracing::warn!(%error, path = %path.display(), "the status file cannot be written");
        }
        self.failed = written.is_err();
    }
}

fn is_due(last: Option<&(Instant, Status)>, status: &Status, now: Instant) -> bool {
    last.is_none_or(|(at, written)| {
        now.duration_since(*at) >= WRITE_PAUSE || lasting(written) != lasting(status)
    })
}

/// Without what changes with each call.
fn lasting(status: &Status) -> Status {
    let ca = Contact { last_contact: None, last_error: None, next_try: None, ..status.ca };
    Status {
        as_of: status.identity.not_after,
        ca,
        renewals: 0,
        clock_skew_seconds: None,
        isolation: IsolationStatus {
            blocked_packets: 0,
            refused_packets: 0,
            ..status.isolation.clone()
        },
        tunnel: status.tunnel.as_ref().map(crate::status::tunnel::TunnelStatus::lasting),
        ..status.clone()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::{
        moment::Moment,
        status::{CertificateStatus, SplitStatus},
    };

    pub(crate) fn status(now: time::OffsetDateTime) -> Status {
        let moment = Moment::from(now);
        let certificate =
            CertificateStatus { serial: "01".into(), not_after: moment, renew_at: moment };
        Status {
            as_of: moment,
            agent_version: String::new(),
            pid: 1,
            trust_domain: String::new(),
            cluster: String::new(),
            node: String::new(),
            role: String::new(),
            addresses: Vec::new(),
            dns_names: Vec::new(),
            standing: "enrolled".to_owned(),
            standing_reason: None,
            ca: Contact {
                reachable: Some(true),
                last_contact: None,
                last_error: None,
                next_try: None,
            },
            identity: certificate,
            key_folders: Vec::new(),
            files_work_until: None,
            has_ray_token: None,
            ray_env: String::new(),
            settings: None,
            received: None,
            applied: None,
            two_key_split: SplitStatus { holds: None, why: String::new() },
            renewals: 0,
            clock_skew_seconds: None,
            ray_stop: None,
            isolation: IsolationStatus::default(),
            tunnel: None,
            served: None,
            served_problem: None,
            lease_ends: None,
            first_failure: None,
            problems: Vec::new(),
        }
    }

    #[test]
    fn a_change_is_written_at_once_and_an_age_now_and_then() {
        let (before, began) =
            (status(time::macros::datetime!(2026-11-24 08:00 UTC)), Instant::now());
        let last = (began, before.clone());
        let later = Moment::from(time::macros::datetime!(2026-11-24 09:00 UTC));
        let called = Contact { last_contact: Some(later), ..before.ca.clone() };
        let away = Contact { reachable: Some(false), ..before.ca.clone() };
        let (soon, late) = (Duration::from_secs(1), WRITE_PAUSE);
        for (name, after, status, due) in [
            ("nothing new", soon, before.clone(), false),
            ("nothing new for long", late, before.clone(), true),
            ("a call", soon, Status { ca: called.clone(), ..before.clone() }, false),
            ("a call, for long", late, Status { ca: called, ..before.clone() }, true),
            ("the CA is away", soon, Status { ca: away, ..before.clone() }, true),
            ("a standing", soon, Status { standing: "refused".into(), ..before.clone() }, true),
            ("a problem", soon, Status { problems: vec!["x".into()], ..before.clone() }, true),
        ] {
            assert_eq!(is_due(Some(&last), &status, began + after), due, "{name}");
        }
        assert!(is_due(None, &before, began), "the first");
    }
}
