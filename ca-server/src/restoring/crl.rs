//! CRLs that nodes hold, taken back in pieces: one that this CA's own issuer signed, with a greater number
//! than the one on record, says what was revoked after the backup.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    time::Duration,
};

use raymtls_proto::{digest::sha256, v1};
use tracing::{info, warn};
use x509_parser::prelude::{CertificateRevocationList, FromDer, X509Certificate};

use crate::{
    ca::Ca,
    store::{Authority, Caller, TakenBack, unix_ms},
};

/// Longest CRL: 100 000 entries of 49 bytes, and what is around them.
const CRL_LEN_MAX: usize = 8 * 1024 * 1024;
/// CRLs that are taken at one time, and bytes of all of them.
const ASSEMBLIES_MAX: usize = 64;
const BYTES_MAX: usize = 64 * 1024 * 1024;
/// CRLs that one node may name.
const NAMED_MAX: usize = 32;
/// A node that does not go on for this long gives its turn to another.
const STALLED: Duration = Duration::from_secs(30);

/// A CRL in the making.
#[derive(Debug)]
pub(super) struct Assembly {
    authority: Authority,
    length: usize,
    bytes: Vec<u8>,
    from: Caller,
    touched: Duration,
}

/// The newest CRL of an issuer.
#[derive(Clone, Debug)]
struct Newest {
    number: u64,
    revoked: Vec<(Vec<u8>, i64)>,
    ends_ms: i64,
}

/// All of them.
#[derive(Debug, Default)]
pub(super) struct Crls {
    /// By SHA-256.
    assemblies: HashMap<Vec<u8>, Assembly>,
    /// What was looked at, by SHA-256.
    seen: HashSet<Vec<u8>>,
    newest: BTreeMap<(Authority, Vec<u8>), Newest>,
}

impl Crls {
    /// Notes which CRLs a node names, and takes the piece it sent.
    pub(super) fn note(
        &mut self,
        ca: &Ca,
        caller: &Caller,
        holding: &v1::Holding,
        elapsed: Duration,
    ) {
        for held in holding.crls.iter().take(NAMED_MAX) {
            self.begin(ca, caller, held, elapsed);
        }
        if let Some(piece) = &holding.piece {
            self.piece(ca, caller, piece, elapsed);
        }
    }

    fn begin(&mut self, ca: &Ca, caller: &Caller, held: &v1::HeldCrl, elapsed: Duration) {
        let authority = if held.control {
            Authority::Control
        } else {
            Authority::Cluster(caller.cluster.clone())
        };
        let length = held.length as usize;
        let bytes: usize = self.assemblies.values().map(|one| one.length).sum();
        let fits = held.sha256.len() == 32
            && (1..=CRL_LEN_MAX).contains(&length)
            && self.assemblies.len() < ASSEMBLIES_MAX
            && bytes.saturating_add(length) <= BYTES_MAX;
        let stalled = |one: &Assembly| elapsed.saturating_sub(one.touched) > STALLED;
        let is_new = self.assemblies.get(&held.sha256).is_none_or(stalled);
        if !fits || !is_new || self.seen.contains(&held.sha256) || self.knows(ca, &authority, held)
        {
            return;
        }
        let one = Assembly {
            authority,
            length,
            bytes: Vec::new(),
            from: caller.clone(),
            touched: elapsed,
        };
        self.assemblies.insert(held.sha256.clone(), one);
    }

    /// Whether one as new is here: by what the node says of it, so nothing is lost by believing it.
    fn knows(&self, ca: &Ca, authority: &Authority, held: &v1::HeldCrl) -> bool {
        let key = (authority.clone(), held.issuer_key_id.clone());
        let taken = self.newest.get(&key).is_some_and(|newest| newest.number >= held.number);
        let own = ca
            .authority(authority)
            .is_ok_and(|live| live.crls_der().iter().any(|der| sha256(der)[..] == held.sha256[..]));
        taken || own
    }

