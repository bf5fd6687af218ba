//! Sync: the report that goes to the CA, the call that waits there, and what is done with the
//! answer. Files first, the memory of the version last: a crash in between asks again.

use std::time::Duration;

use raymtls_proto::{clock::Clock, reason::Reason, v1};
use tokio::time::Instant;

use super::{ActError, Agent, Event, Task};
use crate::{
    client::{self, CallError},
    hooks::Event as HookEvent,
    rayenv::Told,
    state::{self, Call, Standing},
    statedir::Memory,
    verify,
};

/// A waiting Sync is ended early for a newer report at most this often.
const REPORT_PAUSE: Duration = Duration::from_secs(5);
/// Least time between two Syncs, whatever the first one brought.
const SYNC_PAUSE_MIN: Duration = Duration::from_millis(200);
/// Most time between two Syncs where the first one brought something or waited for it.
const SYNC_PAUSE_MAX: Duration = Duration::from_secs(1);
/// Syncs that follow an answer without a pause, in a row; a snapshot of all members has some pages.
const AT_ONCE_MAX: u32 = 20;
/// How long it takes until there is one more.
const AT_ONCE_EACH: Duration = Duration::from_secs(2);
/// So many times in a row another call takes the place of ours before it is called an agent.
const SUPERSEDED_MAX: u32 = 3;

/// The call that waits at the CA.
#[derive(Debug, Default)]
pub(super) struct Waiting {
    task: Option<Task>,
    /// Which call; an answer of another one comes too late.
    number: u64,
    started: Option<Instant>,
    /// Times in a row that another call took its place.
    superseded: u32,
    /// It was said that the CA asks for an act nobody here knows.
    unknown_act_said: bool,
    /// This call asked for everything.
    asked_all: bool,
    /// The last answer was a page of members, and more follow.
    pages_follow: bool,
    /// The CA was asked for everything and named no members: it is of an earlier release.
    no_members_told: bool,
    at_once: AtOnce,
}

/// Syncs that follow an answer without a pause: so many, and one more now and then. The CA counts the
/// Syncs of each node, and one that is refused would come late.
#[derive(Debug, Default)]
struct AtOnce {
    spent: u32,
    since: Option<Instant>,
}

impl AtOnce {
    fn take(&mut self, now: Instant) -> bool {
        let since = *self.since.get_or_insert(now);
        let earned = now.duration_since(since).as_secs() / AT_ONCE_EACH.as_secs();
        let earned = u32::try_from(earned).unwrap_or(u32::MAX);
        if earned >= self.spent {
            *self = Self { spent: 0, since: Some(now) };
        }
        let is_free = self.spent < AT_ONCE_MAX.saturating_add(earned);
        self.spent += u32::from(is_free);
        is_free
    }
}

/// When the next Sync follows an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    /// It acknowledges, or fetches the next page.
    AtOnce,
    AfterPause,
}

impl Waiting {
    pub(super) fn is_waiting(&self) -> bool {
        self.task.is_some()
    }

    /// Ends the waiting call, if there is one.
    pub(super) fn end(&mut self) {
        self.task = None;
    }

    /// The CA went away: what comes back may be another release, and what changed while it was away may
    /// be forgotten there. Whether pages were still to come, after which all are to be asked for again.
    pub(super) fn ca_went_away(&mut self) -> bool {
        self.no_members_told = false;
        std::mem::take(&mut self.pages_follow)
    }

