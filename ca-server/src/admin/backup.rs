//! A backup while serving: what is read in pieces and what is written meanwhile go out in one order, so
//! that the file holds the store as it stands when the stream ends.

use std::sync::Arc;

use raymtls_proto::v1;
use tokio::sync::mpsc;
use tonic::Status;
use tracing::{info, warn};

use super::Operator;
use crate::{
    backup::{Head, Writer},
    ca::Ca,
    store::{BackupPairs, FORMAT, StoreError, unix_ms},
};

/// Bytes of one message.
const PIECE_LEN: usize = 256 * 1024;
/// Messages that wait for a slow reader.
const PIECES_QUEUED: usize = 4;

/// What goes out.
pub type Pieces = mpsc::Receiver<Result<v1::BackupPiece, Status>>;

/// Begins a backup.
///
/// # Errors
/// A refusal, or the store's failure.
pub async fn backup(ca: &Arc<Ca>, operator: &Operator) -> Result<Pieces, StoreError> {
    operator.require(v1::AdminRole::Admin, None)?;
    ca.require_accepted()?;
    let now = ca.clock.now();
    let pairs = ca.store.begin_backup(now, operator.actor.clone()).await?;
    info!(actor = operator.actor, "a backup is made");
    let (pieces, answers) = mpsc::channel(PIECES_QUEUED);
    let head = Head {
        store_format: FORMAT,
        epoch: ca.store.epoch(),
        made_ms: unix_ms(now),
        trust_domain: ca.trust_domain.to_string(),
        server_version: env!("CARGO_PKG_VERSION").to_owned(),
    };
    let making = Making { ca: Arc::clone(ca), pairs, pieces };
    tokio::spawn(making.run(head));
    Ok(answers)
}

struct Making {
    ca: Arc<Ca>,
    pairs: mpsc::Receiver<BackupPairs>,
    pieces: mpsc::Sender<Result<v1::BackupPiece, Status>>,
}

impl Making {
    async fn run(mut self, head: Head) {
        let made = self.make(head).await;
        self.ca.store.end_backup();
        match made {
            Ok(Some(records)) => info!(records, "the backup is made"),
            Ok(None) => warn!("whoever asked for the backup has gone: it ends"),
            Err(error) => {
                warn!(%error, "the backup was not made");
                let _ = self.pieces.send(Err(error.refusal().status())).await;
            }
        }
    }

    /// `None`: nobody takes it any more.
    async fn make(&mut self, head: Head) -> Result<Option<u64>, StoreError> {
        let ca = Arc::clone(&self.ca);
        let (mut writer, begun) = Writer::begin(&ca.kek, &head);
        let mut goes_on = self.send(begun, &writer).await;
        let mut after = None;
        while goes_on {
            after = ca.store.backup_chunk(after).await?;
            while let Ok(pairs) = self.pairs.try_recv() {
                let bytes = writer.pairs(pairs);
                goes_on &= self.send(bytes, &writer).await;
            }
            if after.is_none() {
                break;
            }
        }
        if !goes_on {
            return Ok(None);
        }
        if !ca.store.end_backup() {
            let text = "the backup was not taken as fast as the store was written to: try again";
            return Err(StoreError::Unavailable(text.to_owned()));
        }
        while let Some(pairs) = self.pairs.recv().await {
            let bytes = writer.pairs(pairs);
            goes_on &= self.send(bytes, &writer).await;
        }
        let records = writer.pairs;
        let last = v1::BackupPiece { data: writer.end(), records, end: true };
        goes_on &= self.pieces.send(Ok(last)).await.is_ok();
        Ok(goes_on.then_some(records))
    }

    async fn send(&self, bytes: Vec<u8>, writer: &Writer<'_>) -> bool {
        for piece in bytes.chunks(PIECE_LEN) {
            let piece = v1::BackupPiece { data: piece.to_vec(), records: writer.pairs, end: false };
            if self.pieces.send(Ok(piece)).await.is_err() {
                return false;
            }
        }
        true
    }
}
