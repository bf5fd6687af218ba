//! Connections of other nodes: who dials is proven, what is asked for is judged, and only then is
//! anything of this host connected to.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use tokio::net::TcpStream;

use super::{
    captured,
    dial::no_certificate,
    flows::{Direction, Turn},
    header::{HEADER_LEN, Header, encode_answer},
    inforce::InForce,
    reason::{Reason, Refused},
    session::Session,
    state::Tunnel,
    tcp,
    verifier::PeerLeaf,
    wire::{Wire, WireError},
};

/// How long handshake and header may take.
const GREETING_TIME_MAX: Duration = Duration::from_secs(10);
/// How long a listener of this host may take to be connected to.
const CONNECT_TIME_MAX: Duration = Duration::from_secs(5);

/// Takes one.
pub(crate) async fn take(tunnel: Arc<Tunnel>, stream: TcpStream, source: SocketAddr) {
    let source = tcp::canonical(source);
    let in_force = tunnel.in_force();
    let turn = match knock(&tunnel, &in_force, &stream, source) {
        Ok(turn) => turn,
        Err(refused) => {
            tunnel.refused(Direction::In, source, &refused);
            return tcp::reset(stream);
        }
    };
    // Boxed: what a handshake needs is freed before the flow begins.
    let greeting = Box::pin(greet(&tunnel, &in_force, stream, source));
    let Ok(greeting) = tokio::time::timeout(GREETING_TIME_MAX, greeting).await else {
        let why = format!("no header in {} s", GREETING_TIME_MAX.as_secs());
        return tunnel.refused(Direction::In, source, &Refused::new(Reason::TooSlow, why));
    };
    drop(turn);
    match greeting {
        Ok(greeting) => answer(tunnel, greeting, source).await,
        Err(refused) => tunnel.refused(Direction::In, source, &refused),
    }
}

/// Before a byte of TLS: strangers, and those who are too many, cost nothing more.
fn knock(
    tunnel: &Tunnel,
    in_force: &InForce,
    stream: &TcpStream,
    source: SocketAddr,
) -> Result<Turn, Refused> {
    in_force.judge(source.ip()).address(source.ip())?;
    let socket = |e: io::Error| Refused::new(Reason::Unreachable, e.to_string());
    let dialled = tcp::canonical(stream.local_addr().map_err(socket)?);
    if !in_force.is_own(dialled.ip()) {
        let why = format!("it dialled {dialled}, which is no address of this node");
        return Err(Refused::new(Reason::AddressMismatch, why));
    }
    tunnel.flows.has_place()?;
    tcp::prepare(stream).map_err(socket)?;
    tunnel.handshakes_in.take(source.ip())
}

/// A peer that is who it says, and what it asked for.
struct Greeting {
    wire: Wire,
    leaf: PeerLeaf,
    header: Header,
}

async fn greet(
    tunnel: &Tunnel,
    in_force: &InForce,
    stream: TcpStream,
    source: SocketAddr,
) -> Result<Greeting, Refused> {
    let session = Session::server(in_force.server.clone())
        .map_err(|e| Refused::new(Reason::NoTls, e.to_string()))?;
    let mut wire = Wire::new(stream, session);
    if let Err(error) = wire.handshake().await {
        if matches!(error, WireError::Tls(_)) {
            wire.linger().await;
        }
        return Err(error.refused());
    }
    tunnel.flows.counters.handshakes_done.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    match judge(in_force, &mut wire, source).await {
        Ok((leaf, header)) => Ok(Greeting { wire, leaf, header }),
        Err(refused) => {
            say(wire, refused.reason).await;
            Err(refused)
        }
    }
}

async fn judge(
    in_force: &InForce,
    wire: &mut Wire,
    source: SocketAddr,
) -> Result<(PeerLeaf, Header), Refused> {
    let leaf = PeerLeaf::read(wire.peer_leaf().ok_or_else(no_certificate)?, &in_force.rules)?;
    in_force.judge(source.ip()).leaf(&leaf, source.ip())?;
    let header: [u8; HEADER_LEN] = wire.receive().await.map_err(|e| e.refused())?;
    let bad = |why: String| Refused::new(Reason::BadHeader, why);
    let header = Header::parse(&header).map_err(|e| bad(e.to_string()))?;
    if !wire.plain.is_empty() {
        return Err(bad("bytes of the flow came before the answer".to_owned()));
    }
    Ok((leaf, header))
}

/// Tells the peer the reason in one word.
async fn say(mut wire: Wire, reason: Reason) {
    if wire.send(&encode_answer(Err(reason))).await.is_ok() {
        wire.finish().await;
    }
}

async fn answer(tunnel: Arc<Tunnel>, greeting: Greeting, source: SocketAddr) {
    let Greeting { mut wire, leaf, header } = greeting;
    let (address, port) = match header {
        Header::Ping { .. } => {
            tunnel.flows.saw(source.ip(), leaf);
            if wire.send(&encode_answer(Ok(()))).await.is_ok() {
                wire.finish().await;
            }
            return;
        }
        Header::Flow { address, port } => (address, port),
    };
    let to = SocketAddr::new(address, port);
    let connected = Box::pin(connect(&tunnel, to)).await;
    let entered = connected.and_then(|local| {
        let now = tunnel.clock.elapsed();
        let place = tunnel.flows.enter(Direction::In, source.ip(), leaf.clone(), now)?;
        // Rules that came meanwhile found no flow to cut.
        tunnel.in_force().judge(source.ip()).leaf(&leaf, source.ip())?;
        Ok((local, place))
    });
    match entered {
        Ok((local, place)) => {
            if wire.send(&encode_answer(Ok(()))).await.is_err() {
                return tcp::reset(local);
            }
            let peer = SocketAddr::new(source.ip(), port);
            tokio::spawn(captured::run(tunnel, local, wire, place, Direction::In, peer));
        }
        Err(refused) => {
            let why = format!("port {port}: {}", refused.why);
            tunnel.refused(Direction::In, source, &Refused::new(refused.reason, why));
            say(wire, refused.reason).await;
        }
    }
}

/// To what was asked for, if members may reach it.
async fn connect(tunnel: &Tunnel, to: SocketAddr) -> Result<TcpStream, Refused> {
    may_reach(tunnel, to)?;
    let connecting = tcp::connect(None, to);
    match tokio::time::timeout(CONNECT_TIME_MAX, connecting).await {
        Ok(Ok(local)) => Ok(local),
        Ok(Err(error)) => Err(Refused::new(Reason::NoListener, error.to_string())),
        Err(_) => {
            let why = format!("nothing answers in {} s", CONNECT_TIME_MAX.as_secs());
            Err(Refused::new(Reason::NoListener, why))
        }
    }
}

fn may_reach(tunnel: &Tunnel, to: SocketAddr) -> Result<(), Refused> {
    let in_force = tunnel.in_force();
    if !in_force.is_own(to.ip()) {
        let why = format!("{} is no address of this node", to.ip());
        return Err(Refused::new(Reason::AddressMismatch, why));
    }
    let is_open = in_force.rules.inbound_ports.iter().any(|range| range.contains(to.port()));
    if !is_open || tunnel.own_ports.contains(&to.port()) {
        return Err(Refused::new(Reason::PortClosed, "none that members may reach"));
    }
    Ok(())
}
