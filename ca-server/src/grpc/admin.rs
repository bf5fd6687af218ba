//! `AdminService` on the CA host's unix socket.

use std::sync::Arc;

use raymtls_proto::v1::{
    self,
    admin_service_server::{AdminService, AdminServiceServer},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, transport::server::UdsConnectInfo};

use super::{MESSAGE_LEN_MAX, status};
use crate::{
    admin::{
        Operator, applied, audit, backup, certificates, clusters, nodes, restore, tokens,
        watches::Watches,
    },
    ca::Ca,
    store::StoreError,
};

/// The service.
#[derive(Clone, Debug)]
pub struct Admin {
    ca: Arc<Ca>,
    own_uid: u32,
    operator_group: bool,
    watches: Arc<Watches>,
    /// Apart from the others: who follows the log keeps nobody from revoking.
    log_waits: Arc<Watches>,
}

impl Admin {
    /// The service with its bounds. `operator_group`: the socket is open to a group.
    #[must_use]
    pub fn server(ca: Arc<Ca>, operator_group: bool) -> AdminServiceServer<Self> {
        let own_uid = rustix::process::geteuid().as_raw();
        let service = Self {
            ca,
            own_uid,
            operator_group,
            watches: Arc::default(),
            log_waits: Arc::default(),
        };
        AdminServiceServer::new(service).max_decoding_message_size(MESSAGE_LEN_MAX)
    }

    fn operator<T>(&self, request: &Request<T>) -> Operator {
        let peer = request.extensions().get::<UdsConnectInfo>();
        let uid = peer.and_then(|peer| peer.peer_cred).map(|cred| cred.uid());
        Operator::on_socket(uid, self.own_uid, self.operator_group)
    }

    fn answer<T>(
        &self,
        call: &'static str,
        operator: &Operator,
        answer: Result<T, StoreError>,
    ) -> Result<Response<T>, Status> {
        answer.map(Response::new).map_err(|error| status(&self.ca, call, &operator.actor, &error))
    }
}

/// Every call but `WhoAmI` and `ListClusters` takes the request as it is.
macro_rules! call {
    ($self:ident, $request:ident, $name:literal, $function:path) => {{
        let operator = $self.operator(&$request);
        let answer = $function(&$self.ca, &operator, $request.into_inner()).await;
        $self.answer($name, &operator, answer)
    }};
}

/// The same of one that changes something, which a restored CA does not take before it is accepted.
macro_rules! change {
    ($self:ident, $request:ident, $name:literal, $function:path) => {{
        let operator = $self.operator(&$request);
        let answer = match $self.ca.require_accepted() {
            Ok(()) => $function(&$self.ca, &operator, $request.into_inner()).await,
            Err(refusal) => Err(refusal.into()),
        };
        $self.answer($name, &operator, answer)
    }};
}

#[tonic::async_trait]
impl AdminService for Admin {
    async fn who_am_i(
        &self,
        request: Request<v1::WhoAmIRequest>,
    ) -> Result<Response<v1::WhoAmIResponse>, Status> {
        let operator = self.operator(&request);
        let scope = operator.clusters.first().map(String::as_str);
        let allowed = operator.require(v1::AdminRole::Viewer, scope).map_err(StoreError::from);
        let answer = allowed.map(|()| v1::WhoAmIResponse {
            actor: operator.actor.clone(),
            grant: Some(v1::AdminGrant {
                role: operator.role.into(),
                clusters: operator.clusters.clone(),
            }),
            trust_domain: self.ca.trust_domain.to_string(),
            server_version: env!("CARGO_PKG_VERSION").to_owned(),
        });
        self.answer("WhoAmI", &operator, answer)
    }

    async fn create_cluster(
        &self,
        request: Request<v1::CreateClusterRequest>,
    ) -> Result<Response<v1::Cluster>, Status> {
        change!(self, request, "CreateCluster", clusters::create)
    }

    async fn set_cluster(
        &self,
        request: Request<v1::SetClusterRequest>,
    ) -> Result<Response<v1::SetClusterResponse>, Status> {
        change!(self, request, "SetCluster", clusters::set)
    }

    async fn list_clusters(
        &self,
        request: Request<v1::ListClustersRequest>,
    ) -> Result<Response<v1::ListClustersResponse>, Status> {
        let operator = self.operator(&request);
        let answer = clusters::list(&self.ca, &operator).await;
        self.answer("ListClusters", &operator, answer)
    }

    async fn get_cluster(
        &self,
        request: Request<v1::GetClusterRequest>,
    ) -> Result<Response<v1::Cluster>, Status> {
        let operator = self.operator(&request);
        let answer = clusters::show(&self.ca, &operator, &request.get_ref().cluster).await;
        self.answer("GetCluster", &operator, answer)
    }

    async fn get_join(
        &self,
        request: Request<v1::GetJoinRequest>,
    ) -> Result<Response<v1::GetJoinResponse>, Status> {
        let operator = self.operator(&request);
        let answer = tokens::join(&self.ca, &operator, &request.get_ref().cluster).await;
        self.answer("GetJoin", &operator, answer)
    }

