//! TLS over buffers that are ours: rustls decrypts in the buffer the socket was read into and
//! encrypts into the one that is written from, so that an idle flow holds none. No socket here.

use std::sync::Arc;

use rustls::{
    ClientConfig, CommonState, Error, ServerConfig,
    client::UnbufferedClientConnection,
    pki_types::ServerName,
    server::UnbufferedServerConnection,
    unbuffered::{ConnectionState, EncodeError, EncryptError},
};

/// Plaintext of one record (RFC 8446 5.1).
const RECORD_LEN_MAX: usize = 1 << 14;
/// Header, content type and tag of a record.
const RECORD_OVERHEAD: usize = 5 + 1 + 16;
/// A key update, or an alert, that rustls may want to send before.
const BETWEEN_LEN_MAX: usize = 128;

/// A connection, of either end.
pub(crate) enum Session {
    Client(UnbufferedClientConnection),
    Server(UnbufferedServerConnection),
}

/// How far the records in a buffer led.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Turned {
    /// Bytes at the front that are done with.
    pub(crate) used: usize,
    /// The peer said that nothing more comes.
    pub(crate) is_closed: bool,
}

macro_rules! turn {
    ($conn:expr, $incoming:expr, $plain:expr, $out:expr) => {{
        let mut turned = Turned::default();
        loop {
            let status = $conn.process_tls_records(&mut $incoming[turned.used..]);
            let mut used = status.discard;
            let mut goes_on = true;
            match status.state? {
                ConnectionState::ReadTraffic(mut records) => {
                    while let Some(record) = records.next_record() {
                        let record = record?;
                        $plain(record.payload);
                        used += record.discard;
                    }
                }
                ConnectionState::EncodeTlsData(mut data) => {
                    encode(|buffer| data.encode(buffer), &mut *$out)?;
                }
                // It stands in `out`, which is sent before anything that comes after it.
                ConnectionState::TransmitTlsData(data) => data.done(),
                ConnectionState::PeerClosed => turned.is_closed = true,
                ConnectionState::Closed
                | ConnectionState::BlockedHandshake
                | ConnectionState::WriteTraffic(_) => goes_on = false,
                ConnectionState::ReadEarlyData(_) => return Err(unexpected("early data")),
                _ => return Err(unexpected("a state that is not known")),
            }
            turned.used += used;
            if !goes_on {
                break Ok(turned);
            }
        }
    }};
}

/// What is queued, and nothing that would look at records.
macro_rules! queued {
    ($conn:expr, $out:expr) => {
        while $conn.wants_write() {
            match $conn.process_tls_records(&mut []).state {
                Ok(ConnectionState::EncodeTlsData(mut data)) => {
                    if encode(|buffer| data.encode(buffer), &mut *$out).is_err() {
                        return;
                    }
                }
                Ok(_) | Err(_) => return,
            }
        }
    };
}

macro_rules! encrypt {
    ($conn:expr, $carry:expr, $plain:expr, $out:expr) => {{
        let mut written = 0;
        loop {
            match $conn.process_tls_records($carry).state? {
                ConnectionState::EncodeTlsData(mut data) => {
                    written += data.encode(&mut $out[written..]).map_err(|e| too_small(&e))?;
                }
                ConnectionState::TransmitTlsData(data) => data.done(),
                ConnectionState::WriteTraffic(mut traffic) => {
                    written += match $plain {
                        Some(plain) => traffic.encrypt(plain, &mut $out[written..]),
                        None => traffic.queue_close_notify(&mut $out[written..]),
                    }
                    .map_err(|e| not_encrypted(&e))?;
                    break Ok(written);
                }
                ConnectionState::PeerClosed => {}
                ConnectionState::Closed => break Ok(written),
                ConnectionState::BlockedHandshake
                | ConnectionState::ReadTraffic(_)
                | ConnectionState::ReadEarlyData(_) => {
                    return Err(unexpected("no place to write"));
                }
                _ => return Err(unexpected("a state that is not known")),
            }
        }
    }};
}

