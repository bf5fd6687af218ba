//! What to do next: a function of the facts and of now. No file, no clock, no chance: jitter comes
//! from the random part of a certificate's own serial, so it is drawn once per certificate, and
//! backoff takes its random number as an argument.

use std::time::Duration;

use raymtls_proto::serial::Serial;
use time::OffsetDateTime;

/// How long after its issue an identity is renewed, at the latest.
pub const IDENTITY_RENEWED_AFTER: Duration = Duration::from_secs(24 * 3_600);
/// A leaf is renewed when this part of its life (counted from issue) has passed, at the latest.
pub const LEAF_RENEWED_AFTER_PART: u32 = 3;
/// Jitter moves a renewal earlier by up to this part of the time until it.
pub const JITTER_PART: u32 = 10;
/// How long an agent that was refused waits before it asks again: it may have been reinstated.
pub const REFUSED_RETRY: Duration = Duration::from_secs(60);
/// First bound of the backoff.
pub const BACKOFF_MIN: Duration = Duration::from_secs(1);
/// Largest bound of the backoff.
pub const BACKOFF_MAX: Duration = Duration::from_secs(60);
/// No retry comes sooner than this, whatever the dice say.
const BACKOFF_FLOOR: Duration = Duration::from_millis(200);
/// Longest sleep without a look at the facts.
const WAIT_MAX: Duration = Duration::from_secs(3_600);

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
        /// When it is asked again.
        retry_at: OffsetDateTime,
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
        let renew_at = issued + (after - jitter(serial, after / JITTER_PART));
        Self { issued, not_after, renew_at }
    }

    /// Whether it is no longer valid.
    #[must_use]
    pub fn is_over(&self, now: OffsetDateTime) -> bool {
        now >= self.not_after
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
    /// No call to the CA before this moment (backoff).
    pub call_not_before: Option<OffsetDateTime>,
    /// A Sync waits at the CA.
    pub sync_waiting: bool,
    /// No Sync before this moment.
    pub sync_not_before: Option<OffsetDateTime>,
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// The identity ended: an operator must enrol the node again.
    IdentityOver,
    /// Delete a key folder that nobody can use any more.
    RemoveFolder(u32),
    /// Fetch the next identity.
    RenewIdentity,
    /// Make a key folder and point `current` at it.
    NewFolder,
    /// Fetch the next leaf for the key of a folder.
    RenewLeaf(u32),
    /// Report, and wait at the CA for what changes.
    Sync,
    /// Nothing until then.
    Wait(OffsetDateTime),
}

/// Decides. What works without the CA comes first, then what ends first.
#[must_use]
pub fn next_action(now: OffsetDateTime, facts: &Facts) -> Action {
    if let Some(folder) = facts.folders.iter().find(|folder| is_disposable(now, facts, folder)) {
        return Action::RemoveFolder(folder.number);
    }
    match &facts.standing {
        Standing::Left | Standing::ReenrolNeeded { .. } => {
            return Action::Wait(wake(now, facts, None));
        }
        Standing::Refused { retry_at, .. } if now < *retry_at => {
            return Action::Wait(wake(now, facts, Some(*retry_at)));
        }
        Standing::Enrolled | Standing::Refused { .. } => {}
    }
    if facts.identity.is_over(now) {
        return Action::IdentityOver;
    }
    if let Some(retry_at) = facts.call_not_before.filter(|at| now < *at) {
        return Action::Wait(wake(now, facts, Some(retry_at)));
    }
    if facts.renewal_pending || now >= facts.identity.renew_at {
        return Action::RenewIdentity;
    }
    if needs_folder(now, facts) {
        return Action::NewFolder;
    }
    if let Some(folder) = most_urgent(now, facts) {
        return Action::RenewLeaf(folder.number);
    }
    match facts.sync_not_before.filter(|at| now < *at) {
        _ if facts.sync_waiting => Action::Wait(wake(now, facts, None)),
        Some(at) => Action::Wait(wake(now, facts, Some(at))),
        None => Action::Sync,
    }
}

