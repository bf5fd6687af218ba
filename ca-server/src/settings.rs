//! A cluster's settings: their defaults, how the leaf life is derived, and what an operator may
//! change. Pure.

use std::{ops::RangeInclusive, time::Duration};

use raymtls_proto::{
    address::AddressRange,
    ports::{self, PORTS},
    span::Span,
    v1,
};

use crate::refusal::Refusal;

/// Shortest and longest `max-job`.
const MAX_JOB: RangeInclusive<Duration> =
    Duration::from_secs(2 * 60)..=Duration::from_secs(40 * 86_400);
/// Shortest and longest life of an ephemeral cluster.
const MAX_LIFE: RangeInclusive<Duration> =
    Duration::from_secs(4 * 60)..=Duration::from_secs(80 * 86_400);
/// Shortest and longest lease.
const LEASE: RangeInclusive<Duration> =
    Duration::from_secs(5 * 60)..=Duration::from_secs(90 * 86_400);
/// Shortest and longest life of a leaf in mode tunnel, where no process needs the one it began with.
const TUNNEL_LEAF_LIFE: RangeInclusive<Duration> =
    Duration::from_secs(60)..=Duration::from_secs(7 * 86_400);
/// The same where nothing is set.
const TUNNEL_LEAF_LIFE_DEFAULT: i64 = 86_400;
/// Shortest and longest time for which flows outlive a leaf while the CA is away.
const TUNNEL_GRACE: RangeInclusive<Duration> = Duration::ZERO..=Duration::from_secs(30 * 86_400);
/// The same where nothing is set.
const TUNNEL_GRACE_DEFAULT: i64 = 3 * 86_400;
/// A leaf that is renewed more often than this costs enough to be told.
const RENEWED_OFTEN_SECONDS: i64 = 3_600;
/// Ranges of one kind, at most.
const RANGES_MAX: usize = 64;

/// Settings of a new cluster whose longest job is known.
///
/// # Errors
/// Outside 2 minutes to 40 days.
pub fn for_max_job(max_job: Duration) -> Result<v1::Settings, Refusal> {
    let mut settings = defaults();
    set_max_job(&mut settings, max_job)?;
    Ok(settings)
}

/// Settings of an ephemeral cluster: every leaf ends with it.
///
/// # Errors
/// Outside 4 minutes to 80 days.
pub fn for_max_life(max_life: Duration, now_unix: i64) -> Result<v1::Settings, Refusal> {
    check_range("max-life", max_life, &MAX_LIFE)?;
    let seconds = seconds(max_life);
    Ok(v1::Settings { leaf_life_seconds: seconds, ends_unix: now_unix + seconds, ..defaults() })
}

/// Applies one `KEY=VALUE`.
///
/// # Errors
/// An unknown key, a value of the wrong form, or one that cannot hold.
pub fn apply(settings: &mut v1::Settings, change: &str) -> Result<(), Refusal> {
    let (key, value) = change
        .split_once('=')
        .ok_or_else(|| invalid(format!("{:?} is not KEY=VALUE", excerpt(change))))?;
    match key {
        "max-job" if settings.ends_unix != 0 => {
            Err(invalid("max-job: the cluster was created with --max-life".to_owned()))
        }
        "max-job" => set_max_job(settings, duration(key, value)?),
        "isolation" => {
            settings.isolation = match value {
                "off" => v1::Isolation::Off,
                "audit" => v1::Isolation::Audit,
                "enforce" => v1::Isolation::Enforce,
                _ => return Err(wanted(key, value, "off, audit or enforce")),
            }
            .into();
            Ok(())
        }
        "mode" => {
            settings.mode = match value {
                "files" => v1::Mode::Files,
                "tunnel" => v1::Mode::Tunnel,
                _ => return Err(wanted(key, value, "files or tunnel")),
            }
            .into();
            derive_leaf_life(settings);
            Ok(())
        }
        "leaf-life" => set_leaf_life(settings, duration(key, value)?),
        "tunnel-grace" => set_grace(settings, duration(key, value)?),
        "admin-ranges" => set_ranges(&mut settings.admin_ranges, key, value),
        "scraper-ranges" => set_ranges(&mut settings.scraper_ranges, key, value),
        "driver-ranges" => set_ranges(&mut settings.driver_ranges, key, value),
        "lease" => {
            let lease = duration(key, value)?;
            check_range(key, lease, &LEASE)?;
            settings.lease_seconds = seconds(lease);
            Ok(())
        }
        "ray-token" => on_off(key, value).map(|on| settings.ray_token = on),
        "ray-client" => on_off(key, value).map(|on| settings.ray_client = on),
        "trust-ranges" => on_off(key, value).map(|on| settings.trust_ranges = on),
        "revoked-keeps-ray" => on_off(key, value).map(|on| settings.revoked_keeps_ray = on),
        "collective-ports" => set_collectives(plan(settings), value),
        _ => match key.strip_prefix("port.") {
            Some(port) => set_port(plan(settings), port, value),
            None => Err(invalid(format!(
                "{:?} is no setting; there are max-job, isolation, mode, leaf-life, tunnel-grace, \
                 admin-ranges, scraper-ranges, driver-ranges, lease, ray-token, ray-client, trust-ranges, \
                 revoked-keeps-ray, collective-ports, port.NAME",
                excerpt(key)
            ))),
        },
    }
}

