//! What comes of calls that fail: which word counts, and what a person is told.

use raymtls_proto::clock::SystemClock;

use super::*;

#[test]
fn a_reason_in_the_answer_counts_before_a_dial_that_failed() {
    let root = rcgen::generate_simple_self_signed(["root".to_owned()]).unwrap();
    let target = Target {
        endpoints: Vec::new(),
        trust_domain: "ray.example".parse().unwrap(),
        control_roots: vec![root.cert.der().clone()],
        control_crls: Vec::new(),
        source: None,
    };
    let clock: Arc<dyn Clock> = Arc::new(SystemClock);
    let dialler = Dialler::new(&target, None, CallLimits::default(), &[clock]).unwrap();
    dialler.remember(Some(DialFailure { text: "refused".to_owned(), why: DialFault::Away }));
    let refusal = dialler.call_error(&Reason::Revoked.status("says the test", None));
    assert_eq!(refusal.word(), "REVOKED");
    let no_reason = dialler.call_error(&Status::unavailable("transport error"));
    assert_eq!(no_reason.word(), "CA_AWAY");
}

#[tokio::test]
async fn a_port_that_ends_an_enrolment_in_the_handshake_is_said_to_be_another() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let root = rcgen::generate_simple_self_signed(["root".to_owned()]).unwrap();
    let mut target = Target {
        endpoints: vec![listener.local_addr().unwrap().to_string()],
        trust_domain: "ray.example".parse().unwrap(),
        control_roots: vec![root.cert.der().clone()],
        control_crls: Vec::new(),
        source: None,
    };
    tokio::spawn(async move { while listener.accept().await.is_ok() {} });
    let clock: Arc<dyn Clock> = Arc::new(SystemClock);
    let ask = async |target: &Target| {
        let client = EnrollmentClient::new(target, CallLimits::default(), clock.clone());
        let answer = client.unwrap().enroll(v1::EnrollRequest::default()).await;
        answer.unwrap_err().to_string()
    };
    let text = ask(&target).await;
    assert!(text.contains("it is not the enrolment port"), "{text}");
    // Nobody there is another matter.
    target.endpoints = vec!["127.0.0.1:1".to_owned()];
    let text = ask(&target).await;
    assert!(!text.contains("enrolment port"), "{text}");
}
