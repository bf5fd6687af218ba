//! Enrolment: from a join file to an identity, a first key folder and `ray.env`. Every step leaves
//! the next try able to go on: the key is on the disk before it is sent, the same key gets the same
//! answer, and what is done already is not done again.

mod differences;

use std::{
    fs::File,
    io::Read,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use raymtls_proto::{
    address::NodeAddress,
    clock::Clock,
    identity::{DnsName, NodeName, Role},
    join::{Credential, JoinError, JoinFile},
    jwt,
    reason::{Reaction, Reason},
    token::TokenId,
    v1,
};
use secrecy::ExposeSecret;
use serde::Serialize;

use self::differences::{other_binding, other_cluster, refuse_differences};
use crate::{
    agent::{
        ActError, Agent,
        issue::{accept_identity, fetch_leaf},
    },
    client::{CallError, CallLimits, EnrollmentClient, NodeClient, Target},
    config::Config,
    failure::Failure,
    keyfolder::TlsDir,
    keys::PrivateKey,
    moment::Moment,
    rayenv::Told,
    state::backoff,
    statedir::{Identity, NodeFile, StateDir, StateError, WaitingKey},
    verify,
};

/// What `enroll` was asked to do.
#[derive(Clone, Debug)]
pub struct Options {
    /// The join file.
    pub join: PathBuf,
    /// State folder.
    pub state_dir: PathBuf,
    /// TLS folder.
    pub tls_dir: PathBuf,
    /// Name of the node.
    pub name: NodeName,
    /// Somebody asked for this name; without, it is the host's, and a node keeps the one it has.
    pub name_given: bool,
    /// What it is for.
    pub role: Role,
    /// Addresses besides the one the connection comes from.
    pub addresses: Vec<NodeAddress>,
    /// DNS names for its leaf.
    pub dns_names: Vec<DnsName>,
    /// Its addresses are shared with other nodes of the host.
    pub shared_address: bool,
    /// Group that may read Ray's key.
    pub ray_gid: Option<u32>,
    /// Leave the join file where it is.
    pub keep_join_file: bool,
    /// A driver that keeps no identity.
    pub once: bool,
    /// How long to try while the CA is away or the name is still held.
    pub timeout: Duration,
    /// Bounds of calls.
    pub limits: CallLimits,
}

/// What `enroll` made.
#[derive(Clone, Debug, Serialize)]
pub struct Enrolled {
    /// It was enrolled before.
    pub already: bool,
    /// The cluster.
    pub cluster: String,
    /// The node's name, as the CA has it.
    pub node: String,
    /// What it is for.
    pub role: String,
    /// Addresses certified.
    pub addresses: Vec<String>,
    /// DNS names certified.
    pub dns_names: Vec<String>,
    /// Serial of the identity; absent for `--once`, which keeps none.
    pub identity_serial: Option<String>,
    /// Serial of the leaf.
    pub leaf_serial: String,
    /// Until when the leaf works.
    pub leaf_not_after: Moment,
    /// The key folder.
    pub key_folder: PathBuf,
    /// The environment for Ray.
    pub ray_env: PathBuf,
    /// What became of the join file.
    pub join_file: &'static str,
}

/// Enrols this machine.
///
/// # Errors
/// Refused by the CA, not reachable in time, or something wrong with the files.
pub async fn enroll(options: &Options, clock: Arc<dyn Clock>) -> Result<Enrolled, Failure> {
    if options.once {
        return enroll_once(options, clock).await;
    }
    let state = StateDir::prepare(&options.state_dir).map_err(Failure::config)?;
    TlsDir::prepare(&options.tls_dir, options.ray_gid).map_err(Failure::config)?;
    let known = known_node(&state)?;
    let join = match (read_join(&options.join), &known) {
        (Ok(join), _) => Some(join),
        // Removed after an enrolment that succeeded.
        (Err(JoinError::Read { .. }), Some(_)) if !options.join.exists() => None,
        (Err(error), _) => return Err(Failure::config(error)),
    };
    if let (Some(join), Some((node, _))) = (&join, &known) {
        refuse_differences(node, &other_cluster(join, node))?;
    }
    if let Some((node, identity)) = &known {
        let served = ask_whether_served(node, identity, options.limits, &clock).await?;
        if served != Served::No {
            refuse_differences(node, &other_binding(options, node))?;
            let token = match join.as_ref().map(|join| &join.credential) {
                Some(Credential::JwtFile(_)) => Token::Elsewhere,
                Some(Credential::Token(token))
                    if served == Served::Yes && Some(token.id()) == node.token_id.as_ref() =>
                {
                    Token::Spent
                }
                None if served == Served::Yes && node.token_id.is_none() => Token::Spent,
                Some(Credential::Token(_)) | None => Token::Unused,
            };
            return finish(options, &state, clock, Done::Before(token)).await;
        }
    }
    let Some(join) = join else {
        return Err(Failure::Config(format!(
            "this node must enrol again and there is no join file at {}: make one with \
             `ca-admin token create`",
            options.join.display()
        )));
    };
    let lock = state.lock().map_err(Failure::failed)?;
    let key = state.waiting_key(WaitingKey::Enrolment).map_err(Failure::failed)?;
    let mut tries = Tries::new(options.timeout);
    let (node, identity) = obtain_identity(options, &join, key, &mut tries, &clock).await?;
    state.put_node(&node).map_err(Failure::failed)?;
    state.put_identity(&identity).map_err(Failure::failed)?;
    progress(&format!("enrolled as {} in cluster {}", node.node, node.cluster));
    drop(lock);
    finish(options, &state, clock, Done::Now(Token::spent_of(&join))).await
}

/// When this machine was enrolled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Done {
    Now(Token),
    Before(Token),
}

