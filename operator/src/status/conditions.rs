//! What is so and why: the conditions.
//!
//! Each of Accepted, ModelAvailable, PrefillReady, DecodeReady and RoutingReady is computed for itself, about the revision that the
//! manifest means. Ready is their conjunction and takes its reason from the first of them that is not True, those that a
//! person must act on before those that have an error, and these before those that merely wait.

use super::pods::{self, Holdup};
use super::words::{MESSAGE_CHARS_MAX, cut, one_line, quote};
use super::{Seen, download, roles};
use crate::child::Kind;
use crate::desired::{self, names};
use crate::failure::{Class, Failure};
use crate::observed::Missing;
use crate::plan::{self, Workload, WorkloadRole, rollout};
use crate::site::OptionalKind;
use crate::validated::{Cache, ModelSource};
use crate::{Validated, Violation};
use baton_crds::{ConditionType, Reason};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::jiff::Timestamp;

/// Whether something is so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Truth {
    True,
    False,
    Unknown,
}

impl Truth {
    fn as_str(self) -> &'static str {
        match self {
            Truth::True => "True",
            Truth::False => "False",
            Truth::Unknown => "Unknown",
        }
    }
}

/// Whether something is so, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct State {
    truth: Truth,
    reason: Reason,
    message: String,
}

impl State {
    fn so(reason: Reason, message: impl Into<String>) -> Self {
        State { truth: Truth::True, reason, message: message.into() }
    }

    fn not(reason: Reason, message: impl Into<String>) -> Self {
        State { truth: Truth::False, reason, message: message.into() }
    }

    fn unknown(reason: Reason, message: impl Into<String>) -> Self {
        State { truth: Truth::Unknown, reason, message: message.into() }
    }

    fn is_so(&self) -> bool {
        self.truth == Truth::True
    }
}

/// Conditions to be written, at most one of a type.
pub(super) type States = Vec<(ConditionType, State)>;

/// Writes conditions on top of the ones that stand.
pub(super) struct Writer<'a> {
    pub(super) generation: i64,
    pub(super) now: Timestamp,
    pub(super) before: &'a [Condition],
}

impl Writer<'_> {
    /// These and no others of ours.
    pub(super) fn in_place_of_before(&self, states: States) -> Vec<Condition> {
        let mut conditions: Vec<_> = states.into_iter().map(|(kind, state)| self.condition(kind, state)).collect();
        conditions.sort_by_key(|condition| ConditionType::ALL.iter().position(|kind| kind.as_str() == condition.type_));
        conditions
    }

    /// These, and of ours that stand the others as they are. What somebody else added is theirs to keep.
    pub(super) fn over_before(&self, states: States) -> Vec<Condition> {
        let written = |kind: &str| states.iter().any(|(new, _)| new.as_str() == kind);
        let is_ours = |kind: &str| ConditionType::ALL.iter().any(|ours| ours.as_str() == kind);
        let kept = self.before.iter().filter(|old| is_ours(&old.type_) && !written(&old.type_)).cloned();
        let mut conditions: Vec<_> = kept.collect();
        conditions.extend(self.in_place_of_before(states));
        conditions.sort_by_key(|condition| ConditionType::ALL.iter().position(|kind| kind.as_str() == condition.type_));
        conditions
    }

    fn condition(&self, kind: ConditionType, state: State) -> Condition {
        let before = self.before(kind).filter(|before| before.status == state.truth.as_str());
        Condition {
            type_: kind.as_str().to_owned(),
            status: state.truth.as_str().to_owned(),
            reason: state.reason.as_str().to_owned(),
            message: cut(&state.message, MESSAGE_CHARS_MAX),
            observed_generation: Some(self.generation),
            last_transition_time: before
                .map_or_else(|| whole_seconds(self.now), |before| before.last_transition_time.clone()),
        }
    }

    fn before(&self, kind: ConditionType) -> Option<&Condition> {
        self.before.iter().find(|before| before.type_ == kind.as_str())
    }

    /// Whether the API server once took every object of this very generation.
    fn was_accepted(&self) -> bool {
        self.before(ConditionType::Accepted)
            .is_some_and(|before| before.status == "True" && before.observed_generation == Some(self.generation))
    }
}

