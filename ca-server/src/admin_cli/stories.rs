//! Whole commands against a CA that is played: what reaches it, what is printed, how it ends.

use std::{
    io::{self, Write},
    path::PathBuf,
    process::ExitCode,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

use clap::Parser;
use raymtls_proto::{
    reason::Reason,
    token::{BootstrapToken, TokenId},
    v1::{
        self,
        admin_service_server::{AdminService, AdminServiceServer},
    },
};
use secrecy::ExposeSecret;
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{Request, Response, Status, transport::Server};

mod revoke;

use super::{CommandLine, act, output::Screen, report};

/// A CA that writes down what it is asked to change.
#[derive(Clone, Default)]
struct Played {
    changes: Arc<Mutex<Vec<String>>>,
    /// What the nodes say of each change.
    applied: Arc<Mutex<Vec<v1::Applied>>>,
    /// After what they say, the CA breaks off; with nothing from them, it refuses to begin.
    breaks_off: Arc<AtomicBool>,
    /// Why not all nodes of a token were revoked.
    stopped_by: Arc<Mutex<String>>,
}

impl Played {
    fn note(&self, change: &str) {
        self.changes.lock().unwrap().push(change.to_owned());
    }

    fn changes(&self) -> Vec<String> {
        self.changes.lock().unwrap().clone()
    }
}

type Answer<T> = Result<Response<T>, Status>;

fn node(name: &str) -> v1::Node {
    v1::Node {
        cluster: "c1".to_owned(),
        name: name.to_owned(),
        role: v1::Role::Worker.into(),
        state: v1::NodeState::Live.into(),
        ..Default::default()
    }
}

fn not_played<T>() -> Answer<T> {
    Err(Status::unimplemented("not played"))
}

#[tonic::async_trait]
impl AdminService for Played {
    async fn who_am_i(&self, _: Request<v1::WhoAmIRequest>) -> Answer<v1::WhoAmIResponse> {
        not_played()
    }

    async fn create_cluster(&self, _: Request<v1::CreateClusterRequest>) -> Answer<v1::Cluster> {
        let message = "uid 1000 has no role: ask for membership in the operator group";
        Err(Reason::RoleTooLow.status(message, None))
    }

    async fn set_cluster(
        &self,
        request: Request<v1::SetClusterRequest>,
    ) -> Answer<v1::SetClusterResponse> {
        if !request.get_ref().dry_run {
            self.note("set");
        }
        Ok(Response::new(v1::SetClusterResponse {
            before: Some(v1::Settings { ray_client: false, ..Default::default() }),
            after: Some(v1::Settings { ray_client: true, ..Default::default() }),
            notes: vec!["port 10001 opens".to_owned()],
        }))
    }

    async fn list_clusters(
        &self,
        _: Request<v1::ListClustersRequest>,
    ) -> Answer<v1::ListClustersResponse> {
        not_played()
    }

    async fn get_cluster(&self, _: Request<v1::GetClusterRequest>) -> Answer<v1::Cluster> {
        not_played()
    }

    async fn get_join(&self, _: Request<v1::GetJoinRequest>) -> Answer<v1::GetJoinResponse> {
        not_played()
    }

    async fn create_token(
        &self,
        request: Request<v1::CreateTokenRequest>,
    ) -> Answer<v1::CreateTokenResponse> {
        self.note("create token");
        let key = rcgen::KeyPair::generate().unwrap();
        let root = rcgen::CertificateParams::default().self_signed(&key).unwrap();
        let token = BootstrapToken::new(TokenId::new([1; 8]), [2; 32]);
        Ok(Response::new(v1::CreateTokenResponse {
            token: Some(v1::Token {
                id: token.id().to_string(),
                cluster: request.get_ref().cluster.clone(),
                generate_names: request.get_ref().generate_names,
                uses: request.get_ref().uses,
                ..Default::default()
            }),
            bootstrap_token: token.expose().expose_secret().to_owned(),
            trust_domain: "ray.example".to_owned(),
            control_roots_der: vec![root.der().to_vec()],
            // A cluster of this name has a CA that does not know where it is reached.
            enrollment_endpoints: match request.get_ref().cluster.as_str() {
                "lost" => vec![],
                _ => vec!["ca:7443".to_owned()],
            },
            node_endpoints: vec!["ca:7444".to_owned()],
        }))
    }

    async fn list_tokens(
        &self,
        _: Request<v1::ListTokensRequest>,
    ) -> Answer<v1::ListTokensResponse> {
        not_played()
    }

    async fn revoke_token(&self, _: Request<v1::RevokeTokenRequest>) -> Answer<v1::Token> {
        self.note("revoke token");
        Ok(Response::new(v1::Token::default()))
    }

    async fn revoke_token_nodes(
        &self,
        _: Request<v1::RevokeTokenNodesRequest>,
    ) -> Answer<v1::RevokeTokenNodesResponse> {
        self.note("revoke token with nodes");
        Ok(Response::new(v1::RevokeTokenNodesResponse {
            nodes: vec!["n1".to_owned(), "h2".to_owned()],
            change: Some(v1::Change::default()),
            stopped_by: self.stopped_by.lock().unwrap().clone(),
            ..v1::RevokeTokenNodesResponse::default()
        }))
    }

    async fn list_nodes(
        &self,
        request: Request<v1::ListNodesRequest>,
    ) -> Answer<v1::ListNodesResponse> {
        let token_id = "0123456789abcdef".to_owned();
        let (nodes, next_page) = match request.get_ref().page.as_str() {
            "" => (vec![v1::Node { token_id, ..node("n1") }], "second"),
            "second" if request.get_ref().cluster == "heads" => {
                let (role, earlier_token_ids) = (v1::Role::Head.into(), vec![token_id]);
                (vec![v1::Node { role, earlier_token_ids, ..node("h2") }, node("n3")], "")
            }
            _ => (vec![node("n2")], ""),
        };
        let next_page = next_page.to_owned();
        Ok(Response::new(v1::ListNodesResponse { nodes, next_page }))
    }

    async fn get_node(&self, request: Request<v1::GetNodeRequest>) -> Answer<v1::Node> {
        match request.get_ref().name.as_str() {
            "n1" => Ok(Response::new(node("n1"))),
            "h1" => Ok(Response::new(v1::Node { role: v1::Role::Head.into(), ..node("h1") })),
            "r1" => Ok(Response::new(v1::Node {
                state: v1::NodeState::Revoked.into(),
                leaf_not_after_unix: 253_402_300_799,
                ..node("r1")
            })),
            other => Err(Reason::NotFound.status(&format!("no node {other} in c1"), None)),
        }
    }

    async fn revoke_node(
        &self,
        request: Request<v1::RevokeNodeRequest>,
    ) -> Answer<v1::RevokeNodeResponse> {
        self.note(&format!("revoke node: {}", request.get_ref().reason));
        let state = v1::NodeState::Revoked.into();
        Ok(Response::new(v1::RevokeNodeResponse {
            node: Some(v1::Node {
                state,
                leaf_not_after_unix: 1_764_000_000 + 86_400,
                addresses: vec![v1::NodeAddress { address: "10.0.0.7".to_owned(), proved: true }],
                ..node(&request.get_ref().name)
            }),
            certificates_revoked: 2,
            token_uses_voided: 1,
            notes: vec!["Ray accepts its leaf until 2026-01-01".to_owned()],
            blocked_addresses: vec!["10.0.0.7".to_owned()],
            spared_addresses: vec!["10.0.0.8: also live node w2's".to_owned()],
            change: Some(v1::Change::default()),
        }))
    }

    async fn forget_node(
        &self,
        _: Request<v1::ForgetNodeRequest>,
    ) -> Answer<v1::ForgetNodeResponse> {
        self.note("forget node");
        Ok(Response::new(v1::ForgetNodeResponse {}))
    }

    async fn reinstate_node(
        &self,
        request: Request<v1::ReinstateNodeRequest>,
    ) -> Answer<v1::ReinstateNodeResponse> {
        self.note("reinstate node");
        let state = v1::NodeState::Left.into();
        let node = Some(v1::Node { state, ..node(&request.get_ref().name) });
        let notes = vec!["enrol it again".to_owned()];
        Ok(Response::new(v1::ReinstateNodeResponse { node, notes, change: None }))
    }

    type WatchAppliedStream =
        std::pin::Pin<Box<dyn tokio_stream::Stream<Item = Result<v1::Applied, Status>> + Send>>;

    async fn watch_applied(
        &self,
        _: Request<v1::WatchAppliedRequest>,
    ) -> Answer<Self::WatchAppliedStream> {
        let applied = self.applied.lock().unwrap().clone();
        let breaks_off = self.breaks_off.load(Ordering::SeqCst);
        if breaks_off && applied.is_empty() {
            return Err(Reason::RateLimited.status("as many commands as may wait already do", None));
        }
        let end = breaks_off.then(|| Err(Status::unavailable("the server stops")));
        Ok(Response::new(Box::pin(tokio_stream::iter(applied.into_iter().map(Ok).chain(end)))))
    }

    async fn revoke_certificate(
        &self,
        request: Request<v1::RevokeCertificateRequest>,
    ) -> Answer<v1::RevokeCertificateResponse> {
        self.note("revoke certificate");
        Ok(Response::new(v1::RevokeCertificateResponse {
            serials: vec![request.into_inner().serial],
            node: "n1".to_owned(),
            notes: vec!["no address is blocked".to_owned()],
            ..Default::default()
        }))
    }

    async fn list_certificates(
        &self,
        _: Request<v1::ListCertificatesRequest>,
    ) -> Answer<v1::ListCertificatesResponse> {
        not_played()
    }

    async fn prune_audit(
        &self,
        request: Request<v1::PruneAuditRequest>,
    ) -> Answer<v1::PruneAuditResponse> {
        if !request.get_ref().dry_run {
            self.note("prune log");
        }
        Ok(Response::new(v1::PruneAuditResponse { removed: 7, first_index: 8, checkpoint: None }))
    }

    type BackupStream = tokio_stream::Empty<Result<v1::BackupPiece, Status>>;

    async fn backup(&self, _: Request<v1::BackupRequest>) -> Answer<Self::BackupStream> {
        not_played()
    }

    async fn get_restore(&self, _: Request<v1::GetRestoreRequest>) -> Answer<v1::Restore> {
        not_played()
    }

    async fn accept_restore(
        &self,
        request: Request<v1::AcceptRestoreRequest>,
    ) -> Answer<v1::Restore> {
        if !request.get_ref().dry_run {
            self.note("accept restore");
        }
        Ok(Response::new(v1::Restore { pending: true, ..v1::Restore::default() }))
    }

    async fn list_audit(&self, _: Request<v1::ListAuditRequest>) -> Answer<v1::ListAuditResponse> {
        not_played()
    }

    async fn get_certificate(
        &self,
        request: Request<v1::GetCertificateRequest>,
    ) -> Answer<v1::Certificate> {
        let kind = v1::CertificateKind::RayNode.into();
        let serial = request.into_inner().serial;
        let node = "n1".to_owned();
        Ok(Response::new(v1::Certificate { serial, kind, node, ..Default::default() }))
    }
}

/// What a test can read of a [`Screen`].
#[derive(Clone, Default)]
struct Sheet(Arc<Mutex<Vec<u8>>>);

impl Sheet {
    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }
}

