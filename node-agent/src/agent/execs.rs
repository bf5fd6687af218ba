//! Who asks for Ray's files while the cluster enforces isolation waits until Ray could work: until the
//! table is loaded here, and the heads have this node in theirs. It waits beside the loop, for a bounded
//! time; Sync never waits for it.

use std::time::Duration;

use raymtls_proto::{identity::Role, v1};
use tokio::{sync::oneshot, time::Instant};

use super::Agent;
use crate::api::{Answer, ErrorKind};

/// Somebody who asked for Ray's files.
#[derive(Debug)]
pub(super) struct Asker {
    reply: oneshot::Sender<Answer>,
    until: Instant,
}

/// What an asker's turn depends on.
#[derive(Clone, Copy, Debug)]
struct Facts {
    enforces: bool,
    is_loaded: bool,
    /// Mode tunnel, and the data path is not there yet.
    lacks_tunnel: bool,
    is_head: bool,
    /// The version at which this node saw itself as a member.
    seen: Option<v1::SyncVersion>,
    /// What all live heads have applied.
    heads: Option<v1::SyncVersion>,
}

/// What is not so yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Missing {
    Table,
    Tunnel,
    Membership,
    Heads,
}

fn missing(facts: &Facts) -> Option<Missing> {
    if !facts.enforces {
        return None;
    }
    if !facts.is_loaded {
        return Some(Missing::Table);
    }
    if facts.lacks_tunnel {
        return Some(Missing::Tunnel);
    }
    if facts.is_head {
        return None;
    }
    let Some(seen) = facts.seen else { return Some(Missing::Membership) };
    (!has_reached(facts.heads, seen)).then_some(Missing::Heads)
}

/// Whether a version is this one, or a later one of the same history.
fn has_reached(version: Option<v1::SyncVersion>, wanted: v1::SyncVersion) -> bool {
    version.is_some_and(|at| at.epoch == wanted.epoch && at.counter >= wanted.counter)
}

impl Agent {
    pub(super) fn asked_for_files(&mut self, reply: oneshot::Sender<Answer>) {
        // Nothing it could wait for helps.
        if let Some(revoked) = self.revoked() {
            let _ = reply.send(revoked);
            return;
        }
        let until = Instant::now() + self.config.isolation.exec_wait;
        self.askers.push(Asker { reply, until });
    }

    /// Answers whose turn has come.
    pub(super) async fn answer_askers(&mut self) {
        while let Some((asker, missing)) = self.next_asker() {
            if asker.reply.is_closed() {
                continue;
            }
            let answer = match missing {
                None => self.exec_folder(None).await,
                Some(Missing::Table) => self.no_table(),
                Some(Missing::Tunnel) => self.no_tunnel(),
                Some(missing @ (Missing::Membership | Missing::Heads)) => {
                    let note = self.not_seen(missing);
                    self.exec_folder(Some(note)).await
                }
            };
            self.publish();
            let _ = asker.reply.send(answer);
        }
    }

    /// How long the loop may sleep for the askers' sake.
    pub(super) fn askers_wait(&self) -> Option<Duration> {
        let left = |asker: &Asker| asker.until.saturating_duration_since(Instant::now());
        self.askers.iter().map(left).min()
    }

    /// The heads' version that matters: Sync asks the CA for it for as long as it is not reached.
    pub(super) fn heads_wanted(&self) -> Option<v1::SyncVersion> {
        let facts = self.asker_facts();
        let wanted = facts.seen.filter(|_| facts.enforces && !facts.is_head)?;
        (!has_reached(facts.heads, wanted)).then_some(wanted)
    }

    fn next_asker(&mut self) -> Option<(Asker, Option<Missing>)> {
        let missing = missing(&self.asker_facts());
        let turn = |asker: &Asker| missing.is_none() || Instant::now() >= asker.until;
        let next = self.askers.iter().position(turn)?;
        Some((self.askers.remove(next), missing))
    }

