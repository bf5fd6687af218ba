//! What to do next: a function of the facts and of now. No file, no clock, no chance: jitter comes
//! from the random part of a certificate's own serial, so it is drawn once per certificate, and
//! backoff takes its random number as an argument.

use std::{fmt, time::Duration};

use raymtls_proto::serial::Serial;
use time::OffsetDateTime;

use crate::keyfolder::FOLDERS_MAX;

/// How long after its issue an identity is renewed, at the latest.
pub const IDENTITY_RENEWED_AFTER: Duration = Duration::from_secs(24 * 3_600);
/// A leaf is renewed when this part of its life (counted from issue) has passed, at the latest.
pub const LEAF_RENEWED_AFTER_PART: u32 = 3;
/// A leaf is renewed later where its next one would not be valid here for more than this part of a life.
const POSTPONED_FROM_PART: i32 = 10;
/// Jitter moves a renewal earlier by up to this part of the time until it.
pub const JITTER_PART: u32 = 10;
/// A leaf that ends sooner by the host's clock than by the CA's is renewed sooner by up to this part.
const WORTH_MIN: f64 = 0.1;
/// So far before its issue a certificate is valid.
const BACKDATED: Duration = Duration::from_secs(600);
/// First bound of the backoff.
pub const BACKOFF_MIN: Duration = Duration::from_secs(1);
/// Largest bound of the backoff.
pub const BACKOFF_MAX: Duration = Duration::from_secs(60);
/// Largest bound of the backoff while the CA gives no answer: 1,000 agents that come back to it then
/// come over three minutes.
pub const AWAY_BACKOFF_MAX: Duration = Duration::from_secs(180);
/// While the CA gives no answer, a certificate that ends is tried again before this part of what is
/// left of it has passed: two thirds.
const AWAY_PART_OF_LEFT: f64 = 2.0 / 3.0;
/// No retry comes sooner than this, whatever the dice say.
const BACKOFF_FLOOR: Duration = Duration::from_millis(200);
/// Longest sleep without a look at the facts.
const WAIT_MAX: Duration = Duration::from_secs(3_600);

/// How long what is not a matter of seconds waits before it is tried again, each spread.
#[derive(Clone, Copy, Debug)]
pub struct Pauses {
    /// After the CA refused this node, or one act of it: an operator may have put it right.
    pub refused: Duration,
    /// After the identity proved to be worth nothing: seldom put right without an enrolment.
    pub reenrol: Duration,
    /// Between two new key folders for `exec`.
    pub exec_folder: Duration,
}

impl Default for Pauses {
    fn default() -> Self {
        Self {
            refused: Duration::from_secs(60),
            reenrol: Duration::from_secs(600),
            exec_folder: Duration::from_secs(10),
        }
    }
}

/// Where this node stands with the CA.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Its identity is good.
    Enrolled,
    /// The CA says no, and an operator must do something: nothing is renewed, nothing deleted.
    Refused {
        /// The reason word.
        reason: String,
        /// The CA's sentence.
        message: String,
    },
    /// The identity is worth nothing any more.
    ReenrolNeeded {
        /// The reason word.
        reason: String,
        /// What happened.
        message: String,
    },
    /// It left the cluster on command.
    Left,
}

impl Standing {
    /// The word in status and logs.
    #[must_use]
    pub fn word(&self) -> &'static str {
        match self {
            Self::Enrolled => "enrolled",
            Self::Refused { .. } => "refused",
            Self::ReenrolNeeded { .. } => "re-enrol needed",
            Self::Left => "left",
        }
    }
}

/// When a certificate was issued, ends, and is to be renewed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Life {
    /// When the CA issued it; notBefore lies further back.
    pub issued: OffsetDateTime,
    /// Its last moment.
    pub not_after: OffsetDateTime,
    /// When the next one is fetched.
    pub renew_at: OffsetDateTime,
}

impl Life {
    /// The life of an agent identity.
    #[must_use]
    pub fn of_identity(serial: Serial, issued: OffsetDateTime, not_after: OffsetDateTime) -> Self {
        // A shorter life than planned still leaves time for many tries.
        let part = part_of(issued, not_after, LEAF_RENEWED_AFTER_PART);
        Self::renewed_after(serial, issued, not_after, part.min(IDENTITY_RENEWED_AFTER))
    }

