//! What one measured completion took, for people, and whether it went the way that the manifest plans. Pure.

use crate::completion::Measured;
use crate::view;
use baton_operator::Disaggregation;
use baton_wire::status::Totals;
use baton_wire::{Path, PathReason};
use std::time::Duration;

/// What the completion did to the decode worker's totals.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Moved {
    pub(crate) kv_bytes: u64,
    /// From the end of the prompt's computation to everything being here.
    pub(crate) exposed_ms: Option<f64>,
}

impl Moved {
    /// The difference of two statuses of one worker.
    pub(crate) fn between(before: &Totals, after: &Totals) -> Self {
        let handed_over = after.transfers_completed > before.transfers_completed;
        Moved {
            kv_bytes: after.kv_bytes_received.saturating_sub(before.kv_bytes_received),
            exposed_ms: after.last_exposed_transfer_ms.filter(|_| handed_over),
        }
    }
}

/// The summary. `asked_after`: from the start of `baton` to the request's; `name_of` gives the pod at an address.
pub(crate) fn summary(
    measured: &Measured,
    asked_after: Duration,
    moved: Option<&Moved>,
    name_of: impl Fn(&str) -> Option<String>,
) -> String {
    let worker = |address: &Option<String>, role: &str| match address {
        Some(address) => name_of(address).map_or_else(|| address.clone(), |name| format!("{name} ({address})")),
        None => format!("no {role} worker named"),
    };
    let prefill = match (&measured.prefill_worker, &measured.path) {
        (Some(_), _) => worker(&measured.prefill_worker, "prefill"),
        (None, Some(path)) if path != "remote-prefill" => {
            format!("{}, by itself", worker(&measured.decode_worker, "decode"))
        }
        (None, _) => worker(&None, "prefill"),
    };
    let gaps = match (percentile(&measured.gaps, 50), percentile(&measured.gaps, 95)) {
        // The mean too: where tokens arrive several in one packet, most gaps are nothing.
        (Some(median), Some(p95)) => {
            let mean = measured.gaps.iter().sum::<Duration>().div_f64(measured.gaps.len().max(1) as f64);
            format!("{} mean, {} median, {} p95", ms(mean), ms(median), ms(p95))
        }
        (_, _) => "fewer than two pieces of text".to_owned(),
    };
    let kv = match moved {
        Some(Moved { kv_bytes, exposed_ms: Some(exposed) }) => {
            format!("{}, exposed transfer time {exposed:.2} ms", view::bytes(*kv_bytes))
        }
        Some(Moved { kv_bytes, exposed_ms: None }) => view::bytes(*kv_bytes),
        None => "unknown: the decode worker's status is missing".to_owned(),
    };
    let no_text = || "no token with text".to_owned();
    let usage = &measured.usage;
    let tokens = format!(
        "{} prompt ({} cached), {} generated, finished by {}",
        usage.prompt_tokens,
        usage.cached_tokens(),
        usage.completion_tokens,
        measured.finish_reason.as_deref().unwrap_or("nothing that was told")
    );
    [
        ("time to first token", measured.first.map_or_else(no_text, ms)),
        ("first token after start", measured.first.map_or_else(no_text, |first| s(asked_after + first))),
        ("inter-token latency", gaps),
        ("tokens", tokens),
        ("path", measured.path.clone().unwrap_or_else(|| "not told".to_owned())),
        ("prefilled by", prefill),
        ("decoded by", worker(&measured.decode_worker, "decode")),
        ("KV moved", kv),
    ]
    .iter()
    .map(|(name, value)| format!("  {name:<25}{value}\n"))
    .collect()
}

/// Why the path is another than the manifest plans; nothing where it is that one.
pub(crate) fn off_plan(path: Option<&str>, plan: &Disaggregation) -> Option<String> {
    let Some(path) = path else { return Some("the answer does not say which path it took".to_owned()) };
    let planned = match (path.parse::<Path>(), plan) {
        (Ok(Path::RemotePrefill), Disaggregation::Always { .. } | Disaggregation::Conditional { .. }) => true,
        (Ok(Path::LocalPrefill(PathReason::ShortPrompt)), Disaggregation::Conditional { .. }) => true,
        (Ok(Path::LocalPrefill(PathReason::Aggregated | PathReason::PolicyNever)), Disaggregation::Never) => true,
        (Ok(Path::RemotePrefill | Path::LocalPrefill(_) | Path::Fallback(_)) | Err(_), _) => false,
    };
    (!planned).then(|| format!("the request took the path {path:?}, which is not what the manifest plans"))
}

/// The nearest-rank percentile.
fn percentile(values: &[Duration], percent: usize) -> Option<Duration> {
    let mut sorted = values.to_vec();
    sorted.sort_unstable();
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).copied()
}

