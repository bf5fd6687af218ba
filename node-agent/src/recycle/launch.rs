//! Starts a program as another process was started: a child that first becomes like that process (`like`),
//! proves that it can read Ray's files, says `ready`, and waits. So whatever could be refused is refused
//! before anything was ended. Told `go`, it waits for the end of the process whose place it takes, if it
//! takes one, and becomes the program: who told it may be gone by then.
//!
//! What it is to become travels through a socket, never through arguments: an environment may hold secrets.

use std::{
    ffi::{OsStr, OsString},
    io::{self, BufRead, Read, Seek, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::{ffi::OsStringExt, net::UnixStream as StdStream, process::CommandExt},
    },
    process::{Command, ExitCode, Stdio},
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{MemfdFlags, memfd_create},
    process::{Pid, PidfdFlags, pidfd_open},
};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::UnixStream,
    process::Child,
    time::timeout,
};

use super::{find::stat, like};
use crate::{exec, rayenv::RayEnv, served::kind::printable};

/// The word on the command line for this part of the program; for itself alone.
pub(crate) const COMMAND: &str = "recycle-launch";
/// Longest request, in bytes.
const REQUEST_LEN_MAX: u64 = 4 * 1024 * 1024;
/// Longest answer, in bytes.
const ANSWER_LEN_MAX: u64 = 4 * 1024;
/// How long the child may take to be ready.
const READY_TIME_MAX: Duration = Duration::from_secs(10);
/// How long it waits to be told.
const GO_TIME_MAX: Duration = Duration::from_secs(900);
/// How long it waits for the end of the process whose place it takes.
pub(super) const END_TIME_MAX: Duration = Duration::from_secs(30);
/// How long it may take from there to the program.
const BECOME_TIME_MAX: Duration = Duration::from_secs(5);

/// A process that was looked at: no other one has its number and its start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Process {
    pub(super) pid: i32,
    pub(super) started: u64,
}

/// What is to be started. No `Debug`: environments hold secrets.
#[derive(Clone, Serialize, Deserialize)]
pub(super) struct Request {
    /// Whom to be like.
    pub(super) like: Process,
    /// Who that must run as.
    pub(super) uid: u32,
    /// Whether to wait for its end.
    pub(super) in_its_place: bool,
    /// The file to run, or a name to be found in PATH.
    pub(super) program: OsString,
    /// The words of the command line, the program's own name first.
    pub(super) words: Vec<OsString>,
    /// The environment.
    pub(super) variables: Vec<(OsString, OsString)>,
    /// Files of Ray that the program must be able to read.
    pub(super) files: RayEnv,
    /// What the program reads from standard input.
    pub(super) input: String,
}

