//! Revisions and replicas on their way from one count or revision to another.

use super::*;

#[test]
fn in_a_rollout_the_old_revision_serves_and_the_new_one_is_reported() {
    let mut world = World::healthy();
    let target = world.target.clone();
    for role in [WorkloadRole::Prefill, WorkloadRole::Decode] {
        world.deployment(role, OLD, 3, 3, |_| ());
    }
    world.deployment(WorkloadRole::Decode, &target, 1, 0, |_| ());
    world.service(OLD);
    let status = world.status();
    assert_eq!((status.revision.as_deref(), status.update_revision.as_ref()), (Some(OLD), Some(&target)));
    assert_eq!(reason(&status, ConditionType::RoutingReady), "True/RoutingReady");
    assert_eq!(reason(&status, ConditionType::Progressing), "True/RolloutInProgress");
    assert_eq!(reason(&status, ConditionType::Ready), "False/PodsNotReady".replace("PodsNotReady", "WaitingForPods"));
    assert!(message(&status, ConditionType::Ready).ends_with("; revision 00000000 serves meanwhile"));
    let decode = &status.roles[1];
    let counts = (
        decode.desired_replicas,
        decode.replicas,
        decode.updated_replicas,
        decode.ready_replicas,
        decode.available_replicas,
    );
    assert_eq!(counts, (1, 4, 1, 3, 3), "of both revisions, but for what is updated");
    assert_eq!(decode.workload_ref.as_ref().map(|reference| reference.name.as_str()), Some("tiny-decode-00000000"));
}

#[test]
fn what_is_left_of_an_old_revision_keeps_a_model_progressing_but_ready() {
    let mut world = World::healthy();
    world.deployment(WorkloadRole::Decode, OLD, 1, 1, |_| ());
    let status = world.status();
    assert_eq!(reason(&status, ConditionType::Ready), "True/AllRolesReady");
    assert_eq!(reason(&status, ConditionType::Progressing), "True/RolloutInProgress");
    assert_eq!(message(&status, ConditionType::Progressing), "revision 00000000 is being removed");
    assert_eq!(status.roles[1].replicas, 1, "what is neither wanted nor serves does not count");
}

#[test]
fn an_old_revision_that_is_kept_without_serving_says_how_to_be_rid_of_it() {
    let mut world = World::healthy();
    let target = world.target.clone();
    for role in [WorkloadRole::Prefill, WorkloadRole::Decode] {
        world.deployment(role, &target, 1, 0, |_| ());
        world.deployment(role, OLD, 1, 0, |object| {
            object["status"]["conditions"][0]["reason"] = json!("NewReplicaSetAvailable")
        });
    }
    world.service(OLD);
    let status = world.status();
    assert_eq!(status.revision.as_deref(), Some(OLD));
    assert!(message(&status, ConditionType::Progressing).contains("delete its workloads"));
}

#[test]
fn counts_that_are_about_an_older_spec_are_not_ready() {
    let mut world = World::healthy();
    let target = world.target.clone();
    world.deployment(WorkloadRole::Decode, &target, 1, 1, |object| object["metadata"]["generation"] = json!(3));
    let status = world.status();
    assert_eq!(reason(&status, ConditionType::Ready), "False/WaitingForPods");
    assert!(message(&status, ConditionType::DecodeReady).ends_with("has yet to follow the last change"));
    assert_eq!(reason(&status, ConditionType::Progressing), "True/Scaling");
}

#[test]
fn pods_that_are_replaced_in_place_are_a_rollout() {
    let mut world = World::healthy();
    let target = world.target.clone();
    world.deployment(WorkloadRole::Decode, &target, 1, 1, |object| {
        (object["status"]["replicas"], object["status"]["updatedReplicas"]) = (json!(2), json!(1));
    });
    let status = world.status();
    assert_eq!(reason(&status, ConditionType::DecodeReady), "False/WaitingForPods");
    assert_eq!(reason(&status, ConditionType::Progressing), "True/RolloutInProgress");
}

#[test]
fn surplus_replicas_are_ready_and_on_their_way_out() {
    let mut world = World::healthy();
    let target = world.target.clone();
    world.deployment(WorkloadRole::Decode, &target, 1, 1, |object| {
        for count in ["replicas", "updatedReplicas", "readyReplicas", "availableReplicas"] {
            object["status"][count] = json!(3);
        }
    });
    let status = world.status();
    assert_eq!(reason(&status, ConditionType::Ready), "True/AllRolesReady");
    assert_eq!(reason(&status, ConditionType::Progressing), "True/Scaling");
    assert_eq!(message(&status, ConditionType::DecodeReady), "1 of 1 decode replicas take work");
}

#[test]
fn a_role_that_its_scaler_has_set_to_zero_is_not_ready_and_says_why() {
    let mut world = World::new("model: {uri: pvc://models}, decode: {autoscaling: {provider: External}}");
    let target = world.target.clone();
    world.deployment(WorkloadRole::Prefill, &target, 1, 1, |_| ());
    world.deployment(WorkloadRole::Decode, &target, 0, 0, |_| ());
    world.service(&target);
    let status = world.status();
    assert_eq!(reason(&status, ConditionType::DecodeReady), "False/ScaledToZero");
    assert_eq!(reason(&status, ConditionType::RoutingReady), "False/WaitingForPair");
    assert_eq!(reason(&status, ConditionType::Ready), "False/ScaledToZero");
    world.deployment(WorkloadRole::Decode, &target, 4, 4, |_| ());
    let status = world.status();
    assert_eq!(reason(&status, ConditionType::Ready), "True/AllRolesReady");
    assert_eq!(status.roles[1].desired_replicas, 4);
}

#[test]
fn a_front_door_is_part_of_routing() {
    let mut world = World::new("model: {uri: pvc://models}, routing: {mode: Standalone}");
    let target = world.target.clone();
    for role in [WorkloadRole::Prefill, WorkloadRole::Decode] {
        world.deployment(role, &target, 1, 1, |_| ());
    }
    world.deployment(WorkloadRole::Proxy, &target, 1, 0, |_| ());
    world.service(&target);
    world.pod(WorkloadRole::Proxy, &target, unschedulable("0/1 nodes are available: 1 Insufficient cpu."));
    let status = world.status();
    assert_eq!(reason(&status, ConditionType::RoutingReady), "False/InsufficientCapacity");
    assert_eq!(reason(&status, ConditionType::Ready), "False/InsufficientCapacity");
    world.deployment(WorkloadRole::Proxy, &target, 1, 1, |_| ());
    let status = world.status();
    assert_eq!(reason(&status, ConditionType::Ready), "True/AllRolesReady");
    assert_eq!(message(&status, ConditionType::Ready), "prefill 1/1, decode 1/1, proxy 1/1");
    let words = format!("requests to http://tiny.team-a.svc:8000 reach proxy pods of revision {target}");
    assert_eq!(message(&status, ConditionType::RoutingReady), words);
}
