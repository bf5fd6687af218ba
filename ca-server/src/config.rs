//! The server's configuration: a TOML file with unknown keys refused, and a default for each key.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
};

use raymtls_proto::join::is_endpoint;
use serde::Deserialize;
use thiserror::Error;

use crate::{
    ca::Endpoints,
    jwt::{Rule, Workloads},
    limits::Limits,
    proxy_protocol::TrustedProxies,
    trusted_file::{self, FileFault},
};

/// Longest configuration file, in bytes.
const FILE_LEN_MAX: usize = 64 * 1_024;
/// Endpoints of one kind, at most.
const ENDPOINTS_MAX: usize = 16;

/// How logs are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For a person.
    #[default]
    Human,
    /// For a machine: one event, one line.
    Json,
}

/// Everything that can be configured.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Key-encryption key.
    pub kek_file: PathBuf,
    /// Where machines enrol: server-authenticated TLS.
    pub enrollment_listen: SocketAddr,
    /// Where enrolled nodes call: mutual TLS.
    pub node_listen: SocketAddr,
    /// Metrics and probes, in the clear: keep it on loopback.
    pub http_listen: SocketAddr,
    /// CRLs over plain HTTP, for proxies; none by default.
    pub crl_listen: Option<SocketAddr>,
    /// The operator's socket.
    pub admin_socket: PathBuf,
    /// Group that may use the operator's socket in the role of operator.
    pub operator_group: Option<String>,
    /// `host:port` of the enrolment listener as nodes reach it; goes into join files.
    pub enrollment_endpoints: Vec<String>,
    /// `host:port` of the node listener as nodes reach it; goes into join files.
    pub node_endpoints: Vec<String>,
    /// Addresses of balancers before the listeners, which must speak the PROXY protocol, version 2.
    pub trusted_proxies: Vec<String>,
    /// Whose signed JWTs enrol what.
    pub jwt: Vec<Rule>,
    /// How much may be asked.
    pub limits: Limits,
    /// How logs are written.
    pub log_format: LogFormat,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            kek_file: PathBuf::from("/etc/ray-mtls/kek"),
            enrollment_listen: SocketAddr::from(([0, 0, 0, 0], 7443)),
            node_listen: SocketAddr::from(([0, 0, 0, 0], 7444)),
            http_listen: SocketAddr::from(([127, 0, 0, 1], 7446)),
            crl_listen: None,
            admin_socket: PathBuf::from("/run/ray-mtls/ca-admin.sock"),
            operator_group: None,
            enrollment_endpoints: Vec::new(),
            node_endpoints: Vec::new(),
            trusted_proxies: Vec::new(),
            jwt: Vec::new(),
            limits: Limits::default(),
            log_format: LogFormat::Human,
        }
    }
}

/// A configuration of no use.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// Cannot be read, or is not to be believed.
    #[error("configuration {path}: {fault}")]
    Fault {
        /// Its path.
        path: PathBuf,
        /// What is wrong with it.
        fault: FileFault,
    },
    /// Others may write it.
    #[error(
        "configuration {path} may be written by others (mode {mode:04o}): \
         run `chmod go-w` on it"
    )]
    Exposed {
        /// Its path.
        path: PathBuf,
        /// Permission bits.
        mode: u32,
    },
    /// Does not parse.
    #[error("configuration {path}: {message}")]
    Parse {
        /// Its path.
        path: PathBuf,
        /// The parser's words, with line and column.
        message: String,
    },
    /// Parses and cannot hold.
    #[error("configuration: {0}")]
    Invalid(String),
}

impl Config {
    /// Reads a configuration file; without one, the defaults.
    ///
    /// # Errors
    /// See [`ConfigError`].
    pub fn load(path: Option<&Path>) -> Result<Self, ConfigError> {
        match path {
            None => Ok(Self::default()),
            Some(path) => Self::parse(&read(path)?, path),
        }
    }

    /// Parses the text of a configuration file; its path is for the error.
    ///
    /// # Errors
    /// See [`ConfigError`].
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let config: Self = toml::from_str(text).map_err(|error| ConfigError::Parse {
            path: path.to_owned(),
            message: error.to_string().trim_end().to_owned(),
        })?;
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<(), ConfigError> {
        let invalid = |text: String| Err(ConfigError::Invalid(text));
        for (key, endpoints) in [
            ("enrollment_endpoints", &self.enrollment_endpoints),
            ("node_endpoints", &self.node_endpoints),
        ] {
            if endpoints.len() > ENDPOINTS_MAX {
                return invalid(format!("{key}: at most {ENDPOINTS_MAX}"));
            }
            if let Some(bad) = endpoints.iter().find(|endpoint| !is_endpoint(endpoint)) {
                return invalid(format!("{key}: {bad:?} is not of the form host:port"));
            }
        }
        if let Err(error) = TrustedProxies::parse(&self.trusted_proxies) {
            return invalid(format!("trusted_proxies: {error}"));
        }
        if let Err(error) = Workloads::parse(&self.jwt) {
            return invalid(error.to_string());
        }
        if let Err(error) = self.limits.check() {
            return invalid(error);
        }
        if !self.http_listen.ip().is_loopback() {
            return invalid(format!(
                "http_listen {} is not a loopback address: it speaks plain HTTP to anyone; put a \
                 proxy before it to scrape from elsewhere",
                self.http_listen
            ));
        }
        Ok(())
    }

