//! Why a command did not do what was asked, and the exit code that says so.

use std::{io, process::ExitCode};

use raymtls_proto::reason::Reason;
use thiserror::Error;
use tonic::{Code, Status};

/// Wrong usage (sysexits.h).
pub(super) const EX_USAGE: u8 = 64;
/// Wrong configuration (sysexits.h).
const EX_CONFIG: u8 = 78;
const EX_FAILED: u8 = 1;
const EX_REFUSED: u8 = 2;

/// What went wrong.
#[derive(Debug, Error)]
pub(super) enum Failure {
    /// The CA said no, with a reason word.
    #[error("refused: {}: {message}", reason.as_str())]
    Refused {
        /// The word.
        reason: Reason,
        /// The CA's own sentence.
        message: String,
    },
    /// The call did not get an answer of the CA.
    #[error("{0}")]
    Failed(String),
    /// Asked for in a way that cannot be done.
    #[error("{0}")]
    Usage(String),
    /// The CA's configuration does not allow it.
    #[error("{0}")]
    Configuration(String),
    /// The answer could not be printed.
    #[error("cannot print the answer: {0}")]
    Output(#[from] io::Error),
}

impl Failure {
    pub(super) fn exit_code(&self) -> ExitCode {
        ExitCode::from(match self {
            Self::Refused { .. } => EX_REFUSED,
            Self::Failed(_) | Self::Output(_) => EX_FAILED,
            Self::Usage(_) => EX_USAGE,
            Self::Configuration(_) => EX_CONFIG,
        })
    }
}

impl From<Status> for Failure {
    fn from(status: Status) -> Self {
        let message = status.message().to_owned();
        match Reason::of(&status) {
            Some(reason) => Self::Refused { reason, message },
            None => Self::Failed(unexplained(status.code(), &message)),
        }
    }
}

/// A status that is no refusal: the transport's, or one of a newer CA.
#[allow(clippy::wildcard_enum_match_arm, reason = "tonic's enum, not ours")]
fn unexplained(code: Code, message: &str) -> String {
    let next = match code {
        Code::DeadlineExceeded | Code::Cancelled => {
            "; the CA did not answer in time: see its log, then try again"
        }
        Code::Unavailable => "; is ca-server still running? see its log",
        Code::Unimplemented => "; the CA is older than this program: upgrade it",
        _ => "",
    };
    format!("the call failed ({code:?}): {message}{next}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_word_is_a_refusal_and_exits_2() {
        let failure = Failure::from(Reason::NotFound.status("no node n9 in cluster c1", None));
        assert_eq!(failure.to_string(), "refused: NOT_FOUND: no node n9 in cluster c1");
        assert_eq!(failure.exit_code(), ExitCode::from(2));
    }

    #[test]
    fn a_status_without_one_is_a_failure_and_exits_1() {
        let failure = Failure::from(Status::unavailable("broken pipe"));
        assert!(failure.to_string().contains("broken pipe"), "{failure}");
        assert_eq!(failure.exit_code(), ExitCode::from(1));
    }
}