/// Whether the token of the join file is known to have done its work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Token {
    Spent,
    Unused,
    /// The join file names the file of a JWT: it holds nothing that could be spent.
    Elsewhere,
}

impl Token {
    fn spent_of(join: &JoinFile) -> Self {
        match join.credential {
            Credential::Token(_) => Self::Spent,
            Credential::JwtFile(_) => Self::Elsewhere,
        }
    }
}

/// What the CA says of an identity.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Served {
    Yes,
    No,
    /// It is away, which proves nothing against the identity.
    Unknown,
}

/// The node and identity of an enrolment that was completed.
fn known_node(state: &StateDir) -> Result<Option<(NodeFile, Identity)>, Failure> {
    let node = state.node().map_err(Failure::config)?;
    let identity = state.identity().map_err(Failure::config)?;
    let (Some(node), Some(identity)) = (node, identity) else { return Ok(None) };
    let matches = identity.facts.uris == [node.agent().uri(&node.trust_domain)];
    Ok(matches.then_some((node, identity)))
}

/// Whether the CA still serves this identity.
async fn ask_whether_served(
    node: &NodeFile,
    identity: &Identity,
    limits: CallLimits,
    clock: &Arc<dyn Clock>,
) -> Result<Served, Failure> {
    if identity.facts.not_after <= clock.now() {
        progress("the identity of this node has expired: enrolling again");
        return Ok(Served::No);
    }
    let client = NodeClient::new(&target_of(node), identity, limits, clock.clone())
        .map_err(Failure::config)?;
    match client.sync(v1::SyncRequest::default()).await {
        Ok(_) => Ok(Served::Yes),
        Err(error) => match error.reaction() {
            Reaction::Reenrol | Reaction::Stop => {
                progress(&format!(
                    "the identity of this node is of no use ({error}): enrolling again"
                ));
                Ok(Served::No)
            }
            Reaction::Retry | Reaction::NewKeyFolder => Ok(Served::Unknown),
        },
    }
}

