//! Two sockets as one flow: what one end does, the other end sees. A FIN is carried as close_notify
//! and FIN, a reset or an end without close_notify as a reset. A flow that waits holds no buffer;
//! what one writes in one go grows with what it carried.

use std::{
    cell::RefCell,
    future::Future,
    io,
    pin::Pin,
    sync::atomic::Ordering::Relaxed,
    task::{Context, Poll, ready},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};

use super::{
    flows::{Counters, Place},
    reason::Reason,
    session::{Session, sealed_len_max},
    tcp,
    wire::Wire,
};

/// Most bytes a flow takes from a socket in one go, by how many it has carried.
const GROWTH: [(u64, usize); 3] =
    [(0, 16 * 1024), (128 * 1024, 64 * 1024), (10 * 1024 * 1024, READ_LEN_MAX)];
const READ_LEN_MAX: usize = 256 * 1024;
/// A record that is not whole yet (RFC 8446 5.2).
const CARRY_LEN_MAX: usize = 5 + (1 << 14) + 256;
/// How often both directions are looked at before others get their turn.
const ROUNDS: usize = 4;

/// How a flow ended.
#[derive(Debug)]
pub(crate) enum Ended {
    /// Both ends said that nothing more comes.
    Closed,
    /// One end broke off, and so did the other.
    Reset(io::Error),
    /// It was cut.
    Cut(Reason),
}

/// Room to read into and to encrypt or decrypt into: one for each thread, none for each flow.
struct Scratch {
    read: Box<[u8]>,
    made: Box<[u8]>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::new(Scratch {
        read: vec![0; READ_LEN_MAX + CARRY_LEN_MAX].into(),
        made: vec![0; sealed_len_max(READ_LEN_MAX + CARRY_LEN_MAX)].into(),
    });
}

/// A flow.
pub(crate) struct Splice<'c> {
    ends: Ends,
    session: Box<Session>,
    up: Half,
    down: Half,
    /// Read from the wire, not yet a whole record.
    carry: Vec<u8>,
    place: Place,
    counters: &'c Counters,
}

/// Both sockets. They end with a reset unless both ends were done, even where the process is killed:
/// nobody takes half an answer for a whole one.
struct Ends {
    local: TcpStream,
    wire: TcpStream,
}

impl Ends {
    fn new(local: TcpStream, wire: TcpStream) -> Self {
        tcp::reset_on_drop(&local);
        tcp::reset_on_drop(&wire);
        Self { local, wire }
    }

    fn are_done(&self) {
        tcp::end_on_drop(&self.local);
        tcp::end_on_drop(&self.wire);
    }
}

/// One direction.
#[derive(Default)]
struct Half {
    state: State,
    /// What the socket would not take.
    left: Left,
    carried: u64,
    /// Of a socket that is read no more: else nobody saw its reset.
    watch: Option<tcp::ErrorWatch>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    #[default]
    Open,
    /// The last bytes are on their way.
    Ending,
    Done,
}

/// Bytes that wait for a socket.
#[derive(Debug, Default)]
struct Left {
    bytes: Vec<u8>,
    sent: usize,
}

impl Left {
    fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    fn poll_send(&mut self, cx: &mut Context<'_>, socket: &mut TcpStream) -> Poll<io::Result<()>> {
        while self.sent < self.bytes.len() {
            self.sent += ready!(poll_write(cx, socket, &self.bytes[self.sent..]))?;
        }
        *self = Self::default();
        Poll::Ready(Ok(()))
    }
}

impl Half {
    fn read_len(&self) -> usize {
        let grown = GROWTH.iter().rev().find(|(carried, _)| self.carried >= *carried);
        grown.map_or(READ_LEN_MAX, |(_, len)| *len)
    }
}

impl<'c> Splice<'c> {
    /// Of a local connection and one to another node that has said it is connected.
    pub(crate) fn new(local: TcpStream, wire: Wire, place: Place, counters: &'c Counters) -> Self {
        let Wire { tcp, session, mut carry, plain, out, is_closed } = wire;
        carry.shrink_to_fit();
        let mut flow = Self {
            ends: Ends::new(local, tcp),
            session,
            up: Half::default(),
            down: Half::default(),
            carry,
            place,
            counters,
        };
        flow.up.left.push(&out);
        flow.down.left.push(&plain);
        if is_closed {
            flow.down.state = State::Ending;
        }
        flow
    }

    fn poll_cut(&mut self, cx: &mut Context<'_>) -> Poll<Reason> {
        match ready!(Pin::new(&mut self.place.cut).poll(cx)) {
            Ok(reason) => Poll::Ready(reason),
            // The table never drops the sender of a flow that it did not cut.
            Err(_) => Poll::Pending,
        }
    }

