//! The join file: all a machine needs to enrol, in one file of mode 0600. It carries the control
//! root itself, so the node verifies the CA with a stock verifier before it sends the token.

use std::{
    fs::File,
    io::Read,
    net::Ipv6Addr,
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use rustls::pki_types::CertificateDer;
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::{
    bundle,
    identity::{ClusterId, TrustDomain},
    token::BootstrapToken,
};

/// The format this code writes.
const FORMAT: u32 = 1;
/// Longest join file, in bytes; a real one has about 1,200.
const FILE_LEN_MAX: u64 = 64 * 1024;
/// Most endpoints of one kind.
const ENDPOINTS_MAX: usize = 16;
/// Longest host name (RFC 1035 2.3.4).
const HOST_LEN_MAX: usize = 255;

/// A join file, read and found whole.
#[derive(Debug)]
pub struct JoinFile {
    /// The deployment.
    pub trust_domain: TrustDomain,
    /// The cluster the token is for.
    pub cluster: ClusterId,
    /// `host:port` of the enrolment listeners, tried in order.
    pub enrollment_endpoints: Vec<String>,
    /// `host:port` of the node listeners, tried in order.
    pub node_endpoints: Vec<String>,
    /// What the CA's certificate must chain to.
    pub control_roots: Vec<CertificateDer<'static>>,
    /// What the machine shows the CA.
    pub credential: Credential,
}

/// What a machine shows the CA to be let in.
#[derive(Debug)]
pub enum Credential {
    /// A bootstrap token.
    Token(BootstrapToken),
    /// The file in which it finds a signed JWT when it enrols, such as the projected service-account
    /// token of a pod.
    JwtFile(PathBuf),
}

/// Why a join file is of no use.
#[derive(Debug, Error)]
pub enum JoinError {
    /// Cannot be read.
    #[error("cannot read the join file {path}: {error}")]
    Read {
        /// Its path.
        path: PathBuf,
        /// The system's words.
        error: std::io::Error,
    },
    /// Group or others may read it.
    #[error(
        "the join file may be read by others (mode {mode:04o}): it holds a secret; \
         run `chmod 600` on it, and revoke the token if others may have seen it"
    )]
    Exposed {
        /// Permission bits.
        mode: u32,
    },
    /// Group or others may write it.
    #[error(
        "the join file may be written by others (mode {mode:04o}): whoever writes it decides which CA \
         this machine trusts; run `chmod go-w` on it"
    )]
    Writable {
        /// Permission bits.
        mode: u32,
    },
    /// Somebody else made it.
    #[error(
        "the join file belongs to uid {uid}, who is neither root nor the user who reads it: \
         whoever wrote it decides which CA this machine trusts; run `chown` on it if it is yours"
    )]
    Owner {
        /// Whose it is.
        uid: u32,
    },
    /// Not a plain file, or too long to be one of ours.
    #[error("the join file is not a plain file of at most {FILE_LEN_MAX} bytes")]
    NotPlain,
    /// Damaged, or cut short.
    #[error(
        "the join file is damaged or cut short: {0}; \
         copy it again, or make a new one with `ca-admin token create`"
    )]
    Damaged(String),
    /// Of a newer release.
    #[error("the join file has format {0}; this program reads format {FORMAT}: upgrade it")]
    Format(u32),
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Text {
    format: u32,
    trust_domain: TrustDomain,
    cluster: ClusterId,
    enrollment_endpoints: Vec<String>,
    node_endpoints: Vec<String>,
    // One of the two.
    #[serde(skip_serializing_if = "Option::is_none")]
    token: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    jwt_file: Option<PathBuf>,
    // Last, so that a file cut short is missing the end of a certificate and does not parse.
    control_roots: String,
}

impl JoinFile {
    /// Reads a join file that nobody else can write, nor read where it holds a token.
    ///
    /// # Errors
    /// See [`JoinError`]. No error holds any of the token.
    pub fn read(path: &Path) -> Result<Self, JoinError> {
        let failed = |error| JoinError::Read { path: path.to_owned(), error };
        let flags = rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK;
        let file = File::options()
            .read(true)
            .custom_flags(flags.bits().cast_signed())
            .open(path)
            .map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        if !metadata.is_file() || metadata.len() > FILE_LEN_MAX {
            return Err(JoinError::NotPlain);
        }
        let uid = metadata.uid();
        if uid != 0 && uid != rustix::process::geteuid().as_raw() {
            return Err(JoinError::Owner { uid });
        }
        let mode = metadata.mode() & 0o7777;
        if mode & 0o022 != 0 {
            return Err(JoinError::Writable { mode });
        }
        let mut text = String::new();
        file.take(FILE_LEN_MAX).read_to_string(&mut text).map_err(failed)?;
        let text = SecretString::from(text);
        let join = Self::parse(text.expose_secret())?;
        match &join.credential {
            Credential::Token(_) if mode & 0o077 != 0 => Err(JoinError::Exposed { mode }),
            Credential::Token(_) | Credential::JwtFile(_) => Ok(join),
        }
    }

