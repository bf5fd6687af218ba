//! What follows from how a call went: when the next one may be made, what the status says of it, and
//! where the node stands. One call that fails holds back itself; a CA that is away holds back all.

use std::time::Duration;

use raymtls_proto::{
    clock::Clock,
    reason::{Reaction, Reason},
};
use tokio::time::Instant;

use super::{ActError, Agent};
use crate::{
    client::CallError,
    state::{self, BACKOFF_MAX, Call, Standing},
};

/// A call that waits by itself.
#[derive(Debug)]
pub(super) struct Held {
    /// Monotonic: a wall clock put back must not lengthen a pause.
    pub(super) until: Instant,
    failures: u32,
    /// What went wrong with it; absent where it only pauses.
    why: Option<String>,
    /// It failed because the CA was away.
    away: bool,
}

/// What a failure holds back.
enum Scope {
    /// This call alone, by the backoff and what the CA asks for besides.
    Call(Duration),
    /// This call alone: the CA says no to it, an operator must help.
    RefusedCall,
    /// Every call.
    NoCa,
    /// Every call: it is the node that is not served.
    Node(Standing),
}

impl Agent {
    /// The CA answered: whatever kept it from us is over.
    pub(super) fn answered(&mut self) {
        if self.contact.reachable == Some(false) {
            tracing::info!("the CA answers again");
        }
        self.isolation_heard();
        self.failures = 0;
        self.calls_not_before = None;
        self.held.retain(|_, held| !held.away);
        self.contact.reachable = Some(true);
        self.contact.last_contact = Some(self.clock.now().into());
        self.contact.last_error = None;
        self.contact.next_try = None;
        match &self.standing {
            Standing::Refused { .. } | Standing::ReenrolNeeded { .. } => {
                self.stand(Standing::Enrolled);
            }
            Standing::Enrolled | Standing::Left => {}
        }
    }

    /// Nothing is wrong; the call just leaves the CA alone for a moment.
    pub(super) fn pause(&mut self, call: Call, pause: Duration) {
        let until = Instant::now() + pause;
        self.held.insert(call, Held { until, failures: 0, why: None, away: false });
    }

    /// Decides what is held back and until when. `leave` is no call the loop makes by itself.
    pub(super) fn failed(&mut self, call: Option<Call>, error: &ActError) {
        if let ActError::Call(answer) = error {
            let refused = matches!(answer, CallError::Refused { .. });
            self.contact.reachable = Some(refused);
            if refused {
                self.isolation_heard();
            } else if self.sync.ca_went_away() {
                self.memory.forget_version();
            }
        }
        match scope(error) {
            Scope::Call(besides) => {
                let wait = besides + state::backoff(self.failures_of(call), rand::random());
                self.hold_back(call, wait, error);
            }
            Scope::RefusedCall => {
                let wait = state::spread(self.config.pauses.refused, rand::random());
                self.hold_back(call, wait, error);
            }
            Scope::NoCa => self.no_ca(call, error),
            Scope::Node(standing) => self.not_served(standing, error),
        }
    }

    fn failures_of(&self, call: Option<Call>) -> u32 {
        call.and_then(|call| self.held.get(&call)).map_or(0, |held| held.failures)
    }

    fn hold_back(&mut self, call: Option<Call>, wait: Duration, error: &ActError) {
        let Some(call) = call else { return };
        tracing::warn!(what = %call, %error, retry_in = ?wait, "not done");
        let failures = self.failures_of(Some(call)).saturating_add(1);
        let (until, why) = (Instant::now() + wait, Some(error.to_string()));
        self.held.insert(call, Held { until, failures, why, away: false });
    }

