//! The connection to the CA: HTTP/2 over its unix socket, a deadline on every call, and words for
//! each way in which there is no connection.

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use hyper_util::rt::TokioIo;
use raymtls_proto::v1::admin_service_client::AdminServiceClient;
use tokio::{net::UnixStream, time::timeout};
use tonic::transport::{Channel, Endpoint};

use super::failure::Failure;

/// Longest wait for the socket to accept.
const CONNECT_MAX: Duration = Duration::from_secs(5);
/// Longest wait for one answer.
const CALL_MAX: Duration = Duration::from_secs(30);
/// Largest answer, in bytes: a page is far smaller.
const ANSWER_LEN_MAX: usize = 16 * 1024 * 1024;
/// Most pages of one list; a CA that goes on after that is not telling the truth.
const PAGES_MAX: usize = 10_000;

/// Where the CA is. Each command opens one connection.
#[derive(Debug)]
pub(super) struct Client {
    socket: PathBuf,
}

impl Client {
    pub(super) fn new(socket: PathBuf) -> Self {
        Self { socket }
    }

    /// Opens the connection.
    pub(super) async fn connect(&self) -> Result<AdminServiceClient<Channel>, Failure> {
        // Opened here, for a plain error; a later one only replaces a connection that broke.
        let mut first = Some(dial(&self.socket).await?);
        let socket = self.socket.clone();
        let connector = tower::service_fn(move |_| {
            let ready = first.take();
            let socket = socket.clone();
            async move {
                let stream = match ready {
                    Some(stream) => stream,
                    None => UnixStream::connect(&socket).await?,
                };
                Ok::<_, io::Error>(TokioIo::new(stream))
            }
        });
        let channel = Endpoint::from_static("http://ca-admin.invalid")
            .timeout(CALL_MAX)
            .connect_timeout(CONNECT_MAX)
            .connect_with_connector(connector)
            .await
            .map_err(|e| {
                let path = self.socket.display();
                Failure::Failed(format!("{path} does not speak as a ca-server does: {e}"))
            })?;
        Ok(AdminServiceClient::new(channel).max_decoding_message_size(ANSWER_LEN_MAX))
    }
}

/// Collects the pages of a list. `page` asks for one and gives its items and the next page's name.
pub(super) async fn all_pages<T>(
    mut page: impl AsyncFnMut(String) -> Result<(Vec<T>, String), Failure>,
) -> Result<Vec<T>, Failure> {
    let mut all = Vec::new();
    let mut next = String::new();
    for _ in 0..PAGES_MAX {
        let (mut items, following) = page(next).await?;
        all.append(&mut items);
        if following.is_empty() {
            return Ok(all);
        }
        next = following;
    }
    Err(Failure::Failed(format!("the CA's list does not end after {PAGES_MAX} pages")))
}

async fn dial(socket: &Path) -> Result<UnixStream, Failure> {
    let dialled = timeout(CONNECT_MAX, UnixStream::connect(socket)).await;
    dialled
        .unwrap_or_else(|_| Err(io::Error::from(io::ErrorKind::TimedOut)))
        .map_err(|e| Failure::Failed(no_server(socket, &e)))
}

fn no_server(socket: &Path, error: &io::Error) -> String {
    let path = socket.display();
    #[allow(clippy::wildcard_enum_match_arm, reason = "the standard library's enum, not ours")]
    let next = match error.kind() {
        io::ErrorKind::PermissionDenied => {
            "run this as root, as the user of ca-server, or as a member of its operator_group"
        }
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
            "start it with `ca-server serve --dir DIR`, or name its admin_socket with --socket"
        }
        _ => "see the log of ca-server",
    };
    if error.kind() == io::ErrorKind::PermissionDenied {
        return format!("you may not use {path}: {error}; {next}");
    }
    format!("no ca-server at {path}: {error}; {next}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_missing_socket_says_how_to_start_the_server() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("ca.sock");
        let failure = Client::new(socket.clone()).connect().await.unwrap_err();
        let text = failure.to_string();
        assert!(text.starts_with(&format!("no ca-server at {}: ", socket.display())), "{text}");
        assert!(text.contains("ca-server serve --dir"), "{text}");
    }

    #[tokio::test]
    async fn a_socket_nobody_listens_on_says_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("ca.sock");
        drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
        let text = Client::new(socket).connect().await.unwrap_err().to_string();
        assert!(text.contains("ca-server serve --dir"), "{text}");
    }

    #[test]
    fn a_socket_one_may_not_use_is_not_said_to_have_no_server() {
        let denied = io::Error::from(io::ErrorKind::PermissionDenied);
        let text = no_server(Path::new("/run/ca.sock"), &denied);
        assert!(text.starts_with("you may not use /run/ca.sock: "), "{text}");
        assert!(text.contains("operator_group") && !text.contains("no ca-server"), "{text}");
    }

    #[tokio::test]
    async fn pages_are_put_together_in_order() {
        let all = all_pages(async |page: String| {
            Ok(match page.as_str() {
                "" => (vec![1, 2], "b".to_owned()),
                "b" => (vec![3], String::new()),
                other => panic!("page {other:?} was never offered"),
            })
        })
        .await;
        assert_eq!(all.unwrap(), [1, 2, 3]);
    }

    #[tokio::test]
    async fn a_list_without_an_end_is_an_error() {
        let endless = all_pages(async |_| Ok((Vec::<u8>::new(), "again".to_owned()))).await;
        assert!(endless.is_err());
    }
}