/// Why it was not started.
#[derive(Debug, Error)]
pub(super) enum LaunchError {
    #[error("no child can be started: {0}")]
    Spawn(#[from] io::Error),
    #[error("{0}")]
    Refused(String),
    #[error("the child that was to {what} gave no answer within {} s", .most.as_secs())]
    Silent { what: &'static str, most: Duration },
}

/// A child that is ready. Dropped before it is told to go, it ends and starts nothing.
pub(super) struct Ready {
    child: Child,
    socket: BufReader<UnixStream>,
}

impl Ready {
    pub(super) async fn prepare(
        request: &Request,
        out: Stdio,
        err: Stdio,
    ) -> Result<Self, LaunchError> {
        let (near, far) = StdStream::pair()?;
        near.set_nonblocking(true)?;
        let mut command = tokio::process::Command::new("/proc/self/exe");
        command.arg(COMMAND).env_clear().stdin(OwnedFd::from(far)).stdout(out).stderr(err);
        let child = command.spawn()?;
        // Its copy of the far end goes with it.
        drop(command);
        let mut socket = BufReader::new(UnixStream::from_std(near)?);
        let mut text = serde_json::to_vec(request).map_err(io::Error::other)?;
        text.push(b'\n');
        socket.write_all(&text).await?;
        match timeout(READY_TIME_MAX, line(&mut socket)).await {
            Ok(Ok(answer)) if answer == "ready" => Ok(Self { child, socket }),
            Ok(answer) => Err(LaunchError::Refused(answer.unwrap_or_else(|e| e.to_string()))),
            Err(_) => Err(LaunchError::Silent { what: "prepare", most: READY_TIME_MAX }),
        }
    }

    /// Tells it to go, without waiting for what comes of it.
    pub(super) async fn go(mut self) -> Result<Going, LaunchError> {
        self.socket.write_all(b"go\n").await?;
        Ok(Going(self))
    }
}

/// A child on its way.
pub(super) struct Going(Ready);

impl Going {
    /// The child, once it is the program.
    pub(super) async fn become_program(mut self) -> Result<Child, LaunchError> {
        let most = END_TIME_MAX + BECOME_TIME_MAX;
        match timeout(most, line(&mut self.0.socket)).await {
            // The socket closes where another program takes over.
            Ok(Ok(answer)) if answer.is_empty() => Ok(self.0.child),
            Ok(answer) => Err(LaunchError::Refused(answer.unwrap_or_else(|e| e.to_string()))),
            Err(_) => Err(LaunchError::Silent { what: "become the program", most }),
        }
    }
}

async fn line(socket: &mut BufReader<UnixStream>) -> io::Result<String> {
    let mut line = Vec::new();
    socket.take(ANSWER_LEN_MAX).read_until(b'\n', &mut line).await?;
    Ok(String::from_utf8_lossy(&line).trim_end().to_owned())
}

/// The child's part. It has one thread, and says nothing but on its socket.
pub(crate) fn child() -> ExitCode {
    let Ok(socket) = io::stdin().as_fd().try_clone_to_owned() else { return ExitCode::FAILURE };
    let mut socket = StdStream::from(socket);
    // Only on success it does not come back.
    let Err(why) = become_what_is_asked(&mut socket);
    let _ = socket.write_all(format!("{}\n", why.replace('\n', " ")).as_bytes());
    ExitCode::FAILURE
}

fn become_what_is_asked(socket: &mut StdStream) -> Result<std::convert::Infallible, String> {
    let said = |error: io::Error| error.to_string();
    socket.set_read_timeout(Some(READY_TIME_MAX)).map_err(said)?;
    let mut lines = io::BufReader::new(socket.try_clone().map_err(said)?);
    let mut text = Vec::new();
    (&mut lines).take(REQUEST_LEN_MAX).read_until(b'\n', &mut text).map_err(said)?;
    let request: Request = serde_json::from_slice(&text)
        .map_err(|e| format!("this command is node-agent's own: {e}"))?;
    let place = prepare(&request)?;
    socket.write_all(b"ready\n").map_err(said)?;
    socket.set_read_timeout(Some(GO_TIME_MAX)).map_err(said)?;
    let mut word = String::new();
    (&mut lines).take(ANSWER_LEN_MAX).read_line(&mut word).map_err(said)?;
    if word != "go\n" {
        return Err("not told to go".to_owned());
    }
    if let Some(place) = place {
        wait_for_end(&place)?;
    }
    Err(start(&request))
}

/// Everything that can be refused.
fn prepare(request: &Request) -> Result<Option<OwnedFd>, String> {
    let Process { pid, started } = request.like;
    let gone = || format!("process {pid} has ended");
    let handle = Pid::from_raw(pid).and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
    let handle = handle.ok_or_else(gone)?;
    if stat(pid).map_err(|_| gone())?.started != started {
        return Err(gone());
    }
    like::become_like(pid).map_err(|error| error.to_string())?;
    let uid = rustix::process::geteuid().as_raw();
    if uid != request.uid {
        return Err(format!("process {pid} runs as uid {uid}, and Ray as uid {}", request.uid));
    }
    exec::usable(&request.files).map_err(|failure| failure.to_string())?;
    Ok(request.in_its_place.then_some(handle))
}

fn wait_for_end(process: &OwnedFd) -> Result<(), String> {
    let seconds = i64::try_from(END_TIME_MAX.as_secs()).unwrap_or(i64::MAX);
    let most = Timespec { tv_sec: seconds, tv_nsec: 0 };
    let mut handles = [PollFd::new(process, PollFlags::IN)];
    match poll(&mut handles, Some(&most)) {
        Ok(ended) if ended > 0 => Ok(()),
        Ok(_) => Err(format!("the process whose place it takes did not end within {seconds} s")),
        Err(error) => Err(error.to_string()),
    }
}

fn start(request: &Request) -> String {
    let Some((name, words)) = request.words.split_first() else { return "no program".to_owned() };
    let input = match input(&request.input) {
        Ok(input) => input,
        Err(error) => return error.to_string(),
    };
    let error = Command::new(&request.program)
        .arg0(name)
        .args(words)
        .env_clear()
        .envs(request.variables.iter().map(|(name, value)| (name, value)))
        .stdin(input)
        .exec();
    // A path that somebody else's process named: nothing in it may speak to the terminal.
    let program = printable(&request.program.to_string_lossy());
    format!("cannot start {program}: {error}")
}

fn input(text: &str) -> io::Result<Stdio> {
    if text.is_empty() {
        return Ok(Stdio::null());
    }
    let mut file = std::fs::File::from(memfd_create("input", MemfdFlags::CLOEXEC)?);
    file.write_all(text.as_bytes())?;
    file.rewind()?;
    Ok(file.into())
}

/// A file in memory for what a program writes, and its end for a person.
pub(super) struct Written(std::fs::File);

impl Written {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self(memfd_create("output", MemfdFlags::CLOEXEC)?.into()))
    }

    pub(super) fn stdio(&self) -> io::Result<Stdio> {
        Ok(self.0.try_clone()?.into())
    }

