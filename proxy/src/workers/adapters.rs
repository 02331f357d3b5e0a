//! Adapters (LoRA) that an engine which is not ours has in use, as its metrics show them. Pure.

use crate::connector::Connector;

/// Adapters of one engine at most; vLLM has place for one by default, and operators give it some tens.
const ADAPTERS_MAX: usize = 256;

/// The series in which vLLM names adapters. Its value is the time at which it was so, and those of other times stay.
const VLLM: &str = "vllm:lora_requests_info{";

/// Names of adapters that requests there use or wait for. SGLang's metrics name none.
pub(super) fn in_use(connector: Connector, metrics: &str) -> Vec<String> {
    if connector != Connector::VllmNixl {
        return Vec::new();
    }
    let series = metrics.lines().filter_map(|line| {
        let (labels, value) = line.strip_prefix(VLLM)?.rsplit_once('}')?;
        let at: f64 = value.trim().parse().ok().filter(|at: &f64| at.is_finite())?;
        Some((at, labels))
    });
    let Some((_, labels)) = series.max_by(|(left, _), (right, _)| left.total_cmp(right)) else { return Vec::new() };
    let named = ["running_lora_adapters=\"", "waiting_lora_adapters=\""].into_iter().filter_map(|label| {
        let (_, rest) = labels.split_once(label)?;
        rest.split_once('"').map(|(names, _)| names)
    });
    let names = named.flat_map(|names| names.split(',')).map(str::trim).filter(|name| !name.is_empty());
    let mut names: Vec<String> = names.take(ADAPTERS_MAX).map(str::to_owned).collect();
    names.sort_unstable();
    names.dedup();
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_series_names_the_adapters() {
        let metrics = "# HELP vllm:lora_requests_info x\n\
            vllm:lora_requests_info{max_lora=\"4\",running_lora_adapters=\"old\",waiting_lora_adapters=\"\"} 1.7e+09\n\
            vllm:lora_requests_info{max_lora=\"4\",running_lora_adapters=\"sql, de\",waiting_lora_adapters=\"fr,de\"} 1.8e+09\n\
            vllm:lora_requests_info{max_lora=\"4\",running_lora_adapters=\"wrong\",waiting_lora_adapters=\"\"} NaN\n";
        assert_eq!(in_use(Connector::VllmNixl, metrics), ["de", "fr", "sql"]);
        assert!(in_use(Connector::Sglang, metrics).is_empty());
        for nothing in
            ["", "vllm:lora_requests_info{", "vllm:lora_requests_info{x=\"y\"} 1\n", "vllm:lora_requests_info 1\n"]
        {
            assert!(in_use(Connector::VllmNixl, nothing).is_empty(), "{nothing}");
        }
        let idle = "vllm:lora_requests_info{max_lora=\"4\",running_lora_adapters=\"\",waiting_lora_adapters=\"\"} 1\n";
        assert!(in_use(Connector::VllmNixl, idle).is_empty());
    }
}
