//! What holds between conditions, and between a status and the one before it.

use super::*;

#[test]
fn an_error_goes_before_what_merely_waits_and_what_stalls_before_both() {
    let mut world = World::with_decode_pod(crashed("no such directory", 1));
    let target = world.target.clone();
    world.observed.pods.retain(|pod| pods::role(pod) == Some(WorkloadRole::Decode));
    world.deployment(WorkloadRole::Prefill, &target, 1, 0, |_| ());
    world.pod(WorkloadRole::Prefill, &target, container("engine", json!({"running": {}})));
    assert_eq!(reason(&world.status(), ConditionType::Ready), "False/EngineCrashLooping");
    world.fail(Kind::Service, "tiny", Class::NameTaken, "is somebody else's");
    assert_eq!(reason(&world.status(), ConditionType::Ready), "False/NameTaken");
}

#[test]
fn a_refused_manifest_is_told_field_by_field_and_forgets_nothing_of_what_runs() {
    let mut world = World::healthy();
    let before = world.status();
    (world.previous, world.now) = (Some(before.clone()), at(60));
    let violations = [
        Violation {
            path: "spec.decode.replicas".to_owned(),
            message: "somebody has to generate".to_owned(),
            allowed: "at least 1".to_owned(),
        },
        Violation {
            path: "spec.model.uri".to_owned(),
            message: "not a\nmodel source".to_owned(),
            allowed: String::new(),
        },
    ];
    let status = world.of(&Outcome::Invalid(&violations));
    assert_eq!(
        line(&status),
        "Accepted=False/InvalidSpec ModelAvailable=True/ModelAvailable PrefillReady=True/AllReplicasReady \
         DecodeReady=True/AllReplicasReady RoutingReady=True/RoutingReady Progressing=False/InvalidSpec Ready=False/InvalidSpec \
         Stalled=True/InvalidSpec"
    );
    let words = "spec.decode.replicas: somebody has to generate: at least 1; spec.model.uri: not a model source";
    assert_eq!(message(&status, ConditionType::Stalled), words);
    assert_eq!(status.observed_generation, Some(GENERATION));
    assert_eq!((&status.roles, &status.url, &status.revision), (&before.roles, &before.url, &before.revision));
    // Corrected: nothing is left of it.
    (world.previous, world.now) = (Some(status), at(90));
    assert_eq!(reason(&world.status(), ConditionType::Stalled), "");
    assert_eq!(reason(&world.status(), ConditionType::Ready), "True/AllRolesReady");
}

#[test]
fn a_manifest_that_was_refused_from_the_start_has_no_roles_to_speak_of() {
    let world = World::healthy();
    let violations = [Violation { path: "spec".to_owned(), message: "x".repeat(5000), allowed: String::new() }];
    let status = world.of(&Outcome::Invalid(&violations));
    assert_eq!(
        line(&status),
        "Accepted=False/InvalidSpec Progressing=False/InvalidSpec Ready=False/InvalidSpec Stalled=True/InvalidSpec"
    );
    assert_eq!(message(&status, ConditionType::Ready).chars().count(), words::MESSAGE_CHARS_MAX);
    assert!(status.roles.is_empty());
}

#[test]
fn a_cluster_that_cannot_be_read_makes_ready_unknown_and_leaves_the_rest() {
    let mut world = World::healthy();
    let before = world.status();
    (world.previous, world.now) = (Some(before.clone()), at(60));
    let status = world.of(&Outcome::Unreadable("can't read pods: pods is forbidden"));
    assert_eq!(reason(&status, ConditionType::Ready), "Unknown/ClusterUnreadable");
    assert_eq!(message(&status, ConditionType::Ready), "can't read pods: pods is forbidden");
    let others = |status: &DisaggregatedModelStatus| -> Vec<_> {
        status.conditions.iter().filter(|condition| condition.type_ != "Ready").cloned().collect()
    };
    assert_eq!(others(&status), others(&before));
    assert_eq!(DisaggregatedModelStatus { conditions: before.conditions.clone(), ..status }, before);
    world.previous = None;
    assert_eq!(world.of(&Outcome::Unreadable("no")).observed_generation, None, "nothing was acted on");
}

#[test]
fn a_condition_of_somebody_else_is_theirs() {
    let mut world = World::healthy();
    let mut before = world.status();
    let mut foreign = before.conditions[0].clone();
    foreign.type_ = "example.com/Audited".to_owned();
    before.conditions.push(foreign);
    world.previous = Some(before);
    assert!(!line(&world.status()).contains("Audited"));
    assert!(!line(&world.of(&Outcome::Unreadable("no"))).contains("Audited"));
}

#[test]
fn a_transition_time_moves_only_with_the_status_it_is_about() {
    let mut world = World::healthy();
    world.previous = Some(world.status());
    let mut failing = World::with_decode_pod(crashed("a", 1));
    (failing.previous, failing.now) = (world.previous.take(), at(30));
    let failed = failing.status();
    let since = |status: &DisaggregatedModelStatus, kind: ConditionType| {
        status
            .conditions
            .iter()
            .find(|condition| condition.type_ == kind.as_str())
            .expect("it is there")
            .last_transition_time
            .0
    };
    assert_eq!(since(&failed, ConditionType::DecodeReady), at(30));
    assert_eq!(since(&failed, ConditionType::PrefillReady), at(0));
    // Another reason is no other status.
    let mut starting = World::with_decode_pod(container("engine", json!({"running": {}})));
    (starting.previous, starting.now) = (Some(failed), at(60));
    assert_eq!(since(&starting.status(), ConditionType::DecodeReady), at(30));
}

#[test]
fn times_are_whole_seconds_because_kubernetes_keeps_no_more() {
    let mut world = World::healthy();
    world.now = Timestamp::new(1_769_760_000, 987_654_321).expect("a time of this century");
    let written = serde_json::to_value(world.status()).expect("a status");
    assert_eq!(written["conditions"][0]["lastTransitionTime"], json!("2026-01-30T08:00:00Z"));
    let read: DisaggregatedModelStatus = serde_json::from_value(written).expect("its own form reads");
    assert_eq!(read, world.status());
}
