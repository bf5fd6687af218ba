//! Socket options, and how a connection ends.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    os::fd::AsFd,
    pin::Pin,
    time::Duration,
};

use rustix::net::{AddressFamily, Shutdown, sockopt};
use tokio::{
    io::Interest,
    net::{TcpSocket, TcpStream},
};

/// A peer that is silent for so long is asked whether it is there.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(20);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
const KEEPALIVE_PROBES: u32 = 3;

/// Small packets go at once, and a host that vanished is noticed.
pub(crate) fn prepare(socket: &TcpStream) -> io::Result<()> {
    sockopt::set_tcp_nodelay(socket, true)?;
    sockopt::set_socket_keepalive(socket, true)?;
    sockopt::set_tcp_keepidle(socket, KEEPALIVE_IDLE)?;
    sockopt::set_tcp_keepintvl(socket, KEEPALIVE_INTERVAL)?;
    Ok(sockopt::set_tcp_keepcnt(socket, KEEPALIVE_PROBES)?)
}

/// The end of this socket is a reset.
pub(crate) fn reset_on_drop(socket: &TcpStream) {
    // Of a socket that is gone already there is nothing to reset.
    let _ = sockopt::set_socket_linger(socket, Some(Duration::ZERO));
}

/// The end of this socket is a FIN again.
pub(crate) fn end_on_drop(socket: &TcpStream) {
    let _ = sockopt::set_socket_linger(socket, None);
}

/// Ends it with a reset.
pub(crate) fn reset(socket: TcpStream) {
    reset_on_drop(&socket);
}

/// Nothing more is sent. A socket the peer has reset meanwhile is an error.
pub(crate) fn shutdown_write(socket: &TcpStream) -> io::Result<()> {
    Ok(rustix::net::shutdown(socket, Shutdown::Write)?)
}

/// Ready when the socket is broken, by a reset or because the peer does not answer.
pub(crate) type ErrorWatch = Pin<Box<dyn Future<Output = io::Error> + Send>>;

/// Watches a socket that is not read from any more.
pub(crate) fn watch_errors(socket: &TcpStream) -> io::Result<ErrorWatch> {
    let own = std::net::TcpStream::from(socket.as_fd().try_clone_to_owned()?);
    let own = TcpStream::from_std(own)?;
    Ok(Box::pin(async move {
        loop {
            if let Err(error) = own.ready(Interest::ERROR).await {
                return error;
            }
            match sockopt::socket_error(&own) {
                Ok(Ok(())) => {
                    // Forgets that it was ready, so that the next wait is one.
                    let _ = own
                        .try_io(Interest::ERROR, || Err::<(), _>(io::ErrorKind::WouldBlock.into()));
                }
                Ok(Err(error)) | Err(error) => return error.into(),
            }
        }
    }))
}

/// Where a redirected connection was going.
///
/// # Errors
/// It was not redirected.
pub(crate) fn original_destination(socket: &TcpStream) -> io::Result<SocketAddr> {
    let family = sockopt::socket_domain(socket)?;
    let original = if family == AddressFamily::INET {
        SocketAddr::V4(sockopt::ip_original_dst(socket)?)
    } else {
        SocketAddr::V6(sockopt::ipv6_original_dst(socket)?)
    };
    Ok(canonical(original))
}

/// IPv4 is never mapped.
pub(crate) fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// Connects, from this address where one is given.
pub(crate) async fn connect(from: Option<IpAddr>, to: SocketAddr) -> io::Result<TcpStream> {
    let socket = if to.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    if let Some(from) = from {
        socket.bind(SocketAddr::new(from, 0))?;
    }
    let stream = socket.connect(to).await?;
    prepare(&stream)?;
    Ok(stream)
}

/// The address the system would dial from. No packet is sent.
pub(crate) fn natural_source(to: SocketAddr) -> io::Result<IpAddr> {
    let any: SocketAddr = if to.is_ipv4() {
        (Ipv4Addr::UNSPECIFIED, 0).into()
    } else {
        (Ipv6Addr::UNSPECIFIED, 0).into()
    };
    let socket = UdpSocket::bind(any)?;
    socket.connect(to)?;
    Ok(socket.local_addr()?.ip())
}