/// Checks what no single change can: that ports do not collide, and that mode tunnel has what it stands on.
///
/// # Errors
/// Two purposes on one port; Ray refuses to start where a fixed port lies in the workers' range.
pub fn check(settings: &v1::Settings) -> Result<(), Refusal> {
    check_tunnel(settings)?;
    let Some(plan) = settings.port_plan else { return Ok(()) };
    if plan.worker_min > plan.worker_max {
        let (min, max) = (plan.worker_min, plan.worker_max);
        return Err(invalid(format!("the range of workers, {min}-{max}, is empty")));
    }
    let taken: Vec<_> =
        PORTS.iter().filter_map(|row| Some((row.name, row.port.range(&plan)?))).collect();
    for (index, (name, range)) in taken.iter().enumerate() {
        let overlaps = |other: &&(&str, RangeInclusive<u16>)| {
            range.start() <= other.1.end() && other.1.start() <= range.end()
        };
        if let Some((other, at)) = taken[..index].iter().find(overlaps) {
            let (range, at) = (port_text(range), port_text(at));
            return Err(invalid(format!("{name} at {range} collides with {other} at {at}")));
        }
    }
    Ok(())
}

/// In mode tunnel Ray speaks no TLS on its own host: who may reach its ports there is the table's to say,
/// and who may use them the token's.
fn check_tunnel(settings: &v1::Settings) -> Result<(), Refusal> {
    if settings.mode() != v1::Mode::Tunnel {
        return Ok(());
    }
    let enforces = settings.isolation() == v1::Isolation::Enforce;
    let missing: Vec<&str> =
        [(!enforces, "isolation=enforce"), (!settings.ray_token, "ray-token=on")]
            .into_iter()
            .filter_map(|(missing, change)| missing.then_some(change))
            .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let missing = missing.join(" ");
    Err(invalid(format!(
        "mode tunnel needs isolation=enforce and ray-token=on, because Ray itself speaks no TLS in it: \
         set {missing} with it, or go back to mode=files first"
    )))
}

/// Checks that a plan leaves to others what is theirs: agents shut its ports to whoever is no member, and
/// one that cannot reach the CA any more never hears of the setting that would open them again.
/// `ca_ports`: where this CA is reached.
///
/// # Errors
/// A port below 1024, or a range that covers a port of another service.
pub fn check_guarded(settings: &v1::Settings, ca_ports: &[u16]) -> Result<(), Refusal> {
    let plan = settings.port_plan.unwrap_or_default();
    for row in &PORTS {
        let Some(range) = row.port.range(&plan) else { continue };
        let (name, at) = (row.name, port_text(&range));
        if let Some((other, what)) = ports::never_guarded(&range) {
            let other = port_text(other);
            return Err(invalid(format!("{name} at {at} covers {other} of {what}: {SHUT}")));
        }
        if let Some(port) = ca_ports.iter().find(|port| range.contains(port)) {
            return Err(invalid(format!("{name} at {at} covers port {port} of the CA: {SHUT}")));
        }
        if *range.start() < ports::UNPRIVILEGED_MIN {
            let least = ports::UNPRIVILEGED_MIN;
            return Err(invalid(format!(
                "{name} at {at} lies below {least}, where the host's own services listen: give ports \
                 from {least} on"
            )));
        }
    }
    Ok(())
}

