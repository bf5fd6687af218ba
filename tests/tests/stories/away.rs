//! The CA is away for half a leaf life and comes back to 1,000 agents: no leaf of any of them ends,
//! and they do not come as one herd.
//!
//! What an agent does next and how long it waits is decided by the agent's own functions
//! (`next_action`, `backoff`, `away_backoff`, the jitter of a life). Around them stands a model: the
//! daemon's bookkeeping of what is held back, on a clock that jumps from one event to the next, and a
//! CA that answers at once or not at all. Files, TLS and the real CA are in other stories.

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, HashMap},
    time::Duration,
};

use node_agent::state::{self, AWAY_BACKOFF_MAX, Action, Call, Facts, FolderFacts, Life, Standing};
use raymtls_proto::serial::Serial;
use time::OffsetDateTime;

const AGENTS: usize = 1_000;
/// What is looked at after the return, a bin a second.
const AFTER: Duration = Duration::from_secs(300);
/// Before the CA goes, so that every agent has its Sync waiting there.
const BEFORE: Duration = Duration::from_secs(120);
/// How long a Sync waits at the CA.
const SYNC_WAIT: Duration = Duration::from_secs(50);
const DAY: Duration = Duration::from_secs(86_400);
const PEAK_TO_MEAN_MAX: f64 = 3.0;
/// Of an absence longer than this, the middle is skipped: by then every backoff is at its bound, and
/// hundreds of thousands of seconds would add nothing but the same tries.
const PLAYED: Duration = Duration::from_secs(1_200);

#[test]
fn a_fleet_with_leaves_of_four_minutes_survives_two_minutes_without_a_ca() {
    let seen = play(Duration::from_secs(240), Duration::from_secs(120), 1);
    seen.judge("leaf life 4 min");
}

#[test]
fn a_fleet_with_leaves_of_forty_days_survives_twenty_days_without_a_ca() {
    let seen = play(40 * DAY, 20 * DAY, 2);
    seen.judge("leaf life 40 d");
}

/// What the CA and the agents saw.
struct Seen {
    expired: usize,
    /// Calls of each second after the return.
    calls: Vec<u32>,
    /// Those of them that asked for a certificate.
    certificates: Vec<u32>,
}

impl Seen {
    fn judge(&self, what: &str) {
        let total: u32 = self.calls.iter().sum();
        let mean = f64::from(total) / AFTER.as_secs_f64();
        let peak = f64::from(self.calls.iter().copied().max().unwrap());
        let certificates: u32 = self.certificates.iter().sum();
        let tens: Vec<u32> = self.calls.chunks(10).map(|bins| bins.iter().sum()).collect();
        println!(
            "{what}: {} expired; calls in the {} s after the return: {total}, mean {mean:.1}/s, peak \
             {peak}/s ({:.2} times the mean); certificates {certificates}, peak {}/s; calls in each \
             10 s: {tens:?}",
            self.expired,
            AFTER.as_secs(),
            peak / mean,
            self.certificates.iter().max().unwrap(),
        );
        assert_eq!(self.expired, 0, "{what}: leaves ended");
        assert!(certificates as usize >= AGENTS, "{what}: not everybody renewed");
        assert!(peak <= PEAK_TO_MEAN_MAX * mean, "{what}: peak {peak}/s, mean {mean}/s");
    }
}

/// From when until when the CA is away, in the time of the play.
#[derive(Clone, Copy)]
struct Absence {
    from: OffsetDateTime,
    until: OffsetDateTime,
}

impl Absence {
    fn is_on(&self, now: OffsetDateTime) -> bool {
        self.from <= now && now < self.until
    }
}

struct Held {
    until: OffsetDateTime,
    failures: u32,
    away: bool,
}

/// A Sync that waits at the CA.
struct WaitingSync {
    began: OffsetDateTime,
    ends: OffsetDateTime,
}

