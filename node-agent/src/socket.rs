//! The agent's socket: who may ask what, and who waits behind whom, is decided by the uid the kernel
//! reports for the peer. Both ends are here; what an answer says is decided in `agent`.

use std::{
    io,
    os::unix::fs::{FileTypeExt, PermissionsExt},
    path::Path,
    sync::Arc,
    time::Duration,
};

use thiserror::Error;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{UnixListener, UnixStream},
    sync::{OwnedSemaphorePermit, Semaphore},
};

use crate::{
    agent::Handle,
    api::{ANSWER_LEN_MAX, Answer, Ask, ErrorKind, LINE_LEN_MAX, Request, VERSION},
};

/// Most connections at one time of those who may ask more than the status.
const KNOWN_MAX: usize = 60;
/// Most connections at one time of all others together.
const STRANGERS_MAX: usize = 4;
/// How long a caller has to send its line, and to take the answer.
const LINE_TIME_MAX: Duration = Duration::from_secs(5);
/// The same for a stranger, whose place others wait for.
const STRANGER_LINE_TIME_MAX: Duration = Duration::from_secs(1);
/// How long an answer may take: a call to the CA lies in it, and one may be under way before it.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(90);

/// Why the agent could not be asked.
#[derive(Debug, Error)]
pub enum AskError {
    /// Nobody listens.
    #[error("no agent answers at {path}: {error}; is it running (`systemctl status node-agent`)?")]
    NoAgent {
        /// The socket.
        path: String,
        /// What the system says.
        error: io::Error,
    },
    /// It broke off, or took too long.
    #[error("the agent at {path} gave no answer: {why}")]
    NoAnswer {
        /// The socket.
        path: String,
        /// What happened.
        why: String,
    },
}

/// Who may ask more than the status.
#[derive(Clone, Copy, Debug)]
pub struct Allowed {
    /// The agent's own user.
    pub agent_uid: u32,
    /// Ray's user.
    pub ray_uid: Option<u32>,
}

impl Allowed {
    /// Whether a caller of this uid may ask this.
    #[must_use]
    pub fn may(&self, uid: u32, ask: Ask) -> bool {
        let owner = uid == 0 || uid == self.agent_uid;
        match ask {
            Ask::Status => true,
            Ask::ExecFolder => owner || self.ray_uid == Some(uid),
            Ask::Renew | Ask::Leave | Ask::TunnelHandover { .. } | Ask::TunnelStop { .. } => owner,
        }
    }

    /// Whether a caller of this uid may ask for nothing but the status.
    fn is_stranger(&self, uid: u32) -> bool {
        !self.may(uid, Ask::ExecFolder)
    }
}

/// Listens at `path`, in the place of a socket nobody listens on any more.
///
/// # Errors
/// Another agent answers there, or the system's.
pub async fn listen(path: &Path) -> io::Result<UnixListener> {
    if let Some(parent) = path.parent() {
        raymtls_proto::durable::make_parents(parent)?;
    }
    if let Ok(metadata) = std::fs::symlink_metadata(path) {
        let taken = |why: &str| io::Error::new(io::ErrorKind::AddrInUse, why.to_owned());
        if !metadata.file_type().is_socket() {
            return Err(taken("something that is no socket lies there"));
        }
        if UnixStream::connect(path).await.is_ok() {
            return Err(taken("another agent answers there: give another --socket"));
        }
        std::fs::remove_file(path)?;
    }
    let listener = UnixListener::bind(path)?;
    // Anyone may ask for the status; the rest is decided by the peer's uid.
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o666))?;
    Ok(listener)
}

/// Answers callers for as long as it is polled.
pub async fn serve(listener: UnixListener, handle: Handle, allowed: Allowed) {
    let uid_of = |stream: &UnixStream| Ok(stream.peer_cred()?.uid());
    serve_peers(listener, handle, allowed, uid_of).await;
}

pub(crate) async fn serve_peers(
    listener: UnixListener,
    handle: Handle,
    allowed: Allowed,
    uid_of: impl Fn(&UnixStream) -> io::Result<u32>,
) {
    let places = Places::new();
    loop {
        let accepted = listener.accept().await;
        let peer = accepted.and_then(|(stream, _)| Ok((uid_of(&stream)?, stream)));
        let (uid, stream) = match peer {
            Ok(peer) => peer,
            Err(error) => {
                tracing::warn!(%error, "the agent's socket cannot accept");
                tokio::time::sleep(Duration::from_secs(1)).await;
                continue;
            }
        };
        let Some(place) = places.take(allowed.is_stranger(uid)) else {
            tracing::debug!(uid, "no place for another caller of the socket");
            continue;
        };
        let handle = handle.clone();
        tokio::spawn(async move {
            if let Err(error) = serve_one(stream, uid, &handle, allowed, place.line_time).await {
                tracing::debug!(%error, uid, "a caller of the socket went away");
            }
            drop(place);
        });
    }
}