/// What becomes of a port in a plan.
const SHUT: &str = "isolation would shut it to all but members; give other ports";

/// Ports of a plan from which hosts dial that are worth a word.
const DIALLED_FROM_MAX: u32 = 1_024;

/// A word on each range that takes many of the ports from which a host dials.
fn dialling_notes(settings: &v1::Settings) -> Vec<String> {
    let plan = settings.port_plan.unwrap_or_default();
    let all = PORTS.iter().filter_map(|row| Some((row.name, row.port.range(&plan)?)));
    let dialled_from = ports::DIALLED_FROM;
    let of_all = ports::overlap(&dialled_from, &dialled_from);
    all.map(|(name, range)| (name, ports::overlap(&range, &dialled_from), range))
        .filter(|(_, shared, _)| *shared > DIALLED_FROM_MAX)
        .map(|(name, shared, range)| {
            format!(
                "{name} at {} covers {shared} of the {of_all} ports {}-{} from which Linux dials: with \
                 isolation enforced that part of the hosts' own calls to others than members gets no answer, \
                 and Ray finds the ports taken; give ports below {}, or move \
                 net.ipv4.ip_local_port_range of every host",
                port_text(&range),
                dialled_from.start(),
                dialled_from.end(),
                dialled_from.start()
            )
        })
        .collect()
}

fn port_text(range: &RangeInclusive<u16>) -> String {
    let (min, max) = (range.start(), range.end());
    if min == max { format!("port {min}") } else { format!("ports {min}-{max}") }
}

/// What follows from the settings, for the operator.
#[must_use]
pub fn notes(settings: &v1::Settings) -> Vec<String> {
    let mut notes = match settings.mode() {
        v1::Mode::Tunnel => tunnel_notes(settings),
        v1::Mode::Files | v1::Mode::Unspecified => files_notes(settings),
    };
    notes.extend(dialling_notes(settings));
    if !settings.ray_token {
        notes.push(
            "ray-token is off: Ray's HTTP ports run code for whoever reaches them, TLS or not"
                .into(),
        );
    }
    notes
}

fn files_notes(settings: &v1::Settings) -> Vec<String> {
    let life = settings.leaf_life_seconds;
    let of_leaves = if settings.ends_unix == 0 {
        format!(
            "a leaf lives {} = 2 x max-job {} and is renewed after a third ({}): whatever starts \
             has at least {} ahead",
            Span::seconds(life),
            Span::seconds(settings.max_job_seconds),
            Span::seconds(life / 3),
            Span::seconds(life - life / 3)
        )
    } else {
        format!("every leaf ends with the cluster, {} after its creation", Span::seconds(life))
    };
    let of_theft = format!(
        "Ray checks no CRL: a stolen or revoked leaf key works for up to {}{}",
        Span::seconds(life),
        if settings.ends_unix == 0 { "; a shorter max-job shortens that" } else { "" }
    );
    vec![of_leaves, of_theft]
}

fn tunnel_notes(settings: &v1::Settings) -> Vec<String> {
    let (life, grace) = (settings.leaf_life_seconds, grace_seconds(settings));
    let mut notes = vec![format!(
        "mode tunnel: a leaf lives {} and is renewed after a third ({}); no process of Ray holds one, so \
         max-job does not bind it",
        Span::seconds(life),
        Span::seconds(life / 3)
    )];
    notes.push(if grace == 0 {
        format!(
            "tunnel-grace is 0: where the CA is away for longer than {}, leaves end, flows are cut, and the \
             cluster stops",
            Span::seconds(life - life / 3)
        )
    } else {
        format!(
            "while an agent cannot reach the CA, a peer's leaf that has ended counts for another {}: a key \
             stolen then works for up to leaf life + grace = {}; a revocation that arrives ends it at once",
            Span::seconds(grace),
            Span::seconds(life.saturating_add(grace))
        )
    });
    if life / 3 < RENEWED_OFTEN_SECONDS {
        notes.push(format!(
            "the price of leaf-life {}: each node asks for {} certificates a day instead of 3, and a CA that \
             is away for {} leaves nodes with a leaf that has ended",
            Span::seconds(life),
            86_400 / (life / 3).max(1),
            Span::seconds(life - life / 3)
        ));
    }
    if settings.ray_client || !settings.driver_ranges.is_empty() {
        notes.push(
            "mode tunnel: drivers outside the cluster (ray-client, driver-ranges) reach no port of Ray, \
             which speaks no TLS there; run drivers on members, or come through SSH"
                .to_owned(),
        );
    }
    if !settings.admin_ranges.is_empty() || !settings.scraper_ranges.is_empty() {
        notes.push(
            "mode tunnel covers members: what admin-ranges and scraper-ranges reach, Ray's HTTP ports, \
             they reach in plaintext, as in mode files"
                .to_owned(),
        );
    }
    notes
}

