//! What holds whatever the cluster looks like.

use super::*;
use crate::observed::Missing;
use baton_crds::status::{LAST_ERROR_CHARS_MAX, LAST_ERRORS_MAX};
use k8s_openapi::api::core::v1::Pod;
use proptest::prelude::*;

/// A pod in one of many states, by number.
fn any_pod(which: usize) -> Value {
    let states = [
        ready(),
        unschedulable("0/1 nodes are available: 1 Insufficient cpu."),
        unschedulable("0/1 nodes are available: pod has unbound immediate PersistentVolumeClaims."),
        crashed("no such directory", 3),
        container("engine", json!({"running": {}})),
        container("engine", json!({"waiting": {"reason": "ImagePullBackOff", "message": "Back-off"}})),
        container(
            "engine",
            json!({"waiting": {"reason": "\u{1F980}".repeat(2000), "message": "\u{0}\u{7}".repeat(900)}}),
        ),
        container("model-download", json!({"running": {}})),
        container("model-download", json!({"terminated": {"exitCode": 1, "message": "\n\n"}})),
        container("routing-proxy", json!({"terminated": {"exitCode": -1}})),
        json!({"metadata": {}}),
        json!({"metadata": {}, "status": {"phase": "Failed", "reason": "Evicted"}}),
    ];
    states[which % states.len()].clone()
}

prop_compose! {
    fn any_world()(
        which in 0..5usize,
        workloads in proptest::collection::vec((0..3usize, any::<bool>(), 0..3u32, 0..3u32, 0..4u32, 0..4u32, any::<bool>(), any::<bool>()), 0..6),
        selected in proptest::option::of(any::<bool>()),
        pods in proptest::collection::vec((0..3usize, any::<bool>(), 0..12usize), 0..8),
        failures in proptest::collection::vec((0..6usize, 0..9usize), 0..3),
        missing in proptest::option::of(any::<bool>()),
        fixed in prop::bool::weighted(0.3),
    ) -> World {
        if fixed {
            return World::healthy();
        }
        let mut world = World::new([
            "model: {uri: pvc://models}",
            "model: {uri: hf://org/repo}, decode: {autoscaling: {provider: External}}",
            "model: {uri: pvc://models}, routing: {mode: Standalone}",
            "model: {uri: pvc://models}, disaggregation: {policy: Never}",
            "model: {uri: pvc://models}, engine: {type: VLLM, image: 'vllm:1'}, decode: {nodesPerReplica: 2}",
        ][which]);
        let target = world.target.clone();
        let revision = |is_target: bool| if is_target { target.clone() } else { OLD.to_owned() };
        for (role, is_target, replicas, available, status_replicas, updated, current, odd) in workloads {
            world.deployment(WorkloadRole::ALL[role], &revision(is_target), replicas, available, |object| {
                object["status"]["replicas"] = json!(status_replicas);
                object["status"]["updatedReplicas"] = json!(updated);
                if !current {
                    object["metadata"]["generation"] = json!(3);
                }
                if odd {
                    object["status"]["conditions"] = json!([{"type": "ReplicaFailure", "status": "True"}]);
                }
            });
        }
        if let Some(is_target) = selected {
            world.service(&revision(is_target));
        }
        for (role, is_target, state) in pods {
            world.pod(WorkloadRole::ALL[role], &revision(is_target), any_pod(state));
        }
        for (class, kind) in failures {
            let name = names::workload("tiny", WorkloadRole::Decode, &target);
            let name = if Kind::ALL[kind] == Kind::Deployment { name.as_str() } else { "tiny" };
            world.fail(Kind::ALL[kind], name, Class::ALL[class], "words");
        }
        world.observed.missing = missing
            .map(|claim| if claim { Missing::Claim("models".to_owned()) } else { Missing::Secret("hub".to_owned()) })
            .into_iter()
            .collect();
        world
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, ..ProptestConfig::default() })]

    #[test]
    fn whatever_is_seen_the_status_holds_together(world in any_world()) {
        let mut world = world;
        let status = world.status();
        let truth = |kind: ConditionType| reason(&status, kind);

        prop_assert_eq!(status.observed_generation, Some(GENERATION));
        prop_assert!(status.conditions.iter().all(|condition| condition.observed_generation == Some(GENERATION)));
        prop_assert!(status.conditions.iter().all(|condition| condition.message.chars().count() <= words::MESSAGE_CHARS_MAX && !condition.message.is_empty()));
        prop_assert!(status.last_errors.len() <= LAST_ERRORS_MAX);
        prop_assert!(status.last_errors.iter().all(|error| error.message.chars().count() <= LAST_ERROR_CHARS_MAX));
        prop_assert!(!line(&status).contains("KVTransferReady"), "until there is a real check");

        let stalled = status.conditions.iter().find(|condition| condition.type_ == "Stalled");
        if let Some(stalled) = stalled {
            let known = Reason::ALL.into_iter().find(|reason| reason.as_str() == stalled.reason).expect("a reason of the list");
            prop_assert!(known.stalls() && stalled.status == "True");
            prop_assert_eq!(truth(ConditionType::Ready), format!("False/{known}"));
        }
        if truth(ConditionType::Ready).starts_with("True") {
            prop_assert!(stalled.is_none() && status.update_revision.is_none() && world.failures.is_empty());
            prop_assert_eq!(status.revision.as_ref(), Some(&world.target));
            let workloads = world.observed.workloads("tiny", &world.owner);
            for role in crate::desired::roles(&world.model) {
                let own = workloads.iter().find(|workload| workload.role == role && workload.revision == world.target);
                let own = own.expect("what is ready exists");
                let wanted = plan::wanted(plan::replicas(&world.model, role).expect("it is wanted"), Some(own));
                prop_assert!(own.current && own.available >= wanted && own.updated >= wanted && wanted > 0);
            }
        }

        // A second look at the same world, later, says the same; and Kubernetes gives back what was written.
        let read: DisaggregatedModelStatus =
            serde_json::from_value(serde_json::to_value(&status).expect("a status")).expect("its own form reads");
        prop_assert_eq!(&read, &status);
        (world.previous, world.now) = (Some(read), at(1000));
        prop_assert_eq!(&world.status(), &status);
        prop_assert!(transitions::events(Some(&status), &world.status()).is_empty());
        // Pods in another order are the same pods.
        world.observed.pods.reverse();
        prop_assert_eq!(&world.status(), &status);
    }

    #[test]
    fn no_pod_makes_classification_fail(text in any::<String>(), code in any::<i32>(), kind in 0..3usize, name in 0..4usize) {
        let name = ["engine", "routing-proxy", "model-download", "other"][name];
        let state = match kind {
            0 => json!({"waiting": {"reason": text, "message": text}}),
            1 => json!({"terminated": {"exitCode": code, "reason": text, "message": text}}),
            _ => json!({}),
        };
        let pod: Pod = serde_json::from_value(container(name, state)).expect("a pod");
        let _ = pods::holdup(&pod);
        let _ = last_errors::last_errors(&[pod]);
    }
}
