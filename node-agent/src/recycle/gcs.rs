//! gcs_server alone, executed again in its own place: the same program, words, environment, user, groups,
//! limits, control group and namespaces, with the paths of a new key folder. Its state lies on disk or in Redis,
//! so nodes, drivers, actors and tasks go on; they give it 60 s to come back (Ray 2.60).
//!
//! The child that will be gcs_server is ready before the old one is ended, and waits for its end by itself:
//! once it is told to go, nothing that happens to this command leaves the cluster without a gcs_server.

use std::{
    collections::BTreeSet,
    ffi::OsString,
    net::SocketAddr,
    os::{
        fd::{AsFd, OwnedFd},
        unix::ffi::OsStringExt,
    },
    process::Stdio,
    time::Duration,
};

use rustix::process::{
    Pid, PidfdFlags, PidfdGetfdFlags, Signal, pidfd_getfd, pidfd_open, pidfd_send_signal,
};
use tokio::time::{Instant, timeout};

use super::{
    command::Site,
    find::{self, Daemon, Found, Gcs},
    launch::{Going, Process, Ready, Request, same_environment},
    node::{Broken, broken, new_folder},
    plan::Step,
    prove,
    rays::{Asker, Survey, TASK_NODES_MAX},
    report::{Progress, seconds},
};
use crate::{rayenv::RayEnv, served::kind::printable};

/// How long it may take to end by itself. Ray 2.60 flushes events for longer, and what counts is on disk by then.
const GRACE: Duration = Duration::from_secs(2);
/// Failed tasks that are told.
const FAILED_NAMED: usize = 5;

const UNTOUCHED: &str = "nothing was ended: gcs_server runs as before";

/// Everything that is needed to do it.
pub(super) struct Work<'a> {
    pub(super) site: &'a Site,
    pub(super) found: &'a Found,
    pub(super) gcs: &'a Gcs,
    pub(super) before: &'a Survey,
    pub(super) old: &'a BTreeSet<String>,
}

