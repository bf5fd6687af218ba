//! The command line of `ca-server`: arguments to configuration to `init`, `serve`, `check`,
//! `restore` or `export-key` to an exit code.

use std::{
    future::Future,
    io,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
};

use clap::{Parser, Subcommand};
use raymtls_proto::{
    bundle,
    clock::{Clock, SystemClock},
    identity::TrustDomain,
    process,
};
use tokio::signal::unix::{SignalKind, signal};
use tracing::{error, info, warn};

use crate::{
    admin_socket,
    ca::{Ca, CaError},
    check::{self, CheckError},
    config::{Config, LogFormat},
    descriptors,
    export_key::{self, ExportError, Which},
    init,
    jwt::Workloads,
    keys::{authority::AuthorityError, kek::Kek},
    limits::Limits,
    proxy_protocol::TrustedProxies,
    restore::{self, RestoreError},
    serve::{self, Listeners},
    store::{Authority, Store, kv::KvStore, sled::SledEngine, unix_ms},
    trusted_folder,
};

/// Exit codes: sysexits(3) for usage and configuration.
const EXIT_FAILED: u8 = 1;
const EXIT_USAGE: u8 = 64;
const EXIT_CONFIG: u8 = 78;

#[derive(Debug, Parser)]
#[command(
    name = "ca-server",
    version,
    about = "Certificate authority for Ray clusters",
    after_help = "Examples:\n  ca-server init --dir /var/lib/ray-mtls/ca --trust-domain ray.example\n  \
                  ca-server serve --dir /var/lib/ray-mtls/ca --config /etc/ray-mtls/ca-server.toml"
)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make a new CA in an empty folder
    #[command(
        after_help = "Makes the control root and issuer, wrapped by the key-encryption key. Without \
                      one at --kek-file, makes that too: back it up apart from the data folder, \
                      since neither is worth anything without the other.\n\nExample:\n  ca-server \
                      init --dir /var/lib/ray-mtls/ca --trust-domain ray.example"
    )]
    Init {
        /// Data folder
        #[arg(long)]
        dir: PathBuf,
        /// Name of the deployment in every certificate; cannot be changed later
        #[arg(long, default_value = "ray.internal")]
        trust_domain: TrustDomain,
        /// Key-encryption key
        #[arg(long, default_value = "/etc/ray-mtls/kek")]
        kek_file: PathBuf,
    },
    /// Check a data folder while no server uses it
    #[command(
        after_help = "Reads every record, looks up whatever it points at, and computes the audit \
                      log's hashes again. It works on a copy, made in the data folder or below \
                      --scratch, because the database repairs what it opens. Exits with 1 where \
                      anything is wrong.\n\nIt cannot tell an old copy of the store from the newest: \
                      compare the last hash of the audit log with one noted elsewhere.\n\nExample:\n  \
                      ca-server check --dir /var/lib/ray-mtls/ca --kek-file /etc/ray-mtls/kek"
    )]
    Check {
        /// Data folder
        #[arg(long)]
        dir: PathBuf,
        /// Folder with room for a copy of the store; the data folder if none is named
        #[arg(long)]
        scratch: Option<PathBuf>,
        /// Key-encryption key: with it every CA key is unwrapped too
        #[arg(long)]
        kek_file: Option<PathBuf>,
        /// How the result is printed
        #[arg(short, long, value_enum, default_value_t = Output::Text)]
        output: Output,
    },
    /// Restore a backup into a folder that holds no CA
    #[command(
        after_help = "Reads what `ca-admin backup` wrote, with the key-encryption key it was made \
                      with. What comes out is served as ever, but answers only Sync, under a new \
                      epoch, until `ca-admin restore accept`; no token of the backup is good any \
                      more.\n\nExample:\n  ca-server restore --from /backup/ca-2026-01-31 --dir \
                      /var/lib/ray-mtls/ca"
    )]
    Restore {
        /// The backup
        #[arg(long)]
        from: PathBuf,
        /// Data folder to make
        #[arg(long)]
        dir: PathBuf,
        /// Key-encryption key
        #[arg(long, default_value = "/etc/ray-mtls/kek")]
        kek_file: PathBuf,
    },
    /// Write a CA's private key to a file, in PKCS#8, while no server uses the folder
    #[command(
        after_help = "Writes the key and its certificate as PEM, mode 0600, to a file that must not \
                      be there. Whoever has the file can be this CA: the audit log gets a record of \
                      it first.\n\nExample:\n  ca-server export-key --dir /var/lib/ray-mtls/ca \
                      --authority control --key root --out control-root.pem"
    )]
    ExportKey {
        /// Data folder
        #[arg(long)]
        dir: PathBuf,
        /// Key-encryption key
        #[arg(long, default_value = "/etc/ray-mtls/kek")]
        kek_file: PathBuf,
        /// Whose key: `control`, or `cluster/NAME`
        #[arg(long, value_parser = export_key::authority)]
        authority: Authority,
        /// Which of its keys
        #[arg(long, value_enum, default_value_t = Which::Issuer)]
        key: Which,
        /// File to write
        #[arg(long)]
        out: PathBuf,
    },
    /// Serve enrolment, nodes and operators
    #[command(
        after_help = serve_help()
    )]
    Serve {
        /// Data folder
        #[arg(long)]
        dir: PathBuf,
        /// Configuration file
        #[arg(long)]
        config: Option<PathBuf>,
    },
}

