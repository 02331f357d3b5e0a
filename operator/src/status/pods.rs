//! What keeps a pod from taking work, from its status alone: no log and no event is read.
//!
//! The words that are looked for are those of Kubernetes 1.36: kubelet container states (pkg/kubelet/images, kuberuntime), the
//! scheduler's PodScheduled condition (pkg/scheduler), and the node controllers' conditions.

use super::words::{last_line, quote};
use baton_crds::{Reason, WorkloadRole};
use k8s_openapi::api::core::v1::{
    Container, ContainerState, ContainerStateTerminated, ContainerStatus, Pod, PodCondition,
};

/// The init container that downloads the model.
pub(super) const MODEL_DOWNLOAD: &str = "model-download";
/// The container of the engine.
pub(super) const ENGINE: &str = "engine";
/// The container of the routing proxy.
pub(super) const ROUTING_PROXY: &str = "routing-proxy";

/// What keeps a pod, or a role's pods, from taking work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Holdup {
    /// Its kind.
    pub(super) reason: Reason,
    /// The thing at fault and what would help.
    pub(super) message: String,
}

impl Holdup {
    fn new(reason: Reason, message: impl Into<String>) -> Self {
        Holdup { reason, message: message.into() }
    }
}

/// Reasons of pods, the one that most needs a person first: of several, that one is told.
const BY_URGENCY: [Reason; 13] = [
    Reason::VolumeMissing,
    Reason::ConfigurationMissing,
    Reason::ImagePullFailed,
    Reason::ModelDownloadFailed,
    Reason::EngineCrashLooping,
    Reason::ProxyCrashLooping,
    Reason::InsufficientCapacity,
    Reason::NodeLost,
    Reason::ModelDownloading,
    Reason::EngineStarting,
    Reason::WaitingForPair,
    Reason::PodsNotReady,
    Reason::WaitingForPods,
];

fn urgency(reason: Reason) -> usize {
    BY_URGENCY.iter().position(|listed| *listed == reason).unwrap_or(BY_URGENCY.len())
}

/// The most urgent of what keeps these pods from taking work, with the pod's name; the first by name among equals, so that the
/// same world gives the same words. Pods that are on their way out, or have ended, are asked only where there are no others: a
/// successor's trouble is the one to tell.
pub(super) fn most_urgent<'a>(pods: impl Iterator<Item = &'a Pod> + Clone) -> Option<Holdup> {
    let among = |pods: &mut dyn Iterator<Item = &'a Pod>| {
        let held_up = pods.filter_map(|pod| Some((holdup(pod)?, pod.metadata.name.as_deref().unwrap_or_default())));
        held_up.min_by(|(a, a_pod), (b, b_pod)| (urgency(a.reason), a_pod).cmp(&(urgency(b.reason), b_pod)))
    };
    let found = if pods.clone().any(is_alive) {
        among(&mut pods.filter(|pod| is_alive(pod)))
    } else {
        among(&mut pods.into_iter())
    };
    found.map(|(holdup, pod)| Holdup { message: format!("pod {pod}: {}", holdup.message), ..holdup })
}

/// Whether a pod is meant to run on.
pub(super) fn is_alive(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    pod.metadata.deletion_timestamp.is_none() && !matches!(phase, Some("Failed" | "Succeeded"))
}

/// Whether an engine of the pod runs and has loaded the model: its startup probe, which asks for just that, has passed.
pub(super) fn has_loaded(pod: &Pod) -> bool {
    is_alive(pod) && statuses(pod).any(|container| container.name == ENGINE && container.started == Some(true))
}

/// Whether the pod's download has ended well.
pub(super) fn has_downloaded(pod: &Pod) -> bool {
    let ended_well = |state: &ContainerState| state.terminated.as_ref().is_some_and(|ended| ended.exit_code == 0);
    is_alive(pod)
        && statuses(pod)
            .any(|container| container.name == MODEL_DOWNLOAD && container.state.as_ref().is_some_and(ended_well))
}

