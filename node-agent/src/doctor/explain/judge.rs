//! What stands in the way, from what was seen. Pure: no network, file or clock.

use std::net::SocketAddr;

use raymtls_proto::{leaf::LeafFacts, v1::CertificateChain};
use rustls::{
    client::{verify_server_cert_signed_by_trust_anchor, verify_server_name},
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, ServerName, UnixTime},
    server::ParsedCertificate,
};
use time::OffsetDateTime;
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate, X509Name};

use super::{
    Explained, Ours, Reason, Shown, Word,
    dial::{Clear, NoConnection, Seen, Target},
};
use crate::{
    moment::Moment,
    served::{
        kind::printable,
        probe::{Answer, Hello},
    },
    verify,
};

/// Most names of a leaf that are shown.
const NAMES_MAX: usize = 16;
/// Longest serial number shown, in bytes (RFC 5280 4.1.2.2).
const SERIAL_LEN_MAX: usize = 20;

pub(super) fn judge(
    target: &Target,
    seen: &Seen,
    ours: &Ours<'_>,
    now: OffsetDateTime,
) -> Explained {
    let mut said = Explained {
        target: format!("{}:{}", target.host, target.port),
        address: None,
        serves: None,
        trusts: Vec::new(),
        reasons: Vec::new(),
    };
    match seen {
        Seen::NoAddress(why) => said.reasons.push(reason(
            Word::UnknownName,
            format!("{} has no address: {}", target.host, printable(why)),
            "give the address itself, or put the name right in DNS or /etc/hosts of this host",
        )),
        Seen::NoConnection(addr, why) => {
            said.address = Some(addr.to_string());
            said.reasons.push(no_connection(*addr, why));
        }
        Seen::Talked { addr, answer, clear, bare } => {
            said.address = Some(addr.to_string());
            let hello = match answer {
                Answer::Tls(hello) => Some(hello),
                other @ (Answer::Plain
                | Answer::NoCertificate(_)
                | Answer::Refused(_)
                | Answer::Timeout
                | Answer::NotAsked) => {
                    said.reasons.push(no_certificate(*addr, other, *clear));
                    None
                }
            };
            if let Some(hello) = hello {
                said.serves = shown(&hello.chain);
                said.trusts = hello.trusts_der.iter().map(|der| name_text(der)).collect();
                said.reasons.extend(theirs(target, hello, ours, now));
                said.reasons.extend(our_own(hello, bare.as_ref(), ours, now));
            }
        }
    }
    if said.reasons.is_empty() {
        said.reasons.push(reason(
            Word::Good,
            "it serves a leaf of this cluster for what was dialled, and takes this node's".to_owned(),
            "nothing: what fails here is not TLS; look at the token (`ray_token` of `node-agent doctor`) \
             and at Ray's own logs",
        ));
    }
    said
}

fn reason(word: Word, what: String, next: &str) -> Reason {
    Reason { word, what, next: next.to_owned() }
}

fn no_connection(addr: SocketAddr, why: &NoConnection) -> Reason {
    match why {
        NoConnection::Refused => reason(
            Word::NothingListens,
            format!("nothing listens at {addr}: the connection is refused"),
            "start Ray there, or compare the port with the plan: `node-agent ray-flags` on that host",
        ),
        NoConnection::NoAnswer(wait) => reason(
            Word::Filtered,
            format!(
                "{addr} does not answer within {}s: packets are dropped on the way, or the host is down",
                wait.as_secs()
            ),
            "see whether this host is a member there and not blocked: `ca-admin node list`, and \
             `node-agent isolation show` on both hosts; else ask who filters between them",
        ),
        NoConnection::Forbidden => reason(
            Word::Filtered,
            format!("this host's own packet filter lets nothing go to {addr}"),
            "`node-agent isolation show`: is that address blocked, was its node revoked?",
        ),
        NoConnection::Other(why) => reason(
            Word::Unreachable,
            format!("there is no way to {addr}: {}", printable(why)),
            "compare routes and addresses of both hosts: `ip route get ADDRESS`",
        ),
    }
}

