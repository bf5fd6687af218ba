//! How many commands may wait at once, for the nodes or for the audit log. Who only reads must not keep
//! the acknowledgements from whoever revokes, nor the operators a turn from the admins.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use raymtls_proto::v1::AdminRole;

use super::Operator;
use crate::refusal::Refusal;

/// Waits of all at once.
const WATCHES_MAX: usize = 32;
/// Waits of all viewers at once: the rest is for operators.
const OF_VIEWERS_MAX: usize = 16;
/// Waits of all but admins at once: the rest is for these.
const BUT_ADMINS_MAX: usize = 28;
/// Waits of one operator.
const OF_ONE_OPERATOR_MAX: usize = 12;
/// Waits of one viewer.
const OF_ONE_VIEWER_MAX: usize = 4;

/// The waits under way.
#[derive(Debug, Default)]
pub struct Watches(Mutex<Held>);

#[derive(Debug, Default)]
struct Held {
    all: usize,
    of_viewers: usize,
    of: HashMap<String, usize>,
}

/// A wait under way, until it is dropped.
#[derive(Debug)]
pub struct Turn {
    watches: Arc<Watches>,
    actor: String,
    is_viewer: bool,
}

impl Watches {
    /// Begins one.
    ///
    /// # Errors
    /// `RateLimited`.
    pub fn begin(self: &Arc<Self>, operator: &Operator) -> Result<Turn, Refusal> {
        let is_viewer = operator.role < AdminRole::Operator;
        let (of_one_max, others_max) = if is_viewer {
            (OF_ONE_VIEWER_MAX, OF_VIEWERS_MAX)
        } else {
            let is_admin = operator.role >= AdminRole::Admin;
            (OF_ONE_OPERATOR_MAX, if is_admin { WATCHES_MAX } else { BUT_ADMINS_MAX })
        };
        let mut held = self.held();
        let of_one = held.of.get(&operator.actor).copied().unwrap_or_default();
        let others = if is_viewer { held.of_viewers } else { held.all };
        if held.all >= WATCHES_MAX || of_one >= of_one_max || others >= others_max {
            return Err(Refusal::RateLimited {
                what: "as many commands as may wait already do",
                retry_after: Duration::from_secs(5),
            });
        }
        held.all += 1;
        held.of_viewers += usize::from(is_viewer);
        *held.of.entry(operator.actor.clone()).or_default() += 1;
        Ok(Turn { watches: Arc::clone(self), actor: operator.actor.clone(), is_viewer })
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.0.lock().expect("no code panics while it holds the waits")
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut held = self.watches.held();
        held.all -= 1;
        held.of_viewers -= usize::from(self.is_viewer);
        let of_one = held.of.get_mut(&self.actor).expect("it has begun");
        *of_one -= 1;
        if *of_one == 0 {
            held.of.remove(&self.actor);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn who(number: usize, role: AdminRole) -> Operator {
        Operator { actor: format!("uid:{number}"), role, clusters: vec![] }
    }

    #[test]
    fn viewers_leave_room_for_whoever_revokes() {
        let watches = Arc::new(Watches::default());
        let begin = |number, role, count| -> Vec<_> {
            (0..count).map_while(|_| watches.begin(&who(number, role)).ok()).collect()
        };
        let one = begin(1, AdminRole::Viewer, 10);
        assert_eq!(one.len(), OF_ONE_VIEWER_MAX);
        let viewers: Vec<_> = (2..20).flat_map(|n| begin(n, AdminRole::Viewer, 10)).collect();
        assert_eq!(one.len() + viewers.len(), OF_VIEWERS_MAX);
        let first = begin(100, AdminRole::Operator, 40);
        assert_eq!(first.len(), OF_ONE_OPERATOR_MAX);
        assert!(begin(101, AdminRole::Operator, 1).is_empty(), "the rest is for admins");
        let admins = begin(0, AdminRole::Admin, 9);
        assert_eq!(admins.len(), WATCHES_MAX - BUT_ADMINS_MAX, "all are taken");
        drop(one);
        assert!(begin(101, AdminRole::Operator, 1).is_empty());
        drop((viewers, first, admins));
        let held = watches.held();
        assert_eq!((held.all, held.of_viewers, held.of.len()), (0, 0, 0));
    }
}
