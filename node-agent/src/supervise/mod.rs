//! Keeps one `ray-tunnel` running on listening sockets that stay: starts it, starts it again when it
//! ends by itself, hands over to a new process while the old one drains, adopts the one that an earlier
//! agent left. It runs beside the agent's loop, so that nothing the loop waits for delays it. What the
//! tunnel is told, and whether it is wanted, is decided in `agent`.

pub(crate) mod client;
mod pace;
mod process;
mod sockets;

use std::{io, net::SocketAddr, path::PathBuf, time::Duration};

use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinSet,
    time::Instant,
};

pub(crate) use self::process::Program;
use self::{
    pace::Pace,
    process::Process,
    sockets::{Folder, Listeners},
};
use crate::tunnel::control::{Ask, Status};

/// A new process must take flows so soon.
const READY_TIME_MAX: Duration = Duration::from_secs(10);
/// How often it is asked whether it does.
const READY_PAUSE: Duration = Duration::from_millis(20);
/// Sockets that cannot be had are tried again after this.
const BIND_PAUSE: Duration = Duration::from_secs(2);
/// What an old process may take beyond its deadline.
const DRAIN_SLACK: Duration = Duration::from_secs(5);
/// Old processes that drain at one time.
const DRAINING_MAX: usize = 8;
/// Commands that wait.
const COMMANDS_LEN_MAX: usize = 8;

/// What is kept running, and where.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) program: Program,
    /// Folder of rules and control sockets.
    pub(crate) folder: PathBuf,
    /// Group that may enter it.
    pub(crate) gid: u32,
    /// Where the kernel hands captured connections to.
    pub(crate) captured: Vec<SocketAddr>,
    /// Where other nodes dial.
    pub(crate) inbound: Vec<SocketAddr>,
}

/// How it stands.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Supervised {
    /// The process that takes new flows.
    pub(crate) pid: Option<i32>,
    /// Where it is asked; those that drain after it.
    pub(crate) controls: Vec<PathBuf>,
    /// Starts after one that ended by itself.
    pub(crate) restarts: u32,
    /// It was there before this agent.
    pub(crate) adopted: bool,
    /// Why there is none.
    pub(crate) problem: Option<String>,
}

enum Command {
    Handover { deadline: Duration, reply: oneshot::Sender<Result<String, String>> },
    Stop { deadline: Duration, reply: oneshot::Sender<()> },
}

/// The way to the supervisor. Dropped, it leaves the tunnel running.
#[derive(Debug)]
pub(crate) struct Supervisor {
    commands: mpsc::Sender<Command>,
    state: watch::Receiver<Supervised>,
    task: tokio::task::AbortHandle,
}

impl Supervisor {
    /// Begins to keep a tunnel running.
    pub(crate) fn begin(plan: Plan) -> Self {
        let (commands, receiver) = mpsc::channel(COMMANDS_LEN_MAX);
        let (sender, state) = watch::channel(Supervised::default());
        let keeper = Keeper {
            plan,
            commands: receiver,
            state: sender,
            now: Supervised::default(),
            pace: Pace::default(),
            draining: JoinSet::new(),
        };
        let task = tokio::spawn(keeper.run()).abort_handle();
        Self { commands, state, task }
    }

    pub(crate) fn state(&self) -> Supervised {
        self.state.borrow().clone()
    }

    /// Puts a new process in the place of the running one, which drains. Answers later.
    pub(crate) fn handover(&self, deadline: Duration) -> oneshot::Receiver<Result<String, String>> {
        let (reply, answer) = oneshot::channel();
        // Full means that one is under way: the caller hears that nobody answers.
        let _ = self.commands.try_send(Command::Handover { deadline, reply });
        answer
    }

