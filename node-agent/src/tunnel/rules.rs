//! The rules of `ray-tunnel`: one JSON file, written whole by the agent and replaced by a rename.
//! It says who the members are, which ports are carried and where the key folder lies. It is parsed
//! into bounds here; nothing is decided.

use std::{
    collections::HashMap,
    io,
    net::IpAddr,
    path::{Path, PathBuf},
};

use raymtls_proto::identity::{ClusterId, NodeName, Role, TrustDomain};
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Version of the file.
pub const VERSION: u32 = 1;
/// Where the agent writes it.
pub const DEFAULT_PATH: &str = "/run/ray-mtls/tunnel/rules.json";
/// Largest file, in bytes.
pub const LEN_MAX: u64 = 16 * 1024 * 1024;
/// Most members.
pub const MEMBERS_MAX: usize = 20_000;
/// Most addresses of one member.
pub const ADDRESSES_MAX: usize = 64;
/// Most blocked addresses.
pub const BLOCKED_MAX: usize = 100_000;
/// Most ranges in a list of ports.
pub const RANGES_MAX: usize = 256;
/// Longest grace, in seconds: 90 days.
pub const GRACE_SECONDS_MAX: u64 = 90 * 24 * 3_600;
/// Grace of an expired leaf while the CA is away, in seconds, where nothing else is set: 72 hours.
pub const GRACE_SECONDS_DEFAULT: u64 = 72 * 3_600;

/// Why rules cannot be used.
#[derive(Debug, Error)]
pub enum RulesError {
    /// The file cannot be read.
    #[error("the rules {path} cannot be read: {error}")]
    Io {
        /// The file.
        path: String,
        /// What the system says.
        error: io::Error,
    },
    /// Not JSON, or not of this form.
    #[error("the rules {path}, line {line}, column {column}: {why}")]
    Form {
        /// The file.
        path: String,
        /// Line, from one.
        line: usize,
        /// Column, from one.
        column: usize,
        /// What is wrong there.
        why: String,
    },
    /// Of the form, but of no use.
    #[error("the rules {path}: {why}")]
    Content {
        /// The file.
        path: String,
        /// What is wrong, and the limit.
        why: String,
    },
}

/// The rules.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rules {
    /// [`VERSION`].
    pub version: u32,
    /// Rises with each write.
    pub generation: u64,
    /// The cluster.
    pub cluster: ClusterId,
    /// The deployment.
    pub trust_domain: TrustDomain,
    /// This node.
    pub node: NodeName,
    /// This node's addresses, as its leaf has them, without loopback. The first one is dialled
    /// from.
    pub addresses: Vec<IpAddr>,
    /// Absolute path of the folder with `tls.key`, `tls.crt`, `ca.crt`, `crl.pem`.
    pub key_folder: PathBuf,
    /// Live heads and workers; this node may be among them.
    pub members: Vec<Member>,
    /// No flow with these, whatever else is said.
    #[serde(default)]
    pub blocked: Vec<IpAddr>,
    /// Ports of members that may be dialled.
    pub outbound_ports: Vec<PortRange>,
    /// Ports of this node that members may reach.
    pub inbound_ports: Vec<PortRange>,
    /// How long an expired leaf still counts while the CA is away.
    #[serde(default = "grace_default")]
    pub grace_seconds: u64,
    /// Since when the CA cannot be reached; absent: it can.
    #[serde(default)]
    pub ca_away_since_unix: Option<i64>,
    /// When the CA was heard last.
    pub heard_unix: i64,
    /// When this file was written. The agent writes it anew at least each minute.
    pub written_unix: i64,
}

/// A node that flows may go to and come from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Member {
    /// Its name, as in its leaf.
    pub name: NodeName,
    /// Head or worker.
    pub role: Role,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
}

/// Ports from the first to the last, both included: `[min, max]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "[u16; 2]", into = "[u16; 2]")]
pub struct PortRange {
    min: u16,
    max: u16,
}

impl PortRange {
    /// `None` where it holds port 0 or nothing.
    #[must_use]
    pub fn new(min: u16, max: u16) -> Option<Self> {
        (min > 0 && min <= max).then_some(Self { min, max })
    }

    /// Whether the port is one of them.
    #[must_use]
    pub fn contains(self, port: u16) -> bool {
        (self.min..=self.max).contains(&port)
    }
}

impl TryFrom<[u16; 2]> for PortRange {
    type Error = String;

