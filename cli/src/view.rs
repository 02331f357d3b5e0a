//! What a person sees of running pods, in words: the status line of `baton up` and the table of `baton status`. Pure.

use crate::pods::PodKind;
use baton_wire::status::{State, Status};
use std::fmt::Write as _;

/// Pods up to which the line names each; more are counted by role.
const NAMED_MAX: usize = 6;

/// One pod as it is seen now.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct PodView {
    /// Without the model's name.
    pub(crate) name: String,
    pub(crate) kind: PodKind,
    pub(crate) phase: Phase,
}

/// Where a pod is.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Phase {
    /// Nobody answers yet.
    Starting,
    /// The model is being loaded; the part that is done, of 1.
    Loading { stage: String, part: Option<f64> },
    /// It takes work.
    Ready,
    /// It finishes what it has.
    Draining,
    /// It died and is started again.
    Restarting,
    /// It has ended.
    Stopped,
}

impl Phase {
    /// The phase that a worker's status tells.
    pub(crate) fn of(status: &Status) -> Self {
        match status.state {
            State::Loading => Phase::Loading {
                stage: status.progress.as_ref().map_or_else(|| "loading".to_owned(), |progress| progress.stage.clone()),
                part: status.progress.as_ref().and_then(|progress| {
                    (progress.total > 0).then(|| (progress.done as f64 / progress.total as f64).min(1.0))
                }),
            },
            State::Ready => Phase::Ready,
            State::Draining => Phase::Draining,
        }
    }

    /// In words. `step`: percent by which progress is told.
    fn words(&self, step: u32) -> String {
        match self {
            Phase::Starting => "starting".to_owned(),
            Phase::Loading { stage, part: Some(part) } => {
                let percent = (part * 100.0) as u32;
                format!("{stage} {} %", percent - percent % step.max(1))
            }
            Phase::Loading { stage, part: None } => stage.clone(),
            Phase::Ready => "ready".to_owned(),
            Phase::Draining => "draining".to_owned(),
            Phase::Restarting => "restarting".to_owned(),
            Phase::Stopped => "stopped".to_owned(),
        }
    }
}

/// The status line. `step`: percent by which progress is told, so that where each change is a line there are few.
pub(crate) fn line(model: &str, pods: &[PodView], step: u32) -> String {
    let parts: Vec<String> = if pods.len() <= NAMED_MAX {
        pods.iter().map(|pod| format!("{} {}", pod.name, pod.phase.words(step))).collect()
    } else {
        let mut kinds: Vec<PodKind> = Vec::new();
        for pod in pods {
            if !kinds.contains(&pod.kind) {
                kinds.push(pod.kind);
            }
        }
        let count = |kind: &PodKind| {
            let all = pods.iter().filter(|pod| &pod.kind == kind);
            let ready = all.clone().filter(|pod| pod.phase == Phase::Ready).count();
            format!("{} {ready}/{} ready", kind.as_str(), all.count())
        };
        kinds.iter().map(count).collect()
    };
    format!("{model}: {}", parts.join(", "))
}

/// The load of all workers together, for a live line.
pub(crate) fn load(statuses: &[Status]) -> String {
    let sum = |of: fn(&Status) -> u32| statuses.iter().map(of).map(u64::from).sum::<u64>();
    let (used, total) = (sum(|status| status.load.kv_blocks_used), sum(|status| status.load.kv_blocks_total));
    let percent = (used * 100).checked_div(total).unwrap_or(0);
    format!(
        "{} running, {} waiting, KV {percent} %",
        sum(|status| status.load.running),
        sum(|status| status.load.waiting)
    )
}

/// One row of the table: a pod with its status, or why there is none.
pub(crate) struct Row {
    pub(crate) pod: String,
    pub(crate) address: String,
    pub(crate) status: Result<Option<Status>, String>,
}

