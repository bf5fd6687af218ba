//! The TLS leg until it carries a flow: handshake, header, answer, each bounded in bytes; the bound in
//! time is the caller's. What comes after is in `splice`.

use std::{io, time::Duration};

use rustls::Error;
use thiserror::Error;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use super::{
    header::ALPN,
    reason::{Reason, Refused},
    refusals,
    session::{Session, sealed_len_max},
};

/// Most bytes of a handshake that wait to be understood.
const CARRY_LEN_MAX: usize = 64 * 1024;
/// Room for each read of a handshake.
const READ_LEN: usize = 4 * 1024;
/// How long the last words may take to arrive before the connection is reset.
const LAST_WORDS_TIME_MAX: Duration = Duration::from_secs(1);

/// Why it broke off.
#[derive(Debug, Error)]
pub(crate) enum WireError {
    /// TLS.
    #[error(transparent)]
    Tls(#[from] Error),
    /// The system.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The peer went away.
    #[error("the peer closed the connection")]
    Eof,
}

impl WireError {
    pub(crate) fn refused(&self) -> Refused {
        match self {
            Self::Tls(error) => refusals::of_tls(error),
            Self::Io(_) | Self::Eof => Refused::new(Reason::NoTls, self.to_string()),
        }
    }
}

/// A TLS connection to another node.
#[derive(Debug)]
pub(crate) struct Wire {
    pub(crate) tcp: TcpStream,
    pub(crate) session: Box<Session>,
    /// Read from the socket, not yet a whole record.
    pub(crate) carry: Vec<u8>,
    /// Decrypted, not yet taken.
    pub(crate) plain: Vec<u8>,
    /// Encrypted, not yet sent.
    pub(crate) out: Vec<u8>,
    /// The peer said that nothing more comes.
    pub(crate) is_closed: bool,
}

impl Wire {
    pub(crate) fn new(tcp: TcpStream, session: Box<Session>) -> Self {
        let (carry, plain, out) = (Vec::new(), Vec::new(), Vec::new());
        Self { tcp, session, carry, plain, out, is_closed: false }
    }

    /// Up to where both ends may send.
    ///
    /// # Errors
    /// See [`WireError`]. An alert has been sent.
    pub(crate) async fn handshake(&mut self) -> Result<(), WireError> {
        loop {
            self.turn().await?;
            if !self.session.common().is_handshaking() {
                break;
            }
            self.read().await?;
        }
        if self.session.common().alpn_protocol() != Some(ALPN) {
            return Err(WireError::Tls(Error::NoApplicationProtocol));
        }
        Ok(())
    }

    /// The leaf the peer showed.
    pub(crate) fn peer_leaf(&self) -> Option<&[u8]> {
        self.session.common().peer_certificates()?.first().map(AsRef::as_ref)
    }

    /// The next bytes the peer sent.
    ///
    /// # Errors
    /// See [`WireError`].
    pub(crate) async fn receive<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        while self.plain.len() < N {
            if self.is_closed {
                return Err(WireError::Eof);
            }
            self.read().await?;
            self.turn().await?;
        }
        let rest = self.plain.split_off(N);
        let taken = std::mem::replace(&mut self.plain, rest);
        Ok(taken.try_into().expect("cut at that length"))
    }

    /// Sends these.
    ///
    /// # Errors
    /// See [`WireError`].
    pub(crate) async fn send(&mut self, plain: &[u8]) -> Result<(), WireError> {
        let at = self.out.len();
        self.out.resize(at + sealed_len_max(plain.len()), 0);
        let written = self.session.encrypt(&mut self.carry, plain, &mut self.out[at..])?;
        self.out.truncate(at + written);
        self.flush().await
    }

    /// Ends it in order: what was sent last arrives, whatever the peer still sends.
    pub(crate) async fn finish(mut self) {
        let mut end = [0; sealed_len_max(0)];
        if let Ok(written) = self.session.close(&mut self.carry, &mut end) {
            self.out.extend_from_slice(&end[..written]);
        }
        let _ = self.flush().await;
        self.linger().await;
    }

    /// A close with bytes unread becomes a reset, which may overtake what was sent: so they are read.
    pub(crate) async fn linger(mut self) {
        let reading = async {
            let _ = self.tcp.shutdown().await;
            let mut left = CARRY_LEN_MAX;
            let mut buffer = [0; 512];
            while let Ok(read @ 1..) = self.tcp.read(&mut buffer).await {
                left = left.saturating_sub(read);
                if left == 0 {
                    break;
                }
            }
        };
        let _ = tokio::time::timeout(LAST_WORDS_TIME_MAX, reading).await;
    }

    async fn read(&mut self) -> Result<(), WireError> {
        if self.carry.len() >= CARRY_LEN_MAX {
            return Err(WireError::Tls(Error::General("too many bytes before a record".into())));
        }
        self.carry.reserve(READ_LEN);
        match self.tcp.read_buf(&mut self.carry).await? {
            0 => Err(WireError::Eof),
            _ => Ok(()),
        }
    }

    async fn turn(&mut self) -> Result<(), WireError> {
        let Self { session, carry, plain, out, .. } = self;
        match session.turn(carry, |bytes| plain.extend_from_slice(bytes), out) {
            Ok(turned) => {
                carry.drain(..turned.used);
                self.is_closed |= turned.is_closed;
                self.flush().await
            }
            Err(error) => {
                session.last_words(out);
                let _ = self.flush().await;
                Err(error.into())
            }
        }
    }

    async fn flush(&mut self) -> Result<(), WireError> {
        if !self.out.is_empty() {
            self.tcp.write_all(&self.out).await?;
            self.out.clear();
        }
        Ok(())
    }
}