/// Strangers have places of their own, so that they cannot take those of root, agent and Ray.
#[derive(Debug)]
struct Places {
    known: Arc<Semaphore>,
    strangers: Arc<Semaphore>,
}

#[derive(Debug)]
struct Place {
    _permit: OwnedSemaphorePermit,
    line_time: Duration,
}

impl Places {
    fn new() -> Self {
        Self {
            known: Arc::new(Semaphore::new(KNOWN_MAX)),
            strangers: Arc::new(Semaphore::new(STRANGERS_MAX)),
        }
    }

    /// A place, if one is free: who waited here would hold up all who come after.
    fn take(&self, stranger: bool) -> Option<Place> {
        let (places, line_time) = if stranger {
            (&self.strangers, STRANGER_LINE_TIME_MAX)
        } else {
            (&self.known, LINE_TIME_MAX)
        };
        let permit = places.clone().try_acquire_owned().ok()?;
        Some(Place { _permit: permit, line_time })
    }
}

async fn serve_one(
    stream: UnixStream,
    uid: u32,
    handle: &Handle,
    allowed: Allowed,
    line_time: Duration,
) -> io::Result<()> {
    let (reader, mut writer) = stream.into_split();
    let line = tokio::time::timeout(line_time, read_line(reader, LINE_LEN_MAX)).await??;
    let answer = answer(&line, uid, handle, allowed).await;
    let mut text = serde_json::to_vec(&answer)?;
    text.push(b'\n');
    tokio::time::timeout(line_time, writer.write_all(&text)).await?
}

async fn answer(line: &[u8], uid: u32, handle: &Handle, allowed: Allowed) -> Answer {
    let request: Request = match serde_json::from_slice(line) {
        Ok(request) => request,
        Err(error) => return Answer::error(ErrorKind::Invalid, format!("no request: {error}")),
    };
    if request.version != VERSION {
        let text = format!("version {} is not spoken here, {VERSION} is", request.version);
        return Answer::error(ErrorKind::Invalid, text);
    }
    if !allowed.may(uid, request.ask) {
        return Answer::error(ErrorKind::Denied, denial(uid, request.ask));
    }
    handle.ask(request.ask).await
}

fn denial(uid: u32, ask: Ask) -> String {
    match ask {
        Ask::ExecFolder => format!(
            "uid {uid} may not start Ray here: allowed are root, the agent's user and the user \
             given by `run --ray-uid`"
        ),
        Ask::Status
        | Ask::Renew
        | Ask::Leave
        | Ask::TunnelHandover { .. }
        | Ask::TunnelStop { .. } => {
            format!("uid {uid} may not ask this: allowed are root and the agent's user")
        }
    }
}

/// Asks the agent at `path`.
///
/// # Errors
/// See [`AskError`].
pub async fn ask(path: &Path, ask: Ask) -> Result<Answer, AskError> {
    let named = || path.display().to_string();
    let stream = UnixStream::connect(path)
        .await
        .map_err(|error| AskError::NoAgent { path: named(), error })?;
    let exchange = async {
        let (reader, mut writer) = stream.into_split();
        let mut line = serde_json::to_vec(&Request { version: VERSION, ask })?;
        line.push(b'\n');
        writer.write_all(&line).await?;
        let line = read_line(reader, ANSWER_LEN_MAX).await?;
        Ok::<_, io::Error>(serde_json::from_slice(&line)?)
    };
    let no_answer = |why: String| AskError::NoAnswer { path: named(), why };
    tokio::time::timeout(ANSWER_TIME_MAX, exchange)
        .await
        .map_err(|_| no_answer(format!("not in {} s", ANSWER_TIME_MAX.as_secs())))?
        .map_err(|e| no_answer(e.to_string()))
}

async fn read_line(
    reader: impl tokio::io::AsyncRead + Unpin,
    len_max: usize,
) -> io::Result<Vec<u8>> {
    let bound = u64::try_from(len_max).expect("the bound fits");
    let mut line = Vec::new();
    BufReader::new(reader.take(bound)).read_until(b'\n', &mut line).await?;
    if line.pop() != Some(b'\n') {
        let why = format!("no whole line of at most {len_max} bytes");
        return Err(io::Error::new(io::ErrorKind::InvalidData, why));
    }
    Ok(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_may_ask_what() {
        let allowed = Allowed { agent_uid: 990, ray_uid: Some(1000) };
        for (uid, ask, may) in [
            (0, Ask::Leave, true),
            (990, Ask::Leave, true),
            (1000, Ask::Leave, false),
            (1000, Ask::Renew, false),
            (1000, Ask::ExecFolder, true),
            (1001, Ask::ExecFolder, false),
            (1001, Ask::Status, true),
        ] {
            assert_eq!(allowed.may(uid, ask), may, "{uid} {ask:?}");
        }
    }
}
