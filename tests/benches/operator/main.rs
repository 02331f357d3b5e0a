//! What the operator costs at scale, on a real API server, with LeaderWorkerSet's controller beside it in the same run.
//!
//! `benches/operator` builds the operator and runs this. There are no nodes: pods are made and stay pending, so that what is
//! measured is control plane and not pretended containers. LeaderWorkerSet's controller has its turn first, while there is nothing
//! else for it to watch; the idle time of both is measured over the same minute, after all of it has settled.

mod figures;
mod population;
mod process;

use anyhow::{Context, Result, bail, ensure};
use figures::{Figures, Metrics, goal, line, quantile};
use population::Population;
use process::{Process, Usage};
use serde_json::json;
use std::time::{Duration, Instant};
use system_tests::kube::{ControlPlane, Started, Tier};
use system_tests::operator::account::{Rights, Scope};
use system_tests::operator::{Admin, NAME, definition, wait};

/// Over this long CPU is counted while nothing happens.
const IDLE: Duration = Duration::from_secs(60);
/// So long nothing must have happened for it to be over.
const QUIET: Duration = Duration::from_secs(5);
/// Longest wait for a step over all models: on two busy cores one takes some minutes.
const PATIENCE: Duration = Duration::from_secs(20 * 60);
/// How often the operator looks at a model of which nothing is heard.
const RESYNC: Duration = Duration::from_secs(30 * 60);

/// As whom LeaderWorkerSet's controller asks the API server.
const LWS: &str = "lws-controller";

/// How much there is of everything.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Size {
    models: usize,
    namespaces: usize,
    churned: usize,
}

impl Size {
    fn from_env() -> Result<Self> {
        let number = |name: &str, default: usize| match std::env::var(name) {
            Ok(text) => text.parse::<usize>().with_context(|| format!("{name} is no number: {text:?}")),
            Err(_) => Ok(default),
        };
        let models = number("BENCH_MODELS", 1000)?.max(1);
        // Twenty models a namespace: a team's, and neither of the two extremes.
        let namespaces = number("BENCH_NAMESPACES", models.div_ceil(20))?.clamp(1, models);
        Ok(Size { models, namespaces, churned: (models / 10).max(1) })
    }
}

fn main() -> Result<()> {
    let size = Size::from_env()?;
    let operator = std::env::var("BENCH_OPERATOR").context("BENCH_OPERATOR names the operator's program")?;
    let plane = match ControlPlane::start(Tier::Behaviour { nodes: 0, lws: true }) {
        Started::Running(plane) => plane,
        Started::Lacking(why) => bail!("no control plane: {why}"),
    };
    let load = std::fs::read_to_string("/proc/loadavg")?;
    line(&format!("load average: {}", load.split(' ').take(3).collect::<Vec<_>>().join(" ")));
    let etcd = String::from_utf8(plane.command("etcd").arg("--version").output()?.stdout)?;
    line(&format!(
        "{} models in {} namespaces, 2 workloads of 1 replica each, no nodes; {}; {operator}",
        size.models,
        size.namespaces,
        etcd.lines().next().unwrap_or_default(),
    ));
    plane.install_crds(&definition()?)?;
    let admin = Admin::new(&plane)?;
    let population = Population::new(&plane, &admin, size)?;
    let figures = Figures::new(&plane);

    let groups = leader_worker_sets(&plane, &population, &figures)?;
    let bench = Bench { plane: &plane, size, population: &population, figures: &figures };
    let mut operator = bench.start(&admin, &operator)?;
    bench.create(&operator)?;
    let idle = bench.idle(&operator, &groups)?;
    let touched = bench.touch(&operator)?;
    bench.scale(&operator)?;
    bench.roll(&operator)?;

    // What is left of idleness over a long time: models that nobody touches are looked at all the same.
    let resync = touched.as_secs_f64() * size.models as f64 / RESYNC.as_secs_f64();
    line(&format!("operator idle: {idle:.4} cores without the half-hourly look at each model, which adds {resync:.4}"));
    let peak = operator.usage()?.peak;
    bench.end(&mut operator)?;
    goal("operator_rss_mib", peak, 64.0);
    goal("operator_idle_cpu_cores", idle + resync, 0.02);
    Ok(())
}

