//! What an engine that is not ours says of itself, put in the words of a status: health, name of the model, load. vLLM and SGLang
//! serve the same paths for the first two, and their load stands in their metrics.

use crate::config::Engine;
use crate::connector::Connector;
use crate::upstream::{Request, Upstream, UpstreamError, by};
use crate::workers::{Report, adapters, ranks};
use baton_wire::names::paths;
use baton_wire::status::{Load, State, Status, Totals};
use baton_wire::{Epoch, Role};
use http::StatusCode;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// How long an answer may take. An engine's server shares its process with the tokenizer, so that it is late now and then.
const TIMEOUT: Duration = Duration::from_secs(1);

/// Bytes of the list of models: one, and its adapters.
const MODELS_BYTES_MAX: usize = 1 << 20;

/// Bytes of metrics: vLLM has some thousand series with its histograms.
const METRICS_BYTES_MAX: usize = 4 << 20;

/// How often the load is read: an engine makes a quarter of a megabyte of text for it, so not at each question after its health.
const LOAD_INTERVAL: Duration = Duration::from_secs(2);

/// Where an engine that is not ours is reached, and what was learnt of it.
#[derive(Debug)]
pub(crate) struct Probe {
    connector: Connector,
    engine: Engine,
    role: Role,
    revision: Arc<str>,
    epoch: Epoch,
    model: Option<Model>,
    load: Load,
    rank_loads: Vec<u32>,
    adapters: Vec<String>,
    load_read: Option<Instant>,
}

/// The model that an engine serves.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Model {
    name: String,
    length_max: Option<u32>,
}

impl Probe {
    /// `epoch` stands for the engine; the engine itself has none.
    pub(crate) fn new(connector: Connector, engine: Engine, revision: &str, epoch: Epoch) -> Self {
        let role = engine.role.expect("the configuration gives a role to each engine that is not ours");
        let load = Load::default();
        let rank_loads = ranks::loads(connector, "", engine.dp_size);
        let revision = revision.into();
        Probe {
            connector,
            engine,
            role,
            revision,
            epoch,
            model: None,
            load,
            rank_loads,
            adapters: Vec::new(),
            load_read: None,
        }
    }

    /// Asks once.
    ///
    /// # Errors
    /// When it does not answer in time, or not at all.
    pub(crate) async fn ask(&mut self, upstream: &Upstream) -> Result<Report, UpstreamError> {
        let (status, _) = get(upstream, paths::HEALTH, MODELS_BYTES_MAX).await?;
        if !status.is_success() {
            self.model = None;
            return Ok(Report::Unreachable);
        }
        if self.model.is_none() {
            let (status, body) = get(upstream, paths::MODELS, MODELS_BYTES_MAX).await?;
            self.model = status.is_success().then(|| model(&body)).flatten();
        }
        if self.load_read.is_none_or(|read| read.elapsed() >= LOAD_INTERVAL) {
            // A load that can't be read is no reason not to use an engine that is well: what this proxy has there counts anyway.
            if let Ok((StatusCode::OK, body)) = get(upstream, paths::METRICS, METRICS_BYTES_MAX).await {
                let metrics = String::from_utf8_lossy(&body);
                self.load = load(self.connector, &metrics);
                self.rank_loads = ranks::loads(self.connector, &metrics, self.engine.dp_size);
                self.adapters = adapters::in_use(self.connector, &metrics);
            }
            self.load_read = Some(Instant::now());
        }
        Ok(Report::Said(Arc::new(self.status())))
    }

    fn status(&self) -> Status {
        Status {
            role: self.role,
            revision: self.revision.to_string(),
            epoch: self.epoch,
            model: self.model.as_ref().map(|model| model.name.clone()).unwrap_or_default(),
            fingerprint: None,
            kv_address: None,
            state: State::Ready,
            progress: None,
            max_model_length: self.model.as_ref().and_then(|model| model.length_max),
            block_tokens: 0,
            load: self.load,
            totals: Totals::default(),
            bootstrap_port: self.engine.bootstrap_port,
            rank_loads: self.rank_loads.clone(),
            adapters: self.adapters.clone(),
        }
    }
}

