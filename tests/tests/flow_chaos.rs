//! Workers that are killed, stopped and resumed at random under concurrent requests: every answer is the right one or an error that
//! says so, nobody hangs, and nothing is held afterwards.
//!
//! The faults come from a fixed seed; how they meet the requests is up to the machine.

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use system_tests::cluster::{Cluster, PodSpec, path_of, signal, wait};
use system_tests::http;

/// Faults that happen. The first ten that the seed draws have each kind of fault at each role; all take about five seconds.
const FAULTS: usize = 14;

/// Clients at once: more than one for each decode worker, so that requests of different phases share a worker when it fails.
const CLIENTS: usize = 6;

const SEED: u64 = 0x0bad_5eed;

/// Of different lengths: a few blocks, and several chunks of 32 tokens.
fn prompts() -> Vec<String> {
    let story =
        "Once upon a time, a small fox lived near a quiet river. One day the fox wanted to cross the old bridge, but";
    vec![story.to_owned(), story.repeat(6), format!("The bear. {}", story.repeat(2)), "The owl".to_owned()]
}

fn completion(prompt: &str, stream: bool) -> Value {
    json!({"model": "tiny", "prompt": prompt, "max_tokens": 40, "temperature": 0, "ignore_eos": true, "stream": stream})
}

/// Xorshift (Marsaglia, 2003).
struct Draws(u64);

impl Draws {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

/// How a request ended, other than by breaking a promise.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Ended {
    /// With the reference's text, and by this path.
    Exact(String),
    /// With an error that names itself, before or within the stream.
    Typed(String),
}

/// The code of an error as a client's library reads it.
fn code(error: &Value) -> Result<String> {
    let text = |field: &str| error["error"][field].as_str().filter(|text| !text.is_empty());
    let (Some(_), Some(_), Some(code)) = (text("message"), text("type"), text("code")) else {
        bail!("not a typed error: {error}");
    };
    Ok(code.to_owned())
}

fn ask(address: &str, prompt: &str, stream: bool, expected: &str) -> Result<Ended> {
    let answer = http::post(address, "/v1/completions", &completion(prompt, stream))?;
    let path = path_of(&answer);
    if answer.status != 200 {
        ensure!([502, 503, 504].contains(&answer.status), "status {}", answer.status);
        return Ok(Ended::Typed(code(&answer.json()?)?));
    }
    if !stream {
        let body = answer.json()?;
        ensure!(body["choices"][0]["text"] == expected, "by {path}: {body}");
        return Ok(Ended::Exact(path));
    }
    let events = answer.text().with_context(|| format!("a stream by {path}"))?;
    let mut text = String::new();
    for data in events.lines().filter_map(|line| line.strip_prefix("data: ")) {
        if data == "[DONE]" {
            ensure!(text == expected, "by {path}: {text:?}");
            return Ok(Ended::Exact(path));
        }
        let event: Value = serde_json::from_str(data)?;
        if !event["error"].is_null() {
            ensure!(expected.starts_with(&text), "by {path}, before its error: {text:?}");
            return Ok(Ended::Typed(code(&event)?));
        }
        text += event["choices"][0]["text"].as_str().unwrap_or_default();
    }
    bail!("a stream by {path} has no end: {events}")
}

/// One client's requests until `over`, counted by how they ended.
fn client(
    number: usize,
    addresses: &[String],
    references: &[(String, String)],
    over: &AtomicBool,
) -> Result<BTreeMap<Ended, u32>> {
    let mut ended = BTreeMap::new();
    for turn in number.. {
        if over.load(Ordering::Relaxed) {
            break;
        }
        let (prompt, expected) = &references[turn % references.len()];
        let outcome = ask(&addresses[turn % addresses.len()], prompt, turn % 3 == 0, expected)?;
        if matches!(outcome, Ended::Typed(_)) {
            // As any client would, rather than asking a worker that is gone as fast as it can.
            std::thread::park_timeout(Duration::from_millis(50));
        }
        *ended.entry(outcome).or_default() += 1;
    }
    Ok(ended)
}

