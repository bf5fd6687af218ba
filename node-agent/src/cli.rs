//! The command line: words to typed options, outcomes to text and exit codes.

mod isolation;
mod ray_flags;
mod tunnel;

use std::{
    ffi::OsString,
    io::{BufRead, IsTerminal, Write},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use clap::{Args, Parser, Subcommand, ValueEnum};
use raymtls_proto::{
    address::NodeAddress,
    clock::{Clock, SystemClock},
    identity::{DnsName, NodeName, Role},
    process,
};
use tokio::signal::unix::{SignalKind, signal};

use crate::{
    agent::{ActError, Agent},
    api::{Answer, Ask, ErrorKind, Renewed},
    client::CallLimits,
    config::{LogFormat, Partial, SOCKET, STATE_DIR, TLS_DIR, User, group_id, status_file_of},
    doctor,
    enroll::{self, Enrolled},
    exec,
    failure::Failure,
    keyfolder::KeyFolderError,
    keys::KeyError,
    served, socket,
    statedir::{StateError, read_if_there},
    status::{self, Status},
};

/// How often `status --watch` asks.
const WATCH_INTERVAL: Duration = Duration::from_secs(2);
/// Longest answer that is read from a person, in bytes.
const ANSWER_LEN_MAX: u64 = 64;
/// Exit code of a wrong command line.
const EXIT_USAGE: u8 = 64;

#[derive(Debug, Parser)]
#[command(
    name = "node-agent",
    version,
    about = "Keeps the TLS files of a Ray node: enrols it, renews its certificates, starts Ray with them",
    after_help = "Exit codes: 0 ok, 1 failed, 2 refused by the CA, 64 usage, 78 configuration"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Turn a join file into an identity, a first key folder and ray.env
    #[command(after_help = "Examples:
  node-agent enroll --join /root/join --state-dir /var/lib/ray-mtls/agent --tls-dir /var/lib/ray-mtls/tls --ray-group ray
  node-agent enroll --join join --role driver --once --tls-dir ~/ray-tls
      then: node-agent exec --env-file ~/ray-tls/ray.env -- python driver.py

It is safe to run again after a crash or a lost reply: the same key gets the same answer.")]
    Enroll(EnrollArgs),
    /// Run the daemon
    #[command(after_help = "Example:
  node-agent run --ray-uid 1000 --ray-group ray

Flags override /etc/ray-mtls/agent.toml, which knows state_dir, tls_dir, socket, status_file, ray_uid, ray_group, hooks_dir,
http_listen and log_format.")]
    Run(RunArgs),
    /// Show what the agent knows, from its status file when it does not answer
    #[command(after_help = "Examples:
  node-agent status
  node-agent status -o json | jq .files_work_until
  node-agent status --watch
  node-agent status --check || echo look after this node

The field `standing` says whether the CA serves this node: enrolled, refused, re-enrol needed or
left. `running horizon` is the first end
of a leaf that a process of Ray serves here, and `fails first` what breaks if nobody acts, and when.
Without --check the exit code tells only whether the daemon answers: 0 yes, 1 no.
With --check:
  0  the daemon answers, the standing is enrolled, and what starts now finds all its files
  1  the daemon does not answer, or there is no valid leaf or not yet Ray's token, or Ray must be
     started again (recycle-overdue)
  2  refused, re-enrol needed or left: nothing is renewed, though files may still be valid")]
    Status(StatusArgs),
    /// Renew the leaf of every live key folder now (same key, next serial), and the identity if it is due soon
    #[command(after_help = "Example:\n  node-agent renew")]
    Renew(AskArgs),
    /// Look once at what Ray's processes on this host serve
    #[command(hide = true)]
    Served(served::command::ServedArgs),
    /// Become a program that finds Ray's TLS files and token in its environment
    #[command(after_help = "Examples:
  node-agent exec -- ray start --head --port 6379
  node-agent exec -- python driver.py
  node-agent exec --env-file ~/ray-tls/ray.env -- python driver.py     (after enroll --once, without a daemon)

Inherited RAY_USE_TLS, RAY_TLS_* and RAY_AUTH_* are removed; each start gets a key folder of its own.")]
    Exec(ExecArgs),
    /// The flags with which `ray start` keeps to the cluster's port plan, on one line
    #[command(after_help = "Examples:
  sudo -u ray node-agent exec -- /opt/ray/bin/ray start --address=head.ray:6379 $(node-agent ray-flags)
  sudo -u ray node-agent exec -- /opt/ray/bin/ray start $(node-agent ray-flags --head)
  node-agent ray-flags -o json

The ports are those of the cluster's plan for this node's role, as the running agent knows it; without an
agent, as it knew it last (that wants a reader of the state folder). --node-ip-address is among the flags
where exactly one certified address is an address of this host. Ports that have no flag are variables
that `exec` and ray.env set.")]
    RayFlags(ray_flags::RayFlagsArgs),
    /// Look at the table that guards Ray's ports of this host, or remove it
    #[command(subcommand)]
    Isolation(isolation::IsolationCommand),
    /// Mode tunnel: how this node's data path stands, a new process in its place, its end
    #[command(subcommand)]
    Tunnel(tunnel::TunnelCommand),
    /// Say what is wrong on this host, each with the next step; changes nothing without --fix
    #[command(after_help = "Examples:
  sudo node-agent doctor
  node-agent doctor -o json | jq '.findings[] | select(.level == \"fail\")'
  sudo node-agent doctor --fix --dry-run
  node-agent doctor --explain 10.0.0.1:6379

Works without the daemon, and without root as far as it can: what it cannot see is `unknown`, with what is
missing for that. --fix changes modes, groups and links in the agent's two folders and removes what a crash
left half written, as their owner alone; it writes no file's content and follows no link.
--explain tells, where Ray says only `Timed out while waiting for GCS`, whether a leaf is over, of another
cluster, for another use or another address, whether there is no TLS, no listener or a filter.
Exit codes: 0 nothing is wrong, 1 something is (with --strict: or is to be looked at), 64 usage")]
    Doctor(doctor::command::DoctorArgs),
    /// Leave the cluster for good: the name and addresses are free, nothing is renewed any more
    #[command(after_help = "Example:\n  node-agent leave --yes")]
    Leave(LeaveArgs),
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    /// For people
    #[default]
    Table,
    /// One JSON document
    Json,
}

