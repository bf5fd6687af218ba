//! Callers of a newer release: messages with fields this CA does not know, and enum values of the
//! future. What it knows is served; what it would have to guess is refused in words.

use std::{sync::Arc, time::Duration};

use hyper_util::rt::TokioIo;
use node_agent::{keys::PrivateKey, statedir::Identity};
use prost::Message;
use raymtls_proto::{clock::TlsTime, v1};
use raymtls_tests::{Deployment, ask, node_leaf};
use rustls::{
    ClientConfig, RootCertStore,
    crypto::aws_lc_rs,
    pki_types::{PrivateKeyDer, pem::PemObject},
    version::TLS13,
};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tonic::transport::{Channel, Endpoint};

const DAY: Duration = Duration::from_secs(86_400);

/// What every message of the future has besides what it has today.
#[derive(Clone, PartialEq, Message)]
struct Future {
    #[prost(string, tag = "1000")]
    text: String,
    #[prost(uint64, tag = "1001")]
    number: u64,
    #[prost(message, optional, boxed, tag = "1002")]
    nested: Option<Box<Self>>,
    #[prost(fixed64, tag = "1003")]
    fixed: u64,
    #[prost(fixed32, repeated, tag = "1004")]
    many: Vec<u32>,
}

fn future() -> Vec<u8> {
    let inner = Future { text: "inner".to_owned(), ..Future::default() };
    let future = Future {
        text: "of the future".to_owned(),
        number: u64::MAX,
        nested: Some(Box::new(inner)),
        fixed: 7,
        many: vec![1, 2, 3],
    };
    future.encode_to_vec()
}

/// A message of today inside one of the future.
fn newer<M: Message + Default + PartialEq + std::fmt::Debug>(message: &M) -> Vec<u8> {
    let bytes = [message.encode_to_vec(), future()].concat();
    assert_eq!(M::decode(bytes.as_slice()).unwrap(), *message);
    bytes
}

#[tokio::test]
async fn fields_of_a_newer_release_are_skipped_by_the_ca() {
    let ca = Deployment::start().await;
    ca.cluster("c1", DAY).await;
    let token = ca.token("c1", v1::Role::Worker, 1).await;
    let key = PrivateKey::generate().unwrap();
    let request = ask(&token, "c1", "w1", &["10.0.0.1"], &key);
    let mut client = raw_client(&ca, None).await;
    let path = "/raymtls.v1.EnrollmentService/Enroll";
    let answer: v1::EnrollResponse = call(&mut client, path, newer(&request)).await.unwrap();
    assert_eq!(answer.node_name, "w1");
    // A credential of a kind this release does not know stands where the token would: refused.
    let other = v1::EnrollRequest { credential: None, ..request };
    let refused = call::<v1::EnrollResponse>(&mut client, path, newer(&other)).await.unwrap_err();
    assert!(refused.message().contains("no credential this server knows"), "{refused}");
    // Bytes that are no message at all spend nothing and break no connection.
    let held = ca.held().await;
    for bytes in [vec![0xff; 64], vec![0x0a, 0xff, 0xff, 0xff, 0xff, 0x0f], vec![0x0b; 2_000]] {
        assert!(call::<v1::EnrollResponse>(&mut client, path, bytes).await.is_err());
    }
    let unknown = call::<v1::EnrollResponse>(&mut client, "/raymtls.v2.New/Call", vec![]).await;
    assert_eq!(unknown.unwrap_err().code(), tonic::Code::Unimplemented);
    assert_eq!(ca.held().await, held);
    call::<v1::EnrollResponse>(&mut client, path, newer(&ask_again(&token, &key))).await.unwrap();
    ca.finish().await;
}

fn ask_again(token: &str, key: &PrivateKey) -> v1::EnrollRequest {
    ask(token, "c1", "w1", &["10.0.0.1"], key)
}

#[test]
fn fields_of_a_newer_ca_are_skipped_by_agent_and_operator() {
    let settings = v1::Settings { leaf_life_seconds: 7, mode: 77, ..v1::Settings::default() };
    let version = Some(v1::SyncVersion { epoch: 1, counter: 2 });
    newer(&v1::SyncResponse {
        version,
        settings: Some(settings.clone()),
        directives: vec![v1::Directive { act: None }],
        ..v1::SyncResponse::default()
    });
    newer(&settings);
    newer(&v1::EnrollResponse { node_name: "w1".to_owned(), ..v1::EnrollResponse::default() });
    newer(&v1::RenewIdentityResponse {
        server_time_unix: 7,
        ..v1::RenewIdentityResponse::default()
    });
    newer(&v1::IssueLeafResponse { server_time_unix: 7, ..v1::IssueLeafResponse::default() });
    newer(&v1::Cluster { version, ..v1::Cluster::default() });
    newer(&v1::Node { state: 77, role: 77, ..v1::Node::default() });
    newer(&v1::Token { state: 77, role: 77, ..v1::Token::default() });
    newer(&v1::Certificate { kind: 77, ..v1::Certificate::default() });
    // An act of the future is an act this release does not know, not a damaged message.
    let act = v1::Directive::decode(future().as_slice()).unwrap();
    assert_eq!(act.act, None);
}

