//! The control socket: who may ask is decided by the uid the kernel reports. Answers come from
//! `state`; nothing is decided here but that.

use std::{
    io::{self, IoSlice},
    mem::MaybeUninit,
    net::TcpListener,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::{fs::MetadataExt, net::UnixListener as StdUnixListener},
    },
    sync::Arc,
    time::Duration,
};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Interest},
    net::{UnixListener, UnixStream},
    sync::Semaphore,
};

use super::{
    control::{
        Answer, Ask, CAPTURED, CONTROL, DRAIN_SECONDS_MAX, INBOUND, LINE_LEN_MAX, NONCE_LEN,
        Request, VERSION,
    },
    run::Drains,
    state::Tunnel,
};

/// Most callers at one time.
const CALLERS_MAX: usize = 16;
/// How long a caller has to send its line, and to take the answer.
const LINE_TIME_MAX: Duration = Duration::from_secs(5);
/// Most descriptors in one message; the kernel takes 253.
const DESCRIPTORS_MAX: usize = 64;

/// The listening sockets, to be handed back.
#[derive(Debug)]
pub(crate) struct Handed {
    pub(crate) captured: Vec<TcpListener>,
    pub(crate) inbound: Vec<TcpListener>,
    pub(crate) control: Vec<StdUnixListener>,
}

impl Handed {
    fn all(&self) -> Vec<(&'static str, BorrowedFd<'_>)> {
        let captured = self.captured.iter().map(|l| (CAPTURED, l.as_fd()));
        let inbound = self.inbound.iter().map(|l| (INBOUND, l.as_fd()));
        let control = self.control.iter().map(|l| (CONTROL, l.as_fd()));
        captured.chain(inbound).chain(control).take(DESCRIPTORS_MAX).collect()
    }
}

/// Answers callers for as long as it is polled.
pub(crate) async fn serve(
    listener: UnixListener,
    tunnel: Arc<Tunnel>,
    handed: Arc<Handed>,
    drains: Drains,
) {
    let places = Arc::new(Semaphore::new(CALLERS_MAX));
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "the control socket cannot accept");
                tokio::time::sleep(Duration::from_secs(1)).await;
                continue;
            }
        };
        let Ok(place) = places.clone().try_acquire_owned() else { continue };
        let (tunnel, handed, drains) = (tunnel.clone(), handed.clone(), drains.clone());
        tokio::spawn(async move {
            if let Err(error) = serve_one(stream, &tunnel, &handed, &drains).await {
                tracing::debug!(%error, "a caller of the control socket went away");
            }
            drop(place);
        });
    }
}

async fn serve_one(
    mut stream: UnixStream,
    tunnel: &Arc<Tunnel>,
    handed: &Handed,
    drains: &Drains,
) -> io::Result<()> {
    let uid = stream.peer_cred()?.uid();
    if !may_ask(tunnel, uid) {
        let message = format!(
            "uid {uid} may not ask this: allowed are root, the owner of the rules and the tunnel's \
             own user"
        );
        return send(&mut stream, &Answer::Error { message }).await;
    }
    let line = tokio::time::timeout(LINE_TIME_MAX, read_line(&mut stream)).await??;
    match parse(&line) {
        Ok(Ask::Listeners) => send_listeners(&mut stream, handed).await,
        Ok(ask) => send(&mut stream, &answer(tunnel, drains, ask).await).await,
        Err(message) => send(&mut stream, &Answer::Error { message }).await,
    }
}

/// Whoever writes the rules may ask too.
fn may_ask(tunnel: &Tunnel, uid: u32) -> bool {
    let own = rustix::process::geteuid().as_raw();
    let writer = std::fs::metadata(&tunnel.rules_path).map(|m| m.uid());
    uid == 0 || uid == own || writer.is_ok_and(|writer| writer == uid)
}

fn parse(line: &[u8]) -> Result<Ask, String> {
    let request: Request =
        serde_json::from_slice(line).map_err(|error| format!("no request: {error}"))?;
    if request.version != VERSION {
        return Err(format!("version {} is not spoken here, {VERSION} is", request.version));
    }
    Ok(request.ask)
}

async fn answer(tunnel: &Arc<Tunnel>, drains: &Drains, ask: Ask) -> Answer {
    let error = |message: String| Answer::Error { message };
    match ask {
        Ask::Status => Answer::Status(Box::new(tunnel.status())),
        Ask::Reload => {
            let reading = tunnel.clone();
            match tokio::task::spawn_blocking(move || reading.reload()).await {
                Ok(Ok(reloaded)) => Answer::Reloaded(reloaded),
                Ok(Err(why)) => error(format!("{why}; what was in force stays so")),
                Err(why) => error(why.to_string()),
            }
        }
        Ask::Drain { deadline_seconds } if deadline_seconds > DRAIN_SECONDS_MAX => error(format!(
            "a deadline of {deadline_seconds} s is too long, at most {DRAIN_SECONDS_MAX} s"
        )),
        Ask::Drain { deadline_seconds } => {
            drains.begin(Duration::from_secs(deadline_seconds));
            let flows = u64::try_from(tunnel.flows.len()).unwrap_or(u64::MAX);
            Answer::Draining { flows }
        }
        Ask::Prove { nonce } => {
            let mut bytes = [0; NONCE_LEN];
            if hex::decode_to_slice(&nonce, &mut bytes).is_err() {
                return error(format!("a nonce is {NONCE_LEN} bytes in hex"));
            }
            *tunnel.nonce.lock().expect("no code panics while it holds the nonce") = Some(bytes);
            Answer::Proving
        }
        Ask::Listeners => error("the listeners are sent with their descriptors".to_owned()),
    }
}

async fn read_line(stream: &mut UnixStream) -> io::Result<Vec<u8>> {
    let bound = u64::try_from(LINE_LEN_MAX).expect("the bound fits");
    let mut line = Vec::new();
    BufReader::new(stream.take(bound)).read_until(b'\n', &mut line).await?;
    if line.pop() != Some(b'\n') {
        let why = format!("no whole line of at most {LINE_LEN_MAX} bytes");
        return Err(io::Error::new(io::ErrorKind::InvalidData, why));
    }
    Ok(line)
}

async fn send(stream: &mut UnixStream, answer: &Answer) -> io::Result<()> {
    tokio::time::timeout(LINE_TIME_MAX, stream.write_all(&line(answer)?)).await?
}

fn line(answer: &Answer) -> io::Result<Vec<u8>> {
    let mut text = serde_json::to_vec(answer)?;
    text.push(b'\n');
    Ok(text)
}

async fn send_listeners(stream: &mut UnixStream, handed: &Handed) -> io::Result<()> {
    let all = handed.all();
    let names = all.iter().map(|(name, _)| (*name).to_owned()).collect();
    let descriptors: Vec<BorrowedFd<'_>> = all.iter().map(|(_, fd)| *fd).collect();
    let text = line(&Answer::Listeners { names })?;
    let sending = async {
        loop {
            stream.writable().await?;
            let sent = stream.try_io(Interest::WRITABLE, || send_with(stream, &text, &descriptors));
            match sent {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                sent => break sent,
            }
        }
    };
    let sent = tokio::time::timeout(LINE_TIME_MAX, sending).await??;
    tokio::time::timeout(LINE_TIME_MAX, stream.write_all(&text[sent..])).await?
}

fn send_with(
    stream: &UnixStream,
    text: &[u8],
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::Error::other("too many descriptors for one message"));
    }
    let text = [IoSlice::new(text)];
    Ok(rustix::net::sendmsg(stream, &text, &mut control, SendFlags::NOSIGNAL)?)
}
