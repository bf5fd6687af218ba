//! The first leaf that ends in a cluster, by what the agents of its nodes say.

use raymtls_proto::v1;

/// Takes one node's word into account; `None` where it said nothing of Ray.
pub(super) fn add(fleet: &mut v1::Horizon, node: &str, running: Option<&v1::Running>) {
    let Some(running) = running else {
        fleet.nodes_unknown += 1;
        return;
    };
    match running.recycle_state() {
        v1::RecycleState::Overdue => fleet.nodes_overdue += 1,
        v1::RecycleState::Unknown => fleet.nodes_unknown += 1,
        v1::RecycleState::Unspecified | v1::RecycleState::Fresh | v1::RecycleState::Due => {}
    }
    if is_earlier(running.horizon_unix, fleet.unix) {
        (fleet.unix, fleet.node) = (running.horizon_unix, node.to_owned());
    }
    if is_earlier(running.driver_horizon_unix, fleet.driver_unix) {
        (fleet.driver_unix, fleet.driver_node) = (running.driver_horizon_unix, node.to_owned());
    }
}

/// Zero is none.
fn is_earlier(unix: i64, than: i64) -> bool {
    unix != 0 && (than == 0 || unix < than)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_that_ends_is_named_and_the_silent_are_counted() {
        let mut fleet = v1::Horizon::default();
        let running = |horizon_unix, driver_horizon_unix, state: v1::RecycleState| v1::Running {
            horizon_unix,
            driver_horizon_unix,
            recycle_state: state.into(),
            ..v1::Running::default()
        };
        add(&mut fleet, "w1", Some(&running(50, 0, v1::RecycleState::Fresh)));
        add(&mut fleet, "w2", Some(&running(40, 60, v1::RecycleState::Overdue)));
        add(&mut fleet, "w3", Some(&running(0, 0, v1::RecycleState::Unknown)));
        add(&mut fleet, "w4", None);
        assert_eq!((fleet.unix, fleet.node.as_str()), (40, "w2"));
        assert_eq!((fleet.driver_unix, fleet.driver_node.as_str()), (60, "w2"));
        assert_eq!((fleet.nodes_overdue, fleet.nodes_unknown), (1, 2));
    }
}
