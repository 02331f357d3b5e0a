//! `baton up`: a manifest to running processes, and back to none. The story; its parts are elsewhere.

use crate::args::UpArgs;
use crate::client::Client;
use crate::cluster::{self, Cluster, Happened, Programs};
use crate::completion::{self, Measured};
use crate::pods::{self, Pod};
use crate::process::ChangeKind;
use crate::report::{self, Moved};
use crate::run_dir::{self, RunDir};
use crate::signals::Signals;
use crate::terminal::{self, Terminal};
use crate::{laptop, manifest, view};
use anyhow::{Context as _, bail};
use baton_operator::Validated;
use baton_wire::names::paths;
use baton_wire::status::Status;
use serde_json::json;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;
use tokio::time::{Instant, MissedTickBehavior};

/// What stands for the worker's image in the revision: all workers of a run are the one program.
const WORKER: &str = "baton-worker";

/// How often pods are asked while they load: an eye sees no more.
const LOADING_TICK: Duration = Duration::from_millis(100);

/// How often once they serve.
const SERVING_TICK: Duration = Duration::from_secs(1);

/// How long proxies may take to find all workers once these are ready. They ask twice a second; what takes longer is told.
const ACQUAINTANCE_MAX: Duration = Duration::from_secs(15);

/// Beyond a role's drain timeout, as in a cluster: the worker cuts off what is left and ends.
const DRAIN_GRACE: Duration = Duration::from_secs(10);

/// What is left to finish after a failed start.
const FAILED_START_DRAIN_MAX: Duration = Duration::from_secs(5);

/// How long the decode worker may take to tell its status around the prompt.
const STATUS_TIMEOUT: Duration = Duration::from_secs(2);

/// Percent by which progress is told where each change is a line of its own.
const COARSE_STEP: u32 = 25;

/// What was asked for, and when.
struct Task<'a> {
    validated: &'a Validated,
    args: &'a UpArgs,
    /// When this program started.
    born: Instant,
}

/// Why a run ended without an error.
enum Ended {
    /// It was asked to.
    Asked,
    /// The prompt was answered; what was off plan about it.
    Answered { off_plan: Option<String> },
}

/// Serves a manifest until it is asked to stop, or until the prompt is answered. `born`: when this program started.
///
/// # Errors
/// When the manifest is wrong, a process can't start or load, or the prompt is not answered as planned.
pub(crate) async fn run(args: UpArgs, born: std::time::Instant) -> anyhow::Result<ExitCode> {
    if !cfg!(target_os = "linux") {
        bail!("baton up needs Linux: elsewhere the loopback interface has no addresses but 127.0.0.1 for pods to have");
    }
    let manifest = match (&args.file, &args.model) {
        (Some(file), _) => manifest::load(file)?,
        (None, Some(model)) => manifest::of_directory(model)?,
        (None, None) => bail!("give a manifest with --file, or a model directory with --model"),
    };
    let validated = &manifest.validated;
    laptop::check(validated)?;
    let unheeded = laptop::without_meaning(validated);
    if !unheeded.is_empty() {
        Terminal::new().note(&format!("without meaning on one machine: {}", unheeded.join(", ")));
    }
    let model_dir = manifest::model_dir(validated, args.file.as_deref(), args.model.as_deref(), &args.volume)?;
    let programs = Programs::find()?;
    let mut signals = Signals::new().context("cannot listen to signals")?;
    let mut terminal = Terminal::new();

    let claim = cluster::claim(pods::count(validated)?)?;
    let run_dir =
        RunDir::create(&run_dir::base(), &validated.name).context("cannot create the folder for keys and logs")?;
    let started = start(validated, &model_dir, claim, &programs, &run_dir);
    let (mut cluster, entrance) = match started {
        Ok(started) => started,
        Err(error) => {
            run_dir.remove();
            return Err(error);
        }
    };
    let task = Task { validated, args: &args, born: born.into() };
    let outcome = serve(&mut cluster, &entrance, &task, run_dir.path(), &mut signals, &mut terminal).await;
    terminal.clear();
    let within = if outcome.is_ok() { drain_timeout(validated) + DRAIN_GRACE } else { FAILED_START_DRAIN_MAX };
    if matches!(outcome, Ok(Ended::Asked)) {
        terminal.note("draining: running answers finish; Ctrl-C again ends at once");
    }
    let unclean = cluster.stop(within, async || signals.next().await).await;
    drop(cluster);
    match outcome {
        Ok(Ended::Asked | Ended::Answered { off_plan: None }) if unclean.is_empty() => {
            run_dir.remove();
            Ok(ExitCode::SUCCESS)
        }
        Ok(Ended::Answered { off_plan: Some(off_plan) }) => {
            bail!("{off_plan}; the logs are in {}", run_dir.keep().display())
        }
        Ok(Ended::Asked | Ended::Answered { off_plan: None }) => {
            bail!("not drained: {}; the logs are in {}", unclean.join(", "), run_dir.keep().display())
        }
        Err(error) => Err(error.context(format!("stopped; the logs are in {}", run_dir.keep().display()))),
    }
}

