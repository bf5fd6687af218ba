//! How a command ends when it does not succeed: a sentence for a person and one of the exit codes
//! scripts rely on.

use std::process::ExitCode;

use thiserror::Error;

/// A command that did not succeed.
#[derive(Debug, Error)]
pub enum Failure {
    /// It was tried and did not work.
    #[error("{0}")]
    Failed(String),
    /// The CA said no; trying again as it is will not help.
    #[error("{0}")]
    Refused(String),
    /// The command line is wrong.
    #[error("{0}")]
    Usage(String),
    /// The configuration, or what lies on the disk, is wrong.
    #[error("{0}")]
    Config(String),
}

impl Failure {
    /// The exit code of this failure.
    #[must_use]
    pub fn exit_code(&self) -> ExitCode {
        ExitCode::from(match self {
            Self::Failed(_) => 1,
            Self::Refused(_) => 2,
            Self::Usage(_) => 64,
            Self::Config(_) => 78,
        })
    }

    /// Anything that went wrong while the command ran.
    pub(crate) fn failed(error: impl std::fmt::Display) -> Self {
        Self::Failed(error.to_string())
    }

    /// Anything wrong with configuration or files.
    pub(crate) fn config(error: impl std::fmt::Display) -> Self {
        Self::Config(error.to_string())
    }
}
