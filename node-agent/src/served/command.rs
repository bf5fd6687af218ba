//! `node-agent served`: one look from the command line, with the files of the current key folder and
//! without the daemon. Each run greets again the ports it does not know to be plain HTTP.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use raymtls_proto::{
    bundle,
    clock::{Clock, SystemClock},
    ports, v1,
};

use super::{Look, Memory, look, table::table};
use crate::{
    cli::{Output, print, print_json},
    config::{STATE_DIR, TLS_DIR},
    failure::Failure,
    keys::PrivateKey,
    statedir::{StateDir, read_if_there},
};

/// What is asked for.
#[derive(Debug, clap::Args)]
pub(crate) struct ServedArgs {
    /// The TLS folder
    #[arg(long, value_name = "DIR", default_value = TLS_DIR)]
    tls_dir: PathBuf,
    /// Where the cluster's port plan is known from; the default plan, if it cannot be read
    #[arg(long, value_name = "DIR", default_value = STATE_DIR)]
    state_dir: PathBuf,
    /// Number of a user that runs Ray or drivers; may be given several times. Default: any user
    #[arg(long, value_name = "UID")]
    ray_uid: Vec<u32>,
    /// How the answer is written
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
}

/// Looks once, and tells.
pub(crate) async fn run(args: ServedArgs) -> Result<(), Failure> {
    let clock = Arc::new(SystemClock);
    let look_at = from_folder(&args.tls_dir, &args.state_dir, args.ray_uid, clock.clone())?;
    let now = clock.now();
    let served = look(&look_at, &mut Memory::default(), now).await.map_err(Failure::failed)?;
    match args.output {
        Output::Table => print(&table(&served, now)),
        Output::Json => print_json(&served),
    }
}

/// A look with the files of the current key folder.
pub(crate) fn from_folder(
    tls_dir: &Path,
    state_dir: &Path,
    uids: Vec<u32>,
    clock: Arc<dyn Clock>,
) -> Result<Look, Failure> {
    let folder = tls_dir.join("current");
    let mut leaf = certificates(&folder.join("tls.crt"))?.into_iter();
    let chain = v1::CertificateChain {
        leaf_der: leaf.next().unwrap_or_default(),
        issuers_der: leaf.collect(),
    };
    let roots_der = certificates(&folder.join("ca.crt"))?;
    let trust = v1::TrustBundle { roots_der, crls_der: Vec::new() };
    let key = PrivateKey::load(&folder.join("tls.key")).map_err(Failure::failed)?;
    let state = StateDir::open(state_dir).ok();
    let plan = state.and_then(|state| state.memory().settings()?.port_plan);
    let plan = plan.unwrap_or_else(ports::default_plan);
    Look::new(&chain, &key, &trust, plan, uids, clock).map_err(Failure::failed)
}

fn certificates(path: &Path) -> Result<Vec<Vec<u8>>, Failure> {
    let pem = read_if_there(path).map_err(Failure::failed)?.unwrap_or_default();
    let certificates = bundle::certificates_from_pem(&pem)
        .map_err(|e| Failure::Failed(format!("{}: {e}", path.display())))?;
    Ok(certificates.into_iter().map(|der| der.to_vec()).collect())
}
