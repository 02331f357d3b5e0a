//! One reconcile, down the page, and the loop that runs them.
//!
//! A reconcile reads a model and all that belongs to it as they are now, decides, writes what differs, and says in the status what
//! came of it. It depends on nothing that an earlier one left behind, so it may be cut off anywhere and begun again. Each model
//! is reconciled when something of it changes ([`crate::triggers`]), again and again with growing pauses while something fails,
//! and every half hour in any case: that is also how a change of a Secret is found that nothing else came with.

use crate::apply::{self, Apply};
use crate::cluster::{Cluster, Resource};
use crate::error::Error;
use crate::events::Recorder;
use crate::fence::{Clock, Fence};
use crate::lease::{Beat, jittered};
use crate::memory::Memory;
use crate::metrics::{Metrics, Outcome, ReplicaState};
use crate::mint::{Found, mint};
use crate::observe::{ReadError, observe, role_of, text};
use crate::observed::Observed;
use crate::plan::plan;
use crate::progress::ProgressReader;
use crate::queue::{ModelMeta, ModelRef, is_heartbeat};
use crate::site::{OptionalKind, Owner, Site};
use crate::status::replace::{holds_more, replacing};
use crate::status::{self, Facts, status};
use crate::{Validated, Violation, desired, structural, validate};
use baton_crds::{ConditionType, DisaggregatedModel, DisaggregatedModelStatus};
use futures_util::{Stream, StreamExt as _};
use jiff::Timestamp;
use kube::ResourceExt as _;
use kube::core::ObjectMeta;
use kube::runtime::applier;
use kube::runtime::controller::{Action, Config, ReconcileRequest};
use kube::runtime::reflector::Store;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::watch;
use tracing::Instrument as _;

/// Reconciles that run at once. Eight keep an API server busy (a reconcile is some fifteen requests of milliseconds), and what they
/// hold of their models bounds the operator's memory: some two megabytes each.
const CONCURRENCY: u16 = 8;
/// How long one may take: a dozen requests of milliseconds each; only an API server that hangs makes it long.
const RECONCILE_TIMEOUT: Duration = Duration::from_secs(60);
/// A model is looked at at least this often.
const RESYNC: Duration = Duration::from_secs(30 * 60);
/// How soon again, for the first time, while a model is not as it should be: see [`look_again`].
const WHILE_UNSETTLED: Duration = Duration::from_secs(4);
/// After so long without a change such a model is looked at as rarely as any other: no API server answers with a list from a minute ago, and a
/// thousand models that can't become ready for want of nodes cost what a thousand that are ready cost.
const LOOKS_END: Duration = Duration::from_secs(60);
/// How soon again while our lease is in doubt: it is renewed within seconds, or this process ends.
const WHILE_FENCED: Duration = Duration::from_secs(1);
/// How often while something downloads, for its progress.
const WHILE_DOWNLOADING: Duration = Duration::from_secs(2);
/// How often while something that the manifest refers to is missing: it is not watched.
const WHILE_MISSING: Duration = Duration::from_secs(5);
/// How often while a person must act outside of what is watched: a webhook, a quota, somebody else's object.
const WHILE_REFUSED: Duration = Duration::from_secs(30);
/// Shortest pause after a failure; each further failure doubles it.
const BACKOFF_MIN: Duration = Duration::from_millis(200);
/// Longest pause after a failure that ends by itself, such as an API server that is away: everything is as wanted within 10 s of
/// its return, however long it was gone. A failing try costs a request or two.
const BACKOFF_MAX: Duration = Duration::from_secs(8);
/// Longest pause after a reconcile that panicked or hung: the next one may well cost as much.
const BACKOFF_OF_BUGS_MAX: Duration = Duration::from_secs(60);
/// Failures in a row after which the status speaks of them: once or twice is nothing that a person need know.
const FAILURES_TOLD: u32 = 3;
/// How deep a manifest may be for a parser to follow it to its end: serde_json's own bound is 128, and the object is around it.
const DEPTH_MAX: usize = 100;
/// How often the queue's heartbeat goes round.
const HEARTBEAT: Duration = Duration::from_secs(5);