/// Kills, stops and resumes workers; leaves all of them running.
fn chaos(cluster: &mut Cluster, draws: &mut Draws) -> Result<()> {
    let mut stopped = None;
    for _ in 0..FAULTS {
        let pod = usize::try_from(draws.below(cluster.pods.len() as u64))?;
        if draws.below(3) == 0 {
            cluster.pods[pod].worker.kill()?;
            cluster.pods[pod].worker.wait()?;
            cluster.restart_worker(pod)?;
        } else {
            signal(&cluster.pods[pod].worker, "STOP")?;
            stopped = Some(pod);
        }
        std::thread::park_timeout(Duration::from_millis(100 + draws.below(500)));
        if let Some(pod) = stopped.take() {
            signal(&cluster.pods[pod].worker, "CONT")?;
        }
    }
    Ok(())
}

#[test]
fn under_random_faults_every_answer_is_exact_or_a_typed_error_and_nothing_is_held_afterwards() -> Result<()> {
    let prefill = PodSpec::new("prefill").worker_flag("--prefill-chunk-tokens", "32");
    let decode = PodSpec::new("decode");
    let mut cluster = Cluster::start(&[prefill.clone(), prefill, decode.clone(), decode])?;
    let addresses: Vec<String> = cluster.pods[2..].iter().map(|pod| pod.proxy_address()).collect();
    let reference = |prompt: String| -> Result<(String, String)> {
        let answer = http::post(&addresses[0], "/v1/completions", &completion(&prompt, false))?;
        assert_eq!(path_of(&answer), "remote-prefill");
        let text = answer.json()?["choices"][0]["text"].as_str().context("a completion has text")?.to_owned();
        Ok((prompt, text))
    };
    let references = prompts().into_iter().map(reference).collect::<Result<Vec<_>>>()?;

    let over = AtomicBool::new(false);
    let ended = std::thread::scope(|scope| -> Result<BTreeMap<Ended, u32>> {
        let clients: Vec<_> = (0..CLIENTS)
            .map(|number| {
                scope.spawn({
                    let (a, r, o) = (&addresses, &references, &over);
                    move || client(number, a, r, o)
                })
            })
            .collect();
        let outcome = chaos(&mut cluster, &mut Draws(SEED));
        over.store(true, Ordering::Relaxed);
        let mut all = BTreeMap::new();
        for client in clients {
            for (ended, count) in client.join().expect("a client does not panic")? {
                *all.entry(ended).or_default() += count;
            }
        }
        outcome.map(|()| all)
    });
    let ended = ended.unwrap_or_else(|error| panic!("{error:?}"));
    let exact: u32 = ended.iter().filter(|(ended, _)| matches!(ended, Ended::Exact(_))).map(|(_, count)| count).sum();
    assert!(exact >= 20, "hardly anything was served: {ended:?}");
    assert!(ended.contains_key(&Ended::Exact("remote-prefill".to_owned())), "nothing was handed over: {ended:?}");

    cluster.wait_ready()?;
    wait("no worker holds a block or a handover", || {
        for pod in &cluster.pods {
            let load = pod.status()?["load"].clone();
            let metrics = http::get(&pod.engine_address(), "/metrics")?.text()?;
            let open = |name: &str| metrics.lines().any(|line| line.starts_with(name) && !line.ends_with(" 0"));
            let is_idle =
                (&load["kv_blocks_used"], &load["running"], &load["waiting"]) == (&json!(0), &json!(0), &json!(0));
            if !is_idle || open("baton_worker_kv_exports_open") || open("baton_worker_kv_imports_open") {
                return Ok(false);
            }
        }
        Ok(true)
    })?;
    for (prompt, expected) in &references {
        for address in &addresses {
            wait("handovers work again", || {
                Ok(ask(address, prompt, false, expected)? == Ended::Exact("remote-prefill".to_owned()))
            })?;
        }
    }
    Ok(())
}