    /// Its token, where it has one.
    #[must_use]
    pub fn token(&self) -> Option<&BootstrapToken> {
        match &self.credential {
            Credential::Token(token) => Some(token),
            Credential::JwtFile(_) => None,
        }
    }

    /// Parses the text of a join file.
    ///
    /// # Errors
    /// See [`JoinError`].
    pub fn parse(text: &str) -> Result<Self, JoinError> {
        #[derive(Deserialize)]
        struct Format {
            format: u32,
        }
        // The parser's own message quotes the line, which may hold the token: say only where.
        let damaged = |e: toml::de::Error| {
            let at = e.span().map_or(0, |span| span.start.min(text.len()));
            let line = text.as_bytes()[..at].iter().filter(|b| **b == b'\n').count() + 1;
            JoinError::Damaged(format!("line {line} does not parse"))
        };
        let format = toml::from_str::<Format>(text).map_err(damaged)?.format;
        if format != FORMAT {
            return Err(JoinError::Format(format));
        }
        let parsed: Text = toml::from_str(text).map_err(damaged)?;
        for endpoints in [&parsed.enrollment_endpoints, &parsed.node_endpoints] {
            if endpoints.is_empty() || endpoints.len() > ENDPOINTS_MAX {
                let wanted = format!("1 to {ENDPOINTS_MAX} endpoints of each kind are wanted");
                return Err(JoinError::Damaged(wanted));
            }
            // Told by its number: what stands there may be the token, in the wrong line.
            if let Some(odd) = endpoints.iter().position(|endpoint| !is_endpoint(endpoint)) {
                let wanted = format!("endpoint {} of a list is not of the form host:port", odd + 1);
                return Err(JoinError::Damaged(wanted));
            }
        }
        let control_roots = bundle::certificates_from_pem(parsed.control_roots.as_bytes())
            .map_err(|e| JoinError::Damaged(format!("control_roots: {e}")))?;
        let credential = credential(parsed.token, parsed.jwt_file)?;
        Ok(Self {
            trust_domain: parsed.trust_domain,
            cluster: parsed.cluster,
            enrollment_endpoints: parsed.enrollment_endpoints,
            node_endpoints: parsed.node_endpoints,
            control_roots,
            credential,
        })
    }

    /// The text of the file, which holds the token if there is one.
    #[must_use]
    pub fn to_text(&self) -> SecretString {
        let text = Text {
            format: FORMAT,
            trust_domain: self.trust_domain.clone(),
            cluster: self.cluster.clone(),
            enrollment_endpoints: self.enrollment_endpoints.clone(),
            node_endpoints: self.node_endpoints.clone(),
            token: self.token().map(|token| token.expose().expose_secret().to_owned()),
            jwt_file: match &self.credential {
                Credential::Token(_) => None,
                Credential::JwtFile(path) => Some(path.clone()),
            },
            control_roots: bundle::certificates_to_pem(&self.control_roots),
        };
        let body = toml::to_string(&text).expect("strings and lists of strings are valid TOML");
        let word = match &self.credential {
            Credential::Token(_) => "holds a secret. Use it once, then delete it.",
            Credential::JwtFile(_) => "holds no secret.",
        };
        format!("# Ray mTLS join file: {word}\n{body}").into()
    }
}

fn credential(token: Option<String>, jwt_file: Option<PathBuf>) -> Result<Credential, JoinError> {
    let damaged = |what: &str| JoinError::Damaged(what.to_owned());
    match (token.map(SecretString::from), jwt_file) {
        (Some(token), None) => {
            let token = token.expose_secret().parse();
            let token = token.map_err(|_| damaged("the token is not of the form id.secret"))?;
            Ok(Credential::Token(token))
        }
        (None, Some(path)) if path.is_absolute() => Ok(Credential::JwtFile(path)),
        (None, Some(_)) => Err(damaged("jwt_file is no absolute path")),
        (Some(_), Some(_)) => Err(damaged("it holds a token and names a jwt_file: one of them")),
        (None, None) => Err(damaged("it holds no token and names no jwt_file")),
    }
}

