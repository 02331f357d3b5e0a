//! One reconcile, down the page, and the loop that runs them.
//!
//! A reconcile reads a model and all that belongs to it as they are now, decides, writes what differs, and says in the status what
//! came of it. It depends on nothing that an earlier one left behind, so it may be cut off anywhere and begun again. Each model
//! is reconciled when something of it changes ([`crate::triggers`]), again and again with growing pauses while something fails,
//! and every half hour in any case: that is also how a change of a Secret is found that nothing else came with.

use crate::apply::{self, Apply};
use crate::cluster::{Cluster, Resource};
use crate::error::Error;
use crate::events;
use crate::fence::Clock;
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
use crate::status::{self, Facts, status};
use crate::{Validated, Violation, desired, validate};
use baton_crds::{DisaggregatedModel, DisaggregatedModelStatus};
use futures_util::{Stream, StreamExt as _};
use jiff::Timestamp;
use kube::ResourceExt as _;
use kube::runtime::applier;
use kube::runtime::controller::{Action, Config, ReconcileRequest};
use kube::runtime::events::Recorder;
use kube::runtime::reflector::Store;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::watch;
use tracing::Instrument as _;

/// Reconciles that run at once.
const CONCURRENCY: u16 = 16;
/// How long one may take: a dozen requests of milliseconds each; only an API server that hangs makes it long.
const RECONCILE_TIMEOUT: Duration = Duration::from_secs(60);
/// A model is looked at at least this often.
const RESYNC: Duration = Duration::from_secs(30 * 60);
/// How often while something downloads, for its progress.
const WHILE_DOWNLOADING: Duration = Duration::from_secs(2);
/// How often while something that the manifest refers to is missing: it is not watched.
const WHILE_MISSING: Duration = Duration::from_secs(5);
/// How often while a person must act outside of what is watched: a webhook, a quota, somebody else's object.
const WHILE_REFUSED: Duration = Duration::from_secs(30);
/// Shortest pause after a failure; each further failure doubles it.
const BACKOFF_MIN: Duration = Duration::from_millis(200);
/// Longest pause after a failure.
const BACKOFF_MAX: Duration = Duration::from_secs(60);
/// Failures in a row after which the status speaks of them: once or twice is nothing that a person need know.
const FAILURES_TOLD: u32 = 3;
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
    let Some(object) = read(context, &namespace, &name).await? else {
        return Ok((Outcome::Gone, Action::await_change()));
    };
    let site = Site { kinds: context.kinds.borrow().clone(), ..context.site.clone() };
    let owner = Owner { namespace: namespace.clone(), uid: text(&object, "/metadata/uid").map(str::to_owned) };
    let tell = Tell { context, site: &site, owner: &owner, name: &name, object: &object };

    // 1. Observe: what exists, and what the manifest refers to.
    let observed = observe(&context.cluster, &context.progress, &site.kinds, &namespace, &name, &object).await;
    let mut observed = match observed {
        Ok(observed) => observed,
        Err(error) => return Err(tell.unreadable(error).await),
    };

    // 2. Validate: the one place where a user is told that the manifest is wrong. What runs is left as it is.
    let model = match typed(&object) {
        Ok(model) => model,
        Err(violations) => {
            tell.status(&status::Outcome::Invalid(&violations)).await?;
            return Ok((Outcome::Invalid, Action::requeue(jittered(RESYNC))));
        }
    };

    // 3. Desired: keys, what to do next, and the objects that this means.
    let roles = desired::roles(&model).into_iter().collect();
    let minted = mint(&found(&observed, &name), &name, &namespace, &roles, Timestamp::now()).map_err(Error::Mint)?;
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
    tell.status(&applied).await?;
    tracing::debug!(writes, "applied");

    if !failures.is_empty() {
        return Err(Error::Children(failures));
    }
    let next = [
        Some(jittered(RESYNC)),
        Some(minted.renew_in),
        (!observed.downloads.is_empty()).then_some(WHILE_DOWNLOADING),
        (!observed.missing.is_empty()).then_some(WHILE_MISSING),
    ];
    Ok((Outcome::Settled, Action::requeue(next.into_iter().flatten().min().unwrap_or(RESYNC))))
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
    BACKOFF_MIN.saturating_mul(1u32.checked_shl(failures.saturating_sub(1)).unwrap_or(u32::MAX)).min(BACKOFF_MAX)
}

/// The model as it is now; none where there is none to work on. One that is being deleted is left alone: what it owns goes with it,
/// by the cluster's own garbage collection.
async fn read(context: &Context, namespace: &str, name: &str) -> Result<Option<Value>, Error> {
    let object = context.cluster.get(Resource::MODELS, namespace, name).await;
    let object = object.map_err(ReadError::of("the model")).map_err(Error::Read)?;
    Ok(object.filter(|object| text(object, "/metadata/deletionTimestamp").is_none()))
}

/// An object in types. One that this version has no type for is told of like any other mistake.
fn typed(object: &Value) -> Result<Validated, Vec<Violation>> {
    // The status is ours to write and never read as part of the manifest.
    let mut manifest = object.clone();
    if let Some(fields) = manifest.as_object_mut() {
        fields.remove("status");
    }
    let model: DisaggregatedModel = serde_path_to_error::deserialize(&manifest)
        .map_err(|error| vec![Violation::new(error.path().to_string(), error.inner().to_string(), "")])?;
    validate(&model)
}

/// The keys and certificates in what was read.
fn found(observed: &Observed, model: &str) -> Found {
    Found::in_secrets(|name| observed.children.get(&(crate::child::Kind::Secret, name.to_owned())), model)
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
    /// Writes the status if it changed, then tells of its transitions.
    async fn status(&self, outcome: &status::Outcome<'_>) -> Result<(), Error> {
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
            return Ok(());
        }
        let (namespace, name) = (self.owner.namespace.as_str(), self.name);
        let patch = json!({
            "apiVersion": baton_crds::API_VERSION,
            "kind": baton_crds::KIND,
            "metadata": {"name": name, "namespace": namespace, "uid": self.owner.uid},
            "status": body,
        });
        match self.context.cluster.apply_status(namespace, name, &patch).await {
            Ok(written) => {
                let written = text(&written, "/metadata/uid").zip(text(&written, "/metadata/resourceVersion"));
                if let Some((uid, version)) = written {
                    self.context.memory.wrote_status(uid, version);
                }
            }
            // Deleted, and perhaps made anew, since it was read: the event of that is on its way.
            Err(kube::Error::Api(status)) if status.is_not_found() || status.is_conflict() => return Ok(()),
            Err(error) => return Err(Error::Status(error)),
        }
        events::publish(&self.context.recorder, self.object, previous.as_ref(), &next).await;
        Ok(())
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
    fn pauses_double_up_to_a_minute_and_never_overflow() {
        let error = Error::TimedOut(60);
        let pauses: Vec<u128> =
            [1, 2, 3, 9, 10, 40, u32::MAX].map(|failures| pause(&error, failures).as_millis()).into();
        assert_eq!(pauses, [200, 400, 800, 51_200, 60_000, 60_000, 60_000]);
    }

    #[test]
    fn what_a_person_must_mend_is_tried_again_slowly_from_the_first() {
        let failure =
            Failure { kind: Kind::Service, name: "x".to_owned(), class: Class::Refused, message: String::new() };
        assert_eq!(pause(&Error::Children(vec![failure]), 1), WHILE_REFUSED);
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