/// How a result is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Output {
    /// Lines for people
    Text,
    /// One JSON document
    Json,
}

/// What `serve --help` says of the configuration.
fn serve_help() -> String {
    let limits: Vec<String> = Limits::default()
        .table()
        .into_iter()
        .map(|(key, value)| format!("    {key} = {value}"))
        .collect();
    format!(
        "The configuration is TOML; unknown keys are refused. Keys and defaults:\n  \
         kek_file = \"/etc/ray-mtls/kek\"\n  \
         enrollment_listen = \"0.0.0.0:7443\"\n  \
         node_listen = \"0.0.0.0:7444\"\n  \
         http_listen = \"127.0.0.1:7446\"\n  \
         crl_listen = none   (CRLs for proxies over plain HTTP: /crl/control.pem, /crl/cluster/NAME.pem)\n  \
         admin_socket = \"/run/ray-mtls/ca-admin.sock\"\n  \
         operator_group = none\n  \
         enrollment_endpoints = [\"<hostname>:7443\"]   (as nodes reach them)\n  \
         node_endpoints = [\"<hostname>:7444\"]\n  \
         trusted_proxies = []   (ranges of balancers; they must speak PROXY protocol v2)\n  \
         [[jwt]]   (a workload's signed JWT enrols it: docs/operations.md)\n    \
         issuer, audience, jwks_file, namespace, service_account, cluster, role, addresses = []\n  \
         log_format = \"human\" or \"json\"\n  \
         [limits]   (a burst is what may come at once; a rate is what grows back)\n\
         {}\n\nExample:\n  \
         ca-server serve --dir /var/lib/ray-mtls/ca --config /etc/ray-mtls/ca-server.toml",
        limits.join("\n")
    )
}

/// A failure with its exit code.
#[derive(Debug)]
struct Failure(u8, String);

impl Failure {
    fn failed(error: impl std::fmt::Display) -> Self {
        Self(EXIT_FAILED, error.to_string())
    }

    fn config(error: impl std::fmt::Display) -> Self {
        Self(EXIT_CONFIG, error.to_string())
    }
}

/// What the command line accepts; tests hold the documents' lines against it.
#[must_use]
pub fn command_line() -> clap::Command {
    <Arguments as clap::CommandFactory>::command()
}

/// Runs the program.
#[must_use]
pub fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            let code = if error.use_stderr() { EXIT_USAGE } else { 0 };
            // Nothing helps where even the usage cannot be printed.
            let _ = error.print();
            return ExitCode::from(code);
        }
    };
    harden();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let ended = match runtime {
        Ok(runtime) => runtime.block_on(run(arguments.command)),
        Err(error) => Err(Failure::failed(error)),
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure(code, message)) => {
            eprintln!("ca-server: {message}");
            ExitCode::from(code)
        }
    }
}