fn no_certificate(addr: SocketAddr, answer: &Answer, clear: Option<Clear>) -> Reason {
    match clear {
        Some(Clear::Grpc) => {
            return reason(
                Word::PlainGrpc,
                format!(
                    "{addr} speaks gRPC without TLS: Ray was started there without RAY_USE_TLS=1"
                ),
                "stop Ray on that host and start it through `node-agent exec -- ray start ...`",
            );
        }
        Some(Clear::Http) => {
            return reason(
                Word::PlainHttp,
                format!("{addr} speaks plain HTTP: no port of Ray that has TLS"),
                "dial another port: gRPC of the head is 6379 by default; 8265, 52365 and metrics never have TLS",
            );
        }
        Some(Clear::Nothing) | None => {}
    }
    match answer {
        Answer::Plain => reason(
            Word::NoTls,
            format!("{addr} answers, and not in TLS"),
            "find out who listens there: `ss -ltnp` on that host",
        ),
        Answer::NoCertificate(why) => reason(
            Word::OtherTls,
            format!("{addr} does not shake hands: {}", printable(why)),
            "Ray speaks TLS 1.3 with a P-256 leaf: find out who listens there (`ss -ltnp` on that host), \
             and whether something between the hosts ends TLS",
        ),
        Answer::Refused(why) => reason(
            Word::NothingListens,
            format!("{addr} took a connection and then none: {}", printable(why)),
            "it may just end: try again",
        ),
        Answer::Timeout | Answer::NotAsked | Answer::Tls(_) => reason(
            Word::Silent,
            format!("{addr} takes the connection and says nothing"),
            "the process hangs, or something between the hosts holds the connection: look at its state \
             there (`ss -ltnp`: a full backlog?)",
        ),
    }
}

/// What is wrong with its leaf. Each is judged by itself: a leaf that is over may be another cluster's
/// besides.
fn theirs(target: &Target, hello: &Hello, ours: &Ours<'_>, now: OffsetDateTime) -> Vec<Reason> {
    let Ok((_, leaf)) = X509Certificate::from_der(&hello.chain.leaf_der) else {
        return vec![reason(
            Word::OtherTls,
            "its certificate cannot be read".to_owned(),
            "find out who listens there: `ss -ltnp` on that host",
        )];
    };
    let from = leaf.validity().not_before.to_datetime();
    let to = leaf.validity().not_after.to_datetime();
    let mut wrong = Vec::new();
    if now >= to {
        wrong.push(reason(
            Word::TheirLeafExpired,
            format!("the leaf it serves ended {} ({})", Moment::from(to), Moment::from(to).relative(now)),
            "recycle Ray on that host: it goes on serving the leaf it was started with, whatever its \
             files say; `node-agent status` there",
        ));
    }
    if now < from {
        wrong.push(reason(
            Word::TheirLeafNotYetValid,
            format!("the leaf it serves holds {} only", Moment::from(from).relative(now)),
            "compare the clocks of both hosts and of the CA: `timedatectl status`",
        ));
    }
    if ours.missing.is_none() {
        // Its end may lie before its begin: anyone can make such a certificate.
        wrong.extend(untrusted(hello, ours, now.min(to - time::Duration::SECOND).max(from)));
    }
    // Without the extension any use is allowed, and Ray takes it.
    let usage = leaf.extended_key_usage().ok().flatten();
    if usage.is_some_and(|usage| !usage.value.server_auth && !usage.value.any) {
        wrong.push(reason(
            Word::WrongPurpose,
            "the leaf it serves may not be a server's: it lacks the use serverAuth".to_owned(),
            "that host needs a Ray leaf with both uses: enrol it as a node with node-agent, and recycle Ray",
        ));
    }
    wrong.extend(wrong_name(target, hello));
    wrong
}

fn untrusted(hello: &Hello, ours: &Ours<'_>, at: OffsetDateTime) -> Option<Reason> {
    let why = chain_fault(&hello.chain, ours.roots, at)?;
    let roots: Vec<String> = ours.roots.iter().filter_map(|root| subject_text(root)).collect();
    Some(reason(
        Word::Untrusted,
        format!(
            "the leaf it serves was signed by {}, and this node trusts {}: it is of another cluster, or of \
             no CA of ours ({why})",
            signer(&hello.chain),
            if roots.is_empty() { "no root".to_owned() } else { roots.join(", ") },
        ),
        "see in which cluster that host is enrolled (`node-agent status` there), and that the address is \
         the one you mean",
    ))
}