    fn piece(&mut self, ca: &Ca, caller: &Caller, piece: &v1::CrlPiece, elapsed: Duration) {
        let Some(one) = self.assemblies.get_mut(&piece.sha256) else { return };
        let is_next = one.bytes.len() == piece.offset as usize && one.from == *caller;
        let fits = !piece.data.is_empty() && one.bytes.len() + piece.data.len() <= one.length;
        if !is_next || !fits {
            return;
        }
        one.bytes.extend_from_slice(&piece.data);
        one.touched = elapsed;
        if one.bytes.len() < one.length {
            return;
        }
        let Some(one) = self.assemblies.remove(&piece.sha256) else { return };
        if sha256(&one.bytes)[..] == piece.sha256[..] {
            self.seen.insert(piece.sha256.clone());
            self.judge(ca, &one);
        } else {
            warn!(node = caller.actor(), "a node sent another CRL than it named");
        }
    }

    fn judge(&mut self, ca: &Ca, one: &Assembly) {
        let Ok(live) = ca.authority(&one.authority) else { return };
        let Ok((_, crl)) = CertificateRevocationList::from_der(&one.bytes) else { return };
        let issuer = live.issuers().iter().find(|issuer| {
            X509Certificate::from_der(issuer.certificate_der())
                .is_ok_and(|(_, issuer)| crl.verify_signature(issuer.public_key()).is_ok())
        });
        let number = crl.crl_number().and_then(|number| u64::try_from(number).ok());
        // The root's has no entries.
        let (Some(issuer), Some(number)) = (issuer, number) else { return };
        let revoked = crl.iter_revoked_certificates().map(|entry| {
            let at_ms = entry.revocation_date.timestamp().saturating_mul(1_000);
            (entry.raw_serial().to_vec(), at_ms)
        });
        let newest =
            Newest { number, revoked: revoked.collect(), ends_ms: unix_ms(issuer.not_after()) };
        info!(
            authority = %one.authority, number, entries = newest.revoked.len(),
            from = one.from.actor(), "a CRL was taken back"
        );
        let key = (one.authority.clone(), issuer.key_id().to_vec());
        if self.newest.get(&key).is_none_or(|known| known.number < number) {
            self.newest.insert(key, newest);
        }
    }

    /// Whether a CRL waits for a node that does not go on; asked once for each.
    pub(super) fn has_stalled(&mut self, elapsed: Duration) -> bool {
        let before = self.assemblies.len();
        self.assemblies.retain(|_, one| elapsed.saturating_sub(one.touched) <= STALLED);
        self.assemblies.len() < before
    }

    /// The piece that this node is to send next.
    pub(super) fn wanted(&self, caller: &Caller, elapsed: Duration) -> Option<v1::CrlPiece> {
        let mut open = self.assemblies.iter().filter(|(_, one)| {
            one.from == *caller && elapsed.saturating_sub(one.touched) <= STALLED
        });
        open.next().map(|(sha256, one)| v1::CrlPiece {
            sha256: sha256.clone(),
            offset: u32::try_from(one.bytes.len()).unwrap_or(u32::MAX),
            data: Vec::new(),
        })
    }

    /// What they revoke, and the greatest number of each authority.
    pub(super) fn taken(&self) -> (Vec<TakenBack>, Vec<(Authority, u64)>) {
        let mut numbers = BTreeMap::<Authority, u64>::new();
        let mut taken = Vec::new();
        for ((authority, issuer_key_id), newest) in &self.newest {
            let number = numbers.entry(authority.clone()).or_default();
            *number = (*number).max(newest.number);
            taken.extend(newest.revoked.iter().map(|(serial, revoked_ms)| TakenBack {
                authority: authority.clone(),
                serial: serial.clone(),
                revoked_ms: *revoked_ms,
                issuer_key_id: issuer_key_id.clone(),
                ends_ms: newest.ends_ms,
            }));
        }
        (taken, numbers.into_iter().collect())
    }

    /// CRLs that are being taken for a cluster, or for the control authority.
    pub(super) fn in_the_making(&self) -> usize {
        self.assemblies.len()
    }
}
