//! The PROXY protocol, version 2 and TCP alone: how a balancer says whose connection it passes on,
//! before TLS begins. Believed only from configured addresses, and required from them.
//!
//! Sixteen fixed bytes and two addresses are read here; what follows them (TLVs) is skipped, and a
//! checksum in it is not looked at: TCP and a trusted sender vouch for the header. Version 1, UDP and
//! unix sockets are refused.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use ipnet::IpNet;
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncReadExt};

/// Longest header, in bytes: addresses and a few hundred bytes of TLVs.
pub const HEADER_LEN_MAX: usize = 1_024;
/// Ranges of trusted proxies at most.
pub const RANGES_MAX: usize = 64;

/// What every header begins with.
const SIGNATURE: &[u8; 12] = b"\r\n\r\n\0\r\nQUIT\n";
/// Signature, version and command, family and protocol, length of the rest.
const FIXED_LEN: usize = 16;
const VERSION_2: u8 = 0x20;
const LOCAL: u8 = 0x0;
const PROXY: u8 = 0x1;
const TCP_OVER_IPV4: u8 = 0x11;
const TCP_OVER_IPV6: u8 = 0x21;
/// Both addresses and both ports.
const IPV4_LEN: usize = 12;
const IPV6_LEN: usize = 36;

/// Whose connection it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The balancer's own: a health check.
    Own,
    /// A client's, in canonical form.
    Client(IpAddr),
}

/// A header and where it ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Whose connection it is.
    pub source: Source,
    /// Bytes of the header.
    pub len: usize,
}

/// Why bytes are no header.
#[derive(Debug, Error)]
pub enum ProxyError {
    /// There is more to come: as many bytes are needed in all.
    #[error("the header has {0} bytes and ends before")]
    Short(usize),
    /// No header of version 2.
    #[error("it does not begin with a PROXY protocol header of version 2")]
    NotAHeader,
    /// Neither LOCAL nor PROXY.
    #[error("command {0} is neither LOCAL nor PROXY")]
    Command(u8),
    /// Something other than TCP over IP.
    #[error("family and protocol {0:#04x} are not TCP over IPv4 or IPv6")]
    Family(u8),
    /// Too long.
    #[error("a header of {0} bytes is longer than {HEADER_LEN_MAX}")]
    TooLong(usize),
    /// The addresses do not fit.
    #[error("{0} bytes are too few for the addresses of its family")]
    Addresses(usize),
    /// The connection.
    #[error(transparent)]
    Read(#[from] io::Error),
}

/// Reads a header from the front of `bytes`.
///
/// # Errors
/// See [`ProxyError`]; `Short` names how many bytes are needed to go on.
pub fn parse(bytes: &[u8]) -> Result<Header, ProxyError> {
    let begun = bytes.len().min(SIGNATURE.len());
    if bytes[..begun] != SIGNATURE[..begun] {
        return Err(ProxyError::NotAHeader);
    }
    let Some(fixed) = bytes.first_chunk::<FIXED_LEN>() else {
        return Err(ProxyError::Short(FIXED_LEN));
    };
    let [.., version_command, family, len_high, len_low] = *fixed;
    if version_command & 0xf0 != VERSION_2 {
        return Err(ProxyError::NotAHeader);
    }
    let command = version_command & 0x0f;
    if command != LOCAL && command != PROXY {
        return Err(ProxyError::Command(command));
    }
    let len = FIXED_LEN + usize::from(u16::from_be_bytes([len_high, len_low]));
    if len > HEADER_LEN_MAX {
        return Err(ProxyError::TooLong(len));
    }
    let rest = bytes.get(FIXED_LEN..len).ok_or(ProxyError::Short(len))?;
    // What a health check says of addresses is to be ignored.
    let source = if command == LOCAL { Source::Own } else { client(family, rest)? };
    Ok(Header { source, len })
}

fn client(family: u8, rest: &[u8]) -> Result<Source, ProxyError> {
    let too_few = ProxyError::Addresses(rest.len());
    let address: IpAddr = match family {
        TCP_OVER_IPV4 => {
            let block = rest.first_chunk::<IPV4_LEN>().ok_or(too_few)?;
            let [a, b, c, d, ..] = *block;
            Ipv4Addr::new(a, b, c, d).into()
        }
        TCP_OVER_IPV6 => {
            let block = rest.first_chunk::<IPV6_LEN>().ok_or(too_few)?;
            let source: [u8; 16] = *block.first_chunk().expect("36 bytes hold 16");
            Ipv6Addr::from(source).into()
        }
        other => return Err(ProxyError::Family(other)),
    };
    Ok(Source::Client(address.to_canonical()))
}

/// Reads a header and not a byte more.
///
/// # Errors
/// See [`ProxyError`].
pub async fn read(stream: &mut (impl AsyncRead + Unpin)) -> Result<Source, ProxyError> {
    let mut bytes = vec![0; FIXED_LEN];
    stream.read_exact(&mut bytes).await?;
    loop {
        match parse(&bytes) {
            Ok(header) => return Ok(header.source),
            Err(ProxyError::Short(len)) => {
                let begun = bytes.len();
                bytes.resize(len, 0);
                stream.read_exact(&mut bytes[begun..]).await?;
            }
            Err(error) => return Err(error),
        }
    }
}

/// Addresses of balancers whose headers are believed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TrustedProxies(Vec<IpNet>);

impl TrustedProxies {
    /// Takes ranges or single addresses.
    ///
    /// # Errors
    /// What is no range, or one that would believe anybody.
    pub fn parse(texts: &[String]) -> Result<Self, String> {
        if texts.len() > RANGES_MAX {
            return Err(format!("at most {RANGES_MAX} ranges"));
        }
        texts.iter().map(|text| range(text)).collect::<Result<_, _>>().map(Self)
    }