#[tokio::test]
async fn a_version_of_the_future_or_of_another_store_is_answered_with_everything() {
    let ca = Deployment::start().await;
    ca.cluster("c1", DAY).await;
    let member = ca.worker("c1", "w1", "10.0.0.1").await;
    let all = member.client.sync(v1::SyncRequest::default()).await.unwrap();
    let version = all.version.unwrap();
    let have = |epoch, counter| v1::SyncRequest {
        have: Some(v1::SyncVersion { epoch, counter }),
        ..v1::SyncRequest::default()
    };
    let nothing = member.client.sync(have(version.epoch, version.counter)).await.unwrap();
    assert!(nothing.settings.is_none() && nothing.bundle.is_none());
    for (epoch, counter) in
        [(version.epoch, u64::MAX), (version.epoch, version.counter + 1), (version.epoch ^ 1, 0)]
    {
        let again = member.client.sync(have(epoch, counter)).await.unwrap();
        assert!(again.settings.is_some() && again.bundle.is_some(), "{epoch} {counter}");
        assert_eq!(again.version, Some(version));
    }
    member.client.issue_leaf(node_leaf(&PrivateKey::generate().unwrap())).await.unwrap();
    ca.finish().await;
}

/// One call with the bytes as they are.
pub(crate) async fn call<A: Message + Default + 'static>(
    client: &mut tonic::client::Grpc<Channel>,
    path: &'static str,
    bytes: Vec<u8>,
) -> Result<A, tonic::Status> {
    client.ready().await.unwrap();
    let path = http::uri::PathAndQuery::from_static(path);
    let codec = raw::Codec::<A>::default();
    let answer = client.unary(tonic::Request::new(bytes), path, codec).await;
    answer.map(tonic::Response::into_inner)
}

/// A client that sends bytes: to the nodes' door with an identity, to the other without.
pub(crate) async fn raw_client(
    ca: &Deployment,
    identity: Option<&Identity>,
) -> tonic::client::Grpc<Channel> {
    let mut roots = RootCertStore::empty();
    for root in ca.target(ca.enrollment).control_roots {
        roots.add(root).unwrap();
    }
    let time = Arc::new(TlsTime(Arc::new(ca.clock.clone())));
    let config = ClientConfig::builder_with_details(Arc::new(aws_lc_rs::default_provider()), time)
        .with_protocol_versions(&[&TLS13])
        .unwrap()
        .with_root_certificates(roots);
    let (mut config, door) = match identity {
        None => (config.with_no_client_auth(), ca.enrollment),
        Some(identity) => {
            let key = PrivateKeyDer::from_pem_slice(identity.key.to_pem().as_bytes()).unwrap();
            let chain = identity.chain.certificates();
            let chain = chain.into_iter().map(|der| der.into_owned()).collect();
            (config.with_client_auth_cert(chain, key).unwrap(), ca.nodes)
        }
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    let connector = TlsConnector::from(Arc::new(config));
    let channel = Endpoint::from_static("https://ca.ray.example")
        .connect_with_connector(tower::service_fn(move |_| {
            let connector = connector.clone();
            async move {
                let stream = TcpStream::connect(door).await?;
                let name = "ca.ray.example".try_into().unwrap();
                connector.connect(name, stream).await.map(TokioIo::new)
            }
        }))
        .await
        .unwrap();
    tonic::client::Grpc::new(channel)
}

/// Bytes out, a message in.
mod raw {
    use std::marker::PhantomData;

    use prost::Message;
    use tonic::{
        Status,
        codec::{DecodeBuf, Decoder, EncodeBuf, Encoder},
    };

    #[derive(Debug)]
    pub(super) struct Codec<A>(PhantomData<A>);

    impl<A> Default for Codec<A> {
        fn default() -> Self {
            Self(PhantomData)
        }
    }

    impl<A: Message + Default + 'static> tonic::codec::Codec for Codec<A> {
        type Encode = Vec<u8>;
        type Decode = A;
        type Encoder = Self;
        type Decoder = Self;

        fn encoder(&mut self) -> Self {
            Self::default()
        }

        fn decoder(&mut self) -> Self {
            Self::default()
        }
    }

    impl<A> Encoder for Codec<A> {
        type Item = Vec<u8>;
        type Error = Status;

        fn encode(&mut self, bytes: Vec<u8>, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
            prost::bytes::BufMut::put_slice(buffer, &bytes);
            Ok(())
        }
    }

    impl<A: Message + Default> Decoder for Codec<A> {
        type Item = A;
        type Error = Status;

        fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<A>, Status> {
            A::decode(buffer).map(Some).map_err(|e| Status::internal(e.to_string()))
        }
    }
}