#[derive(Debug, Args)]
struct EnrollArgs {
    /// The join file, mode 0600; removed after success
    #[arg(long, value_name = "FILE")]
    join: PathBuf,
    /// Where the agent keeps its identity
    #[arg(long, value_name = "DIR", default_value = STATE_DIR)]
    state_dir: PathBuf,
    /// Where Ray finds its files
    #[arg(long, value_name = "DIR", default_value = TLS_DIR)]
    tls_dir: PathBuf,
    /// Name of this node [default: the host's name]
    #[arg(long)]
    name: Option<String>,
    /// What this machine is for
    #[arg(long, default_value = "worker")]
    role: Role,
    /// An address besides the one the CA sees; may be given again
    #[arg(long = "address", value_name = "IP")]
    addresses: Vec<NodeAddress>,
    /// A DNS name for the leaf; may be given again
    #[arg(long = "dns", value_name = "NAME")]
    dns_names: Vec<String>,
    /// The addresses are shared with other nodes of this host
    #[arg(long)]
    shared_address: bool,
    /// Group that may read Ray's key, by name or number
    #[arg(long, value_name = "GROUP")]
    ray_group: Option<String>,
    /// Leave the join file where it is
    #[arg(long)]
    keep_join_file: bool,
    /// Keep no identity: a driver until its leaf ends (with --role driver)
    #[arg(long)]
    once: bool,
    /// How long to try while the CA is away or the name or address is still held
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = humantime::parse_duration)]
    timeout: Duration,
    /// Output
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
}