    /// The life of a Ray leaf.
    #[must_use]
    pub fn of_leaf(serial: Serial, issued: OffsetDateTime, not_after: OffsetDateTime) -> Self {
        let part = part_of(issued, not_after, LEAF_RENEWED_AFTER_PART);
        Self::renewed_after(serial, issued, not_after, part)
    }

    fn renewed_after(
        serial: Serial,
        issued: OffsetDateTime,
        not_after: OffsetDateTime,
        after: Duration,
    ) -> Self {
        let after = after - jitter(serial, after / JITTER_PART);
        let renew_at =
            issued.checked_add(after.try_into().unwrap_or_default()).unwrap_or(not_after);
        Self { issued, not_after, renew_at }
    }

    /// Whether it is no longer valid.
    #[must_use]
    pub fn is_over(&self, now: OffsetDateTime) -> bool {
        now >= self.not_after
    }

    /// Whether it is valid already: the clock of the CA that made it may have stood ahead.
    pub(crate) fn has_begun(&self, now: OffsetDateTime) -> bool {
        self.issued.saturating_sub(BACKDATED.try_into().unwrap_or_default()) <= now
    }

    /// Whether the next one is fetched, where `now` is the CA's clock and the host has its own.
    fn is_due(&self, now: OffsetDateTime, host_now: OffsetDateTime) -> bool {
        let life = self.not_after - self.issued;
        // How much of a new leaf's life has passed already by the host's clock.
        let lost = (host_now - now).max(time::Duration::ZERO);
        let lasts = lost < life;
        if !self.has_begun(now) {
            // The CA dated it ahead, or stepped back since. A leaf that is over on arrival takes the
            // place of none that serves.
            return lasts || self.is_over(host_now);
        }
        now >= self.renewed_from(now, host_now, if lasts { lost } else { time::Duration::ZERO })
    }

    /// By the CA's clock. A host whose clock is so far behind that a new leaf is not valid to it keeps
    /// one that is valid by both clocks for longer, but not to the end. To a host that is ahead (or
    /// whose CA stepped back) a leaf ends sooner: renewed the sooner, after the same part of what it
    /// is worth there, and never more than ten times as often.
    fn renewed_from(
        &self,
        now: OffsetDateTime,
        host_now: OffsetDateTime,
        lost: time::Duration,
    ) -> OffsetDateTime {
        let life = self.not_after - self.issued;
        // To postpone costs those who start something late in the leaf's life; it is worth it only
        // where the new one would be of no use for a real part of its life.
        let useless = now - host_now - BACKDATED;
        if useless > life / POSTPONED_FROM_PART && self.has_begun(host_now) {
            let part = part_of(self.issued, self.not_after, LEAF_RENEWED_AFTER_PART);
            return self.not_after - part;
        }
        if lost.is_zero() {
            return self.renew_at;
        }
        let worth = (1.0 - lost.as_seconds_f64() / life.as_seconds_f64()).clamp(WORTH_MIN, 1.0);
        self.issued.saturating_add((self.renew_at - self.issued) * worth)
    }

    /// One more life after its end: nobody waits for the next certificate of this key any more.
    fn forgotten_at(&self) -> Option<OffsetDateTime> {
        self.not_after.checked_add(self.not_after - self.issued)
    }
}

/// One key folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FolderFacts {
    /// N of `k<N>`.
    pub number: u32,
    /// Life of its leaf.
    pub life: Life,
    /// The CA renews its key no more (KEY_TOO_OLD).
    pub key_too_old: bool,
    /// How long this agent has had its leaf, by time that passes and no clock.
    pub held_for: Duration,
}

/// What is asked of the CA. Each waits by itself after it failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Call {
    /// Fetch the next identity.
    RenewIdentity,
    /// Make a key folder and point `current` at it.
    NewFolder,
    /// Fetch the next leaf for the key of a folder.
    RenewLeaf(u32),
    /// Report, and wait at the CA for what changes.
    Sync,
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::RenewIdentity => f.write_str("renewal of the identity"),
            Self::NewFolder => f.write_str("a new key folder"),
            Self::RenewLeaf(number) => write!(f, "renewal of k{number}"),
            Self::Sync => f.write_str("Sync"),
        }
    }
}