    /// Ends the tunnel: flows may go on until the deadline. Answers when it is over.
    pub(crate) fn stop(&self, deadline: Duration) -> oneshot::Receiver<()> {
        let (reply, answer) = oneshot::channel();
        let _ = self.commands.try_send(Command::Stop { deadline, reply });
        answer
    }
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct Keeper {
    plan: Plan,
    commands: mpsc::Receiver<Command>,
    state: watch::Sender<Supervised>,
    now: Supervised,
    pace: Pace,
    draining: JoinSet<PathBuf>,
}

impl Keeper {
    async fn run(mut self) {
        let Some((folder, listeners, mut running)) = self.begin().await else { return };
        loop {
            let Some(mut process) = running.take() else {
                running = self.start(&listeners, &folder).await;
                if running.is_none() && !self.pause(Duration::ZERO).await {
                    return;
                }
                continue;
            };
            let since = Instant::now();
            self.took_over(&process);
            tokio::select! {
                how = process.ended() => {
                    let pause = self.pace.ended(since.elapsed());
                    tracing::error!(%how, pid = process.pid, restart_in = ?pause, "ray-tunnel ended by itself");
                    self.now.restarts = self.now.restarts.saturating_add(1);
                    self.gone(format!("ray-tunnel ended by itself ({how}); new connections wait"));
                    if !self.wait(pause).await {
                        return;
                    }
                }
                command = self.commands.recv() => match command {
                    // The agent ends: the tunnel stays.
                    None => return,
                    Some(Command::Stop { deadline, reply }) => {
                        self.stop(process, deadline, &folder).await;
                        let _ = reply.send(());
                        return;
                    }
                    Some(Command::Handover { deadline, reply }) => {
                        let (next, said) = self.hand_over(process, &listeners, &folder, deadline).await;
                        let _ = reply.send(said);
                        running = Some(next);
                    }
                },
                Some(ended) = self.draining.join_next() => {
                    if let Ok(control) = ended {
                        self.now.controls.retain(|known| *known != control);
                        self.publish();
                    }
                    running = Some(process);
                }
            }
        }
    }

    /// Takes over what runs, or makes the sockets. `None`: the agent ended meanwhile.
    async fn begin(&mut self) -> Option<(Folder, Listeners, Option<Process>)> {
        loop {
            match self.try_begin().await {
                Ok(begun) => return Some(begun),
                Err(error) => {
                    self.gone(error.to_string());
                    if !self.wait(BIND_PAUSE).await {
                        return None;
                    }
                }
            }
        }
    }

    async fn try_begin(&mut self) -> io::Result<(Folder, Listeners, Option<Process>)> {
        let folder = Folder::make(&self.plan.folder, self.plan.gid)?;
        let pointed = folder.pointed();
        let mut adopted = None;
        for control in folder.controls() {
            let Ok(status) = client::status(&control).await else {
                let _ = std::fs::remove_file(&control);
                continue;
            };
            match self.adopt(&status, &control).await {
                Ok((process, Some(listeners))) if Some(&control) == pointed.as_ref() => {
                    adopted = Some((process, listeners));
                }
                // Draining, or on other sockets than those wanted now.
                Ok((process, _)) if status.accepting => {
                    let process = self.told_to_drain(process, DRAIN_SLACK).await;
                    process.end_within(DRAIN_SLACK * 2).await;
                }
                Ok((process, _)) => self.watch_draining(process, MAX_DRAIN),
                Err(error) => {
                    tracing::warn!(%error, control = %control.display(), "a tunnel that was there is left alone");
                }
            }
        }
        if let Some((process, listeners)) = adopted {
            tracing::info!(pid = process.pid, "a running ray-tunnel is adopted");
            self.now.adopted = true;
            return Ok((folder, listeners, Some(process)));
        }
        let listeners = Listeners::bind(&self.plan.captured, &self.plan.inbound)?;
        Ok((folder, listeners, None))
    }

    async fn adopt(
        &self,
        status: &Status,
        control: &std::path::Path,
    ) -> io::Result<(Process, Option<Listeners>)> {
        let uid = self.plan.program.user.map(|(uid, _)| uid);
        let pid = i32::try_from(status.pid).map_err(io::Error::other)?;
        let process = Process::adopt(pid, control, uid)?;
        if !status.accepting {
            return Ok((process, None));
        }
        let named = client::listeners(control).await.map_err(io::Error::other)?;
        let taken = Listeners::taken(named, &self.plan.captured, &self.plan.inbound);
        Ok((process, taken))
    }

    /// A process that takes flows, or none and why.
    async fn start(&mut self, listeners: &Listeners, folder: &Folder) -> Option<Process> {
        match self.try_start(listeners, folder).await {
            Ok(process) => Some(process),
            Err(error) => {
                self.gone(format!("ray-tunnel does not start: {error}"));
                None
            }
        }
    }

