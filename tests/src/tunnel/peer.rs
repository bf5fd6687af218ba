//! A peer that does as a test says: TLS with any leaf or none, any header, any answer.

use std::{
    io::{Read, Write},
    net::TcpStream,
    sync::Arc,
};

use node_agent::tunnel::header::{ALPN, ANSWER_LEN, HEADER_LEN, Header, parse_answer};
use node_agent::tunnel::reason::Reason;
use rustls::{
    ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection, StreamOwned,
    pki_types::ServerName, server::WebPkiClientVerifier,
};

use super::authority::Signed;

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

fn roots(root: &super::Authority) -> Arc<RootCertStore> {
    let mut store = RootCertStore::empty();
    store.add(root.root_der()).unwrap();
    Arc::new(store)
}

/// What a client of this leaf is answered to this header, in words: `connected`, a reason of the
/// answer, or how TLS ended.
pub fn ask(
    stream: TcpStream,
    trusts: &super::Authority,
    leaf: Option<&Signed>,
    header: &[u8; HEADER_LEN],
) -> Result<StreamOwned<ClientConnection, TcpStream>, String> {
    let builder = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots(trusts));
    let mut config = match leaf {
        Some(leaf) => builder.with_client_auth_cert(leaf.chain.clone(), leaf.key_der()).unwrap(),
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![ALPN.to_vec()];
    let name = ServerName::from(stream.peer_addr().unwrap().ip());
    let connection = ClientConnection::new(Arc::new(config), name).unwrap();
    let mut tls = StreamOwned::new(connection, stream);
    tls.write_all(header).map_err(|e| e.to_string())?;
    let mut answer = [0; ANSWER_LEN];
    tls.read_exact(&mut answer).map_err(|e| e.to_string())?;
    match parse_answer(answer).map_err(|e| e.to_string())? {
        Ok(()) => Ok(tls),
        Err(reason) => Err(reason.to_string()),
    }
}

/// A header that asks for a flow.
pub fn flow(to: (std::net::IpAddr, u16)) -> [u8; HEADER_LEN] {
    Header::Flow { address: to.0, port: to.1 }.encode()
}

/// Serves one connection with this leaf: what it was asked, after it answered this.
pub fn serve(
    stream: TcpStream,
    trusts: &super::Authority,
    leaf: &Signed,
    answer: Result<(), Reason>,
) -> Result<StreamOwned<ServerConnection, TcpStream>, String> {
    let verifier =
        WebPkiClientVerifier::builder_with_provider(roots(trusts), provider()).build().unwrap();
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_client_cert_verifier(verifier)
        .with_single_cert(leaf.chain.clone(), leaf.key_der())
        .unwrap();
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.send_tls13_tickets = 0;
    let connection = ServerConnection::new(Arc::new(config)).unwrap();
    let mut tls = StreamOwned::new(connection, stream);
    let mut header = [0; HEADER_LEN];
    tls.read_exact(&mut header).map_err(|e| e.to_string())?;
    tls.write_all(&node_agent::tunnel::header::encode_answer(answer)).map_err(|e| e.to_string())?;
    Ok(tls)
}