impl Session {
    /// Of who dials.
    ///
    /// # Errors
    /// rustls'.
    pub(crate) fn client(
        config: Arc<ClientConfig>,
        name: ServerName<'static>,
    ) -> Result<Box<Self>, Error> {
        Ok(Box::new(Self::Client(UnbufferedClientConnection::new(config, name)?)))
    }

    /// Of who is dialled.
    ///
    /// # Errors
    /// rustls'.
    pub(crate) fn server(config: Arc<ServerConfig>) -> Result<Box<Self>, Error> {
        Ok(Box::new(Self::Server(UnbufferedServerConnection::new(config)?)))
    }

    /// What both ends have.
    pub(crate) fn common(&self) -> &CommonState {
        match self {
            Self::Client(conn) => conn,
            Self::Server(conn) => conn,
        }
    }

    /// Works through the whole records in `incoming`. Plaintext goes to `plain`; what TLS itself
    /// wants to send is put behind `out`.
    ///
    /// # Errors
    /// rustls'; an alert about it stands in `out` after [`Session::last_words`].
    pub(crate) fn turn(
        &mut self,
        incoming: &mut [u8],
        mut plain: impl FnMut(&[u8]),
        out: &mut Vec<u8>,
    ) -> Result<Turned, Error> {
        match self {
            Self::Client(conn) => turn!(conn, incoming, plain, out),
            Self::Server(conn) => turn!(conn, incoming, plain, out),
        }
    }

    /// The alert about an error that [`Session::turn`] returned.
    pub(crate) fn last_words(&mut self, out: &mut Vec<u8>) {
        match self {
            Self::Client(conn) => queued!(conn, out),
            Self::Server(conn) => queued!(conn, out),
        }
    }

    /// Encrypts into the front of `out`, which is at least [`sealed_len_max`] long; returns how
    /// much of it is filled. `carry` is what the last turn left of `incoming`: rustls remembers
    /// where in it the beginning of a message lies, and panics where that is gone.
    ///
    /// # Errors
    /// rustls'.
    pub(crate) fn encrypt(
        &mut self,
        carry: &mut [u8],
        plain: &[u8],
        out: &mut [u8],
    ) -> Result<usize, Error> {
        let plain = Some(plain);
        match self {
            Self::Client(conn) => encrypt!(conn, carry, plain, out),
            Self::Server(conn) => encrypt!(conn, carry, plain, out),
        }
    }

    /// Says that nothing more comes.
    ///
    /// # Errors
    /// rustls'.
    pub(crate) fn close(&mut self, carry: &mut [u8], out: &mut [u8]) -> Result<usize, Error> {
        let plain: Option<&[u8]> = None;
        match self {
            Self::Client(conn) => encrypt!(conn, carry, plain, out),
            Self::Server(conn) => encrypt!(conn, carry, plain, out),
        }
    }
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Session(..)")
    }
}

/// Most bytes that so much plaintext becomes.
pub(crate) const fn sealed_len_max(plain_len: usize) -> usize {
    plain_len + (plain_len / RECORD_LEN_MAX + 1) * RECORD_OVERHEAD + BETWEEN_LEN_MAX
}

fn encode(
    mut encode: impl FnMut(&mut [u8]) -> Result<usize, EncodeError>,
    out: &mut Vec<u8>,
) -> Result<(), Error> {
    let at = out.len();
    let mut len = BETWEEN_LEN_MAX;
    loop {
        out.resize(at + len, 0);
        match encode(&mut out[at..]) {
            Ok(written) => {
                out.truncate(at + written);
                return Ok(());
            }
            Err(EncodeError::InsufficientSize(needed)) if needed.required_size > len => {
                len = needed.required_size;
            }
            Err(error) => return Err(too_small(&error)),
        }
    }
}

fn unexpected(what: &str) -> Error {
    Error::General(format!("unexpected: {what}"))
}

fn too_small(error: &EncodeError) -> Error {
    Error::General(error.to_string())
}

fn not_encrypted(error: &EncryptError) -> Error {
    Error::General(error.to_string())
}
