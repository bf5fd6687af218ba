//! What Ray is asked: nodes, drivers and actors, a drain, a task. By Ray's own Python, as Ray's user and in the
//! place of its raylet, since only Ray speaks its protocol; the script is `ray.py`. Whatever Ray's user answers
//! is a claim: bounded, parsed strictly, shown printable.

use std::{
    ffi::OsString,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    process::Stdio,
    time::Duration,
};

use serde::{Deserialize, de::DeserializeOwned};
use thiserror::Error;
use tokio::{io::AsyncReadExt, time::timeout};

use super::{
    find::Found,
    launch::{LaunchError, Process, Ready, Request, Written, environment},
};
use crate::{rayenv::RayEnv, served::kind::printable};

const SCRIPT: &str = include_str!("ray.py");
/// Longest answer, in bytes.
const ANSWER_LEN_MAX: u64 = 4 * 1024 * 1024;
/// So much of what it complained about is shown, in bytes.
const COMPLAINT_LEN_MAX: u64 = 600;
/// Longest text of Ray that is shown, in characters.
const SHOWN_MAX: usize = 60;
/// How long each may take.
const SURVEY_TIME_MAX: Duration = Duration::from_secs(45);
const DRAIN_TIME_MAX: Duration = Duration::from_secs(30);
const TASK_TIME_MAX: Duration = Duration::from_secs(90);
/// Nodes on which a task is tried in one go.
pub(super) const TASK_NODES_MAX: usize = 64;

/// Why Ray did not say.
#[derive(Debug, Error)]
pub(super) enum AskError {
    #[error("Ray's Python {} is no absolute path", printable(&.0.to_string_lossy()))]
    Python(PathBuf),
    #[error(transparent)]
    Launch(#[from] LaunchError),
    #[error("{what} did not end within {} s", .most.as_secs())]
    Late { what: &'static str, most: Duration },
    #[error("{what}: {why}")]
    Failed { what: &'static str, why: String },
}

/// A node of the cluster, as Ray has it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub(super) struct Node {
    pub(super) id: String,
    pub(super) ip: String,
    pub(super) port: u16,
}

impl Node {
    /// Where its raylet listens.
    pub(super) fn address(&self) -> Option<SocketAddr> {
        address(&self.ip, self.port)
    }
}

/// A driver of the cluster, as Ray has it: whoever reads of it gets its names from here.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub(super) struct Driver {
    /// Number of its job, hexadecimal digits.
    pub(super) job: String,
    /// Id it was submitted under, if it was.
    #[serde(default)]
    pub(super) submission: String,
    /// Name its owner gave the job, if any.
    #[serde(default)]
    pub(super) job_name: String,
    pub(super) entrypoint: String,
    pub(super) ip: String,
    pub(super) port: u16,
    /// On its own host.
    pub(super) pid: u32,
    /// The node it runs on.
    pub(super) node: String,
}

impl Driver {
    /// Where it listens.
    pub(super) fn address(&self) -> Option<SocketAddr> {
        address(&self.ip, self.port)
    }

    /// Who it is, for a person.
    pub(super) fn name(&self) -> String {
        let (ip, command) = (shown(&self.ip), shown(&self.entrypoint));
        let called = [("submission ", &self.submission), ("name ", &self.job_name)];
        let called: String = called
            .iter()
            .filter(|(_, text)| !text.is_empty())
            .map(|(what, text)| format!(", {what}{}", shown(text)))
            .collect();
        format!("driver pid {} on {ip} (job {}{called}, `{command}`)", self.pid, shown(&self.job))
    }
}

/// An actor that would be lost with its node.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub(super) struct Actor {
    pub(super) class: String,
    pub(super) name: String,
    pub(super) job: String,
    pub(super) node: String,
    pub(super) restarts: i64,
}

impl Actor {
    pub(super) fn shown(&self) -> String {
        let name =
            if self.name.is_empty() { String::new() } else { format!(" {}", shown(&self.name)) };
        format!("{}{name} (job {})", shown(&self.class), shown(&self.job))
    }
}

/// What the control store knows.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub(super) struct Survey {
    pub(super) nodes: Vec<Node>,
    pub(super) drivers: Vec<Driver>,
    pub(super) actors: Vec<Actor>,
}

#[derive(Deserialize)]
struct Drained {
    accepted: bool,
    why: String,
}

/// Where a task ran, or why it did not.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub(super) struct Ran {
    pub(super) node: String,
    pub(super) error: String,
}

/// Asks Ray, beside the raylet of this node.
pub(super) struct Asker<'a> {
    pub(super) found: &'a Found,
    pub(super) uid: u32,
    pub(super) files: RayEnv,
}