/// Kubernetes' times have no fractions, and what is written must be what is read back.
fn whole_seconds(time: Timestamp) -> Time {
    Time(Timestamp::from_second(time.as_second()).unwrap_or(time))
}

/// Of a manifest that breaks rules.
pub(super) fn of_violations(violations: &[Violation]) -> States {
    let words: Vec<_> = violations.iter().map(|violation| one_line(&violation.to_string())).collect();
    stalled(Reason::InvalidSpec, &words.join("; "))
}

fn stalled(reason: Reason, message: &str) -> States {
    let state = |truth| State { truth, reason, message: message.to_owned() };
    vec![
        (ConditionType::Accepted, state(Truth::False)),
        (ConditionType::Progressing, state(Truth::False)),
        (ConditionType::Ready, state(Truth::False)),
        (ConditionType::Stalled, state(Truth::True)),
    ]
}

/// Of a cluster that can't be read: whether the model serves can't be said, and nothing else is touched.
pub(super) fn of_unreadable(words: &str) -> States {
    vec![(ConditionType::Ready, State::unknown(Reason::ClusterUnreadable, quote(words)))]
}

/// Of what was decided, written and seen.
pub(super) fn of_seen(seen: &Seen<'_>, writer: &Writer<'_>, url: &str) -> States {
    let parts = vec![
        (ConditionType::Accepted, accepted(seen, writer)),
        (ConditionType::ModelAvailable, model_available(seen)),
        (ConditionType::PrefillReady, role(seen, WorkloadRole::Prefill)),
        (ConditionType::DecodeReady, role(seen, WorkloadRole::Decode)),
        (ConditionType::RoutingReady, routing(seen, url)),
    ];
    let stalls = parts.iter().map(|(_, state)| state).find(|state| !state.is_so() && state.reason.stalls()).cloned();
    let progressing = match &stalls {
        Some(state) => State::not(state.reason, state.message.clone()),
        None => progressing(seen),
    };
    let ready = ready(seen, &parts, &progressing);
    let mut states = parts;
    states.push((ConditionType::Progressing, progressing));
    states.push((ConditionType::Ready, ready));
    states.extend(stalls.map(|state| (ConditionType::Stalled, State::so(state.reason, state.message))));
    states
}

/// The manifest can be acted on, and the API server took every object made from it.
fn accepted(seen: &Seen<'_>, writer: &Writer<'_>) -> State {
    let worst = |class: Class| seen.failures.iter().find(|failure| failure.class == class);
    let more = seen.failures.len().saturating_sub(1);
    let said = |failure: &Failure| match more {
        0 => quote(&failure.to_string()),
        more => format!("{} (and {more} more)", quote(&failure.to_string())),
    };
    for class in [Class::NameTaken, Class::Refused] {
        if let Some(failure) = worst(class) {
            return State::not(of_class(class), said(failure));
        }
    }
    if let Some(kind) = desired::needs(seen.model).into_iter().find(|kind| !seen.site.kinds.contains(kind)) {
        return State::not(Reason::CrdNotInstalled, absent(kind));
    }
    for class in [Class::KindMissing, Class::Quota] {
        if let Some(failure) = worst(class) {
            return State::not(of_class(class), said(failure));
        }
    }
    match worst(Class::Transient).or_else(|| worst(Class::Conflict)) {
        // Only a repair is late: what the manifest says was taken before.
        Some(_) if writer.was_accepted() => {}
        Some(failure) => return State::unknown(of_class(failure.class), said(failure)),
        None => {}
    }
    State::so(Reason::Accepted, "the API server has every object that the manifest means")
}

fn of_class(class: Class) -> Reason {
    match class {
        Class::NameTaken => Reason::NameTaken,
        Class::Refused => Reason::ChildRefused,
        Class::KindMissing => Reason::CrdNotInstalled,
        Class::Quota => Reason::QuotaExceeded,
        Class::Transient | Class::Conflict => Reason::ClusterUnreadable,
    }
}

fn absent(kind: OptionalKind) -> String {
    let (name, version, _) = kind.names();
    let asked_by = match kind {
        OptionalKind::LeaderWorkerSet => "nodesPerReplica above 1",
        OptionalKind::PodMonitor => "spec.observability.monitor",
        OptionalKind::HttpRoute | OptionalKind::InferencePool => "spec.routing",
        OptionalKind::ScaledObject => "autoscaling",
    };
    format!("the cluster has no {name} ({version}), for which {asked_by} asks: install it, or take that back")
}