/// The table of `baton status`.
pub(crate) fn table(rows: &[Row]) -> String {
    let head =
        ["POD", "ADDRESS", "ROLE", "STATE", "RUNNING", "WAITING", "KV BLOCKS", "PREFILLED", "GENERATED", "KV MOVED"];
    let mut cells: Vec<Vec<String>> = vec![head.iter().map(|cell| (*cell).to_owned()).collect()];
    for row in rows {
        let mut line = vec![row.pod.clone(), row.address.clone()];
        match &row.status {
            Ok(Some(status)) => line.extend([
                status.role.to_string(),
                Phase::of(status).words(1),
                status.load.running.to_string(),
                status.load.waiting.to_string(),
                format!("{}/{}", status.load.kv_blocks_used, status.load.kv_blocks_total),
                status.totals.prefill_tokens.to_string(),
                status.totals.decode_tokens.to_string(),
                bytes(status.totals.kv_bytes_sent + status.totals.kv_bytes_received),
            ]),
            Ok(None) => line.extend(["proxy".to_owned(), "ready".to_owned()]),
            Err(why) => line.extend(["?".to_owned(), why.clone()]),
        }
        cells.push(line);
    }
    // A reason is as long as it needs to be, and the last cell of its row: it widens no column.
    let width = |column: usize| {
        let short = cells.iter().filter(|line| line.len() > column + 1);
        short.map(|line| line[column].chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    let mut text = String::new();
    for line in &cells {
        let mut row = String::new();
        for (cell, width) in line.iter().zip(&widths) {
            // Writing to a String does not fail.
            let _ = write!(row, "{cell:<width$}  ");
        }
        text.push_str(row.trim_end());
        text.push('\n');
    }
    text
}

/// An amount of memory for people.
pub(crate) fn bytes(count: u64) -> String {
    let mut amount = count as f64;
    for unit in ["B", "KiB", "MiB", "GiB"] {
        if amount < 1024.0 {
            return if unit == "B" { format!("{count} B") } else { format!("{amount:.1} {unit}") };
        }
        amount /= 1024.0;
    }
    format!("{amount:.1} TiB")
}

#[cfg(test)]
mod tests {
    use super::*;
    use baton_wire::Role;
    use serde_json::json;

    fn pod(name: &str, role: Role, phase: Phase) -> PodView {
        PodView { name: name.to_owned(), kind: PodKind::Worker(role), phase }
    }

    fn status() -> Status {
        let value = json!({
            "role": "decode", "revision": "r", "epoch": "00".repeat(16), "model": "m", "fingerprint": null, "kv_address": null,
            "state": "loading", "progress": {"stage": "loading weights", "done": 43, "total": 100}, "max_model_length": null,
            "block_tokens": 32,
            "load": {"running": 2, "waiting": 1, "queued_prompt_tokens": 0, "kv_blocks_used": 3, "kv_blocks_total": 12},
            "totals": {"prefill_tokens": 7, "decode_tokens": 9, "kv_bytes_sent": 0, "kv_bytes_received": 2048,
                       "transfers_completed": 1, "transfers_failed": 0, "last_exposed_transfer_ms": null}
        });
        serde_json::from_value(value).expect("a status")
    }

    #[test]
    fn few_pods_are_named_with_progress_and_many_are_counted() {
        let loading = Phase::of(&status());
        let few = [pod("prefill-0", Role::Prefill, Phase::Ready), pod("decode-0", Role::Decode, loading)];
        assert_eq!(line("tiny", &few, 1), "tiny: prefill-0 ready, decode-0 loading weights 43 %");
        assert_eq!(line("tiny", &few, 25), "tiny: prefill-0 ready, decode-0 loading weights 25 %");
        let mut many = vec![pod("prefill-0", Role::Prefill, Phase::Ready); 3];
        many.extend(vec![pod("decode-0", Role::Decode, Phase::Starting); 4]);
        assert_eq!(line("tiny", &many, 1), "tiny: prefill 3/3 ready, decode 0/4 ready");
    }

    #[test]
    fn load_is_summed_over_workers() {
        assert_eq!(load(&[status(), status()]), "4 running, 2 waiting, KV 25 %");
        assert_eq!(load(&[]), "0 running, 0 waiting, KV 0 %");
    }

    #[test]
    fn the_table_lines_up_and_says_why_a_status_is_missing() {
        let rows = [
            Row { pod: "tiny-decode-0".to_owned(), address: "127.0.101.2:8000".to_owned(), status: Ok(Some(status())) },
            Row { pod: "tiny-proxy-0".to_owned(), address: "127.0.101.3:8000".to_owned(), status: Ok(None) },
            Row {
                pod: "x".to_owned(),
                address: "127.0.101.4:8000".to_owned(),
                status: Err("no answer at all, for a long time".to_owned()),
            },
        ];
        let expect = "\
POD            ADDRESS           ROLE    STATE                 RUNNING  WAITING  KV BLOCKS  PREFILLED  GENERATED  KV MOVED
tiny-decode-0  127.0.101.2:8000  decode  loading weights 43 %  2        1        3/12       7          9          2.0 KiB
tiny-proxy-0   127.0.101.3:8000  proxy   ready
x              127.0.101.4:8000  ?       no answer at all, for a long time
";
        assert_eq!(table(&rows), expect);
    }

    #[test]
    fn amounts_of_memory_read_well() {
        for (count, expect) in
            [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 << 30, "5.0 GiB"), (u64::MAX, "16777216.0 TiB")]
        {
            assert_eq!(bytes(count), expect);
        }
    }
}
