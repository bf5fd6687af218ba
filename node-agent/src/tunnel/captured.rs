//! Connections of this host that nftables redirected here: each is carried to the node it was meant
//! for, or reset. None is ever sent on in the clear.

use std::{net::SocketAddr, sync::Arc};

use tokio::{io::AsyncWriteExt, net::TcpStream};

use super::{
    control::PROOF_PORT,
    dial::{self, Dialled},
    flows::{Direction, Place},
    header::Header,
    inforce::InForce,
    reason::{Reason, Refused},
    splice::{Ended, Splice},
    state::Tunnel,
    tcp,
    wire::Wire,
};

/// Takes one.
pub(crate) async fn take(tunnel: Arc<Tunnel>, mut local: TcpStream, source: SocketAddr) {
    // Also where the process is killed before the other node has answered.
    tcp::reset_on_drop(&local);
    let to = match destination(&tunnel, &local) {
        Ok(to) => to,
        Err(refused) => {
            return tunnel.refused(Direction::Out, source, &refused);
        }
    };
    if to.port() == PROOF_PORT {
        return prove(&tunnel, &mut local).await;
    }
    match carry(&tunnel, &local, to).await {
        Ok((wire, place)) => {
            tokio::spawn(run(tunnel, local, wire, place, Direction::Out, to));
        }
        Err(refused) => tunnel.refused(Direction::Out, to, &refused),
    }
}

/// Where it was going. A connection straight to the listener was going nowhere.
fn destination(tunnel: &Tunnel, local: &TcpStream) -> Result<SocketAddr, Refused> {
    let not_captured = |why: String| Refused::new(Reason::NotCaptured, why);
    let to = tcp::original_destination(local)
        .map_err(|e| not_captured(format!("it was not redirected: {e}")))?;
    let is_proof = to.port() == PROOF_PORT;
    if !is_proof
        && (to.ip().is_loopback() || to.ip().is_unspecified() || tunnel.in_force().is_own(to.ip()))
    {
        return Err(not_captured(format!("it was going to {to}, which is this host")));
    }
    Ok(to)
}

/// Shows the agent that what it dials comes here.
async fn prove(tunnel: &Tunnel, local: &mut TcpStream) {
    let nonce = *tunnel.nonce.lock().expect("no code panics while it holds the nonce");
    let Some(nonce) = nonce else { return };
    tcp::end_on_drop(local);
    if local.write_all(&nonce).await.is_ok() {
        tunnel.flows.counters.proofs.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    }
}

async fn carry(
    tunnel: &Tunnel,
    local: &TcpStream,
    to: SocketAddr,
) -> Result<(Wire, Place), Refused> {
    may_dial(&tunnel.in_force(), to)?;
    tunnel.flows.has_place()?;
    tcp::prepare(local).map_err(|e| Refused::new(Reason::Unreachable, e.to_string()))?;
    let header = Header::Flow { address: to.ip(), port: to.port() };
    let Dialled { wire, leaf } = dial::dial(tunnel, header).await?;
    let now = tunnel.clock.elapsed();
    let place = tunnel.flows.enter(Direction::Out, to.ip(), leaf.clone(), now)?;
    // Rules that came meanwhile found no flow to cut.
    tunnel.in_force().judge(to.ip()).leaf(&leaf, to.ip())?;
    Ok((wire, place))
}

fn may_dial(in_force: &InForce, to: SocketAddr) -> Result<(), Refused> {
    in_force.judge(to.ip()).address(to.ip())?;
    if !in_force.rules.outbound_ports.iter().any(|range| range.contains(to.port())) {
        let why = format!("port {} is none that is carried", to.port());
        return Err(Refused::new(Reason::PortClosed, why));
    }
    Ok(())
}

/// Carries a flow to its end.
pub(crate) async fn run(
    tunnel: Arc<Tunnel>,
    local: TcpStream,
    wire: Wire,
    place: Place,
    direction: Direction,
    peer: SocketAddr,
) {
    let ended = Splice::new(local, wire, place, &tunnel.flows.counters).await;
    let direction = direction.as_str();
    match ended {
        Ended::Closed => tracing::debug!(%peer, direction, "a flow ended"),
        Ended::Reset(error) => tracing::debug!(%peer, direction, %error, "a flow was reset"),
        Ended::Cut(reason) => tracing::debug!(%peer, direction, %reason, "a flow was cut"),
    }
}
