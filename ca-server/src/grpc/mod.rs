//! The gRPC edge: messages to types on the way in, refusals to statuses on the way out. Nothing is
//! decided here.

pub mod admin;
pub mod enrollment;
pub mod node;

use raymtls_proto::reason::Reason;
use tonic::Status;
use tracing::{debug, error, info};

use crate::{ca::Ca, store::StoreError};

/// Longest message a caller may send, in bytes.
pub const MESSAGE_LEN_MAX: usize = 64 * 1_024;

/// A failed call as the caller sees it, counted and logged. What is our fault is told to the log
/// alone.
fn status(ca: &Ca, call: &'static str, who: &str, error: &StoreError) -> Status {
    let refusal = error.refusal();
    let reason = refusal.reason();
    ca.metrics.refused(reason.as_str());
    if matches!(reason, Reason::Internal | Reason::StoreUnavailable) {
        error!(call, who, %error, "call failed");
    } else if reason == Reason::RateLimited {
        // Counted above: a line each would let a flood fill the log.
        debug!(call, who, %refusal, "call refused");
    } else if reason != Reason::Superseded {
        let elapsed = ca.clock.elapsed();
        if let Some(left_out) = ca.quiet.tell(elapsed, "call", who, reason.as_str()) {
            info!(call, who, reason = reason.as_str(), %refusal, left_out, "call refused");
        }
    }
    refusal.status()
}