    fn no_ca(&mut self, call: Option<Call>, error: &ActError) {
        let now = self.clock.now();
        let facts = self.look(now);
        let wait = state::away_backoff(now, &facts, self.failures, rand::random());
        self.failures = self.failures.saturating_add(1);
        self.hold_all_back(wait, error);
        tracing::warn!(%error, retry_in = ?wait, "no answer from the CA");
        // Another call has its turn first: one that never gets an answer must not starve the rest.
        if let Some(call) = call {
            let failures = self.failures_of(Some(call));
            // From what is left after the first wait: both together end before the certificate does.
            let then = state::after(now, wait);
            let besides = state::away_backoff(then, &facts, failures, rand::random());
            let until = Instant::now() + wait + besides;
            let failures = failures.saturating_add(1);
            self.held.insert(call, Held { until, failures, why: None, away: true });
        }
    }

    fn not_served(&mut self, standing: Standing, error: &ActError) {
        let pause = match &standing {
            Standing::ReenrolNeeded { .. } => self.config.pauses.reenrol,
            Standing::Enrolled | Standing::Refused { .. } | Standing::Left => {
                self.config.pauses.refused
            }
        };
        self.sync.end();
        self.hold_all_back(state::spread(pause, rand::random()), error);
        // A node that left by command knows why it is not served.
        if self.standing != Standing::Left {
            self.stand(standing);
        }
        self.stop_ray_if_revoked();
    }

    fn hold_all_back(&mut self, wait: Duration, error: &ActError) {
        self.calls_not_before = Some(Instant::now() + wait);
        self.contact.last_error = Some(error.to_string());
        self.contact.next_try = Some(state::after(self.clock.now(), wait).into());
    }

    /// What does not succeed, for the status. What is no longer tried is forgotten.
    pub(super) fn not_done(&self) -> Vec<String> {
        let tried = |held: &Held| Instant::now() < held.until + BACKOFF_MAX;
        let mut all: Vec<String> = self
            .held
            .iter()
            .filter(|(_, held)| tried(held))
            .filter_map(|(call, held)| Some(format!("{call}: {}", held.why.as_ref()?)))
            .collect();
        all.sort();
        all
    }

    pub(super) fn stand(&mut self, standing: Standing) {
        let changed = self.standing.word() != standing.word();
        self.standing = standing;
        if changed {
            self.log_standing();
        }
    }

    fn log_standing(&self) {
        let until = self.files_work_until(self.clock.now());
        let until = until.map_or_else(|| "already over".to_owned(), |at| at.to_string());
        match &self.standing {
            Standing::Refused { reason, message, .. } => tracing::error!(
                %reason, why = %message, files_work_until = %until,
                "the CA refuses this node: nothing is renewed, no file is removed"
            ),
            Standing::ReenrolNeeded { reason, message } => tracing::error!(
                %reason, why = %message, files_work_until = %until,
                "re-enrol needed: stop the agent and run `node-agent enroll` with a new join file"
            ),
            Standing::Enrolled => tracing::info!("the CA serves this node again"),
            Standing::Left => tracing::info!("the node left its cluster"),
        }
    }
}

fn scope(error: &ActError) -> Scope {
    let ActError::Call(call) = error else { return Scope::Call(Duration::ZERO) };
    let CallError::Refused { reason, retry_after, .. } = call else { return Scope::NoCa };
    let (reason_word, message) = (call.word().to_owned(), error.to_string());
    match call.reaction() {
        // What the CA asks for, spread so that not all come back at once.
        Reaction::Retry | Reaction::NewKeyFolder => Scope::Call(retry_after.unwrap_or_default()),
        Reaction::Reenrol => Scope::Node(Standing::ReenrolNeeded { reason: reason_word, message }),
        Reaction::Stop if is_about_the_node(*reason) => {
            Scope::Node(Standing::Refused { reason: reason_word, message })
        }
        Reaction::Stop => Scope::RefusedCall,
    }
}

/// Whether no other call would be served either.
fn is_about_the_node(reason: Option<Reason>) -> bool {
    matches!(reason, Some(Reason::Revoked | Reason::ClusterEnded | Reason::AddressBlocked))
}