/// As many replicas of a role as are wanted take work, in the revision that the manifest means.
fn role(seen: &Seen<'_>, role: WorkloadRole) -> State {
    let word = role.as_str();
    let Some(replicas) = plan::replicas(seen.model, role) else {
        return State::so(Reason::NotNeeded, format!("the manifest needs no {word} replicas"));
    };
    let workload = seen.of_target(role);
    let wanted = plan::wanted(replicas, workload);
    let count = format!(
        "{} of {wanted} {word} replicas take work",
        workload.map_or(0, |workload| workload.available.min(wanted))
    );
    let name = names::workload(&seen.model.name, role, &seen.plan.target);
    if let Some(failure) = seen.failures.iter().find(|failure| failure.name == name && is_workload(failure.kind)) {
        return State::not(of_class(failure.class), format!("{count}; {}", quote(&failure.to_string())));
    }
    if wanted == 0 {
        return State::not(Reason::ScaledToZero, format!("whoever scales {name} has set it to 0 replicas"));
    }
    if workload.is_some_and(|workload| seen.stands(workload) && workload.is_complete(wanted)) {
        return State::so(Reason::AllReplicasReady, count);
    }
    let Holdup { reason, message } = role_holdup(seen, role, workload, &name);
    State::not(reason, format!("{count}; {message}"))
}

/// What keeps a role from being ready: what is missing for all of it, then what its controller says, then what its pods say.
fn role_holdup(seen: &Seen<'_>, role: WorkloadRole, workload: Option<&Workload>, name: &str) -> Holdup {
    let holdup = |reason, message: String| Holdup { reason, message };
    let lacks = desired::settings(seen.model, role).is_some_and(|settings| settings.nodes_per_replica.get() > 1)
        && !seen.site.kinds.contains(&OptionalKind::LeaderWorkerSet);
    if lacks {
        return holdup(Reason::CrdNotInstalled, absent(OptionalKind::LeaderWorkerSet));
    }
    let is_worker = desired::settings(seen.model, role).is_some();
    if let Some(missing) = seen.observed.missing.first().filter(|_| is_worker) {
        let reason = match missing {
            Missing::Claim(_) => Reason::VolumeMissing,
            Missing::Secret(_) => Reason::ConfigurationMissing,
        };
        return holdup(reason, missing_words(missing));
    }
    let Some(workload) = workload else {
        return holdup(Reason::WaitingForPods, format!("{name} is being made"));
    };
    if let Some(words) = &workload.replica_failure {
        return holdup(of_replica_failure(words), quote(words));
    }
    let target = seen.plan.target.as_str();
    let own =
        seen.observed.pods.iter().filter(|pod| pods::role(pod) == Some(role) && pods::revision(pod) == Some(target));
    let waiting = if workload.current { "is making its pods ready" } else { "has yet to follow the last change" };
    pods::most_urgent(own)
        .unwrap_or_else(|| holdup(Reason::WaitingForPods, format!("{} {name} {waiting}", workload.kind.as_str())))
}

/// A controller that can't make pods tells in the API server's words why.
fn of_replica_failure(words: &str) -> Reason {
    if words.contains("exceeded quota") {
        Reason::QuotaExceeded
    } else if words.contains("serviceaccount") && words.contains("not found") {
        Reason::ConfigurationMissing
    } else {
        Reason::PodsRefused
    }
}

fn missing_words(missing: &Missing) -> String {
    match missing {
        Missing::Claim(name) => {
            format!("PersistentVolumeClaim {name} does not exist: create it, or name another in spec.model")
        }
        Missing::Secret(name) => {
            format!("Secret {name} does not exist: create it, or name another in spec.model.credentialsSecretRef")
        }
    }
}

