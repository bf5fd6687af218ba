//! What the CA said last, so that a restart with the CA away knows it. It decides nothing.

use prost::Message;
use raymtls_proto::v1;

/// The last answer of the CA in each of its parts, without the Ray token, which lies in the TLS
/// folder for Ray to read.
#[derive(Clone, Default)]
pub struct Memory(v1::SyncResponse);

impl Memory {
    /// Reads it back. Unreadable memory is no memory: the CA is asked for everything again.
    pub(crate) fn decode(bytes: &[u8]) -> Self {
        v1::SyncResponse::decode(bytes).map(Self).unwrap_or_default()
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        self.0.encode_to_vec()
    }

    /// The version all parts are of.
    #[must_use]
    pub fn version(&self) -> Option<v1::SyncVersion> {
        self.0.version
    }

    /// The cluster's settings.
    #[must_use]
    pub fn settings(&self) -> Option<&v1::Settings> {
        self.0.settings.as_ref()
    }

    /// What Ray must trust.
    #[must_use]
    pub fn bundle(&self) -> Option<&v1::TrustBundle> {
        self.0.bundle.as_ref()
    }

    /// What the CA revoked of its own certificates.
    #[must_use]
    pub fn control_crls(&self) -> &[Vec<u8>] {
        self.0.control_crl.as_ref().map_or(&[], |crl| &crl.crls_der)
    }

    /// Takes over the parts an answer has.
    pub fn merge(&mut self, answer: &v1::SyncResponse) {
        let known = &mut self.0;
        known.version = answer.version.or(known.version);
        known.settings = answer.settings.clone().or_else(|| known.settings.take());
        known.bundle = answer.bundle.clone().or_else(|| known.bundle.take());
        known.control_crl = answer.control_crl.clone().or_else(|| known.control_crl.take());
        known.server_time_unix = answer.server_time_unix;
    }

    /// Makes the next Sync ask for everything.
    pub fn forget_version(&mut self) {
        self.0.version = None;
    }
}

impl std::fmt::Debug for Memory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Memory({:?})", self.0.version)
    }
}