/// Keeps keys out of core dumps and from other processes of the same user, and files that a library
/// makes from others.
fn harden() {
    use rustix::{fs::Mode, process::umask};
    umask(Mode::RWXG | Mode::RWXO);
    if let Err(error) = process::harden() {
        eprintln!("ca-server: warning: {error}");
    }
}

async fn run(command: Command) -> Result<(), Failure> {
    match command {
        Command::Init { dir, trust_domain, kek_file } => {
            init_command(&dir, &kek_file, &trust_domain).await
        }
        Command::Check { dir, scratch, kek_file, output } => {
            let now_ms = unix_ms(SystemClock.now());
            check_command(&check::Options { dir, scratch, kek_file, now_ms }, output)
        }
        Command::Restore { from, dir, kek_file } => restore_command(&from, &dir, &kek_file).await,
        Command::ExportKey { dir, kek_file, authority, key, out } => {
            export_key_command(&dir, &kek_file, &authority, key, &out).await
        }
        Command::Serve { dir, config } => {
            let config = Config::load(config.as_deref()).map_err(Failure::config)?;
            start_logging(config.log_format);
            descriptors::raise();
            if let Some(warning) = descriptors::warning() {
                warn!("{warning}");
            }
            serve_command(&dir, &config).await
        }
    }
}

async fn init_command(
    dir: &Path,
    kek_file: &Path,
    trust_domain: &TrustDomain,
) -> Result<(), Failure> {
    let made =
        init::init(dir, kek_file, trust_domain, &SystemClock).await.map_err(Failure::failed)?;
    println!("CA for trust domain {trust_domain} made in {}", dir.display());
    if made.kek_made {
        println!(
            "key-encryption key made: {} - back it up apart from the data folder; \
             without it every key in there is lost",
            kek_file.display()
        );
    }
    print!("control root:\n{}", bundle::certificates_to_pem(&[made.root_der]));
    println!(
        "next: write a configuration with at least these lines, then serve with it\n  kek_file = \
         {:?}\n  enrollment_endpoints = [\"HOST:7443\"]   # HOST: how nodes reach this machine\n  \
         node_endpoints = [\"HOST:7444\"]\n  ca-server serve --dir {} --config \
         /etc/ray-mtls/ca-server.toml",
        kek_file.display(),
        dir.display()
    );
    Ok(())
}

fn check_command(options: &check::Options, output: Output) -> Result<(), Failure> {
    let mut progress = |records| eprintln!("ca-server: {records} records read");
    let report = check::check(options, &mut progress).map_err(|error| match error {
        CheckError::NoCa(_) | CheckError::Kek(_) | CheckError::Scratch(_) => Failure::config(error),
        CheckError::InUse(_) | CheckError::Copy { .. } | CheckError::Read { .. } => {
            Failure::failed(error)
        }
    })?;
    match output {
        Output::Text => print!("{}", report.text()),
        Output::Json => {
            let json = serde_json::to_string_pretty(&report).map_err(Failure::failed)?;
            println!("{json}");
        }
    }
    match report.findings_total {
        0 => Ok(()),
        total => Err(Failure::failed(format!("{}: {total} findings", options.dir.display()))),
    }
}

async fn restore_command(from: &Path, dir: &Path, kek_file: &Path) -> Result<(), Failure> {
    let mut progress = |records| eprintln!("ca-server: {records} records restored");
    let restored = restore::restore(from, dir, kek_file, &SystemClock, &mut progress).await;
    let restored = restored.map_err(|error| match error {
        RestoreError::Kek(_) | RestoreError::NotOurs(_) => Failure::config(error),
        RestoreError::Exists(_) => Failure(EXIT_USAGE, error.to_string()),
        RestoreError::Backup(_)
        | RestoreError::File { .. }
        | RestoreError::Format(_)
        | RestoreError::Folder(_)
        | RestoreError::Store(_) => Failure::failed(error),
    })?;
    println!(
        "{}: {} records of trust domain {}, audit log of {} records whole\nnext: `ca-server check`, \
         serve from it, wait until the nodes have called (`ca-admin restore show`), then `ca-admin \
         restore accept`; until then only Sync is answered",
        dir.display(),
        restored.pairs,
        restored.trust_domain,
        restored.audit_records
    );
    Ok(())
}

