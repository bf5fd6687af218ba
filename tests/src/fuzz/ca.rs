//! What the CA reads: its configuration, an operator's settings, the values of its store, the
//! reports of its nodes.

use std::{fmt::Debug, path::Path};

use ca_server::{
    admin::convert,
    config::Config,
    contacts::LastContact,
    proxy_protocol::{self, HEADER_LEN_MAX, ProxyError, Source},
    settings,
    store::{
        FORMAT,
        kv::KvStore,
        layout,
        memory::MemoryEngine,
        record::Record,
        records::{
            AddressRecord, AuditHead, AuditRecord, BlockRecord, CaKey, CertificateRecord,
            ClusterRecord, ControlRecord, CrlSet, Header, KeyRecord, NodeRecord, RevocationRecord,
            TokenRecord, UseRecord,
        },
        view::{Engine, Writes},
    },
    sync,
};
use node_agent::{
    config::{Partial, User},
    verify,
};
use prost::Message;
use raymtls_proto::{address::AddressRange, clock, join::is_endpoint, v1};
use time::OffsetDateTime;

use super::{ERROR_LEN_MAX, text};

/// `ca-server.toml` and `agent.toml`: what is accepted is inside its bounds.
pub fn config(data: &[u8]) {
    let Some(text) = text(data) else { return };
    if let Ok(config) = Config::parse(text, Path::new("ca.toml")) {
        assert!(config.http_listen.ip().is_loopback(), "plain HTTP for anyone");
        for endpoints in [&config.enrollment_endpoints, &config.node_endpoints] {
            assert!(endpoints.len() <= 16);
            // Else every join file this server makes would be refused.
            let odd = endpoints.iter().find(|endpoint| !is_endpoint(endpoint));
            assert_eq!(odd, None, "no join file may hold it");
        }
    }
    if let Ok(partial) = toml::from_str::<Partial>(text) {
        // A group's name is looked up in a file; a number is not.
        let numeric = partial.ray_group.as_ref().is_none_or(|group| group.parse::<u32>().is_ok());
        if numeric && let Ok(config) = partial.clone().complete() {
            let by_number = match partial.ray_uid {
                Some(User::Id(uid)) => Some(uid),
                Some(User::Name(_)) | None => config.ray_uid,
            };
            assert_eq!(config.ray_uid, by_number);
            assert_eq!(config.http_listen.is_none(), partial.http_listen.as_deref() == Some("off"));
        }
    }
}

/// `KEY=VALUE` lines of `cluster set`: what is accepted is inside its bounds, what is refused changes
/// nothing.
pub fn settings(data: &[u8]) {
    let Some(text) = text(data) else { return };
    let day = std::time::Duration::from_secs(86_400);
    let fresh = if data.len().is_multiple_of(2) {
        settings::for_max_job(day)
    } else {
        settings::for_max_life(day, 1_764_000_000)
    };
    let mut settings = fresh.expect("a day is inside the bounds");
    for change in text.lines().take(64) {
        let before = settings.clone();
        if let Err(refusal) = settings::apply(&mut settings, change) {
            let said = refusal.to_string();
            assert!(said.len() <= ERROR_LEN_MAX, "{} bytes: {said}", said.len());
            assert_eq!(settings, before, "refused, and yet changed: {change:?}");
        }
        settings_hold(&settings);
    }
    if settings::check(&settings).is_ok() {
        ports_hold(&settings.port_plan.expect("every cluster has a plan"));
    }
    assert!(!settings::notes(&settings).is_empty());
    assert_eq!(v1::Settings::decode(&settings.encode_to_vec()[..]), Ok(settings));
}

