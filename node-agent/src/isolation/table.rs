//! The table in the kernel: loads a ruleset, looks at what is there, closes sockets. It runs `nft`, `ss`
//! and `ip` with a bounded time and an empty environment, and decides nothing.

use std::{
    collections::BTreeSet, net::IpAddr, ops::RangeInclusive, process::Stdio, time::Duration,
};

use raymtls_proto::identity::ClusterId;
use serde::Deserialize;
use thiserror::Error;
use tokio::{io::AsyncWriteExt, process::Command};

use super::{
    Counters, Mark,
    capture::{STRANGERS, UNCAPTURED},
    ruleset::MARK,
    table_name,
};

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
    #[error("{0} did not end within {1:?} and was killed")]
    TooSlow(&'static str, Duration),
    /// It said something else than JSON of the known shape.
    #[error("nft said what this release does not understand: {0}")]
    Form(String),
}

/// A table as it is in the kernel, without what its sets hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// What it counted.
    pub counters: Counters,
    /// Which load it is of; absent where no agent loaded it.
    pub mark: Option<Mark>,
    /// How many rules it has.
    pub rules: usize,
}

/// The kernel's packet filter and sockets, reached by `nft` and `ss`.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// Where the two programs are looked for: folders, with colons between them.
    pub program_path: String,
    /// How long one run of them may take, and all runs that close sockets.
    pub time_max: Duration,
}

impl Default for Kernel {
    fn default() -> Self {
        Self { program_path: PATH.to_owned(), time_max: RUN_TIME_MAX }
    }
}

impl Kernel {
    /// Loads a ruleset in one transaction: all of it is in force afterwards, or nothing changed.
    ///
    /// # Errors
    /// See [`TableError`].
    pub async fn load(&self, ruleset: &str) -> Result<(), TableError> {
        self.run("nft", &["-f", "-"], ruleset.as_bytes()).await.map(drop)
    }