async fn get(
    upstream: &Upstream,
    path: &'static str,
    bytes_max: usize,
) -> Result<(StatusCode, bytes::Bytes), UpstreamError> {
    let exchange = async {
        let answer = upstream.send(&Request::get(path)).await?;
        Ok((answer.status, answer.body.collect(bytes_max).await?))
    };
    by(Instant::now() + TIMEOUT, upstream.address(), exchange).await
}

fn model(body: &[u8]) -> Option<Model> {
    #[derive(serde::Deserialize)]
    struct List {
        data: Vec<Entry>,
    }
    #[derive(serde::Deserialize)]
    struct Entry {
        id: String,
        max_model_len: Option<u32>,
    }
    let list: List = serde_json::from_slice(body).ok()?;
    list.data.into_iter().next().map(|entry| Model { name: entry.id, length_max: entry.max_model_len })
}

/// The load from an engine's metrics. Names as vLLM 0.1x and SGLang 0.5 have them; what is missing counts as none, since what this
/// proxy sent is counted besides.
fn load(connector: Connector, metrics: &str) -> Load {
    let names: [&[&str]; 3] = match connector {
        Connector::Baton => return Load::default(),
        Connector::VllmNixl => [
            &["vllm:num_requests_running"],
            &["vllm:num_requests_waiting"],
            &["vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"],
        ],
        Connector::Sglang => [&["sglang:num_running_reqs"], &["sglang:num_queue_reqs"], &["sglang:token_usage"]],
    };
    // One series for each data-parallel rank: counts are added, of shares the largest is taken.
    let (mut sums, mut share) = ([0.0; 2], 0.0_f64);
    for line in metrics.lines().filter(|line| !line.starts_with('#')) {
        let name = line.split(['{', ' ']).next().unwrap_or_default();
        let Some(which) = names.iter().position(|names| names.contains(&name)) else { continue };
        let value = line.rsplit(' ').next().and_then(|value| value.parse::<f64>().ok());
        let Some(value) = value.filter(|value| value.is_finite() && *value >= 0.0) else { continue };
        match sums.get_mut(which) {
            Some(sum) => *sum += value,
            None => share = share.max(value.min(1.0)),
        }
    }
    // Shares of the cache are told in thousandths, as if it had a thousand blocks.
    const WHOLE: u32 = 1000;
    Load {
        running: sums[0] as u32,
        waiting: sums[1] as u32,
        queued_prompt_tokens: 0,
        kv_blocks_used: (share * f64::from(WHOLE)) as u32,
        kv_blocks_total: WHOLE,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_engines_load_is_read_from_its_metrics() {
        let vllm = "# HELP vllm:num_requests_running x\nvllm:num_requests_running{engine=\"0\"} 3.0\n\
                    vllm:num_requests_running{engine=\"1\"} 2.0\nvllm:num_requests_waiting{engine=\"0\"} 1.0\n\
                    vllm:num_requests_waiting_by_reason{engine=\"0\"} 7.0\nvllm:kv_cache_usage_perc{engine=\"0\"} 0.25\n";
        let found = load(Connector::VllmNixl, vllm);
        assert_eq!((found.running, found.waiting, found.kv_blocks_used), (5, 1, 250));
        let sglang = "sglang:num_running_reqs{a=\"b\"} 4.0\nsglang:num_queue_reqs 2\nsglang:token_usage 1.5\n";
        let found = load(Connector::Sglang, sglang);
        assert_eq!((found.running, found.waiting, found.kv_blocks_used), (4, 2, 1000));
        let nothing = load(Connector::Sglang, "sglang:num_running_reqs NaN\n");
        assert_eq!((nothing.running, nothing.waiting, nothing.kv_blocks_used), (0, 0, 0));
    }

    #[test]
    fn the_first_model_of_the_list_is_the_engines_own() {
        let body = br#"{"object":"list","data":[{"id":"llama","max_model_len":4096},{"id":"adapter"}]}"#;
        assert_eq!(model(body), Some(Model { name: "llama".into(), length_max: Some(4096) }));
        assert_eq!(model(b"{}"), None);
    }
}
