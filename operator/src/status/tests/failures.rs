//! Children that the API server did not take, and kinds that it lacks.

use super::*;
use crate::site::OptionalKind;

/// With this child not written: Accepted, Ready, and whether it stalls.
#[track_caller]
fn check_failure(kind: Kind, class: Class, accepted: &str, ready: &str, stalls: bool) {
    let mut world = World::healthy();
    world.fail(kind, "tiny", class, "in the API server's words");
    let status = world.status();
    assert_eq!(reason(&status, ConditionType::Accepted), accepted);
    assert_eq!(reason(&status, ConditionType::Ready), ready);
    let stalled = status.conditions.iter().find(|condition| condition.type_ == "Stalled");
    assert_eq!(stalled.is_some(), stalls);
    assert_eq!(
        reason(&status, ConditionType::Progressing) == format!("False/{}", ready.trim_start_matches("False/")),
        stalls
    );
    assert!(
        message(&status, ConditionType::Ready).contains(&format!("{} tiny: in the API server's words", kind.as_str()))
    );
}

#[test]
fn a_child_that_the_api_server_did_not_take_is_told_by_what_kind_of_no_it_was() {
    check_failure(Kind::NetworkPolicy, Class::Refused, "False/ChildRefused", "False/ChildRefused", true);
    check_failure(Kind::ConfigMap, Class::NameTaken, "False/NameTaken", "False/NameTaken", true);
    check_failure(Kind::PodMonitor, Class::KindMissing, "False/CRDNotInstalled", "False/CRDNotInstalled", true);
    check_failure(Kind::Service, Class::Quota, "False/QuotaExceeded", "False/QuotaExceeded", false);
    check_failure(Kind::ConfigMap, Class::Transient, "Unknown/ClusterUnreadable", "False/ClusterUnreadable", false);
    check_failure(Kind::ConfigMap, Class::Conflict, "Unknown/ClusterUnreadable", "False/ClusterUnreadable", false);
}

#[test]
fn of_several_failures_the_one_that_needs_a_person_is_told_with_the_number_of_the_others() {
    let mut world = World::healthy();
    world.fail(Kind::ConfigMap, "tiny", Class::Transient, "timed out");
    world.fail(Kind::Service, "tiny", Class::Refused, "no");
    let status = world.status();
    assert_eq!(message(&status, ConditionType::Accepted), "Service tiny: no (and 1 more)");
    assert_eq!(reason(&status, ConditionType::RoutingReady), "False/ChildRefused");
}

#[test]
fn a_repair_that_is_late_changes_nothing_but_a_new_manifest_that_was_not_taken_does() {
    let mut world = World::healthy();
    world.previous = Some(world.status());
    world.fail(Kind::ConfigMap, "tiny", Class::Transient, "timed out");
    assert_eq!(Some(world.status()), world.previous);
    let conditions = &mut world.previous.as_mut().expect("just set").conditions;
    conditions.iter_mut().for_each(|condition| condition.observed_generation = Some(GENERATION - 1));
    assert_eq!(reason(&world.status(), ConditionType::Ready), "False/ClusterUnreadable");
}

#[test]
fn a_workload_that_was_not_written_is_not_ready_whatever_its_older_self_says() {
    let mut world = World::healthy();
    let name = names::workload("tiny", WorkloadRole::Decode, &world.target);
    world.fail(Kind::Deployment, &name, Class::Refused, "admission webhook \"policy\" denied the request");
    let status = world.status();
    assert_eq!(reason(&status, ConditionType::DecodeReady), "False/ChildRefused");
    assert_eq!(reason(&status, ConditionType::PrefillReady), "True/AllReplicasReady");
}

#[test]
fn a_kind_that_the_cluster_lacks_is_named_with_what_asks_for_it() {
    let mut world = World::new("model: {uri: pvc://models}, observability: {monitor: PodMonitor}");
    let status = world.status();
    assert_eq!(reason(&status, ConditionType::Stalled), "True/CRDNotInstalled");
    let words = "the cluster has no PodMonitor (monitoring.coreos.com/v1), for which spec.observability.monitor asks: install it, or take that back";
    assert_eq!(message(&status, ConditionType::Stalled), words);
    world.site.kinds.insert(OptionalKind::PodMonitor);
    assert_eq!(reason(&world.status(), ConditionType::Accepted), "True/Accepted");
}

#[test]
fn replicas_that_span_nodes_need_their_kind_and_are_counted_by_their_leaders() {
    let spec = "model: {uri: pvc://models}, engine: {type: VLLM, image: 'vllm:1'}, prefill: {nodesPerReplica: 2}, decode: {nodesPerReplica: 2}";
    let mut world = World::new(spec);
    let status = world.status();
    assert_eq!(reason(&status, ConditionType::Accepted), "False/CRDNotInstalled");
    assert_eq!(reason(&status, ConditionType::DecodeReady), "False/CRDNotInstalled");
    world.site.kinds.insert(OptionalKind::LeaderWorkerSet);
    let name = names::workload("tiny", WorkloadRole::Decode, &world.target);
    let object = json!({
        "metadata": world.meta(&name, "decode", &world.target),
        "spec": {"replicas": 1, "leaderWorkerTemplate": {"size": 2, "workerTemplate": {}}},
        "status": {"observedGeneration": 2, "replicas": 1, "readyReplicas": 1, "updatedReplicas": 1},
    });
    world.observed.children.insert((Kind::LeaderWorkerSet, name), object);
    let status = world.status();
    assert_eq!(reason(&status, ConditionType::DecodeReady), "True/AllReplicasReady");
    let decode = status.roles.iter().find(|role| role.name == "decode").expect("the role is there");
    assert!(
        decode
            .selector
            .as_deref()
            .is_some_and(|selector| selector.ends_with(",leaderworkerset.sigs.k8s.io/worker-index=0"))
    );
    assert_eq!(decode.workload_ref.as_ref().map(|reference| reference.kind.as_str()), Some("LeaderWorkerSet"));
}
