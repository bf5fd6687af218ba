//! All of Ray on this node: drained, stopped, started again with a new leaf, and proved. Each step is bounded;
//! one that fails says in which state the node is and what to do.

use std::{
    collections::BTreeSet,
    ffi::OsString,
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open},
};
use tokio::{
    process::Child,
    time::{Instant, sleep, timeout},
};

use super::{
    command::Site,
    find::{self, Daemon, Found},
    launch::{Process, Ready, Request, Written, environment},
    plan::{Plan, Scope, Step},
    prove,
    rays::Asker,
    report::{Progress, seconds},
};
use crate::{
    api::{Answer, Ask, ExecFolder},
    config::is_ours_alone,
    rayenv::RayEnv,
    served::kind::printable,
    socket,
    stopray::{self, Marks},
};

/// How long a program that stops or starts Ray may take.
const HOOK_TIME_MAX: Duration = Duration::from_secs(240);
/// So much of its output is shown, in bytes, and in lines.
const OUTPUT_LEN_MAX: u64 = 2_000;
const OUTPUT_LINES: usize = 8;
/// Between two looks at the raylet that drains.
const LOOK_PAUSE: Duration = Duration::from_millis(200);
/// What hooks find programs in.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// How Ray is started again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Start {
    /// A command, run as Ray's user with the new files.
    Command(Vec<OsString>),
    /// A program of the operator's, which starts Ray through `exec`.
    Hook(PathBuf),
}

impl Start {
    /// From the command line, or the folder of hooks.
    pub(super) fn by(command: &[OsString], hooks: &Path) -> Result<Self, String> {
        if !command.is_empty() {
            return Ok(Self::Command(command.to_vec()));
        }
        let hook = hooks.join("start");
        if hook.is_file() {
            trusted(hooks)?;
            trusted(&hook)?;
            return Ok(Self::Hook(hook));
        }
        Err(format!(
            "how Ray is started here is not known: give the command (recycle ... -- /opt/ray/bin/ray start \
             --address=HEAD:6379 ...), or make the program {} (scripts/recycle/systemd and scripts/recycle/plain \
             are such programs)",
            hook.display()
        ))
    }

    pub(super) fn shown(&self) -> String {
        match self {
            Self::Hook(path) => path.display().to_string(),
            Self::Command(words) => {
                let words: Vec<_> = words.iter().map(|word| word.to_string_lossy()).collect();
                printable(&words.join(" "))
            }
        }
    }
}

/// Whoever writes it runs commands as root.
fn trusted(path: &Path) -> Result<(), String> {
    match is_ours_alone(path) {
        Ok(true) => Ok(()),
        Ok(false) => Err(format!(
            "{} may be written by others: whoever writes it commands root; give it to root, mode 0755",
            path.display()
        )),
        Err(error) => Err(format!("{}: {error}", path.display())),
    }
}

/// A step that did not work.
#[derive(Debug)]
pub(super) struct Broken {
    pub(super) step: Step,
    pub(super) why: String,
    /// In which state the node is, and what to do.
    pub(super) state: String,
}

/// Everything that is needed to do it.
pub(super) struct Work<'a> {
    pub(super) site: &'a Site,
    pub(super) found: &'a Found,
    pub(super) plan: &'a Plan,
    pub(super) start: &'a Start,
    pub(super) hooks: &'a Path,
    pub(super) drain: Duration,
    pub(super) old: &'a BTreeSet<String>,
}

const UNTOUCHED: &str = "nothing was stopped: Ray runs as before";
const DOWN: &str =
    "Ray of this node is stopped: start it by hand through `node-agent exec`, as at a first start";

