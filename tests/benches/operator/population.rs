//! The objects of the benchmark: models, and groups of LeaderWorkerSet with the same pods, in namespaces of their own.

use crate::Size;
use anyhow::{Context as _, Result, ensure};
use baton_crds::DisaggregatedModel;
use baton_operator::child::Kind;
use baton_operator::credentials::{Certificate, Credentials};
use baton_operator::plan::Plan;
use baton_operator::site::{Owner, Site};
use baton_operator::{desired, validate};
use futures_util::stream::{self, StreamExt as _, TryStreamExt as _};
use http::Request;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use system_tests::kube::{ControlPlane, Namespace, client_of, eventually};
use system_tests::operator::{Admin, PROXY_IMAGE, Type, WORKER_IMAGE, manifest};

/// Requests at once: enough to keep the API server busy.
const AT_ONCE: usize = 8;
/// Longest wait for objects to be made.
const PATIENCE: Duration = Duration::from_secs(20 * 60);
/// Time between two counts, so that counting takes nothing from what is counted.
const LOOK_EVERY: Duration = Duration::from_millis(200);

const STATEFUL_SET: Type = Type { root: "/apis/apps/v1", plural: "statefulsets", is_namespaced: true };

/// Where the models and groups live.
pub(crate) struct Population<'a> {
    admin: &'a Admin,
    size: Size,
    operators: Namespace,
    namespaces: Vec<Namespace>,
    runtime: tokio::runtime::Runtime,
    client: kube::Client,
}

impl<'a> Population<'a> {
    /// Namespaces, each with the claim that its models lie on.
    pub(crate) fn new(plane: &ControlPlane, admin: &'a Admin, size: Size) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let client = runtime.block_on(client_of(plane.kubeconfig()))?;
        let namespaces: Vec<Namespace> =
            (0..size.namespaces).map(|_| plane.namespace("bench")).collect::<Result<_>>()?;
        for namespace in &namespaces {
            manifest::claim(admin, namespace.name())?;
        }
        let operators = plane.restricted_namespace("bench-operator")?;
        let population = Population { admin, size, operators, namespaces, runtime, client };
        // The controllers give each namespace a ConfigMap, which must not be counted as a model's.
        population.wait_count(Kind::ConfigMap, |count| count >= size.namespaces)?;
        Ok(population)
    }

    /// The operator's own namespace.
    pub(crate) fn operators(&self) -> &str {
        self.operators.name()
    }

    fn namespace(&self, number: usize) -> &str {
        self.namespaces[number % self.namespaces.len()].name()
    }

    fn path(&self, kind: Type, number: usize) -> String {
        format!("{}/namespaces/{}/{}", kind.root, self.namespace(number), kind.plural)
    }

    /// Sends one request for each number, some at once.
    fn each(&self, numbers: usize, request: impl Fn(usize) -> http::Result<Request<Vec<u8>>>) -> Result<()> {
        self.runtime.block_on(async {
            let requests = stream::iter(0..numbers).map(|number| Ok::<_, anyhow::Error>((number, request(number)?)));
            requests
                .try_for_each_concurrent(AT_ONCE, |(number, request)| async move {
                    let answer = self.client.request::<Value>(request).await;
                    answer.map(drop).with_context(|| format!("object {number}"))
                })
                .await
        })
    }

    /// Makes as many groups as the models will have workloads, and waits for all of their pods.
    pub(crate) fn create_groups(&self) -> Result<usize> {
        let (groups, pod) = (2 * self.size.models, pod()?);
        let (sets, pods) = (self.count_of(STATEFUL_SET)?, self.count_of(Type::POD)?);
        self.each(groups, |number| {
            let group = json!({
                "apiVersion": "leaderworkerset.x-k8s.io/v1", "kind": "LeaderWorkerSet",
                "metadata": {"name": format!("group-{number}")},
                "spec": {"replicas": 1, "leaderWorkerTemplate": {"size": 1, "workerTemplate": {"spec": pod}}},
            });
            post(self.path(Type::LEADER_WORKER_SET, number), &group)
        })?;
        self.wait_count_of(STATEFUL_SET, |count| count == sets + groups)?;
        self.wait_count_of(Type::POD, |count| count == pods + groups)?;
        Ok(groups)
    }

    /// Makes the models, and waits until everything is there that they mean, and nothing else. How many objects that are.
    pub(crate) fn create_models(&self) -> Result<usize> {
        let mut wanted: BTreeMap<Kind, usize> = BTreeMap::new();
        for kind in children()? {
            *wanted.entry(kind).or_default() += self.size.models;
        }
        let mut before = BTreeMap::new();
        for kind in wanted.keys() {
            before.insert(*kind, self.count(*kind)?);
        }
        self.each(self.size.models, |number| post(self.path(Type::MODEL, number), &manifest::tiny(&name(number))))?;
        for (kind, more) in &wanted {
            self.wait_count(*kind, |count| count >= before[kind] + more)?;
        }
        for (kind, more) in &wanted {
            let count = self.count(*kind)? - before[kind];
            ensure!(count == *more, "{count} of {} instead of {more}", kind.plural());
        }
        Ok(wanted.values().sum())
    }