#[derive(Debug, Args)]
struct RunArgs {
    /// Configuration file [default: /etc/ray-mtls/agent.toml if it is there]
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
    /// What the daemon says, for when it is gone; all may read it [default: status.json beside the socket]
    #[arg(long, value_name = "FILE")]
    status_file: Option<PathBuf>,
    /// The user that runs Ray, by name or number
    #[arg(long, value_name = "USER")]
    ray_uid: Option<String>,
    /// Group that may read Ray's key, by name or number [default: as enrolled]
    #[arg(long, value_name = "GROUP")]
    ray_group: Option<String>,
    /// Folder of programs to run after files changed
    #[arg(long, value_name = "DIR")]
    hooks_dir: Option<PathBuf>,
    /// Metrics and health at this address, or off
    #[arg(long, value_name = "ADDRESS:PORT|off")]
    http_listen: Option<String>,
    /// How logs are written
    #[arg(long, value_enum)]
    log_format: Option<LogFormat>,
}

#[derive(Debug, Args)]
struct AskArgs {
    /// The agent's socket
    #[arg(long, value_name = "PATH", default_value = SOCKET)]
    socket: PathBuf,
    /// Output
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
}

#[derive(Debug, Args)]
struct StatusArgs {
    #[command(flatten)]
    ask: AskArgs,
    /// What is read when the daemon does not answer [default: status.json beside the socket]
    #[arg(long, value_name = "FILE")]
    status_file: Option<PathBuf>,
    /// The agent's own folder, whose status file is read where there is no other
    #[arg(long, value_name = "DIR", default_value = STATE_DIR)]
    state_dir: PathBuf,
    /// Show it again and again
    #[arg(long)]
    watch: bool,
    /// Exit with 2 if the CA does not serve this node, with 1 if its files cannot be used
    #[arg(long, conflicts_with = "watch")]
    check: bool,
}

#[derive(Debug, Args)]
struct ExecArgs {
    /// The agent's socket
    #[arg(long, value_name = "PATH", default_value = SOCKET)]
    socket: PathBuf,
    /// Take the environment from this ray.env instead of asking the agent
    #[arg(long, value_name = "FILE")]
    env_file: Option<PathBuf>,
    /// The program and its arguments
    #[arg(required = true, last = true, value_name = "PROGRAM")]
    program: Vec<OsString>,
}

#[derive(Debug, Args)]
struct LeaveArgs {
    #[command(flatten)]
    ask: AskArgs,
    /// Do not ask
    #[arg(long)]
    yes: bool,
}

/// What the command line accepts; tests hold the documents' lines against it.
#[must_use]
pub fn command_line() -> clap::Command {
    <Cli as clap::CommandFactory>::command()
}

/// Parses the command line, does what it says, and tells how it went.
#[must_use]
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            // Help and version are no errors; everything else is usage.
            return if error.use_stderr() { ExitCode::from(EXIT_USAGE) } else { ExitCode::SUCCESS };
        }
    };
    match dispatch(cli.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("node-agent: {failure}");
            failure.exit_code()
        }
    }
}

fn dispatch(command: Command) -> Result<(), Failure> {
    match command {
        Command::Enroll(args) => enroll_command(args),
        Command::Run(args) => run_command(args),
        Command::Status(args) => block_on(status_command(args)),
        Command::Renew(args) => block_on(renew_command(args)),
        Command::Served(args) => block_on(served::command::run(args)),
        Command::Exec(args) => exec_command(&args),
        Command::RayFlags(args) => block_on(ray_flags::run(args)),
        Command::Isolation(command) => block_on(isolation::run(command)),
        Command::Tunnel(command) => block_on(tunnel::run(command)),
        Command::Doctor(args) => block_on(doctor::command::run(args)),
        Command::Leave(args) => block_on(leave_command(args)),
    }
}

fn enroll_command(args: EnrollArgs) -> Result<(), Failure> {
    start_logs(LogFormat::Human);
    harden();
    let output = args.output;
    let options = enroll_options(args)?;
    let clock: Arc<dyn Clock> = Arc::new(SystemClock);
    let enrolled = block_on(enroll::enroll(&options, clock.clone()))?;
    match output {
        Output::Json => print_json(&enrolled),
        Output::Table => print(&enrolled_text(&enrolled, &*clock)),
    }
}