/// LeaderWorkerSet's turn: as many groups as the models will have workloads, of the same pods.
fn leader_worker_sets(plane: &ControlPlane, population: &Population<'_>, figures: &Figures<'_>) -> Result<Process> {
    let (_, pid) =
        plane.processes().into_iter().find(|(name, _)| name == "lws").context("its controller is started")?;
    let process = Process::of(pid);
    let before = process.usage()?;
    line(&format!("lws controller: RSS {:.1} MiB before any group", before.resident));
    let begin = Instant::now();
    let groups = population.create_groups()?;
    let took = begin.elapsed();
    // It has no queue that could be asked, so its CPU time says when it is done.
    let mut last = (process.usage()?.cpu, Instant::now());
    wait(PATIENCE, "the LeaderWorkerSet controller is idle", || {
        let now = process.usage()?.cpu;
        if now - last.0 > QUIET / 100 {
            last = (now, Instant::now());
        }
        Ok((last.1.elapsed() >= QUIET).then_some(()))
    })?;
    let after = process.usage()?;
    let requests = figures.audited(LWS)?;
    line(&format!(
        "lws controller: {groups} groups of one pod after {:.1} s, {requests} API requests ({:.1} a group), CPU {:.1} s",
        took.as_secs_f64(),
        requests as f64 / groups as f64,
        (after.cpu - before.cpu).as_secs_f64(),
    ));
    line(&format!("lws controller: RSS {:.1} MiB with {groups} groups, peak {:.1} MiB", after.resident, after.peak));
    std::thread::park_timeout(IDLE);
    let cores = (process.usage()?.cpu - after.cpu).as_secs_f64() / IDLE.as_secs_f64();
    line(&format!("lws controller idle over {} s, alone: {cores:.4} cores", IDLE.as_secs()));
    Ok(process)
}

/// The operator's turn.
struct Bench<'a> {
    plane: &'a ControlPlane,
    size: Size,
    population: &'a Population<'a>,
    figures: &'a Figures<'a>,
}

/// A program, and its metrics, at one time.
struct Look {
    at: Instant,
    metrics: Metrics,
    usage: Usage,
}

impl Look {
    fn at(operator: &Process) -> Result<Self> {
        Ok(Look { at: Instant::now(), metrics: operator.metrics()?, usage: operator.usage()? })
    }
}

const REQUESTS: &str = "baton_operator_api_requests_total";
const WRITES: &str = "baton_operator_writes_total";

fn reconciles(metrics: &Metrics) -> f64 {
    metrics.sum("baton_operator_reconciles_total", |_| true)
}

fn all_requests(metrics: &Metrics) -> f64 {
    metrics.sum(REQUESTS, |_| true)
}

/// Whether requests are those of reconciles: not of watches, of the lease, or for the kinds that there are.
fn is_of_reconciles(labels: &str) -> bool {
    let standing = ["verb=\"watch\"", "resource=\"leases\"", "resource=\"discovery\""];
    !standing.iter().any(|part| labels.contains(part))
}

fn has_verb(labels: &str, verb: &str) -> bool {
    labels.contains(&format!("verb=\"{verb}\""))
}

fn requests(metrics: &Metrics) -> f64 {
    metrics.sum(REQUESTS, is_of_reconciles)
}

fn writes(metrics: &Metrics) -> f64 {
    metrics.sum(WRITES, |_| true)
}

fn status_writes(metrics: &Metrics) -> f64 {
    metrics.sum(REQUESTS, |labels| labels.contains("resource=\"disaggregatedmodels\"") && has_verb(labels, "patch"))
}

fn events(metrics: &Metrics) -> f64 {
    metrics.sum(REQUESTS, |labels| labels.contains("resource=\"events\""))
}