/// Everything after the identity: the first key folder, `ray.env`, Ray's token, the join file.
async fn finish(
    options: &Options,
    state: &StateDir,
    clock: Arc<dyn Clock>,
    done: Done,
) -> Result<Enrolled, Failure> {
    keep_group(options, state)?;
    let lock = match (state.lock(), done) {
        (Ok(lock), _) => lock,
        // A running daemon does the rest by itself.
        (Err(StateError::Locked(_)), Done::Before(token)) => {
            return already_running(options, state, token);
        }
        (Err(error), _) => return Err(Failure::failed(error)),
    };
    let mut config = Config::in_process(options.state_dir.clone(), options.tls_dir.clone());
    config.limits = options.limits;
    config.ray_gid = options.ray_gid;
    let mut agent = Agent::open_locked(config, clock.clone(), state.clone(), lock)?;
    agent.first_files().await?;
    let status = agent.handle().status();
    let folder = status.key_folders.iter().find(|folder| folder.current);
    let folder = folder.ok_or_else(|| Failure::Failed("no key folder was made".to_owned()))?;
    let tls_dir = std::path::absolute(&options.tls_dir).map_err(Failure::failed)?;
    let (already, token) = match done {
        Done::Now(token) => (false, token),
        Done::Before(token) => (true, token),
    };
    Ok(Enrolled {
        already,
        cluster: status.cluster.clone(),
        node: status.node.clone(),
        role: status.role.clone(),
        addresses: status.addresses.clone(),
        dns_names: status.dns_names.clone(),
        identity_serial: Some(status.identity.serial.clone()),
        leaf_serial: folder.leaf.serial.clone(),
        leaf_not_after: folder.leaf.not_after,
        key_folder: tls_dir.join(&folder.name),
        ray_env: tls_dir.join("ray.env"),
        join_file: dispose(options, token)?,
    })
}

/// Ray's group, where the command was given another one than before: the daemon reads it at its start.
fn keep_group(options: &Options, state: &StateDir) -> Result<(), Failure> {
    let node = state.node().map_err(Failure::config)?;
    match node {
        Some(node) if options.ray_gid.is_some() && node.ray_gid != options.ray_gid => {
            let node = NodeFile { ray_gid: options.ray_gid, ..node };
            state.put_node(&node).map_err(Failure::failed)
        }
        Some(_) | None => Ok(()),
    }
}

fn already_running(options: &Options, state: &StateDir, token: Token) -> Result<Enrolled, Failure> {
    let (node, identity) = known_node(state)?
        .ok_or_else(|| Failure::Config("the enrolment on the disk is damaged".to_owned()))?;
    let tls = TlsDir::prepare(&options.tls_dir, options.ray_gid.or(node.ray_gid))
        .map_err(Failure::config)?;
    let (folders, _) = tls.load().map_err(Failure::config)?;
    let current = tls.current();
    let folder = folders.iter().find(|f| Some(f.number) == current).ok_or_else(|| {
        Failure::Failed("the running agent has made no key folder yet: see `status`".to_owned())
    })?;
    Ok(Enrolled {
        already: true,
        cluster: node.cluster.to_string(),
        node: node.node.to_string(),
        role: node.role.to_string(),
        addresses: node.addresses.iter().map(ToString::to_string).collect(),
        dns_names: node.dns_names,
        identity_serial: Some(identity.serial().to_string()),
        leaf_serial: folder.facts.serial.to_string(),
        leaf_not_after: folder.facts.not_after.into(),
        key_folder: tls.folder_path(folder.number),
        ray_env: tls.env_path(),
        join_file: dispose(options, token)?,
    })
}