/// `host:port`, where an IPv6 address stands in brackets.
#[must_use]
pub fn is_endpoint(text: &str) -> bool {
    let Some((host, port)) = text.rsplit_once(':') else { return false };
    let in_brackets = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
    let host_fits = match in_brackets {
        Some(address) => address.parse::<Ipv6Addr>().is_ok(),
        None => {
            let fits = |b: u8| b.is_ascii_alphanumeric() || b == b'.' || b == b'-' || b == b'_';
            (1..=HOST_LEN_MAX).contains(&host.len()) && host.bytes().all(fits)
        }
    };
    let port_fits = port.bytes().all(|b| b.is_ascii_digit());
    host_fits && port_fits && port.parse::<u16>().is_ok_and(|port| port != 0)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::token::TokenId;

    fn sample() -> JoinFile {
        let key = rcgen::KeyPair::generate().unwrap();
        let root = rcgen::CertificateParams::default().self_signed(&key).unwrap();
        JoinFile {
            trust_domain: "ray.example".parse().unwrap(),
            cluster: "c1".parse().unwrap(),
            enrollment_endpoints: vec!["ca:7443".to_owned()],
            node_endpoints: vec!["ca:7444".to_owned()],
            control_roots: vec![root.der().clone()],
            credential: Credential::Token(BootstrapToken::new(TokenId::new([1; 8]), [2; 32])),
        }
    }

    fn secret_of(file: &JoinFile) -> SecretString {
        file.token().unwrap().expose()
    }

    #[test]
    fn a_join_file_round_trips() {
        let file = sample();
        let back = JoinFile::parse(file.to_text().expose_secret()).unwrap();
        assert_eq!(back.cluster, file.cluster);
        assert_eq!(back.control_roots, file.control_roots);
        assert_eq!(secret_of(&back).expose_secret(), secret_of(&file).expose_secret());
    }

    #[test]
    fn a_file_cut_at_any_byte_is_refused_without_showing_the_token() {
        let text = sample().to_text();
        let whole = text.expose_secret();
        let secret = secret_of(&sample());
        let secret = &secret.expose_secret()[17..];
        // The last line break and the closing quotes may go missing only together with a parse.
        for end in 0..whole.trim_end().len() {
            let error = JoinFile::parse(&whole[..end]).expect_err("a cut file parsed").to_string();
            assert!(!error.contains(&secret[..6]), "{error}");
        }
    }

    #[test]
    fn a_token_in_the_wrong_place_is_not_shown() {
        let text = sample().to_text();
        let token = secret_of(&sample());
        let token = token.expose_secret();
        for (place, wrong) in [
            ("ca:7444", token.to_owned()),
            ("-----BEGIN CERTIFICATE-----", format!("-----BEGIN {token}")),
        ] {
            let damaged = text.expose_secret().replacen(place, &wrong, 1);
            let error = JoinFile::parse(&damaged).expect_err(place).to_string();
            let bytes = format!("{:?}", token.as_bytes());
            let bytes = bytes.trim_matches(['[', ']']);
            assert!(!error.contains(&token[17..]) && !error.contains(bytes), "{place}: {error}");
        }
    }

    #[test]
    fn a_file_others_can_read_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("join");
        #[allow(clippy::disallowed_methods, reason = "a test's own file")]
        std::fs::write(&path, sample().to_text().expose_secret()).unwrap();
        for (mode, good) in [(0o600, true), (0o400, true), (0o640, false), (0o604, false)] {
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(JoinFile::read(&path).is_ok(), good, "{mode:o}");
        }
    }

    #[test]
    fn a_file_without_a_token_may_be_read_by_all_and_written_by_none() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("join");
        let file = JoinFile { credential: Credential::JwtFile("/run/t".into()), ..sample() };
        #[allow(clippy::disallowed_methods, reason = "a test's own file")]
        std::fs::write(&path, file.to_text().expose_secret()).unwrap();
        for (mode, good) in [(0o600, true), (0o644, true), (0o664, false), (0o646, false)] {
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(JoinFile::read(&path).is_ok(), good, "{mode:o}");
        }
        for (from, to) in [("/run/t", "t"), ("jwt_file = \"/run/t\"\n", "")] {
            let text = file.to_text().expose_secret().replace(from, to);
            assert!(matches!(JoinFile::parse(&text), Err(JoinError::Damaged(_))), "{text}");
        }
    }

    #[test]
    fn a_file_of_another_user_is_refused() {
        if !rustix::process::geteuid().is_root() {
            println!("skipped: only root can give a file away");
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("join");
        let text = sample().to_text();
        let access = crate::durable::Access { mode: 0o600, uid: Some(4_321), gid: None };
        crate::durable::create(&path, text.expose_secret().as_bytes(), access).unwrap();
        assert!(matches!(JoinFile::read(&path), Err(JoinError::Owner { uid: 4_321 })));
    }

    #[test]
    fn an_endpoint_is_host_and_port() {
        for (text, good) in [
            ("ca:7443", true),
            ("ca-1.example.org:7443", true),
            ("10.77.0.4:1", true),
            ("[fd00::1]:65535", true),
            ("ca", false),
            ("ca:", false),
            (":7443", false),
            ("ca:0", false),
            ("ca:65536", false),
            ("ca:+7443", false),
            ("fd00::1:7443", false),
            ("[ca]:7443", false),
            ("https://ca:7443", false),
            ("user@ca:7443", false),
            ("ca :7443", false),
        ] {
            let mut file = sample();
            file.node_endpoints.push(text.to_owned());
            let parsed = JoinFile::parse(file.to_text().expose_secret());
            assert_eq!(parsed.is_ok(), good, "{text}");
        }
    }
}
