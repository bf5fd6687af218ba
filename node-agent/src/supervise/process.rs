//! One process of `ray-tunnel`: starting it with its sockets and without rights, and seeing it end,
//! whether this agent started it or an earlier one did.

use std::{
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::process::CommandExt,
    },
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use command_fds::{CommandFdExt, FdMapping};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
};

use super::sockets::{Folder, Listeners};
use crate::tunnel::control::CONTROL;

/// How often an adopted process, which is no child, is looked at.
const LOOK_PAUSE: Duration = Duration::from_millis(100);
/// Descriptors of a child before ours.
const FIRST_FD: i32 = 3;

/// What is started.
#[derive(Clone, Debug)]
pub(crate) struct Program {
    /// The program.
    pub(crate) path: PathBuf,
    /// As whom: user and group. `None`: as the agent, which then is not root.
    pub(crate) user: Option<(u32, u32)>,
    /// The rules it reads.
    pub(crate) rules: PathBuf,
}

/// A process, ours or adopted.
#[derive(Debug)]
pub(crate) struct Process {
    pub(crate) pid: i32,
    /// Where it is asked.
    pub(crate) control: PathBuf,
    handle: OwnedFd,
    /// Reaps it where it is a child.
    child: Option<tokio::process::Child>,
}

impl Process {
    /// Starts one on these sockets.
    ///
    /// # Errors
    /// The system's, with the program's name.
    pub(crate) fn start(
        program: &Program,
        listeners: &Listeners,
        folder: &Folder,
    ) -> io::Result<Self> {
        let (control, socket) = folder.next_control()?;
        let started = Self::spawn(program, listeners, OwnedFd::from(socket), &control);
        if started.is_err() {
            let _ = std::fs::remove_file(&control);
        }
        started
    }

    fn spawn(
        program: &Program,
        listeners: &Listeners,
        control_socket: OwnedFd,
        control: &Path,
    ) -> io::Result<Self> {
        let mut sockets = listeners.copies()?;
        sockets.push((CONTROL, control_socket));
        let numbered: Vec<(i32, &str, OwnedFd)> = (FIRST_FD..)
            .zip(sockets)
            .map(|(number, (name, socket))| (number, name, socket))
            .collect();
        let names: Vec<String> =
            numbered.iter().map(|(number, name, _)| format!("{name}={number}")).collect();
        let mappings = numbered
            .into_iter()
            .map(|(child_fd, _, parent_fd)| FdMapping { parent_fd, child_fd })
            .collect();
        let mut command = std::process::Command::new(&program.path);
        command
            .arg("run")
            .arg("--rules")
            .arg(&program.rules)
            .arg("--fds")
            .arg(names.join(","))
            .env_clear()
            .current_dir("/")
            .stdin(Stdio::null())
            // What a terminal sends to the agent is not meant for it.
            .process_group(0);
        if let Some((uid, gid)) = program.user {
            // The standard library drops all supplementary groups of root's with this.
            command.uid(uid).gid(gid);
        }
        command.fd_mappings(mappings).map_err(|e| io::Error::other(e.to_string()))?;
        let mut command = tokio::process::Command::from(command);
        let child = command.kill_on_drop(false).spawn().map_err(|error| {
            io::Error::new(error.kind(), format!("{}: {error}", program.path.display()))
        })?;
        let pid = child.id().and_then(|pid| i32::try_from(pid).ok());
        let pid = pid.ok_or_else(|| io::Error::other("it ended at once"))?;
        let handle = watch(pid)?;
        Ok(Self { pid, control: control.to_owned(), handle, child: Some(child) })
    }

    /// One that is there already and answers at this control socket. `uid` is whose it must be.
    ///
    /// # Errors
    /// It is gone, or another user's.
    pub(crate) fn adopt(pid: i32, control: &Path, uid: Option<u32>) -> io::Result<Self> {
        let handle = watch(pid)?;
        // The control socket is the agent's own, so its answer is the tunnel's; whose process it names
        // is looked up all the same, because it may be killed one day.
        let wanted = uid.unwrap_or_else(|| rustix::process::geteuid().as_raw());
        let real = uid_of(pid)?;
        if real != wanted {
            let why = format!("process {pid} is of uid {real}, not of the tunnel's {wanted}");
            return Err(io::Error::other(why));
        }
        Ok(Self { pid, control: control.to_owned(), handle, child: None })
    }

    /// Waits until it has ended. May be dropped and called again.
    pub(crate) async fn ended(&mut self) -> String {
        let said = match &mut self.child {
            Some(child) => child.wait().await.map(|status| status.to_string()),
            None => {
                while !has_ended(&self.handle) {
                    tokio::time::sleep(LOOK_PAUSE).await;
                }
                Ok("it was adopted".to_owned())
            }
        };
        let _ = std::fs::remove_file(&self.control);
        said.unwrap_or_else(|error| error.to_string())
    }

    /// Ends it at once.
    pub(crate) fn kill(&self) {
        let _ = pidfd_send_signal(self.handle.as_fd(), Signal::KILL);
    }

    /// Waits for its end for so long, then ends it.
    pub(crate) async fn end_within(mut self, time: Duration) {
        if tokio::time::timeout(time, self.ended()).await.is_err() {
            self.kill();
            let _ = self.ended().await;
        }
    }
}

fn watch(pid: i32) -> io::Result<OwnedFd> {
    let pid = Pid::from_raw(pid).ok_or_else(|| io::Error::other("no process"))?;
    Ok(pidfd_open(pid, PidfdFlags::empty())?)
}

/// A descriptor of a process is readable once that has ended.
fn has_ended(handle: &OwnedFd) -> bool {
    let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
    let mut asked = [PollFd::new(handle, PollFlags::IN)];
    !matches!(poll(&mut asked, Some(&at_once)), Ok(0))
}

/// The folder of a process that is not dumpable is root's: only its text tells.
fn uid_of(pid: i32) -> io::Result<u32> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("Uid:"));
    line.and_then(|line| line.split_whitespace().next()?.parse().ok())
        .ok_or_else(|| io::Error::other(format!("/proc/{pid}/status names no uid")))
}
