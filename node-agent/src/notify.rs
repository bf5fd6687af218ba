//! What the service manager is told, where there is one. A failure to tell it changes nothing.

use sd_notify::NotifyState;

use crate::status::Status;

/// Ready when what starts now finds all it needs, and one line of status.
pub(crate) fn status(status: &Status) {
    let line = line(status);
    let mut states = vec![NotifyState::Status(&line)];
    if status.is_ready() {
        states.push(NotifyState::Ready);
    }
    let _ = sd_notify::notify(&states);
}

/// The daemon is on its way out.
pub(crate) fn stopping() {
    let _ = sd_notify::notify(&[NotifyState::Stopping]);
}

fn line(status: &Status) -> String {
    let standing = &status.standing;
    match &status.files_work_until {
        None => format!("{standing}; no valid leaf"),
        Some(_) if !status.isolation.is_ready() => format!("{standing}; no isolation table yet"),
        Some(_) if !status.is_ready() => format!("{standing}; no Ray token yet"),
        Some(until) => format!("{standing}; files work until {until}"),
    }
}