    /// From this host to the other. Ready where something was done or all is.
    fn poll_up(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Self { ends, session, up, carry, counters, .. } = self;
        ready!(up.left.poll_send(cx, &mut ends.wire))?;
        match up.state {
            State::Done => Poll::Pending,
            State::Ending => {
                up.state = State::Done;
                up.watch = Some(tcp::watch_errors(&ends.local)?);
                Poll::Ready(tcp::shutdown_write(&ends.wire))
            }
            State::Open => SCRATCH.with_borrow_mut(|scratch| {
                let room = &mut scratch.read[..up.read_len()];
                let read = ready!(poll_read(cx, &mut ends.local, room))?;
                let made = if read == 0 {
                    up.state = State::Ending;
                    session.close(carry, &mut scratch.made)
                } else {
                    up.carried += read as u64;
                    counters.bytes_out.fetch_add(read as u64, Relaxed);
                    session.encrypt(carry, &scratch.read[..read], &mut scratch.made)
                };
                let made = made.map_err(io::Error::other)?;
                send(cx, &mut ends.wire, &scratch.made[..made], &mut up.left)
            }),
        }
    }

    /// From the other host to this one.
    fn poll_down(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Self { ends, session, up, down, carry, counters, .. } = self;
        ready!(down.left.poll_send(cx, &mut ends.local))?;
        match down.state {
            State::Done => Poll::Pending,
            State::Ending => {
                down.state = State::Done;
                down.watch = Some(tcp::watch_errors(&ends.wire)?);
                Poll::Ready(tcp::shutdown_write(&ends.local))
            }
            State::Open => SCRATCH.with_borrow_mut(|scratch| {
                let Scratch { read: room, made } = scratch;
                let held = carry.len();
                room[..held].copy_from_slice(carry);
                let end = held + down.read_len();
                let read = ready!(poll_read(cx, &mut ends.wire, &mut room[held..end]))?;
                if read == 0 {
                    return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into()));
                }
                let (incoming, mut filled) = (&mut room[..held + read], 0);
                let take = |plain: &[u8]| {
                    made[filled..filled + plain.len()].copy_from_slice(plain);
                    filled += plain.len();
                };
                let turned =
                    session.turn(incoming, take, &mut up.left.bytes).map_err(io::Error::other)?;
                carry.clear();
                carry.extend_from_slice(&incoming[turned.used..]);
                if carry.is_empty() {
                    *carry = Vec::new();
                }
                if turned.is_closed {
                    down.state = State::Ending;
                }
                down.carried += filled as u64;
                counters.bytes_in.fetch_add(filled as u64, Relaxed);
                send(cx, &mut ends.local, &made[..filled], &mut down.left)
            }),
        }
    }

    /// Neither direction moves: it is over if a socket that nobody reads was reset.
    fn poll_watches(&mut self, cx: &mut Context<'_>) -> Poll<Ended> {
        for watch in [&mut self.up.watch, &mut self.down.watch].into_iter().flatten() {
            if let Poll::Ready(error) = watch.as_mut().poll(cx) {
                return Poll::Ready(Ended::Reset(error));
            }
        }
        Poll::Pending
    }

    fn is_over(&self) -> bool {
        self.up.state == State::Done && self.down.state == State::Done
    }
}

impl Future for Splice<'_> {
    type Output = Ended;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Ended> {
        let flow = self.get_mut();
        if let Poll::Ready(reason) = flow.poll_cut(cx) {
            return Poll::Ready(Ended::Cut(reason));
        }
        for _ in 0..ROUNDS {
            let down = flow.poll_down(cx);
            let up = flow.poll_up(cx);
            if flow.is_over() {
                flow.ends.are_done();
                return Poll::Ready(Ended::Closed);
            }
            match (up, down) {
                (Poll::Ready(Err(error)), _) | (_, Poll::Ready(Err(error))) => {
                    return Poll::Ready(Ended::Reset(error));
                }
                (Poll::Pending, Poll::Pending) => return flow.poll_watches(cx),
                (Poll::Ready(Ok(())), _) | (_, Poll::Ready(Ok(()))) => {}
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

/// Sends what the socket takes now and keeps the rest.
fn send(
    cx: &mut Context<'_>,
    socket: &mut TcpStream,
    bytes: &[u8],
    left: &mut Left,
) -> Poll<io::Result<()>> {
    let mut sent = 0;
    if left.is_empty() {
        while sent < bytes.len() {
            match poll_write(cx, socket, &bytes[sent..]) {
                Poll::Ready(written) => sent += written?,
                Poll::Pending => break,
            }
        }
    }
    left.push(&bytes[sent..]);
    Poll::Ready(Ok(()))
}

fn poll_read(
    cx: &mut Context<'_>,
    socket: &mut TcpStream,
    room: &mut [u8],
) -> Poll<io::Result<usize>> {
    let mut room = ReadBuf::new(room);
    ready!(Pin::new(socket).poll_read(cx, &mut room))?;
    Poll::Ready(Ok(room.filled().len()))
}

fn poll_write(
    cx: &mut Context<'_>,
    socket: &mut TcpStream,
    bytes: &[u8],
) -> Poll<io::Result<usize>> {
    match ready!(Pin::new(socket).poll_write(cx, bytes))? {
        0 => Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
        written => Poll::Ready(Ok(written)),
    }
}