    fn try_from([min, max]: [u16; 2]) -> Result<Self, String> {
        Self::new(min, max).ok_or_else(|| format!("[{min}, {max}] is no range of ports"))
    }
}

impl From<PortRange> for [u16; 2] {
    fn from(range: PortRange) -> Self {
        [range.min, range.max]
    }
}

impl Rules {
    /// Reads and checks the file.
    ///
    /// # Errors
    /// See [`RulesError`].
    pub fn read(path: &Path) -> Result<Self, RulesError> {
        let io = |error| RulesError::Io { path: path.display().to_string(), error };
        let text = read_bounded(path, LEN_MAX).map_err(io)?;
        Self::parse(&text, path)
    }

    /// Parses and checks. `path` stands in the errors alone.
    ///
    /// # Errors
    /// See [`RulesError`].
    pub fn parse(text: &[u8], path: &Path) -> Result<Self, RulesError> {
        let path = path.display().to_string();
        let rules: Self = match serde_json::from_slice(text) {
            Ok(rules) => rules,
            Err(error) => return Err(form_error(path, &error)),
        };
        match rules.fault() {
            None => Ok(rules),
            Some(why) => Err(RulesError::Content { path, why }),
        }
    }

    /// As the file.
    #[must_use]
    pub fn to_text(&self) -> String {
        serde_json::to_string_pretty(self).expect("names, numbers and addresses serialise")
    }

    /// What makes them useless.
    #[must_use]
    pub fn fault(&self) -> Option<String> {
        if self.version != VERSION {
            return Some(format!("version {} is not known, {VERSION} is", self.version));
        }
        if !self.key_folder.is_absolute() {
            return Some(format!("key_folder {} is not absolute", self.key_folder.display()));
        }
        if self.addresses.is_empty() {
            return Some("addresses names none of this node".to_owned());
        }
        if let Some(address) = self.addresses.iter().find(|a| !is_of_a_host(**a)) {
            return Some(format!("addresses has {address}, which is no address of a node"));
        }
        if self.grace_seconds > GRACE_SECONDS_MAX {
            return Some(format!(
                "grace_seconds is {}, at most {GRACE_SECONDS_MAX} allowed",
                self.grace_seconds
            ));
        }
        for (what, len, max) in [
            ("addresses", self.addresses.len(), ADDRESSES_MAX),
            ("members", self.members.len(), MEMBERS_MAX),
            ("blocked", self.blocked.len(), BLOCKED_MAX),
            ("outbound_ports", self.outbound_ports.len(), RANGES_MAX),
            ("inbound_ports", self.inbound_ports.len(), RANGES_MAX),
        ] {
            if len > max {
                return Some(format!("{what} has {len} entries, at most {max} allowed"));
            }
        }
        self.members.iter().find_map(Member::fault)
    }
}

impl Member {
    fn fault(&self) -> Option<String> {
        let name = &self.name;
        if self.role == Role::Driver {
            return Some(format!("member {name} is a driver: no flow goes to or comes from one"));
        }
        let len = self.addresses.len();
        if len > ADDRESSES_MAX {
            return Some(format!(
                "member {name} has {len} addresses, at most {ADDRESSES_MAX} allowed"
            ));
        }
        let odd = self.addresses.iter().find(|a| !is_of_a_host(**a))?;
        Some(format!("member {name} has {odd}, which is no address of a node"))
    }
}

/// Loopback, unspecified, multicast and mapped addresses never name a node.
fn is_of_a_host(address: IpAddr) -> bool {
    let mapped = matches!(address, IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some());
    !(address.is_loopback() || address.is_unspecified() || address.is_multicast() || mapped)
}

fn grace_default() -> u64 {
    GRACE_SECONDS_DEFAULT
}

fn form_error(path: String, error: &serde_json::Error) -> RulesError {
    let why = error.to_string();
    // The line and column stand in front already.
    let why = why.rsplit_once(" at line ").map_or(why.as_str(), |(why, _)| why).to_owned();
    RulesError::Form { path, line: error.line(), column: error.column(), why }
}

/// The whole file, if it is no longer than the bound.
pub(super) fn read_bounded(path: &Path, len_max: u64) -> io::Result<Vec<u8>> {
    use std::io::Read;
    let mut text = Vec::new();
    std::fs::File::open(path)?.take(len_max + 1).read_to_end(&mut text)?;
    if u64::try_from(text.len()).unwrap_or(u64::MAX) > len_max {
        let why = format!("it is longer than {len_max} bytes");
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, why));
    }
    Ok(text)
}

