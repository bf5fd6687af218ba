//! An agent in this process: enrolled with a deployment's CA, and run until it is told to stop.

use std::{path::Path, sync::Arc, time::Duration};

use node_agent::{
    agent::{Agent, Handle},
    config::Config,
    enroll::Options,
    status::Status,
};
use raymtls_proto::{clock::Clock, identity::Role};
use tokio::{sync::oneshot, task::JoinHandle, time::timeout};

use crate::limits;

/// What should happen happens within this, on a busy machine too.
pub const SOON: Duration = Duration::from_secs(20);

/// A worker's enrolment with the join file `join` of a folder, its state and key folders beside it.
pub fn options(folder: &Path, name: &str, address: &str) -> Options {
    Options {
        join: folder.join("join"),
        state_dir: folder.join("state"),
        tls_dir: folder.join("tls"),
        name: name.parse().unwrap(),
        name_given: true,
        role: Role::Worker,
        addresses: vec![address.parse().unwrap()],
        dns_names: vec![],
        shared_address: false,
        ray_gid: None,
        keep_join_file: false,
        once: false,
        timeout: SOON,
        limits: limits(),
    }
}

/// The configuration of an agent with those folders.
pub fn config(folder: &Path) -> Config {
    Config { limits: limits(), ..Config::in_process(folder.join("state"), folder.join("tls")) }
}

/// An agent that runs.
#[derive(Debug)]
pub struct RunningAgent {
    /// The way to talk to it.
    pub handle: Handle,
    stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

impl RunningAgent {
    /// Starts it.
    pub fn start(config: Config, clock: Arc<dyn Clock>) -> Self {
        let agent = Agent::open(config, clock).unwrap();
        let handle = agent.handle();
        let (stop, stopped) = oneshot::channel::<()>();
        let task = tokio::spawn(async move {
            agent.run(async { drop(stopped.await) }).await.unwrap();
        });
        Self { handle, stop, task }
    }

    /// Waits until its status is as it should be.
    pub async fn until(&self, what: &str, is_so: impl Fn(&Status) -> bool) -> Status {
        let mut status = self.handle.watch();
        let found = timeout(SOON, status.wait_for(|status| is_so(status))).await;
        found
            .unwrap_or_else(|_| panic!("never {what}: {:#?}", self.handle.status()))
            .unwrap()
            .clone()
    }

    /// Stops it, as a signal does.
    pub async fn stop(self) {
        let _ = self.stop.send(());
        self.task.await.unwrap();
    }
}