    /// Fails when a model's status is not about the model as it is, or says that it is not accepted.
    pub(crate) fn check_models(&self) -> Result<()> {
        for namespace in &self.namespaces {
            for model in self.admin.list(Type::MODEL, namespace.name(), "")? {
                let (status, generation) = (&model["status"], &model["metadata"]["generation"]);
                let conditions = status["conditions"].as_array().map(Vec::as_slice).unwrap_or_default();
                let accepted = conditions.iter().any(|one| one["type"] == "Accepted" && one["status"] == "True");
                ensure!(accepted && status["observedGeneration"] == *generation, "{}", model["metadata"]["name"]);
            }
        }
        Ok(())
    }

    /// Patches the first so many models.
    pub(crate) fn patch(&self, models: usize, patch: &Value) -> Result<()> {
        self.each(models, |number| {
            Request::patch(format!("{}/{}", self.path(Type::MODEL, number), name(number)))
                .header(http::header::CONTENT_TYPE, "application/merge-patch+json")
                .body(patch.to_string().into_bytes())
        })
    }

    /// How many objects of a kind there are in all namespaces.
    fn count(&self, kind: Kind) -> Result<usize> {
        self.count_of(Type::of_child(kind))
    }

    fn count_of(&self, kind: Type) -> Result<usize> {
        self.runtime.block_on(self.ask_count(kind))
    }

    /// One object and how many remain: the API server counts them without reading them.
    async fn ask_count(&self, kind: Type) -> Result<usize> {
        let request = Request::get(format!("{}/{}?limit=1", kind.root, kind.plural)).body(Vec::new())?;
        let list: Value = self.client.request(request).await?;
        let items = list["items"].as_array().map_or(0, Vec::len);
        let remaining = list["metadata"]["remainingItemCount"].as_u64().unwrap_or_default();
        Ok(items + usize::try_from(remaining)?)
    }

    /// Waits until there are as many of a kind as are wanted.
    fn wait_count(&self, kind: Kind, enough: impl Fn(usize) -> bool) -> Result<()> {
        self.wait_count_of(Type::of_child(kind), enough)
    }

    fn wait_count_of(&self, kind: Type, enough: impl Fn(usize) -> bool) -> Result<()> {
        self.runtime.block_on(eventually(PATIENCE, kind.plural, async || {
            let count = self.ask_count(kind).await?;
            if enough(count) {
                return Ok(Some(()));
            }
            tokio::time::sleep(LOOK_EVERY).await;
            anyhow::bail!("{count} so far")
        }))
    }
}

fn name(number: usize) -> String {
    format!("model-{number}")
}

fn post(path: String, object: &Value) -> http::Result<Request<Vec<u8>>> {
    Request::post(path).header(http::header::CONTENT_TYPE, "application/json").body(object.to_string().into_bytes())
}

/// What the operator's pure half makes of a model of the benchmark.
fn objects() -> Result<Vec<baton_operator::child::Child>> {
    let typed: DisaggregatedModel = serde_json::from_value(manifest::tiny("model"))?;
    let model = validate(&typed).map_err(|violations| anyhow::anyhow!("{violations:?}"))?;
    let site = Site {
        worker_image: WORKER_IMAGE.to_owned(),
        proxy_image: PROXY_IMAGE.to_owned(),
        kinds: BTreeSet::new(),
        operator_namespace: None,
    };
    let owner = Owner { namespace: "bench".to_owned(), uid: None };
    let roles = desired::roles(&model).into_iter().map(|role| (role, Certificate::default())).collect();
    let credentials = Credentials { roles, ..Credentials::default() };
    let plan = Plan::first(&model, &site);
    Ok(desired::desired(&model, &site, &owner, &plan, &credentials).children().to_vec())
}

fn children() -> Result<Vec<Kind>> {
    Ok(objects()?.into_iter().map(|child| child.kind).collect())
}

/// The pod of a model's workload, for an account that every namespace has.
fn pod() -> Result<Value> {
    let workload =
        objects()?.into_iter().find(|child| child.kind == Kind::Deployment).context("a model has workloads")?;
    let mut pod = workload.body["spec"]["template"]["spec"].clone();
    if let Some(fields) = pod.as_object_mut() {
        fields.remove("serviceAccountName");
    }
    Ok(pod)
}
