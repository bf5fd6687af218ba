//! What `ray-tunnel` reads: of other nodes header and answer, of its own host rules and requests.

use std::path::Path;

use node_agent::tunnel::{
    control::{Answer, Request},
    header::{self, ANSWER_LEN, HEADER_LEN, Header},
    rules::Rules,
};

use super::{ERROR_LEN_MAX, text};

/// Header and answer on the wire, rules, and the lines of the control socket.
pub fn tunnel(data: &[u8]) {
    if let Some(bytes) = data.first_chunk::<HEADER_LEN>() {
        header_holds(bytes);
    }
    if let Some(bytes) = data.first_chunk::<ANSWER_LEN>()
        && let Ok(answer) = header::parse_answer(*bytes)
    {
        assert_eq!(&header::encode_answer(answer), bytes);
    }
    match Rules::parse(data, Path::new("rules.json")) {
        Ok(rules) => {
            assert_eq!(rules.fault(), None);
            let again = Rules::parse(rules.to_text().as_bytes(), Path::new("rules.json"));
            assert_eq!(again.ok().as_ref(), Some(&rules));
        }
        Err(error) => assert!(error.to_string().len() <= 4 * data.len() + ERROR_LEN_MAX),
    }
    let Some(text) = text(data) else { return };
    if let Ok(request) = serde_json::from_str::<Request>(text) {
        let again = serde_json::to_string(&request).expect("a request is valid JSON");
        assert_eq!(serde_json::from_str::<Request>(&again).ok(), Some(request));
    }
    if let Ok(answer) = serde_json::from_str::<Answer>(text) {
        let again = serde_json::to_string(&answer).expect("an answer is valid JSON");
        assert_eq!(serde_json::from_str::<Answer>(&again).ok(), Some(answer));
    }
}

/// A header is what it was read from, but for an address that is written in two ways: an IPv4 one
/// is only known mapped.
fn header_holds(bytes: &[u8; HEADER_LEN]) {
    let Ok(header) = Header::parse(bytes) else { return };
    assert_eq!(&header.encode(), bytes);
    assert_eq!(header.address(), header.address().to_canonical());
    if let Header::Flow { port, .. } = header {
        assert_ne!(port, 0);
    }
}
