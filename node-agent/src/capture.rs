//! Proves that the kernel hands what this host dials to its own `ray-tunnel`: dials a port that no member
//! has at an address of one, and wants to hear the bytes that the tunnel alone was told. A rule that is
//! missing is found here, before Ray is started, and not as plaintext on the wire.

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use tokio::{io::AsyncReadExt, net::TcpStream};

use crate::{
    supervise::client,
    tunnel::control::{Ask, NONCE_LEN, PROOF_PORT},
};

/// How long one proof may take: it does not leave the host.
const TIME_MAX: Duration = Duration::from_secs(2);

/// Dials each address, one of each family at most, through the whole path.
///
/// # Errors
/// What was heard instead, for a person.
pub(crate) async fn prove(controls: &[PathBuf], addresses: &[IpAddr]) -> Result<(), String> {
    let nonce: [u8; NONCE_LEN] = rand::random();
    for control in controls {
        let ask = Ask::Prove { nonce: hex::encode(nonce) };
        let told = client::ask(control, ask).await;
        // One that drains may be gone already; the first takes the connection.
        if let Err(error) = told
            && Some(control) == controls.first()
        {
            return Err(error.to_string());
        }
    }
    for address in addresses {
        prove_one(*address, nonce).await?;
    }
    Ok(())
}

async fn prove_one(address: IpAddr, nonce: [u8; NONCE_LEN]) -> Result<(), String> {
    let to = SocketAddr::new(address, PROOF_PORT);
    let dialled = async {
        let mut stream = TcpStream::connect(to).await?;
        let mut heard = [0; NONCE_LEN];
        stream.read_exact(&mut heard).await?;
        Ok::<_, std::io::Error>(heard)
    };
    match tokio::time::timeout(TIME_MAX, dialled).await {
        Ok(Ok(heard)) if heard == nonce => Ok(()),
        Ok(Ok(_)) => Err(format!("what answers at {to} is not this host's ray-tunnel")),
        Ok(Err(error)) => {
            Err(format!("a connection to {to} was not handed to ray-tunnel: {error}"))
        }
        Err(_) => Err(format!("a connection to {to} was not handed to ray-tunnel: no answer")),
    }
}
