//! Refusals in the log: each kind from each peer once in a while, with how many were left out. A
//! stranger who knocks a thousand times a second fills no disk.

use std::{collections::HashMap, net::IpAddr, sync::Mutex, time::Duration};

use super::reason::Reason;

/// The same is said again after this time.
const AGAIN_AFTER: Duration = Duration::from_secs(10);
/// Kinds and peers that are told apart.
const KEPT_MAX: usize = 1024;

/// What was said when.
#[derive(Debug, Default)]
pub(crate) struct Quiet(Mutex<HashMap<(Reason, IpAddr), Said>>);

#[derive(Clone, Copy, Debug)]
struct Said {
    at: Duration,
    left_out: u64,
}

impl Quiet {
    /// Whether to say it now, and how many like it were left out since the last time.
    pub(crate) fn says(&self, reason: Reason, peer: IpAddr, now: Duration) -> Option<u64> {
        let mut said = self.0.lock().expect("no code panics while it holds what was said");
        if said.len() >= KEPT_MAX && !said.contains_key(&(reason, peer)) {
            said.retain(|_, said| now.saturating_sub(said.at) < AGAIN_AFTER);
            // Strangers with many addresses: what is over the bound is counted, not said.
            if said.len() >= KEPT_MAX {
                return None;
            }
        }
        match said.get_mut(&(reason, peer)) {
            Some(last) if now.saturating_sub(last.at) < AGAIN_AFTER => {
                last.left_out += 1;
                None
            }
            Some(last) => {
                let left_out = last.left_out;
                *last = Said { at: now, left_out: 0 };
                Some(left_out)
            }
            None => {
                said.insert((reason, peer), Said { at: now, left_out: 0 });
                Some(0)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_is_said_once_in_a_while_with_what_was_left_out() {
        let quiet = Quiet::default();
        let peer = "192.0.2.9".parse().unwrap();
        let at = |second| Duration::from_secs(second);
        assert_eq!(quiet.says(Reason::Expired, peer, at(0)), Some(0));
        assert_eq!(quiet.says(Reason::Expired, peer, at(9)), None);
        assert_eq!(quiet.says(Reason::Revoked, peer, at(9)), Some(0), "another reason");
        assert_eq!(quiet.says(Reason::Expired, peer, at(10)), Some(1));
    }

    #[test]
    fn many_strangers_make_no_more_lines_than_the_bound() {
        let quiet = Quiet::default();
        let peers = (0..5_000_u32).map(|n| IpAddr::from(n.to_be_bytes()));
        let said = peers.filter(|p| quiet.says(Reason::NotAMember, *p, Duration::ZERO).is_some());
        assert_eq!(said.count(), KEPT_MAX);
    }
}