impl Bench<'_> {
    /// Installs the operator for all namespaces, with the rights that are shipped and no more.
    fn start(&self, admin: &Admin, program: &str) -> Result<Process> {
        let namespace = self.population.operators();
        Rights::shipped().grant(admin, namespace, Scope::Cluster)?;
        let kubeconfig = self.plane.kubeconfig_for_service_account(namespace, NAME)?;
        let operator = Process::operator(self.plane, program, &kubeconfig, namespace)?;
        self.quiet(&operator)?;
        line(&format!("operator: RSS {:.1} MiB before any model", operator.usage()?.resident));
        Ok(operator)
    }

    /// Waits until the operator has nothing to do.
    fn quiet(&self, operator: &Process) -> Result<()> {
        let mut last = (-1.0, Instant::now());
        wait(PATIENCE, "the operator has nothing to do", || {
            let metrics = operator.metrics()?;
            let busy =
                metrics.sum("baton_operator_queued", |_| true) + metrics.sum("baton_operator_active", |_| true) > 0.0;
            let done = reconciles(&metrics);
            if busy || done > last.0 {
                last = (done, Instant::now());
            }
            // Rarely, for telling its metrics costs the operator CPU time, too.
            std::thread::park_timeout(QUIET / 20);
            Ok((last.1.elapsed() >= QUIET).then_some(()))
        })
    }

    /// Makes all models, and waits until everything is there that they mean.
    fn create(&self, operator: &Process) -> Result<()> {
        let before = Look::at(operator)?;
        let servers = self.figures.cpu()?;
        let children = self.population.create_models()?;
        let took = before.at.elapsed();
        line(&format!(
            "all applied: {:.1} s from the first create to the last of {children} children, {:.1} models a second",
            took.as_secs_f64(),
            self.size.models as f64 / took.as_secs_f64(),
        ));
        line(&format!("CPU of the control plane meanwhile: {}", self.figures.cpu_since(&servers)?));
        self.quiet(operator)?;
        self.told("create", operator, &before)?;
        self.population.check_models()
    }

    /// Both controllers with nothing to do: the operator's cores.
    fn idle(&self, operator: &Process, groups: &Process) -> Result<f64> {
        let asked = self.figures.audited(LWS)?;
        let before = (Look::at(operator)?, groups.usage()?);
        // Nothing to wait for: that nothing happens is what is measured.
        std::thread::park_timeout(IDLE);
        let after = (Look::at(operator)?, groups.usage()?);
        let window = (after.0.at - before.0.at).as_secs_f64();
        let cores = |before: Usage, after: Usage| (after.cpu - before.cpu).as_secs_f64() / window;
        let idle = cores(before.0.usage, after.0.usage);
        line(&format!(
            "operator idle over {window:.0} s: {idle:.4} cores, {:.1} API requests a second, {} reconciles, {} writes",
            (all_requests(&after.0.metrics) - all_requests(&before.0.metrics)) / window,
            reconciles(&after.0.metrics) - reconciles(&before.0.metrics),
            writes(&after.0.metrics) - writes(&before.0.metrics),
        ));
        line(&format!(
            "lws controller over the same {window:.0} s: {:.4} cores, {} API requests, RSS {:.1} MiB, with the models' pods there too",
            cores(before.1, after.1),
            self.figures.audited(LWS)? - asked,
            after.1.resident,
        ));
        Ok(idle)
    }

    /// A change that calls for no write: CPU time of one such reconcile.
    fn touch(&self, operator: &Process) -> Result<Duration> {
        let before = Look::at(operator)?;
        self.population.patch(self.size.churned, &json!({"metadata": {"labels": {"touched": "yes"}}}))?;
        self.quiet(operator)?;
        let after = self.told("touch", operator, &before)?;
        let done = reconciles(&after.metrics) - reconciles(&before.metrics);
        ensure!(done >= self.size.churned as f64, "only {done} reconciles of {} models", self.size.churned);
        let took = (after.usage.cpu - before.usage.cpu).div_f64(done);
        line(&format!("touch: {:.2} ms of CPU for a reconcile that changes nothing", took.as_secs_f64() * 1e3));
        Ok(took)
    }

    /// One more replica of decode: one Deployment each is written.
    fn scale(&self, operator: &Process) -> Result<()> {
        let before = Look::at(operator)?;
        self.population.patch(self.size.churned, &json!({"spec": {"decode": {"replicas": 2}}}))?;
        self.written(operator, &before, self.size.churned)?;
        line(&format!("scale: {} models after {:.2} s", self.size.churned, before.at.elapsed().as_secs_f64()));
        self.quiet(operator)?;
        self.told("scale", operator, &before).map(drop)
    }

    /// Another environment of prefill: both workloads of a new revision, beside those of the old one.
    fn roll(&self, operator: &Process) -> Result<()> {
        let before = Look::at(operator)?;
        let env = json!([{"name": "BENCH", "value": "yes"}]);
        self.population.patch(self.size.churned, &json!({"spec": {"prefill": {"env": env}}}))?;
        self.written(operator, &before, 2 * self.size.churned)?;
        line(&format!("roll: {} models after {:.2} s", self.size.churned, before.at.elapsed().as_secs_f64()));
        self.quiet(operator)?;
        self.told("roll", operator, &before).map(drop)
    }

    /// Waits until so many Deployments have been written since a look.
    fn written(&self, operator: &Process, before: &Look, deployments: usize) -> Result<()> {
        let count = |metrics: &Metrics| {
            let is_meant = |labels: &str| labels.contains("kind=\"Deployment\"") && has_verb(labels, "apply");
            metrics.sum(WRITES, is_meant)
        };
        wait(PATIENCE, "their Deployments are written", || {
            let written = count(&operator.metrics()?) - count(&before.metrics);
            Ok((written >= deployments as f64).then_some(()))
        })
    }

    /// Says what the operator did since a look at it.
    fn told(&self, step: &str, operator: &Process, before: &Look) -> Result<Look> {
        let after = Look::at(operator)?;
        let delta = |of: fn(&Metrics) -> f64| of(&after.metrics) - of(&before.metrics);
        let (reconciled, requested) = (delta(reconciles), delta(requests));
        line(&format!(
            "{step}: {reconciled} reconciles, {:.1} API requests each, {} children, {} statuses and {} events written, CPU {:.2} s",
            requested / reconciled.max(1.0),
            delta(writes),
            delta(status_writes),
            delta(events),
            (after.usage.cpu - before.usage.cpu).as_secs_f64(),
        ));
        let verbs = ["get", "list", "patch", "create", "delete"].map(|verb| {
            let of =
                |metrics: &Metrics| metrics.sum(REQUESTS, |labels| is_of_reconciles(labels) && has_verb(labels, verb));
            format!("{verb} {:.2}", (of(&after.metrics) - of(&before.metrics)) / reconciled.max(1.0))
        });
        line(&format!("{step}: API requests a reconcile: {}", verbs.join(", ")));
        let quantile = |q| quantile(&before.metrics, &after.metrics, "baton_operator_reconcile_seconds", q);
        line(&format!("{step}: reconcile p50 {}, p99 {}", quantile(0.5), quantile(0.99)));
        line(&format!("{step}: operator RSS {:.1} MiB, peak {:.1} MiB", after.usage.resident, after.usage.peak));
        Ok(after)
    }

    /// Ends the operator, after its own count of requests was held against the API server's.
    fn end(&self, operator: &mut Process) -> Result<()> {
        let metrics = operator.metrics()?;
        let counted = all_requests(&metrics);
        let user = format!("system:serviceaccount:{}:{NAME}", self.population.operators());
        let audited = self.figures.audited(&user)?;
        let unanswered = metrics.sum(REQUESTS, |labels| labels.contains("code=\"error\""));
        line(&format!(
            "API requests in all: {counted} by the operator's metric ({unanswered} without an answer), {audited} by the API server's audit",
        ));
        for (labels, count) in metrics.samples("baton_operator_reconciles_total") {
            line(&format!("reconciles{labels}: {count}"));
        }
        let begin = Instant::now();
        operator.end()?;
        line(&format!("operator ended {:.2} s after SIGTERM", begin.elapsed().as_secs_f64()));
        Ok(())
    }
}
