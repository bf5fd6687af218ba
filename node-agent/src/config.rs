//! Where the agent keeps its files and who runs Ray. Parsed once from a TOML file and flags; what
//! comes out is complete. Unknown keys and files that others can write are refused.

mod tunnel;

use std::{
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::Deserialize;
use thiserror::Error;

pub use self::tunnel::{Partial as TunnelPartial, TunnelConfig};
use crate::{client::CallLimits, isolation::table::Kernel, state::Pauses, statedir::read_if_there};

/// The configuration file that is read where none is named, if it is there.
pub const CONFIG_PATH: &str = "/etc/ray-mtls/agent.toml";
/// Default state folder.
pub const STATE_DIR: &str = "/var/lib/ray-mtls/agent";
/// Default TLS folder.
pub const TLS_DIR: &str = "/var/lib/ray-mtls/tls";
/// Default socket, in a folder of its own: a ca-server of the same host may have another user.
pub const SOCKET: &str = "/run/ray-mtls/agent.sock";
const HOOKS_DIR: &str = "/etc/ray-mtls/hooks.d";
const HTTP_LISTEN: &str = "127.0.0.1:7447";

/// Why there is no configuration.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// Cannot be read.
    #[error("cannot read the configuration: {0}")]
    Read(#[from] io::Error),
    /// Not there though it was named.
    #[error("there is no configuration file {0}")]
    Missing(String),
    /// Not TOML, or an unknown key.
    #[error("{path}: {why}")]
    Form {
        /// The file.
        path: String,
        /// What the parser says.
        why: String,
    },
    /// Others may write it.
    #[error(
        "{0} may be written by others: whoever writes it commands the agent; \
         give it to root or the agent's user, mode 0644 or less"
    )]
    Exposed(String),
    /// No such group.
    #[error("there is no group {0:?} in /etc/group: give its number")]
    Group(String),
    /// No such user.
    #[error("there is no user {0:?} in /etc/passwd: give the number")]
    User(String),
    /// A key of `[tunnel]` that cannot be.
    #[error("tunnel.{0}")]
    Tunnel(String),
    /// Not an address to listen on.
    #[error("http_listen {0:?} is neither ADDRESS:PORT nor \"off\"")]
    Listen(String),
}

/// How logs are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Human,
    /// One JSON object a line.
    Json,
}

/// The configuration file, or the flags: all of it optional.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Partial {
    /// State folder.
    pub state_dir: Option<PathBuf>,
    /// TLS folder.
    pub tls_dir: Option<PathBuf>,
    /// The agent's socket.
    pub socket: Option<PathBuf>,
    /// File for the status that is read when the daemon is gone.
    pub status_file: Option<PathBuf>,
    /// Numeric id of the user that runs Ray.
    pub ray_uid: Option<User>,
    /// Group that may read Ray's key, by name or number.
    pub ray_group: Option<String>,
    /// Folder of hooks.
    pub hooks_dir: Option<PathBuf>,
    /// Metrics and health, or `off`.
    pub http_listen: Option<String>,
    /// How logs are written.
    pub log_format: Option<LogFormat>,
    /// Mode tunnel.
    pub tunnel: Option<TunnelPartial>,
}

impl Partial {
    /// Reads the file named, or the one at the usual place if it is there.
    ///
    /// # Errors
    /// See [`ConfigError`].
    pub fn read(named: Option<&Path>) -> Result<Self, ConfigError> {
        let path = named.unwrap_or_else(|| Path::new(CONFIG_PATH));
        let Some(text) = read_if_there(path)? else {
            return match named {
                Some(path) => Err(ConfigError::Missing(path.display().to_string())),
                None => Ok(Self::default()),
            };
        };
        if !is_ours_alone(path)? {
            return Err(ConfigError::Exposed(path.display().to_string()));
        }
        toml::from_str(&String::from_utf8_lossy(&text)).map_err(|e| ConfigError::Form {
            path: path.display().to_string(),
            why: e.to_string().trim_end().to_owned(),
        })
    }

