//! What this host needs to live: its own addresses, its gateways, and where the CA is by number. It reads
//! and changes nothing, and asks no name server, whose word would spare whom it names; what cannot be read is left out, and the CA's own list is the first lock.

use std::{
    collections::BTreeSet,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use serde::Deserialize;

use super::table::Kernel;

/// Most gateways that are kept.
const GATEWAYS_MAX: usize = 256;
/// A route that is up and goes by a gateway (RTF_UP, RTF_GATEWAY of route(8)).
const UP_BY_GATEWAY: u32 = 0x3;

/// The host's own addresses.
///
/// # Errors
/// The system's.
pub fn own_addresses() -> io::Result<BTreeSet<IpAddr>> {
    Ok(if_addrs::get_if_addrs()?.into_iter().map(|interface| interface.ip()).collect())
}

/// The gateways of the routes, whatever these lead to: two halves of the world are a default route too.
#[must_use]
pub fn gateways() -> BTreeSet<IpAddr> {
    let read = |path| std::fs::read_to_string(path).unwrap_or_default();
    let v4 = parse_routes4(&read("/proc/net/route"));
    v4.into_iter().chain(parse_routes6(&read("/proc/net/ipv6_route"))).collect()
}

/// Those among `host:port` that need no lookup.
#[must_use]
pub fn literal_endpoints(endpoints: &[String]) -> BTreeSet<SocketAddr> {
    let literal = |endpoint: &String| endpoint.parse::<SocketAddr>().ok();
    endpoints.iter().filter_map(literal).map(canonical).collect()
}

/// Without the IPv4-mapped form.
#[must_use]
pub fn canonical(endpoint: SocketAddr) -> SocketAddr {
    SocketAddr::new(endpoint.ip().to_canonical(), endpoint.port())
}

/// The gateways of all routes as ip(8) lists them: those of further paths and tables too, which the
/// files of `/proc` leave out. What cannot be asked is left out.
pub async fn all_gateways(kernel: &Kernel) -> BTreeSet<IpAddr> {
    let mut found = BTreeSet::new();
    for family in ["-4", "-6"] {
        let listing = kernel.run("ip", &["-j", family, "route", "show", "table", "all"], b"").await;
        match listing {
            Ok(json) => found.extend(parse_listing(&json)),
            Err(error) => tracing::debug!(%error, "the routes cannot be listed"),
        }
    }
    found.into_iter().take(GATEWAYS_MAX).collect()
}

/// `ip -j route`: a gateway stands in the route, in its further paths, or there as one of the other
/// family.
fn parse_listing(json: &[u8]) -> Vec<IpAddr> {
    #[derive(Deserialize)]
    struct Path {
        gateway: Option<String>,
        via: Option<Via>,
        #[serde(default)]
        nexthops: Vec<Self>,
    }
    #[derive(Deserialize)]
    struct Via {
        host: String,
    }
    fn add(path: &Path, found: &mut Vec<IpAddr>) {
        let via = path.via.as_ref().map(|via| &via.host);
        found.extend(path.gateway.iter().chain(via).filter_map(|text| text.parse::<IpAddr>().ok()));
        for hop in path.nexthops.iter().filter(|hop| hop.nexthops.is_empty()) {
            add(hop, found);
        }
    }
    let mut found = Vec::new();
    for path in serde_json::from_slice::<Vec<Path>>(json).unwrap_or_default() {
        add(&path, &mut found);
    }
    found
}

/// `/proc/net/route`: numbers of four bytes in hexadecimal, in the order of this host's memory.
fn parse_routes4(text: &str) -> Vec<IpAddr> {
    let hex = |field: Option<&&str>| u32::from_str_radix(field?, 16).ok();
    let route = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let (by, flags) = (hex(fields.get(2))?, hex(fields.get(3))?);
        (flags & UP_BY_GATEWAY == UP_BY_GATEWAY)
            .then(|| IpAddr::V4(Ipv4Addr::from(by.to_ne_bytes())))
    };
    text.lines().skip(1).filter_map(route).collect()
}

/// `/proc/net/ipv6_route`: destination, its length, source, its length, next hop, metric, two
/// counters, flags, interface.
fn parse_routes6(text: &str) -> Vec<IpAddr> {
    let route = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let by = u128::from_str_radix(fields.get(4)?, 16).ok()?;
        let flags = u32::from_str_radix(fields.get(8)?, 16).ok()?;
        (by != 0 && flags & UP_BY_GATEWAY == UP_BY_GATEWAY).then(|| IpAddr::V6(Ipv6Addr::from(by)))
    };
    text.lines().filter_map(route).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gateways_are_those_of_all_routes_by_a_gateway() {
        let routes4 = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\n\
            eth0\t00000000\t010200C0\t0003\t0\t0\t0\t00000000\t0\n\
            eth0\t000200C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\n\
            eth1\t0000000A\t0100000A\t0003\t0\t0\t0\t000000FF\t0\n\
            tun0\t00000000\t0100080A\t0003\t0\t0\t0\t00000080\t0\n\
            down\t00000000\t0909090A\t0002\t0\t0\t0\t00000000\t0\nnonsense\n";
        let v4 = |address: [u8; 4]| IpAddr::from(address);
        let wanted = [v4([192, 0, 2, 1]), v4([10, 0, 0, 1]), v4([10, 8, 0, 1])];
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

    #[test]
    fn endpoints_by_number_are_found_and_names_are_not_asked_for() {
        let endpoints = ["192.0.2.7:7444", "[::ffff:192.0.2.8]:1", "localhost:7444", "nonsense"];
        let literal = literal_endpoints(&endpoints.map(str::to_owned));
        let wanted = ["192.0.2.7:7444", "192.0.2.8:1"].map(|text| text.parse().unwrap());
        assert_eq!(literal, BTreeSet::from(wanted));
    }

    #[test]
    fn gateways_of_all_paths_and_tables_are_read_from_ip_s_listing() {
        let json = br#"[{"dst":"default","nexthops":[{"gateway":"10.1.0.1","dev":"d0","weight":1},
              {"via":{"family":"inet6","host":"fe80::2"},"dev":"d0","weight":1}],"flags":[]},
            {"dst":"128.0.0.0/1","gateway":"10.8.0.1","dev":"tun0","table":"7","flags":[]},
            {"dst":"10.1.0.0/24","dev":"d0","scope":"link","flags":[]}]"#;
        let wanted = ["10.1.0.1", "fe80::2", "10.8.0.1"].map(|a| a.parse::<IpAddr>().unwrap());
        assert_eq!(parse_listing(json), wanted);
        assert!(parse_listing(b"Error").is_empty());
    }

    #[test]
    fn the_host_knows_its_own_addresses() {
        assert!(own_addresses().unwrap().iter().any(IpAddr::is_loopback));
    }
}
