//! `NodeService`: the caller is the node its agent identity names; no request names a node.

use std::sync::Arc;

use raymtls_proto::v1::{
    self,
    node_service_server::{NodeService, NodeServiceServer},
};
use tonic::{Request, Response, Status};

use super::{MESSAGE_LEN_MAX, status};
use crate::{
    ca::Ca,
    issue::issue,
    leave::leave,
    renew::renew,
    restoring,
    store::{Caller, StoreError},
    sync::sync,
    tls::Peer,
};

/// The service.
#[derive(Clone, Debug)]
pub struct Node(Arc<Ca>);

impl Node {
    /// The service with its bounds.
    #[must_use]
    pub fn server(ca: Arc<Ca>) -> NodeServiceServer<Self> {
        NodeServiceServer::new(Self(ca)).max_decoding_message_size(MESSAGE_LEN_MAX)
    }

    fn caller<T>(&self, call: &'static str, request: &Request<T>) -> Result<Caller, Status> {
        let peer = request.extensions().get::<Peer>();
        let peer = peer.ok_or_else(|| Status::internal("the connection has no peer"))?;
        peer.caller(&self.0)
            .map_err(|e| status(&self.0, call, &peer.address.to_string(), &StoreError::from(e)))
    }

    fn accepted(&self, call: &'static str, caller: &Caller) -> Result<(), Status> {
        let accepted = self.0.require_accepted().map_err(StoreError::from);
        accepted.map_err(|error| status(&self.0, call, &caller.actor(), &error))
    }

    fn answer<T>(
        &self,
        call: &'static str,
        caller: &Caller,
        answer: Result<T, StoreError>,
    ) -> Result<Response<T>, Status> {
        answer.map(Response::new).map_err(|error| status(&self.0, call, &caller.actor(), &error))
    }
}

#[tonic::async_trait]
impl NodeService for Node {
    async fn renew_identity(
        &self,
        request: Request<v1::RenewIdentityRequest>,
    ) -> Result<Response<v1::RenewIdentityResponse>, Status> {
        let caller = self.caller("RenewIdentity", &request)?;
        self.accepted("RenewIdentity", &caller)?;
        let answer = renew(&self.0, caller.clone(), request.into_inner()).await;
        self.answer("RenewIdentity", &caller, answer)
    }

    async fn issue_leaf(
        &self,
        request: Request<v1::IssueLeafRequest>,
    ) -> Result<Response<v1::IssueLeafResponse>, Status> {
        let caller = self.caller("IssueLeaf", &request)?;
        self.accepted("IssueLeaf", &caller)?;
        let answer = issue(&self.0, caller.clone(), request.into_inner()).await;
        self.answer("IssueLeaf", &caller, answer)
    }

    async fn sync(
        &self,
        request: Request<v1::SyncRequest>,
    ) -> Result<Response<v1::SyncResponse>, Status> {
        let caller = self.caller("Sync", &request)?;
        let answer = if self.0.is_restored() {
            let identity = request.extensions().get::<Peer>().and_then(Peer::identity_der);
            restoring::sync(&self.0, &caller, identity, request.into_inner()).await
        } else {
            sync(&self.0, caller.clone(), request.into_inner()).await
        };
        self.answer("Sync", &caller, answer)
    }

    async fn leave(
        &self,
        request: Request<v1::LeaveRequest>,
    ) -> Result<Response<v1::LeaveResponse>, Status> {
        let caller = self.caller("Leave", &request)?;
        self.accepted("Leave", &caller)?;
        let answer = leave(&self.0, caller.clone()).await.map(|()| v1::LeaveResponse {});
        self.answer("Leave", &caller, answer)
    }
}
