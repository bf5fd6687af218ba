//! Asks a running `ray-tunnel` over its control socket: one line each way, in bounded time. It decides
//! nothing; what may be asked is in `tunnel::control`.

use std::{
    io::{self, IoSliceMut, Write},
    mem::MaybeUninit,
    os::{fd::OwnedFd, unix::net::UnixStream as StdUnixStream},
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use thiserror::Error;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::UnixStream,
};

use crate::tunnel::control::{ANSWER_LEN_MAX, Answer, Ask, Reloaded, Request, Status};

/// How long an answer may take; a reload of 20,000 members lies in it.
pub(crate) const ANSWER_TIME_MAX: Duration = Duration::from_secs(3);
/// Most listening sockets that are taken over.
const LISTENERS_MAX: usize = 64;

/// Why the tunnel could not be asked.
#[derive(Debug, Error)]
pub(crate) enum ControlError {
    /// Nobody listens, or the exchange broke off.
    #[error("ray-tunnel at {path}: {error}")]
    Io {
        /// The control socket.
        path: String,
        /// What the system says.
        error: io::Error,
    },
    /// No answer in time.
    #[error("ray-tunnel at {0} gave no answer within {1:?}")]
    TooSlow(String, Duration),
    /// It says no.
    #[error("ray-tunnel: {0}")]
    Refused(String),
    /// It answered something else.
    #[error("ray-tunnel at {0} answered something else than was asked: upgrade both")]
    Other(String),
}

/// Asks.
///
/// # Errors
/// See [`ControlError`].
pub(crate) async fn ask(path: &Path, ask: Ask) -> Result<Answer, ControlError> {
    let exchange = async {
        let stream = UnixStream::connect(path).await?;
        let (reader, mut writer) = stream.into_split();
        writer.write_all(&line_of(ask)?).await?;
        let bound = u64::try_from(ANSWER_LEN_MAX).unwrap_or(u64::MAX);
        let mut line = Vec::new();
        BufReader::new(reader.take(bound)).read_until(b'\n', &mut line).await?;
        parse(&line)
    };
    let named = || path.display().to_string();
    let answer = tokio::time::timeout(ANSWER_TIME_MAX, exchange)
        .await
        .map_err(|_| ControlError::TooSlow(named(), ANSWER_TIME_MAX))?
        .map_err(|error| ControlError::Io { path: named(), error })?;
    match answer {
        Answer::Error { message } => Err(ControlError::Refused(message)),
        answer @ (Answer::Status(_)
        | Answer::Reloaded(_)
        | Answer::Draining { .. }
        | Answer::Listeners { .. }
        | Answer::Proving) => Ok(answer),
    }
}

/// How it stands.
pub(crate) async fn status(path: &Path) -> Result<Status, ControlError> {
    match ask(path, Ask::Status).await? {
        Answer::Status(status) => Ok(*status),
        Answer::Reloaded(_)
        | Answer::Draining { .. }
        | Answer::Listeners { .. }
        | Answer::Proving
        | Answer::Error { .. } => Err(ControlError::Other(path.display().to_string())),
    }
}

/// Has it read rules and key folder anew.
pub(crate) async fn reload(path: &Path) -> Result<Reloaded, ControlError> {
    match ask(path, Ask::Reload).await? {
        Answer::Reloaded(done) => Ok(done),
        Answer::Status(_)
        | Answer::Draining { .. }
        | Answer::Listeners { .. }
        | Answer::Proving
        | Answer::Error { .. } => Err(ControlError::Other(path.display().to_string())),
    }
}

/// The listening sockets of a tunnel that is there already, by their names.
pub(crate) async fn listeners(path: &Path) -> Result<Vec<(String, OwnedFd)>, ControlError> {
    let owned: PathBuf = path.to_owned();
    let taken = tokio::task::spawn_blocking(move || take_listeners(&owned)).await;
    let error = |error| ControlError::Io { path: path.display().to_string(), error };
    let (answer, descriptors) = taken.map_err(|e| error(io::Error::other(e)))?.map_err(error)?;
    match answer {
        Answer::Listeners { names } if names.len() == descriptors.len() => {
            Ok(names.into_iter().zip(descriptors).collect())
        }
        Answer::Error { message } => Err(ControlError::Refused(message)),
        Answer::Status(_)
        | Answer::Reloaded(_)
        | Answer::Draining { .. }
        | Answer::Listeners { .. }
        | Answer::Proving => Err(ControlError::Other(path.display().to_string())),
    }
}

fn take_listeners(path: &Path) -> io::Result<(Answer, Vec<OwnedFd>)> {
    let mut stream = StdUnixStream::connect(path)?;
    stream.set_read_timeout(Some(ANSWER_TIME_MAX))?;
    stream.set_write_timeout(Some(ANSWER_TIME_MAX))?;
    stream.write_all(&line_of(Ask::Listeners)?)?;
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(LISTENERS_MAX))];
    let (mut line, mut descriptors) = (Vec::new(), Vec::new());
    let mut chunk = vec![0_u8; 16 * 1024];
    while line.last() != Some(&b'\n') {
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut pieces = [IoSliceMut::new(&mut chunk)];
        let got = recvmsg(&stream, &mut pieces, &mut control, RecvFlags::CMSG_CLOEXEC)?;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                descriptors.extend(fds);
            }
        }
        line.extend_from_slice(&chunk[..got.bytes]);
        if got.bytes == 0 || line.len() > ANSWER_LEN_MAX {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof));
        }
    }
    Ok((parse(&line)?, descriptors))
}

fn line_of(ask: Ask) -> io::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(&Request::new(ask))?;
    line.push(b'\n');
    Ok(line)
}

fn parse(line: &[u8]) -> io::Result<Answer> {
    if line.last() != Some(&b'\n') {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "no whole line"));
    }
    Ok(serde_json::from_slice(line)?)
}
