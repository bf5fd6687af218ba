//! What the CA said last, so that a restart with the CA away knows it. It decides nothing.

mod peers;

use std::{borrow::Cow, sync::Arc};

use prost::Message;
use raymtls_proto::v1;

use peers::{Blocked, Blocks, Peer, Peers};

/// The last answer of the CA in each of its parts, without the Ray token, which lies in the TLS
/// folder for Ray to read.
#[derive(Clone, Default)]
pub struct Memory {
    /// Settings, bundle, CRL, version; members and blocks are below.
    parts: v1::SyncResponse,
    /// Absent: no CA ever told this agent.
    peers: Option<Arc<Peers>>,
    blocks: Arc<Blocks>,
}

impl Memory {
    /// Reads it back. Unreadable memory is no memory: the CA is asked for everything again.
    pub(crate) fn decode(bytes: &[u8]) -> Self {
        let parts = v1::SyncResponse::decode(bytes).unwrap_or_default();
        let mut memory = Self::default();
        memory.merge(&parts);
        // Pages that were kept are a whole: a snapshot cut short keeps no version.
        memory.end_snapshot();
        memory
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let parts = v1::SyncResponse {
            // A restart in the middle of a snapshot asks for all of it again.
            version: self.parts.version.filter(|_| !self.is_filling()),
            // Part of the first snapshot is not who the members are.
            members: self.peers.as_ref().filter(|p| !p.is_partial()).map(|p| p.to_proto()),
            blocks: Some(self.blocks.to_proto()),
            ..self.parts.clone()
        };
        parts.encode_to_vec()
    }

    /// The version all parts are of.
    #[must_use]
    pub fn version(&self) -> Option<v1::SyncVersion> {
        self.parts.version
    }

    /// The cluster's settings.
    #[must_use]
    pub fn settings(&self) -> Option<&v1::Settings> {
        self.parts.settings.as_ref()
    }

    /// What Ray must trust.
    #[must_use]
    pub fn bundle(&self) -> Option<&v1::TrustBundle> {
        self.parts.bundle.as_ref()
    }

    /// What the CA revoked of its own certificates.
    #[must_use]
    pub fn control_crls(&self) -> &[Vec<u8>] {
        self.parts.control_crl.as_ref().map_or(&[], |crl| &crl.crls_der)
    }

    /// When the answer was written, by the CA's clock; zero for never.
    #[must_use]
    pub fn server_time_unix(&self) -> i64 {
        self.parts.server_time_unix
    }

    /// Whether the CA ever told who all the members are.
    #[must_use]
    pub fn knows_members(&self) -> bool {
        self.peers.as_ref().is_some_and(|peers| !peers.is_partial())
    }

    /// Whether the pages of a snapshot are still coming. Until then, who was a member before it
    /// still counts as one, unless it was blocked meanwhile.
    #[must_use]
    pub fn is_filling(&self) -> bool {
        self.peers.as_ref().is_some_and(|peers| peers.is_filling())
    }

    /// All pages of the snapshot are there: what it did not name is no member any more.
    pub fn end_snapshot(&mut self) {
        if self.is_filling()
            && let Some(peers) = &mut self.peers
        {
            Arc::make_mut(peers).end_snapshot();
        }
    }

    /// Members by name, without what is blocked in their own name.
    pub(crate) fn members(&self) -> impl Iterator<Item = (&str, Cow<'_, Peer>)> {
        let blocks = Arc::clone(&self.blocks);
        let peers = self.peers.iter().flat_map(|peers| peers.iter());
        peers.filter_map(move |(name, peer)| Some((name, blocks.apart(name, peer)?)))
    }

    /// One member.
    #[must_use]
    pub(crate) fn member(&self, name: &str) -> Option<&Peer> {
        self.peers.as_ref()?.get(name)
    }

    /// Addresses to cut off.
    #[must_use]
    pub(crate) fn blocks(&self) -> &[Blocked] {
        self.blocks.all()
    }

    /// Takes over the parts an answer has.
    pub fn merge(&mut self, answer: &v1::SyncResponse) {
        let known = &mut self.parts;
        known.version = answer.version.or(known.version);
        known.settings = answer.settings.clone().or_else(|| known.settings.take());
        known.bundle = answer.bundle.clone().or_else(|| known.bundle.take());
        known.control_crl = answer.control_crl.clone().or_else(|| known.control_crl.take());
        known.server_time_unix = answer.server_time_unix;
        if let Some(blocks) = &answer.blocks {
            self.blocks = Arc::new(Blocks::read(blocks));
        }
        if let Some(page) = &answer.members {
            Arc::make_mut(self.peers.get_or_insert_default()).take(page);
        }
    }

    /// Makes the next Sync ask for everything.
    pub fn forget_version(&mut self) {
        self.parts.version = None;
    }
}

impl std::fmt::Debug for Memory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Memory({:?})", self.parts.version)
    }
}
