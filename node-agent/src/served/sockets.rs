//! The text of `/proc/net/tcp` and `tcp6`: which sockets listen, and where. Reads no process.

use std::{
    fs::File,
    io::{self, BufRead, BufReader, Read},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::Path,
};

/// Most listening sockets of one table.
pub const LISTENERS_MAX: usize = 16_384;
/// Most bytes of one table: a row has 150 to 190.
const TABLE_LEN_MAX: u64 = 200 * (LISTENERS_MAX as u64 + 2);
/// State of a listening socket (`TCP_LISTEN` of the kernel).
const LISTEN: &str = "0A";

/// A listening socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listener {
    /// Where it is bound.
    pub addr: SocketAddr,
    /// Who opened it.
    pub uid: u32,
    /// Its number among all sockets of the machine.
    pub inode: u64,
}

/// The listening sockets of a network namespace, and whether there were more than are read.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Listeners {
    /// Those read.
    pub sockets: Vec<Listener>,
    /// There are more.
    pub cut: bool,
}

/// Reads `tcp` and `tcp6` in a `net` folder of /proc. A kernel without IPv6 has no `tcp6`.
///
/// # Errors
/// The system's.
pub fn listeners(net: &Path) -> io::Result<Listeners> {
    let mut both = read_table(File::open(net.join("tcp"))?)?;
    match File::open(net.join("tcp6")) {
        Ok(file) => {
            let v6 = read_table(file)?;
            both.sockets.extend(v6.sockets);
            both.cut |= v6.cut;
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(e),
    }
    Ok(both)
}

/// The kernel writes those that listen first: the first other row ends the reading, so that a host
/// with many connections costs no more than one with none.
fn read_table(table: impl Read) -> io::Result<Listeners> {
    let mut found = Listeners::default();
    for line in BufReader::new(table.take(TABLE_LEN_MAX)).lines().skip(1) {
        let Some(listener) = parse_row(&line?) else { break };
        if found.sockets.len() == LISTENERS_MAX {
            found.cut = true;
            break;
        }
        found.sockets.push(listener);
    }
    Ok(found)
}

/// One row, if it is of a socket that listens.
fn parse_row(row: &str) -> Option<Listener> {
    // sl local remote state queues timer retransmits uid timeout inode ...
    let mut fields = row.split_ascii_whitespace().skip(1);
    let addr = parse_addr(fields.next()?)?;
    if fields.nth(1)? != LISTEN {
        return None;
    }
    let uid = fields.nth(3)?.parse().ok()?;
    let inode = fields.nth(1)?.parse().ok()?;
    Some(Listener { addr, uid, inode })
}

/// `0100007F:1F90`: words of memory as the machine's own numbers, the port as a number.
fn parse_addr(text: &str) -> Option<SocketAddr> {
    let (ip, port) = text.split_once(':')?;
    if !ip.is_ascii() {
        return None;
    }
    let word = |at: usize| {
        let digits = ip.get(8 * at..8 * at + 8)?;
        u32::from_str_radix(digits, 16).ok().map(u32::to_ne_bytes)
    };
    let ip: IpAddr = match ip.len() {
        8 => Ipv4Addr::from(word(0)?).into(),
        32 => {
            let mut bytes = [0; 16];
            for at in 0..4 {
                bytes[4 * at..4 * at + 4].copy_from_slice(&word(at)?);
            }
            // A socket of both families that is bound to an IPv4 address is an IPv4 one to a caller.
            Ipv6Addr::from(bytes).to_canonical()
        }
        _ => return None,
    };
    Some(SocketAddr::new(ip, u16::from_str_radix(port, 16).ok()?))
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    pub(in crate::served) const HEAD: &str = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n";

    /// As the kernel writes a row.
    pub(in crate::served) fn row(addr: SocketAddr, state: u8, uid: u32, inode: u64) -> String {
        let words: String = match addr.ip() {
            IpAddr::V4(v4) => format!("{:08X}", u32::from_ne_bytes(v4.octets())),
            IpAddr::V6(v6) => {
                let word = |w: &[u8]| u32::from_ne_bytes(w.try_into().unwrap());
                v6.octets().chunks(4).map(|w| format!("{:08X}", word(w))).collect()
            }
        };
        format!(
            "   0: {words}:{:04X} 00000000:0000 {state:02X} 00000000:00000000 00:00000000 00000000 \
             {uid:5}        0 {inode} 1 0000000000000000 100 0 0 10 0\n",
            addr.port()
        )
    }

    #[test]
    fn rows_of_a_kernel_are_read() {
        let v4 = "   1: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 4711 1 0000000000000000 100 0 0 10 0";
        let v6 = "   0: 0000000000000000FFFF00000100007F:0016 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 12 1 0 100";
        let read = |text| parse_row(text).map(|l| (l.addr.to_string(), l.uid, l.inode));
        assert_eq!(read(v4), Some(("127.0.0.1:8080".to_owned(), 1000, 4711)));
        assert_eq!(read(v6), Some(("127.0.0.1:22".to_owned(), 0, 12)));
    }

    #[test]
    fn reading_ends_with_the_first_connection() {
        let addr = "10.0.0.1:6379".parse().unwrap();
        let text = [HEAD, &row(addr, 0x0A, 1, 1), &row(addr, 1, 1, 2), &row(addr, 0x0A, 1, 3)];
        let found = read_table(text.concat().as_bytes()).unwrap();
        assert_eq!(found.sockets.iter().map(|l| l.inode).collect::<Vec<_>>(), [1]);
    }

    #[test]
    fn more_than_the_bound_are_said_to_be_more() {
        let addr = "10.0.0.1:6379".parse().unwrap();
        for (rows, cut) in [(LISTENERS_MAX, false), (LISTENERS_MAX + 1, true)] {
            let text = format!("{HEAD}{}", row(addr, 0x0A, 1, 1).repeat(rows));
            let found = read_table(text.as_bytes()).unwrap();
            assert_eq!((found.sockets.len(), found.cut), (LISTENERS_MAX, cut));
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn what_is_written_is_read(
            ip: IpAddr, port: u16, uid: u32, inode: u64,
        ) {
            let addr = SocketAddr::new(ip, port);
            let read = parse_row(&row(addr, 0x0A, uid, inode)).unwrap();
            let canonical = SocketAddr::new(ip.to_canonical(), port);
            prop_assert_eq!(read, Listener { addr: canonical, uid, inode });
            prop_assert_eq!(parse_row(&row(addr, 0x06, uid, inode)), None);
        }

        #[test]
        fn any_text_is_read_without_harm(bytes in proptest::collection::vec(any::<u8>(), 0..2_000)) {
            let _ = read_table(&bytes[..]);
            let _ = parse_row(&String::from_utf8_lossy(&bytes));
        }
    }
}
