//! Which job of Ray a driver belongs to, by the log files that Ray opens in it: one is named after the
//! number of the job, and `ray job submit` sends what the driver prints to one that is named after the
//! submission. Ray's API tells the same, on the head alone and to who holds the token; the files are
//! there on each host. A claim, as a title is: a user's program can open any file. Pure.

use std::path::Path;

use serde::{Deserialize, Serialize};

/// A job of Ray, as `ray list jobs` and `ray job list` name it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Job {
    /// Ray's number of it, eight hexadecimal digits.
    pub id: Option<String>,
    /// The submission, where it came by `ray job submit`.
    pub submission_id: Option<String>,
}

impl Job {
    /// Out of the open files of a driver; `None` where none of them tells.
    #[must_use]
    pub fn by_files<P: AsRef<Path>>(files: impl IntoIterator<Item = P>) -> Option<Self> {
        let mut job = Self::default();
        for file in files {
            let Some(name) = file.as_ref().file_name().and_then(|name| name.to_str()) else {
                continue;
            };
            job.id = job.id.or_else(|| id(name));
            job.submission_id = job.submission_id.or_else(|| submission_id(name));
        }
        (job != Self::default()).then_some(job)
    }
}

impl std::fmt::Display for Job {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let names: Vec<&str> =
            self.id.iter().chain(&self.submission_id).map(String::as_str).collect();
        write!(f, "job {}", names.join(" "))
    }
}

/// `python-core-driver-<job><ffff...>_<pid>.log`: a driver's number as a worker is its job's.
fn id(name: &str) -> Option<String> {
    let (worker, _) = name.split_once("-core-driver-")?.1.split_once('_')?;
    let (id, rest) = worker.split_at_checked(ID_LEN)?;
    let is_hex = id.bytes().all(|byte| byte.is_ascii_hexdigit());
    let is_drivers = !rest.is_empty() && rest.bytes().all(|byte| byte == b'f');
    (is_hex && is_drivers).then(|| id.to_owned())
}

/// `job-driver-<submission>.log`.
fn submission_id(name: &str) -> Option<String> {
    let id = name.strip_prefix("job-driver-")?.strip_suffix(".log")?;
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    let fits = (1..=SUBMISSION_ID_LEN_MAX).contains(&id.len()) && id.bytes().all(is_plain);
    fits.then(|| id.to_owned())
}

/// Digits of a job's number.
const ID_LEN: usize = 8;
/// Longest submission that is shown: its user may choose it.
const SUBMISSION_ID_LEN_MAX: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_drivers_log_files_name_its_job() {
        let core = format!("/t/s/logs/python-core-driver-03000000{}_522.log", "f".repeat(48));
        let printed = "/t/s/logs/job-driver-raysubmit_Mq9xHyyBAwrEVG2v.log";
        let said = |files: &[&str]| Job::by_files(files).map(|job| job.to_string());
        for (files, job) in [
            (vec![core.as_str()], Some("job 03000000")),
            (vec!["/dev/null", printed, &core], Some("job 03000000 raysubmit_Mq9xHyyBAwrEVG2v")),
            (vec![printed], Some("job raysubmit_Mq9xHyyBAwrEVG2v")),
            (vec!["socket:[1]", "/dev/null"], None),
            // A worker of a job has another name, and nobody puts a terminal's words into a job's.
            (vec!["/t/python-core-worker-03000000ffff_1.log"], None),
            (vec!["/t/python-core-driver-0300000012ab_1.log"], None),
            (vec!["/t/job-driver-\u{1b}[2J.log"], None),
            (vec![], None),
        ] {
            assert_eq!(said(&files).as_deref(), job, "{files:?}");
        }
    }
}