/// The model directory is where the engines read it.
fn model_available(seen: &Seen<'_>) -> State {
    if let Some(missing) = seen.observed.missing.first() {
        let reason = match missing {
            Missing::Claim(_) => Reason::VolumeMissing,
            Missing::Secret(_) => Reason::CredentialsMissing,
        };
        return State::not(reason, missing_words(missing));
    }
    let target = seen.plan.target.as_str();
    let is_own = |pod: &&Pod| {
        pods::revision(pod) == Some(target) && pods::role(pod).is_some_and(|role| role != WorkloadRole::Proxy)
    };
    let own = || seen.observed.pods.iter().filter(is_own);
    let held_up = |reason: Reason| {
        let of_reason = own()
            .filter(move |pod| pods::is_alive(pod) && pods::holdup(pod).is_some_and(|holdup| holdup.reason == reason));
        pods::most_urgent(of_reason)
    };
    if let Some(holdup) = held_up(Reason::VolumeMissing).filter(|holdup| is_about_model(seen.model, &holdup.message)) {
        return State::not(Reason::VolumeMissing, holdup.message);
    }
    if let Some(holdup) = held_up(Reason::ModelDownloadFailed) {
        return State::not(Reason::ModelDownloadFailed, holdup.message);
    }
    if let Some(holdup) = held_up(Reason::ModelDownloading) {
        let progress = download::words(seen).map_or_else(String::new, |words| format!(" ({words})"));
        return State::not(Reason::ModelDownloading, format!("{}{progress}", holdup.message));
    }
    let serves = seen.workloads.iter().any(|workload| {
        workload.revision == target
            && workload.role != WorkloadRole::Proxy
            && workload.current
            && workload.available > 0
    });
    if serves || own().any(pods::has_loaded) {
        return State::so(Reason::ModelAvailable, "engines have loaded the model");
    }
    if own().any(pods::has_downloaded) {
        return State::so(Reason::ModelAvailable, "the model is downloaded");
    }
    // Whether a volume or an image holds a model shows when an engine reads it.
    let starting = held_up(Reason::EngineStarting).is_some();
    let reason = if starting { Reason::EngineStarting } else { Reason::WaitingForPods };
    State::unknown(reason, "no engine has loaded the model yet")
}

/// Whether the scheduler's words are about the model's volume: it names a claim that does not exist, but none that is not bound.
fn is_about_model(model: &Validated, words: &str) -> bool {
    let claim = match &model.source {
        ModelSource::Claim { claim, .. } => claim,
        ModelSource::Download(download) => match &download.cache {
            Cache::Claim { claim } => claim,
            Cache::EmptyDir { .. } => return false,
        },
        ModelSource::Image { .. } => return false,
    };
    !words.contains("persistentvolumeclaim \"") || words.contains(&format!("persistentvolumeclaim \"{claim}\""))
}

/// A request that reaches the client Service finds its workers.
fn routing(seen: &Seen<'_>, url: &str) -> State {
    let service = &seen.model.name;
    if let Some(failure) =
        seen.failures.iter().find(|failure| failure.kind == Kind::Service && &failure.name == service)
    {
        return State::not(of_class(failure.class), quote(&failure.to_string()));
    }
    if plan::replicas(seen.model, WorkloadRole::Proxy).is_some() {
        let front_door = role(seen, WorkloadRole::Proxy);
        if !front_door.is_so() {
            return front_door;
        }
    }
    let serving = seen.plan.serving.as_str();
    if rollout::pairs(seen.of_revision(serving)) == 0 {
        let lacking: Vec<_> = [WorkloadRole::Prefill, WorkloadRole::Decode]
            .into_iter()
            .filter(|role| plan::replicas(seen.model, *role).is_some())
            .filter(|role| !seen.of_revision(serving).any(|workload| workload.role == *role && workload.available > 0))
            .map(WorkloadRole::as_str)
            .collect();
        let message = format!("no {} replica of revision {serving} takes work", lacking.join(" and no "));
        return State::not(Reason::WaitingForPair, message);
    }
    if !seen.objects.contains(Kind::Service, service) {
        return State::unknown(Reason::ClusterUnreadable, format!("Service {service} is not written yet"));
    }
    State::so(
        Reason::RoutingReady,
        format!("requests to {url} reach {} pods of revision {serving}", seen.plan.entrance.as_str()),
    )
}

