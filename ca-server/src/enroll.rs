//! Enrolment: a credential becomes an identity. Cheapest check first; nothing leaves before the
//! commit, and nothing in the commit is half there.

use std::net::IpAddr;

use raymtls_proto::{
    address::NodeAddress,
    identity::{ClusterId, DnsName, NodeName, Role},
    jwt,
    token::{BootstrapToken, TokenId},
    v1::{self, enroll_request::Credential},
};
use secrecy::{ExposeSecret, SecretString};
use time::OffsetDateTime;
use tracing::info;

use crate::{
    ca::Ca,
    failpoint::{self, Point},
    keys::{csr::UnprovedCsr, profile::Contents, random},
    policy::NAMES_MAX,
    refusal::Refusal,
    sign_failed,
    store::{Authority, EnrollAsk, EnrollPlan, Enrolled, StoreError, records::TokenRecord},
};

/// Answers one `Enroll`.
///
/// # Errors
/// A refusal, or the store's failure.
pub async fn enroll(
    ca: &Ca,
    request: v1::EnrollRequest,
    peer_address: IpAddr,
) -> Result<v1::EnrollResponse, StoreError> {
    let now = ca.clock.now();
    // 1. What is asked, in types.
    let parsed = Parsed::from(request).map_err(StoreError::from);
    let parsed = parsed.map_err(|error| unless_too_many(ca, peer_address, error))?;

    // 2. Whether anybody made this token: nothing is charged to others, or looked at, before.
    let known = known_token(ca, &parsed, now).await;
    let token = known.map_err(|error| unless_too_many(ca, peer_address, error))?;
    ca.limiter.attempt(ca.clock.elapsed(), peer_address)?;
    let csr = UnprovedCsr::read(parsed.csr_der)?;
    let ask = EnrollAsk {
        token: token.id,
        secret_hash: token.secret_hash,
        cluster: parsed.cluster,
        role: parsed.role,
        name: parsed.name,
        key_hash: csr.key_hash(),
        source: NodeAddress::new(peer_address).ok(),
        addresses: parsed.addresses,
        dns_names: parsed.dns_names,
        shared_address: parsed.shared_address,
        once: parsed.once,
        vouched: token.vouched,
    };

    // 3. Token, policy, who holds what; then the signature; and only what is proved to be good draws
    //    on what all share.
    let plan = ca.store.plan_enroll(now, ask.clone()).await?;
    let csr = csr.prove()?;
    ca.limiter.enrolment(ca.clock.elapsed(), &ask.token)?;
    let enrolled = match plan {
        EnrollPlan::Replay(enrolled) => *enrolled,
        EnrollPlan::Issue(binding) => {
            // 4. Sign, read back, compare.
            let contents = Contents::agent_identity(
                random::serial(now),
                now,
                &ca.trust_domain,
                &ask.cluster,
                &binding.name,
            );
            let control = ca.authority(&Authority::Control)?;
            let signed =
                control.active().sign(&contents, csr.spki_der(), now).map_err(sign_failed)?;
            failpoint::hit(Point::AfterSign);

            // 5. One commit: the token's use, the node, the certificate, the audit record.
            let serial = signed.serial;
            let enrolled = ca.store.enroll(now, ask.clone(), binding, signed).await?;
            // Another call of the same key may have come first: then its certificate is the answer.
            if enrolled.identity.serial == serial.as_bytes() {
                ca.metrics.issued("agent_identity");
                // What an earlier machine of the name reported is not this one's.
                ca.contacts.forget(ask.cluster.as_str(), &enrolled.node.name);
                info!(
                    cluster = %ask.cluster, node = enrolled.node.name, role = %ask.role,
                    token = %ask.token, "node enrolled"
                );
            }
            enrolled
        }
    };
    failpoint::hit(Point::BeforeReply);

    // 6. What the node needs to go on.
    response(ca, &ask.cluster, enrolled, now.unix_timestamp())
}

/// A token that somebody made.
struct KnownToken {
    id: TokenId,
    secret_hash: [u8; 32],
    vouched: Option<Box<TokenRecord>>,
}

async fn known_token(
    ca: &Ca,
    parsed: &Parsed,
    now: OffsetDateTime,
) -> Result<KnownToken, StoreError> {
    match &parsed.credential {
        Presented::Token(token) => {
            let (id, secret_hash) = (token.id().clone(), token.secret_hash());
            ca.store.check_token(id.clone(), secret_hash).await?;
            Ok(KnownToken { id, secret_hash, vouched: None })
        }
        Presented::Jwt(jwt) => {
            let (cluster, elapsed) = (&parsed.cluster, ca.clock.elapsed());
            let jwt = jwt.expose_secret();
            let record = ca.workloads.judge(jwt, cluster, parsed.role, now, elapsed).await?;
            Ok(KnownToken {
                id: jwt::token_id(jwt),
                secret_hash: jwt::signed_part(jwt),
                vouched: Some(Box::new(record)),
            })
        }
    }
}

