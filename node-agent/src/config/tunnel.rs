//! `[tunnel]` of the configuration: as whom the data path runs, and where it listens. It matters in mode
//! tunnel alone.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use serde::Deserialize;

use super::{ConfigError, User, find_group, read_if_there};
use crate::tunnel::control::PROOF_PORT;

/// Its user, where none is named.
const USER: &str = "ray-tunnel";
/// Folder of its rules and control sockets.
const FOLDER: &str = "/run/ray-mtls/tunnel";
/// Where the program is looked for, where it does not lie beside the agent.
const PROGRAM: &str = "/usr/local/bin/ray-tunnel";
const CAPTURED_PORT: u16 = 15_001;
const INBOUND_PORT: u16 = 15_008;

/// As it stands in the file.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Partial {
    /// User of `ray-tunnel`, by name or number; not root, not Ray's.
    pub user: Option<User>,
    /// Port on loopback that captured connections are handed to.
    pub captured_port: Option<u16>,
    /// Port at which other nodes dial; the same on each node of a cluster.
    pub inbound_port: Option<u16>,
    /// Folder of rules and control sockets.
    pub folder: Option<PathBuf>,
    /// The program.
    pub program: Option<PathBuf>,
    /// systemd holds sockets and process: the agent starts none, and asks at `control.sock` in the folder.
    pub external: Option<bool>,
    /// Listen on all addresses of the host, not on the node's own alone.
    pub any_address: Option<bool>,
}

/// The data path of mode tunnel.
#[derive(Clone, Debug)]
pub struct TunnelConfig {
    /// User and group of `ray-tunnel`; `None`: there is no such user.
    pub user: Option<(u32, u32)>,
    /// As it was named.
    pub user_name: String,
    /// Port on loopback that captured connections are handed to.
    pub captured_port: u16,
    /// Port at which other nodes dial.
    pub inbound_port: u16,
    /// Folder of rules and control sockets.
    pub folder: PathBuf,
    /// The program.
    pub program: PathBuf,
    /// Somebody else starts it.
    pub external: bool,
    /// It listens on all addresses.
    pub any_address: bool,
    /// How often it is asked how it stands.
    pub ask_pause: Duration,
    /// Rules that did not change are written again after this.
    pub write_pause: Duration,
    /// Capture is proved again after this.
    pub proof_pause: Duration,
}

impl Default for TunnelConfig {
    fn default() -> Self {
        Self {
            user: None,
            user_name: USER.to_owned(),
            captured_port: CAPTURED_PORT,
            inbound_port: INBOUND_PORT,
            folder: FOLDER.into(),
            program: beside_the_agent(),
            external: false,
            any_address: false,
            ask_pause: Duration::from_secs(10),
            write_pause: Duration::from_secs(30),
            proof_pause: Duration::from_secs(30),
        }
    }
}

impl TunnelConfig {
    /// Where the rules lie.
    #[must_use]
    pub fn rules(&self) -> PathBuf {
        self.folder.join("rules.json")
    }

    /// The control socket of the process that takes new flows.
    #[must_use]
    pub fn control(&self) -> PathBuf {
        self.folder.join("control.sock")
    }
}

impl Partial {
    pub(super) fn complete(self) -> Result<TunnelConfig, ConfigError> {
        let usual = TunnelConfig::default();
        let passwd = read_if_there(Path::new("/etc/passwd"))?.unwrap_or_default();
        let passwd = String::from_utf8_lossy(&passwd);
        let user = match &self.user {
            Some(user) => Some(ids(&passwd, user)?),
            // Without one only mode tunnel cannot be; the status says it there.
            None => ids(&passwd, &User::Name(USER.to_owned())).ok(),
        };
        let user_name = match self.user {
            Some(User::Name(name)) => name,
            Some(User::Id(id)) => id.to_string(),
            None => usual.user_name,
        };
        let config = TunnelConfig {
            user,
            user_name,
            captured_port: self.captured_port.unwrap_or(usual.captured_port),
            inbound_port: self.inbound_port.unwrap_or(usual.inbound_port),
            folder: self.folder.unwrap_or(usual.folder),
            program: self.program.unwrap_or(usual.program),
            external: self.external.unwrap_or_default(),
            any_address: self.any_address.unwrap_or_default(),
            ..TunnelConfig::default()
        };
        let ports = [config.captured_port, config.inbound_port, PROOF_PORT];
        if ports.contains(&0) || ports[0] == ports[1] || ports[..2].contains(&PROOF_PORT) {
            let text =
                "captured_port and inbound_port: two ports, neither 0 nor 15009 (capture proof)";
            return Err(ConfigError::Tunnel(text.to_owned()));
        }
        for (name, path) in [("folder", &config.folder), ("program", &config.program)] {
            if !path.is_absolute() {
                let text = format!("{name}: {} is not absolute", path.display());
                return Err(ConfigError::Tunnel(text));
            }
        }
        Ok(config)
    }
}

/// Number of a user and of its group; a number without an entry has the group of the same number.
fn ids(passwd: &str, user: &User) -> Result<(u32, u32), ConfigError> {
    let field = |line: &str, index| line.split(':').nth(index).map(str::to_owned);
    let uid = match user {
        User::Id(id) => *id,
        User::Name(name) => match name.parse() {
            Ok(id) => id,
            Err(_) => find_group(passwd, name).ok_or_else(|| ConfigError::User(name.clone()))?,
        },
    };
    let line = passwd.lines().find(|line| field(line, 2) == Some(uid.to_string()));
    let gid = line.and_then(|line| field(line, 3)?.parse().ok());
    Ok((uid, gid.unwrap_or(uid)))
}

fn beside_the_agent() -> PathBuf {
    let beside = std::env::current_exe().ok().map(|own| own.with_file_name("ray-tunnel"));
    beside.filter(|path| path.is_file()).unwrap_or_else(|| PROGRAM.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0::/:/bin/sh\nray-tunnel:x:991:985::/:/sbin/nologin\n";

    #[test]
    fn a_user_goes_by_name_or_number_and_has_a_group() {
        let name = |name: &str| User::Name(name.to_owned());
        assert_eq!(ids(PASSWD, &name("ray-tunnel")).unwrap(), (991, 985));
        assert_eq!(ids(PASSWD, &User::Id(991)).unwrap(), (991, 985));
        assert_eq!(ids(PASSWD, &User::Id(64_001)).unwrap(), (64_001, 64_001));
        assert!(ids(PASSWD, &name("nobody-here")).is_err());
    }

    #[test]
    fn ports_that_would_meet_are_refused() {
        for (captured, inbound, good) in [
            (None, None, true),
            (Some(16_001), Some(16_008), true),
            (Some(15_008), None, false),
            (Some(15_009), None, false),
            (None, Some(0), false),
        ] {
            let partial =
                Partial { captured_port: captured, inbound_port: inbound, ..Partial::default() };
            assert_eq!(partial.complete().is_ok(), good, "{captured:?} {inbound:?}");
        }
        let relative = Partial { program: Some("ray-tunnel".into()), ..Partial::default() };
        assert!(relative.complete().is_err());
    }
}
