//! Dials a port and takes down what it says. Bounded in time, bytes and addresses; judges nothing.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, lookup_host},
    time::timeout,
};

use crate::served::probe::{Answer, Limits, Prober};

/// Most addresses of a name that are tried.
const ADDRS_MAX: usize = 4;
/// Longest target, in bytes: a DNS name and a port.
const TARGET_LEN_MAX: usize = 262;
/// What a client of HTTP/2 without TLS says first, and empty SETTINGS (RFC 9113 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00";
/// The head of a frame of HTTP/2, in bytes; the fourth is its type (RFC 9113 4.1).
const FRAME_HEAD_LEN: usize = 9;
/// SETTINGS, the first frame of a server.
const SETTINGS: u8 = 4;

/// Longest waits.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds {
    /// For the address of a name, and for a connection to one address.
    pub(crate) connect: Duration,
    /// For one talk.
    pub(crate) talk: Duration,
}

impl Default for Bounds {
    fn default() -> Self {
        Self { connect: Duration::from_secs(4), talk: Duration::from_secs(5) }
    }
}

impl Bounds {
    pub(super) fn limits(self) -> Limits {
        Limits { socket: self.talk, total: self.talk, ..Limits::default() }
    }
}

/// What was asked about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Target {
    pub(super) host: String,
    pub(super) port: u16,
}

impl Target {
    /// `HOST:PORT`, `[V6]:PORT`.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let bad = || format!("{text:?} is not HOST:PORT: give for example 10.0.0.1:6379");
        let (host, port) =
            text.rsplit_once(':').filter(|_| text.len() <= TARGET_LEN_MAX).ok_or_else(bad)?;
        let host = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
        let is_name = !host.is_empty() && host.chars().all(|c| c.is_ascii_graphic() && c != '/');
        let port = port.parse().ok().filter(|port| *port != 0);
        Ok(Self {
            host: is_name.then(|| host.to_owned()).ok_or_else(bad)?,
            port: port.ok_or_else(bad)?,
        })
    }

    /// The address, where it is one.
    pub(super) fn ip(&self) -> Option<IpAddr> {
        self.host.parse::<IpAddr>().ok().map(|ip| ip.to_canonical())
    }
}

/// What was seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Seen {
    /// The name has no address.
    NoAddress(String),
    /// No connection to any address; the last one, and why.
    NoConnection(SocketAddr, NoConnection),
    /// A connection, and what was said on it.
    Talked {
        addr: SocketAddr,
        answer: Answer,
        /// What it answers in the clear; looked at where it gave no certificate.
        clear: Option<Clear>,
        /// What it answers who shows no leaf; looked at where it refused ours.
        bare: Option<Answer>,
    },
}

/// Why there is no connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum NoConnection {
    Refused,
    NoAnswer(Duration),
    /// This host's own packet filter.
    Forbidden,
    Other(String),
}

/// What it answers without TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Clear {
    Http,
    Grpc,
    Nothing,
}

pub(super) async fn look(target: &Target, prober: &Prober, bare: &Prober, bounds: Bounds) -> Seen {
    let addrs = match resolve(target, bounds.connect).await {
        Ok(addrs) => addrs,
        Err(why) => return Seen::NoAddress(why),
    };
    let mut last = Seen::NoAddress("it has no address".to_owned());
    for addr in addrs {
        match connect(addr, bounds.connect).await {
            Ok(tcp) => return talk(addr, tcp, prober, bare, bounds).await,
            Err(why) => last = Seen::NoConnection(addr, why),
        }
    }
    last
}

async fn resolve(target: &Target, wait: Duration) -> Result<Vec<SocketAddr>, String> {
    if let Some(ip) = target.ip() {
        return Ok(vec![SocketAddr::new(ip, target.port)]);
    }
    match timeout(wait, lookup_host((target.host.as_str(), target.port))).await {
        Ok(Ok(addrs)) => Ok(addrs.take(ADDRS_MAX).collect()),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(format!("no answer from the resolver in {}s", wait.as_secs())),
    }
}

async fn connect(addr: SocketAddr, wait: Duration) -> Result<TcpStream, NoConnection> {
    match timeout(wait, TcpStream::connect(addr)).await {
        Ok(Ok(tcp)) => Ok(tcp),
        Err(_) => Err(NoConnection::NoAnswer(wait)),
        Ok(Err(error)) => Err(reason(&error, wait)),
    }
}

#[allow(clippy::wildcard_enum_match_arm, reason = "std's enum, not ours")]
fn reason(error: &io::Error, wait: Duration) -> NoConnection {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => NoConnection::Refused,
        io::ErrorKind::TimedOut => NoConnection::NoAnswer(wait),
        io::ErrorKind::PermissionDenied => NoConnection::Forbidden,
        _ => NoConnection::Other(error.to_string()),
    }
}

async fn talk(
    addr: SocketAddr,
    tcp: TcpStream,
    prober: &Prober,
    bare: &Prober,
    bounds: Bounds,
) -> Seen {
    let answer = prober.ask_over(tcp).await;
    let (mut clear, mut without) = (None, None);
    match &answer {
        Answer::Plain | Answer::NoCertificate(_) => clear = Some(in_the_clear(addr, bounds).await),
        Answer::Tls(hello) if hello.refused_us.is_some() || hello.hung_up => {
            without = Some(bare.ask(&[addr]).await);
        }
        Answer::Tls(_) | Answer::Refused(_) | Answer::Timeout | Answer::NotAsked => {}
    }
    Seen::Talked { addr, answer, clear, bare: without }
}

/// A server of gRPC or of HTTP says which it is when it is greeted without TLS.
async fn in_the_clear(addr: SocketAddr, bounds: Bounds) -> Clear {
    let greet = async {
        let mut tcp = TcpStream::connect(addr).await?;
        tcp.write_all(PREFACE).await?;
        let mut head = [0; FRAME_HEAD_LEN];
        tcp.read_exact(&mut head).await?;
        Ok::<_, io::Error>(head)
    };
    match timeout(bounds.talk, greet).await {
        Ok(Ok(head)) if head.starts_with(b"HTTP/") => Clear::Http,
        Ok(Ok(head)) if head[3] == SETTINGS => Clear::Grpc,
        Ok(Ok(_) | Err(_)) | Err(_) => Clear::Nothing,
    }
}