/// What keeps a pod from taking work; none where nothing does.
pub(super) fn holdup(pod: &Pod) -> Option<Holdup> {
    let condition = |kind: &str| condition(pod, kind);
    if let Some(lost) = lost(pod) {
        return Some(lost);
    }
    if pod.metadata.deletion_timestamp.is_some() {
        return Some(Holdup::new(Reason::PodsNotReady, "finishes what it has and ends"));
    }
    if let Some(ended) = ended(pod) {
        return Some(ended);
    }
    if let Some(scheduled) = condition("PodScheduled").filter(|condition| condition.status == "False") {
        return Some(unscheduled(pod, scheduled));
    }
    let held_up = statuses(pod).filter_map(|container| of_container(pod, container));
    if let Some(worst) = held_up.min_by_key(|holdup| urgency(holdup.reason)) {
        return Some(worst);
    }
    match condition("Ready") {
        Some(ready) if ready.status == "True" => None,
        Some(_) if condition("ContainersReady").is_some_and(|condition| condition.status == "True") => {
            Some(unready_with_ready_containers(pod))
        }
        Some(_) => Some(Holdup::new(Reason::WaitingForPods, "its containers are being started")),
        None => Some(Holdup::new(Reason::WaitingForPods, "waits for a node")),
    }
}

/// The node controllers mark the pods of a node that does not answer, first as unready and then for deletion; the pod stays until
/// the node is back or gone.
fn lost(pod: &Pod) -> Option<Holdup> {
    let node = pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()).unwrap_or("unknown");
    let status = pod.status.as_ref()?;
    let evicted = condition(pod, "DisruptionTarget").is_some_and(|condition| {
        condition.status == "True" && condition.reason.as_deref() == Some("DeletionByTaintManager")
    });
    let leaving = pod.metadata.deletion_timestamp.is_some();
    let lost = status.reason.as_deref() == Some("NodeLost") || (evicted && leaving);
    lost.then(|| Holdup::new(Reason::NodeLost, format!("its node {node} does not answer or is tainted NoExecute")))
}

/// A kubelet sets Ready and ContainersReady together. Where they differ, somebody else has set Ready: the node controller, for a
/// node that does not answer, or whoever a readiness gate waits for.
fn unready_with_ready_containers(pod: &Pod) -> Holdup {
    let gates = pod.spec.as_ref().and_then(|spec| spec.readiness_gates.as_deref()).unwrap_or_default();
    let open = |kind: &str| condition(pod, kind).is_some_and(|condition| condition.status == "True");
    match gates.iter().find(|gate| !open(&gate.condition_type)) {
        Some(gate) => {
            Holdup::new(Reason::PodsNotReady, format!("waits for its readiness gate {}", gate.condition_type))
        }
        None => {
            let node = pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()).unwrap_or("unknown");
            Holdup::new(Reason::NodeLost, format!("its node {node} does not answer: bring it back, or delete the Node"))
        }
    }
}

/// Pods that ended as a whole: evicted, shut down with their node, or not admitted by it. Their workload replaces them.
fn ended(pod: &Pod) -> Option<Holdup> {
    let status =
        pod.status.as_ref().filter(|status| matches!(status.phase.as_deref(), Some("Failed" | "Succeeded")))?;
    let reason = status.reason.as_deref().unwrap_or("ended");
    let words = quote(status.message.as_deref().unwrap_or_default());
    let said = if words.is_empty() { String::new() } else { format!(": {words}") };
    let no_room = reason == "Evicted" || reason == "UnexpectedAdmissionError" || reason.starts_with("OutOf");
    let kind = if no_room { Reason::InsufficientCapacity } else { Reason::PodsNotReady };
    Some(Holdup::new(kind, format!("{reason}{said}")))
}

fn unscheduled(pod: &Pod, condition: &PodCondition) -> Holdup {
    let words = quote(condition.message.as_deref().unwrap_or_default());
    if condition.reason.as_deref() == Some("SchedulingGated") {
        return Holdup::new(Reason::WaitingForPods, format!("waits for its scheduling gates: {words}"));
    }
    // A claim that exists and is not bound, and one that does not exist, are told by the scheduler alone; the former not by name.
    if words.contains("unbound immediate PersistentVolumeClaims") {
        return Holdup::new(Reason::VolumeMissing, format!("{words}{}", claims(pod)));
    }
    if words.contains("persistentvolumeclaim \"") {
        return Holdup::new(Reason::VolumeMissing, words);
    }
    if words.contains("resourceclaim") && words.contains("not found") {
        return Holdup::new(Reason::ConfigurationMissing, words);
    }
    Holdup::new(Reason::InsufficientCapacity, format!("no node takes it: {words}"))
}