impl Write for Sheet {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The played CA on a socket in a folder of its own.
struct Stage {
    folder: tempfile::TempDir,
    ca: Played,
}

/// How a command ended.
#[derive(Debug)]
struct Ended {
    code: ExitCode,
    out: String,
    err: String,
}

impl Stage {
    fn open() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let ca = Played::default();
        let incoming =
            UnixListenerStream::new(UnixListener::bind(folder.path().join("ca.sock")).unwrap());
        let service = AdminServiceServer::new(ca.clone());
        tokio::spawn(Server::builder().add_service(service).serve_with_incoming(incoming));
        Self { folder, ca }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    async fn run(&self, line: &str) -> Ended {
        let socket = self.path("ca.sock").display().to_string();
        let words = ["ca-admin", "--socket", socket.as_str()];
        let words = words.into_iter().chain(line.split_whitespace());
        let command_line = CommandLine::try_parse_from(words).unwrap();
        let (out, err) = (Sheet::default(), Sheet::default());
        let mut screen =
            Screen::of_test(Box::new(out.clone()), Box::new(err.clone()), command_line.output);
        let outcome = act(command_line, &mut screen).await;
        let code = report(outcome, &mut screen);
        Ended { code, out: out.text(), err: err.text() }
    }
}

#[tokio::test]
async fn without_a_terminal_and_without_yes_nothing_changes() {
    let stage = Stage::open();
    for line in [
        "cluster set c1 ray-client=on",
        "token revoke --cluster c1 0123456789abcdef",
        "node revoke --cluster c1 n1 --reason drill",
        "node forget --cluster c1 n1",
        "node reinstate --cluster c1 r1",
        "log prune --before 365d",
        "restore accept",
        "token revoke --cluster c1 0123456789abcdef --with-nodes --reason drill",
        "cert revoke --cluster c1 019ab697e80007070707070707070707 --reason drill",
    ] {
        let ended = stage.run(line).await;
        assert_eq!(ended.code, ExitCode::from(64), "{line}: {ended:?}");
        assert!(ended.err.contains("--yes") && ended.out.is_empty(), "{line}: {ended:?}");
    }
    assert!(stage.ca.changes().is_empty(), "{:?}", stage.ca.changes());
}

#[tokio::test]
async fn with_yes_the_plan_is_said_and_done() {
    let stage = Stage::open();
    let ended = stage.run("node revoke --cluster c1 n1 --reason drill --yes").await;
    assert_eq!(ended.code, ExitCode::SUCCESS, "{ended:?}");
    assert!(ended.err.contains("worker n1 of cluster c1"), "{ended:?}");
    assert!(ended.out.contains("n1 of cluster c1 is revoked"), "{ended:?}");
    assert!(ended.out.contains("note: Ray accepts its leaf until"), "{ended:?}");
    assert_eq!(stage.ca.changes(), ["revoke node: drill"]);
}

#[tokio::test]
async fn a_dry_run_changes_nothing_and_needs_no_yes() {
    let stage = Stage::open();
    let ended = stage.run("cluster set c1 ray-client=on --dry-run").await;
    assert_eq!(ended.code, ExitCode::SUCCESS, "{ended:?}");
    assert!(ended.out.contains("would change:\n  ray-client: off -> on"), "{ended:?}");
    assert!(stage.ca.changes().is_empty());
    stage.run("cluster set c1 ray-client=on --yes").await;
    assert_eq!(stage.ca.changes(), ["set"]);
}

#[tokio::test]
async fn a_refusal_prints_its_reason_and_exits_2() {
    let stage = Stage::open();
    for (line, reason) in [
        ("cluster create c1 --max-job 20d", "refused: ROLE_TOO_LOW: uid 1000 has no role"),
        ("node revoke --cluster c1 n9 --reason drill --yes", "refused: NOT_FOUND: no node n9"),
    ] {
        let ended = stage.run(line).await;
        assert_eq!(ended.code, ExitCode::from(2), "{line}: {ended:?}");
        assert!(ended.err.starts_with(reason) && ended.out.is_empty(), "{line}: {ended:?}");
    }
    assert!(stage.ca.changes().is_empty());
}

#[tokio::test]
async fn what_will_be_refused_is_not_announced() {
    let stage = Stage::open();
    let ended = stage.run("node forget --cluster c1 r1 --yes").await;
    assert_eq!(ended.code, ExitCode::from(2), "{ended:?}");
    assert!(ended.err.starts_with("refused: LEAF_STILL_LIVES: "), "{ended:?}");
    assert!(!ended.err.contains("will be forgotten"), "{ended:?}");
    assert!(stage.ca.changes().is_empty());
}

#[tokio::test]
async fn several_uses_of_one_exact_name_are_worth_a_word() {
    let stage = Stage::open();
    for (number, (flags, noted)) in [
        ("--uses 3 --node gpu3", true),
        ("--uses 3 --node gpu3 --generate-names", false),
        ("--uses 3 --node gpu*", false),
        ("--uses 2 --node gpu3 --node gpu4", false),
        ("--node gpu3", false),
    ]
    .into_iter()
    .enumerate()
    {
        let out = stage.path(&format!("{number}.join"));
        let line =
            format!("token create --cluster c1 --role worker {flags} --out {}", out.display());
        let ended = stage.run(&line).await;
        assert_eq!(ended.code, ExitCode::SUCCESS, "{ended:?}");
        let text = "3 uses for 1 exact node name: a name is one machine's at a time";
        assert_eq!(ended.out.contains(text), noted, "{flags}: {ended:?}");
    }
}

#[tokio::test]
async fn json_is_one_document_with_every_page() {
    let stage = Stage::open();
    let ended = stage.run("-o json node list --cluster c1").await;
    let json: serde_json::Value = serde_json::from_str(&ended.out).unwrap();
    let names: Vec<_> = json["nodes"].as_array().unwrap().iter().map(|n| &n["name"]).collect();
    assert_eq!(names, ["n1", "n2"]);
}

#[tokio::test]
async fn a_join_file_is_written_once_and_the_secret_is_not_shown() {
    let stage = Stage::open();
    let join = stage.path("worker.join");
    let line = format!(
        "token create --cluster c1 --role worker --generate-names --out {}",
        join.display()
    );
    let ended = stage.run(&line).await;
    assert_eq!(ended.code, ExitCode::SUCCESS, "{ended:?}");
    let file = raymtls_proto::join::JoinFile::read(&join).unwrap();
    let secret = file.token().unwrap().expose();
    let secret = secret.expose_secret().split('.').nth(1).unwrap();
    assert!(!ended.out.contains(secret) && !ended.err.contains(secret));
    assert!(ended.out.contains("any + key hash"), "{ended:?}");

    let again = stage.run(&line).await;
    assert_eq!(again.code, ExitCode::from(64), "{again:?}");
    assert_eq!(stage.ca.changes(), ["create token"], "a token was made for nothing");
}

#[tokio::test]
async fn a_token_whose_join_file_cannot_be_written_is_revoked() {
    let stage = Stage::open();
    let join = stage.path("lost.join");
    let line = format!("token create --cluster lost --role head --out {}", join.display());
    let ended = stage.run(&line).await;
    assert_eq!(ended.code, ExitCode::from(78), "{ended:?}");
    assert!(ended.err.contains("enrollment_endpoints"), "{ended:?}");
    assert_eq!(stage.ca.changes(), ["create token", "revoke token"]);
    assert!(!join.exists());
}
