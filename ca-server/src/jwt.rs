//! Workload tokens: a signed JWT (RFC 7519) in the place of a bootstrap token, as Kubernetes gives one to
//! each pod. Somebody else made it, so what it allows stands in the configuration: issuer, audience,
//! namespace and service account lead to a cluster and a role. The node's name is the pod's.
//!
//! A JWT becomes the record of a bootstrap token with one use, so everything that holds of those holds
//! here: the use belongs to the first key that spends it, the record and the use are one commit with
//! the node, and `token list` and `token revoke` know it. The record is known by the hash of what is
//! signed, not of the signature: one ECDSA signature can be written in two ways.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use arc_swap::ArcSwap;
use jsonwebtoken::{
    Algorithm, DecodingKey, Validation,
    errors::ErrorKind,
    jwk::{AlgorithmParameters, EllipticCurve, Jwk, JwkSet, KeyAlgorithm, PublicKeyUse},
};
use raymtls_proto::{
    address::AddressRange,
    identity::{ClusterId, Role},
    jwt::{JWT_LEN_MAX, signed_part, token_id},
};
use serde::Deserialize;
use thiserror::Error;
use time::OffsetDateTime;
use tracing::{info, warn};

use crate::{
    refusal::Refusal,
    store::{records::TokenRecord, unix_ms},
    trusted_file::{self, FileFault},
};

/// Rules of one configuration, at most.
const RULES_MAX: usize = 64;
/// Longest JWKS, in bytes.
const JWKS_LEN_MAX: usize = 256 * 1_024;
/// Keys of one JWKS, at most.
const KEYS_MAX: usize = 64;
/// The file is read again this often, and when a token names a key that is not known.
const READ_PAUSE: Duration = Duration::from_secs(60);
/// But no sooner than this.
const READ_PAUSE_MIN: Duration = Duration::from_secs(5);
/// How far the clock of whoever signs may be off.
const SKEW_MAX: time::Duration = time::Duration::seconds(30);
/// No token lives longer, whatever it says: Kubernetes gives an hour by default and a day at most where
/// it extends them.
const LIFE_MAX: time::Duration = time::Duration::hours(25);

/// One `[[jwt]]` table of the configuration: whose tokens enrol what.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// The claim `iss`.
    pub issuer: String,
    /// Must be among the claim `aud`.
    pub audience: String,
    /// The issuer's public keys, as a JWKS (RFC 7517).
    pub jwks_file: PathBuf,
    /// Namespace of the pod.
    pub namespace: String,
    /// Service account of the pod.
    pub service_account: String,
    /// The cluster it may join.
    pub cluster: String,
    /// In which role: `head`, `worker` or `driver`.
    pub role: String,
    /// Addresses that may be certified besides the source address.
    #[serde(default)]
    pub addresses: Vec<String>,
}

/// A rule that cannot hold.
#[derive(Debug, Error)]
#[error("jwt {number}: {why}")]
pub struct RuleError {
    number: usize,
    why: String,
}

/// What is trusted: rules, and the keys behind them.
#[derive(Debug, Default)]
pub struct Workloads {
    sources: Vec<Source>,
}

/// Whose tokens, for whom: verified once, whatever number of rules follow from it.
#[derive(Debug)]
struct Source {
    issuer: String,
    audience: String,
    keys: Arc<Keys>,
    /// One or more, in the order of the configuration.
    rules: Vec<Rule>,
}

/// The keys of one file.
#[derive(Debug)]
struct Keys {
    path: PathBuf,
    known: ArcSwap<Known>,
}

#[derive(Debug, Default)]
struct Known {
    keys: Vec<Jwk>,
    /// Time that passes; absent: never read.
    read_at: Option<Duration>,
}

/// The claims that count. Kubernetes puts what it vouches for into `kubernetes.io`.
#[derive(Debug, Deserialize)]
struct Claims {
    exp: i64,
    iat: i64,
    nbf: Option<i64>,
    #[serde(rename = "kubernetes.io")]
    kubernetes: Kubernetes,
}

#[derive(Debug, Deserialize)]
struct Kubernetes {
    namespace: String,
    pod: Named,
    serviceaccount: Named,
}

#[derive(Debug, Deserialize)]
struct Named {
    name: String,
}

