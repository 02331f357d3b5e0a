//! The last words of containers that failed.

use super::*;
use baton_crds::status::{LAST_ERROR_CHARS_MAX, LAST_ERRORS_MAX};

#[test]
fn last_words_are_the_newest_first_bounded_and_told_once() {
    let mut world = World::healthy();
    let target = world.target.clone();
    for second in 1..=7 {
        world.pod(WorkloadRole::Decode, &target, crashed(&format!("cause {second}"), second));
    }
    world.pod(WorkloadRole::Decode, &target, crashed("cause 7", 0));
    world.pod(WorkloadRole::Prefill, &target, crashed(&format!("{}the end", "x".repeat(3000)), 9));
    let errors = world.status().last_errors;
    assert_eq!(errors.len(), LAST_ERRORS_MAX);
    assert_eq!(errors[0].role, "prefill");
    assert_eq!(errors[0].message.chars().count(), LAST_ERROR_CHARS_MAX);
    assert!(errors[0].message.starts_with("ended with exit code 1: …x") && errors[0].message.ends_with("the end"));
    let said: Vec<_> = errors[1..].iter().map(|error| error.message.as_str()).collect();
    assert_eq!(said, ["7", "6", "5", "4"].map(|n| format!("ended with exit code 1: cause {n}")));
    assert_eq!(errors[1].time.0, at(7));
    assert_eq!(errors[1].reason, "EngineCrashLooping");
    assert_eq!(errors[1].container.as_deref(), Some("engine"));
    let mut reversed = world;
    reversed.observed.pods.reverse();
    assert_eq!(reversed.status().last_errors, errors, "whatever the order of the list");
}

#[test]
fn last_words_go_with_their_pod_and_stay_while_it_works_again() {
    let mut world = World::healthy();
    let target = world.target.clone();
    let mut works = ready();
    works["status"]["containerStatuses"][0]["lastState"] =
        json!({"terminated": {"exitCode": 137, "reason": "OOMKilled", "finishedAt": "2026-01-30T08:00:00Z"}});
    works["spec"]["containers"][0]["resources"] = json!({"limits": {"memory": "2Gi"}});
    world.pod(WorkloadRole::Decode, &target, works.clone());
    let told = world.status().last_errors;
    assert_eq!(told.len(), 1);
    assert_eq!(told[0].message, "was killed at its memory limit of 2Gi (OOMKilled)");
    world.observed.pods.pop();
    works["metadata"]["deletionTimestamp"] = json!("2026-01-30T08:00:00Z");
    world.pod(WorkloadRole::Decode, &target, works);
    assert!(world.status().last_errors.is_empty(), "it is on its way out");
    world.observed.pods.pop();
    // An init container that ended well and a failed one without words.
    world.pod(WorkloadRole::Decode, &target, container("model-download", json!({"terminated": {"exitCode": 0}})));
    assert!(world.status().last_errors.is_empty());
}