/// Why a chain does not lead to a root, whatever the leaf is for; `None` where it does.
fn chain_fault(
    chain: &CertificateChain,
    roots: &[CertificateDer<'static>],
    at: OffsetDateTime,
) -> Option<String> {
    let fault = || {
        let store = verify::root_store(roots)?;
        let certificates = chain.certificates();
        let (leaf, issuers) = certificates.split_first().ok_or("no certificate")?;
        let leaf = ParsedCertificate::try_from(leaf).map_err(|e| e.to_string())?;
        let at = u64::try_from(at.unix_timestamp()).map_err(|e| e.to_string())?;
        let at = UnixTime::since_unix_epoch(std::time::Duration::from_secs(at));
        let algorithms = aws_lc_rs::default_provider().signature_verification_algorithms;
        verify_server_cert_signed_by_trust_anchor(&leaf, &store, issuers, at, algorithms.all)
            .or_else(|error| if is_of_purpose(&error) { Ok(()) } else { Err(error) })
            .map_err(|e| e.to_string())
    };
    Result::<(), String>::err(fault())
}

/// What a leaf may be used for is told apart from who signed it.
fn is_of_purpose(error: &rustls::Error) -> bool {
    use rustls::{CertificateError, Error};
    matches!(
        error,
        Error::InvalidCertificate(
            CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. }
        )
    )
}

fn wrong_name(target: &Target, hello: &Hello) -> Option<Reason> {
    let der = CertificateDer::from(hello.chain.leaf_der.clone());
    let name = ServerName::try_from(target.host.clone()).ok()?;
    let leaf = ParsedCertificate::try_from(&der).ok()?;
    verify_server_name(&leaf, &name).err()?;
    let names = shown(&hello.chain).map(|shown| shown.names.join(", ")).unwrap_or_default();
    let names = if names.is_empty() { "no name at all".to_owned() } else { names };
    Some(reason(
        Word::WrongName,
        format!("the leaf it serves is for {names}, and not for {}", target.host),
        "dial one of those; or start Ray there with --node-ip-address of a certified address, or enrol \
         that host again with --address (or --dns)",
    ))
}

/// What is wrong with this node's leaf, as that side sees it.
fn our_own(
    hello: &Hello,
    bare: Option<&Answer>,
    ours: &Ours<'_>,
    now: OffsetDateTime,
) -> Vec<Reason> {
    let Some(leaf) = ours.leaf else {
        return vec![reason(
            Word::NoLeafHere,
            format!(
                "this side has no leaf to show: {}; whether that side takes it was not tried",
                ours.missing.unwrap_or("none is there")
            ),
            "run this as root or as the user that runs Ray, on an enrolled host; else --tls-dir",
        )];
    };
    let mut wrong = own_faults(leaf, now);
    if wrong.is_empty() {
        wrong.extend(refusal(hello, bare, ours));
    }
    wrong
}

fn own_faults(leaf: &LeafFacts, now: OffsetDateTime) -> Vec<Reason> {
    let mut wrong = Vec::new();
    if now >= leaf.not_after {
        let at = Moment::from(leaf.not_after);
        wrong.push(reason(
            Word::OurLeafExpired,
            format!("this node's leaf ended {at} ({})", at.relative(now)),
            "`node-agent status`: is the CA away, was this node revoked?",
        ));
    }
    if now < leaf.not_before {
        wrong.push(reason(
            Word::OurLeafNotYetValid,
            format!("this node's leaf holds {} only", Moment::from(leaf.not_before).relative(now)),
            "this host's clock is behind: `timedatectl status`",
        ));
    }
    if !leaf.client_auth {
        wrong.push(reason(
            Word::OurLeafWrongPurpose,
            "this node's leaf may not be a client's: it lacks the use clientAuth".to_owned(),
            "it is no leaf of node-agent: name its TLS folder with --tls-dir",
        ));
    }
    wrong
}

/// A server of gRPC that refuses a leaf mostly hangs up before its alert is read.
fn refusal(hello: &Hello, bare: Option<&Answer>, ours: &Ours<'_>) -> Option<Reason> {
    let hung_up = hello.hung_up.then_some("it hangs up once it has seen the leaf of this node");
    let refused = hello.refused_us.as_deref().or(hung_up)?;
    Some(why_refused(refused, hello, bare, ours))
}

