//! Nodes that enrol, get leaves and renew until the server is gone.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use node_agent::{
    client::{CallError, CallLimits, EnrollmentClient, NodeClient, Target},
    keys::PrivateKey,
    statedir::Identity,
};
use raymtls_proto::{
    clock::SystemClock,
    reason::Reason,
    v1::{self, enroll_request::Credential},
};
use tokio::task::JoinSet;

use super::{
    deployment::Deployment,
    ledger::{Key, Ledger},
};

const WORKERS: usize = 12;
const LIMITS: CallLimits = CallLimits {
    connect: Duration::from_secs(5),
    call: Duration::from_secs(10),
    sync_wait: Duration::from_secs(1),
};
const SETTLE_TRIES: u32 = 100;

pub(crate) struct Load {
    ended: Arc<AtomicBool>,
    workers: JoinSet<()>,
}

/// Starts the workers; each goes on until the server is away.
pub(crate) fn start(deployment: &Deployment, ledger: &Arc<Ledger>) -> Load {
    let ended = Arc::new(AtomicBool::new(false));
    let mut workers = JoinSet::new();
    let repeatable = ledger.repeatable();
    for worker in 0..WORKERS {
        // The newest first: what the last death left without an answer.
        let again: Vec<_> =
            repeatable.iter().rev().skip(worker).step_by(WORKERS).take(3).cloned().collect();
        let client = Client::new(deployment, Arc::clone(ledger));
        let ended = Arc::clone(&ended);
        workers.spawn(async move { client.work(&again, &ended).await });
    }
    Load { ended, workers }
}

impl Load {
    /// Waits for the workers, after the server's death.
    pub(crate) async fn stop(mut self) {
        self.ended.store(true, Ordering::Relaxed);
        while let Some(done) = self.workers.join_next().await {
            done.unwrap();
        }
    }
}

/// Asks again, of a server that stays, for every answer that can be asked for.
pub(crate) async fn settle(deployment: &Deployment, ledger: &Arc<Ledger>) {
    let mut client = Client::new(deployment, Arc::clone(ledger));
    for (number, key) in ledger.repeatable() {
        let mut tries = 0;
        while let Err(error) = client.enroll(number, &key).await {
            tries += 1;
            assert!(tries < SETTLE_TRIES, "key {number}: {error}");
            tokio::time::sleep(error.retry_after().unwrap_or(Duration::from_millis(20))).await;
        }
    }
}

struct Client {
    ledger: Arc<Ledger>,
    token: String,
    node: Target,
    enrollment: EnrollmentClient,
}

impl Client {
    fn new(deployment: &Deployment, ledger: Arc<Ledger>) -> Self {
        let join = &deployment.join;
        Self {
            ledger,
            token: join.token.clone(),
            node: join.node.clone(),
            enrollment: EnrollmentClient::new(&join.enrollment, LIMITS, Arc::new(SystemClock))
                .unwrap(),
        }
    }

    async fn work(mut self, again: &[(u32, Key)], ended: &AtomicBool) {
        for (number, key) in again {
            if self.enroll(*number, key).await.is_err_and(|error| is_end(&error)) {
                return;
            }
        }
        while !ended.load(Ordering::Relaxed) {
            let pem = PrivateKey::generate().unwrap().to_pem().to_string();
            let number = self.ledger.add_key(pem.clone());
            let key = Key { pem, ..Key::default() };
            let lived = match self.enroll(number, &key).await {
                Ok(identity) => self.live(number, identity).await,
                Err(error) => Err(error),
            };
            match lived {
                Err(error) if is_end(&error) => return,
                Err(error) => {
                    let wait = error.retry_after().unwrap_or(Duration::from_millis(5));
                    tokio::time::sleep(wait.min(Duration::from_millis(50))).await;
                }
                Ok(()) => {}
            }
        }
    }

    async fn enroll(&mut self, number: u32, key: &Key) -> Result<Identity, CallError> {
        let private = private_key(&key.pem);
        let request = v1::EnrollRequest {
            credential: Some(Credential::BootstrapToken(self.token.clone())),
            cluster: "c1".to_owned(),
            role: v1::Role::Worker.into(),
            node_name: "w".to_owned(),
            addresses: vec![address(number)],
            dns_names: vec![],
            csr_der: private.csr_der().unwrap(),
            shared_address: false,
            once: false,
        };
        let answer = self.enrollment.enroll(request).await?;
        let chain = answer.identity.unwrap();
        self.ledger.enrolled(number, &chain.leaf_der);
        Ok(Identity::new(private, chain).unwrap())
    }

    /// Two leaves, and for every other node the next identity, with which it calls again.
    async fn live(&self, number: u32, identity: Identity) -> Result<(), CallError> {
        let client = self.client(&identity);
        self.leaf(&client).await?;
        self.leaf(&client).await?;
        if number.is_multiple_of(2) {
            return Ok(());
        }
        self.ledger.renews(number);
        let next = PrivateKey::generate().unwrap();
        let answer = client.renew_identity(next.csr_der().unwrap()).await?;
        let chain = answer.identity.unwrap();
        self.ledger.issued(&chain.leaf_der);
        self.leaf(&self.client(&Identity::new(next, chain).unwrap())).await
    }

    async fn leaf(&self, client: &NodeClient) -> Result<(), CallError> {
        let key = PrivateKey::generate().unwrap();
        let request = v1::IssueLeafRequest {
            csr_der: key.csr_der().unwrap(),
            purpose: v1::LeafPurpose::Node.into(),
            addresses: vec![],
            dns_names: vec![],
        };
        let answer = client.issue_leaf(request).await?;
        self.ledger.issued(&answer.leaf.unwrap().leaf_der);
        Ok(())
    }

    fn client(&self, identity: &Identity) -> NodeClient {
        NodeClient::new(&self.node, identity, LIMITS, Arc::new(SystemClock)).unwrap()
    }
}

/// Whether the server is gone. A refusal other than for haste would be a fault of the CA.
fn is_end(error: &CallError) -> bool {
    match error {
        CallError::Away(_) => true,
        CallError::Refused {
            reason: Some(Reason::RateLimited | Reason::StoreUnavailable), ..
        } => false,
        CallError::Refused { .. }
        | CallError::Untrusted(_)
        | CallError::Clock(_)
        | CallError::Setup(_) => {
            panic!("no refusal was due: {error}")
        }
    }
}

fn address(number: u32) -> String {
    let [_, a, b, c] = number.to_be_bytes();
    format!("10.{a}.{b}.{c}")
}

fn private_key(pem: &str) -> PrivateKey {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::io::Write::write_all(&mut file.as_file(), pem.as_bytes()).unwrap();
    PrivateKey::load(file.path()).unwrap()
}