/// Bound of the `attempt`-th retry (from 0), doubled each time; the wait is a random part of it
/// (full jitter), so that a fleet that lost its CA does not come back as one herd.
#[must_use]
pub fn backoff(attempt: u32, random: f64) -> Duration {
    let bound = BACKOFF_MIN.saturating_mul(1 << attempt.min(16)).min(BACKOFF_MAX);
    bound.mul_f64(random.clamp(0.0, 1.0)).max(BACKOFF_FLOOR)
}

/// Expired, not `current`, and not in `ray.env`.
fn is_disposable(now: OffsetDateTime, facts: &Facts, folder: &FolderFacts) -> bool {
    let number = Some(folder.number);
    folder.life.is_over(now) && number != facts.current && number != facts.env_names
}

/// Asked for, none there, or the current one can be renewed no more.
fn needs_folder(now: OffsetDateTime, facts: &Facts) -> bool {
    let current = facts.folders.iter().find(|folder| Some(folder.number) == facts.current);
    facts.folder_wanted
        || current.is_none_or(|folder| folder.life.is_over(now) || folder.key_too_old)
}

/// Of the leaves that are due and not over, the one that ends first.
fn most_urgent(now: OffsetDateTime, facts: &Facts) -> Option<&FolderFacts> {
    let due = |folder: &&FolderFacts| {
        !folder.key_too_old && !folder.life.is_over(now) && now >= folder.life.renew_at
    };
    facts.folders.iter().filter(due).min_by_key(|folder| folder.life.not_after)
}