/// All that the decision depends on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// Where the node stands.
    pub standing: Standing,
    /// Life of its identity.
    pub identity: Life,
    /// A key was made for the next identity and waits for its certificate.
    pub renewal_pending: bool,
    /// The key folders.
    pub folders: Vec<FolderFacts>,
    /// The folder `current` points to.
    pub current: Option<u32>,
    /// The folder `ray.env` names.
    pub env_names: Option<u32>,
    /// A new key folder was asked for.
    pub folder_wanted: bool,
    /// The CA's clock, as it was heard last and has gone on since; absent before the first answer.
    pub ca_now: Option<OffsetDateTime>,
    /// The host's own clock.
    pub host_now: OffsetDateTime,
    /// A Sync waits at the CA.
    pub sync_waiting: bool,
    /// No call at all before this moment: the CA is away, or does not serve this node.
    pub calls_not_before: Option<OffsetDateTime>,
    /// These calls not before these moments.
    pub held: Vec<(Call, OffsetDateTime)>,
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// The identity ended: an operator must enrol the node again.
    IdentityOver,
    /// Delete a key folder that nobody can use any more.
    RemoveFolder(u32),
    /// Ask the CA.
    Call(Call),
    /// Nothing until then.
    Wait(OffsetDateTime),
}

/// Decides. What works without the CA comes first, then what ends first; a call that is held back
/// holds back no other.
#[must_use]
pub fn next_action(now: OffsetDateTime, facts: &Facts) -> Action {
    if let Some(folder) = facts.folders.iter().find(|folder| is_disposable(now, facts, folder)) {
        return Action::RemoveFolder(folder.number);
    }
    // By both clocks: one of them may be put right.
    let is_over = facts.identity.is_over(now.min(facts.host_now));
    let due = match &facts.standing {
        Standing::Left => Vec::new(),
        Standing::ReenrolNeeded { .. } if is_over => Vec::new(),
        Standing::Enrolled | Standing::Refused { .. } if is_over => return Action::IdentityOver,
        // Whether the CA serves this node again is asked with what changes nothing.
        Standing::Refused { .. } | Standing::ReenrolNeeded { .. } => due_sync(facts).collect(),
        Standing::Enrolled => due_calls(now, facts),
    };
    let mut retries = Vec::new();
    for call in due {
        match facts.not_before(call).filter(|at| now < *at) {
            None => return Action::Call(call),
            Some(at) => retries.push(at),
        }
    }
    Action::Wait(wake(now, facts, &retries))
}

impl Facts {
    fn not_before(&self, call: Call) -> Option<OffsetDateTime> {
        let own = self.held.iter().filter(|(held, _)| *held == call).map(|(_, at)| *at);
        own.chain(self.calls_not_before).max()
    }
}

/// What ends first comes first; what nothing ends without comes last.
fn due_calls(now: OffsetDateTime, facts: &Facts) -> Vec<Call> {
    let leaves = facts.folders.iter().filter(|folder| is_due(now, facts.host_now, folder));
    let mut due: Vec<_> =
        leaves.map(|leaf| (leaf.life.not_after, Call::RenewLeaf(leaf.number))).collect();
    if facts.renewal_pending || now >= facts.identity.renew_at {
        due.push((facts.identity.not_after, Call::RenewIdentity));
    }
    let room = facts.folders.len() < FOLDERS_MAX;
    let needed = folder_needed_at(now, facts);
    due.extend(needed.filter(|_| room).map(|at| (at, Call::NewFolder)));
    due.sort_by_key(|(ends, _)| *ends);
    let wished = facts.folder_wanted && needed.is_none() && room;
    let wished = wished.then_some(Call::NewFolder);
    due.into_iter().map(|(_, call)| call).chain(wished).chain(due_sync(facts)).collect()
}

fn due_sync(facts: &Facts) -> impl Iterator<Item = Call> {
    (!facts.sync_waiting).then_some(Call::Sync).into_iter()
}

fn is_due(now: OffsetDateTime, host_now: OffsetDateTime, folder: &FolderFacts) -> bool {
    let life = &folder.life;
    !folder.key_too_old && !life.is_over(now) && life.is_due(now, host_now)
}

/// From when on what starts finds no valid leaf, where the current folder cannot help it.
fn folder_needed_at(now: OffsetDateTime, facts: &Facts) -> Option<OffsetDateTime> {
    let current = facts.folders.iter().find(|folder| Some(folder.number) == facts.current);
    let Some(current) = current else { return Some(now) };
    let life = current.life;
    (life.is_over(now) || current.key_too_old).then_some(life.not_after)
}