/// Why a JWT is not taken: for the CA's log. The caller hears one word.
#[derive(Debug, Error, PartialEq, Eq)]
enum Fault {
    #[error("no rule of the configuration has its issuer, audience, namespace and service account")]
    NoRule,
    #[error("it is not a JWT: {0}")]
    Form(String),
    #[error("its algorithm {0:?} does not fit the key it names")]
    Algorithm(Algorithm),
    #[error("no key {0:?} in the JWKS")]
    Key(String),
    #[error("its signature is not of that key")]
    Signature,
    #[error("it is of another issuer or for another audience")]
    Claims,
    #[error("it names no pod, namespace or service account, or no time")]
    Incomplete,
    #[error("it is not valid yet, or lives for longer than {} h", LIFE_MAX.whole_hours())]
    Time,
}

impl Workloads {
    /// What the rules say, each checked.
    ///
    /// # Errors
    /// A rule that cannot hold, by its number.
    pub fn parse(rules: &[Rule]) -> Result<Self, RuleError> {
        if rules.len() > RULES_MAX {
            return Err(RuleError { number: rules.len(), why: format!("at most {RULES_MAX}") });
        }
        let mut sources: Vec<Source> = Vec::new();
        for (number, rule) in (1..).zip(rules) {
            check(rule).map_err(|why| RuleError { number, why })?;
            match sources.iter_mut().find(|source| source.is_of(rule)) {
                Some(source) => source.rules.push(rule.clone()),
                None => {
                    let source = Source::of(rule, &sources);
                    sources.push(source);
                }
            }
        }
        Ok(Self { sources })
    }

    /// The record of the one-use token that a JWT stands for. `elapsed` is time that passes, for how
    /// often files are read.
    ///
    /// # Errors
    /// `TokenUnknown` for all that is not signed by a trusted issuer for this CA and bound by a rule,
    /// `TokenExpired` for what was.
    pub async fn judge(
        &self,
        jwt: &str,
        cluster: &ClusterId,
        role: Role,
        now: OffsetDateTime,
        elapsed: Duration,
    ) -> Result<TokenRecord, Refusal> {
        match self.verify(jwt, cluster, role, now, elapsed).await {
            Ok((rule, claims)) => record(jwt, rule, &claims, now),
            Err(fault) => {
                info!(%cluster, %fault, "a workload token was refused");
                Err(Refusal::TokenUnknown)
            }
        }
    }

    async fn verify(
        &self,
        jwt: &str,
        cluster: &ClusterId,
        role: Role,
        now: OffsetDateTime,
        elapsed: Duration,
    ) -> Result<(&Rule, Claims), Fault> {
        if jwt.len() > JWT_LEN_MAX {
            return Err(Fault::Form(format!("longer than {JWT_LEN_MAX} bytes")));
        }
        let header = jsonwebtoken::decode_header(jwt).map_err(|e| Fault::Form(e.to_string()))?;
        let mut fault = Fault::NoRule;
        let mut bound: Option<(&Rule, Claims)> = None;
        for source in &self.sources {
            let claims = match source.verify(jwt, &header, elapsed).await {
                Ok(claims) => claims,
                Err(why) => {
                    fault = why;
                    continue;
                }
            };
            // One account may be bound to several clusters; whether the one asked for is among them is
            // judged like a token's.
            let fits =
                |rule: &&Rule| rule.cluster == cluster.as_str() && rule.role == role.as_str();
            let mut rules = source.rules.iter().filter(|rule| rule.binds(&claims));
            match rules.clone().find(fits).or_else(|| rules.next()) {
                Some(rule) if fits(&rule) => {
                    bound = Some((rule, claims));
                    break;
                }
                Some(rule) if bound.is_none() => bound = Some((rule, claims)),
                Some(_) => {}
                None => fault = Fault::NoRule,
            }
        }
        let (rule, claims) = bound.ok_or(fault)?;
        judge_times(&claims, now)?;
        Ok((rule, claims))
    }
}

