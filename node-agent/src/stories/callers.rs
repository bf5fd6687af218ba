//! Those who ask at the socket: who is unknown there holds up nobody else.

use tokio::io::AsyncReadExt;

use super::*;

#[tokio::test]
async fn strangers_at_the_socket_take_no_place_of_others() {
    let ca = TestCa::start(Face::Ca).await;
    let place = Place::new(system_clock());
    place.enroll(&ca).await.unwrap();
    let agent = place.run();
    let path = place.path("agent.sock");
    let listener = crate::socket::listen(&path).await.unwrap();
    // The first callers are strangers; the uid is the test's to say.
    let callers = std::sync::atomic::AtomicUsize::new(0);
    let strangers = 200;
    let uid_of = move |_: &tokio::net::UnixStream| {
        let number = callers.fetch_add(1, Ordering::SeqCst);
        Ok(if number < strangers { 4_321 } else { 1_000 })
    };
    let allowed = crate::socket::Allowed { agent_uid: 990, ray_uid: Some(1_000) };
    let handle = agent.handle.clone();
    let serving = tokio::spawn(crate::socket::serve_peers(listener, handle, allowed, uid_of));

    let mut mute = Vec::new();
    for _ in 0..strangers {
        mute.push(tokio::net::UnixStream::connect(&path).await.unwrap());
    }
    let asked =
        tokio::time::timeout(Duration::from_secs(3), crate::socket::ask(&path, Ask::Status));
    let answer = asked.await.expect("the strangers hold all places").unwrap();
    assert!(matches!(answer, Answer::Status(_)), "{answer:?}");
    // Those with a place are cut off soon, all others at once.
    let began = std::time::Instant::now();
    for stream in &mut mute {
        let mut rest = Vec::new();
        tokio::time::timeout(SOON, stream.read_to_end(&mut rest)).await.expect("still open").ok();
    }
    assert!(began.elapsed() < Duration::from_secs(4), "{:?}", began.elapsed());
    serving.abort();
    agent.stop().await;
}