    async fn create_token(
        &self,
        request: Request<v1::CreateTokenRequest>,
    ) -> Result<Response<v1::CreateTokenResponse>, Status> {
        change!(self, request, "CreateToken", tokens::create)
    }

    async fn list_tokens(
        &self,
        request: Request<v1::ListTokensRequest>,
    ) -> Result<Response<v1::ListTokensResponse>, Status> {
        call!(self, request, "ListTokens", tokens::list)
    }

    async fn revoke_token(
        &self,
        request: Request<v1::RevokeTokenRequest>,
    ) -> Result<Response<v1::Token>, Status> {
        change!(self, request, "RevokeToken", tokens::revoke)
    }

    async fn revoke_token_nodes(
        &self,
        request: Request<v1::RevokeTokenNodesRequest>,
    ) -> Result<Response<v1::RevokeTokenNodesResponse>, Status> {
        change!(self, request, "RevokeTokenNodes", tokens::revoke_with_nodes)
    }

    async fn list_nodes(
        &self,
        request: Request<v1::ListNodesRequest>,
    ) -> Result<Response<v1::ListNodesResponse>, Status> {
        call!(self, request, "ListNodes", nodes::list)
    }

    async fn get_node(
        &self,
        request: Request<v1::GetNodeRequest>,
    ) -> Result<Response<v1::Node>, Status> {
        call!(self, request, "GetNode", nodes::show)
    }

    async fn revoke_node(
        &self,
        request: Request<v1::RevokeNodeRequest>,
    ) -> Result<Response<v1::RevokeNodeResponse>, Status> {
        change!(self, request, "RevokeNode", nodes::revoke)
    }

    async fn forget_node(
        &self,
        request: Request<v1::ForgetNodeRequest>,
    ) -> Result<Response<v1::ForgetNodeResponse>, Status> {
        change!(self, request, "ForgetNode", nodes::forget)
    }

    async fn reinstate_node(
        &self,
        request: Request<v1::ReinstateNodeRequest>,
    ) -> Result<Response<v1::ReinstateNodeResponse>, Status> {
        change!(self, request, "ReinstateNode", nodes::reinstate)
    }

    type WatchAppliedStream = ReceiverStream<Result<v1::Applied, Status>>;

    async fn watch_applied(
        &self,
        request: Request<v1::WatchAppliedRequest>,
    ) -> Result<Response<Self::WatchAppliedStream>, Status> {
        let operator = self.operator(&request);
        let request = request.into_inner();
        let answers = applied::watch(&self.ca, &operator, &self.watches, request).await;
        self.answer("WatchApplied", &operator, answers.map(ReceiverStream::new))
    }

    async fn revoke_certificate(
        &self,
        request: Request<v1::RevokeCertificateRequest>,
    ) -> Result<Response<v1::RevokeCertificateResponse>, Status> {
        change!(self, request, "RevokeCertificate", certificates::revoke)
    }

    async fn list_certificates(
        &self,
        request: Request<v1::ListCertificatesRequest>,
    ) -> Result<Response<v1::ListCertificatesResponse>, Status> {
        call!(self, request, "ListCertificates", certificates::list)
    }

    async fn get_certificate(
        &self,
        request: Request<v1::GetCertificateRequest>,
    ) -> Result<Response<v1::Certificate>, Status> {
        call!(self, request, "GetCertificate", certificates::show)
    }

    async fn list_audit(
        &self,
        request: Request<v1::ListAuditRequest>,
    ) -> Result<Response<v1::ListAuditResponse>, Status> {
        let operator = self.operator(&request);
        let answer = audit::list(&self.ca, &operator, &self.log_waits, request.into_inner()).await;
        self.answer("ListAudit", &operator, answer)
    }

    async fn prune_audit(
        &self,
        request: Request<v1::PruneAuditRequest>,
    ) -> Result<Response<v1::PruneAuditResponse>, Status> {
        change!(self, request, "PruneAudit", audit::prune)
    }

    type BackupStream = ReceiverStream<Result<v1::BackupPiece, Status>>;

    async fn backup(
        &self,
        request: Request<v1::BackupRequest>,
    ) -> Result<Response<Self::BackupStream>, Status> {
        let operator = self.operator(&request);
        let pieces = backup::backup(&self.ca, &operator).await;
        self.answer("Backup", &operator, pieces.map(ReceiverStream::new))
    }

    async fn get_restore(
        &self,
        request: Request<v1::GetRestoreRequest>,
    ) -> Result<Response<v1::Restore>, Status> {
        call!(self, request, "GetRestore", restore::show)
    }

    async fn accept_restore(
        &self,
        request: Request<v1::AcceptRestoreRequest>,
    ) -> Result<Response<v1::Restore>, Status> {
        call!(self, request, "AcceptRestore", restore::accept)
    }
}
