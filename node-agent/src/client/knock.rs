//! Whether the CA's endpoints can be reached and prove to be the CA: one handshake with each, no
//! call. It tells the CA nothing, and changes nothing there.

use std::sync::Arc;

use raymtls_proto::clock::Clock;

use super::{CallError, CallLimits, DialFault, Dialler, Target};
use crate::statedir::Identity;

/// Most endpoints that are knocked at.
const ENDPOINTS_MAX: usize = 8;

/// Knocks at each endpoint, and says how it went there. The identity keeps the node port from taking
/// the caller for a stranger.
///
/// # Errors
/// [`CallError::Setup`].
pub async fn knock(
    target: &Target,
    identity: Option<&Identity>,
    limits: CallLimits,
    clock: Arc<dyn Clock>,
) -> Result<Vec<(String, Result<(), CallError>)>, CallError> {
    let dialler = Dialler::new(target, identity, limits, &[clock])?;
    let mut heard = Vec::new();
    for endpoint in target.endpoints.iter().take(ENDPOINTS_MAX) {
        let dialled = dialler.dial_one(endpoint).await.map(drop);
        let answer = dialled.map_err(|failure| match failure.why {
            DialFault::Untrusted => CallError::Untrusted(failure.text),
            DialFault::Clock => CallError::Clock(failure.text),
            DialFault::Away => CallError::Away(failure.text),
        });
        heard.push((endpoint.clone(), answer));
    }
    Ok(heard)
}
