//! `node-agent doctor`: what is wrong on this host between the agent, its files, Ray and the CA, each
//! with the next step. [`gather`] looks, with all the I/O there is; [`judge`] decides from what was
//! seen, purely; [`print`] tells; [`fix`] puts right what is safe to. [`explain`] answers for one port
//! why two hosts do not come together.

pub(crate) mod command;
mod explain;
mod facts;
mod files;
mod fix;
mod gather;
mod judge;
mod own;
mod print;
mod processes;

#[cfg(test)]
pub(crate) use tests::examine;

use serde::Serialize;

/// How bad it is. In order: the worst of several is the largest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Level {
    /// As it should be.
    Ok,
    /// It could not be seen; the text says what is missing for that.
    Unknown,
    /// It works, and is not as it should be.
    Warn,
    /// It does not work, or soon will not.
    Fail,
}

impl Level {
    fn word(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Unknown => "unknown",
            Self::Warn => "WARN",
            Self::Fail => "FAIL",
        }
    }
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Finding {
    /// What was checked, one word for scripts.
    pub(crate) check: &'static str,
    pub(crate) level: Level,
    pub(crate) what: String,
    /// What to do; absent where there is nothing to do.
    pub(crate) next: Option<String>,
}

impl Finding {
    fn ok(check: &'static str, what: impl Into<String>) -> Self {
        Self { check, level: Level::Ok, what: what.into(), next: None }
    }

    fn new(
        check: &'static str,
        level: Level,
        what: impl Into<String>,
        next: impl Into<String>,
    ) -> Self {
        Self { check, level, what: what.into(), next: Some(next.into()) }
    }

    fn unknown(check: &'static str, why: impl Into<String>, next: impl Into<String>) -> Self {
        Self::new(check, Level::Unknown, why, next)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use raymtls_proto::clock::Clock;

    use super::{Finding, gather, judge};
    use crate::config::Config;

    /// One look at the host of a story.
    pub(crate) async fn examine(config: &Config, clock: Arc<dyn Clock>) -> Vec<Finding> {
        let places = gather::Places { config_file: "/none".into(), proc: "/proc".into() };
        judge::judge(&gather::gather(config, &places, clock).await, config)
    }
}