fn start(
    validated: &Validated,
    model_dir: &Path,
    claim: cluster::Claim,
    programs: &Programs,
    run_dir: &RunDir,
) -> anyhow::Result<(Cluster, Pod)> {
    let revision = baton_operator::revision(validated, WORKER);
    let pods = pods::plan_pods(validated, &revision, claim.subnet, model_dir, &run_dir.files())?;
    let entrance = pods::entrance(&pods).context("a manifest without a pod that decodes")?.clone();
    run_dir.record(&validated.name, &entrance.proxy_url(), &pods).context("cannot write down where the pods are")?;
    Ok((Cluster::start(&validated.name, pods, claim, programs, run_dir), entrance))
}

async fn serve(
    cluster: &mut Cluster,
    entrance: &Pod,
    task: &Task<'_>,
    logs: &Path,
    signals: &mut Signals,
    terminal: &mut Terminal,
) -> anyhow::Result<Ended> {
    let validated = task.validated;
    if !wait_until_ready(cluster, entrance, &validated.name, signals, terminal).await? {
        return Ok(Ended::Asked);
    }
    let url = entrance.proxy_url();
    match &task.args.prompt {
        Some(prompt) => answer(cluster, &url, task, prompt, signals, terminal).await,
        None => {
            terminal.clear();
            terminal::print_line(&format!("{} serves at {url}", validated.served_name));
            terminal::print_line(&curl_line(&url, &validated.served_name));
            terminal.note(&format!("logs are in {}; Ctrl-C drains and stops", logs.display()));
            until_asked(cluster, &validated.name, signals, terminal).await
        }
    }
}

/// Gives false when it was asked to stop before.
async fn wait_until_ready(
    cluster: &mut Cluster,
    entrance: &Pod,
    name: &str,
    signals: &mut Signals,
    terminal: &mut Terminal,
) -> anyhow::Result<bool> {
    let mut ticks = ticks(LOADING_TICK);
    let step = if terminal.is_live() { 1 } else { COARSE_STEP };
    let mut all_ready_since = None;
    loop {
        tokio::select! {
            happened = cluster.next() => tell(happened, terminal)?,
            () = signals.next() => return Ok(false),
            _ = ticks.tick() => {
                let seen = cluster.observe().await;
                terminal.status(&view::line(name, &seen.views, step));
                if !seen.all_ready() {
                    all_ready_since = None;
                    continue;
                }
                let since = *all_ready_since.get_or_insert_with(Instant::now);
                match cluster.not_yet(entrance).await {
                    Some(why) if since.elapsed() > ACQUAINTANCE_MAX => {
                        terminal.note(&format!("all workers are ready, but requests may not take the planned path: {why}"));
                    }
                    Some(_) => continue,
                    None => {}
                }
                cluster.has_served();
                return Ok(true);
            }
        }
    }
}

async fn until_asked(
    cluster: &mut Cluster,
    name: &str,
    signals: &mut Signals,
    terminal: &mut Terminal,
) -> anyhow::Result<Ended> {
    let mut ticks = ticks(SERVING_TICK);
    loop {
        tokio::select! {
            happened = cluster.next() => tell(happened, terminal)?,
            () = signals.next() => return Ok(Ended::Asked),
            _ = ticks.tick() => {
                let seen = cluster.observe().await;
                let line = view::line(name, &seen.views, COARSE_STEP);
                // Load changes every second: on a line that is rewritten it helps, as lines of their own it would not.
                let load = if terminal.is_live() { format!(" ({})", view::load(&seen.statuses)) } else { String::new() };
                terminal.status(&format!("{line}{load}"));
            }
        }
    }
}