    /// Whether a header from there is believed, and required.
    #[must_use]
    pub fn contains(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        self.0.iter().any(|range| range.contains(&address))
    }
}

fn range(text: &str) -> Result<IpNet, String> {
    let parsed = text.parse::<IpNet>();
    let range = parsed
        .or_else(|_| text.parse::<IpAddr>().map(|one| IpNet::from(one.to_canonical())))
        .map_err(|_| format!("{text:?} is not an address range such as 10.0.0.0/24"))?;
    // Addresses are compared unfolded, so a mapped range would never hold one.
    let mapped = matches!(range.network(), IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some());
    if range.prefix_len() == 0 || mapped {
        return Err(format!(
            "{text:?} would let anybody say where they come from, or nobody: \
             name the balancers' own addresses"
        ));
    }
    Ok(range.trunc())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn header(version_command: u8, family: u8, rest: &[u8]) -> Vec<u8> {
        let len = u16::try_from(rest.len()).unwrap().to_be_bytes();
        [SIGNATURE, &[version_command, family][..], &len, rest].concat()
    }

    fn ipv4(source: [u8; 4]) -> Vec<u8> {
        [&source[..], &[192, 0, 2, 1], &[0x30, 0x39], &[0x1d, 0x13]].concat()
    }

    fn ipv6(source: &str) -> Vec<u8> {
        let source: Ipv6Addr = source.parse().unwrap();
        [&source.octets()[..], &[0; 16], &[0, 1, 0, 2]].concat()
    }

    #[test]
    fn headers_well_and_badly_formed() {
        let client = |text: &str| format!("Client({text})");
        let with_tlvs = [ipv4([10, 0, 0, 7]), vec![0x04, 0, 2, 0, 0]].concat();
        let mut longest = ipv4([10, 0, 0, 7]);
        longest.resize(HEADER_LEN_MAX - FIXED_LEN, 0);
        let mut too_long = longest.clone();
        too_long.push(0);
        let mut wrong_signature = header(0x21, 0x11, &ipv4([10, 0, 0, 7]));
        wrong_signature[11] = b'\r';
        let good = header(0x21, 0x11, &ipv4([10, 0, 0, 7]));
        let rows: [(&str, Vec<u8>, String); 20] = [
            ("IPv4", good.clone(), client("10.0.0.7")),
            ("IPv6", header(0x21, 0x21, &ipv6("2001:db8::7")), client("2001:db8::7")),
            ("mapped", header(0x21, 0x21, &ipv6("::ffff:10.0.0.7")), client("10.0.0.7")),
            ("with TLVs", header(0x21, 0x11, &with_tlvs), client("10.0.0.7")),
            ("as long as may be", header(0x21, 0x11, &longest), client("10.0.0.7")),
            ("health check", header(0x20, 0x00, &[]), "Own".to_owned()),
            ("health check with addresses", header(0x20, 0x11, &ipv4([10, 0, 0, 7])), "Own".into()),
            ("TLS follows", [&good[..], b"\x16\x03\x01"].concat(), client("10.0.0.7")),
            ("nothing", vec![], "Short(16)".into()),
            ("signature alone", SIGNATURE.to_vec(), "Short(16)".into()),
            ("cut in the addresses", good[..20].to_vec(), "Short(28)".into()),
            ("TLS at once", b"\x16\x03\x01\x02\x00\x01".to_vec(), "NotAHeader".into()),
            ("version 1", b"PROXY TCP4 10.0.0.7 ".to_vec(), "NotAHeader".into()),
            ("wrong signature", wrong_signature, "NotAHeader".into()),
            ("version 3", header(0x31, 0x11, &ipv4([10, 0, 0, 7])), "NotAHeader".into()),
            ("unknown command", header(0x22, 0x11, &ipv4([10, 0, 0, 7])), "Command(2)".into()),
            ("UDP", header(0x21, 0x12, &ipv4([10, 0, 0, 7])), "Family(18)".into()),
            ("no address", header(0x21, 0x00, &[]), "Family(0)".into()),
            (
                "addresses too short",
                header(0x21, 0x21, &ipv4([10, 0, 0, 7])),
                "Addresses(12)".into(),
            ),
            ("too long", header(0x21, 0x11, &too_long), "TooLong(1025)".into()),
        ];
        for (what, bytes, expected) in rows {
            let said = match parse(&bytes) {
                Ok(header) => format!("{:?}", header.source),
                Err(error) => format!("{error:?}"),
            };
            assert_eq!(said, expected, "{what}");
        }
    }

    #[tokio::test]
    async fn not_a_byte_of_what_follows_is_taken() {
        let tlvs = [ipv4([10, 0, 0, 7]), vec![0xee; 100]].concat();
        let stream = [header(0x21, 0x11, &tlvs), b"TLS".to_vec()].concat();
        let mut stream = &stream[..];
        let source = read(&mut stream).await.unwrap();
        assert_eq!(source, Source::Client("10.0.0.7".parse().unwrap()));
        assert_eq!(stream, b"TLS");
    }

    #[test]
    fn ranges_that_would_believe_anybody_are_refused() {
        let parse = |text: &str| TrustedProxies::parse(&[text.to_owned()]);
        for bad in ["0.0.0.0/0", "::/0", "::ffff:10.0.0.0/104", "10.0.0.0/33", "balancer", ""] {
            assert!(parse(bad).is_err(), "{bad}");
        }
        assert!(TrustedProxies::parse(&vec!["10.0.0.1".to_owned(); RANGES_MAX + 1]).is_err());
        let proxies = parse("127.0.0.0/30").unwrap();
        let contains = |text: &str| proxies.contains(text.parse().unwrap());
        assert!(contains("127.0.0.1") && contains("::ffff:127.0.0.2"));
        assert!(!contains("127.0.0.4") && !contains("::1"));
        assert!(parse("10.0.0.1").unwrap().contains("10.0.0.1".parse().unwrap()));
    }

    proptest! {
        #[test]
        fn whatever_comes_is_a_header_or_an_error(
            mut bytes in prop::collection::vec(any::<u8>(), 0..1_200),
            signed in any::<bool>(),
        ) {
            if signed && bytes.len() >= SIGNATURE.len() {
                bytes[..SIGNATURE.len()].copy_from_slice(SIGNATURE);
            }
            match parse(&bytes) {
                Ok(header) => prop_assert!(header.len <= bytes.len()),
                Err(ProxyError::Short(len)) => {
                    prop_assert!(len > bytes.len() && len <= HEADER_LEN_MAX);
                }
                Err(_) => {}
            }
        }
    }
}
