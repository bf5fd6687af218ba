//! Clusters: creating, setting, showing.

use std::time::Duration;

use raymtls_proto::{
    identity::ClusterId,
    v1::{self, create_cluster_request::Life},
};
use tracing::info;

use super::{Operator, convert, fleet, mode, readiness};
use crate::{
    ca::{Ca, CaError},
    keys::{authority, random},
    refusal::Refusal,
    settings,
    store::{Authority, StoreError, records::ClusterRecord, unix_ms},
    upkeep,
};

/// Creates a cluster: root, first issuer, Ray token, CRLs.
///
/// # Errors
/// A refusal, or the store's failure.
pub async fn create(
    ca: &Ca,
    operator: &Operator,
    request: v1::CreateClusterRequest,
) -> Result<v1::Cluster, StoreError> {
    operator.require(v1::AdminRole::Admin, None)?;
    let now = ca.clock.now();
    let cluster = id(&request.cluster)?;
    let settings = match request.life {
        Some(Life::MaxJobSeconds(seconds)) => settings::for_max_job(length(seconds)?)?,
        Some(Life::MaxLifeSeconds(seconds)) => {
            settings::for_max_life(length(seconds)?, now.unix_timestamp())?
        }
        None => {
            let text = "say how long jobs run (max-job) or how long the cluster lives (max-life)";
            return Err(Refusal::SettingInvalid(text.to_owned()).into());
        }
    };
    let scope = Authority::Cluster(cluster.clone());
    let life = time::Duration::seconds(settings.leaf_life_seconds);
    let keys = authority::create(&ca.kek, &scope, now, life).map_err(|error| failed(&error))?;
    // Hexadecimal: Ray sends it in an HTTP header.
    let ray_token = zeroize::Zeroizing::new(hex::encode(random::bytes::<32>()));
    let record = ClusterRecord {
        cluster: cluster.to_string(),
        settings: Some(settings),
        created_ms: unix_ms(now),
        root: Some(keys.root),
        issuers: vec![keys.issuer],
        wrapped_ray_token: ca.kek.wrap(&authority::ray_token_name(&cluster), ray_token.as_bytes()),
        ..ClusterRecord::default()
    };
    ca.store.create_cluster(now, operator.actor.clone(), record).await?;
    ca.load_authority(&scope).await.map_err(|error| failed(&error))?;
    upkeep::tend(ca, &scope).await.map_err(into_store)?;
    info!(%cluster, actor = operator.actor, "cluster created");
    show(ca, operator, &request.cluster).await
}

/// Changes settings, or says what would change.
///
/// # Errors
/// A refusal, or the store's failure.
pub async fn set(
    ca: &Ca,
    operator: &Operator,
    request: v1::SetClusterRequest,
) -> Result<v1::SetClusterResponse, StoreError> {
    const CHANGES_MAX: usize = 64;
    operator.require(v1::AdminRole::Admin, Some(&request.cluster))?;
    let cluster = id(&request.cluster)?;
    if request.changes.is_empty() || request.changes.len() > CHANGES_MAX {
        let text = format!("1 to {CHANGES_MAX} changes of the form KEY=VALUE are wanted");
        return Err(Refusal::SettingInvalid(text).into());
    }
    let before = ca.store.cluster(cluster.clone()).await?.settings().clone();
    let mut after = before.clone();
    for change in &request.changes {
        settings::apply(&mut after, change)?;
    }
    settings::check(&after)?;
    if is_guarded_anew(&before, &after) {
        settings::check_guarded(&after, &ca.endpoints.ports())?;
    }
    let mut notes = settings::notes(&after);
    if after.leaf_life_seconds != before.leaf_life_seconds {
        notes.push(
            "leaves issued before keep their end; running Ray processes serve what they started \
             with until they are started again"
                .to_owned(),
        );
    }
    if before.mode() != after.mode() {
        notes.push(mode::note(ca, &cluster, after.mode()).await?);
    }
    let (was, will_be) = (before.isolation(), after.isolation());
    notes.extend(readiness::notes(ca, &cluster, was, will_be).await?);
    if !request.dry_run {
        let (now, actor) = (ca.clock.now(), operator.actor.clone());
        ca.store.set_cluster(now, actor, cluster.clone(), before.clone(), after.clone()).await?;
        info!(%cluster, actor = operator.actor, "settings changed");
        let scope = Authority::Cluster(cluster);
        // A longer leaf life may want the next issuer now.
        upkeep::tend(ca, &scope).await.map_err(into_store)?;
    }
    Ok(v1::SetClusterResponse { before: Some(before), after: Some(after), notes })
}