/// What reconciles work with.
pub struct Context {
    /// The cluster.
    pub cluster: Cluster,
    /// What the installation says; the kinds of the moment are in `kinds`.
    pub site: Site,
    /// Kinds that a cluster may lack, and this one has.
    pub kinds: watch::Receiver<BTreeSet<OptionalKind>>,
    /// Reads downloads' progress.
    pub progress: ProgressReader,
    /// Whether anything may be written now.
    pub fence: Fence,
    /// What is remembered.
    pub memory: Arc<Memory>,
    /// What is counted.
    pub metrics: Arc<Metrics>,
    /// Tells of transitions.
    pub recorder: Recorder,
    /// When the queue last came round.
    pub beat: Arc<Beat>,
    /// The clock of it.
    pub clock: Arc<dyn Clock>,
}

/// Reconciles what is due until `due` ends and what runs has finished.
pub async fn run(store: Store<ModelMeta>, due: impl Stream<Item = ModelRef> + Send + 'static, context: Arc<Context>) {
    let due = due.map(|model| Ok::<_, Infallible>(ReconcileRequest::from(model)));
    // The queue has waited for triggers to meet already.
    let config = Config::default().debounce(Duration::ZERO).concurrency(CONCURRENCY);
    let reconciler = |model: Arc<ModelMeta>, context| Box::pin(guarded(model, context));
    applier(reconciler, error_policy, context, store, Box::pin(due), config)
        .for_each(|result| {
            if let Err(error) = result {
                tracing::debug!(%error, "a reconcile did not make everything as wanted");
            }
            std::future::ready(())
        })
        .await;
}

/// A reconcile that can neither hang nor take others down with it.
async fn guarded(meta: Arc<ModelMeta>, context: Arc<Context>) -> Result<Action, Error> {
    if is_heartbeat(&meta) {
        context.beat.beat(context.clock.now());
        return Ok(Action::requeue(HEARTBEAT));
    }
    if !context.fence.is_open() {
        // Nothing could be written, and no connection made: each try would fail at once and be tried again.
        return Ok(Action::requeue(jittered(WHILE_FENCED)));
    }
    context.metrics.active.inc();
    let begin = Instant::now();
    let work = tokio::time::timeout(RECONCILE_TIMEOUT, {
        let (meta, context) = (meta.clone(), context.clone());
        async move { reconcile(&meta, &context).await }.in_current_span()
    });
    // A task of its own: a panic ends it alone, and reconciles use all cores.
    let result = match tokio::spawn(work).await {
        Ok(Ok(result)) => result,
        Ok(Err(_)) => Err(Error::TimedOut(RECONCILE_TIMEOUT.as_secs())),
        Err(error) => Err(Error::Panicked(error.to_string())),
    };
    context.metrics.active.dec();
    let outcome = result.as_ref().map_or_else(Error::outcome, |(outcome, _)| *outcome);
    context.metrics.reconciled(outcome, begin.elapsed());
    let (namespace, name) = (meta.namespace().unwrap_or_default(), meta.name_any());
    match result {
        Ok((outcome, action)) => {
            context.memory.succeeded((&namespace, &name));
            tracing::debug!(outcome = outcome.as_str(), took = ?begin.elapsed(), "reconciled");
            Ok(action)
        }
        Err(error) => {
            let failures = context.memory.failed((&namespace, &name));
            let again = pause(&error, failures);
            tracing::warn!(namespace, name, %error, failures, ?again, "could not reconcile, trying again");
            Err(error)
        }
    }
}