    /// What is likely a slip, though it can hold behind a balancer that changes ports.
    #[must_use]
    pub fn doubts(&self) -> Vec<String> {
        let (enrollment, nodes) = (self.enrollment_listen.port(), self.node_listen.port());
        if enrollment == nodes {
            return Vec::new();
        }
        let swapped = |key: &str, endpoints: &[String], other: u16, whose: &str| {
            let odd = endpoints.iter().filter(|endpoint| port(endpoint) == Some(other));
            odd.map(|endpoint| {
                format!("{key}: {endpoint} has the port of {whose}: are the two swapped?")
            })
            .collect::<Vec<_>>()
        };
        let endpoints = &self.enrollment_endpoints;
        let mut doubts = swapped("enrollment_endpoints", endpoints, nodes, "node_listen");
        let endpoints = &self.node_endpoints;
        doubts.extend(swapped("node_endpoints", endpoints, enrollment, "enrollment_listen"));
        doubts
    }

    /// Where agents find the server: as configured, else the machine's own name and the ports
    /// listened on.
    #[must_use]
    pub fn endpoints(&self) -> Endpoints {
        let hostname = rustix::system::uname().nodename().to_string_lossy().into_owned();
        let or_own = |configured: &[String], listen: SocketAddr| {
            if !configured.is_empty() {
                configured.to_vec()
            } else if listen.ip().is_unspecified() {
                vec![format!("{hostname}:{}", listen.port())]
            } else {
                vec![listen.to_string()]
            }
        };
        Endpoints {
            enrollment: or_own(&self.enrollment_endpoints, self.enrollment_listen),
            nodes: or_own(&self.node_endpoints, self.node_listen),
        }
    }
}

/// The port of an endpoint; its form was checked.
fn port(endpoint: &str) -> Option<u16> {
    endpoint.rsplit_once(':')?.1.parse().ok()
}

fn read(path: &Path) -> Result<String, ConfigError> {
    let text = trusted_file::read(path, 0o022, FILE_LEN_MAX);
    text.map(|text| text.to_string()).map_err(|fault| match fault {
        FileFault::Exposed(mode) => ConfigError::Exposed { path: path.to_owned(), mode },
        FileFault::System(_) | FileFault::Owner(_) | FileFault::TooLong(_) | FileFault::NotText => {
            ConfigError::Fault { path: path.to_owned(), fault }
        }
    })
}

#[cfg(test)]
mod tests {
    use raymtls_proto::durable::{self, Access};

    use super::*;

    fn parse(text: &str) -> Result<Config, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ca.toml");
        durable::replace(&path, text.as_bytes(), Access::PRIVATE).unwrap();
        Config::load(Some(&path)).map_err(|e| e.to_string())
    }

    #[test]
    fn a_wrong_configuration_is_named() {
        assert!(parse("kek_files = \"x\"").unwrap_err().contains("kek_files"));
        assert!(parse("node_listen = \"7444\"").is_err());
        assert!(parse("http_listen = \"0.0.0.0:7446\"").unwrap_err().contains("loopback"));
        assert!(parse("node_endpoints = [\"ca\"]").unwrap_err().contains("host:port"));
        // Else nobody could read the join files this server makes.
        assert!(parse("node_endpoints = [\"[x]:7444\"]").unwrap_err().contains("host:port"));
        assert!(parse("log_format = \"xml\"").is_err());
        assert!(
            parse("trusted_proxies = [\"0.0.0.0/0\"]").unwrap_err().contains("trusted_proxies")
        );
        let zero = parse("[limits]\nenrollments_burst = 0").unwrap_err();
        assert!(zero.contains("limits.enrollments_burst = 0"), "{zero}");
        assert!(parse("[limits]\nenrollments_burst = -1").is_err());
        assert!(parse("[limits]\nenrolments = 5").unwrap_err().contains("enrolments"));
        assert_eq!(parse("").unwrap(), Config::default());
    }

    #[test]
    fn swapped_ports_are_doubted() {
        let doubts = |text: &str| parse(text).unwrap().doubts();
        let swapped =
            doubts("enrollment_endpoints = [\"ca:7444\"]\nnode_endpoints = [\"[fd00::1]:7443\"]");
        assert!(
            swapped[0].starts_with("enrollment_endpoints: ca:7444 has the port of node_listen")
        );
        assert!(swapped[1].starts_with("node_endpoints: [fd00::1]:7443"), "{swapped:?}");
        let right = "enrollment_endpoints = [\"ca:7443\"]\nnode_endpoints = [\"ca:7444\"]";
        assert!(doubts(right).is_empty() && doubts("").is_empty());
        assert!(doubts("enrollment_endpoints = [\"ca:443\"]").is_empty(), "a balancer's port");
    }

    #[test]
    fn a_configuration_others_can_write_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ca.toml");
        durable::replace(&path, b"", Access { mode: 0o664, ..Access::PRIVATE }).unwrap();
        assert!(matches!(Config::load(Some(&path)), Err(ConfigError::Exposed { .. })));
    }

    #[test]
    fn a_configuration_that_is_too_long_is_refused_and_not_cut() {
        let long = format!("log_format = \"json\"\n{}", "#\n".repeat(FILE_LEN_MAX / 2));
        let error = parse(&long).unwrap_err();
        assert!(error.contains("longer than 65536 bytes"), "{error}");
    }

    #[test]
    fn a_configuration_of_another_user_is_refused_in_words() {
        if !rustix::process::geteuid().is_root() {
            println!("skipped: only root can give a file away");
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ca.toml");
        durable::replace(&path, b"", Access { uid: Some(4_321), ..Access::PUBLIC }).unwrap();
        let error = Config::load(Some(&path)).unwrap_err().to_string();
        assert!(error.contains("belongs to uid 4321"), "{error}");
    }
}