fn enroll_options(args: EnrollArgs) -> Result<enroll::Options, Failure> {
    if args.once && args.role != Role::Driver {
        return Err(Failure::Usage("--once goes with --role driver only".to_owned()));
    }
    let name_given = args.name.is_some();
    let name = args.name.unwrap_or_else(host_name);
    let name: NodeName = name.parse().map_err(|e| Failure::Usage(format!("--name: {e}")))?;
    let dns_names: Result<Vec<DnsName>, _> = args.dns_names.iter().map(|n| n.parse()).collect();
    Ok(enroll::Options {
        join: args.join,
        state_dir: args.state_dir,
        tls_dir: args.tls_dir,
        name,
        name_given,
        role: args.role,
        addresses: args.addresses,
        dns_names: dns_names.map_err(|e| Failure::Usage(format!("--dns: {e}")))?,
        shared_address: args.shared_address,
        ray_gid: args.ray_group.as_deref().map(group_id).transpose().map_err(Failure::config)?,
        keep_join_file: args.keep_join_file,
        once: args.once,
        timeout: args.timeout,
        limits: CallLimits::default(),
    })
}

/// The host's name up to the first dot, in lower case.
fn host_name() -> String {
    let system = rustix::system::uname();
    let name = system.nodename().to_string_lossy().to_lowercase();
    name.split('.').next().unwrap_or_default().to_owned()
}

fn enrolled_text(enrolled: &Enrolled, clock: &dyn Clock) -> String {
    let already = if enrolled.already { "already enrolled" } else { "enrolled" };
    let identity = enrolled
        .identity_serial
        .as_deref()
        .unwrap_or("none kept: this driver works until its leaf ends, then enrol again");
    let start = if enrolled.identity_serial.is_some() {
        "node-agent run, then: node-agent exec -- ray start ...".to_owned()
    } else {
        format!("node-agent exec --env-file {} -- PROGRAM", enrolled.ray_env.display())
    };
    format!(
        "{already}: {} ({}) of cluster {}\n\
         addresses    {}\n\
         DNS names    {}\n\
         identity     {identity}\n\
         leaf         {}  ends {} ({})\n\
         key folder   {}\n\
         ray.env      {}\n\
         join file    {}\n\
         next         {start}\n",
        enrolled.node,
        enrolled.role,
        enrolled.cluster,
        enrolled.addresses.join(", "),
        enrolled.dns_names.join(", "),
        enrolled.leaf_serial,
        enrolled.leaf_not_after,
        enrolled.leaf_not_after.relative(clock.now()),
        enrolled.key_folder.display(),
        enrolled.ray_env.display(),
        enrolled.join_file,
    )
}

fn harden() {
    if let Err(error) = process::harden() {
        tracing::warn!("{error}");
    }
}

fn run_command(args: RunArgs) -> Result<(), Failure> {
    let file = Partial::read(args.config.as_deref()).map_err(Failure::config)?;
    let flags = Partial {
        state_dir: args.state_dir,
        tls_dir: args.tls_dir,
        socket: args.socket,
        status_file: args.status_file,
        ray_uid: args.ray_uid.map(User::Name),
        ray_group: args.ray_group,
        hooks_dir: args.hooks_dir,
        http_listen: args.http_listen,
        log_format: args.log_format,
        // What it takes is no matter of one start.
        tunnel: None,
    };
    let chosen = flags.or(file);
    start_logs(chosen.log_format.unwrap_or_default());
    let config = chosen.complete().map_err(Failure::config)?;
    harden();
    block_on(async {
        let agent = Agent::open(config, Arc::new(SystemClock)).map_err(open_failure)?;
        let node = agent.node();
        tracing::info!(
            version = env!("CARGO_PKG_VERSION"), cluster = %node.cluster, node = %node.node,
            role = %node.role, "node-agent runs"
        );
        let stop = stop_signal()?;
        agent.run(stop).await
    })
}