/// Makes one model as it is wanted.
async fn reconcile(meta: &ModelMeta, context: &Context) -> Result<(Outcome, Action), Error> {
    let (namespace, name) = (meta.namespace().unwrap_or_default(), meta.name_any());
    let object = match read(context, &namespace, &name).await {
        Ok(Some(object)) => object,
        Ok(None) => return Ok((Outcome::Gone, Action::await_change())),
        Err(Error::Read(ReadError { source: kube::Error::SerdeError(error), .. })) => {
            return told_unparsed(meta, context, &error).await;
        }
        Err(error) => return Err(error),
    };
    let site = Site { kinds: context.kinds.borrow().clone(), ..context.site.clone() };
    let owner = Owner { namespace: namespace.clone(), uid: text(&object, "/metadata/uid").map(str::to_owned) };
    let tell = Tell { context, site: &site, owner: &owner, name: &name, object: &object };

    // 1. Observe: what exists, and what the manifest refers to.
    let observed = observe(&context.cluster, &context.progress, &site.kinds, &namespace, &name, &object).await;

    // 2. Validate: the one place where a user is told that the manifest is wrong. What runs is left as it is. That comes before
    // what could not be read: under a name that no label can have, nothing can.
    let model = match typed(&object) {
        Ok(model) => model,
        Err(violations) => {
            tell.status(&status::Outcome::Invalid(&violations)).await?;
            return Ok((Outcome::Invalid, Action::requeue(jittered(RESYNC))));
        }
    };
    let mut observed = match observed {
        Ok(observed) => observed,
        Err(error) => return Err(tell.unreadable(error).await),
    };

    // 3. Desired: keys, what to do next, and the objects that this means.
    let roles = desired::roles(&model).into_iter().collect();
    let minted =
        mint(&found(&observed, &owner, &name), &name, &namespace, &roles, Timestamp::now()).map_err(Error::Mint)?;
    observed.credentials = minted.credentials;
    let plan = plan(&model, &site, &owner, &observed);
    let objects = desired::desired(&model, &site, &owner, &plan, &observed.credentials);

    // 4. Apply: what differs is written, what is not wanted any more goes last.
    let Context { cluster, memory, metrics, .. } = context;
    let apply = Apply { cluster, memory, metrics, owner: &owner, model: &name };
    let apply::Outcome { objects, failures, writes } = apply.run(&plan, objects, &mut observed).await;

    // 5. Status: computed from what was applied and observed.
    let applied = status::Outcome::Applied {
        model: &model,
        plan: &plan,
        observed: &observed,
        objects: &objects,
        failures: &failures,
    };
    let told = tell.status(&applied).await?;
    tracing::debug!(writes, "applied");

    if !failures.is_empty() {
        return Err(Error::Children(failures));
    }
    let next = [
        Some(jittered(RESYNC)),
        Some(minted.renew_in),
        look_again(&told, Timestamp::now()).map(jittered),
        (!observed.downloads.is_empty()).then_some(WHILE_DOWNLOADING),
        (!observed.missing.is_empty()).then_some(WHILE_MISSING),
    ];
    Ok((Outcome::Settled, Action::requeue(next.into_iter().flatten().min().unwrap_or(RESYNC))))
}

/// When to look again at a model that is not ready, or on its way, although nothing calls for it, in case that what was seen is older
/// than the last event: an API server that is one of several may answer a list from before. Each pause doubles the time since the last
/// change, and after a minute of that there are no more looks than at any other model.
fn look_again(status: &DisaggregatedModelStatus, now: Timestamp) -> Option<Duration> {
    let says = |kind: ConditionType, word: &str| {
        status.conditions.iter().any(|condition| condition.type_ == kind.as_str() && condition.status == word)
    };
    if says(ConditionType::Ready, "True") && !says(ConditionType::Progressing, "True") {
        return None;
    }
    let newest = status.conditions.iter().map(|condition| condition.last_transition_time.0).max()?;
    let unchanged = Duration::try_from(now.duration_since(newest)).unwrap_or_default();
    if unchanged >= LOOKS_END {
        return None;
    }
    Some(unchanged.max(WHILE_UNSETTLED))
}