fn why_refused(refused: &str, hello: &Hello, bare: Option<&Answer>, ours: &Ours<'_>) -> Reason {
    if !hello.trusts_der.is_empty() && !is_trusted(&hello.trusts_der, ours) {
        let trusts: Vec<String> = hello.trusts_der.iter().map(|der| name_text(der)).collect();
        let signed = ours.chain.map(signer).unwrap_or_default();
        return reason(
            Word::OurLeafUntrusted,
            format!(
                "{refused}; it trusts {} alone, and ours was signed by {signed}",
                trusts.join(", ")
            ),
            "Ray there was started with other roots than this cluster's: see its RAY_TLS_CA_CERT \
             (`node-agent doctor` there), and recycle it",
        );
    }
    let anyone = match bare {
        Some(Answer::Tls(bare)) if bare.refused_us.is_none() && !bare.hung_up => {
            "; who shows none is taken: it asks for no certificate"
        }
        Some(_) | None => "",
    };
    reason(
        Word::RefusesOurLeaf,
        format!("{refused}{anyone}"),
        "our leaf is good by this host's clock: compare the clock of that host (`timedatectl status`), and \
         whether a proxy with a CRL stands there and this node or its leaf was revoked (`ca-admin cert list`)",
    )
}

fn is_trusted(trusts_der: &[Vec<u8>], ours: &Ours<'_>) -> bool {
    let issuers = ours.chain.into_iter().flat_map(|chain| {
        std::iter::once(chain.leaf_der.as_slice())
            .chain(chain.issuers_der.iter().map(Vec::as_slice))
    });
    let mut names = issuers.filter_map(|der| {
        let (_, certificate) = X509Certificate::from_der(der).ok()?;
        Some(certificate.issuer().as_raw().to_vec())
    });
    names.any(|name| trusts_der.contains(&name))
}

fn shown(chain: &CertificateChain) -> Option<Shown> {
    let (_, leaf) = X509Certificate::from_der(&chain.leaf_der).ok()?;
    let serial = leaf.raw_serial();
    Some(Shown {
        serial: hex::encode(&serial[..serial.len().min(SERIAL_LEN_MAX)]),
        names: names(&leaf),
        not_before: leaf.validity().not_before.to_datetime().into(),
        not_after: leaf.validity().not_after.to_datetime().into(),
        signed_by: signer(chain),
    })
}

#[allow(clippy::wildcard_enum_match_arm, reason = "x509-parser's enum, not ours")]
fn names(leaf: &X509Certificate<'_>) -> Vec<String> {
    let Ok(Some(names)) = leaf.subject_alternative_name() else { return Vec::new() };
    let text = |name: &GeneralName<'_>| match name {
        GeneralName::DNSName(name) | GeneralName::URI(name) => Some(printable(name)),
        GeneralName::IPAddress(bytes) => address(bytes),
        _ => None,
    };
    names.value.general_names.iter().filter_map(text).take(NAMES_MAX).collect()
}

fn address(bytes: &[u8]) -> Option<String> {
    use std::net::{Ipv4Addr, Ipv6Addr};
    let v4 = <[u8; 4]>::try_from(bytes).ok().map(|bytes| Ipv4Addr::from(bytes).to_string());
    v4.or_else(|| Some(Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?).to_string()))
}

/// Who stands at the end of a chain.
fn signer(chain: &CertificateChain) -> String {
    let last = chain.issuers_der.last().unwrap_or(&chain.leaf_der);
    let read = X509Certificate::from_der(last).ok();
    read.map_or_else(|| "somebody unreadable".to_owned(), |(_, c)| name_text(c.issuer().as_raw()))
}

fn subject_text(der: &[u8]) -> Option<String> {
    let (_, certificate) = X509Certificate::from_der(der).ok()?;
    Some(name_text(certificate.subject().as_raw()))
}

fn name_text(der: &[u8]) -> String {
    match X509Name::from_der(der) {
        Ok((_, name)) => format!("{:?}", printable(&name.to_string())),
        Err(_) => "an unreadable name".to_owned(),
    }
}