/// Not `current`, not in `ray.env`, and long over by two witnesses, as any clock may have jumped: the
/// CA's clock, and the host's or the time that passed while the leaf was held. Where a folder is needed
/// and there is no room, over is enough.
fn is_disposable(now: OffsetDateTime, facts: &Facts, folder: &FolderFacts) -> bool {
    let Some(ca_now) = facts.ca_now.filter(|_| facts.standing == Standing::Enrolled) else {
        return false;
    };
    let number = Some(folder.number);
    let crowded = facts.folders.len() >= FOLDERS_MAX && folder_needed_at(now, facts).is_some();
    let life = folder.life;
    let whole = Duration::try_from(life.not_after - life.issued).unwrap_or_default();
    let (from, held) = if crowded {
        (Some(life.not_after), whole)
    } else {
        (life.forgotten_at(), whole.saturating_mul(2))
    };
    let by_ca = from.is_some_and(|from| now.min(ca_now) >= from);
    let by_host = from.is_some_and(|from| facts.host_now >= from) || folder.held_for >= held;
    number != facts.current && number != facts.env_names && by_ca && by_host
}

/// The next moment at which the answer may be another one.
fn wake(now: OffsetDateTime, facts: &Facts, retries: &[OffsetDateTime]) -> OffsetDateTime {
    let lives = facts.folders.iter().map(|folder| folder.life).chain([facts.identity]);
    lives
        .flat_map(|life| [Some(life.renew_at), Some(life.not_after), life.forgotten_at()])
        .flatten()
        .chain(retries.iter().copied())
        .filter(|moment| *moment > now)
        .fold(after(now, WAIT_MAX), OffsetDateTime::min)
}

/// So long after a moment; the calendar ends with the year 9999.
pub(crate) fn after(moment: OffsetDateTime, wait: Duration) -> OffsetDateTime {
    moment.saturating_add(wait.try_into().unwrap_or(time::Duration::MAX))
}

/// Bound of the `attempt`-th retry (from 0), doubled each time; the wait is a random part of it
/// (full jitter), so that a fleet that lost its CA does not come back as one herd.
#[must_use]
pub fn backoff(attempt: u32, random: f64) -> Duration {
    full_jitter(attempt, BACKOFF_MAX, random)
}

/// The same while the CA gives no answer. The bound grows further, because by then the whole fleet
/// waits, and never so far that the first certificate to end could end within one wait.
#[must_use]
pub fn away_backoff(now: OffsetDateTime, facts: &Facts, attempt: u32, random: f64) -> Duration {
    let left = |life: Life| Duration::try_from(life.not_after - now).unwrap_or_default();
    let renewed = facts.folders.iter().filter(|folder| !folder.key_too_old).map(|f| f.life);
    let first_end =
        renewed.chain([facts.identity]).filter(|life| !life.is_over(now)).map(left).min();
    let bound = first_end
        .map_or(AWAY_BACKOFF_MAX, |left| left.mul_f64(AWAY_PART_OF_LEFT))
        .clamp(BACKOFF_MIN, AWAY_BACKOFF_MAX);
    full_jitter(attempt, bound, random)
}

fn full_jitter(attempt: u32, bound_max: Duration, random: f64) -> Duration {
    let bound = BACKOFF_MIN.saturating_mul(1 << attempt.min(16)).min(bound_max);
    bound.mul_f64(random.clamp(0.0, 1.0)).max(BACKOFF_FLOOR)
}

/// About as long, so that a fleet that was told the same thing does not come back as one herd.
#[must_use]
pub fn spread(about: Duration, random: f64) -> Duration {
    about.mul_f64(0.8 + 0.4 * random.clamp(0.0, 1.0))
}

fn part_of(issued: OffsetDateTime, not_after: OffsetDateTime, part: u32) -> Duration {
    Duration::try_from(not_after - issued).unwrap_or_default() / part
}

/// A part of `most`, uniform over serials and always the same for one.
fn jitter(serial: Serial, most: Duration) -> Duration {
    let random: [u8; 4] = serial.as_bytes()[12..].try_into().expect("a serial has 16 bytes");
    most.mul_f64(f64::from(u32::from_be_bytes(random)) / f64::from(u32::MAX))
}

#[cfg(test)]
mod tests;