/// Who is at which address. An address that two members claim belongs to neither.
#[derive(Debug, Default)]
pub struct AddressBook(HashMap<IpAddr, Option<NodeName>>);

impl AddressBook {
    /// Of these members.
    #[must_use]
    pub fn of(members: &[Member]) -> Self {
        let mut book: HashMap<IpAddr, Option<NodeName>> = HashMap::new();
        for member in members {
            for address in &member.addresses {
                book.entry(*address)
                    .and_modify(|held| {
                        if held.as_ref() != Some(&member.name) {
                            *held = None;
                        }
                    })
                    .or_insert_with(|| Some(member.name.clone()));
            }
        }
        Self(book)
    }

    /// The member at this address.
    #[must_use]
    pub fn at(&self, address: IpAddr) -> Option<&NodeName> {
        self.0.get(&address)?.as_ref()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn sample() -> Rules {
        Rules {
            version: VERSION,
            generation: 1,
            cluster: "c1".parse().unwrap(),
            trust_domain: "ray.example".parse().unwrap(),
            node: "head".parse().unwrap(),
            addresses: vec!["192.0.2.1".parse().unwrap()],
            key_folder: "/var/lib/ray-mtls/tls/k1".into(),
            members: vec![
                member("head", &["192.0.2.1"]),
                member("w1", &["192.0.2.2", "2001:db8::2"]),
            ],
            blocked: Vec::new(),
            outbound_ports: vec![PortRange::new(6379, 6379).unwrap()],
            inbound_ports: vec![PortRange::new(10_002, 19_999).unwrap()],
            grace_seconds: GRACE_SECONDS_DEFAULT,
            ca_away_since_unix: None,
            heard_unix: 1_790_000_000,
            written_unix: 1_790_000_000,
        }
    }

    pub(crate) fn member(name: &str, addresses: &[&str]) -> Member {
        Member {
            name: name.parse().unwrap(),
            role: Role::Worker,
            addresses: addresses.iter().map(|a| a.parse().unwrap()).collect(),
        }
    }

    fn error_of(text: &str) -> String {
        Rules::parse(text.as_bytes(), Path::new("rules.json")).unwrap_err().to_string()
    }

    #[test]
    fn rules_come_back_as_they_were_written() {
        let rules = sample();
        let text = rules.to_text();
        assert_eq!(Rules::parse(text.as_bytes(), Path::new("rules.json")).unwrap(), rules);
    }

    #[test]
    fn an_error_names_file_line_and_column() {
        let text = sample().to_text().replace("\"generation\": 1", "\"generation\": one");
        assert_eq!(error_of(&text), "the rules rules.json, line 3, column 17: expected value");
        let text = sample().to_text().replace("\"generation\"", "\"generations\"");
        assert!(error_of(&text).contains("line 3"), "{}", error_of(&text));
    }

    #[test]
    fn what_is_out_of_bounds_is_named() {
        let cases: [(fn(&mut Rules), &str); 9] = [
            (|r| r.version = 2, "version 2 is not known"),
            (|r| r.key_folder = "k1".into(), "is not absolute"),
            (|r| r.addresses.clear(), "names none of this node"),
            (|r| r.addresses[0] = "127.0.0.1".parse().unwrap(), "no address of a node"),
            (|r| r.addresses = vec!["192.0.2.1".parse().unwrap(); 65], "at most 64"),
            (|r| r.grace_seconds = u64::MAX, "at most 7776000"),
            (|r| r.members[0].role = Role::Driver, "is a driver"),
            (|r| r.members[1].addresses[0] = "::1".parse().unwrap(), "no address of a node"),
            (|r| r.members[1].addresses[0] = "::ffff:1.2.3.4".parse().unwrap(), "no address"),
        ];
        for (bend, words) in cases {
            let mut rules = sample();
            bend(&mut rules);
            let error = error_of(&rules.to_text());
            assert!(error.contains(words), "{error}");
        }
        assert!(error_of(&sample().to_text().replace("6379", "0")).contains("no range of ports"));
    }

    #[test]
    fn an_address_two_members_claim_is_nobodys() {
        let members = [member("a", &["192.0.2.1", "192.0.2.2"]), member("b", &["192.0.2.2"])];
        let book = AddressBook::of(&members);
        assert_eq!(book.at("192.0.2.1".parse().unwrap()).unwrap().as_str(), "a");
        assert_eq!(book.at("192.0.2.2".parse().unwrap()), None);
        assert_eq!(book.at("192.0.2.3".parse().unwrap()), None);
    }
}