/// The cluster is still on its way to what the manifest says.
fn progressing(seen: &Seen<'_>) -> State {
    let (target, serving) = (seen.plan.target.as_str(), seen.plan.serving.as_str());
    if serving != target {
        let serves = rollout::pairs(seen.of_revision(serving)) > 0;
        let meanwhile = if serves {
            format!("which serves until every role of {target} is available")
        } else {
            format!(
                "which serves nothing now and is kept because it did: where {target} lacks its room, delete its workloads"
            )
        };
        return State::so(
            Reason::RolloutInProgress,
            format!("revision {target} takes the place of {serving}, {meanwhile}"),
        );
    }
    if let Some(old) = seen.workloads.iter().find(|workload| workload.revision != target) {
        return State::so(Reason::RolloutInProgress, format!("revision {} is being removed", old.revision));
    }
    let own: Vec<_> = seen.of_revision(target).collect();
    if own.iter().any(|workload| workload.updated < workload.replicas) {
        return State::so(Reason::RolloutInProgress, format!("pods of revision {target} are being replaced"));
    }
    let counts: Vec<_> = desired::roles(seen.model)
        .into_iter()
        .filter_map(|role| Some((role, plan::replicas(seen.model, role)?, seen.of_target(role))))
        .map(|(role, replicas, workload)| (role, plan::wanted(replicas, workload), workload))
        .collect();
    let settled = counts.iter().all(|(_, wanted, workload)| {
        workload.is_some_and(|workload| {
            workload.is_complete(*wanted) && workload.replicas == *wanted && seen.stands(workload)
        })
    });
    if settled {
        return State::not(Reason::Settled, format!("revision {target} is as the manifest says"));
    }
    let words: Vec<_> = counts
        .iter()
        .map(|(role, wanted, workload)| {
            format!("{} {}/{wanted}", role.as_str(), workload.map_or(0, |workload| workload.available))
        })
        .collect();
    let has_stood = |workload: Option<&Workload>| workload.is_some_and(|one| one.proven || one.available > 0);
    let reason =
        if counts.iter().all(|(_, _, workload)| has_stood(*workload)) { Reason::Scaling } else { Reason::Creating };
    State::so(reason, words.join(", "))
}

/// The model serves as the manifest says.
fn ready(seen: &Seen<'_>, parts: &States, progressing: &State) -> State {
    let (target, serving) = (seen.plan.target.as_str(), seen.plan.serving.as_str());
    let meanwhile = if serving != target && rollout::pairs(seen.of_revision(serving)) > 0 {
        format!("; revision {serving} serves meanwhile")
    } else {
        String::new()
    };
    // The first among equals: the order of `parts` is the documented one.
    match parts.iter().filter(|(_, state)| !state.is_so()).min_by_key(|(_, state)| state.patience()) {
        Some((kind, state)) => State::not(state.reason, format!("{}{meanwhile}", with_type(*kind, &state.message))),
        None if serving != target => State::not(progressing.reason, format!("{}{meanwhile}", progressing.message)),
        None => State::so(Reason::AllRolesReady, roles::in_words(seen)),
    }
}

fn with_type(kind: ConditionType, message: &str) -> String {
    // Room for what is said after it.
    cut(&format!("{kind}: {message}"), MESSAGE_CHARS_MAX - 64)
}

impl State {
    /// How much longer this may go on without a person's doing anything: 0 for ever, 1 perhaps, 2 as usual.
    fn patience(&self) -> u8 {
        match (self.reason, self.truth) {
            (reason, _) if reason.stalls() => 0,
            (_, Truth::Unknown) => 2,
            (
                Reason::WaitingForPods
                | Reason::EngineStarting
                | Reason::ModelDownloading
                | Reason::WaitingForPair
                | Reason::PodsNotReady,
                _,
            ) => 2,
            (_, Truth::True | Truth::False) => 1,
        }
    }
}

fn is_workload(kind: Kind) -> bool {
    matches!(kind, Kind::Deployment | Kind::LeaderWorkerSet)
}

impl<'a> Seen<'a> {
    /// The target's workload of a role.
    pub(super) fn of_target(&self, role: WorkloadRole) -> Option<&'a Workload> {
        self.of_revision(&self.plan.target).find(|workload| workload.role == role)
    }

    /// A revision's workloads.
    pub(super) fn of_revision<'s>(
        &self,
        revision: &'s str,
    ) -> impl Iterator<Item = &'a Workload> + Clone + use<'a, 's> {
        self.workloads.iter().filter(move |workload| workload.revision == revision)
    }

    /// Whether a workload of the target is as it is wanted.
    fn stands(&self, workload: &Workload) -> bool {
        self.objects.contains(workload.kind, &workload.name)
    }
}