/// How long flows go on with a peer whose leaf has ended, while the CA cannot be reached.
fn grace_seconds(settings: &v1::Settings) -> i64 {
    settings.tunnel_grace_seconds.unwrap_or(TUNNEL_GRACE_DEFAULT)
}

/// What the mode makes of the two lives a leaf may have.
fn derive_leaf_life(settings: &mut v1::Settings) {
    let files = match settings.files_leaf_life_seconds {
        0 => settings.leaf_life_seconds,
        files => files,
    };
    (settings.leaf_life_seconds, settings.files_leaf_life_seconds) = match settings.mode() {
        v1::Mode::Tunnel => {
            let life = match settings.tunnel_leaf_life_seconds {
                0 => TUNNEL_LEAF_LIFE_DEFAULT,
                life => life,
            };
            (life, files)
        }
        v1::Mode::Files | v1::Mode::Unspecified => (files, 0),
    };
}

fn set_leaf_life(settings: &mut v1::Settings, life: Duration) -> Result<(), Refusal> {
    if !TUNNEL_LEAF_LIFE.contains(&life) {
        let (least, most) = (*TUNNEL_LEAF_LIFE.start(), *TUNNEL_LEAF_LIFE.end());
        return Err(invalid(format!(
            "leaf-life {} cannot hold: a leaf of mode tunnel is renewed after a third ({}) and must outlive \
             a CA that is away for the other two ({}); give {} to {}. In mode files a leaf lives 2 x max-job",
            Span(life),
            Span(life / 3),
            Span(life - life / 3),
            Span(least),
            Span(most)
        )));
    }
    settings.tunnel_leaf_life_seconds = seconds(life);
    derive_leaf_life(settings);
    Ok(())
}

fn set_grace(settings: &mut v1::Settings, grace: Duration) -> Result<(), Refusal> {
    if !TUNNEL_GRACE.contains(&grace) {
        let life = match settings.tunnel_leaf_life_seconds {
            0 => TUNNEL_LEAF_LIFE_DEFAULT,
            life => life,
        };
        let life = Duration::from_secs(life.unsigned_abs());
        return Err(invalid(format!(
            "tunnel-grace {} cannot hold: a stolen key would work for leaf life + grace = {} + {} = {} while \
             the CA is away; give {} to {}",
            Span(grace),
            Span(life),
            Span(grace),
            Span(life.saturating_add(grace)),
            Span(*TUNNEL_GRACE.start()),
            Span(*TUNNEL_GRACE.end())
        )));
    }
    settings.tunnel_grace_seconds = Some(seconds(grace));
    Ok(())
}

fn defaults() -> v1::Settings {
    v1::Settings {
        leaf_life_seconds: 0,
        mode: v1::Mode::Files.into(),
        isolation: v1::Isolation::Off.into(),
        port_plan: Some(ports::default_plan()),
        admin_ranges: Vec::new(),
        scraper_ranges: Vec::new(),
        driver_ranges: Vec::new(),
        lease_seconds: 86_400,
        ray_token: true,
        ray_client: false,
        max_job_seconds: 0,
        ends_unix: 0,
        trust_ranges: false,
        revoked_keeps_ray: false,
        tunnel_leaf_life_seconds: 0,
        tunnel_grace_seconds: None,
        files_leaf_life_seconds: 0,
    }
}