/// The next moment at which the answer may be another one.
fn wake(now: OffsetDateTime, facts: &Facts, retry_at: Option<OffsetDateTime>) -> OffsetDateTime {
    let lives = facts.folders.iter().map(|folder| folder.life).chain([facts.identity]);
    lives
        .flat_map(|life| [life.renew_at, life.not_after])
        .chain(retry_at)
        .filter(|moment| *moment > now)
        .fold(now + WAIT_MAX, OffsetDateTime::min)
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
mod tests {
    use time::macros::datetime;

    use super::*;

    const T0: OffsetDateTime = datetime!(2026-11-24 08:00 UTC);
    const HOUR: Duration = Duration::from_secs(3_600);
    const TICK: Duration = Duration::from_secs(1);

    fn serial() -> Serial {
        Serial::new(0, [0; 10])
    }

    fn folder(number: u32) -> FolderFacts {
        let life = Life::of_leaf(serial(), T0, T0 + 48 * HOUR);
        FolderFacts { number, life, key_too_old: false }
    }

    fn facts() -> Facts {
        Facts {
            standing: Standing::Enrolled,
            identity: Life::of_identity(serial(), T0, T0 + 30 * 24 * HOUR),
            renewal_pending: false,
            folders: vec![folder(1)],
            current: Some(1),
            env_names: Some(1),
            folder_wanted: false,
            call_not_before: None,
            sync_waiting: true,
            sync_not_before: None,
        }
    }

    fn refused(retry_at: OffsetDateTime) -> Standing {
        Standing::Refused { reason: "REVOKED".into(), message: String::new(), retry_at }
    }

    #[test]
    fn the_next_action_at_each_boundary() {
        type Change = fn(&mut Facts);
        let leaf_due = T0 + 16 * HOUR;
        let table: &[(&str, OffsetDateTime, Change, Action)] = &[
            ("fresh", T0, |_| {}, Action::Wait(T0 + HOUR)),
            ("no sync waits", T0, |f| f.sync_waiting = false, Action::Sync),
            (
                "sync held back",
                T0,
                |f| (f.sync_waiting, f.sync_not_before) = (false, Some(T0 + TICK)),
                Action::Wait(T0 + TICK),
            ),
            ("before the leaf is due", leaf_due - TICK, |_| {}, Action::Wait(leaf_due)),
            ("at a third of the leaf", leaf_due, |_| {}, Action::RenewLeaf(1)),
            (
                "due, in backoff",
                leaf_due,
                |f| f.call_not_before = Some(f.folders[0].life.renew_at + TICK),
                Action::Wait(leaf_due + TICK),
            ),
            (
                "at the end of the backoff",
                leaf_due,
                |f| f.call_not_before = Some(f.folders[0].life.renew_at),
                Action::RenewLeaf(1),
            ),
            ("identity due first", T0 + 24 * HOUR, |_| {}, Action::RenewIdentity),
            ("renewal cut short", T0, |f| f.renewal_pending = true, Action::RenewIdentity),
            ("no folder", T0, |f| f.folders.clear(), Action::NewFolder),
            ("current points nowhere", T0, |f| f.current = None, Action::NewFolder),
            ("folder asked for", T0, |f| f.folder_wanted = true, Action::NewFolder),
            ("key too old", leaf_due, |f| f.folders[0].key_too_old = true, Action::NewFolder),
            (
                "older folder's key too old",
                leaf_due - TICK,
                |f| {
                    f.folders.push(FolderFacts { key_too_old: true, ..folder(2) });
                    f.folders[1].life.renew_at = T0;
                },
                Action::Wait(leaf_due),
            ),
            (
                "the one that ends first",
                leaf_due,
                |f| {
                    f.folders.push(folder(2));
                    f.folders[1].life.not_after -= TICK;
                },
                Action::RenewLeaf(2),
            ),
            (
                "current at its end",
                T0 + 48 * HOUR,
                |f| f.identity.renew_at = T0 + 100 * HOUR,
                Action::NewFolder,
            ),
            (
                "old folder at its end",
                T0 + HOUR,
                |f| {
                    f.folders.push(folder(2));
                    f.folders[1].life.not_after = T0 + HOUR;
                },
                Action::RemoveFolder(2),
            ),
            (
                "old folder before its end, renewed",
                T0 + HOUR - TICK,
                |f| {
                    f.folders.push(folder(2));
                    f.folders[1].life.renew_at = T0;
                    f.folders[1].life.not_after = T0 + HOUR;
                },
                Action::RenewLeaf(2),
            ),
            (
                "old folder at its end, named by ray.env",
                T0 + HOUR,
                |f| {
                    f.folders.push(folder(2));
                    f.folders[1].life.not_after = T0 + HOUR;
                    f.env_names = Some(2);
                },
                Action::Wait(T0 + 2 * HOUR),
            ),
            ("refused", T0, |f| f.standing = refused(T0 + TICK), Action::Wait(T0 + TICK)),
            (
                "refused, asked again",
                T0,
                |f| (f.standing, f.sync_waiting) = (refused(T0), false),
                Action::Sync,
            ),
            ("left", leaf_due, |f| f.standing = Standing::Left, Action::Wait(leaf_due + HOUR)),
            (
                "re-enrol needed",
                leaf_due,
                |f| {
                    f.standing = Standing::ReenrolNeeded {
                        reason: "IDENTITY_UNKNOWN".into(),
                        message: String::new(),
                    };
                },
                Action::Wait(leaf_due + HOUR),
            ),
            ("identity over", T0 + 30 * 24 * HOUR, |_| {}, Action::IdentityOver),
        ];
        for (name, now, change, wanted) in table {
            let mut facts = facts();
            change(&mut facts);
            assert_eq!(next_action(*now, &facts), *wanted, "{name}");
        }
    }

    #[test]
    fn jitter_only_moves_a_renewal_earlier_and_never_by_more_than_its_part() {
        let at = |random| Life::of_leaf(Serial::new(0, random), T0, T0 + 30 * HOUR).renew_at;
        assert_eq!(at([0; 10]), T0 + 10 * HOUR);
        assert_eq!(at([0xff; 10]), T0 + 9 * HOUR);
        assert_eq!(at([7; 10]), at([7; 10]));
    }

    #[test]
    fn a_short_identity_is_renewed_at_a_third_and_a_long_one_daily() {
        let renewed = |life| Life::of_identity(serial(), T0, T0 + life).renew_at;
        assert_eq!(renewed(3 * HOUR), T0 + HOUR);
        assert_eq!(renewed(30 * 24 * HOUR), T0 + 24 * HOUR);
    }

    #[test]
    fn backoff_doubles_up_to_its_bound_and_never_spins() {
        assert_eq!(backoff(0, 1.0), BACKOFF_MIN);
        assert_eq!(backoff(3, 1.0), 8 * BACKOFF_MIN);
        assert_eq!(backoff(3, 0.5), 4 * BACKOFF_MIN);
        assert_eq!(backoff(u32::MAX, 1.0), BACKOFF_MAX);
        assert!(backoff(0, 0.0) >= BACKOFF_FLOOR);
    }
}