/// When to try again.
fn error_policy(model: Arc<ModelMeta>, error: &Error, context: Arc<Context>) -> Action {
    let (namespace, name) = (model.namespace().unwrap_or_default(), model.name_any());
    Action::requeue(jittered(pause(error, context.memory.failures((&namespace, &name)))))
}

/// The pause after that many failures in a row.
fn pause(error: &Error, failures: u32) -> Duration {
    if error.waits_for_a_person() {
        return WHILE_REFUSED;
    }
    let longest = match error {
        Error::Read(_) | Error::Mint(_) | Error::Children(_) | Error::Status(_) => BACKOFF_MAX,
        Error::TimedOut(_) | Error::Panicked(_) => BACKOFF_OF_BUGS_MAX,
    };
    BACKOFF_MIN.saturating_mul(1u32.checked_shl(failures.saturating_sub(1)).unwrap_or(u32::MAX)).min(longest)
}

/// The model as it is now; none where there is none to work on. One that is being deleted is left alone: what it owns goes with it,
/// by the cluster's own garbage collection.
async fn read(context: &Context, namespace: &str, name: &str) -> Result<Option<Value>, Error> {
    let object = context.cluster.get(Resource::MODELS, namespace, name).await;
    let object = object.map_err(ReadError::of("the model")).map_err(Error::Read)?;
    Ok(object.filter(|object| text(object, "/metadata/deletionTimestamp").is_none()))
}

/// Tells of a model that is there and that no parser follows to its end: what holds of the others must not hang on it.
async fn told_unparsed(
    meta: &ModelMeta,
    context: &Context,
    error: &serde_json::Error,
) -> Result<(Outcome, Action), Error> {
    let metadata = &meta.metadata;
    let (namespace, name) = (meta.namespace().unwrap_or_default(), meta.name_any());
    let site = Site { kinds: context.kinds.borrow().clone(), ..context.site.clone() };
    let owner = Owner { namespace: namespace.clone(), uid: metadata.uid.clone() };
    let object = json!({"metadata": {
        "name": name, "namespace": namespace, "uid": metadata.uid, "resourceVersion": metadata.resource_version,
        "generation": metadata.generation,
    }});
    let tell = Tell { context, site: &site, owner: &owner, name: &name, object: &object };
    let words = format!("can't be read ({error}): write it less deeply nested, at most {DEPTH_MAX} levels");
    tell.status(&status::Outcome::Invalid(&[Violation::new("spec", words, "")])).await?;
    Ok((Outcome::Invalid, Action::requeue(jittered(RESYNC))))
}

/// An object in types. One that this version has no type for is told of like any other mistake.
fn typed(object: &Value) -> Result<Validated, Vec<Violation>> {
    // The status is ours to write and never read as part of the manifest.
    let mut manifest = object.clone();
    if let Some(fields) = manifest.as_object_mut() {
        fields.remove("status");
    }
    match serde_path_to_error::deserialize::<_, DisaggregatedModel>(&manifest) {
        Ok(model) => validate(&model),
        // The schema has better words than the parser, and names every such field instead of the first.
        Err(error) => match structural::check_known(&manifest) {
            violations if violations.is_empty() => {
                Err(vec![Violation::new(error.path().to_string(), error.inner().to_string(), "")])
            }
            violations => Err(violations),
        },
    }
}

/// The keys and certificates in what was read.
fn found(observed: &Observed, owner: &Owner, model: &str) -> Found {
    // Of this model alone: another's key, or one that goes with an earlier model of the name, is no key of ours.
    let secret = |name: &str| observed.children.get(&(crate::child::Kind::Secret, name.to_owned()));
    Found::in_secrets(|name| secret(name).filter(|secret| apply::is_controlled(secret, owner)), model)
}