/// A wrong token counts against the address it came from, and is a reason to look. Past the limit the
/// answer is that there were too many.
fn unless_too_many(ca: &Ca, peer_address: IpAddr, error: StoreError) -> StoreError {
    if error.refusal() != Refusal::TokenUnknown {
        return error;
    }
    ca.metrics.wrong_token();
    let too_many = ca.limiter.wrong_token(ca.clock.elapsed(), peer_address).err();
    too_many.map_or(error, StoreError::from)
}

fn response(
    ca: &Ca,
    cluster: &ClusterId,
    enrolled: Enrolled,
    server_time_unix: i64,
) -> Result<v1::EnrollResponse, StoreError> {
    Ok(v1::EnrollResponse {
        node_name: enrolled.node.name,
        addresses: enrolled.node.addresses.into_iter().map(|bound| bound.address).collect(),
        dns_names: enrolled.node.dns_names,
        identity: Some(ca.identity_chain(enrolled.identity)?),
        settings: Some(enrolled.settings),
        bundle: Some(ca.bundle(cluster)?),
        server_time_unix,
    })
}

/// What a caller shows, in its form.
enum Presented {
    Token(BootstrapToken),
    Jwt(SecretString),
}

struct Parsed {
    credential: Presented,
    cluster: ClusterId,
    role: Role,
    name: NodeName,
    addresses: Vec<NodeAddress>,
    dns_names: Vec<DnsName>,
    csr_der: Vec<u8>,
    shared_address: bool,
    once: bool,
}

impl Parsed {
    fn from(request: v1::EnrollRequest) -> Result<Self, Refusal> {
        let invalid = |text: String| Refusal::RequestInvalid(text);
        let credential = match request.credential {
            // A token of no valid form is one nobody made: the same word.
            Some(Credential::BootstrapToken(token)) => {
                Presented::Token(token.parse().map_err(|_| Refusal::TokenUnknown)?)
            }
            Some(Credential::Jwt(jwt)) => Presented::Jwt(jwt.into()),
            None => return Err(invalid("no credential this server knows".to_owned())),
        };
        let role = Role::from_proto(request.role)
            .ok_or_else(|| invalid("a role is wanted: head, worker or driver".to_owned()))?;
        Ok(Self {
            credential,
            cluster: request.cluster.parse().map_err(|e| invalid(format!("{e}")))?,
            role,
            name: request.node_name.parse().map_err(|e| Refusal::NameNotAllowed(format!("{e}")))?,
            addresses: addresses(&request.addresses)?,
            dns_names: dns_names(&request.dns_names)?,
            csr_der: request.csr_der,
            shared_address: request.shared_address,
            once: request.once,
        })
    }
}

/// Addresses of a request.
///
/// # Errors
/// `AddressNotAllowed` for one that no node can be known by, or too many.
pub fn addresses(texts: &[String]) -> Result<Vec<NodeAddress>, Refusal> {
    if texts.len() > NAMES_MAX {
        return Err(Refusal::AddressNotAllowed(format!("more than {NAMES_MAX} addresses")));
    }
    let parsed = texts
        .iter()
        .map(|text| text.parse().map_err(|e| Refusal::AddressNotAllowed(format!("{e}"))));
    without_repeats(parsed)
}

/// DNS names of a request.
///
/// # Errors
/// `NameNotAllowed` for one of no valid form, or too many.
pub fn dns_names(texts: &[String]) -> Result<Vec<DnsName>, Refusal> {
    if texts.len() > NAMES_MAX {
        return Err(Refusal::NameNotAllowed(format!("more than {NAMES_MAX} DNS names")));
    }
    let parsed =
        texts.iter().map(|text| text.parse().map_err(|e| Refusal::NameNotAllowed(format!("{e}"))));
    without_repeats(parsed)
}

/// In order, each once: two spellings of one address are one SAN.
fn without_repeats<T: PartialEq>(
    parsed: impl Iterator<Item = Result<T, Refusal>>,
) -> Result<Vec<T>, Refusal> {
    let mut once = Vec::new();
    for item in parsed {
        let item = item?;
        if !once.contains(&item) {
            once.push(item);
        }
    }
    Ok(once)
}
