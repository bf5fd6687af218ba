//! Sync: the report that goes to the CA, the call that waits there, and what is done with the
//! answer. Files first, the memory of the version last: a crash in between asks again.

use std::time::Duration;

use raymtls_proto::{reason::Reason, v1};
use tokio::time::Instant;

use super::{ActError, Agent, Event, SYNC_PAUSE, Task};
use crate::{client::CallError, hooks::Event as HookEvent, state::Standing, verify};

/// A waiting Sync is ended early for a newer report at most this often.
const REPORT_PAUSE: Duration = Duration::from_secs(5);

/// The call that waits at the CA.
#[derive(Debug, Default)]
pub(super) struct Waiting {
    task: Option<Task>,
    /// Which call; an answer of another one comes too late.
    number: u64,
    started: Option<Instant>,
    pub(super) not_before: Option<Instant>,
}

impl Waiting {
    pub(super) fn is_waiting(&self) -> bool {
        self.task.is_some()
    }

    /// Ends the waiting call, if there is one.
    pub(super) fn end(&mut self) {
        self.task = None;
    }

    /// What the node holds has changed: the CA hears of it soon.
    pub(super) fn report_soon(&mut self) {
        if self.started.is_none_or(|started| started.elapsed() >= REPORT_PAUSE) {
            self.end();
        }
    }
}

impl Agent {
    pub(super) fn start_sync(&mut self) -> Result<(), ActError> {
        let client = self.client()?;
        let answers = self.contact.reachable == Some(true);
        let wait = match self.standing {
            Standing::Enrolled if answers => self.config.limits.sync_wait,
            // Only asks whether the CA is there, or serves this node again.
            Standing::Enrolled
            | Standing::Refused { .. }
            | Standing::ReenrolNeeded { .. }
            | Standing::Left => Duration::ZERO,
        };
        let request = self.sync_request(wait);
        self.sync.number += 1;
        self.sync.started = Some(Instant::now());
        let (number, events) = (self.sync.number, self.event_sender.clone());
        let task = tokio::spawn(async move {
            let result = Box::new(client.sync(request).await);
            let _ = events.send(Event::Synced(number, result)).await;
        });
        self.sync.task = Some(Task(task.abort_handle()));
        Ok(())
    }

    /// One Sync that does not wait, for `enroll`.
    pub(crate) async fn sync_once(&mut self) -> Result<(), ActError> {
        let request = self.sync_request(Duration::ZERO);
        let answer = self.client()?.sync(request).await?;
        self.succeeded();
        self.apply(&answer)
    }

    pub(super) fn synced(&mut self, number: u64, result: Result<v1::SyncResponse, CallError>) {
        if number != self.sync.number || !self.sync.is_waiting() {
            return;
        }
        self.sync.end();
        match result {
            Ok(answer) => {
                let news = answer.version != self.memory.version();
                let waited =
                    self.sync.started.is_some_and(|started| started.elapsed() >= SYNC_PAUSE);
                self.sync.not_before = (!news && !waited).then(|| Instant::now() + SYNC_PAUSE);
                self.succeeded();
                if let Err(error) = self.apply(&answer) {
                    self.failed(&error);
                }
            }
            // Another call of ours took its place.
            Err(CallError::Refused { reason: Some(Reason::Superseded), .. }) => {
                self.sync.not_before = Some(Instant::now() + SYNC_PAUSE);
            }
            Err(error) => self.failed(&error.into()),
        }
    }

    fn sync_request(&self, wait: Duration) -> v1::SyncRequest {
        // Without the token's file the whole is wanted again, whatever version we remember.
        let complete = !self.with_token() || self.tls.has_token();
        v1::SyncRequest {
            report: Some(self.report()),
            have: self.memory.version().filter(|_| complete),
            wait_seconds: u32::try_from(wait.as_secs()).unwrap_or_default(),
        }
    }

    fn report(&self) -> v1::Report {
        let folder = |f: &super::AgentFolder| v1::KeyFolder {
            name: f.folder.name(),
            serial: f.folder.facts.serial.as_bytes().to_vec(),
            not_after_unix: f.folder.facts.not_after.unix_timestamp(),
            current: Some(f.folder.number) == self.current,
        };
        v1::Report {
            received: self.memory.version(),
            applied: self.applied(),
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            key_folders: self.folders.iter().map(folder).collect(),
            node_time_unix: self.clock.now().unix_timestamp(),
        }
    }

    /// With isolation off there is nothing to load: what was received is applied.
    pub(super) fn applied(&self) -> Option<v1::SyncVersion> {
        let settings = self.memory.settings()?;
        let off = settings.isolation() == v1::Isolation::Off;
        self.memory.version().filter(|_| off)
    }

    fn apply(&mut self, answer: &v1::SyncResponse) -> Result<(), ActError> {
        if let Some(bundle) = &answer.bundle {
            verify::bundle(bundle)?;
            self.write_bundle(bundle)?;
        }
        if let Some(token) = &answer.ray_token {
            self.apply_token(&token.token)?;
        }
        if let Some(crl) = &answer.control_crl {
            verify::crls(&crl.crls_der)?;
            if crl.crls_der != self.memory.control_crls() {
                // The next connection is judged by the new CRL.
                self.client = None;
            }
        }
        let changed = answer.version != self.memory.version();
        self.memory.merge(answer);
        if let Some(current) = self.current {
            self.tls.put_env(current, self.with_token())?;
        }
        for directive in &answer.directives {
            self.obey(directive);
        }
        if changed || answer.settings.is_some() {
            self.remember()?;
        }
        Ok(())
    }

    fn apply_token(&mut self, token: &[u8]) -> Result<(), ActError> {
        verify::ray_token(token)?;
        if self.tls.put_token(token)? {
            tracing::info!("Ray's token written");
            self.hooks.tell(HookEvent::RayTokenChanged, self.tls.path());
        }
        Ok(())
    }

    fn obey(&mut self, directive: &v1::Directive) {
        match &directive.act {
            Some(v1::directive::Act::NewKeyFolder(act)) => {
                tracing::info!(reason = %act.reason, "the CA asks for a new key folder");
                self.folder_wanted = true;
            }
            None => tracing::warn!("the CA asks for an act this release does not know: skipped"),
        }
    }

    /// A directive not yet obeyed must come again after a crash, so the version is not kept with it.
    fn remember(&self) -> Result<(), ActError> {
        let mut memory = self.memory.clone();
        if self.folder_wanted {
            memory.forget_version();
        }
        Ok(self.state.put_memory(&memory)?)
    }
}
