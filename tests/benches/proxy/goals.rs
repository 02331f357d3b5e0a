//! The goals: what the proxy may cost beside its peers and the floor.

use crate::contestant::Contestant;
use crate::line;
use crate::results::{ByRound, Cell, Results, ratio};
use crate::series::Series;
use crate::workload::{JSON, JSON_32K, LATENCY, SSE, TTFT, Workload};

/// Prints each goal with its figure, and after them what else is worth comparing.
pub(crate) fn print(results: &Results) {
    let cpu = |workload, other| cpu_to(results, workload, Contestant::Ours, other);
    let best = |workload| {
        let own = results.figure(workload, Contestant::Ours, cpu_us)?;
        ratio(&own, &best_peer(results, workload)?)
    };
    goal("proxy_pd_json_vs_floor", 1.0, cpu(&JSON, Contestant::Floor));
    goal("proxy_pd_json_vs_best_peer", 0.4, best(&JSON));
    goal("proxy_pd_json_32k_vs_best_peer", 0.4, best(&JSON_32K));
    goal("proxy_pd_sse_vs_floor", 1.05, cpu(&SSE, Contestant::Floor));
    goal("proxy_pd_sse_vs_vllm_router", 0.75, cpu(&SSE, Contestant::VllmRouter));
    goal("proxy_added_p50_c1_vs_vllm_router", 0.6, added(results, &LATENCY, |cell| cell.p50_us));
    goal("proxy_added_ttft_c16_vs_vllm_router", 0.5, added(results, &TTFT, |cell| cell.ttft_us));
    let resident = results.resident_mb(Contestant::Ours).and_then(|mb| Series::new(vec![mb]).ok_or_else(String::new));
    goal("proxy_rss_after_load_mb", 18.0, resident);

    figure("JSON, 32 KB prompt: CPU to the floor's", cpu(&JSON_32K, Contestant::Floor));
    figure("SSE at 5 ms a token, 64 at a time: CPU to the floor's", cpu(&crate::workload::PACED, Contestant::Floor));
    figure(
        "SSE at 5 ms a token, 64 at a time: CPU to vllm-router's",
        cpu(&crate::workload::PACED, Contestant::VllmRouter),
    );
    let sglang = cpu_to(results, &JSON, Contestant::OursSglang, Contestant::SglangRouter);
    figure("JSON, 0.5 KB, SGLang's contract: CPU to sglang-router's", sglang);
}

/// Prints a goal: the median of its rounds is to be `target` at most.
fn goal(name: &str, target: f64, measured: Result<Series, String>) {
    match measured {
        Ok(series) => {
            let median = series.median();
            let verdict = if median <= target { "held" } else { "missed" };
            line(&format!("goal {name} {median:.3} <= {target:?} {verdict}"));
            if series.rounds() > 1 {
                line(&format!("     in its rounds: {series:.3}"));
            }
        }
        Err(why) => line(&format!("goal {name} not measured: {why}")),
    }
}

fn figure(title: &str, measured: Result<Series, String>) {
    match measured {
        Ok(series) => line(&format!("{title}: {series:.3}")),
        Err(why) => line(&format!("{title}: not measured: {why}")),
    }
}

fn cpu_us(cell: &Cell) -> f64 {
    cell.cpu_us
}

fn cpu_to(
    results: &Results,
    workload: &'static Workload,
    own: Contestant,
    other: Contestant,
) -> Result<Series, String> {
    let own = results.figure(workload, own, cpu_us)?;
    ratio(&own, &results.figure(workload, other, cpu_us)?)
}

/// The least CPU of any peer, in each round that all of them have: one that is not there might have been the best.
fn best_peer(results: &Results, workload: &'static Workload) -> Result<ByRound, String> {
    let mut peers = Contestant::PEERS.into_iter().map(|peer| results.figure(workload, peer, cpu_us));
    let first = peers.next().unwrap_or_else(|| Ok(ByRound::new()))?;
    peers.try_fold(first, |best, peer| {
        let peer = peer?;
        Ok(best.into_iter().filter_map(|(round, figure)| Some((round, figure.min(*peer.get(&round)?)))).collect())
    })
}

/// What ours adds to the engine's own time, to what vllm-router adds.
fn added(results: &Results, workload: &'static Workload, time: fn(&Cell) -> f64) -> Result<Series, String> {
    let direct = results.figure(workload, Contestant::Direct, time)?;
    let more = |contestant| -> Result<ByRound, String> {
        let own = results.figure(workload, contestant, time)?;
        Ok(own.into_iter().filter_map(|(round, figure)| Some((round, figure - direct.get(&round)?))).collect())
    };
    ratio(&more(Contestant::Ours)?, &more(Contestant::VllmRouter)?)
}