    async fn try_start(&self, listeners: &Listeners, folder: &Folder) -> io::Result<Process> {
        let mut process = Process::start(&self.plan.program, listeners, folder)?;
        let control = process.control.clone();
        let ready = async {
            loop {
                if client::status(&control).await.is_ok_and(|status| status.accepting) {
                    return;
                }
                tokio::time::sleep(READY_PAUSE).await;
            }
        };
        let why = tokio::select! {
            biased;
            how = process.ended() => how,
            () = ready => {
                folder.point_current(&process.control)?;
                return Ok(process);
            }
            () = tokio::time::sleep(READY_TIME_MAX) => format!("it took no flows within {READY_TIME_MAX:?}"),
        };
        process.kill();
        let _ = process.ended().await;
        Err(io::Error::other(why))
    }

    /// A new process first, then the old one drains; without a new one the old one stays.
    async fn hand_over(
        &mut self,
        old: Process,
        listeners: &Listeners,
        folder: &Folder,
        deadline: Duration,
    ) -> (Process, Result<String, String>) {
        if self.draining.len() >= DRAINING_MAX {
            let said =
                format!("{DRAINING_MAX} old processes drain already: wait for their deadlines");
            return (old, Err(said));
        }
        match self.try_start(listeners, folder).await {
            Ok(next) => {
                let (old_pid, new_pid) = (old.pid, next.pid);
                let old = self.told_to_drain(old, deadline).await;
                self.watch_draining(old, deadline + DRAIN_SLACK);
                let said = format!(
                    "process {new_pid} takes new flows; {old_pid} keeps its own for {deadline:?} at most"
                );
                tracing::info!("{said}");
                (next, Ok(said))
            }
            Err(error) => {
                let said =
                    format!("the new ray-tunnel does not start, the old one goes on: {error}");
                tracing::error!("{said}");
                (old, Err(said))
            }
        }
    }

    async fn told_to_drain(&self, process: Process, deadline: Duration) -> Process {
        let ask = Ask::Drain { deadline_seconds: deadline.as_secs() };
        if let Err(error) = client::ask(&process.control, ask).await {
            tracing::warn!(%error, pid = process.pid, "an old ray-tunnel does not drain and is ended");
            process.kill();
        }
        process
    }

    fn watch_draining(&mut self, process: Process, time: Duration) {
        self.now.controls.retain(|known| *known != process.control);
        self.now.controls.push(process.control.clone());
        self.draining.spawn(async move {
            let control = process.control.clone();
            process.end_within(time).await;
            control
        });
    }

    async fn stop(&mut self, process: Process, deadline: Duration, folder: &Folder) {
        let process = self.told_to_drain(process, deadline).await;
        process.end_within(deadline + DRAIN_SLACK).await;
        let _ = std::fs::remove_file(folder.current());
        // Who drains has had its time.
        for control in std::mem::take(&mut self.now.controls) {
            let _ = client::ask(&control, Ask::Drain { deadline_seconds: 0 }).await;
        }
        self.gone("ray-tunnel was stopped".to_owned());
    }

    fn took_over(&mut self, process: &Process) {
        self.now.pid = Some(process.pid);
        self.now.controls.retain(|known| *known != process.control);
        self.now.controls.insert(0, process.control.clone());
        self.now.problem = None;
        self.publish();
    }

    fn gone(&mut self, problem: String) {
        if self.now.problem.as_ref() != Some(&problem) {
            tracing::warn!("{problem}");
        }
        self.now.controls.retain(|known| known.exists());
        self.now.pid = None;
        self.now.problem = Some(problem);
        self.publish();
    }

    fn publish(&self) {
        self.state.send_replace(self.now.clone());
    }

    /// Waits as the last failures say. False: it is over.
    async fn pause(&mut self, ran_for: Duration) -> bool {
        let pause = self.pace.ended(ran_for);
        self.wait(pause).await
    }

    /// Waits, and hears that the tunnel is not wanted any more meanwhile.
    async fn wait(&mut self, pause: Duration) -> bool {
        let over = tokio::time::sleep(pause);
        tokio::pin!(over);
        loop {
            tokio::select! {
                () = &mut over => return true,
                command = self.commands.recv() => match command {
                    None => return false,
                    Some(Command::Stop { reply, .. }) => {
                        let _ = reply.send(());
                        return false;
                    }
                    Some(Command::Handover { reply, .. }) => {
                        let said = self.now.problem.clone().unwrap_or_default();
                        let _ = reply.send(Err(format!("no ray-tunnel runs: {said}")));
                    }
                },
            }
        }
    }
}

/// A process that was told to drain by an earlier agent has a deadline of its own; this is the last.
const MAX_DRAIN: Duration = Duration::from_secs(crate::tunnel::control::DRAIN_SECONDS_MAX);
