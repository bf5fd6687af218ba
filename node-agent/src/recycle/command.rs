//! `node-agent recycle`: words to options, a plan to a person and their consent, what came of it to an exit code.

use std::{
    ffi::OsString,
    fs::File,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use raymtls_proto::{
    clock::{Clock, SystemClock},
    identity::Role,
    v1,
};
use rustix::fs::{FlockOperation, flock};
use tokio::{
    signal::unix::{SignalKind, signal},
    time::Instant,
};

use super::{
    find::{self, Whose},
    gather::{Gathered, gather},
    gcs,
    node::{self, Broken, Start},
    plan::{Plan, Scope, plan},
    prove,
    report::{Progress, Report, seconds},
};
use crate::{
    api::{Answer, Ask},
    cli::{Output, consent, print_json, unexpected},
    config::{Partial, User},
    exec,
    failure::Failure,
    rayenv::RayEnv,
    served::Memory,
    socket,
    statedir::StateDir,
    status::Status,
};

/// Help behind the options.
pub(crate) const AFTER_HELP: &str = "Examples:
  sudo node-agent recycle --dry-run
  sudo node-agent recycle --yes                        a worker, by its hooks; on a head: gcs_server alone
  sudo node-agent recycle --yes -- /opt/ray/bin/ray start --address=head.ray:6379 $(node-agent ray-flags)
  sudo node-agent recycle --whole-head --yes --force   in a maintenance window

On a worker: no new work for --drain, Ray is stopped, and started again with a new key folder, by the command after
-- (as Ray's user) or by the program `start` in --hooks; then every port of the node must serve a new leaf, and a
task pinned to it must run. On a head whose control store is on disk or in Redis: gcs_server alone is executed
again in its own place. It says first what it will do, and names each driver that would be hurt: one that runs on
the node, and one whose leaf has ended, which would hang. With such a driver it refuses, unless --force.
Nothing is done to a process of another user, session or network than this node's Ray.

It runs as root, since it acts as Ray's user. The capabilities it needs: SYS_PTRACE, KILL, SETUID, SETGID,
SETPCAP, SYS_RESOURCE, SYS_NICE, and SYS_ADMIN with SYS_CHROOT where Ray has namespaces of its own.
Exit codes: 0 done, or nothing is in the way (--dry-run), 1 refused or failed: the text says in which state the
node is, 64 usage, 78 configuration";

/// How long Ray has for what runs, unless it is told.
const DRAIN_DEFAULT: &str = "60s";
/// Longest drain.
const DRAIN_MAX: Duration = Duration::from_secs(3600);

#[derive(Debug, clap::Args)]
pub(crate) struct RecycleArgs {
    /// Configuration file of the agent [default: /etc/ray-mtls/agent.toml if it is there]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Where the agent keeps its identity
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Where Ray finds its files
    #[arg(long, value_name = "DIR")]
    tls_dir: Option<PathBuf>,
    /// The agent's socket
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// The user that runs Ray, by name or number
    #[arg(long, value_name = "USER")]
    ray_uid: Option<String>,
    /// Folder of the programs `start` and `stop`, which belong to root
    #[arg(long, value_name = "DIR", default_value = "/etc/ray-mtls/recycle")]
    hooks: PathBuf,
    /// How long what runs on a worker has to end; 0s: no drain
    #[arg(long, value_name = "TIME", default_value = DRAIN_DEFAULT, value_parser = humantime::parse_duration)]
    drain: Duration,
    /// On a head: all of Ray, not gcs_server alone
    #[arg(long)]
    whole_head: bool,
    /// Say what would be done, and do nothing
    #[arg(long)]
    dry_run: bool,
    /// Go on though the drivers named are hurt
    #[arg(long)]
    force: bool,
    /// Do not ask
    #[arg(long)]
    yes: bool,
    /// Output
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
    /// How Ray is started: a command, run as Ray's user with the new files
    #[arg(last = true, value_name = "PROGRAM")]
    program: Vec<OsString>,
}

/// This node, as the command knows it.
pub(super) struct Site {
    pub(super) state_dir: PathBuf,
    pub(super) tls_dir: PathBuf,
    pub(super) socket: PathBuf,
    pub(super) uid: u32,
    pub(super) port_plan: Option<v1::PortPlan>,
    /// The systemd unit in which Ray runs.
    pub(super) unit: Option<String>,
    pub(super) clock: Arc<dyn Clock>,
}

impl Site {
    pub(super) fn whose(&self) -> Whose {
        Whose { uid: self.uid, tls_dir: self.tls_dir.clone() }
    }

    /// The files with which something starts beside Ray.
    pub(super) fn current_files(&self) -> Result<RayEnv, String> {
        exec::env_from_file(&self.tls_dir.join("ray.env")).map_err(|failure| failure.to_string())
    }
}

pub(crate) async fn run(args: RecycleArgs) -> Result<(), Failure> {
    if args.drain > DRAIN_MAX {
        return Err(Failure::Usage(format!("--drain: at most {} s", DRAIN_MAX.as_secs())));
    }
    if !rustix::process::geteuid().is_root() {
        return Err(Failure::Usage("recycle acts as Ray's user: run it as root (sudo)".to_owned()));
    }
    let mut site = site(&args)?;
    let _alone = alone(&site.state_dir)?;
    let status = status(&site).await?;
    let role: Role = status.role.parse().map_err(Failure::failed)?;
    let scope = Scope::of(role, args.whole_head).map_err(|why| Failure::Usage(why.to_owned()))?;
    let found = find::find(&site.whose()).await.map_err(Failure::failed)?;
    site.unit = unit(found.raylet.pid);
    let start = Start::by(&args.program, &args.hooks);
    let Gathered { facts, survey } =
        gather(&site, &status, &found, scope, &start, args.drain).await;
    let old = prove::look(&site, &mut Memory::default()).await.map_err(Failure::Failed)?;
    let old = prove::serials(&old);
    let plan = plan(&facts);
    let mut report = Report {
        cluster: status.cluster.clone(),
        node: status.node.clone(),
        scope,
        outcome: "dry-run",
        plan: plan.clone(),
        done: Vec::new(),
        old_serials: old.iter().cloned().collect(),
        new_serials: Vec::new(),
        failure: None,
    };
    eprint!("{}", told(&report, args.drain));
    if let Some(why) = refused(&plan, args.force) {
        report.outcome = "refused";
        report.failure = Some(why.clone());
        return end(&args, &report, Err(Failure::Failed(why)));
    }
    if args.dry_run {
        return end(&args, &report, Ok(()));
    }
    if !args.yes {
        consent("Ray on this node is recycled as said above.", "nothing was done").await?;
    }
    ignore_interrupts()?;
    let mut progress = Progress::new();
    let begun = Instant::now();
    let ran = match (scope, &found.gcs) {
        (Scope::GcsServer, Ok(gcs)) => {
            let work = gcs::Work { site: &site, found: &found, gcs, before: &survey, old: &old };
            work.run(&mut progress).await
        }
        // A plan without gcs_server or without a start was refused above.
        (Scope::GcsServer, Err(error)) => return Err(Failure::failed(error)),
        (Scope::Node | Scope::Head, _) => {
            let start = start.map_err(Failure::Failed)?;
            let (hooks, drain) = (args.hooks.as_path(), args.drain);
            let work = node::Work {
                site: &site,
                found: &found,
                plan: &plan,
                start: &start,
                hooks,
                drain,
                old: &old,
            };
            work.run(&mut progress).await
        }
    };
    report.done = std::mem::take(&mut progress.done);
    match ran {
        Ok(serials) => {
            report.outcome = "done";
            report.new_serials = serials;
            progress.say(&format!("recycled {} in {}", scope.what(), seconds(begun.elapsed())));
            end(&args, &report, Ok(()))
        }
        Err(Broken { step, why, state }) => {
            let text = step.text(scope, args.drain);
            let why = format!("{text}: {why}. {state}");
            report.outcome = "failed";
            report.failure = Some(why.clone());
            end(&args, &report, Err(Failure::Failed(why)))
        }
    }
}

fn end(args: &RecycleArgs, report: &Report, result: Result<(), Failure>) -> Result<(), Failure> {
    match args.output {
        Output::Table => {}
        Output::Json => print_json(report)?,
    }
    result
}

fn site(args: &RecycleArgs) -> Result<Site, Failure> {
    let file = Partial::read(args.config.as_deref()).map_err(Failure::config)?;
    let flags = Partial {
        state_dir: args.state_dir.clone(),
        tls_dir: args.tls_dir.clone(),
        socket: args.socket.clone(),
        ray_uid: args.ray_uid.clone().map(User::Name),
        ..Partial::default()
    };
    let config = flags.or(file).complete().map_err(Failure::config)?;
    let uid = config.ray_uid.ok_or_else(|| {
        Failure::Usage(
            "who runs Ray is not known: give --ray-uid, or ray_uid in the configuration".to_owned(),
        )
    })?;
    let memory = StateDir::open(&config.state_dir).map(|state| state.memory());
    Ok(Site {
        port_plan: memory.ok().and_then(|memory| memory.settings()?.port_plan),
        state_dir: config.state_dir,
        tls_dir: config.tls_dir,
        socket: config.socket.unwrap_or_default(),
        uid,
        unit: None,
        clock: Arc::new(SystemClock),
    })
}

/// One recycle of a node at a time: a lock on the state folder, which ends with the command. Nobody but root and
/// the agent can open that folder; whoever could would hold the lock for ever.
fn alone(state_dir: &Path) -> Result<File, Failure> {
    let failed =
        |error: std::io::Error| Failure::Failed(format!("{}: {error}", state_dir.display()));
    let folder = File::open(state_dir).map_err(failed)?;
    flock(&folder, FlockOperation::NonBlockingLockExclusive).map_err(|_| {
        Failure::Failed("another `node-agent recycle` works on this node: wait for it".to_owned())
    })?;
    Ok(folder)
}

async fn status(site: &Site) -> Result<Status, Failure> {
    match socket::ask(&site.socket, Ask::Status).await.map_err(Failure::failed)? {
        Answer::Status(status) => Ok(*status),
        other @ (Answer::ExecFolder(_)
        | Answer::Renewed(_)
        | Answer::Left { .. }
        | Answer::Tunnel { .. }
        | Answer::Error(_)) => Err(unexpected(other)),
    }
}

/// The last part of a control group of systemd's, see cgroups(7).
fn unit(pid: i32) -> Option<String> {
    let text = find::read(pid, "cgroup").ok()?;
    unit_in(&String::from_utf8_lossy(&text))
}

fn unit_in(cgroup: &str) -> Option<String> {
    let of_systemd = |line: &&str| line.starts_with("0::") || line.contains(":name=systemd:");
    let mut units = cgroup.lines().filter(of_systemd).filter_map(|line| {
        let (above, last) = line.splitn(3, ':').nth(2)?.rsplit_once('/')?;
        // Below a service its own user makes the groups: only what systemd itself made names a unit.
        let is_systems = above.split('/').all(|part| part.is_empty() || part.ends_with(".slice"));
        let is_plain = !last.starts_with('-')
            && last.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.@:\\".contains(&b));
        (is_systems && last.ends_with(".service") && is_plain).then(|| last.to_owned())
    });
    units.next_back()
}

fn refused(plan: &Plan, force: bool) -> Option<String> {
    if !plan.refusals.is_empty() {
        return Some(format!("nothing was done: {}", plan.refusals.join("; ")));
    }
    let first = plan.harms.first().filter(|_| !force)?;
    let more = plan.harms.len() - 1;
    let more = if more > 0 { format!(", and {more} more, named above") } else { String::new() };
    Some(format!(
        "nothing was done: {}: {}{more}; --force goes on in spite of it",
        first.who, first.why
    ))
}

/// The plan, for a person.
fn told(report: &Report, drain: Duration) -> String {
    let Report { plan, cluster, node, scope, .. } = report;
    let mut lines = vec![format!("recycle {} ({node}, cluster {cluster})", scope.what())];
    lines.extend(plan.steps.iter().map(|step| format!("  - {}", step.text(*scope, drain))));
    lines.extend(plan.warnings.iter().map(|text| format!("warning: {text}")));
    lines.extend(plan.harms.iter().map(|harm| format!("HURT: {}: {}", harm.who, harm.why)));
    lines.extend(plan.refusals.iter().map(|text| format!("REFUSED: {text}")));
    lines.join("\n") + "\n"
}

/// Half a recycle is worse than none: what asks this command to end is told so, and it goes on.
fn ignore_interrupts() -> Result<(), Failure> {
    for kind in [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()] {
        let mut signals = signal(kind).map_err(Failure::failed)?;
        tokio::spawn(async move {
            while signals.recv().await.is_some() {
                eprintln!("node-agent: the recycle goes on; each step of it is bounded");
            }
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{super::plan::Harm, *};

    #[test]
    fn force_goes_on_over_harm_and_never_over_a_refusal() {
        let harm = || Harm { job: None, who: "driver pid 7".to_owned(), why: "it ends".to_owned() };
        let made = |refusals: &[&str], harms: usize| Plan {
            scope: Scope::Node,
            refusals: refusals.iter().map(|text| (*text).to_owned()).collect(),
            harms: (0..harms).map(|_| harm()).collect(),
            warnings: vec![],
            steps: vec![],
        };
        for (refusals, harms, force, text) in [
            (&[][..], 0, false, None),
            (&[], 2, false, Some("driver pid 7: it ends, and 1 more")),
            (&[], 2, true, None),
            (&["no"], 0, true, Some("nothing was done: no")),
        ] {
            let refused = refused(&made(refusals, harms), force);
            match text {
                None => assert_eq!(refused, None),
                Some(text) => {
                    assert!(refused.as_ref().is_some_and(|r| r.contains(text)), "{refused:?}");
                }
            }
        }
    }

    #[test]
    fn the_unit_of_a_raylet_is_told_by_its_control_group() {
        for (cgroup, unit) in [
            ("0::/system.slice/ray-worker.service\n", Some("ray-worker.service")),
            (
                "4:memory:/a\n1:name=systemd:/system.slice/ray-head.service\n",
                Some("ray-head.service"),
            ),
            ("0::/user.slice/user-0.slice/session-1.scope\n", None),
            ("0::/a b.service\n", None),
            ("0::/\n", None),
            // A user's manager, and a subtree that was given away.
            ("0::/user.slice/user-1.slice/user@1.service/app.slice/sshd.service\n", None),
            ("0::/system.slice/ray-worker.service/x/sshd.service\n", None),
            ("0::/system.slice/-Hhost.service\n", None),
        ] {
            assert_eq!(unit_in(cgroup).as_deref(), unit, "{cgroup}");
        }
    }
}