/// The claims that a pod mounts, as an addition to what is said of them.
fn claims(pod: &Pod) -> String {
    let volumes = pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten());
    let names: Vec<&str> = volumes
        .filter_map(|volume| volume.persistent_volume_claim.as_ref())
        .map(|claim| claim.claim_name.as_str())
        .collect();
    match names.as_slice() {
        [] => String::new(),
        [name] => format!(" (claim {name})"),
        names => format!(" (one of the claims {})", names.join(", ")),
    }
}

/// What one container has to say; none where it is as it should be.
fn of_container(pod: &Pod, container: &ContainerStatus) -> Option<Holdup> {
    let name = container.name.as_str();
    let state = container.state.clone().unwrap_or_default();
    let last_end = container.last_state.as_ref().and_then(|state| state.terminated.as_ref());
    if let Some(waiting) = &state.waiting {
        let reason = waiting.reason.as_deref().unwrap_or_default();
        let words = waiting.message.as_deref().unwrap_or_default();
        return match reason {
            "" | "ContainerCreating" | "PodInitializing" => None,
            "CrashLoopBackOff" => Some(crashed(pod, name, last_end)),
            _ if is_about_an_image(reason) => Some(no_image(pod, container, words)),
            "CreateContainerConfigError" if is_about_something_missing(words) => Some(Holdup::new(
                Reason::ConfigurationMissing,
                format!("container {name} can't be made: {}", quote(words)),
            )),
            // CreateContainerError, RunContainerError, StartError, PostStartHookError and what may come: the runtime's words.
            _ => Some(Holdup::new(
                crash_reason(name),
                format!("container {name} can't be started ({reason}): {}", quote(words)),
            )),
        };
    }
    if let Some(ended) = &state.terminated {
        let done = ended.exit_code == 0 && !runs_on(pod, name);
        return (!done).then(|| crashed(pod, name, Some(ended)));
    }
    state.running.as_ref()?;
    if name == MODEL_DOWNLOAD {
        return Some(match last_end {
            // The container tries again what it can by itself and ends only when it could not go on.
            Some(_) => crashed(pod, name, last_end),
            None => Holdup::new(Reason::ModelDownloading, "downloads the model"),
        });
    }
    if container.started == Some(true) && container.ready {
        return None;
    }
    // A container that failed before stays the thing to tell until it works: otherwise the reason would alternate.
    if container.started != Some(true) && last_end.is_some() {
        return Some(crashed(pod, name, last_end));
    }
    match (name, container.started == Some(true)) {
        (ENGINE, false) => Some(Holdup::new(Reason::EngineStarting, "the engine loads the model")),
        (ENGINE, true) => Some(Holdup::new(Reason::PodsNotReady, "the engine runs and does not take work")),
        // Beside an engine the proxy is ready when that is, so it says nothing of its own.
        (ROUTING_PROXY, true) if is_front_door(pod) => {
            Some(Holdup::new(Reason::WaitingForPair, "the front door waits for a decode worker that takes work"))
        }
        (ROUTING_PROXY, _) => None,
        (_, false) => Some(Holdup::new(Reason::WaitingForPods, format!("container {name} is starting"))),
        (_, true) => Some(Holdup::new(Reason::PodsNotReady, format!("container {name} runs and is not ready"))),
    }
}

/// The same reason stands for an image that runs as root where none may.
fn is_about_something_missing(words: &str) -> bool {
    ["not found", "couldn't find key", "non-existent config key"].iter().any(|missing| words.contains(missing))
}

fn is_about_an_image(reason: &str) -> bool {
    matches!(
        reason,
        "ErrImagePull"
            | "ImagePullBackOff"
            | "InvalidImageName"
            | "ErrImageNeverPull"
            | "ImageInspectError"
            | "RegistryUnavailable"
            | "SignatureValidationFailed"
    )
}

/// The kubelet alternates between the failure and the pause after it; the cause is the same text within both.
fn no_image(pod: &Pod, container: &ContainerStatus, words: &str) -> Holdup {
    let cause = words.split_once("ErrImagePull: ").map_or(words, |(_, cause)| cause);
    let wanted = container_spec(pod, &container.name).and_then(|spec| spec.image.as_deref());
    let image = wanted.unwrap_or(container.image.as_str());
    let cause = quote(cause);
    // "Back-off pulling image" alone repeats the image and nothing else.
    let said =
        if cause.is_empty() || cause.starts_with("Back-off pulling") { String::new() } else { format!(": {cause}") };
    Holdup::new(Reason::ImagePullFailed, format!("image {image} of container {} can't be pulled{said}", container.name))
}