/// Uid and version of a model whose status was written, where that version is no news: its spec is the one that was reconciled. One
/// that changed in between is news, because the event of that change may be lost to a list that shows the newest version alone.
fn own_version(written: &ObjectMeta, reconciled: i64) -> Option<(&str, &str)> {
    let own = written.uid.as_deref().zip(written.resource_version.as_deref());
    own.filter(|_| written.generation == Some(reconciled))
}

/// Tells people what came of a reconcile.
struct Tell<'a> {
    context: &'a Context,
    site: &'a Site,
    owner: &'a Owner,
    name: &'a str,
    object: &'a Value,
}

impl Tell<'_> {
    /// Writes the status if it changed, then tells of its transitions. What the status is now.
    async fn status(&self, outcome: &status::Outcome<'_>) -> Result<DisaggregatedModelStatus, Error> {
        let before = self.object.get("status");
        // A status that this version can't read is written anew.
        let previous: Option<DisaggregatedModelStatus> =
            before.and_then(|status| serde_json::from_value(status.clone()).ok());
        let facts = Facts {
            generation: self.object.pointer("/metadata/generation").and_then(Value::as_i64).unwrap_or_default(),
            previous: previous.as_ref(),
            now: Timestamp::now(),
            outcome,
            site: self.site,
            owner: self.owner,
            name: self.name,
        };
        let next = status(&facts);
        let body = serde_json::to_value(&next).expect("a status is strings, numbers, lists and maps");
        self.gauges(&body);
        if before == Some(&body) {
            return Ok(next);
        }
        match self.write(before.unwrap_or(&Value::Null), &body).await {
            Ok(written) => {
                if let Some((uid, version)) = own_version(&written, facts.generation) {
                    self.context.memory.wrote_status(uid, version);
                }
            }
            // Deleted since it was read. A conflict is not let go: it may be with a new model of this name, or with other writers.
            Err(kube::Error::Api(status)) if status.is_not_found() => return Ok(next),
            Err(error) => return Err(Error::Status(error)),
        }
        self.context.recorder.publish(self.object, previous.as_ref(), &next).await;
        Ok(next)
    }

    /// Writes a status in the place of what stands.
    async fn write(&self, stands: &Value, body: &Value) -> Result<ObjectMeta, kube::Error> {
        let (namespace, name) = (self.owner.namespace.as_str(), self.name);
        let cluster = &self.context.cluster;
        let merge = || async {
            let patch = json!({"metadata": {"uid": self.owner.uid}, "status": replacing(stands, body)});
            cluster.merge_status(namespace, name, &patch).await
        };
        if holds_more(stands, body) {
            return merge().await;
        }
        let patch = json!({
            "apiVersion": baton_crds::API_VERSION,
            "kind": baton_crds::KIND,
            "metadata": {"name": name, "namespace": namespace, "uid": self.owner.uid},
            "status": body,
        });
        match cluster.apply_status(namespace, name, &patch).await {
            // So it answers to an apply of whatever part, where another part is not as the definition wants it.
            Err(kube::Error::Api(status)) if matches!(status.code, 400 | 422 | 500) => merge().await,
            answer => answer,
        }
    }

    /// Says in the status that the cluster can't be read, once that is more than a moment's trouble; the error, in any case.
    async fn unreadable(&self, error: ReadError) -> Error {
        let refused = matches!(&error.source, kube::Error::Api(status) if status.is_forbidden());
        let failures = self.context.memory.failures((&self.owner.namespace, self.name));
        if refused || failures >= FAILURES_TOLD {
            let words = error.to_string();
            if let Err(error) = self.status(&status::Outcome::Unreadable(&words)).await {
                tracing::debug!(%error, "nor can the status be written");
            }
        }
        Error::Read(error)
    }

    fn gauges(&self, status: &Value) {
        let roles = status.get("roles").and_then(Value::as_array).into_iter().flatten();
        for role in roles {
            let Some(workload) = text(role, "/name").and_then(role_of) else { continue };
            let count = |field| role.get(field).and_then(Value::as_u64).and_then(|count| u32::try_from(count).ok());
            let states = [(ReplicaState::Desired, "desiredReplicas"), (ReplicaState::Ready, "readyReplicas")];
            for (state, field) in states {
                let count = count(field).unwrap_or_default();
                self.context.metrics.role(&self.owner.namespace, self.name, workload, state, count);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::child::Kind;
    use crate::failure::{Class, Failure};

    #[test]
    fn pauses_double_up_to_their_bound_and_never_overflow() {
        let check = |error: &Error, expect: [u128; 7]| {
            let pauses = [1, 2, 3, 6, 10, 40, u32::MAX].map(|failures| pause(error, failures).as_millis());
            assert_eq!(pauses, expect, "{error}");
        };
        check(&Error::TimedOut(60), [200, 400, 800, 6_400, 60_000, 60_000, 60_000]);
        let failure =
            Failure { kind: Kind::Service, name: "x".to_owned(), class: Class::Transient, message: String::new() };
        check(&Error::Children(vec![failure]), [200, 400, 800, 6_400, 8_000, 8_000, 8_000]);
    }

    #[test]
    fn what_a_person_must_mend_is_tried_again_slowly_from_the_first() {
        let failure =
            Failure { kind: Kind::Service, name: "x".to_owned(), class: Class::Refused, message: String::new() };
        assert_eq!(pause(&Error::Children(vec![failure]), 1), WHILE_REFUSED);
    }

    #[test]
    fn a_model_that_is_not_settled_is_looked_at_often_for_a_minute_and_a_settled_one_not_at_all() {
        let status = |ready: &str, progressing: &str| -> DisaggregatedModelStatus {
            let condition = |kind: &str, word: &str, second: u8| {
                json!({
                    "type": kind, "status": word, "reason": "X", "message": "", "observedGeneration": 1,
                    "lastTransitionTime": format!("2026-01-01T00:00:{second:02}Z"),
                })
            };
            let conditions = [condition("Ready", ready, 10), condition("Progressing", progressing, 0)];
            serde_json::from_value(json!({ "conditions": conditions })).expect("a status")
        };
        let begin: Timestamp = "2026-01-01T00:00:00Z".parse().expect("a time");
        let at = |second: u64| begin + Duration::from_secs(second);
        let looks = |second| look_again(&status("False", "False"), at(second)).map(|time| time.as_secs());
        assert_eq!([5, 10, 16, 25, 30, 69].map(looks), [4, 4, 6, 15, 20, 59].map(Some));
        assert_eq!([70, 100_000].map(looks), [None, None]);
        assert!(look_again(&status("True", "True"), at(30)).is_some());
        assert_eq!(look_again(&status("True", "False"), at(30)), None);
    }

    #[test]
    fn a_version_that_our_status_made_is_no_news_unless_the_spec_has_changed_too() {
        let written = ObjectMeta {
            uid: Some("u".to_owned()),
            resource_version: Some("7".to_owned()),
            generation: Some(2),
            ..ObjectMeta::default()
        };
        assert_eq!(own_version(&written, 2), Some(("u", "7")));
        assert_eq!(own_version(&written, 1), None);
        assert_eq!(own_version(&ObjectMeta::default(), 1), None);
    }

    #[test]
    fn an_object_without_a_type_is_a_mistake_that_names_the_field() {
        let object = json!({
            "apiVersion": "baton.dev/v1alpha1",
            "kind": "DisaggregatedModel",
            "metadata": {"name": "tiny"},
            "spec": {"model": {"uri": 7}},
            "status": {"conditions": "nonsense"},
        });
        let violations = typed(&object).expect_err("7 is no URI");
        assert!(violations.iter().any(|violation| violation.path == "spec.model.uri"), "{violations:?}");
    }
}
