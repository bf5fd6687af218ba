//! The log, which may lose lines and never holds up a flow: whoever reads it may be slow, stuck or
//! gone. Lines go to a thread of their own; those for which there is no room are counted and left out.

use std::{
    io::{self, Write},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
        mpsc::{Receiver, SyncSender, TrySendError, sync_channel},
    },
    time::Duration,
};

use tracing_subscriber::fmt::MakeWriter;

/// Lines that may wait.
const LINES_MAX: usize = 1_024;
/// How long the last lines may take.
const LAST_LINES_TIME_MAX: Duration = Duration::from_millis(200);

/// Where tracing writes.
#[derive(Clone, Debug)]
pub(super) struct Log {
    lines: SyncSender<Line>,
    left_out: Arc<AtomicU64>,
}

#[derive(Debug)]
enum Line {
    Text(Vec<u8>),
    /// Tell this one that all lines before were written.
    End(SyncSender<()>),
}

impl Log {
    /// To the standard error.
    ///
    /// # Errors
    /// No thread can be had.
    pub(super) fn start() -> io::Result<Self> {
        let (lines, waiting) = sync_channel(LINES_MAX);
        let left_out = Arc::new(AtomicU64::new(0));
        let counted = left_out.clone();
        std::thread::Builder::new()
            .name("log".to_owned())
            .spawn(move || write_all(&waiting, &counted, &mut io::stderr()))?;
        Ok(Self { lines, left_out })
    }

    /// Waits until what was said is written, and no longer than the bound.
    pub(super) fn finish(&self) {
        let (told, wait) = sync_channel(1);
        if self.lines.try_send(Line::End(told)).is_ok() {
            let _ = wait.recv_timeout(LAST_LINES_TIME_MAX);
        }
    }
}

fn write_all(waiting: &Receiver<Line>, left_out: &AtomicU64, to: &mut impl Write) {
    for line in waiting {
        match line {
            Line::Text(text) => {
                let lost = left_out.swap(0, Relaxed);
                if lost > 0 {
                    let _ = writeln!(to, "{lost} lines were left out: nobody read them in time");
                }
                let _ = to.write_all(&text);
            }
            Line::End(told) => {
                let _ = told.try_send(());
            }
        }
    }
}

impl Write for &Log {
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        match self.lines.try_send(Line::Text(text.to_vec())) {
            Ok(()) => {}
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {
                self.left_out.fetch_add(1, Relaxed);
            }
        }
        Ok(text.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Log {
    type Writer = &'a Self;

    fn make_writer(&'a self) -> &'a Self {
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_without_room_are_counted_and_nobody_waits() {
        let (lines, waiting) = sync_channel(2);
        let log = Log { lines, left_out: Arc::default() };
        for _ in 0..5 {
            (&log).write_all(b"a line\n").unwrap();
        }
        let left_out = log.left_out.clone();
        drop(log);
        let mut written = Vec::new();
        write_all(&waiting, &left_out, &mut written);
        let text = String::from_utf8(written).unwrap();
        assert!(text.starts_with("3 lines were left out"), "{text}");
        assert_eq!(text.lines().count(), 3);
    }
}
