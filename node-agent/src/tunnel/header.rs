//! What a flow begins with inside TLS: 24 bytes of the client, then 4 of the server. No bytes of the
//! flow are sent before the server's answer. It reads and writes nothing but these arrays.

use std::net::{IpAddr, Ipv6Addr};

use thiserror::Error;

use super::reason::Reason;

/// The protocol, in ALPN.
pub const ALPN: &[u8] = b"raymtls-tunnel/1";
/// Bytes of a header.
pub const HEADER_LEN: usize = 24;
/// Bytes of an answer.
pub const ANSWER_LEN: usize = 4;

/// Version of header and answer.
const VERSION: u8 = 1;
const FLOW: u8 = 0;
const PING: u8 = 1;
const CONNECTED: u8 = 0;

/// What the client asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Header {
    /// A connection to this port at this address.
    Flow {
        /// The address that was dialled; IPv4 is never mapped.
        address: IpAddr,
        /// The port that was dialled.
        port: u16,
    },
    /// Nothing: the handshake has shown the certificates.
    Ping {
        /// The address that was dialled.
        address: IpAddr,
    },
}

/// Bytes that are no header, or no answer.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum HeaderError {
    /// Of another version.
    #[error("version {0} of the header is not known, {VERSION} is")]
    Version(u8),
    /// Of no kind.
    #[error("kind {0} of the header is not known")]
    Kind(u8),
    /// A flow to port 0, or a ping with a port.
    #[error("port {port} does not go with kind {kind}")]
    Port {
        /// The port.
        port: u16,
        /// The kind.
        kind: u8,
    },
    /// Bytes that must be zero are not.
    #[error("bytes that are to be zero are not")]
    NotZero,
    /// A code of a newer release.
    #[error("code {0} of the answer is not known")]
    Code(u8),
}

impl Header {
    /// As on the wire.
    #[must_use]
    pub fn encode(self) -> [u8; HEADER_LEN] {
        let (kind, address, port) = match self {
            Self::Flow { address, port } => (FLOW, address, port),
            Self::Ping { address } => (PING, address, 0),
        };
        let address = match address {
            IpAddr::V4(v4) => v4.to_ipv6_mapped(),
            IpAddr::V6(v6) => v6,
        };
        let mut bytes = [0; HEADER_LEN];
        bytes[0] = VERSION;
        bytes[1] = kind;
        bytes[2..4].copy_from_slice(&port.to_be_bytes());
        bytes[4..20].copy_from_slice(&address.octets());
        bytes
    }

    /// From the wire.
    ///
    /// # Errors
    /// See [`HeaderError`].
    pub fn parse(bytes: &[u8; HEADER_LEN]) -> Result<Self, HeaderError> {
        let [version, kind, port_high, port_low, rest @ ..] = bytes;
        if *version != VERSION {
            return Err(HeaderError::Version(*version));
        }
        let port = u16::from_be_bytes([*port_high, *port_low]);
        let (address, zeros) = rest.split_at(16);
        if zeros != [0; 4] {
            return Err(HeaderError::NotZero);
        }
        let address: [u8; 16] = address.try_into().expect("split at 16");
        let address = Ipv6Addr::from(address).to_canonical();
        match (*kind, port) {
            (FLOW, 1..) => Ok(Self::Flow { address, port }),
            (PING, 0) => Ok(Self::Ping { address }),
            (FLOW | PING, _) => Err(HeaderError::Port { port, kind: *kind }),
            _ => Err(HeaderError::Kind(*kind)),
        }
    }

    /// The address that was dialled.
    #[must_use]
    pub fn address(self) -> IpAddr {
        match self {
            Self::Flow { address, .. } | Self::Ping { address } => address,
        }
    }
}

/// The server's answer on the wire: connected, or why not.
#[must_use]
pub fn encode_answer(answer: Result<(), Reason>) -> [u8; ANSWER_LEN] {
    [VERSION, answer.map_or_else(Reason::code, |()| CONNECTED), 0, 0]
}

/// The server's answer.
///
/// # Errors
/// See [`HeaderError`].
pub fn parse_answer(bytes: [u8; ANSWER_LEN]) -> Result<Result<(), Reason>, HeaderError> {
    match bytes {
        [VERSION, CONNECTED, 0, 0] => Ok(Ok(())),
        [VERSION, code, 0, 0] => Reason::from_code(code).map(Err).ok_or(HeaderError::Code(code)),
        [VERSION, ..] => Err(HeaderError::NotZero),
        [version, ..] => Err(HeaderError::Version(version)),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn flow(address: &str, port: u16) -> Header {
        Header::Flow { address: address.parse().unwrap(), port }
    }

    #[test]
    fn a_header_is_these_bytes() {
        let bytes = flow("192.0.2.7", 6379).encode();
        assert_eq!(hex::encode(bytes), "010018eb00000000000000000000ffffc000020700000000");
        let ping = Header::Ping { address: "2001:db8::1".parse().unwrap() };
        assert_eq!(hex::encode(ping.encode()), "0101000020010db800000000000000000000000100000000");
    }

    #[test]
    fn what_is_no_header_is_refused_with_its_fault() {
        let good = flow("192.0.2.7", 6379).encode();
        for (at, byte, error) in [
            (0, 2, HeaderError::Version(2)),
            (1, 2, HeaderError::Kind(2)),
            (1, 1, HeaderError::Port { port: 6379, kind: 1 }),
            (20, 1, HeaderError::NotZero),
            (23, 1, HeaderError::NotZero),
        ] {
            let mut bytes = good;
            bytes[at] = byte;
            assert_eq!(Header::parse(&bytes), Err(error), "byte {at}");
        }
        let mut port_zero = good;
        port_zero[2..4].fill(0);
        assert_eq!(Header::parse(&port_zero), Err(HeaderError::Port { port: 0, kind: 0 }));
    }

    #[test]
    fn an_answer_comes_back() {
        assert_eq!(parse_answer(encode_answer(Ok(()))), Ok(Ok(())));
        for reason in Reason::ALL {
            assert_eq!(parse_answer(encode_answer(Err(*reason))), Ok(Err(*reason)));
        }
        assert_eq!(parse_answer([1, 250, 0, 0]), Err(HeaderError::Code(250)));
        assert_eq!(parse_answer([1, 0, 0, 1]), Err(HeaderError::NotZero));
        assert_eq!(parse_answer([2, 0, 0, 0]), Err(HeaderError::Version(2)));
    }

    proptest! {
        #[test]
        fn what_is_parsed_encodes_to_the_same_bytes(bytes in any::<[u8; HEADER_LEN]>()) {
            let mut bytes = bytes;
            bytes[0] = 1;
            bytes[1] &= 1;
            bytes[20..].fill(0);
            if let Ok(header) = Header::parse(&bytes) {
                prop_assert_eq!(header.encode(), bytes);
            }
        }
    }
}