    /// What `self` says, and what it leaves open from `other`.
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        Self {
            state_dir: self.state_dir.or(other.state_dir),
            tls_dir: self.tls_dir.or(other.tls_dir),
            socket: self.socket.or(other.socket),
            status_file: self.status_file.or(other.status_file),
            ray_uid: self.ray_uid.or(other.ray_uid),
            ray_group: self.ray_group.or(other.ray_group),
            hooks_dir: self.hooks_dir.or(other.hooks_dir),
            http_listen: self.http_listen.or(other.http_listen),
            log_format: self.log_format.or(other.log_format),
            tunnel: self.tunnel.or(other.tunnel),
        }
    }

    /// Completes it with the defaults.
    ///
    /// # Errors
    /// See [`ConfigError`].
    pub fn complete(self) -> Result<Config, ConfigError> {
        let http_listen = self.http_listen.unwrap_or_else(|| HTTP_LISTEN.to_owned());
        let socket = self.socket.unwrap_or_else(|| SOCKET.into());
        Ok(Config {
            status_file: Some(self.status_file.unwrap_or_else(|| status_file_of(&socket))),
            state_dir: self.state_dir.unwrap_or_else(|| STATE_DIR.into()),
            tls_dir: self.tls_dir.unwrap_or_else(|| TLS_DIR.into()),
            socket: Some(socket),
            ray_uid: self.ray_uid.as_ref().map(User::id).transpose()?,
            ray_gid: self.ray_group.as_deref().map(group_id).transpose()?,
            hooks_dir: Some(self.hooks_dir.unwrap_or_else(|| HOOKS_DIR.into())),
            http_listen: parse_listen(&http_listen)?,
            limits: CallLimits::default(),
            pauses: Pauses::default(),
            isolation: IsolationConfig::default(),
            looks: Some(LooksConfig::default()),
            tunnel: self.tunnel.unwrap_or_default().complete()?,
            tick: TICK,
        })
    }
}

/// How often the agent looks whether a moment has come: wall clocks jump, timers do not.
const TICK: Duration = Duration::from_secs(1);

/// A user, by number or by name.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
pub enum User {
    /// By number.
    Id(u32),
    /// By name, or by a number in quotes.
    Name(String),
}

impl User {
    fn id(&self) -> Result<u32, ConfigError> {
        match self {
            Self::Id(id) => Ok(*id),
            Self::Name(name) => user_id(name),
        }
    }
}

/// A complete configuration.
#[derive(Clone, Debug)]
pub struct Config {
    /// State folder.
    pub state_dir: PathBuf,
    /// TLS folder.
    pub tls_dir: PathBuf,
    /// The agent's socket; `None`: no socket (in-process use).
    pub socket: Option<PathBuf>,
    /// File for the status that is read when the daemon is gone, readable by all; `None`: only the
    /// one in the state folder.
    pub status_file: Option<PathBuf>,
    /// User that runs Ray.
    pub ray_uid: Option<u32>,
    /// Group that may read Ray's key; `None`: the one given at enrolment.
    pub ray_gid: Option<u32>,
    /// Folder of hooks; `None`: no hooks.
    pub hooks_dir: Option<PathBuf>,
    /// Metrics and health; `None`: off.
    pub http_listen: Option<SocketAddr>,
    /// Bounds of calls to the CA.
    pub limits: CallLimits,
    /// Pauses that are longer than a backoff.
    pub pauses: Pauses,
    /// How the kernel's table is reached, and the pauses around it.
    pub isolation: IsolationConfig,
    /// How it is found out what Ray serves; `None`: not at all.
    pub looks: Option<LooksConfig>,
    /// The data path of mode tunnel.
    pub tunnel: TunnelConfig,
    /// Longest sleep of the loop.
    pub tick: Duration,
}

/// How the kernel's table is reached, and the pauses around it. No setting of an operator.
#[derive(Clone, Debug)]
pub struct IsolationConfig {
    /// The programs.
    pub kernel: Kernel,
    /// The CA must be reached so soon after the first load of `enforce`.
    pub trial_time: Duration,
    /// After a first `enforce` that failed and a contact with the CA: until it is tried again, at most.
    pub retrial_pause: Duration,
    /// How long `exec` waits for the table and for the heads, in all.
    pub exec_wait: Duration,
    /// How often counters are read.
    pub count_pause: Duration,
}

impl Default for IsolationConfig {
    fn default() -> Self {
        Self {
            kernel: Kernel::default(),
            trial_time: Duration::from_secs(30),
            retrial_pause: Duration::from_secs(600),
            exec_wait: Duration::from_secs(10),
            count_pause: Duration::from_secs(10),
        }
    }
}

/// How it is found out what Ray serves. No setting of an operator.
#[derive(Clone, Debug)]
pub struct LooksConfig {
    /// `/proc`.
    pub proc: PathBuf,
    /// From one look to the next.
    pub pause: Duration,
    /// From a start by `exec` to a look: Ray listens by then.
    pub after_start: Duration,
}

impl Default for LooksConfig {
    fn default() -> Self {
        Self {
            proc: "/proc".into(),
            pause: Duration::from_secs(60),
            after_start: Duration::from_secs(10),
        }
    }
}