/// The bookkeeping of one daemon.
struct Daemon {
    identity: Life,
    leaf: Life,
    leaf_life: Duration,
    failures: u32,
    not_before: Option<OffsetDateTime>,
    held: HashMap<Call, Held>,
    sync: Option<WaitingSync>,
    /// The last call was answered.
    reachable: bool,
    expired: bool,
}

fn play(leaf_life: Duration, away: Duration, seed: u64) -> Seen {
    let mut dice = Dice(seed);
    let begin = OffsetDateTime::UNIX_EPOCH + DAY * 20_000;
    let from = begin + BEFORE;
    let mut absence = Absence { from, until: from + away.min(PLAYED) };
    let mut daemons: Vec<Daemon> =
        (0..AGENTS).map(|_| Daemon::new(begin, leaf_life, &mut dice)).collect();
    let mut queue: BinaryHeap<_> =
        (0..AGENTS).map(|index| Reverse((begin + SYNC_WAIT.mul_f64(dice.roll()), index))).collect();
    let seconds = usize::try_from(AFTER.as_secs()).unwrap();
    let mut seen = Seen { expired: 0, calls: vec![0; seconds], certificates: vec![0; seconds] };
    let (mut broken, mut skipped) = (false, away <= PLAYED);
    while let Some(Reverse((now, index))) = queue.pop() {
        if !broken && now >= absence.from {
            // Every waiting Sync ends when the CA goes, and the daemon hears of it at once.
            broken = true;
            queue.push(Reverse((now, index)));
            let all = queue.drain().map(|Reverse((at, index))| {
                let waits = daemons[index].sync.is_some();
                Reverse((if waits { absence.from } else { at }, index))
            });
            queue = all.collect();
            continue;
        }
        if !skipped && now >= absence.from + PLAYED / 2 {
            skipped = true;
            let by = away - PLAYED;
            absence.until += by;
            queue.push(Reverse((now, index)));
            queue = queue.drain().map(|Reverse((at, index))| Reverse((at + by, index))).collect();
            daemons.iter_mut().for_each(|daemon| daemon.skip(by));
            continue;
        }
        if now >= absence.until + AFTER {
            break;
        }
        let wakes = daemons[index].step(now, absence, &mut dice, &mut |call| {
            let since = Duration::try_from(now - absence.until).ok();
            let Some(bin) = since.and_then(|since| usize::try_from(since.as_secs()).ok()) else {
                return;
            };
            seen.calls[bin] += 1;
            seen.certificates[bin] += u32::from(call != Call::Sync);
        });
        queue.push(Reverse((wakes.max(now + Duration::from_millis(1)), index)));
    }
    seen.expired = daemons.iter().filter(|daemon| daemon.expired).count();
    seen
}

impl Daemon {
    /// One in the middle of its life: neither its leaf nor its identity is due.
    fn new(now: OffsetDateTime, leaf_life: Duration, dice: &mut Dice) -> Self {
        let leaf_issued = now - leaf_life.mul_f64(0.3 * dice.roll());
        let identity_issued = now - DAY.mul_f64(0.9 * dice.roll());
        Self {
            identity: identity(identity_issued, dice),
            leaf: Life::of_leaf(dice.serial(), leaf_issued, leaf_issued + leaf_life),
            leaf_life,
            failures: 0,
            not_before: None,
            held: HashMap::new(),
            sync: None,
            reachable: true,
            expired: false,
        }
    }

    /// Does what is to be done now; when to look again.
    fn step(
        &mut self,
        now: OffsetDateTime,
        absence: Absence,
        dice: &mut Dice,
        count: &mut dyn FnMut(Call),
    ) -> OffsetDateTime {
        self.hear_sync(now, absence, dice);
        loop {
            self.expired |= self.leaf.is_over(now) || self.identity.is_over(now);
            match state::next_action(now, &self.facts(now)) {
                Action::Call(call) if absence.is_on(now) => self.no_ca(call, now, dice),
                Action::Call(call) => {
                    count(call);
                    self.answered_with(call, now, dice);
                }
                Action::Wait(until) => {
                    return self.sync.as_ref().map_or(until, |sync| sync.ends.min(until));
                }
                Action::IdentityOver | Action::RemoveFolder(_) => return now + DAY,
            }
        }
    }