fn settings_hold(settings: &v1::Settings) {
    if settings.ends_unix == 0 {
        assert!((120..=40 * 86_400).contains(&settings.max_job_seconds), "{settings:?}");
        match settings.mode() {
            // A life of its own, whatever the longest job is.
            v1::Mode::Tunnel => {
                assert!((60..=7 * 86_400).contains(&settings.leaf_life_seconds), "{settings:?}");
            }
            v1::Mode::Files | v1::Mode::Unspecified => {
                assert_eq!(settings.leaf_life_seconds, 2 * settings.max_job_seconds);
            }
        }
    } else {
        assert_eq!(settings.max_job_seconds, 0);
        if settings.mode() != v1::Mode::Tunnel {
            assert_eq!(settings.leaf_life_seconds, 86_400);
        }
    }
    assert!((300..=90 * 86_400).contains(&settings.lease_seconds), "{settings:?}");
    for ranges in [&settings.admin_ranges, &settings.scraper_ranges, &settings.driver_ranges] {
        assert!(ranges.len() <= 64);
        for range in ranges {
            assert_eq!(range.parse::<AddressRange>().map(|r| r.to_string()).as_ref(), Ok(range));
        }
    }
}

/// What `settings::check` promises, said another way.
fn ports_hold(plan: &v1::PortPlan) {
    let mut taken = vec![
        plan.gcs,
        plan.ray_client,
        plan.dashboard,
        plan.node_manager,
        plan.object_manager,
        plan.runtime_env_agent,
        plan.dashboard_agent_grpc,
        plan.dashboard_agent_http,
        plan.metrics_export,
    ];
    taken.extend(plan.worker_min..=plan.worker_max);
    if plan.collective_min != 0 {
        taken.extend(plan.collective_min..=plan.collective_max);
    }
    assert!(taken.iter().all(|port| (1..=65_535).contains(port)), "{plan:?}");
    let count = taken.len();
    taken.sort_unstable();
    taken.dedup();
    assert_eq!(taken.len(), count, "a port with two purposes: {plan:?}");
}

/// A value of the store. The first byte chooses the record; the rest is its bytes.
pub fn store(data: &[u8]) {
    let Some((kind, value)) = data.split_first() else { return };
    match kind % 18 {
        0 => value_holds::<Header>(value),
        1 => value_holds::<CaKey>(value),
        2 => value_holds::<CrlSet>(value),
        3 => value_holds::<ControlRecord>(value),
        4 => value_holds::<ClusterRecord>(value),
        5 => value_holds::<TokenRecord>(value),
        6 => value_holds::<UseRecord>(value),
        7 => value_holds::<NodeRecord>(value),
        8 => value_holds::<AddressRecord>(value),
        9 => value_holds::<BlockRecord>(value),
        10 => value_holds::<CertificateRecord>(value),
        11 => value_holds::<RevocationRecord>(value),
        12 => value_holds::<AuditRecord>(value),
        13 => value_holds::<AuditHead>(value),
        14 => value_holds::<KeyRecord>(value),
        15 => opens(value, &[], &[]),
        16 => opens(&good_header(), value, &[]),
        _ => opens(&good_header(), &[], value),
    }
}

/// A record that reads is the same when it is written and read again, and what the code above relies
/// on is there.
fn value_holds<R: Record + PartialEq + Debug + Shown>(value: &[u8]) {
    let Ok(record) = R::read(value) else { return };
    let written = record.encode_to_vec();
    assert_eq!(R::read(&written).as_ref(), Ok(&record), "written and read again, another record");
    record.show();
}

/// What is done with a record wherever one is shown.
trait Shown {
    fn show(self);
}

macro_rules! not_shown {
    ($($record:ident),+) => { $(impl Shown for $record { fn show(self) {} })+ };
}

not_shown!(
    Header,
    CaKey,
    CrlSet,
    ControlRecord,
    UseRecord,
    AddressRecord,
    BlockRecord,
    RevocationRecord,
    AuditRecord,
    AuditHead,
    KeyRecord
);

impl Shown for ClusterRecord {
    fn show(self) {
        let _ = self.settings();
    }
}

impl Shown for TokenRecord {
    fn show(self) {
        let _ = convert::token(self, now());
    }
}

