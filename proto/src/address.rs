//! Addresses a node may be certified for. One canonical form: IPv4-mapped IPv6 is unfolded, scope
//! and port never appear.

use std::{fmt, net::IpAddr, str::FromStr};

use ipnet::IpNet;
use thiserror::Error;

/// Why an address cannot be certified.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum AddressError {
    /// No IPv4 or IPv6 literal.
    #[error("{0:?} is not an IP address")]
    Form(String),
    /// Means another machine to every reader.
    #[error("{0} is {1}: a node cannot be known by it")]
    Kind(IpAddr, &'static str),
    /// No CIDR range.
    #[error("{0:?} is not an address range such as 10.0.0.0/24")]
    Range(String),
}

/// An address a node can be reached at: canonical and routable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeAddress(IpAddr);

impl NodeAddress {
    /// Takes an address in its canonical form.
    ///
    /// # Errors
    /// Loopback, link-local, multicast and unspecified addresses.
    pub fn new(address: IpAddr) -> Result<Self, AddressError> {
        let address = address.to_canonical();
        let kind = if address.is_loopback() {
            "a loopback address"
        } else if address.is_unspecified() {
            "the unspecified address"
        } else if address.is_multicast() {
            "a multicast address"
        } else if is_link_local(address) {
            "a link-local address"
        } else if is_no_machine(address) {
            "a reserved address"
        } else {
            return Ok(Self(address));
        };
        Err(AddressError::Kind(address, kind))
    }

    /// The address.
    #[must_use]
    pub fn ip(self) -> IpAddr {
        self.0
    }
}

impl FromStr for NodeAddress {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let address = text
            .parse::<IpAddr>()
            .map_err(|_| AddressError::Form(text.chars().take(80).collect()))?;
        Self::new(address)
    }
}

impl fmt::Display for NodeAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A range of addresses: CIDR, or one address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AddressRange(IpNet);

impl AddressRange {
    /// Whether the address lies in the range. Families do not mix.
    #[must_use]
    pub fn contains(&self, address: NodeAddress) -> bool {
        self.0.contains(&address.ip())
    }
}

impl FromStr for AddressRange {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let bad = || AddressError::Range(text.chars().take(80).collect());
        let net = text
            .parse::<IpNet>()
            .or_else(|_| text.parse::<IpAddr>().map(|one| IpNet::from(one.to_canonical())))
            .map_err(|_| bad())?;
        // Addresses are compared unfolded, so a mapped range would never hold one.
        let mapped = matches!(net.network(), IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some());
        if mapped && net.prefix_len() != 0 { Err(bad()) } else { Ok(Self(net.trunc())) }
    }
}

impl fmt::Display for AddressRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

fn is_link_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    }
}

/// "This network", the limited broadcast, and IPv6 that embeds IPv4 in the form RFC 4291 2.5.5.1
/// gave up.
fn is_no_machine(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4.octets()[0] == 0 || v4.is_broadcast(),
        IpAddr::V6(v6) => v6.segments()[..6] == [0; 6],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mapped_addresses_unfold() {
        let mapped: NodeAddress = "::ffff:10.0.0.1".parse().unwrap();
        assert_eq!(mapped.to_string(), "10.0.0.1");
        assert!("10.0.0.0/24".parse::<AddressRange>().unwrap().contains(mapped));
    }

    #[test]
    fn addresses_that_name_no_machine_are_refused() {
        for bad in [
            "127.0.0.1",
            "::1",
            "0.0.0.0",
            "::",
            "224.0.0.1",
            "ff02::1",
            "169.254.1.1",
            "fe80::1",
            "::ffff:127.0.0.1",
            "255.255.255.255",
            "0.1.2.3",
            "::7f00:1",
            "10.0.0",
            "10.0.0.1:80",
            "fe80::1%eth0",
            "",
        ] {
            assert!(bad.parse::<NodeAddress>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn ranges_at_their_edges() {
        let range: AddressRange = "10.0.0.128/25".parse().unwrap();
        let inside = |text: &str| range.contains(text.parse().unwrap());
        assert!(inside("10.0.0.128") && inside("10.0.0.255"));
        assert!(!inside("10.0.0.127") && !inside("10.0.1.0") && !inside("fd00::1"));
        assert!("10.0.0.5".parse::<AddressRange>().unwrap().contains("10.0.0.5".parse().unwrap()));
        for bad in ["10.0.0.0/33", "::ffff:10.0.0.0/104", "10.0.0.0-10.0.0.9", ""] {
            assert!(bad.parse::<AddressRange>().is_err(), "{bad}");
        }
    }
}
