//! Two statuses and what is told of the way between them.

use super::*;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;

fn status(conditions: &[(ConditionType, &str, Reason)]) -> DisaggregatedModelStatus {
    let conditions = conditions.iter().map(|(kind, status, reason)| Condition {
        type_: kind.as_str().to_owned(),
        status: (*status).to_owned(),
        reason: reason.as_str().to_owned(),
        message: format!("about {reason}"),
        observed_generation: Some(1),
        last_transition_time: Time(Timestamp::UNIX_EPOCH),
    });
    DisaggregatedModelStatus { conditions: conditions.collect(), ..DisaggregatedModelStatus::default() }
}

#[track_caller]
fn check(
    before: Option<&[(ConditionType, &str, Reason)]>,
    after: &[(ConditionType, &str, Reason)],
    expect: &[(Severity, Reason, &str)],
) {
    let told = events(before.map(status).as_ref(), &status(after));
    let told: Vec<_> = told.iter().map(|event| (event.severity, event.reason, event.note.as_str())).collect();
    assert_eq!(told, expect);
}

use ConditionType::{Accepted, DecodeReady, Progressing, Ready, RoutingReady, Stalled};
use Severity::{Normal, Warning};

#[test]
fn a_new_model_tells_that_it_is_being_created_and_nothing_of_what_takes_its_time() {
    check(
        None,
        &[
            (Accepted, "True", Reason::Accepted),
            (DecodeReady, "False", Reason::WaitingForPods),
            (RoutingReady, "False", Reason::WaitingForPair),
            (Progressing, "True", Reason::Creating),
            (Ready, "False", Reason::WaitingForPods),
        ],
        &[(Normal, Reason::Creating, "Progressing: about Creating")],
    );
}

#[test]
fn nothing_is_told_while_nothing_changes() {
    let same = [(Progressing, "True", Reason::Creating), (Ready, "False", Reason::EngineCrashLooping)];
    check(Some(&same), &same, &[]);
}

#[test]
fn a_model_that_becomes_ready_says_so_once() {
    check(
        Some(&[
            (DecodeReady, "False", Reason::EngineStarting),
            (Progressing, "True", Reason::Creating),
            (Ready, "False", Reason::EngineStarting),
        ]),
        &[
            (DecodeReady, "True", Reason::AllReplicasReady),
            (Progressing, "False", Reason::Settled),
            (Ready, "True", Reason::AllRolesReady),
        ],
        &[
            (Normal, Reason::Settled, "Progressing: about Settled"),
            (Normal, Reason::AllRolesReady, "Ready: about AllRolesReady"),
        ],
    );
}

#[test]
fn a_trouble_is_told_by_the_condition_that_has_it_and_not_again_by_ready() {
    check(
        Some(&[(DecodeReady, "True", Reason::AllReplicasReady), (Ready, "True", Reason::AllRolesReady)]),
        &[(DecodeReady, "False", Reason::EngineCrashLooping), (Ready, "False", Reason::EngineCrashLooping)],
        &[(Warning, Reason::EngineCrashLooping, "DecodeReady: about EngineCrashLooping")],
    );
}

#[test]
fn a_model_that_stops_being_ready_warns_even_if_it_merely_waits() {
    check(
        Some(&[(DecodeReady, "True", Reason::AllReplicasReady), (Ready, "True", Reason::AllRolesReady)]),
        &[(DecodeReady, "False", Reason::PodsNotReady), (Ready, "False", Reason::PodsNotReady)],
        &[(Warning, Reason::PodsNotReady, "Ready: about PodsNotReady")],
    );
}

#[test]
fn one_trouble_after_another_and_its_end_are_told() {
    check(
        Some(&[(DecodeReady, "False", Reason::InsufficientCapacity)]),
        &[(DecodeReady, "False", Reason::ImagePullFailed)],
        &[(Warning, Reason::ImagePullFailed, "DecodeReady: about ImagePullFailed")],
    );
    check(
        Some(&[(DecodeReady, "False", Reason::ImagePullFailed)]),
        &[(DecodeReady, "False", Reason::EngineStarting)],
        &[],
    );
    check(
        Some(&[(Accepted, "False", Reason::CrdNotInstalled), (Stalled, "True", Reason::CrdNotInstalled)]),
        &[(Accepted, "True", Reason::Accepted)],
        &[(Normal, Reason::Accepted, "Accepted: about Accepted")],
    );
}

#[test]
fn what_stalls_is_told_once() {
    check(
        Some(&[
            (Accepted, "True", Reason::Accepted),
            (Progressing, "False", Reason::Settled),
            (Ready, "True", Reason::AllRolesReady),
        ]),
        &[
            (Accepted, "False", Reason::InvalidSpec),
            (Progressing, "False", Reason::InvalidSpec),
            (Ready, "False", Reason::InvalidSpec),
            (Stalled, "True", Reason::InvalidSpec),
        ],
        &[(Warning, Reason::InvalidSpec, "Accepted: about InvalidSpec")],
    );
}

#[test]
fn a_reason_of_another_version_is_passed_over() {
    let mut newer = status(&[(Ready, "False", Reason::EngineStarting)]);
    newer.conditions[0].reason = "FromTheFuture".to_owned();
    assert!(events(None, &newer).is_empty());
    let now = status(&[(Ready, "False", Reason::EngineStarting)]);
    assert!(events(Some(&newer), &now).is_empty());
}

#[test]
fn a_message_that_changes_is_no_transition() {
    let before = status(&[(Ready, "False", Reason::ModelDownloading)]);
    let mut after = before.clone();
    after.conditions[0].message = "44 %".to_owned();
    assert!(events(Some(&before), &after).is_empty());
}