/// Why the daemon cannot start. The service manager does not try again after a failure of
/// configuration, so that is only what an operator must put right.
fn open_failure(error: ActError) -> Failure {
    let is_config = match &error {
        ActError::State(error) => match error {
            StateError::Io(_) | StateError::Locked(_) => false,
            StateError::Key(error) => is_damage(error),
            StateError::NotEnrolled(_)
            | StateError::Damaged { .. }
            | StateError::Exposed { .. } => true,
        },
        ActError::KeyFolder(error) => match error {
            KeyFolderError::Io(_) => false,
            KeyFolderError::Key(error) => is_damage(error),
            KeyFolderError::Group { .. }
            | KeyFolderError::Path(_)
            | KeyFolderError::Exposed { .. }
            | KeyFolderError::Place { .. }
            | KeyFolderError::Foreign { .. }
            | KeyFolderError::Damaged { .. } => true,
        },
        ActError::Key(error) => is_damage(error),
        ActError::Call(_)
        | ActError::Verify(_)
        | ActError::ControlCrl(_)
        | ActError::TooManyFolders(_) => false,
    };
    if is_config { Failure::config(error) } else { error.into() }
}

fn is_damage(error: &KeyError) -> bool {
    match error {
        KeyError::Damaged(_) => true,
        KeyError::Read { .. } | KeyError::Library(_) => false,
    }
}

/// Ready when the service manager or a person wants the daemon to end.
fn stop_signal() -> Result<impl Future<Output = ()>, Failure> {
    let mut terminate = signal(SignalKind::terminate()).map_err(Failure::failed)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(Failure::failed)?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}

async fn status_command(args: StatusArgs) -> Result<(), Failure> {
    loop {
        let (status, live) = read_status(&args).await?;
        match args.ask.output {
            Output::Json => print_json(&status)?,
            Output::Table => {
                let now = SystemClock.now();
                if args.watch {
                    print("\x1b[2J\x1b[H")?;
                }
                print(&status::table(&status, now, live))?;
            }
        }
        if !live && !args.watch {
            return Err(Failure::Failed(DAEMON_DEAD.to_owned()));
        }
        if args.check {
            return status::check(&status, SystemClock.now());
        }
        if !args.watch {
            return Ok(());
        }
        tokio::time::sleep(WATCH_INTERVAL).await;
    }
}

/// The status printed before it is the last one the daemon wrote.
const DAEMON_DEAD: &str = "the daemon does not answer: this is what it wrote last; start it with \
                           `systemctl start node-agent` or `node-agent run`";

async fn read_status(args: &StatusArgs) -> Result<(Status, bool), Failure> {
    let silent = match socket::ask(&args.ask.socket, Ask::Status).await {
        Ok(answer) => {
            let Answer::Status(status) = answer else { return Err(unexpected(answer)) };
            return Ok((*status, true));
        }
        Err(silent) => silent,
    };
    // The one beside the socket is younger; the other one is still there after the host booted again.
    let beside = args.status_file.clone().unwrap_or_else(|| status_file_of(&args.ask.socket));
    let mut said = silent.to_string();
    for path in [beside, args.state_dir.join("status.json")] {
        match written_status(&path) {
            Ok(status) => return Ok((status.of_the_dead(), false)),
            Err(why) => said = format!("{said}; and {why}"),
        }
    }
    Err(Failure::Failed(said))
}

fn written_status(path: &Path) -> Result<Status, String> {
    let shown = path.display();
    let text = read_if_there(path)
        .map_err(|e| format!("{shown}: {e}"))?
        .ok_or_else(|| format!("there is no status file {shown}"))?;
    serde_json::from_slice(&text).map_err(|e| format!("{shown} is damaged: {e}"))
}

async fn renew_command(args: AskArgs) -> Result<(), Failure> {
    let answer = socket::ask(&args.socket, Ask::Renew).await.map_err(Failure::failed)?;
    let Answer::Renewed(renewed) = answer else { return Err(unexpected(answer)) };
    match args.output {
        Output::Json => print_json(&renewed)?,
        Output::Table => print(&renewed_text(&renewed))?,
    }
    match renewed.failed.as_slice() {
        [] => Ok(()),
        failed => Err(Failure::Failed(format!("not renewed: {}", failed.join("; ")))),
    }
}

