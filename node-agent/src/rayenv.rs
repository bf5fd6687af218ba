//! The environment Ray is started with, as typed data: rendered into `ray.env` for sh and systemd,
//! set by `exec`, read back from a `ray.env` elsewhere. Pure.

use std::{
    borrow::Cow,
    path::{Path, PathBuf},
};

use raymtls_proto::{identity::Role, ports, v1};

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Variables that decide Ray's TLS and token, by name or by prefix. Inherited ones are removed, so
/// that no leftover decides what a process trusts.
const OWNED_NAME: &str = "RAY_USE_TLS";
const OWNED_PREFIXES: [&str; 2] = ["RAY_TLS_", "RAY_AUTH_"];

/// What a Ray process is told: the files of one key folder, where it speaks TLS itself, and the token.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RayEnv {
    /// Its TLS files; `None`: the node's tunnel speaks TLS, and Ray none.
    #[serde(flatten)]
    pub files: Option<TlsFiles>,
    /// File with Ray's token, where the cluster uses it.
    pub token: Option<PathBuf>,
    /// Ports of the cluster's plan that Ray is told by a variable, by its name.
    #[serde(default)]
    pub ports: Vec<(String, u16)>,
}

/// The files with which Ray speaks TLS.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TlsFiles {
    /// Leaf and issuer.
    pub server_cert: PathBuf,
    /// Its key.
    pub server_key: PathBuf,
    /// Cluster roots.
    pub ca_cert: PathBuf,
}

/// What a cluster's settings say of the environment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Told {
    /// Ray speaks TLS itself: not in mode tunnel.
    pub speaks_tls: bool,
    /// Ray's token is on.
    pub with_token: bool,
    /// Variables that tell Ray ports of the plan.
    pub ports: Vec<(&'static str, u16)>,
}

impl Told {
    /// By a cluster's settings, for a node of this role. Where they are not known yet, the token is on,
    /// as by default.
    #[must_use]
    pub fn by(settings: Option<&v1::Settings>, role: Role) -> Self {
        let is_tunnel = settings.is_some_and(|s| s.mode() == v1::Mode::Tunnel);
        Self {
            speaks_tls: !is_tunnel,
            // Without TLS of its own, the token alone says who may use a port of Ray on its host.
            with_token: is_tunnel || settings.is_none_or(|settings| settings.ray_token),
            ports: settings.map(|s| ports::ray_variables(role.to_proto(), s)).unwrap_or_default(),
        }
    }
}

/// A `ray.env` that is none of ours.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum RayEnvError {
    /// A path that could not stand in the file without quotes.
    #[error(
        "{0:?} cannot stand in ray.env: use an absolute path of letters, digits and any of / . _ -"
    )]
    Path(PathBuf),
    /// A line of another form or name.
    #[error("line {0} is not one that node-agent writes")]
    Line(usize),
    /// A variable is missing.
    #[error("it lacks {0}")]
    Missing(&'static str),
    /// Two that cannot stand together.
    #[error("it says RAY_USE_TLS=0 and names TLS files")]
    Both,
}

impl RayEnv {
    /// The environment for the key folder at `folder`.
    #[must_use]
    pub fn of_folder(folder: &Path, token: Option<&Path>) -> Self {
        let files = TlsFiles {
            server_cert: folder.join("tls.crt"),
            server_key: folder.join("tls.key"),
            ca_cert: folder.join("ca.crt"),
        };
        Self { files: Some(files), ..Self::without_tls(token) }
    }

    /// The environment of a Ray that speaks no TLS, because a tunnel does.
    #[must_use]
    pub fn without_tls(token: Option<&Path>) -> Self {
        Self { files: None, token: token.map(Path::to_path_buf), ports: Vec::new() }
    }

