//! What the daemon answers over its socket.

use raymtls_proto::{clock::Clock, identity::Role, reason::Reason, v1};
use tokio::time::Instant;

use super::{ActError, Agent};
use crate::{
    api::{Answer, Ask, ErrorKind, ExecFolder, Renewed},
    client::CallError,
    keyfolder::{FOLDERS_MAX, folder_name},
    state::{Call, IDENTITY_RENEWED_AFTER, Standing},
    statedir::issued_at,
};

/// Key folders `exec` leaves free for a key that grew too old.
const FOLDERS_KEPT_FREE: usize = 1;

impl Agent {
    pub(super) async fn answer(&mut self, ask: Ask) -> Answer {
        match ask {
            Ask::Status => Answer::Status(Box::new(self.view())),
            Ask::ExecFolder => self.exec_folder(None).await,
            Ask::Renew => self.renew_all().await,
            Ask::Leave => self.leave().await,
            // Answered beside the loop.
            Ask::TunnelHandover { .. } | Ask::TunnelStop { .. } => {
                Answer::error(ErrorKind::Failed, "asked in the wrong place")
            }
        }
    }

    /// A new key folder, or the newest valid one and why. `not_seen` is what its isolation lacks.
    pub(super) async fn exec_folder(&mut self, not_seen: Option<String>) -> Answer {
        // A leaf that still is valid would only meet closed doors, and its start hides why.
        if let Some(revoked) = self.revoked() {
            return revoked;
        }
        // Whether Ray would be protected in a mode of the future is not ours to guess.
        let mode_known = |s: &v1::Settings| v1::Mode::try_from(s.mode).is_ok();
        if self.memory.settings().is_some_and(|settings| !mode_known(settings)) {
            return Answer::error(
                ErrorKind::Failed,
                "the cluster's mode is one this release does not know: upgrade node-agent",
            );
        }
        if self.node.role == Role::Driver
            && self.memory.settings().is_some_and(|s| s.mode() == v1::Mode::Tunnel)
        {
            return Answer::error(
                ErrorKind::Failed,
                "the cluster's mode is tunnel: Ray speaks no TLS there and lets in members alone; run the \
                 driver on a member, or come through SSH",
            );
        }
        if self.with_token() && !self.tls.has_token() {
            return Answer::error(
                ErrorKind::Failed,
                "the cluster uses Ray's token and the CA has not delivered it yet: Ray is not \
                 started without it; see `node-agent status`",
            );
        }
        if self.is_tunnel() {
            return self.exec_behind_tunnel(not_seen);
        }
        let note = match self.why_no_new_folder() {
            Some(note) => Some(note),
            None => match self.new_folder().await {
                Ok(_) => None,
                Err(error) => {
                    self.failed(Some(Call::NewFolder), &error);
                    // It was this call that found it out.
                    if let Some(revoked) = self.revoked() {
                        return revoked;
                    }
                    Some(format!("no new key folder: {error}"))
                }
            },
        };
        let Some(number) = self.newest_valid(self.clock.now()) else {
            let why = note.unwrap_or_default();
            let kind = match &self.standing {
                Standing::Refused { .. } | Standing::ReenrolNeeded { .. } => ErrorKind::Refused,
                Standing::Enrolled | Standing::Left => ErrorKind::Failed,
            };
            return Answer::error(kind, format!("there is no valid leaf; {why}"));
        };
        self.look_after_start();
        let env = self.tls.env_for(number, &self.told());
        let note = note.map(|why| format!("{why}; using {}", folder_name(number)));
        let notes: Vec<String> = note.into_iter().chain(not_seen).collect();
        let note = (!notes.is_empty()).then(|| notes.join("; "));
        Answer::ExecFolder(ExecFolder { env, note })
    }

    /// Ray gets no key: the tunnel has one, and was seen to work.
    fn exec_behind_tunnel(&mut self, note: Option<String>) -> Answer {
        if let Some(why) = self.tunnel_unready() {
            return Answer::error(
                ErrorKind::Failed,
                format!("the cluster's mode is tunnel and its data path is not ready: {why}"),
            );
        }
        let env = self.tls.env_for(self.current.unwrap_or_default(), &self.told());
        Answer::ExecFolder(ExecFolder { env, note })
    }

    fn why_no_new_folder(&self) -> Option<String> {
        match &self.standing {
            Standing::Enrolled => {}
            Standing::Refused { reason, .. } | Standing::ReenrolNeeded { reason, .. } => {
                return Some(format!("no new key folder: {} ({reason})", self.standing.word()));
            }
            Standing::Left => return Some("no new key folder: the node left".to_owned()),
        }
        let pause = self.config.pauses.exec_folder;
        if self.folder_made_at.is_some_and(|at| at.elapsed() < pause) {
            return Some(format!("no new key folder: the last is less than {pause:?} old"));
        }
        if self.folders.len() >= FOLDERS_MAX - FOLDERS_KEPT_FREE {
            return Some(format!("no new key folder: there are {} already", self.folders.len()));
        }
        if self.calls_not_before.is_some_and(|at| Instant::now() < at) {
            let why = self.contact.last_error.as_deref().unwrap_or("the CA does not answer");
            return Some(format!("no new key folder: {why}"));
        }
        None
    }

    async fn renew_all(&mut self) -> Answer {
        let now = self.clock.now();
        let mut done = Renewed { identity: None, key_folders: Vec::new(), failed: Vec::new() };
        let half_old = now >= issued_at(&self.identity.facts) + IDENTITY_RENEWED_AFTER / 2;
        if half_old || self.renewal_pending {
            match self.renew_identity().await {
                Ok(change) => done.identity = Some(change),
                Err(error) => return self.answer_failed(Some(Call::RenewIdentity), &error),
            }
        }
        let live = self.folders.iter().filter(|f| f.folder.facts.not_after > now && !f.key_too_old);
        let numbers: Vec<u32> = live.map(|f| f.folder.number).collect();
        for number in numbers {
            let call = Call::RenewLeaf(number);
            match self.renew_leaf(number).await {
                Ok(change) => done.key_folders.push(change),
                Err(error @ ActError::Call(_)) if !error.is_key_too_old() => {
                    return self.answer_failed(Some(call), &error);
                }
                // One bad folder says nothing of the next.
                Err(error) => {
                    done.failed.push(format!("{}: {error}", folder_name(number)));
                    if !error.is_key_too_old() {
                        self.failed(Some(call), &error);
                    }
                }
            }
        }
        Answer::Renewed(done)
    }

    fn answer_failed(&mut self, call: Option<Call>, error: &ActError) -> Answer {
        self.failed(call, error);
        let kind = if error.is_refusal() { ErrorKind::Refused } else { ErrorKind::Failed };
        Answer::error(kind, error.to_string())
    }

    async fn leave(&mut self) -> Answer {
        self.sync.end();
        let left = match self.client() {
            Ok(client) => client.leave().await.map_err(ActError::from),
            Err(error) => Err(error),
        };
        match left {
            Ok(_) => {}
            // The reply to an earlier try was lost: what was wanted is so.
            Err(ActError::Call(CallError::Refused { reason: Some(Reason::NodeLeft), .. })) => {}
            Err(error) => return self.answer_failed(None, &error),
        }
        self.answered();
        self.stand(Standing::Left);
        let until = self.files_work_until(self.clock.now()).map_or_else(
            || "no valid leaf remains".into(),
            |at| format!("its leaf works until {at}"),
        );
        Answer::Left {
            message: format!(
                "{} left cluster {}: nothing is renewed any more; {until}; all files stay",
                self.node.node, self.node.cluster
            ),
        }
    }
}
