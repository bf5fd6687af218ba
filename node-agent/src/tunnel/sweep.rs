//! Leaves end while flows live. Each peer with flows is greeted once in a while, so that its newest
//! leaf is known; one whose newest leaf has ended is cut. It also notices new rules and leaves.

use std::{net::IpAddr, os::unix::fs::MetadataExt, path::PathBuf, sync::Arc, time::Duration};

use tokio::{sync::Semaphore, time::Instant};

use super::{
    credentials,
    dial::{Dialled, dial},
    expiry::{Away, Standing},
    flows::Direction,
    header::Header,
    reason::Reason,
    state::{Tunnel, say_cuts},
};

/// How often ends and files are looked at.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// The same of a process that drains: nobody asks it to reload any more.
const LOOK_INTERVAL_DRAINING: Duration = Duration::from_millis(100);
/// Bounds of the time between two pings of a peer; in between, this part of what its leaf has left.
const PING_INTERVAL_MIN: Duration = Duration::from_secs(1);
const PING_INTERVAL_MAX: Duration = Duration::from_secs(60);
const LIFE_PARTS: u32 = 12;
/// Most pings at one time.
const PINGS_MAX: usize = 32;
/// Files that were of no use are tried again after so many looks.
const TRY_AGAIN_LOOKS: u64 = 5;

/// Looks for as long as it is polled.
pub(crate) async fn sweep(tunnel: Arc<Tunnel>) {
    let pings = Arc::new(Semaphore::new(PINGS_MAX));
    let mut seen = seen(&tunnel).await;
    let mut pinged: Option<Instant> = None;
    let mut looks = 0_u64;
    loop {
        let interval = if tunnel.is_draining() { LOOK_INTERVAL_DRAINING } else { LOOK_INTERVAL };
        tokio::time::sleep(interval).await;
        looks += 1;
        let now_seen = self::seen(&tunnel).await;
        let again = tunnel.stale().is_some() && looks.is_multiple_of(TRY_AGAIN_LOOKS);
        if now_seen != seen || again {
            seen = now_seen;
            reload(&tunnel).await;
        }
        cut_expired(&tunnel);
        // Judged at each look: flows that began since the last round may be of leaves that end sooner.
        if pinged.is_none_or(|at| at.elapsed() >= ping_interval(&tunnel)) {
            pinged = Some(Instant::now());
            ping_all(&tunnel, &pings);
        }
    }
}

type Seen = Vec<Option<(u64, i64, i64, u64)>>;

/// What tells that a file is another one. A look that takes long delays the next one, no flow.
async fn seen(tunnel: &Tunnel) -> Seen {
    let files = credentials::files(&tunnel.rules_path, &tunnel.in_force().rules.key_folder);
    let look = move || {
        let one = |path: PathBuf| {
            let metadata = std::fs::metadata(path).ok()?;
            let (ino, len) = (metadata.ino(), metadata.len());
            Some((ino, metadata.mtime(), metadata.mtime_nsec(), len))
        };
        files.into_iter().map(one).collect()
    };
    tokio::task::spawn_blocking(look).await.unwrap_or_default()
}

async fn reload(tunnel: &Arc<Tunnel>) {
    let before = tunnel.stale();
    let reading = tunnel.clone();
    let read = tokio::task::spawn_blocking(move || reading.reload()).await;
    match read {
        Ok(Ok(reloaded)) => {
            let (generation, serial) = (reloaded.generation, reloaded.serial);
            tracing::debug!(generation, %serial, "rules and key folder are in force");
        }
        Ok(Err(error)) => {
            if before.as_deref() != Some(&error.to_string()) {
                tracing::error!(%error, "what was in force stays so");
            }
        }
        Err(error) => tracing::error!(%error, "a reload broke off"),
    }
}

fn cut_expired(tunnel: &Tunnel) {
    let now = tunnel.now_unix();
    let away = Away::of(&tunnel.in_force().rules, now);
    let cuts = tunnel.flows.cut(|_, newest, _| {
        let is_over = away.standing(newest.not_after_unix, now) == Standing::Over;
        is_over.then_some(Reason::Expired)
    });
    say_cuts(&cuts);
}

/// By what the leaf that ends first has left: it must be seen renewed before. The life as the leaf says it would not do:
/// a CA dates leaves back.
fn ping_interval(tunnel: &Tunnel) -> Duration {
    let ends = tunnel.flows.peers().into_iter().map(|peer| peer.not_after_unix);
    interval_before(ends, tunnel.now_unix())
}

fn interval_before(ends: impl Iterator<Item = i64>, now: i64) -> Duration {
    let left = ends
        .filter_map(|end| u64::try_from(end.saturating_sub(now)).ok())
        .filter(|left| *left > 0)
        .min();
    let part = left.map_or(PING_INTERVAL_MAX, |left| Duration::from_secs(left) / LIFE_PARTS);
    part.clamp(PING_INTERVAL_MIN, PING_INTERVAL_MAX)
}

fn ping_all(tunnel: &Arc<Tunnel>, pings: &Arc<Semaphore>) {
    // Those of the last round are still under way: who does not answer delays the others, and is
    // cut by its leaf all the same.
    if pings.available_permits() < PINGS_MAX {
        return;
    }
    let peers: Vec<IpAddr> = tunnel.flows.peers().into_iter().map(|peer| peer.address).collect();
    for address in peers {
        let (tunnel, pings) = (tunnel.clone(), pings.clone());
        tokio::spawn(async move {
            let Ok(_permit) = pings.acquire().await else { return };
            ping(&tunnel, address).await;
        });
    }
}

async fn ping(tunnel: &Tunnel, address: IpAddr) {
    match dial(tunnel, Header::Ping { address }).await {
        Ok(Dialled { wire, leaf }) => {
            tunnel.flows.saw(address, leaf);
            wire.finish().await;
        }
        Err(refused) => {
            tunnel.refused(Direction::Out, (address, tunnel.inbound_port).into(), &refused);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_is_pinged_several_times_before_its_leaf_ends() {
        for (ends, seconds) in [
            (vec![1_060], 5),
            (vec![87_400, 1_036], 3),
            (vec![1_002], 1),
            (vec![87_400], 60),
            // What has ended hurries nobody.
            (vec![990, 87_400], 60),
            (vec![], 60),
        ] {
            let interval = interval_before(ends.iter().copied(), 1_000);
            assert_eq!(interval, Duration::from_secs(seconds), "{ends:?}");
        }
    }
}
