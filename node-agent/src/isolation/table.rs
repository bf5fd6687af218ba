//! The table in the kernel: loads a ruleset, reads what it counted, closes sockets. It runs `nft` and
//! `ss` with a bounded time and an empty environment, and decides nothing.

use std::{collections::BTreeSet, net::IpAddr, process::Stdio, time::Duration};

use raymtls_proto::identity::ClusterId;
use serde::Deserialize;
use thiserror::Error;
use tokio::{io::AsyncWriteExt, process::Command};

use super::{Counters, table_name};

/// How long one run of `nft` or `ss` may take; 10,000 members take a tenth of a second.
const RUN_TIME_MAX: Duration = Duration::from_secs(10);
/// So much of what a failed program said goes into an error.
const EXCERPT_LEN_MAX: usize = 300;
/// Addresses in one filter of `ss`.
const CUT_CHUNK: usize = 64;
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Why the kernel's table is not what it should be.
#[derive(Debug, Error)]
pub enum TableError {
    /// Not installed.
    #[error("{0} is not installed: isolation needs the packages nftables and iproute2")]
    Missing(&'static str),
    /// It could not be started, or its pipes broke.
    #[error("{program}: {source}")]
    Io {
        /// Which program.
        program: &'static str,
        /// The system's words.
        source: std::io::Error,
    },
    /// It says no.
    #[error("{program} failed: {said}")]
    Failed {
        /// Which program.
        program: &'static str,
        /// The beginning of what it said.
        said: String,
    },
    /// No right to change the firewall.
    #[error("{0} may not change the firewall: the agent needs the capability NET_ADMIN")]
    NotPermitted(&'static str),
    /// It did not end in time.
    #[error("{0} did not end within {RUN_TIME_MAX:?} and was killed")]
    TooSlow(&'static str),
    /// It said something else than JSON of the known shape.
    #[error("nft said what this release does not understand: {0}")]
    Form(String),
}

/// Loads a ruleset in one transaction: all of it is in force afterwards, or nothing changed.
///
/// # Errors
/// See [`TableError`].
pub async fn load(ruleset: &str) -> Result<(), TableError> {
    run("nft", &["-f", "-"], ruleset.as_bytes()).await.map(drop)
}

/// What the cluster's table counted; `None` if there is no table.
///
/// # Errors
/// See [`TableError`].
pub async fn counters(cluster: &ClusterId) -> Result<Option<Counters>, TableError> {
    let table = table_name(cluster);
    let arguments = ["-j", "list", "counters", "table", "inet", &table];
    match run("nft", &arguments, b"").await {
        Ok(json) => parse_counters(&json).map(Some),
        Err(TableError::Failed { said, .. }) if said.contains("No such file") => Ok(None),
        Err(error) => Err(error),
    }
}

/// Closes this host's established TCP sockets with these addresses, whatever their ports: the table
/// stops the packets, this tells the programs at once. Returns how many were closed.
///
/// # Errors
/// See [`TableError`].
pub async fn cut(addresses: &BTreeSet<IpAddr>) -> Result<usize, TableError> {
    let addresses: Vec<String> = addresses.iter().map(|address| format!("dst {address}")).collect();
    let mut closed = 0;
    for chunk in addresses.chunks(CUT_CHUNK) {
        let said = run("ss", &["-HtKn", &chunk.join(" or ")], b"").await?;
        closed += said.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()).count();
    }
    Ok(closed)
}

pub(super) async fn run(
    program: &'static str,
    arguments: &[&str],
    input: &[u8],
) -> Result<Vec<u8>, TableError> {
    let io = |source: std::io::Error| {
        if source.kind() == std::io::ErrorKind::NotFound {
            TableError::Missing(program)
        } else {
            TableError::Io { program, source }
        }
    };
    let mut child = Command::new(program)
        .args(arguments)
        .env_clear()
        .env("PATH", PATH)
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(io)?;
    let mut stdin = child.stdin.take().expect("the child was given a pipe");
    let talk = async {
        // Both at once: a program that answers before it has read everything stops neither.
        let write = async {
            let written = stdin.write_all(input).await;
            drop(stdin);
            written
        };
        let (written, ended) = tokio::join!(write, child.wait_with_output());
        let ended = ended.map_err(io)?;
        if ended.status.success() {
            written.map_err(io)?;
            return Ok(ended.stdout);
        }
        let said = excerpt(&ended.stderr);
        if said.contains("Operation not permitted") {
            return Err(TableError::NotPermitted(program));
        }
        Err(TableError::Failed { program, said })
    };
    tokio::time::timeout(RUN_TIME_MAX, talk).await.map_err(|_| TableError::TooSlow(program))?
}

fn excerpt(said: &[u8]) -> String {
    let text = String::from_utf8_lossy(said);
    text.trim().chars().take(EXCERPT_LEN_MAX).collect()
}

fn parse_counters(json: &[u8]) -> Result<Counters, TableError> {
    let bad = |error: serde_json::Error| TableError::Form(error.to_string());
    let listing: Listing = serde_json::from_slice(json).map_err(bad)?;
    let packets = |name: &str| {
        let mut all = listing.nftables.iter().filter_map(|item| item.counter.as_ref());
        all.find(|counter| counter.name == name).map_or(0, |counter| counter.packets)
    };
    Ok(Counters { blocked: packets("blocked"), refused: packets("refused") })
}

/// What `nft -j list counters` says (libnftables-json(5)), as far as it matters here.
#[derive(Debug, Deserialize)]
struct Listing {
    nftables: Vec<Item>,
}

#[derive(Debug, Deserialize)]
struct Item {
    counter: Option<CounterItem>,
}

#[derive(Debug, Deserialize)]
struct CounterItem {
    name: String,
    packets: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_read_from_nft_s_json() {
        let json = br#"{"nftables": [{"metainfo": {"version": "1.0.6", "json_schema_version": 1}},
            {"counter": {"family": "inet", "name": "blocked", "table": "raymtls_c1", "handle": 1,
                         "packets": 7, "bytes": 420}},
            {"counter": {"family": "inet", "name": "refused", "table": "raymtls_c1", "handle": 2,
                         "packets": 12, "bytes": 0}}]}"#;
        let read = parse_counters(json).unwrap();
        assert_eq!(read, Counters { blocked: 7, refused: 12 });
        assert!(parse_counters(b"Error: syntax").is_err());
    }

    #[tokio::test]
    async fn a_program_that_is_not_there_is_named() {
        let error = run("no-such-program-of-ours", &[], b"").await.unwrap_err();
        assert!(error.to_string().contains("no-such-program-of-ours is not installed"), "{error}");
    }

    #[tokio::test]
    async fn what_a_program_said_is_in_the_error() {
        let error = run("sh", &["-c", "cat >/dev/null; echo no such rule >&2; exit 1"], b"x");
        let error = error.await.unwrap_err();
        assert!(error.to_string().contains("sh failed: no such rule"), "{error}");
    }
}
