//! What a pod, or something that the manifest refers to, lacks: told in the same reconcile, and gone once it is healed.

use super::*;
use crate::observed::Missing;
use baton_wire::progress::{Phase, Progress};

/// With the only decode pod in this state: DecodeReady, ModelAvailable, Ready, and Ready's words.
#[track_caller]
fn check_pod(pod: Value, decode: Reason, available: &str, ready: &str) {
    let world = World::with_decode_pod(pod);
    let status = world.status();
    assert_eq!(reason(&status, ConditionType::DecodeReady), format!("False/{decode}"));
    assert_eq!(reason(&status, ConditionType::ModelAvailable), available);
    assert_eq!(reason(&status, ConditionType::RoutingReady), "False/WaitingForPair");
    assert!(!line(&status).contains("Stalled"), "what may heal by itself does not stall");
    let said = message(&status, ConditionType::Ready).replace(&world.target, "REV");
    assert_eq!(said, ready);
}

#[test]
fn each_trouble_of_a_pod_reaches_ready_in_the_same_reconcile() {
    let waiting =
        |reason: &str, message: &str| container("engine", json!({"waiting": {"reason": reason, "message": message}}));
    check_pod(
        unschedulable("0/3 nodes are available: 3 Insufficient nvidia.com/gpu."),
        Reason::InsufficientCapacity,
        "True/ModelAvailable",
        "DecodeReady: 0 of 1 decode replicas take work; pod tiny-decode-REV-1: no node takes it: 0/3 nodes are available: 3 Insufficient nvidia.com/gpu",
    );
    check_pod(
        unschedulable("0/3 nodes are available: persistentvolumeclaim \"models\" not found."),
        Reason::VolumeMissing,
        "False/VolumeMissing",
        "ModelAvailable: pod tiny-decode-REV-1: 0/3 nodes are available: persistentvolumeclaim \"models\" not found",
    );
    check_pod(
        unschedulable("0/3 nodes are available: persistentvolumeclaim \"scratch\" not found."),
        Reason::VolumeMissing,
        "True/ModelAvailable",
        "DecodeReady: 0 of 1 decode replicas take work; pod tiny-decode-REV-1: 0/3 nodes are available: persistentvolumeclaim \"scratch\" not found",
    );
    check_pod(
        waiting("ErrImagePull", "not found"),
        Reason::ImagePullFailed,
        "True/ModelAvailable",
        "DecodeReady: 0 of 1 decode replicas take work; pod tiny-decode-REV-1: image baton/worker:0.1.0 of container engine can't be pulled: not found",
    );
    check_pod(
        waiting("CreateContainerConfigError", "secret \"keys\" not found"),
        Reason::ConfigurationMissing,
        "True/ModelAvailable",
        "DecodeReady: 0 of 1 decode replicas take work; pod tiny-decode-REV-1: container engine can't be made: secret \"keys\" not found",
    );
    check_pod(
        crashed("no such directory", 1),
        Reason::EngineCrashLooping,
        "True/ModelAvailable",
        "DecodeReady: 0 of 1 decode replicas take work; pod tiny-decode-REV-1: container engine ended with exit code 1: no such directory",
    );
    check_pod(
        container("routing-proxy", json!({"terminated": {"exitCode": 2, "message": "bad flag"}})),
        Reason::ProxyCrashLooping,
        "True/ModelAvailable",
        "DecodeReady: 0 of 1 decode replicas take work; pod tiny-decode-REV-1: container routing-proxy ended with exit code 2: bad flag",
    );
    check_pod(
        container("model-download", json!({"terminated": {"exitCode": 1, "message": "401: the token is not valid"}})),
        Reason::ModelDownloadFailed,
        "False/ModelDownloadFailed",
        "ModelAvailable: pod tiny-decode-REV-1: container model-download ended with exit code 1: 401: the token is not valid",
    );
    check_pod(
        container("engine", json!({"running": {}})),
        Reason::EngineStarting,
        "True/ModelAvailable",
        "DecodeReady: 0 of 1 decode replicas take work; pod tiny-decode-REV-1: the engine loads the model",
    );
}

#[test]
fn a_healed_cause_leaves_no_trace_but_its_last_words() {
    let mut world = World::healthy();
    let before = world.status();
    let mut failing = World::with_decode_pod(crashed("no such directory", 1));
    (failing.previous, failing.now) = (Some(before.clone()), at(10));
    let failed = failing.status();
    (world.previous, world.now) = (Some(failed), at(20));
    let healed = world.status();
    let without_times = |mut status: DisaggregatedModelStatus| {
        status.conditions.iter_mut().for_each(|condition| condition.last_transition_time.0 = at(0));
        status
    };
    assert_eq!(without_times(healed), without_times(before));
}