fn set_max_job(settings: &mut v1::Settings, max_job: Duration) -> Result<(), Refusal> {
    if !MAX_JOB.contains(&max_job) {
        let (least, most) = (*MAX_JOB.start(), *MAX_JOB.end());
        return Err(invalid(format!(
            "max-job {} cannot hold: a leaf lives 2 x max-job = {}, and its life is from {} to {}; \
             give a max-job from {} to {}",
            Span(max_job),
            Span(max_job.saturating_mul(2)),
            Span(least * 2),
            Span(most * 2),
            Span(least),
            Span(most)
        )));
    }
    settings.max_job_seconds = seconds(max_job);
    let files = 2 * settings.max_job_seconds;
    match settings.mode() {
        v1::Mode::Tunnel => settings.files_leaf_life_seconds = files,
        v1::Mode::Files | v1::Mode::Unspecified => settings.leaf_life_seconds = files,
    }
    Ok(())
}

fn set_ranges(ranges: &mut Vec<String>, key: &str, value: &str) -> Result<(), Refusal> {
    let parsed = value
        .split(',')
        .filter(|range| !range.is_empty())
        .map(|range| range.parse::<AddressRange>().map(|range| range.to_string()))
        .collect::<Result<Vec<_>, _>>()
        .map_err(|e| invalid(format!("{key}: {e}")))?;
    if parsed.len() > RANGES_MAX {
        return Err(invalid(format!("{key}: at most {RANGES_MAX} ranges")));
    }
    *ranges = parsed;
    Ok(())
}

fn set_collectives(plan: &mut v1::PortPlan, value: &str) -> Result<(), Refusal> {
    let range = if value == "none" {
        Some((0, 0))
    } else {
        value.split_once('-').and_then(|(min, max)| Some((port_number(min)?, port_number(max)?)))
    };
    let (min, max) = range
        .filter(|(min, max)| min <= max)
        .ok_or_else(|| wanted("collective-ports", value, "MIN-MAX or none"))?;
    (plan.collective_min, plan.collective_max) = (min, max);
    Ok(())
}

fn set_port(plan: &mut v1::PortPlan, name: &str, value: &str) -> Result<(), Refusal> {
    let port = port_number(value).ok_or_else(|| {
        wanted(&format!("port.{}", excerpt(name)), value, "a port from 1 to 65535")
    })?;
    let place = match name {
        "worker_min" => Some(&mut plan.worker_min),
        "worker_max" => Some(&mut plan.worker_max),
        _ => PORTS.iter().find(|row| row.name == name).and_then(|row| row.port.place(plan)),
    };
    let Some(place) = place else {
        return Err(invalid(format!("there is no port named {:?}", excerpt(name))));
    };
    *place = port;
    Ok(())
}

fn plan(settings: &mut v1::Settings) -> &mut v1::PortPlan {
    settings.port_plan.get_or_insert_default()
}

fn port_number(text: &str) -> Option<u32> {
    text.parse::<u16>().ok().filter(|port| *port != 0).map(u32::from)
}

fn on_off(key: &str, value: &str) -> Result<bool, Refusal> {
    match value {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err(wanted(key, value, "on or off")),
    }
}

fn duration(key: &str, value: &str) -> Result<Duration, Refusal> {
    if value == "0" {
        return Ok(Duration::ZERO);
    }
    humantime::parse_duration(value).map_err(|_| wanted(key, value, "a time such as 20d or 48h"))
}

fn check_range(
    key: &str,
    value: Duration,
    range: &RangeInclusive<Duration>,
) -> Result<(), Refusal> {
    if range.contains(&value) {
        return Ok(());
    }
    Err(invalid(format!(
        "{key} {} is outside {} to {}",
        Span(value),
        Span(*range.start()),
        Span(*range.end())
    )))
}

fn seconds(duration: Duration) -> i64 {
    i64::try_from(duration.as_secs()).expect("checked to be at most some months")
}

fn wanted(key: &str, value: &str, what: &str) -> Refusal {
    invalid(format!("{key}: {:?} is not {what}", excerpt(value)))
}

fn invalid(text: String) -> Refusal {
    Refusal::SettingInvalid(text)
}

