//! One suite for every backend: each test is a claim about the verbs of [`Store`](super::Store), and
//! knows nothing of what is below them.
#![cfg(test)]

mod audit;
mod clusters;
mod enrolment;
mod fixture;
mod identities;
mod innocent;
mod leaves;
mod members;
mod nodes;
mod revocations;
mod takeover;

use time::OffsetDateTime;

use super::{Store, kv::KvStore, memory::MemoryEngine, sled::SledEngine};

/// Where a store lies: it can be closed and opened again there.
trait Place {
    fn create(&self, now: OffsetDateTime, epoch: u64) -> Box<dyn Store>;
    fn open(&self, now: OffsetDateTime) -> Box<dyn Store>;
}

struct InMemory(MemoryEngine);

impl Place for InMemory {
    fn create(&self, now: OffsetDateTime, epoch: u64) -> Box<dyn Store> {
        Box::new(KvStore::create(Box::new(self.0.clone()), now, epoch).unwrap())
    }

    fn open(&self, now: OffsetDateTime) -> Box<dyn Store> {
        Box::new(KvStore::open(Box::new(self.0.clone()), now).unwrap())
    }
}

struct InFolder(tempfile::TempDir);

impl InFolder {
    fn engine(&self) -> Box<SledEngine> {
        Box::new(SledEngine::open(&self.0.path().join("store")).unwrap())
    }
}

impl Place for InFolder {
    fn create(&self, now: OffsetDateTime, epoch: u64) -> Box<dyn Store> {
        Box::new(KvStore::create(self.engine(), now, epoch).unwrap())
    }

    fn open(&self, now: OffsetDateTime) -> Box<dyn Store> {
        Box::new(KvStore::open(self.engine(), now).unwrap())
    }
}

macro_rules! suite {
    ($($file:ident: $($claim:ident)+;)+) => {
        mod memory {
            $($(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $claim() {
                    super::$file::$claim(&super::InMemory(super::MemoryEngine::new())).await;
                }
            )+)+
        }
        mod sled {
            $($(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $claim() {
                    super::$file::$claim(&super::InFolder(tempfile::tempdir().unwrap())).await;
                }
            )+)+
        }
    };
}

suite! {
    clusters:
        a_control_authority_is_put_in_place_once
        a_cluster_is_created_once
        settings_change_only_from_what_they_were
        the_newest_issuer_is_first_and_expired_ones_go
        crl_numbers_never_go_back
        a_control_crl_concerns_every_cluster
        a_version_moves_exactly_when_something_its_agents_must_know_changes
        a_watcher_wakes_when_its_cluster_changes_and_not_for_another
        an_ended_cluster_gives_nothing;
    enrolment:
        an_enrolled_node_is_what_was_bound
        a_token_of_n_uses_gives_exactly_n_nodes
        one_key_that_races_itself_spends_one_use
        the_same_key_gets_the_same_answer
        another_key_needs_another_use
        a_refused_attempt_spends_nothing
        an_unknown_token_and_a_wrong_secret_are_one_word
        what_changed_while_the_identity_was_signed_loses
        tokens_are_listed_and_revoked_in_their_own_cluster;
    takeover:
        a_name_is_free_once_its_node_is_absent_to_the_millisecond
        an_address_is_free_once_its_holder_is_absent
        contact_keeps_a_node_present
        nobody_is_absent_before_the_server_has_served_that_long
        a_node_that_left_frees_name_and_address
        a_token_that_may_replace_takes_over_a_live_name
        a_driver_for_once_leaves_its_name_to_the_next
        drivers_and_shared_addresses_hold_nothing
        an_address_taken_over_is_no_longer_certified_for_its_old_node;
    identities:
        a_pending_identity_retires_the_current_one
        a_retired_identity_is_an_event
        an_identity_signed_a_moment_before_it_was_recorded_is_no_stranger
        a_renewal_asked_twice_is_answered_the_same
        a_renewal_with_another_key_replaces_the_pending_one
        a_renewal_wants_a_new_key
        who_was_replaced_does_not_stand
        a_call_proves_the_address_it_comes_from
        an_identity_of_another_life_is_unknown;
    leaves:
        a_leaf_states_what_is_bound_or_less
        a_leaf_key_is_certified_for_one_leaf_life
        the_identity_key_is_no_leaf_key
        a_node_has_a_bounded_number_of_leaf_keys
        a_name_that_comes_back_again_and_again_has_its_share_each_time
        a_key_that_was_too_old_does_not_become_young
        one_key_has_one_purpose_and_one_node
        a_node_has_a_bounded_number_of_certificates
        a_node_that_was_away_holds_its_address_again
        what_changed_while_the_leaf_was_signed_loses;
    revocations:
        a_revoked_leaf_key_gets_no_certificate_and_its_node_another
        an_identity_is_not_revoked_without_its_node
        a_forgotten_node_s_leaf_can_still_be_revoked
        a_node_taken_back_enrols_with_a_new_token_and_none_of_its_old_keys;
    nodes:
        a_revoked_node_gets_nothing
        only_a_newer_token_may_use_a_revoked_address
        revoking_blocks_no_address_another_live_node_has
        revoking_blocks_no_address_a_node_only_claimed
        revoking_voids_what_is_left_of_the_token_unless_it_is_kept
        revoking_voids_the_tokens_of_earlier_enrolments_too
        a_leaf_of_an_earlier_life_keeps_a_revoked_node_on_record
        revoking_revokes_every_certificate_that_lives
        several_nodes_are_revoked_in_one_decision_as_one_by_one
        expired_revocations_leave_the_list_and_stay_counted
        a_revoked_node_is_forgotten_only_when_its_last_leaf_has_expired
        a_forgotten_node_is_unknown_and_its_name_free
        pages_join_to_the_whole;
    members:
        a_member_counts_at_the_addresses_it_called_from
        where_ranges_are_trusted_claimed_addresses_count_too
        pages_of_changes_join_to_the_whole
        a_silent_node_lapses_to_the_millisecond_and_its_first_contact_brings_it_back
        time_in_which_the_ca_did_not_serve_is_nobody_s_silence
        a_machine_for_once_is_a_member_while_its_leaf_lives
        who_is_gone_is_told_for_a_day_and_then_everything_anew
        a_revoked_node_s_addresses_are_cut_off_until_its_last_leaf_ends
        a_node_without_a_leaf_is_cut_off_for_a_day
        an_address_certified_to_another_since_is_cut_off_no_more
        an_address_taken_over_counts_for_its_new_node_alone
        a_block_is_never_a_weapon
        an_address_taken_back_counts_again
        a_call_alone_takes_an_address_back_that_is_free
        only_a_call_from_it_makes_an_address_count_for_another
        an_address_spared_for_another_is_cut_off_when_nobody_needs_it
        a_node_that_was_long_gone_has_nobody_cut_off
        what_two_revocations_cut_off_one_reinstatement_does_not_free
        whoever_had_an_address_loses_it_to_the_one_that_calls_from_it
        a_node_that_came_back_as_a_driver_keeps_the_address_it_shares;
    audit:
        every_change_is_on_record
        the_audit_chain_is_whole_after_everything
        everything_survives_closing;
}