#[test]
fn what_the_manifest_refers_to_and_is_missing_is_named_before_any_pod_says_so() {
    let mut world = World::new("model: {uri: pvc://models}");
    world.observed.missing = vec![Missing::Claim("models".to_owned())];
    let status = world.status();
    assert_eq!(reason(&status, ConditionType::ModelAvailable), "False/VolumeMissing");
    assert_eq!(reason(&status, ConditionType::DecodeReady), "False/VolumeMissing");
    assert_eq!(reason(&status, ConditionType::Ready), "False/VolumeMissing");
    let words = "ModelAvailable: PersistentVolumeClaim models does not exist: create it, or name another in spec.model";
    assert_eq!(message(&status, ConditionType::Ready), words);
    world.observed.missing = vec![Missing::Secret("hub".to_owned())];
    let status = world.status();
    assert_eq!(reason(&status, ConditionType::Ready), "False/CredentialsMissing");
    assert!(message(&status, ConditionType::Ready).contains("Secret hub does not exist"));
    // Pods that run already need it no more.
    let mut world = World::healthy();
    world.observed.missing = vec![Missing::Secret("hub".to_owned())];
    assert_eq!(reason(&world.status(), ConditionType::DecodeReady), "True/AllReplicasReady");
}

#[test]
fn pods_that_no_controller_can_make_are_told_by_what_refuses_them() {
    for (words, expect) in [
        (
            "pods \"tiny-decode-x\" is forbidden: exceeded quota: team-a, requested: cpu=4, used: cpu=8, limited: cpu=8",
            Reason::QuotaExceeded,
        ),
        (
            "pods \"tiny-decode-x\" is forbidden: violates PodSecurity \"restricted:latest\": hostPath",
            Reason::PodsRefused,
        ),
        ("pods \"tiny-decode-x\" is forbidden: no PriorityClass with name gold was found", Reason::PodsRefused),
        (
            "pods \"tiny-decode-\" is forbidden: error looking up service account team-a/tiny-decode: serviceaccount \"tiny-decode\" not found",
            Reason::ConfigurationMissing,
        ),
    ] {
        let mut world = World::healthy();
        let target = world.target.clone();
        world.deployment(WorkloadRole::Decode, &target, 1, 0, |object| {
            object["status"]["conditions"] =
                json!([{"type": "ReplicaFailure", "status": "True", "reason": "FailedCreate", "message": words}]);
        });
        let status = world.status();
        assert_eq!(reason(&status, ConditionType::DecodeReady), format!("False/{expect}"));
        assert!(message(&status, ConditionType::Ready).contains(words), "{}", message(&status, ConditionType::Ready));
    }
}

#[test]
fn a_download_is_told_with_its_progress() {
    let mut world = World::new("model: {uri: hf://org/repo}");
    let target = world.target.clone();
    world.deployment(WorkloadRole::Decode, &target, 1, 0, |_| ());
    world.pod(WorkloadRole::Decode, &target, container("model-download", json!({"running": {}})));
    let progress = |phase, bytes_done, bytes_total, error: Option<&str>| Progress {
        uri: "hf://org/repo".to_owned(),
        phase,
        bytes_done,
        bytes_total,
        files_done: 0,
        files_total: 3,
        bytes_per_second: 1,
        error: error.map(str::to_owned),
    };
    let told = |world: &World| {
        let status = world.status();
        let words = message(&status, ConditionType::ModelAvailable).replace(&world.target, "REV");
        assert_eq!(reason(&status, ConditionType::Ready), "False/ModelDownloading");
        (words, status.download.map(|download| (download.pod, download.percent, download.bytes_total)))
    };
    let alone = "pod tiny-decode-REV-0: downloads the model";
    assert_eq!(told(&world), (alone.to_owned(), None));
    world.observed.downloads.insert("b".to_owned(), progress(Phase::Downloading, 430, 1000, None));
    assert_eq!(told(&world), (format!("{alone} (43 %)"), Some(("b".to_owned(), Some(43), Some(1000)))));
    // One that waits for the other's work is behind in bytes but not what is waited for.
    world.observed.downloads.insert("a".to_owned(), progress(Phase::Waiting, 0, 0, None));
    world.observed.downloads.insert("c".to_owned(), progress(Phase::Downloading, 10, 1000, Some("503: try later")));
    world.observed.downloads.insert("d".to_owned(), progress(Phase::Complete, 1000, 1000, None));
    assert_eq!(
        told(&world),
        (format!("{alone} (1 %; last error: 503: try later)"), Some(("c".to_owned(), Some(1), Some(1000))))
    );
    world.observed.downloads.retain(|pod, _| pod == "a");
    assert_eq!(told(&world), (format!("{alone} (waiting)"), Some(("a".to_owned(), None, None))));
    world.observed.downloads.insert("a".to_owned(), progress(Phase::Downloading, u64::MAX, u64::MAX, None));
    assert_eq!(told(&world).1, Some(("a".to_owned(), Some(100), Some(9_007_199_254_740_991))));
}
