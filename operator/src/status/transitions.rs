//! What to tell people of a change of status: an event for each transition, and none for what stays as it is.
//!
//! A condition's transition is a change of its status or reason; that its message changed (a count, a percentage) is none.

use baton_crds::{ConditionType, DisaggregatedModelStatus, Reason};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;

/// How loud an event is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Severity {
    /// Things go their way.
    Normal,
    /// Somebody may have to act.
    Warning,
}

/// One thing to tell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// How loud.
    pub severity: Severity,
    /// Why, in the conditions' words.
    pub reason: Reason,
    /// The condition and its message.
    pub note: String,
}

/// The events that a new status means.
///
/// Ready tells when it becomes True or stops being so. Progressing tells each of its phases. The others tell when their reason
/// becomes one that a person may have to act on, and when that is over. Stalled repeats another's reason and tells nothing.
pub fn events(previous: Option<&DisaggregatedModelStatus>, next: &DisaggregatedModelStatus) -> Vec<Event> {
    let mut events: Vec<Event> = Vec::new();
    for kind in ConditionType::ALL {
        let Some(now) = find(next, kind) else { continue };
        let Some(reason) = reason(now) else { continue };
        let before = previous.and_then(|previous| find(previous, kind));
        if before.is_some_and(|before| before.status == now.status && before.reason == now.reason) {
            continue;
        }
        let Some(severity) = severity(kind, before, now, reason) else { continue };
        // What one condition has told, Ready does not tell again.
        if severity == Severity::Warning && events.iter().any(|event| event.reason == reason) {
            continue;
        }
        events.push(Event { severity, reason, note: format!("{kind}: {}", now.message) });
    }
    events
}

fn severity(kind: ConditionType, before: Option<&Condition>, now: &Condition, reason_now: Reason) -> Option<Severity> {
    let loud = |reason: Reason| needs_attention(reason).then_some(Severity::Warning);
    let was_loud = before.and_then(reason).is_some_and(needs_attention);
    match kind {
        ConditionType::Stalled => None,
        ConditionType::Progressing => loud(reason_now).or(Some(Severity::Normal)),
        ConditionType::Ready if now.status == "True" => Some(Severity::Normal),
        ConditionType::Ready => {
            let was_ready = before.is_some_and(|before| before.status == "True");
            if was_ready { Some(Severity::Warning) } else { loud(reason_now) }
        }
        ConditionType::Accepted
        | ConditionType::ModelAvailable
        | ConditionType::PrefillReady
        | ConditionType::DecodeReady
        | ConditionType::RoutingReady
        | ConditionType::KvTransferReady => {
            let over = was_loud && now.status == "True";
            loud(reason_now).or(over.then_some(Severity::Normal))
        }
    }
}

/// Whether a person may have to act: all but what is well and what takes its time.
fn needs_attention(reason: Reason) -> bool {
    match reason {
        Reason::InvalidSpec
        | Reason::CrdNotInstalled
        | Reason::ChildRefused
        | Reason::NameTaken
        | Reason::ClusterUnreadable
        | Reason::InsufficientCapacity
        | Reason::QuotaExceeded
        | Reason::PodsRefused
        | Reason::ImagePullFailed
        | Reason::ConfigurationMissing
        | Reason::VolumeMissing
        | Reason::EngineCrashLooping
        | Reason::ProxyCrashLooping
        | Reason::NodeLost
        | Reason::ModelDownloadFailed
        | Reason::CredentialsMissing => true,
        Reason::Accepted
        | Reason::Deleting
        | Reason::AllReplicasReady
        | Reason::NotNeeded
        | Reason::ScaledToZero
        | Reason::WaitingForPods
        | Reason::EngineStarting
        | Reason::PodsNotReady
        | Reason::ModelAvailable
        | Reason::ModelDownloading
        | Reason::RoutingReady
        | Reason::WaitingForPair
        | Reason::Creating
        | Reason::RolloutInProgress
        | Reason::Scaling
        | Reason::Settled
        | Reason::AllRolesReady => false,
    }
}

fn find(status: &DisaggregatedModelStatus, kind: ConditionType) -> Option<&Condition> {
    status.conditions.iter().find(|condition| condition.type_ == kind.as_str())
}

/// None for a reason that this version does not know: an older status may have it.
fn reason(condition: &Condition) -> Option<Reason> {
    Reason::ALL.into_iter().find(|reason| reason.as_str() == condition.reason)
}

#[cfg(test)]
#[path = "transitions_tests.rs"]
mod tests;
