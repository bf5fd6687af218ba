//! What Ray does not do: OpenSSL and nginx check a whole chain against the `crl.pem` an agent keeps,
//! and refuse a leaf from the moment its node was revoked. Wants nginx.

use std::{
    net::TcpListener,
    path::{Path, PathBuf},
    process::Stdio,
    time::Instant,
};

use node_agent::keys::PrivateKey;
use raymtls_proto::{
    bundle::certificates_to_pem,
    durable::{Access, create, replace},
};
use raymtls_tests::{Deployment, node_leaf};
use tokio::{
    io::AsyncWriteExt,
    process::{Child, Command},
    time::sleep,
};

use crate::node::{Node, SOON};

/// A peer that presents a leaf: its files, by name.
struct Peer {
    folder: PathBuf,
    name: &'static str,
}

impl Peer {
    /// Enrolled, with a leaf.
    async fn new(deployment: &Deployment, name: &'static str, address: &str) -> Self {
        let member = deployment.worker("c1", name, address).await;
        let key = PrivateKey::generate().unwrap();
        let answer = member.client.issue_leaf(node_leaf(&key)).await.unwrap();
        let chain = answer.leaf.unwrap();
        let peer = Self { folder: deployment.folder.path().to_owned(), name };
        let pem = |der: &[u8]| certificates_to_pem(&[der]);
        for (kind, text) in [
            ("leaf", pem(&chain.leaf_der)),
            ("issuer", pem(&chain.issuers_der[0])),
            ("key", key.to_pem().to_string()),
        ] {
            create(&peer.file(kind), text.as_bytes(), Access::PRIVATE).unwrap();
        }
        peer
    }

    fn file(&self, kind: &str) -> PathBuf {
        self.folder.join(format!("{}.{kind}", self.name))
    }

    /// What `openssl verify` says of its leaf.
    async fn verified(&self, tls: &Path) -> String {
        let mut command = Command::new("openssl");
        command.args(["verify", "-x509_strict", "-crl_check_all", "-CAfile"]);
        command.arg(tls.join("ca.crt")).arg("-CRLfile").arg(tls.join("crl.pem"));
        command.arg("-untrusted").arg(self.file("issuer")).arg(self.file("leaf"));
        let output = command.output().await.unwrap();
        String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
    }

    /// The first line of the proxy's answer to it.
    async fn asks(&self, port: u16, tls: &Path) -> String {
        let mut command = Command::new("openssl");
        command.args(["s_client", "-quiet", "-verify_return_error", "-connect"]);
        command.arg(format!("127.0.0.1:{port}")).arg("-CAfile").arg(tls.join("ca.crt"));
        command.arg("-cert").arg(self.file("leaf")).arg("-key").arg(self.file("key"));
        command.arg("-cert_chain").arg(self.file("issuer"));
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().unwrap();
        let mut stdin = child.stdin.take().unwrap();
        stdin.write_all(b"GET / HTTP/1.0\r\n\r\n").await.unwrap();
        let output = tokio::time::timeout(SOON, child.wait_with_output()).await.unwrap().unwrap();
        drop(stdin);
        String::from_utf8_lossy(&output.stdout).lines().next().unwrap_or_default().to_owned()
    }
}

/// nginx, which lets in whoever has a leaf of the cluster that is on no CRL.
async fn proxy(folder: &Path, tls: &Path) -> (Child, u16) {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let text = format!(
        "daemon off;\nmaster_process off;\npid {folder}/nginx.pid;\nerror_log {folder}/nginx.log;\n\
         events {{}}\nhttp {{\n  access_log off;\n  client_body_temp_path {folder};\n  server {{\n    \
         listen 127.0.0.1:{port} ssl;\n    ssl_certificate {tls}/tls.crt;\n    \
         ssl_certificate_key {tls}/tls.key;\n    ssl_client_certificate {tls}/ca.crt;\n    \
         ssl_verify_client on;\n    ssl_verify_depth 2;\n    ssl_crl {tls}/crl.pem;\n    \
         location / {{ return 200; }}\n  }}\n}}\n",
        folder = folder.display(),
        tls = tls.display(),
    );
    let config = folder.join("nginx.conf");
    replace(&config, text.as_bytes(), Access::PUBLIC).unwrap();
    let mut command = Command::new("nginx");
    command.arg("-c").arg(&config).kill_on_drop(true);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let child = command.spawn().expect("wants the package nginx-light");
    let began = Instant::now();
    while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
        assert!(began.elapsed() < SOON, "nginx does not listen");
        sleep(std::time::Duration::from_millis(20)).await;
    }
    (child, port)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn openssl_and_nginx_accept_a_good_leaf_and_refuse_a_revoked_one() {
    let mut node = Node::new().await;
    node.run().await;
    let tls = node.at("tls/current");
    let good = Peer::new(&node.deployment, "good", "10.0.0.2").await;
    let bad = Peer::new(&node.deployment, "bad", "10.0.0.3").await;
    let (mut nginx, port) = proxy(node.deployment.folder.path(), &tls).await;
    for peer in [&good, &bad] {
        let said = peer.verified(&tls).await;
        assert!(said.contains("OK") && !said.contains("error"), "{}: {said}", peer.name);
        assert_eq!(peer.asks(port, &tls).await, "HTTP/1.1 200 OK", "{}", peer.name);
    }

    node.deployment.revoke("c1", "bad").await;
    let began = Instant::now();
    while !bad.verified(&tls).await.contains("certificate revoked") {
        assert!(began.elapsed() < SOON, "the CRL did not come:\n{}", node.log());
        sleep(std::time::Duration::from_millis(50)).await;
    }
    // nginx reads its files when it starts or is told to reload, which is what a hook is for.
    nginx.kill().await.unwrap();
    let (mut nginx, port) = proxy(node.deployment.folder.path(), &tls).await;
    assert_eq!(bad.asks(port, &tls).await, "HTTP/1.1 400 Bad Request");
    assert_eq!(good.asks(port, &tls).await, "HTTP/1.1 200 OK");
    assert!(good.verified(&tls).await.contains("OK"));
    println!("refused by nginx {:?} after the revocation", began.elapsed());
    nginx.kill().await.unwrap();
    node.kill().await;
}
