//! A stream whose decode worker is killed under it, at any point: the client gets what it would have got, and notices nothing.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::time::Duration;
use system_tests::cluster::{Cluster, Pod, PodSpec, path_of, wait};
use system_tests::http;

/// Tokens of each choice: long enough that a worker can be killed while it generates them.
const TOKENS: u32 = 400;

/// Kills for each kind of request.
const ROUNDS: u64 = 4;

const SEED: u64 = 0x5eed_c047;

const PROMPT: &str =
    "Once upon a time, a small fox lived near a quiet river. One day the fox wanted to cross the old bridge, but";

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

/// What a client got: each choice's events in their order, less the time of creation, and what the answer counts.
#[derive(Debug, Default, PartialEq, Eq)]
struct Got {
    choices: BTreeMap<u64, Vec<String>>,
    completion_tokens: Option<u64>,
}

impl Got {
    /// Reads a whole stream.
    fn read(text: &str) -> Result<Self> {
        let mut got = Got::default();
        ensure!(!text.contains("baton-ids"), "internal lines reached the client: {text}");
        ensure!(text.matches("data: [DONE]").count() == 1 && text.ends_with("data: [DONE]\n\n"), "no end: {text}");
        let mut created = None;
        for data in text.lines().filter_map(|line| line.strip_prefix("data: ")).filter(|data| *data != "[DONE]") {
            let mut event: Value = serde_json::from_str(data).with_context(|| format!("half an event: {data:?}"))?;
            ensure!(event["error"].is_null(), "an error: {event}");
            let taken = event["created"].take();
            ensure!(*created.get_or_insert(taken.clone()) == taken, "the answer has two times of creation: {text}");
            match event["choices"].as_array().and_then(|choices| choices.first()) {
                Some(choice) => {
                    let index = choice["index"].as_u64().context("a choice has a number")?;
                    got.choices.entry(index).or_default().push(event.to_string());
                }
                None => got.completion_tokens = event["usage"]["completion_tokens"].as_u64(),
            }
        }
        Ok(got)
    }
}

fn send(pod: &Pod, path: &str, body: &Value) -> Result<http::Answer> {
    // The answer's id comes from the request's.
    http::send("POST", &pod.proxy_address(), path, &[("x-request-id", "the-same")], body.to_string())
}

/// How often streams have gone on, as the proxy of the first decode pod counts.
fn continued(cluster: &Cluster) -> Result<u64> {
    let metrics = http::get(&format!("{}:9090", cluster.pods[1].address), "/metrics")?.text()?;
    let line =
        metrics.lines().find_map(|line| line.strip_prefix("baton_proxy_continuations_total{outcome=\"continued\"} "));
    Ok(line.map_or(Ok(0), str::parse)?)
}

/// The decode pod that generates now, if any does.
fn generating(cluster: &Cluster) -> Result<Option<usize>> {
    for pod in 1..cluster.pods.len() {
        if cluster.pods[pod].status().is_ok_and(|status| status["load"]["running"].as_u64() > Some(0)) {
            return Ok(Some(pod));
        }
    }
    Ok(None)
}

fn kill(cluster: &mut Cluster, pod: usize) -> Result<()> {
    cluster.pods[pod].worker.kill()?;
    cluster.pods[pod].worker.wait()?;
    Ok(())
}

/// Reads a stream and kills the worker that generates it, so often, at random points of it. Says how often it did.
fn under_kills(cluster: &mut Cluster, path: &str, body: &Value, kills: u32, draws: &mut Draws) -> Result<(Got, u32)> {
    let mut answer = send(&cluster.pods[1], path, body)?;
    ensure!(answer.status == 200, "status {}", answer.status);
    let mut text = Vec::new();
    let mut killed = Vec::new();
    for _ in 0..kills {
        for _ in 0..=draws.below(40) {
            text.extend(answer.chunk()?.unwrap_or_default());
        }
        std::thread::park_timeout(Duration::from_millis(draws.below(10)));
        if let Some(pod) = generating(cluster)? {
            kill(cluster, pod)?;
            killed.push(pod);
        }
    }
    text.extend(answer.text()?.into_bytes());
    let count = u32::try_from(killed.len())?;
    for pod in killed {
        cluster.restart_worker(pod)?;
    }
    cluster.wait_ready()?;
    Ok((Got::read(&String::from_utf8(text)?)?, count))
}

#[test]
fn a_stream_whose_decode_worker_is_killed_is_the_stream_that_it_would_have_been() -> Result<()> {
    let decode = PodSpec::new("decode");
    let mut cluster = Cluster::start(&[PodSpec::new("prefill"), decode.clone(), decode.clone(), decode])?;
    let mut draws = Draws(SEED);
    let options = json!({"include_usage": true});
    let base = json!({
        "model": "tiny", "max_tokens": TOKENS, "ignore_eos": true, "stream": true, "stream_options": options, "seed": 7,
    });
    let request = |more: Value| {
        let mut body = base.clone();
        for (field, value) in more.as_object().expect("an object") {
            body[field] = value.clone();
        }
        body
    };
    let messages = json!([{"role": "user", "content": PROMPT}]);
    let requests = [
        ("/v1/completions", 1, request(json!({"prompt": PROMPT, "temperature": 0}))),
        ("/v1/completions", 1, request(json!({"prompt": [PROMPT, "The owl"], "temperature": 0.9, "n": 2}))),
        (
            "/v1/chat/completions",
            2,
            request(json!({"messages": messages, "temperature": 0.8, "n": 2, "logprobs": true})),
        ),
    ];
    let mut kills_done = 0;
    for (path, kills, body) in requests {
        let answer = send(&cluster.pods[1], path, &body)?;
        assert_eq!((answer.status, path_of(&answer).as_str()), (200, "remote-prefill"));
        let undisturbed = Got::read(&answer.text()?)?;
        assert!(undisturbed.completion_tokens >= Some(u64::from(TOKENS)), "{:?}", undisturbed.completion_tokens);
        for round in 0..ROUNDS {
            let (got, killed) = under_kills(&mut cluster, path, &body, kills, &mut draws)?;
            kills_done += killed;
            assert_eq!(got, undisturbed, "{path}, round {round}: {killed} killed");
        }
    }
    assert!(kills_done >= 8, "hardly anybody was killed: {kills_done}");
    assert!(
        continued(&cluster)? >= 6,
        "hardly any stream had to go on: {} of {kills_done} kills",
        continued(&cluster)?
    );
    wait("nothing is held", || {
        let held = |pod: &Pod| Ok::<_, anyhow::Error>(pod.status()?["load"]["kv_blocks_used"] != 0);
        for pod in &cluster.pods {
            if held(pod)? {
                return Ok(false);
            }
        }
        Ok(true)
    })
}