    fn facts(&self, now: OffsetDateTime) -> Facts {
        Facts {
            standing: Standing::Enrolled,
            identity: self.identity,
            renewal_pending: false,
            folders: vec![FolderFacts {
                number: 1,
                life: self.leaf,
                key_too_old: false,
                held_for: Duration::ZERO,
            }],
            current: Some(1),
            env_names: Some(1),
            folder_wanted: false,
            ca_now: Some(now),
            host_now: now,
            sync_waiting: self.sync.is_some(),
            calls_not_before: self.not_before,
            held: self.held.iter().map(|(call, held)| (*call, held.until)).collect(),
        }
    }

    fn hear_sync(&mut self, now: OffsetDateTime, absence: Absence, dice: &mut Dice) {
        let away = absence.is_on(now);
        let Some(sync) = self.sync.take_if(|sync| away || sync.ends <= now) else { return };
        if away {
            return self.no_ca(Call::Sync, now, dice);
        }
        self.answered();
        // As the daemon pauses after an answer: shorter where the CA held it back.
        let waited = now - sync.began >= Duration::from_secs(1);
        let base = Duration::from_millis(if waited { 200 } else { 1_000 });
        let until = now + base + Duration::from_millis(800).mul_f64(dice.roll());
        self.held.insert(Call::Sync, Held { until, failures: 0, away: false });
    }

    fn answered_with(&mut self, call: Call, now: OffsetDateTime, dice: &mut Dice) {
        match call {
            Call::Sync => {
                let wait = if self.reachable { SYNC_WAIT } else { Duration::from_millis(5) };
                self.sync = Some(WaitingSync { began: now, ends: now + wait });
                return;
            }
            Call::RenewLeaf(_) | Call::NewFolder => {
                self.leaf = Life::of_leaf(dice.serial(), now, now + self.leaf_life);
                // What the node holds has changed: the CA is told by a new Sync.
                self.sync.take_if(|sync| now - sync.began >= Duration::from_secs(5));
            }
            Call::RenewIdentity => {
                self.identity = identity(now, dice);
                self.sync = None;
            }
        }
        self.answered();
        self.held.remove(&call);
    }

    fn answered(&mut self) {
        self.failures = 0;
        self.not_before = None;
        self.held.retain(|_, held| !held.away);
        self.reachable = true;
    }

    fn no_ca(&mut self, call: Call, now: OffsetDateTime, dice: &mut Dice) {
        self.reachable = false;
        let facts = self.facts(now);
        let wait = state::away_backoff(now, &facts, self.failures, dice.roll());
        self.failures += 1;
        self.not_before = Some(now + wait);
        let failures = self.held.get(&call).map_or(0, |held| held.failures);
        let until = now + wait + state::away_backoff(now + wait, &facts, failures, dice.roll());
        self.held.insert(call, Held { until, failures: failures + 1, away: true });
    }

    fn skip(&mut self, by: Duration) {
        self.not_before = self.not_before.map(|at| at + by);
        self.held.values_mut().for_each(|held| held.until += by);
    }
}

fn identity(issued: OffsetDateTime, dice: &mut Dice) -> Life {
    Life::of_identity(dice.serial(), issued, issued + 30 * DAY)
}

/// SplitMix64: the same play every time.
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.0;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ (word >> 31)
    }

    /// From 0 to 1.
    #[allow(clippy::cast_precision_loss, reason = "53 bits are what a double holds")]
    fn roll(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }

    fn serial(&mut self) -> Serial {
        let random: [u8; 16] = [self.next().to_be_bytes(), self.next().to_be_bytes()]
            .concat()
            .try_into()
            .expect("two words are 16 bytes");
        Serial::new(1, random[..10].try_into().expect("ten of sixteen"))
    }
}

/// The longest wait must leave room for all of them within what is looked at.
const _: () = assert!(AWAY_BACKOFF_MAX.as_secs() * 3 / 2 < AFTER.as_secs());
