//! `ca-admin token`: create, list. Revoking is in `token_revoke`. The secret goes from the CA's answer into the join file
//! and nowhere else.

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use raymtls_proto::{
    address::AddressRange,
    durable::{self, Access},
    identity::{ClusterId, DnsName, NodeName, Role, TrustDomain},
    join::{Credential, JoinFile},
    v1::{self, admin_service_client::AdminServiceClient},
};
use rustls::pki_types::CertificateDer;
use secrecy::{ExposeSecret, SecretString};
use serde::Serialize;
use time::OffsetDateTime;
use tonic::transport::Channel;

use super::{
    client::{self, Client},
    duration::{self, Seconds},
    failure::Failure,
    moment::Moment,
    output::{Screen, Table, View, yes_no},
    token_revoke,
};

#[derive(Debug, Subcommand)]
pub(super) enum Verb {
    /// Makes a bootstrap token and writes it as a join file (mode 0600).
    #[command(after_help = "\
Without --addresses and --any-address the token certifies the address the enrolling machine comes
from, and no other. A token of several uses without --node lets the CA finish the names: it appends
characters of the key's hash to the name asked for.

Examples:
  ca-admin token create --cluster c1 --role head --node head --dns head.ray --out head.join
  ca-admin token create --cluster c1 --role worker --uses 20 --ttl 8h --addresses 10.77.0.0/24 \\
      --out worker.join
  ca-admin token create --cluster c1 --role driver --node 'laptop-*' --any-address --out me.join")]
    Create(Create),

    /// Lists a cluster's tokens and what is left of them.
    #[command(after_help = "\
Examples:
  ca-admin token list --cluster c1
  ca-admin -o json token list --cluster c1")]
    List {
        /// Name of the cluster.
        #[arg(long)]
        cluster: ClusterId,
    },

    /// Makes a token worthless; the machines that enrolled with it stay, unless --with-nodes.
    #[command(after_help = "\
With --with-nodes every node that ever enrolled with the token is revoked, too, as `node revoke` does it;
they are listed first.

Examples:
  ca-admin token revoke --cluster c1 0123456789abcdef
  ca-admin token revoke --cluster c1 0123456789abcdef --yes
  ca-admin token revoke --cluster c1 0123456789abcdef --with-nodes --reason 'leaked join file'")]
    Revoke(token_revoke::Revoke),
}

#[derive(Debug, Args)]
pub(super) struct Create {
    /// Name of the cluster.
    #[arg(long)]
    cluster: ClusterId,

    /// What the machine is for: head, worker or driver.
    #[arg(long)]
    role: Role,

    /// How long the token may be used.
    #[arg(long, value_name = "TIME", value_parser = duration::parse, default_value = "1h")]
    ttl: Seconds,

    /// How many machines may enrol with it.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    uses: u32,

    /// Only for this node name; a pattern ends in one `*`. May be given several times.
    #[arg(long = "node", value_name = "NAME_OR_PATTERN", value_parser = name_or_pattern)]
    nodes: Vec<String>,

    /// The CA appends characters of the key's hash to the name asked for.
    #[arg(long)]
    generate_names: bool,

    /// Ranges the machine may have addresses in, separated by commas.
    #[arg(long, value_name = "RANGE", value_delimiter = ',')]
    addresses: Vec<AddressRange>,

    /// The machine may claim any address at all.
    #[arg(long, conflicts_with = "addresses")]
    any_address: bool,

    /// A DNS name the machine's leaf may carry. May be given several times.
    #[arg(long = "dns", value_name = "NAME")]
    dns_names: Vec<DnsName>,

    /// The machine may take the one name given over from a live node that holds it.
    #[arg(long, requires = "nodes", conflicts_with = "generate_names")]
    replace: bool,

    /// The machine may have addresses that other nodes of the same host share (host-network pods).
    #[arg(long)]
    shared_address: bool,

