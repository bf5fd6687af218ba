//! `docs/metrics.md`, from what the CA and an agent really answer to a scrape.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use node_agent::{config::Config, enroll};
use raymtls_proto::v1;
use raymtls_tests::{
    Deployment,
    agents::{RunningAgent, SOON, config, options},
    ask, word,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::{sleep, timeout},
};

const HEAD: &str = "\
# Metrics

Generated from what the programs answer; a test holds the two together.

Both speak Prometheus' text format, on loopback: `ca-server` at `http://127.0.0.1:7446/metrics`, each
`node-agent` at `http://127.0.0.1:7447/metrics`. `/livez` says that the process answers. `/readyz` says
that the CA can sign and commit, or that what starts on the node now finds a valid leaf and Ray's token.
The unit stands in the name. A counter's series ends in `_total`.
";
const DAY: Duration = Duration::from_secs(86_400);

/// Name to type, text and labels.
type Found = BTreeMap<String, (String, String, Vec<String>)>;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_document_is_what_the_programs_answer() {
    let deployment = Deployment::start().await;
    deployment.cluster("c1", DAY).await;
    let scraped = scrape_agent(&deployment).await;
    provoke(&deployment).await;
    let mut ca = describe(&deployment.ca.metrics.text());
    let mut agent = describe(&scraped);
    assert!(ca.len() >= 10 && agent.len() >= 6, "{} and {}", ca.len(), agent.len());
    add_unseen(&mut ca, "raymtls_ca", "ca-server/src/metrics.rs");
    add_unseen(&mut agent, "raymtls_agent", "node-agent/src/http.rs");
    super::must_be(
        "docs/metrics.md",
        &format!("{HEAD}\n## ca-server\n\n{}\n## node-agent\n\n{}", table(&ca), table(&agent)),
    );
    deployment.finish().await;
}

/// What makes series appear that are there only once something happened.
async fn provoke(deployment: &Deployment) {
    let key = node_agent::keys::PrivateKey::generate().unwrap();
    let unknown = format!("{}.{}", "0".repeat(16), "0".repeat(64));
    let request = ask(&unknown, "c1", "w2", &["10.0.0.2"], &key);
    let refused = deployment.enrollment_client().enroll(request).await;
    assert_eq!(word(refused), "TOKEN_UNKNOWN");
    let mut stream = TcpStream::connect(deployment.enrollment).await.unwrap();
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n").await.unwrap();
    let failed = || deployment.ca.metrics.text().contains("handshakes_failed_total{");
    timeout(SOON, async {
        while !failed() {
            sleep(Duration::from_millis(10)).await;
        }
    })
    .await
    .expect("a failed handshake is counted");
}

/// Enrols an agent, runs it until it is in touch, and reads its metrics.
async fn scrape_agent(deployment: &Deployment) -> String {
    let at = |name: &str| deployment.folder.path().join(name);
    let token = deployment.token("c1", v1::Role::Worker, 1).await;
    deployment.write_join("c1", &token, &at("join"));
    let options = options(deployment.folder.path(), "w1", "10.0.0.1");
    let clock = Arc::new(deployment.clock.clone());
    enroll::enroll(&options, clock.clone()).await.unwrap();
    let port = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let config = Config { http_listen: Some(port), ..config(deployment.folder.path()) };
    let agent = RunningAgent::start(config, clock);
    agent.until("in touch", |status| status.ca.last_contact.is_some()).await;
    let text = timeout(SOON, scrape(port)).await.expect("an answer");
    agent.stop().await;
    text
}

async fn scrape(port: std::net::SocketAddr) -> String {
    let mut stream = TcpStream::connect(port).await.unwrap();
    stream
        .write_all(b"GET /metrics HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        .await
        .unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    text
}

/// Reads `# HELP`, `# TYPE` and the labels of the series.
fn describe(text: &str) -> Found {
    let mut found = Found::new();
    for line in text.lines() {
        if let Some((name, help)) = line.strip_prefix("# HELP ").and_then(|l| l.split_once(' ')) {
            found.entry(name.to_owned()).or_default().1 = help.trim_end_matches('.').to_owned();
        } else if let Some((name, kind)) =
            line.strip_prefix("# TYPE ").and_then(|l| l.split_once(' '))
        {
            found.entry(name.to_owned()).or_default().0 = kind.to_owned();
        } else if let Some((name, labels)) = line.split_once('{') {
            let name = name.strip_suffix("_total").unwrap_or(name);
            let Some(entry) = found.get_mut(name) else { continue };
            let labels = labels.split('}').next().unwrap_or_default();
            let names = labels.split("\",").filter_map(|label| label.split_once('='));
            entry.2 = names.map(|(name, _)| name.to_owned()).collect();
        }
    }
    found
}

fn table(found: &Found) -> String {
    let head = "| name | type | labels | what |\n|---|---|---|---|\n".to_owned();
    let rows = found.iter().map(|(name, (kind, help, labels))| {
        let labels: Vec<_> = labels.iter().map(|label| format!("`{label}`")).collect();
        format!("| `{name}` | {kind} | {} | {help} |\n", labels.join(", "))
    });
    rows.fold(head, |text, row| text + &row)
}

/// A series with labels is there only once it has happened: what is registered and was not seen is
/// named all the same.
fn add_unseen(found: &mut Found, prefix: &str, file: &str) {
    let registered = registered(&super::read(file.as_ref()));
    assert!(registered.len() >= 3, "{file}: only {} calls found", registered.len());
    for (name, help) in registered {
        let help = format!("{help} (there once it has happened)");
        found
            .entry(format!("{prefix}_{name}"))
            .or_insert_with(|| (String::new(), help, Vec::new()));
    }
}

/// Name and help, which stand first in a call of `register(` or `gauge(`.
fn registered(source: &str) -> Vec<(String, String)> {
    let code = source.split("#[cfg(test)]").next().unwrap_or_default();
    let calls = code.split("register(").skip(1).chain(code.split("gauge(").skip(1));
    let named = calls.filter(|rest| rest.trim_start().starts_with('"'));
    named
        .filter_map(|rest| {
            let mut literals = rest.split('"').skip(1).step_by(2);
            Some((literals.next()?.to_owned(), plain(literals.next()?)))
        })
        .collect()
}

/// A string literal without its continued lines.
fn plain(literal: &str) -> String {
    literal.split("\\\n").map(str::trim_start).collect::<String>()
}

#[test]
fn a_metric_named_anywhere_in_the_documents_exists() {
    if std::env::var_os("UPDATE_SNAPSHOT").is_some() {
        return; // The list is being written meanwhile.
    }
    let there = super::read("docs/metrics.md".as_ref());
    let mut gone = Vec::new();
    for document in super::files(".md") {
        let text = super::read(&document);
        for rest in text.split("raymtls_").skip(1) {
            let fits = |c: char| c.is_ascii_alphanumeric() || c == '_';
            let word = rest.split(|c| !fits(c)).next().unwrap_or_default();
            let name = format!("raymtls_{}", word.strip_suffix("_total").unwrap_or(word));
            let is_metric = word.starts_with("ca_") || word.starts_with("agent_");
            if is_metric && !there.contains(&format!("| `{name}` |")) {
                gone.push(format!("{}: {name}", document.display()));
            }
        }
    }
    assert!(gone.is_empty(), "no such metric:\n  {}", gone.join("\n  "));
}