impl Asker<'_> {
    pub(super) async fn survey(&self) -> Result<Survey, AskError> {
        self.ask("the question for nodes, drivers and actors", &["survey"], SURVEY_TIME_MAX).await
    }

    /// No new work for this node from now on.
    pub(super) async fn drain(&self, most: Duration) -> Result<(), AskError> {
        let (what, seconds) = ("the drain", most.as_secs().to_string());
        let words = ["drain", &self.found.node_id, &seconds];
        let drained: Drained = self.ask(what, &words, DRAIN_TIME_MAX).await?;
        if drained.accepted {
            return Ok(());
        }
        Err(AskError::Failed { what, why: format!("refused by Ray: {}", shown(&drained.why)) })
    }

    /// A task that only this one can run, for each of these nodes.
    pub(super) async fn tasks(&self, nodes: &[String]) -> Result<Vec<Ran>, AskError> {
        let nodes = nodes.iter().take(TASK_NODES_MAX).map(String::as_str);
        let words: Vec<&str> = ["task"].into_iter().chain(nodes).collect();
        self.ask("the task", &words, TASK_TIME_MAX).await
    }

    async fn ask<T: DeserializeOwned>(
        &self,
        what: &'static str,
        words: &[&str],
        most: Duration,
    ) -> Result<T, AskError> {
        let mut complaint = Written::new().map_err(LaunchError::from)?;
        let err = complaint.stdio().map_err(LaunchError::from)?;
        let ready = Ready::prepare(&self.request(words)?, Stdio::piped(), err).await?;
        let mut child = ready.go().await?.become_program().await?;
        let mut answer = Vec::new();
        let out = child.stdout.take().expect("its output was asked for");
        let read = async {
            out.take(ANSWER_LEN_MAX).read_to_end(&mut answer).await?;
            child.wait().await
        };
        let status = match timeout(most, read).await {
            Ok(ended) => ended.map_err(LaunchError::from)?,
            Err(_) => {
                let _ = child.kill().await;
                return Err(AskError::Late { what, most });
            }
        };
        let last = answer.rsplit(|b| *b == b'\n').find(|line| !line.is_empty()).unwrap_or_default();
        if status.success()
            && let Ok(answer) = serde_json::from_slice(last)
        {
            return Ok(answer);
        }
        let said = complaint.tail(COMPLAINT_LEN_MAX);
        let said = said.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default();
        let why = if said.is_empty() {
            format!("its Python ended with {status}")
        } else {
            printable(said)
        };
        Err(AskError::Failed { what, why })
    }

    fn request(&self, words: &[&str]) -> Result<Request, AskError> {
        let Found { raylet, python, gcs_address, .. } = self.found;
        if !python.is_absolute() {
            return Err(AskError::Python(python.clone()));
        }
        let (act, rest) = words.split_first().expect("each question has a word");
        let fixed = [python.as_os_str().to_owned(), "-".into(), (*act).into(), gcs_address.into()];
        Ok(Request {
            like: Process { pid: raylet.pid, started: raylet.started },
            uid: self.uid,
            in_its_place: false,
            program: python.into(),
            words: fixed.into_iter().chain(rest.iter().map(OsString::from)).collect(),
            variables: environment(&raylet.variables, &self.files),
            files: self.files.clone(),
            input: SCRIPT.to_owned(),
        })
    }
}

/// Short and printable: a task or its owner chose it.
fn shown(text: &str) -> String {
    printable(&text.chars().take(SHOWN_MAX).collect::<String>())
}

fn address(ip: &str, port: u16) -> Option<SocketAddr> {
    let ip: IpAddr = ip.parse().ok()?;
    (port != 0).then(|| SocketAddr::new(ip, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_driver_is_named_by_what_ray_knows_and_cannot_write_on_the_terminal() {
        let driver = Driver {
            job: "01000000".to_owned(),
            submission: "raysubmit_1".to_owned(),
            entrypoint: format!("python \x1b[2J{}", "x".repeat(500)),
            ip: "10.0.0.1".to_owned(),
            pid: 513,
            ..Driver::default()
        };
        let name = driver.name();
        assert!(
            name.starts_with(
                "driver pid 513 on 10.0.0.1 (job 01000000, submission raysubmit_1, `python \\u{1b}"
            ),
            "{name}"
        );
        assert!(name.len() < 400 && !name.chars().any(char::is_control));
    }

    #[test]
    fn an_address_that_cannot_be_dialled_is_none() {
        for (ip, port, good) in [
            ("10.0.0.1", 7, true),
            ("fd00::1", 7, true),
            ("10.0.0.1", 0, false),
            ("head", 7, false),
        ] {
            assert_eq!(address(ip, port).is_some(), good, "{ip} {port}");
        }
    }
}