    /// The join file to write; one that is there is left alone.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

/// Does one verb.
pub(super) async fn run(verb: Verb, client: &Client, screen: &mut Screen) -> Result<(), Failure> {
    match verb {
        Verb::Create(args) => create(&args, client, screen).await,
        Verb::List { cluster } => list(&cluster, client, screen).await,
        Verb::Revoke(args) => token_revoke::run(args, client, screen).await,
    }
}

async fn create(args: &Create, client: &Client, screen: &mut Screen) -> Result<(), Failure> {
    must_be_free(&args.out)?;
    let mut admin = client.connect().await?;
    let answer = admin.create_token(args.to_proto()).await?.into_inner();
    let token = answer.token.clone().unwrap_or_default();
    if let Err(failure) = write_join_file(answer, &args.out) {
        // A token that nobody holds is of no use to anyone but a thief.
        return Err(withdraw(&mut admin, &token, failure).await);
    }
    let view = CreatedView {
        token: TokenView::new(&token),
        join_file: args.out.clone(),
        notes: notes(args),
        next: next_step(args),
    };
    Ok(screen.show(&view)?)
}

async fn list(cluster: &ClusterId, client: &Client, screen: &mut Screen) -> Result<(), Failure> {
    let mut admin = client.connect().await?;
    let tokens = client::all_pages(async |page| {
        let request = v1::ListTokensRequest { cluster: cluster.to_string(), page };
        let answer = admin.list_tokens(request).await?.into_inner();
        Ok((answer.tokens, answer.next_page))
    })
    .await?;
    Ok(screen.show(&TokenList { tokens: tokens.iter().map(TokenView::new).collect() })?)
}

impl Create {
    fn to_proto(&self) -> v1::CreateTokenRequest {
        v1::CreateTokenRequest {
            cluster: self.cluster.to_string(),
            role: self.role.to_proto().into(),
            ttl_seconds: self.ttl.as_i64(),
            uses: self.uses,
            node_names: self.nodes.clone(),
            generate_names: self.generate_names,
            address_ranges: self.addresses.iter().map(ToString::to_string).collect(),
            any_address: self.any_address,
            dns_names: self.dns_names.iter().map(ToString::to_string).collect(),
            replace: self.replace,
            shared_address: self.shared_address,
        }
    }
}

/// A node name, or the beginning of one with a `*` behind it.
fn name_or_pattern(text: &str) -> Result<String, String> {
    let wanted = "write a node name, or its beginning with one * at the end";
    // `x` stands for what the star matches: a beginning may end in '-', a name may not.
    let name = text.strip_suffix('*').map_or_else(|| text.to_owned(), |start| format!("{start}x"));
    name.parse::<NodeName>().map_err(|e| format!("{e}; {wanted}"))?;
    Ok(text.to_owned())
}

/// Asked before the token is made: `create` refuses by itself, but then there would be a token.
pub(super) fn must_be_free(path: &Path) -> Result<(), Failure> {
    if path.symlink_metadata().is_ok() {
        return Err(Failure::Usage(format!(
            "{} is there already, and a join file never replaces a file: name another with --out",
            path.display()
        )));
    }
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    match folder {
        Some(folder) if !folder.is_dir() => {
            Err(Failure::Usage(format!("there is no folder {}", folder.display())))
        }
        Some(_) | None => Ok(()),
    }
}

fn write_join_file(answer: v1::CreateTokenResponse, path: &Path) -> Result<(), Failure> {
    let secret = SecretString::from(answer.bootstrap_token);
    let token = secret.expose_secret().parse().map_err(|_| odd("token"))?;
    let place = v1::GetJoinResponse {
        cluster: answer.token.unwrap_or_default().cluster,
        trust_domain: answer.trust_domain,
        control_roots_der: answer.control_roots_der,
        enrollment_endpoints: answer.enrollment_endpoints,
        node_endpoints: answer.node_endpoints,
    };
    write_join(place, Credential::Token(token), path, Access::PRIVATE)
}

fn odd(what: &str) -> Failure {
    Failure::Failed(format!("the CA's answer holds no valid {what}"))
}

/// Writes a join file with this credential.
pub(super) fn write_join(
    place: v1::GetJoinResponse,
    credential: Credential,
    path: &Path,
    access: Access,
) -> Result<(), Failure> {
    let text = join_file(place, credential)?.to_text();
    // Read back as the machine will read it, before anyone carries it there.
    JoinFile::parse(text.expose_secret()).map_err(|e| Failure::Failed(e.to_string()))?;
    durable::create(path, text.expose_secret().as_bytes(), access)
        .map_err(|e| Failure::Failed(format!("cannot write the join file: {e}")))
}

fn join_file(answer: v1::GetJoinResponse, credential: Credential) -> Result<JoinFile, Failure> {
    let trust_domain: TrustDomain = answer.trust_domain.parse().map_err(|_| odd("trust domain"))?;
    if answer.enrollment_endpoints.is_empty() || answer.node_endpoints.is_empty() {
        return Err(Failure::Configuration(
            "the CA does not know where machines reach it: set enrollment_endpoints and \
             node_endpoints in its configuration"
                .to_owned(),
        ));
    }
    if answer.control_roots_der.is_empty() {
        return Err(odd("control root"));
    }
    Ok(JoinFile {
        trust_domain,
        cluster: answer.cluster.parse().map_err(|_| odd("cluster"))?,
        enrollment_endpoints: answer.enrollment_endpoints,
        node_endpoints: answer.node_endpoints,
        control_roots: answer.control_roots_der.into_iter().map(CertificateDer::from).collect(),
        credential,
    })
}

/// Revokes a token whose join file could not be written, and says how that went.
async fn withdraw(
    admin: &mut AdminServiceClient<Channel>,
    token: &v1::Token,
    failure: Failure,
) -> Failure {
    let request = v1::RevokeTokenRequest { cluster: token.cluster.clone(), id: token.id.clone() };
    let outcome = match admin.revoke_token(request).await {
        Ok(_) => format!("token {} was revoked again", token.id),
        Err(e) => format!(
            "token {} is still good, though nobody holds it: {}; run `ca-admin token revoke \
             --cluster {} {}`",
            token.id,
            e.message(),
            token.cluster,
            token.id
        ),
    };
    let told = |text: String| format!("{text}; {outcome}");
    match failure {
        Failure::Configuration(text) => Failure::Configuration(told(text)),
        Failure::Usage(text) => Failure::Usage(told(text)),
        Failure::Failed(text) => Failure::Failed(told(text)),
        other @ (Failure::Refused { .. } | Failure::Output(_)) => other,
    }
}

/// What may not be meant.
fn notes(args: &Create) -> Vec<String> {
    let exact = !args.generate_names && args.nodes.iter().all(|name| !name.ends_with('*'));
    let names = args.nodes.len();
    if names == 0 || !exact || args.uses as usize <= names {
        return Vec::new();
    }
    vec![format!(
        "{} uses for {names} exact node name{}: a name is one machine's at a time; for several \
         machines give a pattern (such as '{}-*') or --generate-names",
        args.uses,
        if names == 1 { "" } else { "s" },
        args.nodes[0]
    )]
}

/// The command that enrols with the join file just written, whole.
fn next_step(args: &Create) -> String {
    let file = args.out.file_name().map_or_else(|| "FILE".into(), |name| name.to_string_lossy());
    let mut words = vec!["node-agent enroll --join".to_owned(), quoted(&file)];
    words.push(format!("--role {}", args.role));
    if let [name] = args.nodes.as_slice()
        && !name.ends_with('*')
    {
        words.push(format!("--name {name}"));
    }
    words.extend(args.dns_names.iter().map(|name| format!("--dns {name}")));
    if args.shared_address {
        words.push("--shared-address".to_owned());
    }
    words.push(match args.role {
        Role::Driver => "--once --tls-dir ./ray-mtls".to_owned(),
        Role::Head | Role::Worker => "--ray-group GROUP --state-dir /var/lib/ray-mtls/agent \
                                      --tls-dir /var/lib/ray-mtls/tls"
            .to_owned(),
    });
    words.join(" ")
}

/// A word as a shell reads it.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-/".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', "'\\''"))
}