/// A driver elsewhere: key and leaf on the disk, the identity in memory and gone afterwards. Its key
/// waits in the TLS folder until all is done: a run cut short anywhere is begun again with it, and
/// the token is not lost.
async fn enroll_once(options: &Options, clock: Arc<dyn Clock>) -> Result<Enrolled, Failure> {
    let join = read_join(&options.join).map_err(Failure::config)?;
    let tls = TlsDir::prepare(&options.tls_dir, options.ray_gid).map_err(Failure::config)?;
    tls.sweep().map_err(Failure::config)?;
    let token = join.token().map_or_else(|| "jwt".to_owned(), |token| token.id().to_string());
    let purpose = format!("token {token} node {}", options.name);
    let identity_key = tls.once_key(&purpose).map_err(Failure::failed)?;
    let mut tries = Tries::new(options.timeout);
    let (node, identity) =
        obtain_identity(options, &join, identity_key, &mut tries, &clock).await?;
    let client = NodeClient::new(&target_of(&node), &identity, options.limits, clock.clone())
        .map_err(Failure::failed)?;
    let key = PrivateKey::generate().map_err(Failure::failed)?;
    let leaf = loop {
        match fetch_leaf(&client, &node, &key, None, &*clock).await {
            Ok(leaf) => break leaf,
            Err(ActError::Call(error)) => tries.pause(&error).await?,
            Err(error) => return Err(error.into()),
        }
    };
    let answer = loop {
        match client.sync(v1::SyncRequest::default()).await {
            Ok(answer) => break answer,
            Err(error) => tries.pause(&error).await?,
        }
    };
    let with_token = answer.settings.as_ref().is_none_or(|settings| settings.ray_token);
    match &answer.ray_token {
        Some(token) => {
            verify::ray_token(&token.token).map_err(Failure::failed)?;
            tls.put_token(&token.token).map_err(Failure::failed)?;
        }
        None if with_token => {
            return Err(Failure::Failed(
                "the CA did not deliver Ray's token: run the same command again".to_owned(),
            ));
        }
        None => {}
    }
    let number = tls.next_number().map_err(Failure::failed)?;
    let folder =
        tls.create(number, &key, leaf.chain, leaf.facts, &leaf.bundle).map_err(Failure::failed)?;
    tls.point_current(number).map_err(Failure::failed)?;
    tls.put_env(number, &Told::by(answer.settings.as_ref(), options.role))
        .map_err(Failure::failed)?;
    tls.drop_once_key().map_err(Failure::failed)?;
    Ok(Enrolled {
        already: false,
        cluster: node.cluster.to_string(),
        node: node.node.to_string(),
        role: node.role.to_string(),
        addresses: node.addresses.iter().map(ToString::to_string).collect(),
        dns_names: node.dns_names,
        identity_serial: None,
        leaf_serial: folder.facts.serial.to_string(),
        leaf_not_after: folder.facts.not_after.into(),
        key_folder: tls.folder_path(number),
        ray_env: tls.env_path(),
        join_file: dispose(options, Token::spent_of(&join))?,
    })
}

/// How often and how long calls are tried: one bound for all calls of a command.
#[derive(Debug)]
struct Tries {
    timeout: Duration,
    deadline: tokio::time::Instant,
    /// Failed calls so far.
    failed: u32,
}

impl Tries {
    fn new(timeout: Duration) -> Self {
        Self { timeout, deadline: tokio::time::Instant::now() + timeout, failed: 0 }
    }

    /// Waits before the next try, where that can help and the time is not up.
    async fn pause(&mut self, error: &CallError) -> Result<(), Failure> {
        let Some(wait) = wait_before_retry(error, self.failed) else {
            return Err(enrolment_failure(error));
        };
        if tokio::time::Instant::now() + wait > self.deadline {
            return Err(Failure::Failed(format!(
                "not enrolled within {} s: {error}; run the same command again, it goes on with \
                 the same key",
                self.timeout.as_secs()
            )));
        }
        progress(&format!("{error}; trying again in {:.1} s", wait.as_secs_f64()));
        tokio::time::sleep(wait).await;
        self.failed += 1;
        Ok(())
    }
}

/// Spends the token for this key, trying again where that can help, until the time is up.
async fn obtain_identity(
    options: &Options,
    join: &JoinFile,
    key: PrivateKey,
    tries: &mut Tries,
    clock: &Arc<dyn Clock>,
) -> Result<(NodeFile, Identity), Failure> {
    let target = Target {
        endpoints: join.enrollment_endpoints.clone(),
        trust_domain: join.trust_domain.clone(),
        control_roots: join.control_roots.clone(),
        control_crls: Vec::new(),
        source: None,
    };
    let mut client =
        EnrollmentClient::new(&target, options.limits, clock.clone()).map_err(Failure::config)?;
    let csr_der = key.csr_der().map_err(Failure::failed)?;
    let answer = loop {
        // Read anew for each try: a JWT is replaced while it waits.
        let (credential, token_id) = presented(join)?;
        match client.enroll(request(options, join, credential, csr_der.clone())).await {
            Ok(answer) => break (answer, token_id),
            Err(error) => tries.pause(&error).await?,
        }
    };
    let (answer, token_id) = answer;
    let node = node_of(options, join, token_id, &answer)?;
    let identity =
        accept_identity((answer.identity, answer.server_time_unix), key, &node, &**clock)?;
    Ok((node, identity))
}

