//! What this host needs to live: its own addresses, its gateways, and where the CA is. It reads and
//! changes nothing; what cannot be read is left out, and the CA's own list is the first lock.

use std::{
    collections::BTreeSet,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

/// How long the name of an endpoint may take to be looked up.
const LOOKUP_TIME_MAX: Duration = Duration::from_secs(5);
/// Most addresses that are kept of all endpoints.
pub const ADDRESSES_MAX: usize = 64;
/// A default route that is up and goes by a gateway (RTF_UP, RTF_GATEWAY of route(8)).
const UP_BY_GATEWAY: u32 = 0x3;

/// The host's own addresses.
///
/// # Errors
/// The system's.
pub fn own_addresses() -> io::Result<BTreeSet<IpAddr>> {
    Ok(if_addrs::get_if_addrs()?.into_iter().map(|interface| interface.ip()).collect())
}

/// The gateways of the default routes.
#[must_use]
pub fn gateways() -> BTreeSet<IpAddr> {
    let read = |path| std::fs::read_to_string(path).unwrap_or_default();
    let v4 = parse_routes4(&read("/proc/net/route"));
    v4.into_iter().chain(parse_routes6(&read("/proc/net/ipv6_route"))).collect()
}

/// The addresses among `host:port` that need no lookup.
#[must_use]
pub fn literal_addresses(endpoints: &[String]) -> BTreeSet<IpAddr> {
    let literal = |endpoint: &String| endpoint.parse::<SocketAddr>().ok();
    endpoints.iter().filter_map(literal).map(|address| address.ip().to_canonical()).collect()
}

/// The addresses behind `host:port`, and whether each of them was found.
pub async fn resolve(endpoints: &[String]) -> (BTreeSet<IpAddr>, bool) {
    let mut found = literal_addresses(endpoints);
    let mut all = true;
    for endpoint in endpoints {
        let looked_up = tokio::time::timeout(LOOKUP_TIME_MAX, tokio::net::lookup_host(endpoint));
        match looked_up.await {
            Ok(Ok(addresses)) => found.extend(addresses.map(|at| at.ip().to_canonical())),
            Ok(Err(_)) | Err(_) => all = false,
        }
    }
    (found.into_iter().take(ADDRESSES_MAX).collect(), all)
}

/// `/proc/net/route`: numbers of four bytes in hexadecimal, in the order of this host's memory.
fn parse_routes4(text: &str) -> Vec<IpAddr> {
    let hex = |field: Option<&&str>| u32::from_str_radix(field?, 16).ok();
    let route = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let (to, by) = (hex(fields.get(1))?, hex(fields.get(2))?);
        let (flags, mask) = (hex(fields.get(3))?, hex(fields.get(7))?);
        let is_default = to == 0 && mask == 0 && flags & UP_BY_GATEWAY == UP_BY_GATEWAY;
        is_default.then(|| IpAddr::V4(Ipv4Addr::from(by.to_ne_bytes())))
    };
    text.lines().skip(1).filter_map(route).collect()
}

/// `/proc/net/ipv6_route`: destination, its length, source, its length, next hop, metric, two
/// counters, flags, interface.
fn parse_routes6(text: &str) -> Vec<IpAddr> {
    let route = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let to = u128::from_str_radix(fields.first()?, 16).ok()?;
        let by = u128::from_str_radix(fields.get(4)?, 16).ok()?;
        let flags = u32::from_str_radix(fields.get(8)?, 16).ok()?;
        let is_default = to == 0 && *fields.get(1)? == "00";
        (is_default && by != 0 && flags & UP_BY_GATEWAY == UP_BY_GATEWAY)
            .then(|| IpAddr::V6(Ipv6Addr::from(by)))
    };
    text.lines().filter_map(route).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gateways_are_those_of_default_routes_alone() {
        let routes4 = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\n\
            eth0\t00000000\t010200C0\t0003\t0\t0\t0\t00000000\t0\n\
            eth0\t000200C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\n\
            eth1\t0000000A\t0100000A\t0003\t0\t0\t0\t000000FF\t0\n\
            down\t00000000\t0909090A\t0002\t0\t0\t0\t00000000\t0\nnonsense\n";
        let wanted = [IpAddr::from([192, 0, 2, 1])];
        if cfg!(target_endian = "little") {
            assert_eq!(parse_routes4(routes4), wanted);
        }
        let none = "00000000000000000000000000000000";
        let routes6 = format!(
            "fd000000000000000000000000000000 40 {none} 00 {none} 00000100 1 0 00000001 eth0\n\
             {none} 00 {none} 00 fe800000000000000000000000000001 00000400 2 0 00000003 eth0\n\
             {none} 00 {none} 00 {none} ffffffff 1 0 00200200 lo\nnonsense\n"
        );
        assert_eq!(parse_routes6(&routes6), ["fe80::1".parse::<IpAddr>().unwrap()]);
    }

    #[tokio::test]
    async fn endpoints_by_number_need_no_lookup_and_names_have_one() {
        let endpoints = ["192.0.2.7:7444", "[::ffff:192.0.2.8]:1", "localhost:7444", "nonsense"];
        let endpoints = endpoints.map(str::to_owned);
        let literal = literal_addresses(&endpoints);
        let v4 = |last| IpAddr::from([192, 0, 2, last]);
        assert_eq!(literal, BTreeSet::from([v4(7), v4(8)]));
        let (found, all) = resolve(&endpoints).await;
        assert!(!all, "nonsense was found");
        assert!(found.is_superset(&literal) && found.iter().any(IpAddr::is_loopback), "{found:?}");
    }

    #[test]
    fn the_host_knows_its_own_addresses() {
        assert!(own_addresses().unwrap().iter().any(IpAddr::is_loopback));
    }
}
