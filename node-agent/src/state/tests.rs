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
    FolderFacts { number, life, key_too_old: false }
}

fn ends(number: u32, issued: OffsetDateTime, not_after: OffsetDateTime) -> FolderFacts {
    let life = Life::of_leaf(serial(), issued, not_after);
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
        ca_now: None,
        // No earlier than now: the host's clock has no say of its own.
        host_now: datetime!(9999-12-31 23:59:59 UTC),
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
        let mut facts = facts();
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
