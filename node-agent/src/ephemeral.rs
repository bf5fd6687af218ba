//! Whether the kernel may give a guarded port to whoever opens a connection: such a connection gets its
//! answers from that port's callers only, and a stranger's program can take a port of Ray's. Parsing
//! and judging are pure.

use std::{ops::RangeInclusive, path::Path};

use raymtls_proto::{identity::Role, ports, v1};

use crate::statedir::read_if_there;

const RANGE: &str = "/proc/sys/net/ipv4/ip_local_port_range";
const RESERVED: &str = "/proc/sys/net/ipv4/ip_local_reserved_ports";

/// Says which guarded ports of this host the kernel may hand out, and what to do.
#[must_use]
pub fn problem(settings: &v1::Settings, role: Role) -> Option<String> {
    let read = |path: &str| {
        let bytes = read_if_there(Path::new(path)).ok().flatten()?;
        Some(String::from_utf8_lossy(&bytes).into_owned())
    };
    let guarded = guarded(settings, role);
    sentence(&unreserved(&guarded, &read(RANGE)?, &read(RESERVED)?))
}

/// The ports Ray listens on here by the plan.
fn guarded(settings: &v1::Settings, role: Role) -> Vec<RangeInclusive<u16>> {
    let plan = settings.port_plan.unwrap_or_default();
    ports::of_role(role.to_proto(), settings).filter_map(|row| row.port.range(&plan)).collect()
}

/// The parts of `guarded` in the kernel's range and not among what is reserved.
fn unreserved(
    guarded: &[RangeInclusive<u16>],
    range: &str,
    reserved: &str,
) -> Vec<RangeInclusive<u16>> {
    let Some(range) = parse_range(range) else { return Vec::new() };
    let reserved = parse_reserved(reserved);
    let mut open: Vec<RangeInclusive<u16>> = Vec::new();
    let is_open = |port: &u16| range.contains(port) && !reserved.iter().any(|r| r.contains(port));
    for port in guarded.iter().cloned().flatten().filter(is_open) {
        match open.last_mut() {
            Some(last) if last.end().checked_add(1) == Some(port) => *last = *last.start()..=port,
            Some(_) | None => open.push(port..=port),
        }
    }
    open
}

fn sentence(open: &[RangeInclusive<u16>]) -> Option<String> {
    if open.is_empty() {
        return None;
    }
    let texts: Vec<String> = open
        .iter()
        .map(|range| match (range.start(), range.end()) {
            (min, max) if min == max => min.to_string(),
            (min, max) => format!("{min}-{max}"),
        })
        .collect();
    let texts = texts.join(",");
    Some(format!(
        "the kernel may give Ray's ports {texts} to other programs: \
         sysctl -w net.ipv4.ip_local_reserved_ports={texts} (with what is there already)"
    ))
}

/// `32768\t60999`
fn parse_range(text: &str) -> Option<RangeInclusive<u16>> {
    let mut words = text.split_whitespace();
    Some(words.next()?.parse().ok()?..=words.next()?.parse().ok()?)
}

/// `8080,10002-10101`, or nothing.
fn parse_reserved(text: &str) -> Vec<RangeInclusive<u16>> {
    let range = |word: &str| {
        let (min, max) = word.split_once('-').unwrap_or((word, word));
        Some(min.trim().parse().ok()?..=max.trim().parse().ok()?)
    };
    text.trim().split(',').filter_map(range).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_may_hand_out_is_told() {
        let guarded = [6_379..=6_379, 10_002..=10_101, 44_217..=44_217];
        let linux = "32768\t60999\n";
        for (name, range, reserved, open) in [
            ("Linux as it comes", linux, "\n", "44217"),
            ("reserved", linux, "44217\n", ""),
            ("reserved within a range", linux, "1,44000-45000\n", ""),
            ("a wide range", "1024 65535", "44217", "6379,10002-10101"),
            ("a part is reserved", "10050 65535", "10060-10101,44217", "10050-10059"),
            ("at both ends", "6379 10002", "", "6379,10002"),
            ("unreadable", "", "", ""),
        ] {
            let told = sentence(&unreserved(&guarded, range, reserved));
            let expected = (!open.is_empty()).then(|| format!("ports {open} to other"));
            match (told, expected) {
                (None, None) => {}
                (Some(told), Some(part)) => assert!(told.contains(&part), "{name}: {told}"),
                (told, expected) => panic!("{name}: {told:?} is not {expected:?}"),
            }
        }
    }

    #[test]
    fn the_ports_of_a_role_are_looked_at() {
        let settings =
            v1::Settings { port_plan: Some(ports::default_plan()), ..v1::Settings::default() };
        assert!(guarded(&settings, Role::Head).contains(&(44_217..=44_217)));
        assert!(!guarded(&settings, Role::Worker).contains(&(44_217..=44_217)));
        assert!(guarded(&settings, Role::Driver).is_empty());
    }
}