/// Sends the prompt, shows the text as it comes, and the summary.
async fn answer(
    cluster: &mut Cluster,
    url: &str,
    task: &Task<'_>,
    prompt: &str,
    signals: &mut Signals,
    terminal: &mut Terminal,
) -> anyhow::Result<Ended> {
    let Task { validated, args, born } = task;
    let mut body = json!({
        "model": validated.served_name, "prompt": prompt, "max_tokens": args.max_tokens,
        "stream": true, "stream_options": {"include_usage": true},
    });
    if let Some(temperature) = args.temperature {
        body["temperature"] = json!(temperature);
    }
    if let Some(seed) = args.seed {
        body["seed"] = json!(seed);
    }
    let before = cluster.observe().await.statuses;
    let pods: Vec<(String, String, String)> =
        cluster.pods.iter().map(|pod| (pod.address.to_string(), pod.name.clone(), pod.engine_url())).collect();
    let client = Client::new();
    terminal.clear();
    terminal::print(prompt);
    let asked_after = born.elapsed();
    let exchange = async {
        let endpoint = format!("{url}{}", paths::COMPLETIONS);
        let measured = completion::stream(&client, &endpoint, &body, terminal::print).await;
        terminal::print_line("");
        let measured = measured?;
        let moved = moved(&client, &pods, &before, &measured).await;
        anyhow::Ok((measured, moved))
    };
    tokio::pin!(exchange);
    // Deaths are told after the text, which they would otherwise cut in two.
    let mut deaths = Vec::new();
    let outcome = loop {
        tokio::select! {
            outcome = &mut exchange => break outcome,
            happened = cluster.next() => deaths.push(happened),
            () = signals.next() => return Ok(Ended::Asked),
        }
    };
    for happened in deaths {
        tell(happened, terminal)?;
    }
    let (measured, moved) = outcome?;
    let name_of = |address: &str| {
        let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
        pods.iter().find(|(address, _, _)| address == host).map(|(_, name, _)| name.clone())
    };
    terminal::print_line("");
    terminal::print(&report::summary(&measured, asked_after, moved.as_ref(), name_of));
    Ok(Ended::Answered { off_plan: report::off_plan(measured.path.as_deref(), &validated.disaggregation) })
}

/// What the completion moved into the worker that decoded it.
async fn moved(
    client: &Client,
    pods: &[(String, String, String)],
    before: &[Status],
    measured: &Measured,
) -> Option<Moved> {
    let decoder = measured.decode_worker.as_deref()?;
    let host = decoder.rsplit_once(':').map_or(decoder, |(host, _)| host);
    let (_, _, engine) = pods.iter().find(|(address, _, _)| address == host)?;
    let after: Status = client.get_json(&format!("{engine}{}", paths::STATUS), STATUS_TIMEOUT).await.ok()?;
    // By epoch: a worker that was restarted in between counts from zero.
    let before =
        before.iter().find(|status| status.epoch == after.epoch).map(|status| status.totals).unwrap_or_default();
    Some(Moved::between(&before, &after.totals))
}

/// Tells what happened to a process; an error where it means that the manifest can't be served.
fn tell(happened: Happened, terminal: &mut Terminal) -> anyhow::Result<()> {
    let words = |last_words: &[String]| -> String { last_words.iter().map(|line| format!("\n    {line}")).collect() };
    match happened.kind {
        ChangeKind::Started => {}
        ChangeKind::Restarting { exit, last_words, after } => {
            let wait = after.as_secs_f64();
            terminal.note(&format!(
                "{} {exit}, starts again in {wait} s; its last words:{}",
                happened.name,
                words(&last_words)
            ));
        }
        ChangeKind::Stopped { exit, .. } => terminal.note(&format!("{} {exit}", happened.name)),
        ChangeKind::Failed { exit, last_words } => bail!("{} {exit}:{}", happened.name, words(&last_words)),
    }
    Ok(())
}

fn drain_timeout(validated: &Validated) -> Duration {
    let prefill = validated.disaggregation.prefill().map(|prefill| prefill.drain_timeout);
    prefill.into_iter().fold(validated.decode.drain_timeout, Duration::max)
}

fn ticks(every: Duration) -> tokio::time::Interval {
    let mut ticks = tokio::time::interval(every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}

/// A request to try by hand. The name needs no quoting: validation allows nothing that a shell or JSON would mind.
fn curl_line(url: &str, model: &str) -> String {
    let body = json!({"model": model, "prompt": "Once upon a time", "max_tokens": 64, "stream": true});
    format!("curl -N {url}{} -H 'content-type: application/json' -d '{body}'", paths::COMPLETIONS)
}
