//! The process `ray-tunnel`: what it gives up, what it listens on, and how it ends. It takes its
//! sockets from outside and its orders from the control socket.

use std::{io, net::SocketAddr, path::PathBuf, process::ExitCode, sync::Arc, time::Duration};

use clap::{Parser, Subcommand};
use raymtls_proto::clock::{Clock, SystemClock};
use sd_notify::NotifyState;
use thiserror::Error;
use tokio::{
    net::{TcpListener, TcpStream, UnixListener},
    signal::unix::{SignalKind, signal},
    sync::watch,
    task::JoinSet,
    time::Instant,
};

use super::{
    captured,
    harden::{self, HardenError},
    inbound,
    inforce::LoadError,
    listeners::{Listeners, ListenersError},
    log::Log,
    rules,
    serve::{self, Handed},
    state::Tunnel,
    sweep,
};

/// How long flows may go on after SIGTERM.
const TERM_TIME_MAX: Duration = Duration::from_secs(5);
/// How long nothing is accepted after it did not work: descriptors may be missing.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(100);
/// How often a drain looks whether flows are left.
const DRAIN_INTERVAL: Duration = Duration::from_millis(50);
/// Most threads that carry flows.
const THREADS_MAX: usize = 32;
/// How many bytes a thread's stack has: no flow recurses.
const STACK_LEN: usize = 512 * 1024;

/// Carries Ray's connections to other nodes over mutual TLS 1.3. The agent starts it.
#[derive(Debug, Parser)]
#[command(name = "ray-tunnel", version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run until it is told to drain, or SIGTERM
    Run(Run),
}

#[derive(Debug, clap::Args)]
struct Run {
    /// The rules the agent writes
    #[arg(long, default_value = rules::DEFAULT_PATH)]
    rules: PathBuf,
    /// Listening sockets by descriptor: captured=3,captured=4,inbound=5,control=6; without it they
    /// come from the service manager (LISTEN_FDS) under these names
    #[arg(long)]
    fds: Option<String>,
}

