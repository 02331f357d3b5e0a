//! The last words of containers that failed.
//!
//! Only of pods that are there and meant to run on: a pod that is gone takes its words along, and with them the last trace of a
//! cause that was healed. A container that failed and works now keeps its entry as long as its pod.

use super::pods::{crash_reason, how_it_ended, is_alive, role, runs_on, statuses};
use super::words::cut_front;
use baton_crds::LastError;
use baton_crds::status::{LAST_ERROR_CHARS_MAX, LAST_ERRORS_MAX};
use k8s_openapi::api::core::v1::{ContainerState, ContainerStateTerminated, ContainerStatus, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use std::collections::BTreeSet;

/// The newest first. Of pods that fail alike, the newest stands for all.
pub(super) fn last_errors(pods: &[Pod]) -> Vec<LastError> {
    let mut errors: Vec<_> = pods.iter().filter(|pod| is_alive(pod)).flat_map(of_pod).collect();
    errors.sort_by(|a, b| (b.time.0, &a.pod, &a.container).cmp(&(a.time.0, &b.pod, &b.container)));
    let mut told = BTreeSet::new();
    errors.retain(|error| told.insert((error.role.clone(), error.container.clone(), error.message.clone())));
    errors.truncate(LAST_ERRORS_MAX);
    errors
}

fn of_pod(pod: &Pod) -> impl Iterator<Item = LastError> + '_ {
    statuses(pod).filter_map(move |container| {
        let ended = newest_end(pod, container)?;
        Some(LastError {
            role: role(pod)?.as_str().to_owned(),
            pod: pod.metadata.name.clone(),
            container: Some(container.name.clone()),
            reason: crash_reason(&container.name).as_str().to_owned(),
            message: message(pod, &container.name, ended),
            time: time(pod, ended),
        })
    })
}

/// The end that is told: of the run before, or of the last one where it did not go on.
fn newest_end<'a>(pod: &Pod, container: &'a ContainerStatus) -> Option<&'a ContainerStateTerminated> {
    let end = |state: &'a Option<ContainerState>| state.as_ref().and_then(|state| state.terminated.as_ref());
    // A container that is to run on has failed by ending, whatever its exit code.
    let is_failure = |ended: &&ContainerStateTerminated| ended.exit_code != 0 || runs_on(pod, &container.name);
    end(&container.state).filter(is_failure).or_else(|| end(&container.last_state).filter(is_failure))
}

fn message(pod: &Pod, container: &str, ended: &ContainerStateTerminated) -> String {
    let how = how_it_ended(pod, container, ended);
    let words = ended.message.as_deref().unwrap_or_default();
    let words: String = words.trim().chars().filter(|c| !c.is_control() || matches!(c, '\n' | '\t')).collect();
    if words.is_empty() {
        return how;
    }
    let room = LAST_ERROR_CHARS_MAX.saturating_sub(how.chars().count() + 2);
    format!("{how}: {}", cut_front(&words, room))
}

fn time(pod: &Pod, ended: &ContainerStateTerminated) -> Time {
    let started = pod.status.as_ref().and_then(|status| status.start_time.clone());
    let known = ended.finished_at.clone().or(started).or_else(|| pod.metadata.creation_timestamp.clone());
    known.unwrap_or(Time(Timestamp::UNIX_EPOCH))
}
