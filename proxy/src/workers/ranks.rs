//! The data-parallel ranks of an engine that is not ours, as its metrics show them: one series for each rank, named by a label. Pure.
//!
//! An engine that stands for one rank of several that are served apart has a single series, with whatever number: its ranks can't be
//! asked for, and it counts as having one. So ranks are believed where their numbers are 0 to N-1, or where a flag says how many.

use crate::connector::Connector;

/// Ranks of one engine at most: some times the largest deployments that are published, and few enough that a status stays small.
pub(crate) const RANKS_MAX: u32 = 1024;

/// Sequences of each rank, running and waiting; empty where there is but one. `told` is the number of ranks that a flag says.
pub(super) fn loads(connector: Connector, metrics: &str, told: Option<u32>) -> Vec<u32> {
    let (label, names) = match connector {
        Connector::Baton => return Vec::new(),
        Connector::VllmNixl => ("engine=\"", ["vllm:num_requests_running", "vllm:num_requests_waiting"]),
        Connector::Sglang => ("dp_rank=\"", ["sglang:num_running_reqs", "sglang:num_queue_reqs"]),
    };
    let mut ranks: Vec<Option<u32>> = vec![None; told.unwrap_or(0).min(RANKS_MAX) as usize];
    for line in metrics.lines() {
        let Some((name, labels)) = line.split_once('{') else { continue };
        if !names.contains(&name) {
            continue;
        }
        let Some((rank, value)) = labels.rsplit_once('}').and_then(|(labels, value)| sample(label, labels, value))
        else {
            continue;
        };
        if rank >= ranks.len() && told.is_none() {
            ranks.resize(rank + 1, None);
        }
        if let Some(sum) = ranks.get_mut(rank) {
            *sum = Some(sum.unwrap_or(0).saturating_add(value));
        }
    }
    let has_gap = told.is_none() && ranks.iter().any(Option::is_none);
    if has_gap || ranks.len() < 2 {
        return Vec::new();
    }
    ranks.into_iter().map(Option::unwrap_or_default).collect()
}

/// The rank of one series and its value.
fn sample(label: &str, labels: &str, value: &str) -> Option<(usize, u32)> {
    // At the beginning or behind a comma: `moe_dp_rank` is another label.
    let begins = |at: usize| at == 0 || labels.as_bytes()[at - 1] == b',';
    let (at, _) = labels.match_indices(label).find(|(at, _)| begins(*at))?;
    let (rank, _) = labels[at + label.len()..].split_once('"')?;
    let rank: u32 = rank.parse().ok().filter(|rank| *rank < RANKS_MAX)?;
    let value: f64 = value.trim().parse().ok().filter(|value: &f64| value.is_finite() && *value >= 0.0)?;
    Some((rank as usize, value as u32))
}

#[cfg(test)]
mod tests {
    use super::*;

    const VLLM: &str = "# HELP vllm:num_requests_running x\nvllm:num_requests_running{engine=\"0\",model_name=\"m\"} 3.0\n\
        vllm:num_requests_running{engine=\"1\",model_name=\"m\"} 2.0\nvllm:num_requests_waiting{engine=\"1\"} 4.0\n\
        vllm:num_requests_waiting_by_reason{engine=\"7\"} 7.0\n";

    #[test]
    fn each_rank_has_its_running_and_waiting_sequences() {
        assert_eq!(loads(Connector::VllmNixl, VLLM, None), [3, 6]);
        let sglang = "sglang:num_running_reqs{dp_rank=\"1\",moe_dp_rank=\"5\"} 4.0\nsglang:num_queue_reqs{moe_dp_rank=\"5\",dp_rank=\"0\"} 2\n\
                      sglang:num_running_reqs{moe_dp_rank=\"9\"} 7\n";
        assert_eq!(loads(Connector::Sglang, sglang, None), [2, 4]);
        assert_eq!(loads(Connector::Baton, VLLM, Some(4)), [0_u32; 0]);
    }

    #[test]
    fn an_engine_of_one_rank_or_of_a_later_one_has_no_ranks() {
        let of = |rank: &str| format!("vllm:num_requests_running{{engine=\"{rank}\"}} 1.0\n");
        for metrics in
            [String::new(), of("0"), of("3"), of("1"), of("0") + &of("2"), of("-1"), of("x"), of("4294967295")]
        {
            assert_eq!(loads(Connector::VllmNixl, &metrics, None), [0_u32; 0], "{metrics}");
        }
        assert_eq!(loads(Connector::VllmNixl, &(of("1") + &of("0")), None), [1, 1]);
    }

    #[test]
    fn a_flag_says_how_many_there_are_whatever_the_metrics_show() {
        assert_eq!(loads(Connector::VllmNixl, "", Some(4)), [0; 4]);
        assert_eq!(loads(Connector::VllmNixl, VLLM, Some(4)), [3, 6, 0, 0]);
        assert_eq!(loads(Connector::VllmNixl, VLLM, Some(1)), [0_u32; 0]);
        assert_eq!(loads(Connector::Sglang, VLLM, Some(u32::MAX)).len(), RANKS_MAX as usize);
    }

    #[test]
    fn what_is_no_number_counts_nothing() {
        let metrics = VLLM.replace("2.0", "NaN").replace("4.0", "-1").replace("3.0", "1e99");
        assert_eq!(loads(Connector::VllmNixl, &metrics, Some(2)), [u32::MAX, 0]);
    }
}
