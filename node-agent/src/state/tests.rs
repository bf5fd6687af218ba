//! The decision at its boundaries, row by row.

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
    FolderFacts { number, life, key_too_old: false, held_for: Duration::ZERO }
}

fn ends(number: u32, issued: OffsetDateTime, not_after: OffsetDateTime) -> FolderFacts {
    let life = Life::of_leaf(serial(), issued, not_after);
    FolderFacts { number, life, key_too_old: false, held_for: Duration::ZERO }
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
        ca_now: None,
        host_now: T0,
        sync_waiting: true,
        calls_not_before: None,
        held: Vec::new(),
    }
}

fn refused() -> Standing {
    Standing::Refused { reason: "REVOKED".into(), message: String::new() }
}

fn reenrol() -> Standing {
    Standing::ReenrolNeeded { reason: "IDENTITY_UNKNOWN".into(), message: String::new() }
}

/// An old folder of two hours beside a current one that is good for 30 days.
fn old_and_current(f: &mut Facts) {
    f.folders = vec![ends(1, T0, T0 + 2 * HOUR), ends(2, T0, T0 + 30 * 24 * HOUR)];
    (f.current, f.env_names) = (Some(2), Some(2));
}

const LEAF_DUE: OffsetDateTime = datetime!(2026-11-25 00:00 UTC);
type Row = (&'static str, OffsetDateTime, fn(&mut Facts), Action);

fn check(table: &[Row]) {
    for (name, now, change, wanted) in table {
        // Where a row says nothing of it, the host's clock agrees.
        let mut facts = Facts { host_now: *now, ..facts() };
        change(&mut facts);
        assert_eq!(next_action(*now, &facts), *wanted, "{name}");
    }
}

#[test]
fn what_is_due_at_each_boundary() {
    let new_folder = Action::Call(Call::NewFolder);
    check(&[
        ("fresh", T0, |_| {}, Action::Wait(T0 + HOUR)),
        ("no sync waits", T0, |f| f.sync_waiting = false, Action::Call(Call::Sync)),
        ("before the leaf is due", LEAF_DUE - TICK, |_| {}, Action::Wait(LEAF_DUE)),
        ("a third of the leaf", LEAF_DUE, |_| {}, Action::Call(Call::RenewLeaf(1))),
        (
            "identity due",
            T0 + 24 * HOUR,
            |f| f.folders = vec![ends(1, T0, T0 + 90 * 24 * HOUR)],
            Action::Call(Call::RenewIdentity),
        ),
        ("renewal cut short", T0, |f| f.renewal_pending = true, Action::Call(Call::RenewIdentity)),
        ("no folder", T0, |f| f.folders.clear(), new_folder),
        ("current points nowhere", T0, |f| f.current = None, new_folder),
        ("folder asked for", T0, |f| f.folder_wanted = true, new_folder),
        ("key too old", LEAF_DUE, |f| f.folders[0].key_too_old = true, new_folder),
        ("current at its end", T0 + 48 * HOUR, |_| {}, new_folder),
        (
            "older folder's key too old",
            LEAF_DUE - TICK,
            |f| {
                f.folders.push(FolderFacts { key_too_old: true, ..folder(2) });
                f.folders[1].life.renew_at = T0;
            },
            Action::Wait(LEAF_DUE),
        ),
    ]);
}

#[test]
fn a_leaf_is_due_by_whichever_clock_ends_it_first_and_never_all_the_time() {
    let leaf = Life::of_leaf(serial(), T0, T0 + 24 * HOUR);
    let due_after = |ahead: Duration| {
        (0..=24 * 60).map(|minute| HOUR / 60 * minute).find(|passed| {
            let now = T0 + *passed;
            leaf.is_due(now, now + ahead)
        })
    };
    let hours = |n: u32| Some(n * HOUR);
    assert_eq!(due_after(Duration::ZERO), hours(8), "the clocks agree");
    // The CA stepped back by so much: to the host, and to its peers, a leaf ends the sooner.
    assert_eq!(due_after(6 * HOUR), hours(6));
    assert_eq!(due_after(18 * HOUR), hours(2));
    for minutes_left in [1, 10, 60, 120, 240] {
        let ahead = 24 * HOUR - HOUR / 60 * minutes_left;
        assert_eq!(due_after(ahead), Some(HOUR / 60 * (48.max(minutes_left / 3))), "no rush");
    }
    assert_eq!(due_after(24 * HOUR), hours(8), "nothing new would last: by the CA's clock");
    assert_eq!(due_after(900_000 * HOUR), hours(8));
}

#[test]
fn a_host_that_is_behind_postpones_only_where_a_real_part_of_a_life_is_at_stake() {
    const MINUTE: Duration = Duration::from_secs(60);
    let due_after = |life: Duration, behind: Duration| {
        let leaf = Life::of_leaf(serial(), T0, T0 + life);
        (0..=1_200).map(|n| life / 1_200 * n).find(|passed| {
            let now = T0 + *passed;
            leaf.is_due(now, now - behind)
        })
    };
    let third = |life: Duration| Some(life / 3);
    let two_thirds = |life: Duration| Some(life / 3 * 2);
    let (short, long) = (4 * MINUTE, 40 * 24 * HOUR);
    for (behind, at_short, at_long) in [
        (Duration::ZERO, third(short), third(long)),
        (10 * MINUTE, third(short), third(long)),
        // From here on a new leaf is valid here so much later than to its peers.
        (10 * MINUTE + short / 10, third(short), third(long)),
        (11 * MINUTE, two_thirds(short), third(long)),
        // Forty days: whoever starts a job late in a leaf's life must not pay for a clock's hour.
        // (What is not valid here at all serves nobody here: no reason to keep it.)
        (HOUR, third(short), third(long)),
        (HOUR / 6 + long / 10 + MINUTE, third(short), two_thirds(long)),
    ] {
        assert_eq!(due_after(short, behind), at_short, "4 minutes, {behind:?} behind");
        assert_eq!(due_after(long, behind), at_long, "40 days, {behind:?} behind");
    }
}

#[test]
fn a_leaf_that_is_dated_ahead_gives_way_to_none_that_is_over_on_arrival() {
    let leaf = Life::of_leaf(serial(), T0, T0 + 24 * HOUR);
    let back = |by: Duration, host_now| leaf.is_due(T0 - by, host_now);
    assert!(!back(HOUR / 6, T0 - HOUR / 6), "ten minutes");
    assert!(back(11 * HOUR / 60, T0 - 11 * HOUR / 60), "dated ahead, and put right");
    assert!(back(23 * HOUR, T0), "an hour is worth something");
    assert!(!back(24 * HOUR, T0), "nothing");
    assert!(!back(24 * HOUR, T0 + 24 * HOUR - TICK));
    assert!(back(24 * HOUR, T0 + 24 * HOUR), "at its end");
}

#[test]
fn a_leaf_without_a_life_is_no_panic() {
    let leaf = Life::of_leaf(serial(), T0, T0);
    assert!(!leaf.is_due(T0 - TICK, T0 - TICK));
    assert!(!leaf.is_due(T0 - TICK, T0 - TICK - HOUR));
    assert!(!leaf.is_due(T0 - TICK, T0 + HOUR));
}

#[test]
fn the_end_of_the_calendar_is_waited_for_without_a_panic() {
    let last = datetime!(9999-12-31 23:59:59 UTC);
    let life = Life::of_leaf(serial(), last - HOUR, last);
    let mut facts = Facts { host_now: last - TICK, identity: life, ..facts() };
    facts.folders = vec![FolderFacts { life, ..folder(1) }];
    facts.standing = Standing::Left;
    let Action::Wait(until) = next_action(last - TICK, &facts) else { panic!("nothing to do") };
    assert!(until >= last, "{until}");
}

#[test]
fn what_ends_first_comes_first_and_a_wish_comes_last() {
    check(&[
        (
            "of two leaves",
            LEAF_DUE,
            |f| {
                f.folders.push(folder(2));
                f.folders[1].life.not_after -= TICK;
            },
            Action::Call(Call::RenewLeaf(2)),
        ),
        ("leaf before identity", T0 + 24 * HOUR, |_| {}, Action::Call(Call::RenewLeaf(1))),
        (
            "identity before leaf",
            T0 + 24 * HOUR,
            |f| f.identity.not_after = f.folders[0].life.not_after - TICK,
            Action::Call(Call::RenewIdentity),
        ),
        (
            "due leaf before a folder asked for",
            LEAF_DUE,
            |f| f.folder_wanted = true,
            Action::Call(Call::RenewLeaf(1)),
        ),
        (
            "no valid current before a due leaf",
            LEAF_DUE,
            |f| f.current = None,
            Action::Call(Call::NewFolder),
        ),
        (
            "no room for the folder asked for",
            T0,
            |f| {
                f.folders = (1..=16).map(folder).collect();
                (f.folder_wanted, f.sync_waiting) = (true, false);
            },
            Action::Call(Call::Sync),
        ),
        (
            "no room for the folder that is needed",
            T0,
            |f| {
                f.folders = (1..=16).map(folder).collect();
                (f.folders[0].key_too_old, f.sync_waiting) = (true, false);
            },
            Action::Call(Call::Sync),
        ),
    ]);
}

#[test]
fn what_is_held_back_holds_back_nothing_else() {
    check(&[
        (
            "a leaf, alone",
            LEAF_DUE,
            |f| f.held = vec![(Call::RenewLeaf(1), LEAF_DUE + TICK)],
            Action::Wait(LEAF_DUE + TICK),
        ),
        (
            "a leaf, at the end of its pause",
            LEAF_DUE,
            |f| f.held = vec![(Call::RenewLeaf(1), LEAF_DUE)],
            Action::Call(Call::RenewLeaf(1)),
        ),
        (
            "a leaf, not the next one",
            LEAF_DUE,
            |f| {
                f.folders.push(folder(2));
                f.held = vec![(Call::RenewLeaf(1), LEAF_DUE + TICK)];
            },
            Action::Call(Call::RenewLeaf(2)),
        ),
        (
            "a leaf, not Sync",
            LEAF_DUE,
            |f| {
                f.sync_waiting = false;
                f.held = vec![(Call::RenewLeaf(1), LEAF_DUE + TICK)];
            },
            Action::Call(Call::Sync),
        ),
        (
            "the identity, not a leaf",
            T0 + 24 * HOUR,
            |f| {
                f.identity.not_after = T0 + 40 * HOUR;
                f.held = vec![(Call::RenewIdentity, T0 + 25 * HOUR)];
            },
            Action::Call(Call::RenewLeaf(1)),
        ),
        (
            "a new folder, not a leaf",
            LEAF_DUE,
            |f| {
                f.current = None;
                f.held = vec![(Call::NewFolder, LEAF_DUE + TICK)];
            },
            Action::Call(Call::RenewLeaf(1)),
        ),
        (
            "Sync",
            T0,
            |f| (f.sync_waiting, f.held) = (false, vec![(Call::Sync, T0 + TICK)]),
            Action::Wait(T0 + TICK),
        ),
        (
            "everything, with the CA away",
            LEAF_DUE,
            |f| (f.sync_waiting, f.calls_not_before) = (false, Some(LEAF_DUE + TICK)),
            Action::Wait(LEAF_DUE + TICK),
        ),
    ]);
}

#[test]
fn a_folder_goes_only_when_it_is_long_over_by_both_clocks() {
    // Two hours of life, then two more.
    const GONE: OffsetDateTime = datetime!(2026-11-24 12:00 UTC);
    let removed = Action::RemoveFolder(1);
    check(&[
        ("long over", GONE, |f| (old_and_current(f), f.ca_now = Some(GONE)).0, removed),
        (
            "not long enough",
            GONE - TICK,
            |f| (old_and_current(f), f.ca_now = Some(GONE)).0,
            Action::Wait(GONE),
        ),
        (
            "our clock jumped",
            GONE,
            |f| (old_and_current(f), f.ca_now = Some(GONE - TICK)).0,
            Action::Wait(GONE + HOUR),
        ),
        (
            "the CA's clock jumped",
            GONE,
            |f| {
                old_and_current(f);
                (f.ca_now, f.host_now) = (Some(GONE), GONE - TICK);
            },
            Action::Wait(GONE + HOUR),
        ),
        (
            "the host's clock stands behind, and two lives passed",
            GONE,
            |f| {
                old_and_current(f);
                (f.ca_now, f.host_now) = (Some(GONE), OffsetDateTime::UNIX_EPOCH);
                f.folders[0].held_for = 4 * HOUR;
            },
            removed,
        ),
        (
            "the host's clock stands behind, and not quite two lives passed",
            GONE,
            |f| {
                old_and_current(f);
                (f.ca_now, f.host_now) = (Some(GONE), OffsetDateTime::UNIX_EPOCH);
                f.folders[0].held_for = 4 * HOUR - TICK;
            },
            Action::Wait(GONE + HOUR),
        ),
        (
            "two lives passed, and the CA says less",
            GONE - TICK,
            |f| {
                old_and_current(f);
                (f.ca_now, f.host_now) = (Some(GONE - TICK), GONE);
                f.folders[0].held_for = 4 * HOUR;
            },
            Action::Wait(GONE),
        ),
        (
            "no room, over by the CA's clock alone",
            T0 + 2 * HOUR,
            |f| {
                f.folders = (1..=16).map(|n| ends(n, T0, T0 + 2 * HOUR)).collect();
                (f.ca_now, f.current) = (Some(T0 + 2 * HOUR), Some(16));
                (f.env_names, f.host_now) = (Some(16), T0 + 2 * HOUR - TICK);
            },
            Action::Wait(T0 + 3 * HOUR),
        ),
        ("the CA was not heard yet", GONE, old_and_current, Action::Wait(GONE + HOUR)),
        (
            "named by ray.env",
            GONE,
            |f| {
                old_and_current(f);
                (f.ca_now, f.env_names) = (Some(GONE), Some(1));
            },
            Action::Wait(GONE + HOUR),
        ),
        (
            "current",
            GONE,
            |f| {
                old_and_current(f);
                (f.ca_now, f.current) = (Some(GONE), Some(1));
            },
            Action::Call(Call::NewFolder),
        ),
        (
            "refused",
            GONE,
            |f| {
                old_and_current(f);
                (f.ca_now, f.standing) = (Some(GONE), refused());
            },
            Action::Wait(GONE + HOUR),
        ),
        (
            "left",
            GONE,
            |f| {
                old_and_current(f);
                (f.ca_now, f.standing) = (Some(GONE), Standing::Left);
            },
            Action::Wait(GONE + HOUR),
        ),
        (
            "just over, and no room for a folder that is needed",
            T0 + 2 * HOUR,
            |f| {
                f.folders = (1..=16).map(|n| ends(n, T0, T0 + 2 * HOUR)).collect();
                (f.ca_now, f.current) = (Some(T0 + 2 * HOUR), Some(16));
                f.env_names = Some(16);
            },
            removed,
        ),
    ]);
}

#[test]
fn a_node_that_is_not_served_only_asks_whether_it_is_again() {
    let month = T0 + 30 * 24 * HOUR;
    check(&[
        (
            "refused, later",
            LEAF_DUE,
            |f| {
                (f.standing, f.sync_waiting) = (refused(), false);
                f.calls_not_before = Some(LEAF_DUE + TICK);
            },
            Action::Wait(LEAF_DUE + TICK),
        ),
        (
            "refused, now",
            LEAF_DUE,
            |f| (f.standing, f.sync_waiting) = (refused(), false),
            Action::Call(Call::Sync),
        ),
        (
            "re-enrol needed, later",
            LEAF_DUE,
            |f| {
                (f.standing, f.sync_waiting) = (reenrol(), false);
                f.calls_not_before = Some(LEAF_DUE + TICK);
            },
            Action::Wait(LEAF_DUE + TICK),
        ),
        (
            "re-enrol needed, now",
            LEAF_DUE,
            |f| (f.standing, f.sync_waiting) = (reenrol(), false),
            Action::Call(Call::Sync),
        ),
        (
            "left",
            LEAF_DUE,
            |f| (f.standing, f.sync_waiting) = (Standing::Left, false),
            Action::Wait(LEAF_DUE + HOUR),
        ),
        ("identity over", month, |_| {}, Action::IdentityOver),
        ("refused, identity over", month, |f| f.standing = refused(), Action::IdentityOver),
        (
            "re-enrol needed, identity over",
            month,
            |f| (f.standing, f.sync_waiting) = (reenrol(), false),
            Action::Wait(month + HOUR),
        ),
    ]);
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

#[test]
fn a_spread_pause_is_about_as_long() {
    assert_eq!(spread(10 * TICK, 0.0), 8 * TICK);
    assert_eq!(spread(10 * TICK, 0.5), 10 * TICK);
    assert_eq!(spread(10 * TICK, 1.0), 12 * TICK);
}