    /// The last so many bytes.
    pub(super) fn tail(&mut self, len_max: u64) -> String {
        let read = || -> io::Result<Vec<u8>> {
            let mut file = &self.0;
            let len = file.metadata()?.len();
            file.seek(io::SeekFrom::Start(len.saturating_sub(len_max)))?;
            let mut bytes = Vec::new();
            file.take(len_max).read_to_end(&mut bytes)?;
            Ok(bytes)
        };
        String::from_utf8_lossy(&read().unwrap_or_default()).into_owned()
    }
}

/// The environment of a process that takes another's place: the same, but for the paths of TLS.
pub(super) fn same_environment(variables: &[Vec<u8>], files: &RayEnv) -> Vec<(OsString, OsString)> {
    let set = files.variables();
    let tls = set.iter().filter(|(name, _)| is_tls(name));
    let tls = tls.map(|(name, value)| (OsString::from(*name), value.as_os_str().to_owned()));
    let kept = pairs(variables)
        .filter(|(name, _)| !set.iter().any(|(ours, _)| is_tls(ours) && name == *ours));
    kept.chain(tls).collect()
}

/// The environment of a program beside one of Ray's daemons: the daemon's, without what Ray adds for itself,
/// with TLS and token as `exec` gives them.
pub(super) fn environment(variables: &[Vec<u8>], files: &RayEnv) -> Vec<(OsString, OsString)> {
    let set = files.variables();
    let is_set = |name: &OsStr| set.iter().any(|(ours, _)| name == *ours);
    let is_owned = |name: &OsStr| name.to_str().is_some_and(crate::rayenv::is_owned);
    let kept = pairs(variables)
        .filter(|(name, value)| !is_set(name) && !is_owned(name) && !is_rays_own(name, value));
    let ours =
        set.iter().map(|(name, value)| (OsString::from(*name), value.as_os_str().to_owned()));
    kept.chain(ours).collect()
}

fn is_tls(name: &str) -> bool {
    name == "RAY_USE_TLS" || name.starts_with("RAY_TLS_")
}

fn pairs(variables: &[Vec<u8>]) -> impl Iterator<Item = (OsString, OsString)> {
    variables.iter().filter_map(|variable| {
        let at = variable.iter().position(|byte| *byte == b'=')?;
        let text = |bytes: &[u8]| OsString::from_vec(bytes.to_vec());
        Some((text(&variable[..at]), text(&variable[at + 1..])))
    })
}

/// What Ray 2.60 adds to the environment of its daemons.
fn is_rays_own(name: &OsStr, value: &OsStr) -> bool {
    match name.to_str() {
        Some("RAY_CLIENT_MODE" | "RAY_LD_PRELOAD_ON_WORKERS") => true,
        Some("LD_PRELOAD") => {
            value.to_str().is_some_and(|v| v.ends_with("/ray/core/libjemalloc.so"))
        }
        Some(_) | None => false,
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn the_environment_is_the_same_but_for_the_paths_of_tls() {
        let variables: Vec<Vec<u8>> = [
            "HOME=/h",
            "RAY_USE_TLS=1",
            "RAY_TLS_SERVER_CERT=/t/k1/tls.crt",
            "RAY_AUTH_TOKEN=x",
            "RAY_gcs_storage=rocksdb",
            "LD_PRELOAD=/v/ray/core/libjemalloc.so",
            "RAY_CLIENT_MODE=0",
            "odd",
        ]
        .iter()
        .map(|text| text.as_bytes().to_vec())
        .collect();
        let files = RayEnv::of_folder(Path::new("/t/k2"), Some(Path::new("/t/ray_token")));
        let shown = |all: Vec<(OsString, OsString)>| -> Vec<String> {
            all.iter().map(|(n, v)| format!("{}={}", n.display(), v.display())).collect()
        };
        let tls = [
            "RAY_USE_TLS=1",
            "RAY_TLS_SERVER_CERT=/t/k2/tls.crt",
            "RAY_TLS_SERVER_KEY=/t/k2/tls.key",
            "RAY_TLS_CA_CERT=/t/k2/ca.crt",
        ];
        let (kept, token) = (["HOME=/h"], ["RAY_AUTH_TOKEN=x"]);
        let storage = ["RAY_gcs_storage=rocksdb"];
        let rays = ["LD_PRELOAD=/v/ray/core/libjemalloc.so", "RAY_CLIENT_MODE=0"];
        let same = [&kept[..], &token[..], &storage[..], &rays[..], &tls[..]].concat();
        assert_eq!(shown(same_environment(&variables, &files)), same);
        let path = ["RAY_AUTH_MODE=token", "RAY_AUTH_TOKEN_PATH=/t/ray_token"];
        let beside = [&kept[..], &storage[..], &tls[..], &path[..]].concat();
        assert_eq!(shown(environment(&variables, &files)), beside);
    }

    #[test]
    fn what_a_program_wrote_is_shown_from_its_end() {
        let mut written = Written::new().unwrap();
        written.0.write_all(b"first second").unwrap();
        assert_eq!(written.tail(6), "second");
        assert_eq!(written.tail(600), "first second");
    }
}