/// What is shown to the CA, and the id under which it knows it.
fn presented(join: &JoinFile) -> Result<(v1::enroll_request::Credential, TokenId), Failure> {
    use v1::enroll_request::Credential::{BootstrapToken, Jwt};
    match &join.credential {
        Credential::Token(token) => {
            let text = token.expose().expose_secret().to_owned();
            Ok((BootstrapToken(text), token.id().clone()))
        }
        Credential::JwtFile(path) => {
            let jwt = read_jwt(path).map_err(|why| {
                let path = path.display();
                Failure::Config(format!(
                    "the JWT that the join file names cannot be read: {path}: {why}"
                ))
            })?;
            let id = jwt::token_id(&jwt);
            Ok((Jwt(jwt), id))
        }
    }
}

/// A projected token is a link to a file that is replaced: links are followed.
fn read_jwt(path: &Path) -> Result<String, String> {
    let file = File::open(path).map_err(|e| e.to_string())?;
    let mut text = String::new();
    let limit = jwt::JWT_LEN_MAX as u64 + 1;
    file.take(limit).read_to_string(&mut text).map_err(|e| e.to_string())?;
    if text.len() > jwt::JWT_LEN_MAX {
        return Err(format!("longer than {} bytes", jwt::JWT_LEN_MAX));
    }
    Ok(text.trim().to_owned())
}

fn request(
    options: &Options,
    join: &JoinFile,
    credential: v1::enroll_request::Credential,
    csr_der: Vec<u8>,
) -> v1::EnrollRequest {
    v1::EnrollRequest {
        credential: Some(credential),
        cluster: join.cluster.to_string(),
        role: options.role.to_proto().into(),
        node_name: options.name.to_string(),
        addresses: options.addresses.iter().map(ToString::to_string).collect(),
        dns_names: options.dns_names.iter().map(ToString::to_string).collect(),
        csr_der,
        shared_address: options.shared_address,
        once: options.once,
    }
}

/// What the CA bound to the node, read back into types.
fn node_of(
    options: &Options,
    join: &JoinFile,
    token_id: TokenId,
    answer: &v1::EnrollResponse,
) -> Result<NodeFile, Failure> {
    let odd = |what: String| Failure::Failed(format!("the CA's answer was not used: {what}"));
    let node = answer.node_name.parse().map_err(|e| odd(format!("{e}")))?;
    let mut addresses = Vec::new();
    for address in &answer.addresses {
        let address: NodeAddress = address.parse().map_err(|e| odd(format!("{e}")))?;
        addresses.push(address.ip());
    }
    for asked in options.addresses.iter().map(|address| address.ip()) {
        if !addresses.contains(&asked) {
            return Err(odd(format!("it lacks the address {asked} that was asked for")));
        }
    }
    for name in &answer.dns_names {
        let _: DnsName = name.parse().map_err(|e| odd(format!("{e}")))?;
    }
    Ok(NodeFile {
        trust_domain: join.trust_domain.clone(),
        cluster: join.cluster.clone(),
        node,
        role: options.role,
        addresses,
        dns_names: answer.dns_names.clone(),
        node_endpoints: join.node_endpoints.clone(),
        control_roots: join.control_roots.clone(),
        ray_gid: options.ray_gid,
        token_id: Some(token_id),
    })
}

fn wait_before_retry(error: &CallError, attempt: u32) -> Option<Duration> {
    match error {
        CallError::Untrusted(_) | CallError::Clock(_) | CallError::Setup(_) => return None,
        CallError::Away(_) | CallError::Refused { .. } => {}
    }
    if error.reaction() != Reaction::Retry {
        return None;
    }
    let backoff = backoff(attempt.min(4), rand::random());
    Some(error.retry_after().map_or(backoff, |asked| asked + backoff))
}

fn enrolment_failure(error: &CallError) -> Failure {
    let CallError::Refused { reason: Some(reason), .. } = error else {
        return Failure::failed(error);
    };
    Failure::Refused(match what_next(*reason) {
        Some(advice) => format!("refused by the CA: {error}; {advice}"),
        None => format!("refused by the CA: {error}"),
    })
}