    /// The cluster's table as it is; `None` if there is no table.
    ///
    /// # Errors
    /// See [`TableError`].
    pub async fn look(&self, cluster: &ClusterId) -> Result<Option<Seen>, TableError> {
        let table = table_name(cluster);
        // Terse: without the sets' elements, which may be many.
        let arguments = ["-j", "-t", "list", "table", "inet", &table];
        match self.run("nft", &arguments, b"").await {
            Ok(json) => parse_table(&json),
            Err(TableError::Failed { said, .. }) if said.contains("No such file") => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Closes this host's established TCP sockets with these addresses on these ports, at either end;
    /// without ports, all of them. The table stops the packets, this tells the programs at once.
    /// Returns how many were closed.
    ///
    /// # Errors
    /// See [`TableError`].
    pub async fn cut(
        &self,
        addresses: &BTreeSet<IpAddr>,
        ports: Option<&[RangeInclusive<u16>]>,
    ) -> Result<usize, TableError> {
        if ports.is_some_and(<[_]>::is_empty) {
            return Ok(0);
        }
        let addresses: Vec<&IpAddr> = addresses.iter().collect();
        let cutting = self.cut_all(&addresses, ports);
        let late = |_| TableError::TooSlow("ss", self.time_max);
        tokio::time::timeout(self.time_max, cutting).await.map_err(late)?
    }

    async fn cut_all(
        &self,
        addresses: &[&IpAddr],
        ports: Option<&[RangeInclusive<u16>]>,
    ) -> Result<usize, TableError> {
        let mut closed = 0;
        for chunk in addresses.chunks(CUT_CHUNK) {
            let said = self.run("ss", &["-HtKn", &filter(chunk, ports)], b"").await?;
            closed += said.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()).count();
        }
        Ok(closed)
    }

    pub(super) async fn run(
        &self,
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
            .env("PATH", &self.program_path)
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
        tokio::time::timeout(self.time_max, talk)
            .await
            .map_err(|_| TableError::TooSlow(program, self.time_max))?
    }
}

/// A filter of ss(8): the address at the other end, and a port at either end. Without brackets it takes the end
/// of an IPv6 address for a port.
fn filter(addresses: &[&IpAddr], ports: Option<&[RangeInclusive<u16>]>) -> String {
    let host = |address: &&IpAddr| match address {
        IpAddr::V4(address) => format!("dst {address}"),
        IpAddr::V6(address) => format!("dst [{address}]"),
    };
    let hosts: Vec<String> = addresses.iter().map(host).collect();
    let hosts = hosts.join(" or ");
    let Some(ports) = ports else { return hosts };
    let either_end = |range: &RangeInclusive<u16>| {
        let (first, last) = (range.start(), range.end());
        ["sport", "dport"].map(|end| {
            if first == last {
                format!("{end} = :{first}")
            } else {
                format!("( {end} >= :{first} and {end} <= :{last} )")
            }
        })
    };
    let ports: Vec<String> = ports.iter().flat_map(either_end).collect();
    format!("( {hosts} ) and ( {} )", ports.join(" or "))
}

fn excerpt(said: &[u8]) -> String {
    let text = String::from_utf8_lossy(said);
    text.trim().chars().take(EXCERPT_LEN_MAX).collect()
}

/// `None` where the listing names nothing of ours: some releases of nft say nothing of a missing table.
fn parse_table(json: &[u8]) -> Result<Option<Seen>, TableError> {
    let bad = |error: serde_json::Error| TableError::Form(error.to_string());
    let listing: Listing = serde_json::from_slice(json).map_err(bad)?;
    let counters = || listing.nftables.iter().filter_map(|item| item.counter.as_ref());
    let packets = |name: &str| {
        counters().find(|counter| counter.name == name).map_or(0, |counter| counter.packets)
    };
    let mark = |counter: &CounterItem| {
        u64::from_str_radix(counter.name.strip_prefix(MARK)?, 16).ok().map(Mark)
    };
    let rules = listing.nftables.iter().filter(|item| item.rule.is_some()).count();
    let is_table = rules > 0 || counters().next().is_some();
    Ok(is_table.then(|| Seen {
        counters: Counters {
            blocked: packets("blocked"),
            refused: packets("refused"),
            strangers: packets(STRANGERS),
            uncaptured: packets(UNCAPTURED),
        },
        mark: counters().find_map(mark),
        rules,
    }))
}

/// What `nft -j list table` says (libnftables-json(5)), as far as it matters here.
#[derive(Debug, Deserialize)]
struct Listing {
    nftables: Vec<Item>,
}

#[derive(Debug, Deserialize)]
struct Item {
    counter: Option<CounterItem>,
    rule: Option<serde::de::IgnoredAny>,
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
    fn a_table_is_read_from_nft_s_json() {
        let json = br#"{"nftables": [{"metainfo": {"version": "1.0.6", "json_schema_version": 1}},
            {"counter": {"family": "inet", "name": "blocked", "table": "raymtls_c1", "handle": 1,
                         "packets": 7, "bytes": 420}},
            {"counter": {"family": "inet", "name": "refused", "table": "raymtls_c1", "handle": 2,
                         "packets": 12, "bytes": 0}},
            {"counter": {"family": "inet", "name": "load_00000000000000ff", "table": "raymtls_c1",
                         "handle": 3, "packets": 0, "bytes": 0}},
            {"set": {"family": "inet", "name": "ca4", "table": "raymtls_c1", "handle": 5}},
            {"rule": {"chain": "judge", "handle": 8, "expr": [{"accept": null}]}},
            {"rule": {"chain": "judge", "handle": 9, "expr": [{"accept": null}]}}]}"#;
        let read = parse_table(json).unwrap();
        let counters = Counters { blocked: 7, refused: 12, ..Counters::default() };
        assert_eq!(read, Some(Seen { counters, mark: Some(Mark(255)), rules: 2 }));
        let none = br#"{"nftables": [{"metainfo": {"version": "1.0.6"}}]}"#;
        assert_eq!(parse_table(none).unwrap(), None);
        assert!(parse_table(b"Error: syntax").is_err());
    }

    #[tokio::test]
    async fn a_program_that_is_not_there_is_named() {
        let kernel = Kernel::default();
        let error = kernel.run("no-such-program-of-ours", &[], b"").await.unwrap_err();
        assert!(error.to_string().contains("no-such-program-of-ours is not installed"), "{error}");
    }

    #[tokio::test]
    async fn what_a_program_said_is_in_the_error() {
        let kernel = Kernel::default();
        let said = ["-c", "cat >/dev/null; echo no such rule >&2; exit 1"];
        let error = kernel.run("sh", &said, b"x").await.unwrap_err();
        assert!(error.to_string().contains("sh failed: no such rule"), "{error}");
    }

    #[tokio::test]
    async fn a_program_that_does_not_end_is_killed() {
        let kernel = Kernel { time_max: Duration::from_millis(100), ..Kernel::default() };
        let error = kernel.run("sleep", &["60"], b"").await.unwrap_err();
        assert!(error.to_string().contains("sleep did not end within 100ms"), "{error}");
    }

    #[test]
    fn only_the_cluster_s_ports_are_cut_unless_all_are() {
        let addresses: [IpAddr; 2] = ["10.0.0.9".parse().unwrap(), "fd00::9".parse().unwrap()];
        let addresses: Vec<&IpAddr> = addresses.iter().collect();
        let hosts = "dst 10.0.0.9 or dst [fd00::9]";
        assert_eq!(filter(&addresses, None), hosts);
        assert_eq!(
            filter(&addresses, Some(&[6_379..=6_379, 10_002..=10_101])),
            format!(
                "( {hosts} ) and ( sport = :6379 or dport = :6379 or \
                 ( sport >= :10002 and sport <= :10101 ) or \
                 ( dport >= :10002 and dport <= :10101 ) )"
            )
        );
    }
}
