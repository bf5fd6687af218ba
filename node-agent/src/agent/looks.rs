//! When the daemon looks at what Ray serves: each minute, and some seconds after a start. The look runs
//! beside the loop. What it found is kept, and judged anew by the clock each time it is told.

use std::time::Duration;

use raymtls_proto::{clock::Clock, ports, v1};
use time::OffsetDateTime;

use super::{Agent, Event, Task};
use crate::{
    config::LooksConfig,
    keyfolder::folder_name,
    served::{Look, Memory, Served, ServedError, look},
};

/// What is known of Ray's processes. Moments are time that passes.
#[derive(Debug, Default)]
pub(super) struct Looks {
    next_at: Duration,
    /// Absent while a look has it.
    memory: Option<Memory>,
    looking: Option<Task>,
    served: Option<Served>,
    problem: Option<String>,
}

/// What a look brings back.
#[derive(Debug)]
pub(super) struct Looked {
    memory: Memory,
    served: Result<Served, ServedError>,
}

impl Agent {
    /// Begins a look whose moment has come.
    pub(super) fn tend_looks(&mut self) {
        let Some(config) = self.config.looks.clone() else { return };
        let now = self.clock.elapsed();
        let is_looking = self.looks.looking.as_ref().is_some_and(|task| !task.0.is_finished());
        if is_looking || now < self.looks.next_at {
            return;
        }
        self.looks.next_at = now + config.pause;
        let mode = self.memory.settings().map(v1::Settings::mode);
        if mode != Some(v1::Mode::Files) {
            // In tunnel mode Ray itself speaks no TLS.
            self.looks.served = None;
            return;
        }
        match self.what_to_look_at(&config) {
            Ok(look_at) => self.begin_look(look_at),
            Err(why) => self.looks.problem = Some(why),
        }
    }

    fn begin_look(&mut self, look_at: Look) {
        let mut memory = self.looks.memory.take().unwrap_or_default();
        let (now, events) = (self.clock.now(), self.event_sender.clone());
        let task = tokio::spawn(async move {
            let served = look(&look_at, &mut memory, now).await;
            let _ = events.send(Event::Looked(Box::new(Looked { memory, served }))).await;
        });
        self.looks.looking = Some(Task(task.abort_handle()));
    }

    /// With the newest valid leaf: Ray's processes log a caller whose leaf has ended.
    fn what_to_look_at(&self, config: &LooksConfig) -> Result<Look, String> {
        let number = self.newest_valid(self.clock.now());
        let folder = number.and_then(|number| self.folder(number));
        let folder = &folder.ok_or("there is no valid leaf to ask with")?.folder;
        let bundle = self.memory.bundle().ok_or("the cluster's roots are not known yet")?;
        let key = self.tls.key(folder.number).map_err(|error| error.to_string())?;
        let plan = self.memory.settings().and_then(|settings| settings.port_plan);
        // Root may start a driver; where nobody said who runs Ray, it may be anyone.
        let uids = self.config.ray_uid.map(|uid| vec![uid, 0]).unwrap_or_default();
        let plan = plan.unwrap_or_else(ports::default_plan);
        let mut look_at = Look::new(&folder.chain, &key, bundle, plan, uids, self.clock.clone())
            .map_err(|error| format!("key folder {}: {error}", folder_name(folder.number)))?;
        look_at.search.proc.clone_from(&config.proc);
        Ok(look_at)
    }

    pub(super) fn looked(&mut self, looked: Looked) {
        let Looked { memory, served } = looked;
        self.looks.memory = Some(memory);
        self.looks.looking = None;
        match served {
            Ok(served) => {
                self.looks.problem = None;
                let served = served.bounded();
                // The CA hears of what counts, not of each look.
                let news = self.looks.served.as_ref().is_none_or(|last| !last.is_alike(&served));
                self.looks.served = Some(served);
                if news {
                    self.sync.report_soon();
                }
            }
            Err(error) => {
                if self.looks.problem.is_none() {
                    tracing::warn!(%error, "what Ray serves is not known");
                }
                self.looks.problem = Some(error.to_string());
            }
        }
    }

    /// Somebody got files to start Ray with.
    pub(super) fn look_after_start(&mut self) {
        if let Some(config) = &self.config.looks {
            self.looks.next_at = self.looks.next_at.min(self.clock.elapsed() + config.after_start);
        }
    }

    /// What a look judges by has changed.
    pub(super) fn look_again(&mut self) {
        self.looks.next_at = self.clock.elapsed();
    }

    pub(super) fn served_status(&self, now: OffsetDateTime) -> (Option<Served>, Option<String>) {
        let served = self.looks.served.as_ref().map(|served| served.at(now));
        (served, self.looks.problem.clone())
    }

    pub(super) fn running_report(&self) -> Option<v1::Running> {
        self.looks.served.as_ref().map(|served| served.at(self.clock.now()).report())
    }
}