    /// The same with ports of the plan.
    #[must_use]
    pub fn with_ports(self, ports: &[(&'static str, u16)]) -> Self {
        let ports = ports.iter().map(|(name, port)| ((*name).to_owned(), *port)).collect();
        Self { ports, ..self }
    }

    /// The variables, in a fixed order.
    #[must_use]
    pub fn variables(&self) -> Vec<(&'static str, Cow<'_, Path>)> {
        let mut all: Vec<(&'static str, Cow<'_, Path>)> = match &self.files {
            Some(files) => vec![
                ("RAY_USE_TLS", Path::new("1").into()),
                ("RAY_TLS_SERVER_CERT", files.server_cert.as_path().into()),
                ("RAY_TLS_SERVER_KEY", files.server_key.as_path().into()),
                ("RAY_TLS_CA_CERT", files.ca_cert.as_path().into()),
            ],
            None => vec![("RAY_USE_TLS", Path::new("0").into())],
        };
        if let Some(token) = &self.token {
            all.push(("RAY_AUTH_MODE", Path::new("token").into()));
            all.push(("RAY_AUTH_TOKEN_PATH", token.as_path().into()));
        }
        for (name, port) in &self.ports {
            // Whatever the answer of another release names: nothing but a port is set this way.
            if let Some(name) = port_variable(name) {
                all.push((name, PathBuf::from(port.to_string()).into()));
            }
        }
        all
    }

    /// The text of `ray.env`: `NAME=value` lines that sh and systemd read alike.
    #[must_use]
    pub fn to_text(&self) -> String {
        self.variables()
            .iter()
            .map(|(name, value)| format!("{name}={}\n", value.display()))
            .collect()
    }

    /// Reads a `ray.env` back, strictly: no other variable gets into an environment this way.
    ///
    /// # Errors
    /// See [`RayEnvError`].
    pub fn parse(text: &str) -> Result<Self, RayEnvError> {
        let (mut cert, mut key, mut ca, mut token) = (None, None, None, None);
        let mut speaks_tls = None;
        let mut ports = Vec::new();
        for (number, line) in text.lines().enumerate() {
            let bad = RayEnvError::Line(number + 1);
            let Some((name, value)) = line.split_once('=') else { return Err(bad) };
            match (name, value) {
                ("RAY_AUTH_MODE", "token") => {}
                ("RAY_USE_TLS", "0" | "1") if speaks_tls.is_none() => {
                    speaks_tls = Some(value == "1");
                }
                ("RAY_TLS_SERVER_CERT", path) => cert = Some(plain(Path::new(path))?),
                ("RAY_TLS_SERVER_KEY", path) => key = Some(plain(Path::new(path))?),
                ("RAY_TLS_CA_CERT", path) => ca = Some(plain(Path::new(path))?),
                ("RAY_AUTH_TOKEN_PATH", path) => token = Some(plain(Path::new(path))?),
                (name, port) => {
                    let name = port_variable(name).ok_or_else(|| bad.clone())?;
                    let port = plain_port(port).ok_or(bad)?;
                    ports.retain(|(other, _)| other != name);
                    ports.push((name.to_owned(), port));
                }
            }
        }
        let files = match (speaks_tls, cert, key, ca) {
            (Some(false), None, None, None) => None,
            // A Ray without TLS whose files are named: somebody has put two of ours together.
            (Some(false), ..) => return Err(RayEnvError::Both),
            (Some(true) | None, cert, key, ca) => Some(TlsFiles {
                server_cert: cert.ok_or(RayEnvError::Missing("RAY_TLS_SERVER_CERT"))?,
                server_key: key.ok_or(RayEnvError::Missing("RAY_TLS_SERVER_KEY"))?,
                ca_cert: ca.ok_or(RayEnvError::Missing("RAY_TLS_CA_CERT"))?,
            }),
        };
        if files.is_none() && token.is_none() {
            return Err(RayEnvError::Missing("RAY_AUTH_TOKEN_PATH"));
        }
        Ok(Self { files, token, ports })
    }

    /// Name of the key folder its files lie in.
    #[must_use]
    pub fn folder_name(&self) -> Option<&str> {
        self.files.as_ref()?.server_key.parent()?.file_name()?.to_str()
    }
}

/// The variable of this name, if it tells Ray a port.
#[must_use]
pub fn port_variable(name: &str) -> Option<&'static str> {
    use ports::Told::{Elsewhere, Flag, Flags, Variable};
    ports::PORTS.iter().find_map(|row| match row.told {
        Variable(variable) if variable == name => Some(variable),
        Variable(_) | Flag(_) | Flags(..) | Elsewhere => None,
    })
}

/// As it is written here: digits, no sign, no zero in front.
fn plain_port(text: &str) -> Option<u16> {
    text.parse().ok().filter(|port: &u16| *port != 0 && port.to_string() == text)
}

/// Whether a variable of the environment is ours to set or remove.
#[must_use]
pub fn is_owned(name: &str) -> bool {
    name == OWNED_NAME || OWNED_PREFIXES.iter().any(|prefix| name.starts_with(prefix))
}

/// A path that needs no quotes in sh and in systemd's EnvironmentFile.
///
/// # Errors
/// [`RayEnvError::Path`].
pub fn plain(path: &Path) -> Result<PathBuf, RayEnvError> {
    let fits = |b: u8| b.is_ascii_alphanumeric() || b"/._-".contains(&b);
    match path.to_str() {
        Some(text) if path.is_absolute() && text.bytes().all(fits) => Ok(path.to_path_buf()),
        Some(_) | None => Err(RayEnvError::Path(path.to_path_buf())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_round_trips_with_and_without_a_token() {
        for token in [None, Some(Path::new("/t/ray_token"))] {
            let ports: &[_] =
                if token.is_some() { &[("AUTOSCALER_METRIC_PORT", 45_217)] } else { &[] };
            let env = RayEnv::of_folder(Path::new("/t/k3"), token).with_ports(ports);
            assert_eq!(RayEnv::parse(&env.to_text()), Ok(env.clone()));
            assert_eq!(env.folder_name(), Some("k3"));
        }
    }

    #[test]
    fn a_ray_behind_a_tunnel_has_a_token_and_no_tls_files() {
        let token = Path::new("/t/ray_token");
        let env = RayEnv::without_tls(Some(token));
        let text = env.to_text();
        assert_eq!(text, "RAY_USE_TLS=0\nRAY_AUTH_MODE=token\nRAY_AUTH_TOKEN_PATH=/t/ray_token\n");
        assert_eq!(RayEnv::parse(&text), Ok(env.clone()));
        assert_eq!(env.folder_name(), None);
        let json = serde_json::to_string(&env).unwrap();
        assert_eq!(serde_json::from_str::<RayEnv>(&json).unwrap(), env);
        assert_eq!(
            RayEnv::parse("RAY_USE_TLS=0\n"),
            Err(RayEnvError::Missing("RAY_AUTH_TOKEN_PATH"))
        );
        for both in [
            format!("{text}RAY_TLS_CA_CERT=/t/k1/ca.crt\n"),
            format!("{text}{}", RayEnv::of_folder(Path::new("/t/k1"), None).to_text()),
        ] {
            assert!(RayEnv::parse(&both).is_err(), "{both}");
        }
    }

    #[test]
    fn mode_and_token_decide_what_ray_is_told() {
        for (mode, ray_token, speaks_tls, with_token) in [
            (v1::Mode::Files, true, true, true),
            (v1::Mode::Files, false, true, false),
            (v1::Mode::Tunnel, true, false, true),
            // A CA refuses this one; who is told it all the same starts no Ray without a token.
            (v1::Mode::Tunnel, false, false, true),
        ] {
            let settings = v1::Settings { mode: mode.into(), ray_token, ..v1::Settings::default() };
            let told = Told::by(Some(&settings), Role::Worker);
            assert_eq!((told.speaks_tls, told.with_token), (speaks_tls, with_token), "{mode:?}");
        }
        let told = Told::by(None, Role::Worker);
        assert!(told.speaks_tls && told.with_token);
    }

    #[test]
    fn a_foreign_line_is_refused() {
        let good = RayEnv::of_folder(Path::new("/t/k3"), None).to_text();
        for bad in [
            "LD_PRELOAD=/x\n",
            "RAY_USE_TLS=0\n",
            "\n",
            "RAY_TLS_CA_CERT=/a b\n",
            "AUTOSCALER_METRIC_PORT=\n",
            "AUTOSCALER_METRIC_PORT=07\n",
            "METRIC_PORT=7\n",
        ] {
            assert!(RayEnv::parse(&format!("{good}{bad}")).is_err(), "{bad:?}");
        }
        assert_eq!(RayEnv::parse(""), Err(RayEnvError::Missing("RAY_TLS_SERVER_CERT")));
    }

    #[test]
    fn what_decides_trust_is_owned() {
        for name in ["RAY_USE_TLS", "RAY_TLS_CA_CERT", "RAY_TLS_X", "RAY_AUTH_TOKEN"] {
            assert!(is_owned(name), "{name}");
        }
        for name in ["RAY_ADDRESS", "RAY_USE_TLS_X", "XRAY_TLS_A", "PATH"] {
            assert!(!is_owned(name), "{name}");
        }
    }

    #[test]
    fn only_paths_without_quoting_pass() {
        assert!(plain(Path::new("/var/lib/ray-mtls/tls")).is_ok());
        for bad in ["tls", "/a b", "/a$b", "/a\"b", "/a\nb", "/é"] {
            assert!(plain(Path::new(bad)).is_err(), "{bad:?}");
        }
    }
}