impl Config {
    /// A configuration for use inside another process: no socket, no hooks, no HTTP, no look at Ray.
    #[must_use]
    pub fn in_process(state_dir: PathBuf, tls_dir: PathBuf) -> Self {
        Self {
            state_dir,
            tls_dir,
            socket: None,
            status_file: None,
            ray_uid: None,
            ray_gid: None,
            hooks_dir: None,
            http_listen: None,
            limits: CallLimits::default(),
            pauses: Pauses::default(),
            isolation: IsolationConfig::default(),
            looks: None,
            tunnel: TunnelConfig::default(),
            tick: Duration::from_millis(20),
        }
    }
}

/// The status file that goes with a socket: beside it.
#[must_use]
pub fn status_file_of(socket: &Path) -> PathBuf {
    socket.with_file_name("status.json")
}

/// A group by number, or by name as `/etc/group` has it.
///
/// # Errors
/// [`ConfigError::Group`].
pub fn group_id(group: &str) -> Result<u32, ConfigError> {
    if let Ok(number) = group.parse() {
        return Ok(number);
    }
    let text = read_if_there(Path::new("/etc/group"))?.unwrap_or_default();
    find_group(&String::from_utf8_lossy(&text), group)
        .ok_or_else(|| ConfigError::Group(group.to_owned()))
}

/// A user by number, or by name as `/etc/passwd` has it.
///
/// # Errors
/// [`ConfigError::User`].
pub fn user_id(user: &str) -> Result<u32, ConfigError> {
    if let Ok(number) = user.parse() {
        return Ok(number);
    }
    let text = read_if_there(Path::new("/etc/passwd"))?.unwrap_or_default();
    // The same form as a group's up to the number.
    find_group(&String::from_utf8_lossy(&text), user)
        .ok_or_else(|| ConfigError::User(user.to_owned()))
}

fn find_group(text: &str, name: &str) -> Option<u32> {
    let mut lines = text.lines().map(|line| line.split(':').collect::<Vec<_>>());
    lines.find(|fields| fields.first() == Some(&name))?.get(2)?.parse().ok()
}

fn parse_listen(text: &str) -> Result<Option<SocketAddr>, ConfigError> {
    if text == "off" {
        return Ok(None);
    }
    text.parse().map(Some).map_err(|_| ConfigError::Listen(text.to_owned()))
}

/// Whether only root and this process's user can write a file or folder.
pub(crate) fn is_ours_alone(path: &Path) -> io::Result<bool> {
    use std::os::unix::fs::MetadataExt;
    let metadata = std::fs::metadata(path)?;
    let owner = metadata.uid();
    let own = rustix::process::geteuid().as_raw();
    Ok((owner == 0 || owner == own) && metadata.mode() & 0o022 == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_win_over_the_file_and_defaults_fill_the_rest() {
        let named: Partial = toml::from_str("ray_uid = 'root'").unwrap();
        assert_eq!(named.complete().unwrap().ray_uid, Some(0));
        let unknown: Partial = toml::from_str("ray_uid = 'no-such-user'").unwrap();
        assert!(matches!(unknown.complete(), Err(ConfigError::User(_))));
        let file: Partial = toml::from_str("state_dir = '/f'\nray_uid = 7\n").unwrap();
        let flags = Partial { state_dir: Some("/flag".into()), ..Partial::default() };
        let config = flags.or(file).complete().unwrap();
        assert_eq!(config.state_dir, Path::new("/flag"));
        assert_eq!(config.ray_uid, Some(7));
        assert_eq!(config.tls_dir, Path::new(TLS_DIR));
        assert_eq!(config.http_listen, Some(HTTP_LISTEN.parse().unwrap()));
    }

    #[test]
    fn an_unknown_key_is_refused() {
        assert!(toml::from_str::<Partial>("state_dirr = '/f'").is_err());
    }

    #[test]
    fn http_can_be_off() {
        let off = Partial { http_listen: Some("off".to_owned()), ..Partial::default() };
        assert_eq!(off.complete().unwrap().http_listen, None);
        let bad = Partial { http_listen: Some("7447".to_owned()), ..Partial::default() };
        assert!(bad.complete().is_err());
    }

    #[test]
    fn groups_go_by_number_or_name() {
        assert_eq!(group_id("4711").unwrap(), 4711);
        let text = "root:x:0:\nray:x:990:a,b\n";
        assert_eq!(find_group(text, "ray"), Some(990));
        assert_eq!(find_group(text, "rayx"), None);
    }
}
