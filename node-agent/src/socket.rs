//! The agent's socket: who may ask what is decided by the uid the kernel reports for the peer. Both
//! ends are here; what an answer says is decided in `agent`.

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
    sync::Semaphore,
};

use crate::{
    agent::Handle,
    api::{Answer, Ask, ErrorKind, LINE_LEN_MAX, Request, VERSION},
};

/// Most connections at one time.
const CONNECTIONS_MAX: usize = 64;
/// How long a caller has to send its line, and to take the answer.
const LINE_TIME_MAX: Duration = Duration::from_secs(5);
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
            Ask::Renew | Ask::Leave => owner,
        }
    }
}

/// Listens at `path`, in the place of a socket nobody listens on any more.
///
/// # Errors
/// Another agent answers there, or the system's.
pub async fn listen(path: &Path) -> io::Result<UnixListener> {
    if let Some(parent) = path.parent() {
        crate::statedir::make_parents(parent)?;
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
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let place = places.clone().acquire_owned().await.expect("the semaphore is never closed");
        match listener.accept().await {
            Ok((stream, _)) => {
                let handle = handle.clone();
                tokio::spawn(async move {
                    if let Err(error) = serve_one(stream, &handle, allowed).await {
                        tracing::debug!(%error, "a caller of the socket went away");
                    }
                    drop(place);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "the agent's socket cannot accept");
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
    }
}

async fn serve_one(stream: UnixStream, handle: &Handle, allowed: Allowed) -> io::Result<()> {
    let uid = stream.peer_cred()?.uid();
    let (reader, mut writer) = stream.into_split();
    let line = tokio::time::timeout(LINE_TIME_MAX, read_line(reader)).await??;
    let answer = answer(&line, uid, handle, allowed).await;
    let mut text = serde_json::to_vec(&answer)?;
    text.push(b'\n');
    tokio::time::timeout(LINE_TIME_MAX, writer.write_all(&text)).await?
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
        Ask::Status | Ask::Renew | Ask::Leave => {
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
        let line = read_line(reader).await?;
        Ok::<_, io::Error>(serde_json::from_slice(&line)?)
    };
    let no_answer = |why: String| AskError::NoAnswer { path: named(), why };
    tokio::time::timeout(ANSWER_TIME_MAX, exchange)
        .await
        .map_err(|_| no_answer(format!("not in {} s", ANSWER_TIME_MAX.as_secs())))?
        .map_err(|e| no_answer(e.to_string()))
}

async fn read_line(reader: impl tokio::io::AsyncRead + Unpin) -> io::Result<Vec<u8>> {
    let bound = u64::try_from(LINE_LEN_MAX).expect("the bound fits");
    let mut line = Vec::new();
    BufReader::new(reader.take(bound)).read_until(b'\n', &mut line).await?;
    if line.pop() != Some(b'\n') {
        let why = format!("no whole line of at most {LINE_LEN_MAX} bytes");
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