impl Work<'_> {
    /// Does it, and tells the serials that are served now.
    pub(super) async fn run(&self, progress: &mut Progress) -> Result<Vec<String>, Broken> {
        let begun = Instant::now();
        let prepared = self.prepare().await.map_err(|why| broken(Step::Prepare, why, UNTOUCHED))?;
        let detail = match &prepared {
            Some(prepared) => format!("new key folder {}", prepared.folder()),
            None => format!("{} will start Ray through `exec`", self.start.shown()),
        };
        progress.done(Step::Prepare, begun, detail);
        let drained = self.drain(progress).await?;
        self.stop(drained, progress).await?;
        self.start_again(prepared, progress).await?;
        let proof = self.prove_served(progress).await?;
        self.prove_task(progress).await?;
        Ok(proof)
    }

    async fn prepare(&self) -> Result<Option<Prepared>, String> {
        let Start::Command(command) = self.start else { return Ok(None) };
        let ExecFolder { env: files, .. } = new_folder(self.site, self.old).await?;
        let output = Written::new().map_err(|e| e.to_string())?;
        let (out, err) = (output.stdio(), output.stdio());
        let request = beside(&self.found.raylet, self.site.uid, &files, command);
        let ready = Ready::prepare(
            &request,
            out.map_err(|e| e.to_string())?,
            err.map_err(|e| e.to_string())?,
        );
        let ready = ready.await.map_err(|error| error.to_string())?;
        Ok(Some(Prepared { ready, output, files }))
    }

    /// Whether the raylet ended by itself: drained and idle, it does.
    async fn drain(&self, progress: &mut Progress) -> Result<bool, Broken> {
        if !self.plan.steps.contains(&Step::Drain) {
            return Ok(false);
        }
        let begun = Instant::now();
        progress.say(&Step::Drain.text(self.plan.scope, self.drain));
        let files = self.site.current_files().map_err(|why| broken(Step::Drain, why, UNTOUCHED))?;
        let asker = Asker { found: self.found, uid: self.site.uid, files };
        asker
            .drain(self.drain)
            .await
            .map_err(|error| broken(Step::Drain, error.to_string(), UNTOUCHED))?;
        let idle = ends_within(&self.found.raylet, self.drain).await;
        let detail = if idle {
            "drained: nothing ran any more, the raylet ended".to_owned()
        } else {
            format!(
                "drained for {}: what still runs is tried again elsewhere, where it may be",
                seconds(self.drain)
            )
        };
        progress.done(Step::Drain, begun, detail);
        Ok(idle)
    }

    async fn stop(&self, drained: bool, progress: &mut Progress) -> Result<(), Broken> {
        let begun = Instant::now();
        progress.say(&Step::Stop.text(self.plan.scope, self.drain));
        let partly = "this node takes no new work, and part of its Ray may be stopped: see `ps`, then `ray stop` \
                      as Ray's user, and start it again";
        let hook = self.hooks.join("stop");
        let is_hooked = matches!(self.start, Start::Hook(_)) && hook.is_file();
        if is_hooked {
            let run = async {
                trusted(&hook)?;
                run_hook(&hook, &self.variables()).await
            };
            run.await.map_err(|why| broken(Step::Stop, why, partly))?;
        }
        let marks = Marks {
            tls_dir: self.site.tls_dir.clone(),
            plan: self.site.port_plan,
            ended_session: (drained || is_hooked).then(|| self.found.session.clone()),
        };
        let outcome = stopray::stop(self.site.uid, marks).await;
        if let Some(problem) = outcome.problem {
            return Err(broken(Step::Stop, problem, partly));
        }
        let named = if outcome.named.is_empty() {
            "nothing was left".to_owned()
        } else {
            outcome.named.join(", ")
        };
        progress.done(Step::Stop, begun, format!("stopped {} processes: {named}", outcome.stopped));
        Ok(())
    }

    async fn start_again(
        &self,
        prepared: Option<Prepared>,
        progress: &mut Progress,
    ) -> Result<(), Broken> {
        let begun = Instant::now();
        progress.say(&format!("start: {}", self.start.shown()));
        let run = async {
            match (prepared, self.start) {
                (Some(prepared), _) => prepared.run().await,
                (None, Start::Hook(hook)) => run_hook(hook, &self.variables()).await,
                (None, Start::Command(_)) => Err("nothing was prepared".to_owned()),
            }
        };
        run.await.map_err(|why| broken(Step::Start, why, DOWN))?;
        progress.done(Step::Start, begun, "Ray was started".to_owned());
        Ok(())
    }

    async fn prove_served(&self, progress: &mut Progress) -> Result<Vec<String>, Broken> {
        let begun = Instant::now();
        progress.say(&Step::ProveServed.text(self.plan.scope, self.drain));
        let state = "Ray was started and does not serve a new leaf throughout: see `node-agent status`, and stop and \
                     start it by hand";
        let proof = prove::wait_for_new(self.site, self.old).await;
        let proof = proof.map_err(|why| broken(Step::ProveServed, why, state))?;
        let detail = format!("{} processes serve {}", proof.processes, proof.serials.join(", "));
        progress.done(Step::ProveServed, begun, detail);
        Ok(proof.serials)
    }

    async fn prove_task(&self, progress: &mut Progress) -> Result<(), Broken> {
        let begun = Instant::now();
        progress.say(&Step::ProveTask.text(self.plan.scope, self.drain));
        let state = "Ray was started and serves the new leaf, and no task runs on this node: see the raylet's log and \
                     `node-agent doctor`";
        let ran = async {
            let whose = self.site.whose();
            let found = find::find(&whose).await.map_err(|error| error.to_string())?;
            let asker =
                Asker { found: &found, uid: self.site.uid, files: self.site.current_files()? };
            let ran = asker.tasks(std::slice::from_ref(&found.node_id)).await;
            let ran = ran.map_err(|error| error.to_string())?;
            match ran.first() {
                Some(ran) if ran.error.is_empty() => Ok(ran.node.clone()),
                Some(ran) => Err(printable(&ran.error)),
                None => Err("Ray said nothing of it".to_owned()),
            }
        };
        let node = ran.await.map_err(|why| broken(Step::ProveTask, why, state))?;
        progress.done(
            Step::ProveTask,
            begun,
            format!("a task ran on this node, which Ray knows as {}", printable(&node)),
        );
        Ok(())
    }

    fn variables(&self) -> Vec<(&'static str, String)> {
        let scope = match self.plan.scope {
            Scope::Node => "node",
            Scope::Head => "head",
            Scope::GcsServer => "gcs_server",
        };
        vec![
            ("PATH", PATH.to_owned()),
            ("RAYMTLS_SCOPE", scope.to_owned()),
            ("RAYMTLS_RAY_UID", self.site.uid.to_string()),
            ("RAYMTLS_SOCKET", self.site.socket.display().to_string()),
            ("RAYMTLS_UNIT", self.site.unit.clone().unwrap_or_default()),
        ]
    }
}