/// The beginning of a text from outside, for an error.
pub(crate) fn excerpt(text: &str) -> String {
    text.chars().take(60).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leaf_life_is_twice_the_longest_job_within_its_bounds() {
        let minute = Duration::from_secs(60);
        let day = minute * 1_440;
        for (max_job, good) in [
            (minute * 2, true),
            (minute * 2 - Duration::from_secs(1), false),
            (day * 40, true),
            (day * 40 + Duration::from_secs(1), false),
        ] {
            let settings = for_max_job(max_job);
            assert_eq!(settings.is_ok(), good, "{max_job:?}");
            if let Ok(settings) = settings {
                assert_eq!(settings.leaf_life_seconds, 2 * seconds(max_job));
            }
        }
    }

    #[test]
    fn the_price_of_a_long_life_is_told() {
        let day = Duration::from_secs(86_400);
        let job = notes(&for_max_job(20 * day).unwrap()).join("\n");
        assert!(job.contains("a stolen or revoked leaf key works for up to 40d"), "{job}");
        let life = notes(&for_max_life(2 * day, 1_764_000_000).unwrap()).join("\n");
        assert!(life.contains("works for up to 2d") && !life.contains("max-job"), "{life}");
    }

    #[test]
    fn the_default_plan_holds() {
        assert_eq!(check(&defaults()), Ok(()));
    }

    #[test]
    fn changes_are_applied_or_refused_in_words() {
        let table = [
            ("isolation=enforce", true),
            ("isolation=on", false),
            ("mode=tunnel", true),
            ("leaf-life=1h", true),
            ("leaf-life=60s", true),
            ("leaf-life=59s", false),
            ("leaf-life=7d", true),
            ("leaf-life=8d", false),
            ("tunnel-grace=0", true),
            ("tunnel-grace=30d", true),
            ("tunnel-grace=31d", false),
            ("lease=24h", true),
            ("lease=1s", false),
            ("lease=24", false),
            ("ray-token=off", true),
            ("ray-client=yes", false),
            ("admin-ranges=10.0.0.0/8,fd00::/8", true),
            ("admin-ranges=10.0.0.0/40", false),
            ("admin-ranges=", true),
            ("port.gcs=7000", true),
            ("port.gcs=0", false),
            ("port.gcs=70000", false),
            ("port.nothing=1", false),
            ("collective-ports=20000-20100", true),
            ("collective-ports=2-1", false),
            ("collective-ports=none", true),
            ("colour=blue", false),
            ("max-job", false),
        ];
        for (change, good) in table {
            assert_eq!(apply(&mut defaults(), change).is_ok(), good, "{change}");
        }
    }

    #[test]
    fn mode_tunnel_needs_enforce_and_the_token_and_says_which_is_missing() {
        for (changes, missing) in [
            (&["mode=tunnel"][..], Some("set isolation=enforce with it")),
            (&["mode=tunnel", "isolation=audit"], Some("set isolation=enforce with it")),
            (
                &["mode=tunnel", "isolation=enforce", "ray-token=off"],
                Some("set ray-token=on with it"),
            ),
            (&["mode=tunnel", "ray-token=off"], Some("set isolation=enforce ray-token=on with it")),
            (&["mode=tunnel", "isolation=enforce"], None),
            (&["isolation=enforce", "mode=tunnel"], None),
            (&["ray-token=off"], None),
        ] {
            let checked = check(&with(changes));
            let said = checked.as_ref().err().map(ToString::to_string).unwrap_or_default();
            assert_eq!(checked.is_err(), missing.is_some(), "{changes:?}: {said}");
            assert!(missing.is_none_or(|missing| said.contains(missing)), "{changes:?}: {said}");
        }
    }

    #[test]
    fn the_mode_decides_which_life_a_leaf_has_and_the_way_back_restores_it() {
        let day = 86_400;
        let mut settings = for_max_job(Duration::from_secs(20 * 86_400)).unwrap();
        for (change, life) in [
            ("mode=tunnel", day),
            ("leaf-life=1h", 3_600),
            ("max-job=10d", 3_600),
            ("mode=files", 20 * day),
            ("leaf-life=2h", 20 * day),
            ("mode=tunnel", 7_200),
            ("mode=tunnel", 7_200),
            ("mode=files", 20 * day),
        ] {
            apply(&mut settings, change).unwrap();
            assert_eq!(settings.leaf_life_seconds, life, "{change}");
        }
        let mut ephemeral = for_max_life(Duration::from_secs(4 * 86_400), 1_764_000_000).unwrap();
        apply(&mut ephemeral, "mode=tunnel").unwrap();
        assert_eq!(ephemeral.leaf_life_seconds, day);
        apply(&mut ephemeral, "mode=files").unwrap();
        assert_eq!(ephemeral.leaf_life_seconds, 4 * day);
    }

    #[test]
    fn the_price_of_short_leaves_and_of_grace_is_told_with_its_sum() {
        let tunnel = |changes: &[&str]| {
            let mut settings = with(&["isolation=enforce", "mode=tunnel"]);
            changes.iter().for_each(|change| apply(&mut settings, change).unwrap());
            notes(&settings).join("\n")
        };
        let usual = tunnel(&[]);
        assert!(usual.contains("leaf life + grace = 4d"), "{usual}");
        assert!(!usual.contains("the price of leaf-life"), "{usual}");
        let short = tunnel(&["leaf-life=1h", "tunnel-grace=0s"]);
        assert!(short.contains("72 certificates a day instead of 3"), "{short}");
        assert!(short.contains("tunnel-grace is 0"), "{short}");
        let refused = apply(&mut defaults(), "tunnel-grace=31d").unwrap_err().to_string();
        assert!(refused.contains("1d + 31d = 32d"), "{refused}");
    }

    fn with(changes: &[&str]) -> v1::Settings {
        let mut settings = defaults();
        changes.iter().for_each(|change| apply(&mut settings, change).unwrap());
        settings
    }

    #[test]
    fn a_plan_that_covers_somebody_else_s_port_is_refused_by_name() {
        for (change, names) in [
            ("collective-ports=20-5000", "port 22 of SSH"),
            ("collective-ports=100-200", "port 111 of rpcbind"),
            ("collective-ports=2049-2049", "port 2049 of NFS"),
            ("collective-ports=7000-8000", "ports 7443-7447 of the CA"),
            ("port.gcs=7447", "ports 7443-7447 of the CA"),
            ("port.metrics_export=6818", "ports 6817-6819 of Slurm"),
            ("port.worker_max=10300", "port 10250 of the kubelet"),
            ("port.gcs=1023", "lies below 1024"),
            ("port.dashboard=9443", "port 9443 of the CA"),
        ] {
            let refused = check_guarded(&with(&[change]), &[9_443]).unwrap_err().to_string();
            assert!(refused.contains(names), "{change}: {refused}");
            assert!(refused.contains("at port"), "{change}: {refused}");
        }
        let good = ["port.gcs=1024", "collective-ports=20000-30000", "port.node_manager=7448"];
        assert_eq!(check_guarded(&with(&good), &[9_443]), Ok(()));
        assert_eq!(check_guarded(&defaults(), &[7_443, 7_444]), Ok(()));
    }

    #[test]
    fn a_range_among_the_ports_that_hosts_dial_from_is_worth_a_word() {
        for (change, said) in [
            ("collective-ports=44300-65000", Some("covers 16700 of the 28232 ports 32768-60999")),
            ("collective-ports=32000-33792", Some("covers 1025 of")),
            ("collective-ports=32000-33791", None),
            ("collective-ports=61000-65000", None),
        ] {
            let notes = notes(&with(&[change])).join("\n");
            assert_eq!(notes.contains("from which Linux dials"), said.is_some(), "{notes}");
            assert!(said.is_none_or(|said| notes.contains(said)), "{notes}");
        }
        assert!(!notes(&defaults()).join("\n").contains("from which Linux dials"));
    }

    #[test]
    fn colliding_ports_are_refused() {
        for change in [
            "port.gcs=8265",
            "port.dashboard=10050",
            "port.worker_min=10001",
            "port.worker_min=20000",
            "collective-ports=10050-10060",
        ] {
            let mut settings = defaults();
            apply(&mut settings, change).unwrap();
            assert!(check(&settings).is_err(), "{change}");
        }
    }
}