async fn export_key_command(
    dir: &Path,
    kek_file: &Path,
    authority: &Authority,
    which: Which,
    out: &Path,
) -> Result<(), Failure> {
    let exported = export_key::export(dir, kek_file, authority, which, out, &SystemClock).await;
    let subject = exported.map_err(|error| match error {
        ExportError::NoCa(_) | ExportError::Kek(_) => Failure::config(error),
        ExportError::IsThere(_) => Failure(EXIT_USAGE, error.to_string()),
        ExportError::Store(_)
        | ExportError::Authority(_)
        | ExportError::Incomplete(_)
        | ExportError::Open { .. }
        | ExportError::Write { .. } => Failure::failed(error),
    })?;
    println!(
        "{}: private key and certificate of {subject}\nwhoever has this file can be this CA: move it \
         to where it is safe, and remove it here; the audit log has a record of it",
        out.display()
    );
    Ok(())
}

async fn serve_command(dir: &Path, config: &Config) -> Result<(), Failure> {
    let clock: Arc<dyn Clock> = Arc::new(SystemClock);
    let store_dir = init::store_dir(dir);
    if !store_dir.exists() {
        let text = format!(
            "{} holds no CA: run `ca-server init --dir {}` first",
            dir.display(),
            dir.display()
        );
        return Err(Failure::config(text));
    }
    for folder in [dir, store_dir.as_path()] {
        if let Some(warning) = trusted_folder::judge(folder).map_err(Failure::config)? {
            warn!("{warning}");
        }
    }
    for doubt in config.doubts() {
        warn!("{doubt}");
    }
    let kek = Kek::read(&config.kek_file).map_err(Failure::config)?;
    let engine = SledEngine::open(&store_dir).map_err(Failure::failed)?;
    let store = KvStore::open(Box::new(engine), clock.now()).map_err(Failure::failed)?;
    let store_failed = store.failed();
    let store: Arc<dyn Store> = Arc::new(store);
    let ca = Ca::load(store, clock, kek, config.endpoints())
        .await
        .map_err(|error| unloadable(&error, &config.kek_file))?;
    let proxies = TrustedProxies::parse(&config.trusted_proxies).map_err(Failure::config)?;
    let workloads = Workloads::parse(&config.jwt).map_err(Failure::config)?;
    let ca = ca.with_limits(config.limits.clone()).behind(proxies).trusting(workloads);
    let listeners = listen(config).await.map_err(Failure::failed)?;
    let trust_domain = ca.trust_domain.clone();
    if ca.is_restored() {
        warn!(
            "this CA was restored from a backup: only Sync is answered until `ca-admin restore accept`"
        );
    }
    let started = || {
        info!(
            enrollment = %config.enrollment_listen, nodes = %config.node_listen,
            http = %config.http_listen, admin = %config.admin_socket.display(),
            %trust_domain, "serving"
        );
        notify(&[sd_notify::NotifyState::Ready]);
    };
    let fatal = std::sync::atomic::AtomicBool::new(false);
    // Caught from here on, so that one that comes early is not lost.
    let signalled = signalled();
    let stop = async {
        tokio::select! {
            () = signalled => {}
            why = store_failed => {
                error!(why, "the store failed: exiting, so that the next start recovers");
                fatal.store(true, std::sync::atomic::Ordering::Relaxed);
            }
        }
        notify(&[sd_notify::NotifyState::Stopping]);
    };
    serve::serve(Arc::new(ca), listeners, started, stop).await.map_err(Failure::failed)?;
    if fatal.into_inner() {
        return Err(Failure::failed("the store failed; the log says why"));
    }
    info!("stopped");
    Ok(())
}