fn check(rule: &Rule) -> Result<(), String> {
    for (key, text) in [
        ("issuer", &rule.issuer),
        ("audience", &rule.audience),
        ("namespace", &rule.namespace),
        ("service_account", &rule.service_account),
    ] {
        if text.is_empty() {
            return Err(format!("{key} is empty"));
        }
    }
    rule.cluster.parse::<ClusterId>().map_err(|e| format!("cluster: {e}"))?;
    role_of(rule)
        .ok_or_else(|| format!("role {:?} is none of head, worker and driver", rule.role))?;
    for range in &rule.addresses {
        range.parse::<AddressRange>().map_err(|e| format!("addresses: {e}"))?;
    }
    Ok(())
}

fn role_of(rule: &Rule) -> Option<Role> {
    [Role::Head, Role::Worker, Role::Driver].into_iter().find(|role| role.as_str() == rule.role)
}

/// Expiry is not judged here: an expired one is told so, like a token.
fn judge_times(claims: &Claims, now: OffsetDateTime) -> Result<(), Fault> {
    let at = |unix| OffsetDateTime::from_unix_timestamp(unix).map_err(|_| Fault::Time);
    let (issued, expires) = (at(claims.iat)?, at(claims.exp)?);
    let begins = at(claims.nbf.unwrap_or(claims.iat))?.max(issued);
    if begins > now + SKEW_MAX || expires <= issued || expires - issued > LIFE_MAX {
        return Err(Fault::Time);
    }
    Ok(())
}

fn record(
    jwt: &str,
    rule: &Rule,
    claims: &Claims,
    now: OffsetDateTime,
) -> Result<TokenRecord, Refusal> {
    let expires_ms = claims.exp.saturating_mul(1_000);
    if unix_ms(now) >= expires_ms {
        return Err(Refusal::TokenExpired);
    }
    let role = role_of(rule).ok_or(Refusal::Internal)?;
    let Kubernetes { namespace, pod, serviceaccount } = &claims.kubernetes;
    Ok(TokenRecord {
        id: token_id(jwt).to_string(),
        cluster: rule.cluster.clone(),
        role: role.to_proto().into(),
        secret_hash: signed_part(jwt).to_vec(),
        created_ms: claims.iat.saturating_mul(1_000),
        expires_ms,
        uses: 1,
        node_names: vec![pod.name.clone()],
        address_ranges: rule.addresses.clone(),
        created_by: format!("jwt:{namespace}/{}", serviceaccount.name),
        ..TokenRecord::default()
    })
}

impl Rule {
    fn binds(&self, claims: &Claims) -> bool {
        claims.kubernetes.namespace == self.namespace
            && claims.kubernetes.serviceaccount.name == self.service_account
    }
}

impl Source {
    /// Of a rule that none of the others has: the file of keys may be one that another reads.
    fn of(rule: &Rule, others: &[Self]) -> Self {
        let same = others.iter().find(|other| other.keys.path == rule.jwks_file);
        let keys = same
            .map_or_else(|| Arc::new(Keys::of(&rule.jwks_file)), |other| Arc::clone(&other.keys));
        let (issuer, audience) = (rule.issuer.clone(), rule.audience.clone());
        Self { issuer, audience, keys, rules: vec![rule.clone()] }
    }

    fn is_of(&self, rule: &Rule) -> bool {
        (&self.issuer, &self.audience, &self.keys.path)
            == (&rule.issuer, &rule.audience, &rule.jwks_file)
    }

    async fn verify(
        &self,
        jwt: &str,
        header: &jsonwebtoken::Header,
        elapsed: Duration,
    ) -> Result<Claims, Fault> {
        let name = header.kid.clone().unwrap_or_default();
        let key = self.keys.find(&name, elapsed).await.ok_or_else(|| Fault::Key(name.clone()))?;
        if !algorithms(&key).contains(&header.alg) {
            return Err(Fault::Algorithm(header.alg));
        }
        let mut validation = Validation::new(header.alg);
        validation.set_required_spec_claims(&["exp", "iss", "aud"]);
        validation.set_issuer(&[&self.issuer]);
        validation.set_audience(&[&self.audience]);
        // By the CA's clock, not by the library's.
        validation.validate_exp = false;
        validation.validate_nbf = false;
        let key = DecodingKey::from_jwk(&key).map_err(|_| Fault::Key(name))?;
        let decoded = jsonwebtoken::decode::<Claims>(jwt, &key, &validation);
        decoded.map(|data| data.claims).map_err(|error| fault(&error))
    }
}