    fn asker_facts(&self) -> Facts {
        let isolation = self.memory.settings().map(v1::Settings::isolation);
        Facts {
            enforces: isolation == Some(v1::Isolation::Enforce),
            is_loaded: self.isolation.in_force().is_some(),
            lacks_tunnel: self.is_tunnel() && self.tunnel_unready().is_some(),
            is_head: self.node.role == Role::Head,
            seen: self.seen_at,
            heads: self.heads_applied,
        }
    }

    fn no_table(&self) -> Answer {
        let why = self.isolation_status().problem;
        let why = why.map(|why| format!(" ({why})")).unwrap_or_default();
        Answer::error(
            ErrorKind::Failed,
            format!(
                "the cluster enforces isolation and its table is not loaded on this host{why}: Ray is \
                 not started; see `node-agent status`"
            ),
        )
    }

    fn no_tunnel(&self) -> Answer {
        let waited = self.config.isolation.exec_wait;
        let why = self.tunnel_unready().unwrap_or_else(|| "it is ready now, ask again".to_owned());
        Answer::error(
            ErrorKind::Failed,
            format!(
                "the cluster's mode is tunnel and its data path is not ready after {waited:?}: {why}; Ray is \
                 not started, because it would speak plaintext; see `node-agent status`"
            ),
        )
    }

    fn not_seen(&self, missing: Missing) -> String {
        let waited = self.config.isolation.exec_wait;
        let what = match missing {
            Missing::Membership => "the CA does not list this node as a member",
            Missing::Table | Missing::Tunnel | Missing::Heads => {
                "the CA does not say that each head has this node in its table"
            }
        };
        format!("{what}, after {waited:?}: a head may refuse Ray's connections for a while")
    }

    /// From which version on this node's peers know it as a member.
    pub(super) fn note_membership(&mut self, before: &crate::statedir::Memory) {
        let name = self.node.node.as_str();
        let (was, is) = (before.member(name), self.memory.member(name));
        let version = self.memory.version();
        self.seen_at = match (is, self.seen_at, version) {
            (None, _, _) => None,
            (Some(_), Some(seen), Some(now)) if was == is && seen.epoch == now.epoch => Some(seen),
            (Some(_), _, now) => now,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn version(epoch: u64, counter: u64) -> Option<v1::SyncVersion> {
        Some(v1::SyncVersion { epoch, counter })
    }

    #[test]
    fn ray_starts_when_table_membership_and_heads_are_there() {
        let good = Facts {
            enforces: true,
            is_loaded: true,
            lacks_tunnel: false,
            is_head: false,
            seen: version(1, 5),
            heads: version(1, 5),
        };
        for (name, facts, wanted) in [
            ("all there", good, None),
            ("nothing is enforced", Facts { enforces: false, is_loaded: false, ..good }, None),
            ("no tunnel", Facts { lacks_tunnel: true, ..good }, Some(Missing::Tunnel)),
            (
                "no tunnel on a head",
                Facts { lacks_tunnel: true, is_head: true, ..good },
                Some(Missing::Tunnel),
            ),
            (
                "rules come before the tunnel",
                Facts { lacks_tunnel: true, is_loaded: false, ..good },
                Some(Missing::Table),
            ),
            ("no table", Facts { is_loaded: false, ..good }, Some(Missing::Table)),
            (
                "no table on a head",
                Facts { is_loaded: false, is_head: true, ..good },
                Some(Missing::Table),
            ),
            (
                "a head waits for no head",
                Facts { is_head: true, heads: None, seen: None, ..good },
                None,
            ),
            ("no member", Facts { seen: None, ..good }, Some(Missing::Membership)),
            ("no head has said", Facts { heads: None, ..good }, Some(Missing::Heads)),
            ("a head is behind", Facts { heads: version(1, 4), ..good }, Some(Missing::Heads)),
            ("another history", Facts { heads: version(2, 9), ..good }, Some(Missing::Heads)),
            ("heads are ahead", Facts { heads: version(1, 6), ..good }, None),
        ] {
            assert_eq!(missing(&facts), wanted, "{name}");
        }
    }
}
