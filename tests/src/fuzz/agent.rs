//! What the agent reads from its own host: `ray.env`, and requests on its socket.

use node_agent::{
    api::{Answer, LINE_LEN_MAX, Request},
    rayenv::{self, RayEnv},
};

use super::{ERROR_LEN_MAX, text};

/// `ray.env` and the lines of the agent's socket.
pub fn local(data: &[u8]) {
    let Some(text) = text(data) else { return };
    match RayEnv::parse(text) {
        Ok(env) => env_holds(&env),
        Err(error) => assert!(error.to_string().len() <= 4 * data.len() + ERROR_LEN_MAX),
    }
    if text.len() > LINE_LEN_MAX {
        return;
    }
    if let Ok(request) = serde_json::from_str::<Request>(text) {
        let again = serde_json::to_string(&request).expect("a request is valid JSON");
        assert_eq!(serde_json::from_str::<Request>(&again).ok(), Some(request));
    }
    if let Ok(answer) = serde_json::from_str::<Answer>(text) {
        let again = serde_json::to_string(&answer).expect("an answer is valid JSON");
        assert_eq!(serde_json::from_str::<Answer>(&again).ok(), Some(answer));
    }
}

/// No variable but ours, and no value that needs quotes.
fn env_holds(env: &RayEnv) {
    let written = env.to_text();
    assert_eq!(RayEnv::parse(&written).as_ref(), Ok(env), "{written}");
    for (name, value) in env.variables() {
        assert!(rayenv::is_owned(name) || rayenv::port_variable(name).is_some(), "{name}");
        let value = value.to_str().expect("text stays text");
        assert!(
            value.bytes().all(|b| b.is_ascii_alphanumeric() || b"/._-".contains(&b)),
            "{value:?}"
        );
    }
}