/// A token without its secret.
#[derive(Debug, Serialize)]
pub(super) struct TokenView {
    id: String,
    cluster: String,
    role: &'static str,
    state: &'static str,
    uses: u32,
    used: u32,
    created: Moment,
    created_by: String,
    expires: Moment,
    node_names: Vec<String>,
    generate_names: bool,
    address_ranges: Vec<String>,
    any_address: bool,
    dns_names: Vec<String>,
    replace: bool,
    shared_address: bool,
}

impl TokenView {
    pub(super) fn new(token: &v1::Token) -> Self {
        Self {
            id: token.id.clone(),
            cluster: token.cluster.clone(),
            role: Role::from_proto(token.role).map_or("unknown", Role::as_str),
            state: state(token.state),
            uses: token.uses,
            used: token.used,
            created: Moment::from_unix(token.created_unix),
            created_by: token.created_by.clone(),
            expires: Moment::from_unix(token.expires_unix),
            node_names: token.node_names.clone(),
            generate_names: token.generate_names,
            address_ranges: token.address_ranges.clone(),
            any_address: token.any_address,
            dns_names: token.dns_names.clone(),
            replace: token.replace,
            shared_address: token.shared_address,
        }
    }

    fn names(&self) -> String {
        let given =
            if self.node_names.is_empty() { "any".to_owned() } else { self.node_names.join(",") };
        if self.generate_names { format!("{given} + key hash") } else { given }
    }