impl Keys {
    fn of(path: &Path) -> Self {
        Self { path: path.to_owned(), known: ArcSwap::default() }
    }

    /// The key of this name. A token without one fits a JWKS of one key.
    async fn find(&self, name: &str, elapsed: Duration) -> Option<Jwk> {
        let found = |known: &Known| match (name, known.keys.as_slice()) {
            ("", [only]) => Some(only.clone()),
            ("", _) => None,
            (name, keys) => {
                let named = |key: &&Jwk| key.common.key_id.as_deref() == Some(name);
                keys.iter().find(named).cloned()
            }
        };
        let known = self.known.load_full();
        let age = known.read_at.map(|at| elapsed.saturating_sub(at));
        let key = found(&known);
        let is_fresh = age.is_some_and(|age| age < READ_PAUSE);
        let is_recent = age.is_some_and(|age| age < READ_PAUSE_MIN);
        if is_recent || (is_fresh && key.is_some()) {
            return key;
        }
        let path = self.path.clone();
        let read = tokio::task::spawn_blocking(move || read_keys(&path)).await;
        let keys = match read {
            Ok(Ok(keys)) => keys,
            Ok(Err(why)) => {
                warn!(path = %self.path.display(), why, "the JWKS cannot be read: what was read before stays in force");
                known.keys.clone()
            }
            Err(_) => known.keys.clone(),
        };
        let now_known = Arc::new(Known { keys, read_at: Some(elapsed) });
        self.known.store(Arc::clone(&now_known));
        found(&now_known)
    }
}

#[allow(clippy::wildcard_enum_match_arm, reason = "the library's words, for the log")]
fn fault(error: &jsonwebtoken::errors::Error) -> Fault {
    match error.kind() {
        ErrorKind::InvalidSignature => Fault::Signature,
        ErrorKind::InvalidIssuer | ErrorKind::InvalidAudience => Fault::Claims,
        ErrorKind::Json(_) | ErrorKind::MissingRequiredClaim(_) => Fault::Incomplete,
        _ => Fault::Form(error.to_string()),
    }
}

/// What may sign with a key: by what the key is, never by what the token says.
#[allow(clippy::wildcard_enum_match_arm, reason = "what is not listed signs nothing")]
fn algorithms(key: &Jwk) -> Vec<Algorithm> {
    use Algorithm::{ES256, ES384, EdDSA, PS256, PS384, PS512, RS256, RS384, RS512};
    if !matches!(key.common.public_key_use, None | Some(PublicKeyUse::Signature)) {
        return Vec::new();
    }
    let of_kind: &[Algorithm] = match &key.algorithm {
        AlgorithmParameters::RSA(_) => &[RS256, RS384, RS512, PS256, PS384, PS512],
        AlgorithmParameters::EllipticCurve(parameters) => match parameters.curve {
            EllipticCurve::P256 => &[ES256],
            EllipticCurve::P384 => &[ES384],
            _ => &[],
        },
        AlgorithmParameters::OctetKeyPair(_) => &[EdDSA],
        // Secret keys, and kinds of a later release.
        _ => &[],
    };
    let said = key.common.key_algorithm.as_ref().map(KeyAlgorithm::to_string);
    let fits =
        |algorithm: &&Algorithm| said.as_ref().is_none_or(|said| *said == format!("{algorithm:?}"));
    of_kind.iter().filter(fits).copied().collect()
}

fn read_keys(path: &Path) -> Result<Vec<Jwk>, String> {
    let text = trusted_file::read(path, 0o022, JWKS_LEN_MAX).map_err(|fault| match fault {
        FileFault::Exposed(mode) => {
            format!("mode {mode:04o}: whoever writes it can enrol: run `chmod go-w` on it")
        }
        FileFault::System(_) | FileFault::Owner(_) | FileFault::TooLong(_) | FileFault::NotText => {
            fault.to_string()
        }
    })?;
    let set: JwkSet = serde_json::from_str(&text).map_err(|e| e.to_string())?;
    match set.keys.len() {
        0 => Err("it holds no key".to_owned()),
        1..=KEYS_MAX => Ok(set.keys),
        more => Err(format!("{more} keys: at most {KEYS_MAX}")),
    }
}