/// Why it does not run.
#[derive(Debug, Error)]
enum RunError {
    #[error(transparent)]
    Harden(#[from] HardenError),
    #[error(transparent)]
    Listeners(#[from] ListenersError),
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error("{0}")]
    Io(#[from] io::Error),
}

/// Runs the command line.
#[must_use]
pub fn main() -> ExitCode {
    let Cli { command: Command::Run(run) } = Cli::parse();
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    let log = match Log::start() {
        Ok(log) => log,
        Err(error) => {
            eprintln!("error: ray-tunnel cannot start a thread: {error}");
            return ExitCode::FAILURE;
        }
    };
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(log.clone())
        .with_ansi(false)
        .init();
    let ended = start(&run);
    if let Err(error) = &ended {
        tracing::error!("{error}");
    }
    log.finish();
    if ended.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn start(run: &Run) -> Result<(), RunError> {
    let listeners = Listeners::take(run.fds.as_deref())?;
    let descriptors_max = harden::harden()?;
    let inbound_ports = Listeners::ports(&listeners.inbound);
    let inbound_port = inbound_ports.first().copied().unwrap_or_default();
    let own_ports = [inbound_ports, Listeners::ports(&listeners.captured)].concat();
    let clock: Arc<dyn Clock> = Arc::new(SystemClock);
    let rules = run.rules.clone();
    let tunnel = Tunnel::new(rules, clock, descriptors_max, inbound_port, own_ports)?;
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(THREADS_MAX);
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(threads)
        .thread_stack_size(STACK_LEN)
        .enable_all()
        .build()?
        .block_on(live(Arc::new(tunnel), listeners))
}

/// When and until when to drain: the first who asks begins it, the shortest deadline counts.
#[derive(Clone, Debug)]
pub(crate) struct Drains(watch::Sender<Option<Instant>>);

impl Drains {
    /// From now on nothing is accepted, and so much later all is over.
    pub(crate) fn begin(&self, time_max: Duration) {
        let deadline = Instant::now() + time_max;
        self.0.send_modify(|known| *known = Some(known.map_or(deadline, |k| k.min(deadline))));
    }
}

async fn live(tunnel: Arc<Tunnel>, listeners: Listeners) -> Result<(), RunError> {
    let handed = Arc::new(duplicates(&listeners)?);
    let (sender, drains) = watch::channel(None);
    let drains_begin = Drains(sender);
    let mut accepting = JoinSet::new();
    for listener in listeners.captured {
        let listener = TcpListener::from_std(listener)?;
        accepting.spawn(accept(listener, tunnel.clone(), captured::take));
    }
    for listener in listeners.inbound {
        let listener = TcpListener::from_std(listener)?;
        accepting.spawn(accept(listener, tunnel.clone(), inbound::take));
    }
    let mut control = JoinSet::new();
    for listener in listeners.control {
        let listener = UnixListener::from_std(listener)?;
        let serving = serve::serve(listener, tunnel.clone(), handed.clone(), drains_begin.clone());
        control.spawn(serving);
    }
    tokio::spawn(sweep::sweep(tunnel.clone()));
    tokio::spawn(term(drains_begin.clone()));
    let generation = tunnel.in_force().rules.generation;
    tracing::info!(generation, port = tunnel.inbound_port, "ray-tunnel is ready");
    let _ = sd_notify::notify(&[NotifyState::Ready]);
    drained(&tunnel, drains, accepting).await;
    drop(control);
    Ok(())
}

/// Their own copies, so that a drain that closes the others can still hand them over.
fn duplicates(listeners: &Listeners) -> io::Result<Handed> {
    Ok(Handed {
        captured: listeners.captured.iter().map(|l| l.try_clone()).collect::<Result<_, _>>()?,
        inbound: listeners.inbound.iter().map(|l| l.try_clone()).collect::<Result<_, _>>()?,
        control: listeners.control.iter().map(|l| l.try_clone()).collect::<Result<_, _>>()?,
    })
}

async fn accept<F>(
    listener: TcpListener,
    tunnel: Arc<Tunnel>,
    take: impl Fn(Arc<Tunnel>, TcpStream, SocketAddr) -> F,
) where
    F: Future<Output = ()> + Send + 'static,
{
    loop {
        match listener.accept().await {
            Ok((stream, source)) => {
                let taking = tunnel.taking();
                let taken = take(tunnel.clone(), stream, source);
                tokio::spawn(async move {
                    taken.await;
                    drop(taking);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "a listening socket cannot accept");
                tokio::time::sleep(ACCEPT_BACKOFF).await;
            }
        }
    }
}

async fn term(drains: Drains) {
    let (Ok(mut term), Ok(mut int)) =
        (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        return;
    };
    tokio::select! {
        _ = term.recv() => {}
        _ = int.recv() => {}
    }
    drains.begin(TERM_TIME_MAX);
}

/// Waits for a drain to begin, and then until no flow is left or the deadline is over.
async fn drained(
    tunnel: &Tunnel,
    mut drains: watch::Receiver<Option<Instant>>,
    mut accepting: JoinSet<()>,
) {
    if drains.wait_for(Option::is_some).await.is_err() {
        return;
    }
    tunnel.drain();
    accepting.shutdown().await;
    tracing::info!(flows = tunnel.flows.len(), "accepts nothing more");
    let _ = sd_notify::notify(&[NotifyState::Stopping]);
    loop {
        let left = tunnel.flows.len();
        let deadline = *drains.borrow();
        let is_over = deadline.is_none_or(|deadline| Instant::now() >= deadline);
        if tunnel.is_idle() || is_over {
            tracing::info!(flows = left, "ends; flows that are left are reset");
            return;
        }
        tokio::time::sleep(DRAIN_INTERVAL).await;
    }
}