    fn addresses(&self) -> String {
        match (self.any_address, self.address_ranges.is_empty()) {
            (true, _) => "any".to_owned(),
            (false, true) => "its own".to_owned(),
            (false, false) => self.address_ranges.join(","),
        }
    }

    fn table(&self, now: OffsetDateTime) -> Table {
        let mut table = Table::of_facts();
        table.fact("token", &self.id);
        table.fact("cluster", &self.cluster);
        table.fact("role", self.role);
        table.fact("state", self.state);
        table.fact("uses", format!("{} of {} used", self.used, self.uses));
        table.fact("expires", self.expires.human(now));
        table.fact("node names", self.names());
        table.fact("addresses", self.addresses());
        table.fact("dns names", self.dns_names.join(","));
        table.fact("replaces", yes_no(self.replace));
        table.fact("created", format!("{} by {}", self.created.human(now), self.created_by));
        table
    }
}

impl View for TokenView {
    fn text(&self, now: OffsetDateTime) -> String {
        self.table(now).to_string()
    }
}

#[derive(Debug, Serialize)]
struct CreatedView {
    token: TokenView,
    join_file: PathBuf,
    notes: Vec<String>,
    next: String,
}

impl View for CreatedView {
    fn text(&self, now: OffsetDateTime) -> String {
        let mut table = self.token.table(now);
        table.fact("join file", self.join_file.display());
        if !self.notes.is_empty() {
            table.facts("notes", &self.notes);
        }
        format!(
            "{table}\nThe join file holds a secret. Carry it to the machine, mode 0600, and run \
             there:\n  {}\n",
            super::output::printable(&self.next)
        )
    }
}

#[derive(Debug, Serialize)]
struct TokenList {
    tokens: Vec<TokenView>,
}

impl View for TokenList {
    fn text(&self, now: OffsetDateTime) -> String {
        if self.tokens.is_empty() {
            return "no tokens\n".to_owned();
        }
        let mut table = Table::with_head(&[
            "TOKEN",
            "ROLE",
            "STATE",
            "USED",
            "EXPIRES",
            "NAMES",
            "ADDRESSES",
            "BY",
        ]);
        for view in &self.tokens {
            table.row([
                view.id.clone(),
                view.role.to_owned(),
                view.state.to_owned(),
                format!("{}/{}", view.used, view.uses),
                view.expires.human(now),
                view.names(),
                view.addresses(),
                view.created_by.clone(),
            ]);
        }
        table.to_string()
    }
}

