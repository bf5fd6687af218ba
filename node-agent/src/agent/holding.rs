//! What this node holds that a restored CA may have lost: its leaves, and the CRLs that it was given. They
//! are sent where the CA asks for them, the CRLs in pieces; nothing of the CA's replaces anything here
//! until an operator there has accepted the restore.

use raymtls_proto::{clock::Clock as _, digest::sha256, v1};
use x509_parser::{
    extensions::ParsedExtension,
    prelude::{CertificateRevocationList, FromDer},
};

use super::Agent;

/// Bytes of a CRL in one call: the CA takes 64 KiB.
const PIECE_LEN: usize = 32 * 1024;
/// Leaves that are sent, the newest first.
const LEAVES_MAX: usize = 8;
/// CRLs that are named.
const CRLS_MAX: usize = 32;

impl Agent {
    /// Notes what a restored CA wants. Whether it wants anything.
    pub(super) fn hear_restored(&mut self, answer: &v1::SyncResponse) -> bool {
        let Some(restored) = &answer.restored else {
            self.wanted = None;
            return false;
        };
        if self.wanted.is_none() {
            tracing::warn!("the CA was restored from a backup and asks what this node holds");
        }
        let wants = restored.holding_wanted || restored.piece_wanted.is_some();
        self.wanted = Some(restored.clone());
        wants
    }

    pub(super) fn holding(&self) -> Option<v1::Holding> {
        let wanted = self.wanted.as_ref()?;
        let piece = wanted.piece_wanted.as_ref().and_then(|piece| self.piece(piece));
        if !wanted.holding_wanted {
            let only = |piece| v1::Holding { piece: Some(piece), ..self.who() };
            return piece
                .map(only)
                .map(|holding| v1::Holding { leaves_der: self.leaves(), ..holding });
        }
        let named = |control: bool| move |der: &Vec<u8>| named(der, control);
        let control = self.memory.control_crls().iter().filter_map(named(true));
        let cluster = self.memory.bundle().into_iter().flat_map(|bundle| &bundle.crls_der);
        let crls = control.chain(cluster.filter_map(named(false))).take(CRLS_MAX).collect();
        Some(v1::Holding { leaves_der: self.leaves(), crls, piece, ..self.who() })
    }

    fn who(&self) -> v1::Holding {
        v1::Holding { role: self.node.role.to_proto().into(), ..v1::Holding::default() }
    }

    fn leaves(&self) -> Vec<Vec<u8>> {
        let now = self.clock.now();
        let live = self.folders.iter().rev().filter(|held| held.folder.facts.not_after > now);
        live.take(LEAVES_MAX).map(|held| held.folder.chain.leaf_der.clone()).collect()
    }

    fn piece(&self, wanted: &v1::CrlPiece) -> Option<v1::CrlPiece> {
        let cluster = self.memory.bundle().into_iter().flat_map(|bundle| &bundle.crls_der);
        let mut all = self.memory.control_crls().iter().chain(cluster);
        let der = all.find(|der| sha256(der)[..] == wanted.sha256[..])?;
        let rest = der.get(wanted.offset as usize..)?;
        let data = rest.get(..PIECE_LEN).unwrap_or(rest).to_vec();
        Some(v1::CrlPiece { data, ..wanted.clone() })
    }
}

#[allow(clippy::wildcard_enum_match_arm, reason = "x509-parser's enum, not ours")]
fn named(der: &[u8], control: bool) -> Option<v1::HeldCrl> {
    let (_, crl) = CertificateRevocationList::from_der(der).ok()?;
    let number = crl.crl_number().and_then(|number| u64::try_from(number).ok())?;
    let issuer_key_id = crl.extensions().iter().find_map(|one| match one.parsed_extension() {
        ParsedExtension::AuthorityKeyIdentifier(id) => {
            id.key_identifier.as_ref().map(|id| id.0.to_vec())
        }
        _ => None,
    });
    Some(v1::HeldCrl {
        sha256: sha256(der).to_vec(),
        length: u32::try_from(der.len()).ok()?,
        issuer_key_id: issuer_key_id.unwrap_or_default(),
        number,
        control,
    })
}