fn ms(duration: Duration) -> String {
    format!("{:.1} ms", duration.as_secs_f64() * 1000.0)
}

fn s(duration: Duration) -> String {
    format!("{:.2} s", duration.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::completion::Usage;
    use baton_operator::RoleSettings;
    use proptest::prelude::*;
    use std::num::NonZeroU32;

    fn measured() -> Measured {
        let usage: Usage = serde_json::from_str(
            r#"{"prompt_tokens": 40, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 32}}"#,
        )
        .expect("a usage");
        Measured {
            first: Some(Duration::from_micros(41_250)),
            gaps: vec![Duration::from_millis(4), Duration::from_millis(2)],
            path: Some("remote-prefill".to_owned()),
            prefill_worker: Some("127.0.101.1:8000".to_owned()),
            decode_worker: Some("127.0.101.2:8000".to_owned()),
            usage,
            finish_reason: Some("length".to_owned()),
        }
    }

    fn always() -> Disaggregation {
        let one = NonZeroU32::MIN;
        let prefill = RoleSettings {
            replicas: baton_operator::Replicas::Fixed(one),
            nodes_per_replica: one,
            max_unavailable: 1,
            pod: Default::default(),
            kv_cache_bytes: one.into(),
            max_batch_tokens: one,
            max_sequences: one,
            prefill_chunk_tokens: one,
            drain_timeout: Duration::ZERO,
        };
        Disaggregation::Always { prefill }
    }

    #[test]
    fn the_summary_names_times_tokens_path_workers_and_bytes() {
        let name_of = |address: &str| (address == "127.0.101.1:8000").then(|| "tiny-prefill-0".to_owned());
        let moved = Moved { kv_bytes: 36_864, exposed_ms: Some(0.31) };
        let expect = "  time to first token      41.2 ms
  first token after start  1.54 s
  inter-token latency      3.0 ms mean, 2.0 ms median, 4.0 ms p95
  tokens                   40 prompt (32 cached), 3 generated, finished by length
  path                     remote-prefill
  prefilled by             tiny-prefill-0 (127.0.101.1:8000)
  decoded by               127.0.101.2:8000
  KV moved                 36.0 KiB, exposed transfer time 0.31 ms
";
        assert_eq!(summary(&measured(), Duration::from_millis(1500), Some(&moved), name_of), expect);
    }

    #[test]
    fn a_prompt_computed_where_it_is_decoded_says_so() {
        let mut local = measured();
        local.path = Some("local-prefill; reason=short-prompt".to_owned());
        local.prefill_worker = None;
        assert!(summary(&local, Duration::ZERO, None, |_| None).contains("127.0.101.2:8000, by itself"));
    }

    #[test]
    fn an_answer_without_text_has_no_first_token() {
        let silent = Measured { first: None, gaps: Vec::new(), ..measured() };
        let told = summary(&silent, Duration::from_secs(1), None, |_| None);
        assert!(told.contains("first token after start  no token with text\n"), "{told}");
    }

    #[test]
    fn only_the_planned_paths_are_on_plan() {
        let check = |path: &str, plan: &Disaggregation, on_plan: bool| {
            assert_eq!(off_plan(Some(path), plan).is_none(), on_plan, "{path}");
        };
        check("remote-prefill", &always(), true);
        check("fallback; reason=timeout", &always(), false);
        check("local-prefill; reason=no-prefill-worker", &always(), false);
        check("local-prefill; reason=short-prompt", &always(), false);
        check("by pigeon", &always(), false);
        check("local-prefill; reason=aggregated", &Disaggregation::Never, true);
        check("remote-prefill", &Disaggregation::Never, false);
        assert!(off_plan(None, &always()).is_some());
    }

    #[test]
    fn what_moved_is_the_difference_and_the_time_that_of_this_handover() {
        let before = Totals { kv_bytes_received: 5, last_exposed_transfer_ms: Some(9.0), ..Totals::default() };
        let same = Moved::between(&before, &before);
        assert_eq!(same, Moved { kv_bytes: 0, exposed_ms: None });
        let after =
            Totals { kv_bytes_received: 12, transfers_completed: 1, last_exposed_transfer_ms: Some(1.5), ..before };
        assert_eq!(Moved::between(&before, &after), Moved { kv_bytes: 7, exposed_ms: Some(1.5) });
    }

    proptest! {
        #[test]
        fn a_percentile_is_one_of_the_values_and_grows(values in proptest::collection::vec(0u64..1000, 1..50)) {
            let values: Vec<Duration> = values.into_iter().map(Duration::from_millis).collect();
            let at: Vec<Duration> = [0, 50, 95, 100].into_iter().filter_map(|p| percentile(&values, p)).collect();
            prop_assert!(at.is_sorted() && at.iter().all(|value| values.contains(value)));
            prop_assert_eq!(at.last(), values.iter().max());
        }
    }
}
