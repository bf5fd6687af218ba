//! Closes the sockets of hosts that were blocked: beside the loop, since `ss` may take long, and again
//! where it failed. The table drops their packets all the while.

use std::{collections::BTreeSet, net::IpAddr, ops::RangeInclusive, time::Duration};

use raymtls_proto::clock::Clock;
use tokio::sync::oneshot;

use super::{Agent, Event};
use crate::{
    isolation::{Verdict, table::Kernel},
    state,
};

/// So long an acknowledgement waits for the number of sockets.
const WAIT: Duration = Duration::from_millis(500);

/// Addresses by what of theirs is closed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Addresses {
    /// Sockets on the cluster's ports.
    pub(super) some: BTreeSet<IpAddr>,
    /// All sockets.
    pub(super) all: BTreeSet<IpAddr>,
}

impl Addresses {
    fn is_empty(&self) -> bool {
        self.some.is_empty() && self.all.is_empty()
    }
}

/// How far it has come.
#[derive(Debug, Default)]
pub(super) struct Cutting {
    /// Blocked, and their sockets are not closed yet.
    left: Addresses,
    under_way: bool,
    failures: u32,
    retry_at: Option<Duration>,
    pub(super) closed: u32,
    pub(super) problem: Option<String>,
}

/// How one run ended.
#[derive(Debug)]
pub(super) struct Done {
    of: Addresses,
    closed: usize,
    error: Option<String>,
}

impl Cutting {
    pub(super) fn add(&mut self, fresh: Addresses) {
        self.left.some.extend(fresh.some);
        self.left.all.extend(fresh.all);
        if !self.left.is_empty() {
            self.retry_at = None;
        }
    }

    pub(super) fn forget(&mut self) {
        (self.left, self.problem, self.retry_at) = (Addresses::default(), None, None);
    }
}

impl Agent {
    /// Closes what is to be closed. It waits a moment, so that the CA hears how many there were.
    pub(super) async fn cut(&mut self) {
        let Some(mut ended) = self.begin_cut() else { return };
        let done = tokio::time::timeout(WAIT, &mut ended).await.ok().and_then(Result::ok);
        // What ends from here on comes as an event.
        ended.close();
        if let Some(done) = done.or_else(|| ended.try_recv().ok()) {
            self.cut_ended(done);
        }
    }

    /// What failed is tried again.
    pub(super) fn tend_cut(&mut self, now: Duration) {
        if self.isolation.cutting.retry_at.is_none_or(|at| now >= at) {
            drop(self.begin_cut());
        }
    }

    pub(super) fn cut_ended(&mut self, done: Done) {
        let cutting = &mut self.isolation.cutting;
        cutting.under_way = false;
        cutting.closed = u32::try_from(done.closed).unwrap_or(u32::MAX);
        tracing::info!(closed = done.closed, "sockets of blocked hosts closed");
        match done.error {
            None => {
                cutting.left.some.retain(|address| !done.of.some.contains(address));
                cutting.left.all.retain(|address| !done.of.all.contains(address));
                (cutting.failures, cutting.retry_at, cutting.problem) = (0, None, None);
            }
            Some(error) => {
                let wait = state::backoff(cutting.failures, rand::random());
                cutting.failures = cutting.failures.saturating_add(1);
                cutting.retry_at = Some(self.clock.elapsed() + wait);
                tracing::warn!(%error, retry_in = ?wait, "sockets of blocked hosts stay open");
                cutting.problem = Some(format!(
                    "packets of blocked hosts are dropped, but their sockets stay open: {error}"
                ));
            }
        }
    }

    fn begin_cut(&mut self) -> Option<oneshot::Receiver<Done>> {
        let loaded = self.isolation.loaded.as_ref()?;
        let cutting = &mut self.isolation.cutting;
        let (some, all) = (&loaded.blocked, &loaded.blocked_entirely);
        cutting.left.some.retain(|address| some.contains(address));
        cutting.left.all.retain(|address| all.contains(address));
        if cutting.left.is_empty() && !cutting.under_way {
            cutting.problem = None;
        }
        if cutting.under_way || cutting.left.is_empty() || loaded.verdict != Verdict::Drop {
            return None;
        }
        cutting.under_way = true;
        let (kernel, ports) = (self.config.isolation.kernel.clone(), loaded.ports.clone());
        let (of, events) = (cutting.left.clone(), self.event_sender.clone());
        let (sender, ended) = oneshot::channel();
        tokio::spawn(async move {
            let done = close(&kernel, of, &ports).await;
            if let Err(done) = sender.send(done) {
                let _ = events.send(Event::Cut(done)).await;
            }
        });
        Some(ended)
    }
}

/// Each of the two whatever becomes of the other.
async fn close(kernel: &Kernel, of: Addresses, ports: &[RangeInclusive<u16>]) -> Done {
    let on_ports = kernel.cut(&of.some, Some(ports)).await;
    let everywhere = kernel.cut(&of.all, None).await;
    let closed = [&on_ports, &everywhere].into_iter().flatten().sum();
    Done { of, closed, error: on_ports.and(everywhere).err().map(|error| error.to_string()) }
}
