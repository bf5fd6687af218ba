//! What the daemon does on a revoked node: Ray is stopped beside the loop, again at each refusal, and
//! the status says what became of it. What is stopped is decided in `stopray`.

use raymtls_proto::{clock::Clock, reason::Reason};

use super::{Agent, Event};
use crate::{
    api::{Answer, ErrorKind},
    state::Standing,
    status::RayStopStatus,
    stopray::{self, Decision, Marks, Outcome},
};

/// How far it has come.
#[derive(Debug, Default)]
pub(super) struct Stopping {
    under_way: bool,
    last: Option<RayStopStatus>,
    kept_said: bool,
}

impl Agent {
    /// After a refusal. Also at a later one: somebody may have started Ray again.
    pub(super) fn stop_ray_if_revoked(&mut self) {
        match self.stop_decision() {
            Decision::NotRevoked => {}
            Decision::Kept => {
                if !std::mem::replace(&mut self.stopping.kept_said, true) {
                    tracing::warn!(
                        "this node is revoked; Ray goes on by the setting revoked-keeps-ray"
                    );
                }
            }
            Decision::Stop { .. } if self.stopping.under_way => {}
            Decision::Stop { uid } => {
                self.stopping.under_way = true;
                let marks = Marks {
                    tls_dir: self.tls.path().to_path_buf(),
                    plan: self.memory.settings().and_then(|settings| settings.port_plan),
                    ended_session: None,
                };
                let events = self.event_sender.clone();
                tokio::spawn(async move {
                    let outcome = stopray::stop(uid, marks).await;
                    let _ = events.send(Event::RayStopped(Box::new(outcome))).await;
                });
            }
        }
    }

    pub(super) fn ray_stopped(&mut self, outcome: Outcome) {
        self.stopping.under_way = false;
        let named = outcome.named.join(", ");
        if let Some(problem) = &outcome.problem {
            tracing::error!(%problem, stopped = outcome.stopped, %named, "this node is revoked, and not all of Ray is stopped");
        } else if outcome.stopped > 0 {
            tracing::error!(
                stopped = outcome.stopped, %named,
                "this node is revoked: Ray is stopped by policy (setting revoked-keeps-ray=off)"
            );
        }
        if !outcome.is_nothing() {
            self.stopping.last = Some(RayStopStatus {
                at: self.clock.now().into(),
                stopped: outcome.stopped,
                named: outcome.named,
                problem: outcome.problem,
            });
        }
    }

    /// What was done about Ray; nothing where the node is not revoked.
    pub(super) fn ray_stop_status(&self) -> Option<RayStopStatus> {
        match self.stop_decision() {
            Decision::Stop { .. } => self.stopping.last.clone(),
            Decision::NotRevoked | Decision::Kept => None,
        }
    }

    /// What `exec` is answered on a revoked node.
    pub(super) fn revoked(&self) -> Option<Answer> {
        match &self.standing {
            Standing::Refused { reason, message } if reason == Reason::Revoked.as_str() => {
                let text = format!("nothing was started: {message}");
                Some(Answer::error(ErrorKind::Refused, text))
            }
            Standing::Enrolled
            | Standing::Refused { .. }
            | Standing::ReenrolNeeded { .. }
            | Standing::Left => None,
        }
    }

    fn stop_decision(&self) -> Decision {
        let agent_uid = rustix::process::geteuid().as_raw();
        let settings = self.memory.settings();
        stopray::decide(&self.standing, settings, self.config.ray_uid, agent_uid)
    }
}
