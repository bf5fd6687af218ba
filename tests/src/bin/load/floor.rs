//! The cryptography nobody can save: one signature, one verification, one TLS 1.3 handshake on the
//! server's side, in this process and by CPU time.

use std::{
    io::Cursor,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use rcgen::{
    CertificateParams, DistinguishedName, ExtendedKeyUsagePurpose, Issuer, KeyPair,
    PKCS_ECDSA_P256_SHA256, SigningKey,
};
use rustls::{
    ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection,
    client::Resumption,
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName},
    server::WebPkiClientVerifier,
};
use x509_parser::prelude::{FromDer, X509CertificationRequest};

use crate::{Failure, cell::Kind, machine, table};

/// One measurement lasts this long; the median of several counts.
const ROUND: Duration = Duration::from_millis(250);
const ROUNDS: usize = 5;
/// Name in the certificate of the handshake.
const NAME: &str = "ca.load.test";

/// CPU time of each unavoidable step.
#[derive(Debug)]
pub(crate) struct Floor {
    sign: Duration,
    verify: Duration,
    handshake: Duration,
    mutual_handshake: Duration,
    /// Wall time of a durable write of 2 KiB: waiting, not CPU.
    pub(crate) disk: Duration,
}

/// Measures all of it; takes about five seconds. The disk is the one `folder` lies on.
pub(crate) fn measure(folder: &Path) -> Result<Floor, Failure> {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    let csr = params.serialize_request(&key)?;
    let message = [0x5a; 400];
    Ok(Floor {
        sign: cpu_of(|| key.sign(&message).map(drop).map_err(Into::into))?,
        verify: cpu_of(|| {
            let (_, csr) = X509CertificationRequest::from_der(csr.der())?;
            csr.verify_signature().map_err(Into::into)
        })?,
        handshake: server_handshake(&Pair::new(false)?)?,
        mutual_handshake: server_handshake(&Pair::new(true)?)?,
        disk: machine::disk_patience(folder)?,
    })
}

impl Floor {
    /// Server CPU that one reply of this kind cannot do without.
    pub(crate) fn of(&self, kind: Kind) -> Duration {
        let issue = self.verify + self.sign;
        match kind {
            Kind::Enrolment => self.handshake + issue,
            Kind::RenewalFresh | Kind::LeafFresh => self.mutual_handshake + issue,
            Kind::LeafKept => issue,
            Kind::SyncKept => Duration::ZERO,
        }
    }

    pub(crate) fn text(&self) -> String {
        format!(
            "floor, CPU of one core: P-256 sign {:.1} µs, CSR parse and verify {:.1} µs, TLS 1.3 \
             handshake server side {:.0} µs, mutual {:.0} µs; disk: 2 KiB and fdatasync {:.2} ms",
            table::us(self.sign),
            table::us(self.verify),
            table::us(self.handshake),
            table::us(self.mutual_handshake),
            table::ms(self.disk)
        )
    }

    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::json!({
            "sign_us": table::us(self.sign),
            "csr_verify_us": table::us(self.verify),
            "handshake_us": table::us(self.handshake),
            "mutual_handshake_us": table::us(self.mutual_handshake),
            "fdatasync_2kib_ms": table::ms(self.disk),
        })
    }
}

/// CPU time of one call, the median of several rounds.
fn cpu_of(mut act: impl FnMut() -> Result<(), Failure>) -> Result<Duration, Failure> {
    let mut rounds = Vec::with_capacity(ROUNDS);
    for _ in 0..ROUNDS {
        let began = Instant::now();
        let cpu_before = machine::thread_cpu_time()?;
        let mut calls = 0;
        while began.elapsed() < ROUND {
            for _ in 0..8 {
                act()?;
            }
            calls += 8;
        }
        rounds.push((machine::thread_cpu_time()? - cpu_before) / calls);
    }
    Ok(table::median(&mut rounds))
}

/// The server's share of the CPU time of a handshake in memory. The two sides take turns on one
/// thread: the whole is measured by CPU time, the share by the wall clock around each side's turns.
fn server_handshake(pair: &Pair) -> Result<Duration, Failure> {
    let mut server_turns = Duration::ZERO;
    let mut all_turns = Duration::ZERO;
    let whole = cpu_of(|| {
        let began = Instant::now();
        server_turns += pair.shake_hands()?;
        all_turns += began.elapsed();
        Ok(())
    })?;
    Ok(whole.mul_f64(server_turns.as_secs_f64() / all_turns.as_secs_f64()))
}

/// Both ends of a connection: TLS 1.3 and P-256 as between the CA and its callers, with chains of one
/// certificate, the shortest there are.
struct Pair {
    server: Arc<ServerConfig>,
    client: Arc<ClientConfig>,
}

impl Pair {
    fn new(mutual: bool) -> Result<Self, Failure> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let issuer_key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let mut issuer = CertificateParams::default();
        issuer.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let root = issuer.self_signed(&issuer_key)?.der().clone();
        let issuer = Issuer::new(issuer, issuer_key);
        let mut roots = RootCertStore::empty();
        roots.add(root)?;
        let roots = Arc::new(roots);

        let (chain, key) = leaf(&issuer, ExtendedKeyUsagePurpose::ServerAuth)?;
        let builder = ServerConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])?;
        let builder = if mutual {
            let verifier =
                WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone());
            builder.with_client_cert_verifier(verifier.build()?)
        } else {
            builder.with_no_client_auth()
        };
        let mut server = builder.with_single_cert(chain, key)?;
        server.send_tls13_tickets = 0;

        let builder = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_root_certificates(roots);
        let mut client = if mutual {
            let (chain, key) = leaf(&issuer, ExtendedKeyUsagePurpose::ClientAuth)?;
            builder.with_client_auth_cert(chain, key)?
        } else {
            builder.with_no_client_auth()
        };
        client.resumption = Resumption::disabled();
        Ok(Self { server: Arc::new(server), client: Arc::new(client) })
    }

    /// One handshake; the time of the server's turns.
    fn shake_hands(&self) -> Result<Duration, Failure> {
        let mut server_time = Duration::ZERO;
        let name = ServerName::try_from(NAME)?;
        let mut client = ClientConnection::new(self.client.clone(), name)?;
        let began = Instant::now();
        let mut server = ServerConnection::new(self.server.clone())?;
        server_time += began.elapsed();
        while client.is_handshaking() || server.is_handshaking() {
            let mut to_server = Vec::new();
            while client.wants_write() {
                client.write_tls(&mut to_server)?;
            }
            let began = Instant::now();
            let mut to_client = Vec::new();
            let mut incoming = Cursor::new(&to_server);
            while server.read_tls(&mut incoming)? > 0 {
                server.process_new_packets()?;
            }
            while server.wants_write() {
                server.write_tls(&mut to_client)?;
            }
            server_time += began.elapsed();
            let mut incoming = Cursor::new(&to_client);
            while client.read_tls(&mut incoming)? > 0 {
                client.process_new_packets()?;
            }
        }
        Ok(server_time)
    }
}

fn leaf(
    issuer: &Issuer<'_, KeyPair>,
    usage: ExtendedKeyUsagePurpose,
) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), Failure> {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let mut params = CertificateParams::new(vec![NAME.to_owned()])?;
    params.extended_key_usages = vec![usage];
    let certificate = params.signed_by(&key, issuer)?;
    let key = PrivatePkcs8KeyDer::from(key.serialize_der()).into();
    Ok((vec![certificate.der().clone()], key))
}