pub(super) fn broken(step: Step, why: impl Into<String>, state: &str) -> Broken {
    Broken { step, why: why.into(), state: state.to_owned() }
}

/// A child that starts Ray when it is told to.
struct Prepared {
    ready: Ready,
    output: Written,
    files: RayEnv,
}

impl Prepared {
    fn folder(&self) -> &str {
        self.files.folder_name().unwrap_or_default()
    }

    async fn run(mut self) -> Result<(), String> {
        let going = self.ready.go().await.map_err(|error| error.to_string())?;
        let child = going.become_program().await.map_err(|error| error.to_string())?;
        ended(child, "the start command", &mut self.output).await
    }
}

/// A program beside a daemon of Ray, as its user.
fn beside(daemon: &Daemon, uid: u32, files: &RayEnv, words: &[OsString]) -> Request {
    Request {
        like: Process { pid: daemon.pid, started: daemon.started },
        uid,
        in_its_place: false,
        program: words.first().cloned().unwrap_or_default(),
        words: words.to_vec(),
        variables: environment(&daemon.variables, files),
        files: files.clone(),
        input: String::new(),
    }
}

/// A key folder whose leaf nothing serves yet. The daemon makes one in ten seconds at most.
pub(super) async fn new_folder(site: &Site, old: &BTreeSet<String>) -> Result<ExecFolder, String> {
    let mut note = String::new();
    for pause in [Duration::ZERO, Duration::from_secs(11)] {
        sleep(pause).await;
        let answer =
            socket::ask(&site.socket, Ask::ExecFolder).await.map_err(|error| error.to_string())?;
        let Answer::ExecFolder(folder) = answer else {
            return Err(crate::cli::unexpected(answer).to_string());
        };
        if !old.contains(&prove::serial_of(&folder.env)?) {
            return Ok(folder);
        }
        note = folder.note.unwrap_or_default();
    }
    Err(format!("there is no newer leaf than the one that is served: {note}"))
}