    /// Whether somebody else keeps calling with this identity.
    pub(super) fn is_contested(&self) -> bool {
        self.superseded >= SUPERSEDED_MAX
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
            // The first contact of a trial is not waited for.
            Standing::Enrolled if self.isolation.is_on_trial() => Duration::ZERO,
            Standing::Enrolled if answers => self.config.limits.sync_wait,
            // Only asks whether the CA is there, or serves this node again.
            Standing::Enrolled
            | Standing::Refused { .. }
            | Standing::ReenrolNeeded { .. }
            | Standing::Left => Duration::ZERO,
        };
        let request = self.sync_request(wait);
        self.sync.asked_all = request.have.is_none();
        self.sync.number += 1;
        self.sync.started = Some(Instant::now());
        let (number, events) = (self.sync.number, self.event_sender.clone());
        let task = tokio::spawn(async move {
            let result = Box::new(client.sync(request).await);
            let _ = events.send(Event::Synced(number, Instant::now(), result)).await;
        });
        self.sync.task = Some(Task(task.abort_handle()));
        Ok(())
    }

    /// One Sync that does not wait, for `enroll`.
    pub(crate) async fn sync_once(&mut self) -> Result<(), ActError> {
        let request = self.sync_request(Duration::ZERO);
        let asked = self.clock.elapsed();
        self.sync.asked_all = request.have.is_none();
        let answer = self.client()?.sync(request).await?;
        self.hear_time(answer.server_time_unix, self.clock.elapsed().saturating_sub(asked));
        self.answered();
        self.apply(&answer).await.map(drop)
    }

    pub(super) async fn synced(
        &mut self,
        number: u64,
        came: Instant,
        result: Result<v1::SyncResponse, CallError>,
    ) {
        if number != self.sync.number || !self.sync.is_waiting() {
            return;
        }
        self.sync.end();
        match result {
            Ok(answer) => {
                let took = self.sync.started.map_or(Duration::ZERO, |at| came.duration_since(at));
                self.hear_time_after_wait(answer.server_time_unix, took, came.elapsed());
                self.answered();
                self.sync.superseded = 0;
                let pause = self.pause_after(&answer);
                match self.apply(&answer).await {
                    Ok(Next::AtOnce) if self.sync.at_once.take(Instant::now()) => {
                        self.held.remove(&Call::Sync);
                    }
                    Ok(Next::AtOnce | Next::AfterPause) => self.pause(Call::Sync, pause),
                    Err(error) => self.failed(Some(Call::Sync), &error),
                }
            }
            Err(CallError::Refused { reason: Some(Reason::Superseded), .. }) => self.superseded(),
            Err(error) => self.failed(Some(Call::Sync), &error.into()),
        }
    }

    fn pause_after(&self, answer: &v1::SyncResponse) -> Duration {
        let random = (SYNC_PAUSE_MAX - SYNC_PAUSE_MIN).mul_f64(rand::random());
        let news = answer.version != self.memory.version();
        let waited = self.sync.started.is_some_and(|at| at.elapsed() >= SYNC_PAUSE_MAX);
        if news || waited { SYNC_PAUSE_MIN + random } else { SYNC_PAUSE_MAX + random }
    }

    /// Once that is another call of ours, or an enrolment run again; always, it is another agent.
    fn superseded(&mut self) {
        self.answered();
        self.pause(Call::Sync, state::backoff(self.sync.superseded, rand::random()));
        self.sync.superseded = self.sync.superseded.saturating_add(1);
        if self.sync.superseded == SUPERSEDED_MAX {
            tracing::warn!("another agent uses this identity: revoke the node if it is not yours");
        }
    }

    fn sync_request(&self, wait: Duration) -> v1::SyncRequest {
        // Without the token's file the whole is wanted again, whatever version we remember.
        // And without members, where the CA knows them. A snapshot that has begun is fetched first.
        let has_token = !self.with_token() || self.tls.has_token();
        let has_members = self.memory.knows_members() || self.sync.no_members_told;
        let complete = (has_token && has_members) || self.sync.pages_follow;
        v1::SyncRequest {
            report: Some(self.report()),
            have: self.memory.version().filter(|_| complete),
            wait_seconds: u32::try_from(wait.as_secs()).unwrap_or_default(),
            heads_applied: self.heads_wanted(),
            continues: self.sync.pages_follow,
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
            isolation: Some(self.isolation_report()),
            running: self.running_report(),
            tunnel: self.tunnel_report(),
        }
    }

    /// All of it or nothing: where a step fails, the next Sync asks for the same again. The table
    /// comes first: it is what others wait for, and it needs no file.
    async fn apply(&mut self, answer: &v1::SyncResponse) -> Result<Next, ActError> {
        self.judge(answer)?;
        let mut memory = self.memory.clone();
        let was_filling = memory.is_filling();
        memory.merge(answer);
        let pages_follow = answer.members.as_ref().is_some_and(|page| page.more);
        if !pages_follow {
            memory.end_snapshot();
        }
        let news = answer.settings.is_some() || answer.blocks.is_some();
        if news || !memory.is_filling() {
            self.enforce(&memory).await;
        }
        self.heads_applied = answer.heads_applied.or(self.heads_applied);
        self.sync.no_members_told |= self.sync.asked_all && answer.members.is_none();
        let advanced = answer.version != self.memory.version();
        let before = self.memory.clone();
        self.keep_answer(answer, memory, was_filling)?;
        self.sync.pages_follow = pages_follow;
        self.note_membership(&before);
        // Somebody may wait for the word that a node is cut off, or that the table is as wanted; and where
        // a table is in force, the next answer may be whom to cut off.
        let awaited = answer.blocks.is_some() || self.isolation.in_force().is_some();
        let at_once = pages_follow || (awaited && advanced) || self.isolation.is_on_trial();
        Ok(if at_once { Next::AtOnce } else { Next::AfterPause })
    }

    fn keep_answer(
        &mut self,
        answer: &v1::SyncResponse,
        memory: Memory,
        was_filling: bool,
    ) -> Result<(), ActError> {
        if let Some(bundle) = &answer.bundle {
            self.write_bundle(bundle)?;
        }
        if let Some(token) = &answer.ray_token {
            self.apply_token(&token.token)?;
        }
        // They come when they change, so this is said once.
        for unknown in answer.settings.iter().flat_map(super::view::unknown) {
            tracing::warn!("{unknown}");
        }
        if let Some(current) = self.current {
            self.tls.put_env(current, &Told::by(memory.settings(), self.node.role))?;
        }
        let wanted_before = self.folder_wanted;
        for directive in &answer.directives {
            self.obey(directive);
        }
        if memory.control_crls() != self.memory.control_crls() {
            // The next connection is judged by the new CRL.
            self.client = None;
        }
        let same = answer.version == self.memory.version();
        let nothing_new = answer.settings.is_none() && answer.members.is_none() && !was_filling;
        if same && nothing_new && answer.directives.is_empty() {
            self.memory = memory;
            return Ok(());
        }
        // Not kept, so not obeyed: it comes again.
        self.keep(memory).inspect_err(|_| self.folder_wanted = wanted_before)
    }

    /// Nothing is written before all of it was judged.
    fn judge(&self, answer: &v1::SyncResponse) -> Result<(), ActError> {
        if let Some(bundle) = &answer.bundle {
            verify::bundle(bundle)?;
        }
        if let Some(token) = &answer.ray_token {
            verify::ray_token(&token.token)?;
        }
        if let Some(crl) = &answer.control_crl {
            client::server_verifier(&self.node.control_roots, &crl.crls_der)
                .map_err(ActError::ControlCrl)?;
        }
        Ok(())
    }

    fn apply_token(&mut self, token: &[u8]) -> Result<(), ActError> {
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
            // It comes again with each answer for as long as nobody obeys it.
            None if !std::mem::replace(&mut self.sync.unknown_act_said, true) => {
                tracing::warn!(
                    "the CA asks for an act this release does not know: skipped; upgrade node-agent"
                );
            }
            None => {}
        }
    }

    /// On the disk first, then in force. A directive not yet obeyed must come again after a crash, so
    /// the version is not kept with it.
    pub(super) fn keep(&mut self, memory: Memory) -> Result<(), ActError> {
        let mut kept = memory.clone();
        if self.folder_wanted {
            kept.forget_version();
        }
        self.state.put_memory(&kept)?;
        self.memory = memory;
        Ok(())
    }
}

/// Whether Ray's token is on; where the settings are not known yet it is, as by default.
pub(super) fn with_token(memory: &Memory) -> bool {
    memory
        .settings()
        .is_none_or(|settings| settings.ray_token || settings.mode() == v1::Mode::Tunnel)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn syncs_without_a_pause_are_counted_and_earned_again() {
        let mut budget = AtOnce::default();
        let start = Instant::now();
        let mut taken = |now: Instant| (0..100).filter(|_| budget.take(now)).count();
        let most = usize::try_from(AT_ONCE_MAX).unwrap();
        assert_eq!(taken(start), most);
        assert_eq!(taken(start + AT_ONCE_EACH * 3), 3);
        assert_eq!(taken(start + AT_ONCE_EACH * 1_000), most, "no more than at first");
    }
}
