//! What is read from the machine: CPU time and memory of a process, load, the disk's patience and
//! what lies on it.

use std::{
    io::Write,
    os::unix::fs::MetadataExt,
    path::Path,
    time::{Duration, Instant},
};

use crate::{Failure, table};

/// `USER_HZ`, in which /proc counts CPU time: 100 on every Linux this runs on.
const TICKS_PER_SECOND: u64 = 100;
/// Size and number of the writes that try the disk.
const DISK_WRITE_LEN: usize = 2_048;
const DISK_WRITES: usize = 200;
/// Unit of `st_blocks`.
const BLOCK_LEN: u64 = 512;

/// The line that belongs beside every figure.
pub(crate) fn describe() -> Result<String, Failure> {
    let model = std::fs::read_to_string("/proc/cpuinfo")?
        .lines()
        .find_map(|line| line.strip_prefix("model name").map(|rest| rest.to_owned()))
        .map_or_else(
            || "unknown CPU".to_owned(),
            |rest| rest.trim_matches([':', ' ', '\t']).to_owned(),
        );
    let cores = std::thread::available_parallelism()?;
    Ok(format!("machine: {cores} cores, {model}; load {:.2}", load_average()?))
}

/// How long the folder's disk takes for one small durable write: the median of many.
pub(crate) fn disk_patience(folder: &Path) -> Result<Duration, Failure> {
    let mut file = tempfile::tempfile_in(folder)?;
    let mut times = Vec::with_capacity(DISK_WRITES);
    for _ in 0..DISK_WRITES {
        let began = Instant::now();
        file.write_all(&[0x5a; DISK_WRITE_LEN])?;
        file.sync_data()?;
        times.push(began.elapsed());
    }
    Ok(table::median(&mut times))
}

/// What the files of a folder and of those in it take on the disk.
pub(crate) fn disk_bytes(folder: &Path) -> Result<u64, Failure> {
    let mut bytes = 0;
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        bytes += if metadata.is_dir() {
            disk_bytes(&entry.path())?
        } else {
            metadata.blocks() * BLOCK_LEN
        };
    }
    Ok(bytes)
}

/// One-minute load average.
pub(crate) fn load_average() -> Result<f64, Failure> {
    let text = std::fs::read_to_string("/proc/loadavg")?;
    Ok(text.split(' ').next().ok_or("/proc/loadavg is empty")?.parse()?)
}

/// User and system time of a process with all its threads.
pub(crate) fn cpu_time(pid: u32) -> Result<Duration, Failure> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name in parentheses may hold spaces; utime and stime are fields 14 and 15.
    let after = text.rsplit_once(')').ok_or("/proc stat has no name")?.1;
    let fields: Vec<&str> = after.split_whitespace().collect();
    let [utime, stime] = [fields.get(11), fields.get(12)];
    let ticks: u64 =
        utime.ok_or("no utime")?.parse::<u64>()? + stime.ok_or("no stime")?.parse::<u64>()?;
    Ok(Duration::from_millis(ticks * 1_000 / TICKS_PER_SECOND))
}

/// CPU time of this thread. The kernel brings it up to date at each tick, so that it is good for
/// lengths well above ten milliseconds.
pub(crate) fn thread_cpu_time() -> Result<Duration, Failure> {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat")?;
    let ns = text.split(' ').next().ok_or("/proc schedstat is empty")?.parse()?;
    Ok(Duration::from_nanos(ns))
}

/// Resident memory of a process.
pub(crate) fn memory_mib(pid: u32) -> Result<f64, Failure> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:")).ok_or("no VmRSS")?;
    let kib: f64 = line.trim().trim_end_matches(" kB").parse()?;
    Ok(kib / 1_024.0)
}