/// Whether ports are shut that were not: what a plan of old covers must not keep anybody from opening
/// them.
fn is_guarded_anew(before: &v1::Settings, after: &v1::Settings) -> bool {
    let enforces = |settings: &v1::Settings| settings.isolation() == v1::Isolation::Enforce;
    before.port_plan != after.port_plan || (enforces(after) && !enforces(before))
}

/// All clusters the operator may see.
///
/// # Errors
/// A refusal, or the store's failure.
pub async fn list(ca: &Ca, operator: &Operator) -> Result<v1::ListClustersResponse, StoreError> {
    let mut clusters = Vec::new();
    for record in ca.store.clusters().await? {
        if operator.may_see(&record.cluster) {
            clusters.push(message(ca, record).await?);
        }
    }
    if clusters.is_empty() {
        // Nobody at all may not even ask.
        operator.require(v1::AdminRole::Viewer, operator.clusters.first().map(String::as_str))?;
    }
    Ok(v1::ListClustersResponse { clusters })
}

/// One cluster.
///
/// # Errors
/// A refusal, or the store's failure.
pub async fn show(ca: &Ca, operator: &Operator, cluster: &str) -> Result<v1::Cluster, StoreError> {
    operator.require(v1::AdminRole::Viewer, Some(cluster))?;
    message(ca, ca.store.cluster(id(cluster)?).await?).await
}

/// A cluster's name.
///
/// # Errors
/// `RequestInvalid`.
pub fn id(cluster: &str) -> Result<ClusterId, Refusal> {
    cluster.parse().map_err(|e| Refusal::RequestInvalid(format!("{e}")))
}

async fn message(ca: &Ca, record: ClusterRecord) -> Result<v1::Cluster, StoreError> {
    let cluster = id(&record.cluster)?;
    let settings = record.settings().clone();
    let issuer = |(index, issuer): (usize, crate::store::records::CaKey)| v1::Issuer {
        certificate_der: issuer.certificate_der,
        not_after_unix: issuer.not_after_ms / 1_000,
        active: index == 0,
    };
    let mut message = v1::Cluster {
        notes: settings::notes(&settings),
        cluster: record.cluster,
        settings: Some(settings),
        created_unix: record.created_ms / 1_000,
        version: Some(v1::SyncVersion { epoch: ca.store.epoch(), counter: record.version }),
        issuers: record.issuers.into_iter().enumerate().map(issuer).collect(),
        root_der: record.root.map(|root| root.certificate_der).unwrap_or_default(),
        ..v1::Cluster::default()
    };
    count_nodes(ca, &cluster, &mut message).await?;
    Ok(message)
}

async fn count_nodes(
    ca: &Ca,
    cluster: &ClusterId,
    message: &mut v1::Cluster,
) -> Result<(), StoreError> {
    let now = ca.clock.now();
    let mut horizon = v1::Horizon::default();
    let mut page = String::new();
    loop {
        let nodes = ca.store.nodes(cluster.clone(), page).await?;
        for node in &nodes.rows {
            let last = ca.contacts.last(&node.cluster, &node.name);
            let state = convert::node_state(node, &last, ca.started, now);
            let report = last.report.as_ref();
            if matches!(state, v1::NodeState::Live | v1::NodeState::Absent) && !node.once {
                fleet::add(&mut horizon, &node.name, report.and_then(|r| r.running.as_ref()));
            }
            match state {
                v1::NodeState::Live => message.nodes_live += 1,
                v1::NodeState::Absent => message.nodes_absent += 1,
                v1::NodeState::Left => message.nodes_left += 1,
                v1::NodeState::Revoked => message.nodes_revoked += 1,
                v1::NodeState::Unspecified => {}
            }
        }
        if nodes.next.is_empty() {
            message.horizon = Some(horizon);
            return Ok(());
        }
        page = nodes.next;
    }
}

fn length(seconds: i64) -> Result<Duration, Refusal> {
    u64::try_from(seconds)
        .map(Duration::from_secs)
        .map_err(|_| Refusal::SettingInvalid("a length of time cannot be negative".to_owned()))
}

fn failed(error: &dyn std::error::Error) -> Refusal {
    tracing::error!(%error, "cluster authority");
    Refusal::Internal
}

fn into_store(error: CaError) -> StoreError {
    match error {
        CaError::Store(error) => error,
        CaError::Authority(_) | CaError::NotInitialized | CaError::TrustDomain(_) => {
            failed(&error).into()
        }
    }
}
