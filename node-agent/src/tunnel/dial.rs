//! To the `ray-tunnel` of another node: connect, prove both ends, ask. It gives back a connection
//! that carries bytes, or one word why there is none.

use std::{net::SocketAddr, time::Duration};

use rustls::pki_types::ServerName;

use super::{
    flows::Turn,
    header::{ANSWER_LEN, Header, parse_answer},
    inforce::InForce,
    reason::{Reason, Refused},
    session::Session,
    state::Tunnel,
    tcp,
    verifier::PeerLeaf,
    wire::{Wire, WireError},
};

/// How long all of it may take.
pub(crate) const DIAL_TIME_MAX: Duration = Duration::from_secs(10);

/// A connection that the other end has answered.
pub(crate) struct Dialled {
    pub(crate) wire: Wire,
    pub(crate) leaf: PeerLeaf,
}

/// Asks the node at the header's address.
///
/// # Errors
/// Why not, from either end.
pub(crate) async fn dial(tunnel: &Tunnel, header: Header) -> Result<Dialled, Refused> {
    let in_force = tunnel.in_force();
    let turn = tunnel.handshakes_out.take(header.address())?;
    // Boxed: what a handshake needs is freed before the flow begins.
    let dialled = Box::pin(tokio::time::timeout(DIAL_TIME_MAX, ask(tunnel, &in_force, header)));
    let dialled = dialled.await.unwrap_or_else(|_| {
        let why = format!("no answer in {} s", DIAL_TIME_MAX.as_secs());
        Err(Refused::new(Reason::TooSlow, why))
    });
    drop::<Turn>(turn);
    dialled
}

async fn ask(tunnel: &Tunnel, in_force: &InForce, header: Header) -> Result<Dialled, Refused> {
    let address = header.address();
    let judge = in_force.judge(address);
    judge.address(address)?;
    let to = SocketAddr::new(address, tunnel.inbound_port);
    let unreachable = |e: std::io::Error| {
        Refused::new(Reason::Unreachable, format!("the ray-tunnel at {to}: {e}"))
    };
    let natural = tcp::natural_source(to).map_err(unreachable)?;
    let from = if in_force.is_own(natural) { None } else { in_force.source_for(address) };
    let stream = tcp::connect(from, to).await.map_err(unreachable)?;
    let internal = |e: rustls::Error| Refused::new(Reason::NoTls, e.to_string());
    let session =
        Session::client(in_force.client.clone(), ServerName::from(address)).map_err(internal)?;
    let mut wire = Wire::new(stream, session);
    let failed = |e: WireError| e.refused();
    wire.handshake().await.map_err(failed)?;
    let leaf_der = wire.peer_leaf().ok_or_else(no_certificate)?;
    let leaf = PeerLeaf::read(leaf_der, &in_force.rules)?;
    judge.leaf(&leaf, address)?;
    wire.send(&header.encode()).await.map_err(failed)?;
    let answer: [u8; ANSWER_LEN] = wire.receive().await.map_err(failed)?;
    let bad = |e: super::header::HeaderError| Refused::new(Reason::BadHeader, e.to_string());
    parse_answer(answer)
        .map_err(bad)?
        .map_err(|reason| Refused::new(reason, format!("{} at {address} says so", leaf.name)))?;
    tunnel.flows.counters.handshakes_done.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    Ok(Dialled { wire, leaf })
}

pub(crate) fn no_certificate() -> Refused {
    Refused::new(Reason::NoCertificate, "the peer showed no certificate")
}