async fn run_hook(hook: &Path, variables: &[(&'static str, String)]) -> Result<(), String> {
    let mut output = Written::new().map_err(|e| e.to_string())?;
    let (out, err) = (output.stdio(), output.stdio());
    let mut command = tokio::process::Command::new(hook);
    command
        .env_clear()
        .envs(variables.iter().map(|(name, value)| (name, value)))
        .stdin(Stdio::null());
    command
        .stdout(out.map_err(|e| e.to_string())?)
        .stderr(err.map_err(|e| e.to_string())?)
        .process_group(0);
    let child = command.spawn().map_err(|error| format!("{}: {error}", hook.display()))?;
    ended(child, &hook.display().to_string(), &mut output).await
}

/// What a program left running does not hold it up: its end counts, not that of its output.
async fn ended(mut child: Child, what: &str, output: &mut Written) -> Result<(), String> {
    let pid = child.id().and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?));
    let Ok(waited) = timeout(HOOK_TIME_MAX, child.wait()).await else {
        if let Some(pid) = pid {
            let _ = kill_process_group(pid, Signal::KILL);
        }
        let _ = child.kill().await;
        return Err(format!(
            "{what} did not end within {} s{}",
            HOOK_TIME_MAX.as_secs(),
            said(output)
        ));
    };
    match waited {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("{what} failed ({}){}", how(status), said(output))),
        Err(error) => Err(format!("{what}: {error}")),
    }
}

fn how(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => "ended".to_owned(),
    }
}

fn said(output: &mut Written) -> String {
    let tail = output.tail(OUTPUT_LEN_MAX);
    let lines: Vec<&str> = tail.lines().filter(|line| !line.trim().is_empty()).collect();
    let lines =
        lines[lines.len().saturating_sub(OUTPUT_LINES)..].iter().map(|line| printable(line));
    let lines: Vec<String> = lines.collect();
    if lines.is_empty() { String::new() } else { format!("; it said: {}", lines.join(" | ")) }
}

/// Whether a process ends so soon.
async fn ends_within(daemon: &Daemon, most: Duration) -> bool {
    let handle =
        Pid::from_raw(daemon.pid).and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
    let Some(handle) = handle else { return true };
    if find::stat(daemon.pid).ok().map(|stat| stat.started) != Some(daemon.started) {
        return true;
    }
    let end = Instant::now() + most;
    loop {
        let mut handles = [PollFd::new(&handle, PollFlags::IN)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        if poll(&mut handles, Some(&now)).is_ok_and(|ended| ended > 0) {
            return true;
        }
        if Instant::now() >= end {
            return false;
        }
        sleep(LOOK_PAUSE).await;
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use raymtls_proto::durable::{Access, create};

    use super::*;

    #[test]
    fn a_hook_that_others_may_write_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let hook = folder.path().join("start");
        let by = || Start::by(&[], folder.path());
        assert!(by().unwrap_err().contains("how Ray is started here is not known"));
        create(&hook, b"#!/bin/sh\n", Access { mode: 0o755, uid: None, gid: None }).unwrap();
        std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        assert_eq!(by(), Ok(Start::Hook(hook.clone())));
        std::fs::set_permissions(&hook, std::fs::Permissions::from_mode(0o775)).unwrap();
        assert!(by().unwrap_err().contains("may be written by others"));
        std::fs::set_permissions(&hook, std::fs::Permissions::from_mode(0o755)).unwrap();
        std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
        assert!(by().unwrap_err().contains("may be written by others"));
        let command = [OsString::from("ray"), OsString::from("start")];
        assert_eq!(Start::by(&command, folder.path()), Ok(Start::Command(command.to_vec())));
    }

    #[tokio::test]
    async fn a_hook_that_fails_says_what_it_said() {
        let folder = tempfile::tempdir().unwrap();
        let hook = folder.path().join("start");
        let text = b"#!/bin/sh\necho \"for $RAYMTLS_UNIT\"; printf '\\033[2J' ; exit 3\n";
        create(&hook, text, Access { mode: 0o755, uid: None, gid: None }).unwrap();
        let why = run_hook(&hook, &[("RAYMTLS_UNIT", "ray-worker.service".to_owned())])
            .await
            .unwrap_err();
        assert!(why.contains("exit code 3") && why.contains("for ray-worker.service"), "{why}");
        assert!(!why.contains('\x1b'), "{why}");
    }
}