/// A key that does not fit stays one that does not fit, however often the server is started.
fn unloadable(error: &CaError, kek_file: &Path) -> Failure {
    match error {
        CaError::Authority(AuthorityError::Kek(error)) => Failure::config(format!(
            "kek_file {}: {error}; put the copy back that you keep apart, or name its file",
            kek_file.display()
        )),
        CaError::Store(_)
        | CaError::Authority(_)
        | CaError::NotInitialized
        | CaError::TrustDomain(_) => Failure::failed(error),
    }
}

async fn listen(config: &Config) -> io::Result<Listeners> {
    let crl = match config.crl_listen {
        Some(address) => Some(serve::bind(address).await?),
        None => None,
    };
    Ok(Listeners {
        crl,
        enrollment: serve::bind(config.enrollment_listen).await?,
        nodes: serve::bind(config.node_listen).await?,
        http: serve::bind(config.http_listen).await?,
        admin: admin_socket::listen(&config.admin_socket, config.operator_group.as_deref()).await?,
        operator_group: config.operator_group.is_some(),
    })
}

fn signalled() -> impl Future<Output = ()> {
    // Both are valid signals, and the runtime's driver is running.
    let mut terminate = signal(SignalKind::terminate()).expect("SIGTERM can be caught");
    let mut interrupt = signal(SignalKind::interrupt()).expect("SIGINT can be caught");
    async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    }
}

fn notify(states: &[sd_notify::NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        warn!(%error, "systemd was not told");
    }
}

fn start_logging(format: LogFormat) {
    let filter = tracing_subscriber::EnvFilter::builder()
        .with_default_directive(tracing::level_filters::LevelFilter::INFO.into())
        .from_env_lossy();
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(io::IsTerminal::is_terminal(&io::stderr()));
    match format {
        LogFormat::Human => builder.init(),
        LogFormat::Json => builder.json().init(),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, chown};

    use super::*;

    /// A new CA: its folder, and a configuration that serves it.
    async fn new_ca(folder: &Path) -> (PathBuf, Config) {
        let dir = folder.join("ca");
        let loopback = std::net::SocketAddr::from(([127, 0, 0, 1], 0));
        let config = Config {
            kek_file: folder.join("kek"),
            // So that a test in which nothing is refused ends too.
            admin_socket: folder.join("kek/ca-admin.sock"),
            enrollment_listen: loopback,
            node_listen: loopback,
            http_listen: loopback,
            ..Config::default()
        };
        let domain = "ray.example".parse().unwrap();
        init::init(&dir, &config.kek_file, &domain, &SystemClock).await.unwrap();
        (dir, config)
    }

    #[tokio::test]
    async fn a_wrong_kek_is_a_wrong_configuration_and_its_file_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let (dir, mut config) = new_ca(folder.path()).await;
        config.kek_file = folder.path().join("other.kek");
        Kek::create(&config.kek_file).unwrap();
        let Failure(code, text) = serve_command(&dir, &config).await.unwrap_err();
        assert_eq!(code, EXIT_CONFIG, "{text}");
        assert!(text.contains(config.kek_file.to_str().unwrap()), "{text}");
    }

    #[tokio::test]
    async fn a_data_folder_or_store_that_others_can_change_is_not_served() {
        let folder = tempfile::tempdir().unwrap();
        let (dir, config) = new_ca(folder.path()).await;
        for bad in [dir.clone(), init::store_dir(&dir)] {
            std::fs::set_permissions(&bad, std::fs::Permissions::from_mode(0o707)).unwrap();
            let Failure(code, text) = serve_command(&dir, &config).await.unwrap_err();
            assert_eq!(code, EXIT_CONFIG, "{text}");
            assert!(text.contains("may be written by others"), "{text}");
            assert!(text.contains(&format!("{} ", bad.display())), "{text}");
            std::fs::set_permissions(&bad, std::fs::Permissions::from_mode(0o700)).unwrap();
        }
        if rustix::process::geteuid().is_root() {
            chown(init::store_dir(&dir), Some(4_321), None).unwrap();
            let Failure(code, text) = serve_command(&dir, &config).await.unwrap_err();
            assert_eq!(code, EXIT_CONFIG, "{text}");
            assert!(text.contains("belongs to uid 4321"), "{text}");
        }
    }
}