fn state(state: i32) -> &'static str {
    match v1::TokenState::try_from(state) {
        Ok(v1::TokenState::Open) => "open",
        Ok(v1::TokenState::Spent) => "spent",
        Ok(v1::TokenState::Expired) => "expired",
        Ok(v1::TokenState::Revoked) => "revoked",
        Ok(v1::TokenState::Unspecified) | Err(_) => "unknown",
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn answer() -> v1::CreateTokenResponse {
        let key = rcgen::KeyPair::generate().unwrap();
        let root = rcgen::CertificateParams::default().self_signed(&key).unwrap();
        let token = raymtls_proto::token::BootstrapToken::new(
            raymtls_proto::token::TokenId::new([1; 8]),
            [2; 32],
        );
        v1::CreateTokenResponse {
            token: Some(v1::Token {
                id: token.id().to_string(),
                cluster: "c1".to_owned(),
                role: v1::Role::Worker.into(),
                uses: 2,
                state: v1::TokenState::Open.into(),
                ..Default::default()
            }),
            bootstrap_token: token.expose().expose_secret().to_owned(),
            trust_domain: "ray.example".to_owned(),
            control_roots_der: vec![root.der().to_vec()],
            enrollment_endpoints: vec!["ca:7443".to_owned()],
            node_endpoints: vec!["ca:7444".to_owned()],
        }
    }

    #[test]
    fn the_join_file_is_private_and_reads_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("worker.join");
        write_join_file(answer(), &path).unwrap();
        let mode = path.metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o600);
        let file = JoinFile::read(&path).unwrap();
        assert_eq!(file.cluster.as_str(), "c1");
        assert_eq!(file.node_endpoints, ["ca:7444"]);
    }

    #[test]
    fn a_join_file_never_replaces_a_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("worker.join");
        write_join_file(answer(), &path).unwrap();
        let before = std::fs::read(&path).unwrap();
        assert!(must_be_free(&path).is_err());
        assert!(write_join_file(answer(), &path).is_err());
        assert_eq!(std::fs::read(&path).unwrap(), before);
    }

    #[test]
    fn a_ca_without_endpoints_is_a_configuration_fault() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("worker.join");
        let lame = v1::CreateTokenResponse { node_endpoints: vec![], ..answer() };
        let failure = write_join_file(lame, &path).unwrap_err();
        assert!(matches!(failure, Failure::Configuration(_)), "{failure}");
        assert!(!path.exists());
    }

    #[test]
    fn nothing_that_is_shown_holds_the_secret() {
        let answer = answer();
        let secret = answer.bootstrap_token.split('.').nth(1).unwrap().to_owned();
        let view = CreatedView {
            token: TokenView::new(answer.token.as_ref().unwrap()),
            join_file: "worker.join".into(),
            notes: vec![],
            next: "node-agent enroll --join worker.join".to_owned(),
        };
        let text = view.text(raymtls_proto::clock::from_unix(1_764_000_000).unwrap());
        let json = serde_json::to_string(&view).unwrap();
        assert!(!text.contains(&secret) && !json.contains(&secret));
        assert!(text.contains("0 of 2 used") && text.contains("enroll --join"), "{text}");
    }

    #[test]
    fn patterns_have_one_star_at_the_end() {
        for good in ["w1", "w*", "worker-*", "*"] {
            assert!(name_or_pattern(good).is_ok(), "{good}");
        }
        for bad in ["", "*w", "w*w", "w**", "W*", "-*", "w-"] {
            assert!(name_or_pattern(bad).is_err(), "{bad}");
        }
    }
}