fn renewed_text(renewed: &Renewed) -> String {
    let changes = renewed.identity.iter().chain(&renewed.key_folders);
    changes.map(|c| format!("{:<10} {} -> {}\n", c.name, c.old, c.new)).collect()
}

fn exec_command(args: &ExecArgs) -> Result<(), Failure> {
    let (env, identity_near) = match &args.env_file {
        Some(path) => (exec::env_from_file(path)?, exec::has_identity(Path::new(STATE_DIR))),
        None => (block_on(exec::env_from_agent(&args.socket))?, true),
    };
    Err(exec::become_program(&env, &args.program, identity_near))
}

async fn leave_command(args: LeaveArgs) -> Result<(), Failure> {
    if !args.yes {
        consent(LEAVE_WARNING, "the node stays").await?;
    }
    let answer = socket::ask(&args.ask.socket, Ask::Leave).await.map_err(Failure::failed)?;
    let Answer::Left { message } = answer else { return Err(unexpected(answer)) };
    match args.ask.output {
        Output::Table => print(&format!("{message}\n")),
        Output::Json => print_json(&serde_json::json!({ "message": message })),
    }
}

const LEAVE_WARNING: &str =
    "The node leaves its cluster for good: its name and addresses become free.";

/// Comes back once a person typed yes; elsewhere nobody could.
async fn consent(warning: &str, nothing: &str) -> Result<(), Failure> {
    if !std::io::stdin().is_terminal() {
        return Err(Failure::Usage(format!(
            "{nothing}: there is no terminal to ask on; add --yes. {warning}"
        )));
    }
    eprint!("{warning}\ntype yes to do it: ");
    let answer = tokio::task::spawn_blocking(|| read_answer(std::io::stdin().lock()))
        .await
        .map_err(Failure::failed)?;
    agreed(&answer.map_err(Failure::failed)?, nothing)
}

fn read_answer(input: impl BufRead) -> std::io::Result<String> {
    let mut answer = String::new();
    input.take(ANSWER_LEN_MAX).read_line(&mut answer)?;
    Ok(answer)
}

fn agreed(answer: &str, nothing: &str) -> Result<(), Failure> {
    if answer.trim() == "yes" {
        return Ok(());
    }
    Err(Failure::Failed(format!("{nothing}: the answer was not yes")))
}

/// An answer that is an error, or not one to this question.
pub(crate) fn unexpected(answer: Answer) -> Failure {
    match answer {
        Answer::Error(error) => match error.kind {
            ErrorKind::Refused => Failure::Refused(error.message),
            ErrorKind::Failed | ErrorKind::Denied | ErrorKind::Invalid => {
                Failure::Failed(error.message)
            }
        },
        Answer::Status(_)
        | Answer::ExecFolder(_)
        | Answer::Renewed(_)
        | Answer::Tunnel { .. }
        | Answer::Left { .. } => Failure::Failed(
            "the agent answered another question: is it of this release?".to_owned(),
        ),
    }
}

fn start_logs(format: LogFormat) {
    let filter = tracing_subscriber::EnvFilter::try_from_env("RAYMTLS_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    let logs = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    // A second call in one process keeps the first.
    let _ = match format {
        LogFormat::Human => logs.with_target(false).try_init(),
        LogFormat::Json => logs.json().flatten_event(true).try_init(),
    };
}

fn block_on<T>(future: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(Failure::failed)?
        .block_on(future)
}

pub(crate) fn print(text: &str) -> Result<(), Failure> {
    std::io::stdout().write_all(text.as_bytes()).map_err(Failure::failed)
}

pub(crate) fn print_json(value: &impl serde::Serialize) -> Result<(), Failure> {
    let text = serde_json::to_string_pretty(value).map_err(Failure::failed)?;
    print(&format!("{text}\n"))
}

#[cfg(test)]
mod tests;