impl Work<'_> {
    /// Does it, and tells the serial that is served now.
    pub(super) async fn run(&self, progress: &mut Progress) -> Result<Vec<String>, Broken> {
        let begun = Instant::now();
        let prepared = self.prepare().await.map_err(|why| broken(Step::Prepare, why, UNTOUCHED))?;
        let Prepared { ready, handle, files, serial } = prepared;
        let folder = files.folder_name().unwrap_or_default();
        progress.done(
            Step::Prepare,
            begun,
            format!("new key folder {folder}, and a child in the place of gcs_server"),
        );
        let ended_at = self.replace(ready, &handle, progress).await?;
        self.prove_served(&serial, ended_at, progress).await?;
        self.prove_task(progress).await?;
        Ok(vec![serial])
    }

    async fn prepare(&self) -> Result<Prepared, String> {
        let text = |error: std::io::Error| error.to_string();
        let daemon = &self.gcs.daemon;
        let handle = hold(daemon)?;
        let files = new_folder(self.site, self.old).await?.env;
        let serial = prove::serial_of(&files)?;
        // The very files it writes to, whatever they are.
        let its = |number| {
            pidfd_getfd(handle.as_fd(), number, PidfdGetfdFlags::empty()).map_err(Into::into)
        };
        let (out, err): (OwnedFd, OwnedFd) = (its(1).map_err(text)?, its(2).map_err(text)?);
        let request = in_place_of(daemon, self.site.uid, &files);
        let ready = Ready::prepare(&request, Stdio::from(out), Stdio::from(err)).await;
        Ok(Prepared { ready: ready.map_err(|error| error.to_string())?, handle, files, serial })
    }

    /// Tells the child to go, then ends the old one: in this order nothing is lost by what happens to us.
    async fn replace(
        &self,
        ready: Ready,
        handle: &OwnedFd,
        progress: &mut Progress,
    ) -> Result<Instant, Broken> {
        let begun = Instant::now();
        let pid = self.gcs.daemon.pid;
        progress.say(&format!("end gcs_server {pid}: its place is taken at once"));
        let kept = |why: String| broken(Step::Replace, why, UNTOUCHED);
        let going = ready.go().await.map_err(|error| kept(error.to_string()))?;
        pidfd_send_signal(handle, Signal::TERM).map_err(|error| {
            kept(format!(
                "gcs_server {pid} cannot be ended: {error}; the capability KILL is needed"
            ))
        })?;
        let child = self.become_gcs(going, handle).await?;
        progress.done(
            Step::Replace,
            begun,
            format!("gcs_server {} took the place of {pid}", child.unwrap_or_default()),
        );
        Ok(begun)
    }

    async fn become_gcs(&self, going: Going, handle: &OwnedFd) -> Result<Option<u32>, Broken> {
        let lost = |why: String| broken(Step::Replace, why, &self.lost());
        let mut becoming = Box::pin(going.become_program());
        let child = match timeout(GRACE, &mut becoming).await {
            Ok(child) => child,
            Err(_) => {
                // Of its state nothing is lost: what it answered for is on disk.
                let _ = pidfd_send_signal(handle, Signal::KILL);
                becoming.await
            }
        };
        Ok(child.map_err(|error| lost(error.to_string()))?.id())
    }

    async fn prove_served(
        &self,
        serial: &str,
        ended_at: Instant,
        progress: &mut Progress,
    ) -> Result<(), Broken> {
        let begun = Instant::now();
        let lost = |why: String| broken(Step::ProveServed, why, &self.lost());
        let address: SocketAddr = self
            .found
            .gcs_address
            .parse()
            .or_else(|_| format!("127.0.0.1:{}", self.gcs.port).parse())
            .map_err(|_| lost(format!("{} is no address", printable(&self.found.gcs_address))))?;
        let look = prove::look_at(self.site).map_err(lost)?;
        prove::wait_for_serial(&look, address, serial).await.map_err(lost)?;
        let since = seconds(ended_at.elapsed());
        progress.done(
            Step::ProveServed,
            begun,
            format!("{address} serves {serial}, {since} after the old one was ended"),
        );
        Ok(())
    }

    /// Every node that was there runs a task, and every driver that was there is still known.
    async fn prove_task(&self, progress: &mut Progress) -> Result<(), Broken> {
        let begun = Instant::now();
        progress.say("run a task on every node");
        let state = "gcs_server runs with the new leaf, and not everybody is back: see `ray status`, and the raylets' \
                     logs on the nodes named";
        let failed = |why: String| broken(Step::ProveTask, why, state);
        let files = self.site.current_files().map_err(failed)?;
        let found =
            find::find(&self.site.whose()).await.map_err(|error| failed(error.to_string()))?;
        let asker = Asker { found: &found, uid: self.site.uid, files };
        let nodes: Vec<String> =
            self.before.nodes.iter().take(TASK_NODES_MAX).map(|node| node.id.clone()).collect();
        let ran = asker.tasks(&nodes).await.map_err(|error| failed(error.to_string()))?;
        let without: Vec<String> = ran
            .iter()
            .filter(|ran| !ran.error.is_empty())
            .take(FAILED_NAMED)
            .map(|ran| format!("{}: {}", printable(&ran.node), printable(&ran.error)))
            .collect();
        if !without.is_empty() || ran.len() < nodes.len() {
            return Err(failed(format!(
                "a task ran on {} of {} nodes: {}",
                ran.len() - without.len(),
                nodes.len(),
                without.join("; ")
            )));
        }
        let after = asker.survey().await.map_err(|error| failed(error.to_string()))?;
        let gone = gone(self.before, &after);
        let detail = format!(
            "a task ran on each of {} nodes; drivers known before: {}",
            nodes.len(),
            self.before.drivers.len()
        );
        if !gone.is_empty() {
            progress.say(&format!(
                "not there any more, which may be their own doing: {}",
                gone.join(", ")
            ));
        }
        progress.done(Step::ProveTask, begun, format!("{detail}, gone: {}", gone.len()));
        Ok(())
    }

    fn lost(&self) -> String {
        format!(
            "the cluster may be without gcs_server, and its nodes end 60 s after they lost it: see {} and \
             gcs_server.err in the session's logs; start the head again by hand with the same storage",
            printable(&self.found.session)
        )
    }
}

struct Prepared {
    ready: Ready,
    handle: OwnedFd,
    files: RayEnv,
    serial: String,
}

/// Drivers that Ray knew before and does not know now.
fn gone(before: &Survey, after: &Survey) -> Vec<String> {
    let still = |job: &str| after.drivers.iter().any(|driver| driver.job == job);
    before
        .drivers
        .iter()
        .filter(|driver| !still(&driver.job))
        .map(super::rays::Driver::name)
        .collect()
}

/// By number and start the process is the one that was looked at.
fn hold(daemon: &Daemon) -> Result<OwnedFd, String> {
    let gone = || format!("gcs_server {} has ended", daemon.pid);
    let pid = Pid::from_raw(daemon.pid).ok_or_else(gone)?;
    let handle = pidfd_open(pid, PidfdFlags::empty()).map_err(|_| gone())?;
    let is_same = find::stat(daemon.pid).is_ok_and(|stat| stat.started == daemon.started);
    if is_same { Ok(handle) } else { Err(gone()) }
}

fn in_place_of(daemon: &Daemon, uid: u32, files: &RayEnv) -> Request {
    let words = daemon.words.iter().map(|word| OsString::from_vec(word.clone()));
    Request {
        like: Process { pid: daemon.pid, started: daemon.started },
        uid,
        in_its_place: true,
        program: daemon.program.clone().into(),
        words: words.collect(),
        variables: same_environment(&daemon.variables, files),
        files: files.clone(),
        input: String::new(),
    }
}