/// The next step for a person whose enrolment was refused, where the CA's sentence has none.
#[allow(clippy::wildcard_enum_match_arm, reason = "advice; the table of reasons is in proto")]
fn what_next(reason: Reason) -> Option<&'static str> {
    Some(match reason {
        Reason::TokenUnknown | Reason::TokenExpired | Reason::TokenRevoked | Reason::TokenSpent => {
            return None;
        }
        Reason::TokenNodeMismatch => "enrol with a --name the token allows, or make another token",
        Reason::TokenRoleMismatch => "enrol with the token's role, or make a token for this one",
        Reason::TokenClusterMismatch => "make a token for this cluster",
        Reason::AddressNotAllowed => "give an --address the token allows, or make another token",
        Reason::AddressBlocked => "make a new join file with `ca-admin token create`",
        Reason::NameNotAllowed => "give a --name or --dns the token allows",
        Reason::ClusterEnded => "the cluster is over: create another",
        Reason::Revoked => {
            "the name stays blocked until the node's last leaf has ended and `ca-admin node forget` \
             was run: enrol under another --name with a new token, --state-dir and --tls-dir"
        }
        _ => "see the CA's log",
    })
}

fn read_join(path: &Path) -> Result<JoinFile, JoinError> {
    JoinFile::read(path)
}

fn target_of(node: &NodeFile) -> Target {
    Target {
        endpoints: node.node_endpoints.clone(),
        trust_domain: node.trust_domain.clone(),
        control_roots: node.control_roots.clone(),
        control_crls: Vec::new(),
        source: None,
    }
}

/// Removes the join file once its token is spent; another one may still be needed elsewhere.
fn dispose(options: &Options, token: Token) -> Result<&'static str, Failure> {
    let path = options.join.as_path();
    match token {
        Token::Spent if options.keep_join_file => return Ok("kept"),
        Token::Unused if path.exists() => return Ok("kept: its token was not used"),
        Token::Elsewhere if path.exists() => return Ok("kept: it holds no secret"),
        Token::Spent | Token::Unused | Token::Elsewhere => {}
    }
    match std::fs::remove_file(path) {
        Ok(()) => Ok("removed"),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok("none was there"),
        Err(e) => Err(Failure::Failed(format!(
            "enrolled, but the join file {} cannot be removed ({e}): remove it yourself",
            path.display()
        ))),
    }
}

/// A line for the person who waits.
fn progress(text: &str) {
    tracing::info!("{text}");
}

#[cfg(test)]
mod tests {
    use raymtls_proto::reason;

    use super::*;

    fn refused(reason: Reason, asked: Option<Duration>) -> CallError {
        // As it comes over the wire.
        let status = reason.status("says the test", asked);
        CallError::Refused {
            reason: Reason::of(&status),
            message: status.message().to_owned(),
            retry_after: reason::retry_after(&status),
        }
    }

    #[test]
    fn a_limited_machine_comes_back_no_sooner_than_it_was_told_and_not_with_the_others() {
        let asked = Duration::from_secs(7);
        let limited = refused(Reason::RateLimited, Some(asked));
        let waits: Vec<Duration> =
            (0..100).map(|_| wait_before_retry(&limited, 3).unwrap()).collect();
        assert!(waits.iter().all(|wait| *wait >= asked && *wait < asked + Duration::from_secs(60)));
        let (least, most) = (waits.iter().min().unwrap(), waits.iter().max().unwrap());
        assert!(*most - *least > Duration::from_secs(1), "all at once: {least:?} to {most:?}");

        // A server that asks for days is not believed.
        let days = refused(Reason::RateLimited, Some(Duration::from_secs(1_000_000)));
        assert!(wait_before_retry(&days, 0).unwrap() < Duration::from_secs(3_700));
        assert!(wait_before_retry(&refused(Reason::TokenUnknown, None), 0).is_none());
    }

    #[test]
    fn advice_is_given_once() {
        let said = "the bootstrap token has expired: make a new one with `ca-admin token create`";
        let error = CallError::Refused {
            reason: Some(Reason::TokenExpired),
            message: said.to_owned(),
            retry_after: None,
        };
        let text = enrolment_failure(&error).to_string();
        assert_eq!(text, format!("refused by the CA: TOKEN_EXPIRED: {said}"));
        let text = enrolment_failure(&refused(Reason::ClusterEnded, None)).to_string();
        assert!(text.ends_with("; the cluster is over: create another"), "{text}");
    }
}