impl Shown for NodeRecord {
    fn show(self) {
        let _ = self.current();
        let _ = self.known_role();
        let _ = self.holds_exclusively();
        let _ = convert::node(self, LastContact::default(), now(), now(), 86_400);
    }
}

impl Shown for CertificateRecord {
    fn show(self) {
        let _ = self.known_serial();
        let _ = convert::certificate(self);
    }
}

fn now() -> OffsetDateTime {
    clock::from_unix(1_764_000_000).expect("a date")
}

fn good_header() -> Vec<u8> {
    Header { format: FORMAT, epoch: 7 }.encode_to_vec()
}

/// Opening a store looks at its header, the end of its audit log and its clusters: it opens, or says
/// in words why not.
fn opens(header: &[u8], audit_head: &[u8], cluster: &[u8]) {
    let mut engine = MemoryEngine::new();
    let mut writes = Writes::from([(layout::HEADER.to_vec(), Some(header.to_vec()))]);
    for (key, value) in
        [(layout::AUDIT_HEAD.to_vec(), audit_head), (layout::cluster("c1"), cluster)]
    {
        if !value.is_empty() {
            writes.insert(key, Some(value.to_vec()));
        }
    }
    engine.commit(&writes).expect("memory takes all");
    match KvStore::open(Box::new(engine), now()) {
        Ok(_) => {
            let header = Header::read(header).expect("it opened");
            assert_eq!(header.format, FORMAT, "a store of another format opened");
        }
        Err(error) => assert!(error.to_string().len() <= ERROR_LEN_MAX, "{error}"),
    }
}

/// What travels with Sync, both ways: a node's report is bounded before it is kept, and what a CA
/// answers is judged before it replaces a file.
pub fn report(data: &[u8]) {
    if let Ok(request) = v1::SyncRequest::decode(data) {
        assert_eq!(v1::SyncRequest::decode(&request.encode_to_vec()[..]).as_ref(), Ok(&request));
        if let Some(report) = &request.report
            && sync::check_report(report).is_ok()
        {
            // 64 folders of a name and a serial, a version, and the numbers.
            assert!(report.encoded_len() <= 64 * (64 + 20 + 32) + 1_024, "a report of any length");
            let words = report.key_folders.iter().map(|folder| &folder.name);
            let mut words = words.chain([&report.agent_version]);
            assert!(words.all(|word| !word.contains(char::is_control)), "it steers a terminal");
        }
    }
    let Ok(answer) = v1::SyncResponse::decode(data) else { return };
    if let Some(bundle) = &answer.bundle
        && verify::bundle(bundle).is_ok()
    {
        assert!(!bundle.roots_der.is_empty());
    }
    if let Some(crl) = &answer.control_crl {
        let _ = verify::crls(&crl.crls_der);
    }
    if let Some(token) = &answer.ray_token
        && verify::ray_token(&token.token).is_ok()
    {
        assert!(token.token.iter().all(u8::is_ascii_graphic));
    }
}

/// What a balancer says before TLS begins: a header is read to its end and no further, and one that
/// is cut anywhere asks for more.
pub fn proxy(data: &[u8]) {
    match proxy_protocol::parse(data) {
        Ok(header) => {
            assert!((16..=HEADER_LEN_MAX.min(data.len())).contains(&header.len), "{header:?}");
            assert_eq!(proxy_protocol::parse(&data[..header.len]).ok(), Some(header));
            if let Source::Client(ip) = header.source {
                assert_eq!(ip, ip.to_canonical(), "not canonical");
            }
            for end in 0..header.len {
                let cut = proxy_protocol::parse(&data[..end]);
                let more =
                    matches!(cut, Err(ProxyError::Short(len)) if end < len && len <= header.len);
                assert!(more, "cut at {end}: {cut:?}");
            }
        }
        Err(ProxyError::Short(len)) => assert!(data.len() < len && len <= HEADER_LEN_MAX, "{len}"),
        Err(error) => assert!(error.to_string().len() <= ERROR_LEN_MAX, "{error}"),
    }
}
