//! What the service manager is told, where there is one. A failure to tell it changes nothing.

use sd_notify::NotifyState;

use crate::status::Status;

/// Ready when there is a valid leaf, and one line of status.
pub(crate) fn status(status: &Status) {
    let line = match &status.files_work_until {
        Some(until) => format!("{}; files work until {until}", status.standing),
        None => format!("{}; no valid leaf", status.standing),
    };
    let mut states = vec![NotifyState::Status(&line)];
    if status.files_work_until.is_some() {
        states.push(NotifyState::Ready);
    }
    let _ = sd_notify::notify(&states);
}

/// The daemon is on its way out.
pub(crate) fn stopping() {
    let _ = sd_notify::notify(&[NotifyState::Stopping]);
}