fn crashed(pod: &Pod, container: &str, ended: Option<&ContainerStateTerminated>) -> Holdup {
    let how = ended.map_or_else(|| "ends again and again".to_owned(), |ended| how_it_ended(pod, container, ended));
    let words = ended.and_then(|ended| ended.message.as_deref()).map(last_line).filter(|words| !words.is_empty());
    let said = words.map_or_else(String::new, |words| format!(": {words}"));
    Holdup::new(crash_reason(container), format!("container {container} {how}{said}"))
}

/// How a container ended, in words: the limit that killed it, or the code that it left.
pub(super) fn how_it_ended(pod: &Pod, container: &str, ended: &ContainerStateTerminated) -> String {
    if ended.reason.as_deref() == Some("OOMKilled") {
        let limits = container_spec(pod, container).and_then(|spec| spec.resources.as_ref()?.limits.as_ref());
        return match limits.and_then(|limits| limits.get("memory")) {
            Some(limit) => format!("was killed at its memory limit of {} (OOMKilled)", limit.0),
            None => "was killed because its node ran out of memory (OOMKilled)".to_owned(),
        };
    }
    match (ended.reason.as_deref(), ended.exit_code) {
        (Some("StartError" | "ContainerCannotRun"), _) => "could not be started".to_owned(),
        // A shell's convention, which container runtimes follow: 128 and the signal's number.
        (_, 137) => "was killed (exit code 137)".to_owned(),
        (_, 139) => "ended with a segmentation fault (exit code 139)".to_owned(),
        (_, code) => format!("ended with exit code {code}"),
    }
}

/// The reason for a container that failed.
pub(super) fn crash_reason(container: &str) -> Reason {
    match container {
        MODEL_DOWNLOAD => Reason::ModelDownloadFailed,
        ROUTING_PROXY => Reason::ProxyCrashLooping,
        // A container of the user's own beside the engine holds the pod up in the same way; the message has its name.
        _ => Reason::EngineCrashLooping,
    }
}

/// Whether a container is meant to run as long as its pod: all but init containers, and of those the sidecars.
pub(super) fn runs_on(pod: &Pod, container: &str) -> bool {
    let init = pod.spec.as_ref().and_then(|spec| spec.init_containers.as_deref()).unwrap_or_default();
    init.iter().find(|init| init.name == container).is_none_or(|init| init.restart_policy.as_deref() == Some("Always"))
}

/// Statuses of all containers, in the order in which they start.
pub(super) fn statuses(pod: &Pod) -> impl Iterator<Item = &ContainerStatus> {
    let status = pod.status.as_ref();
    let init = status.and_then(|status| status.init_container_statuses.as_deref()).unwrap_or_default();
    init.iter().chain(status.and_then(|status| status.container_statuses.as_deref()).unwrap_or_default())
}

/// The role that a pod is of.
pub(super) fn role(pod: &Pod) -> Option<WorkloadRole> {
    WorkloadRole::from_word(label(pod, baton_crds::labels::WORKLOAD_ROLE)?)
}

/// The revision that a pod is of.
pub(super) fn revision(pod: &Pod) -> Option<&str> {
    label(pod, baton_crds::labels::REVISION)
}

fn label<'a>(pod: &'a Pod, key: &str) -> Option<&'a str> {
    pod.metadata.labels.as_ref()?.get(key).map(String::as_str)
}

fn is_front_door(pod: &Pod) -> bool {
    role(pod) == Some(WorkloadRole::Proxy)
}

fn condition<'a>(pod: &'a Pod, kind: &str) -> Option<&'a PodCondition> {
    pod.status.as_ref()?.conditions.as_ref()?.iter().find(|condition| condition.type_ == kind)
}

fn container_spec<'a>(pod: &'a Pod, name: &str) -> Option<&'a Container> {
    let spec = pod.spec.as_ref()?;
    spec.init_containers.iter().flatten().chain(&spec.containers).find(|container| container.name == name)
}

#[cfg(test)]
#[path = "pods_tests.rs"]
mod tests;
