//! `EnrollmentService`: the one call of a machine that has no certificate yet.

use std::sync::Arc;

use raymtls_proto::v1::{
    self,
    enrollment_service_server::{EnrollmentService, EnrollmentServiceServer},
};
use tonic::{Request, Response, Status};

use super::{MESSAGE_LEN_MAX, status};
use crate::{ca::Ca, enroll::enroll, tls::Peer};

/// The service.
#[derive(Clone, Debug)]
pub struct Enrollment(Arc<Ca>);

impl Enrollment {
    /// The service with its bounds.
    #[must_use]
    pub fn server(ca: Arc<Ca>) -> EnrollmentServiceServer<Self> {
        EnrollmentServiceServer::new(Self(ca)).max_decoding_message_size(MESSAGE_LEN_MAX)
    }
}

#[tonic::async_trait]
impl EnrollmentService for Enrollment {
    async fn enroll(
        &self,
        request: Request<v1::EnrollRequest>,
    ) -> Result<Response<v1::EnrollResponse>, Status> {
        let peer = request.extensions().get::<Peer>().cloned();
        let peer = peer.ok_or_else(|| Status::internal("the connection has no peer"))?;
        let answer = match self.0.require_accepted() {
            Ok(()) => enroll(&self.0, request.into_inner(), peer.address).await,
            Err(refusal) => Err(refusal.into()),
        };
        answer
            .map(Response::new)
            .map_err(|error| status(&self.0, "Enroll", &peer.address.to_string(), &error))
    }
}
