//! What a request would cost on a worker, so that the cheapest can be chosen: a worker that already has the prompt's
//! beginning is cheaper, and the less so the more it has to do. Pure; knows one request and some loads.
//!
//! All terms are in KV blocks, the unit that a queue, a cache and a prompt have in common:
//!
//! ```text
//! cost   = load + s * (B - credit)                        smallest wins
//! load   = s * A + k * K + r * R
//! credit = decay * (c * O_device + h * O_host + g * O_disk)
//! decay  = 1 / (1 + d * (load - load_min) / B)
//!
//! A         prompt tokens ahead of ours (reported, and reserved by this proxy), less those that a priority jump overtakes,
//!           divided by tokens a block
//! B         our prompt's tokens divided by tokens a block, at least 1
//! K         KV blocks that the worker's sequences hold (reported, and active by this proxy)
//! R         sequences there (running, waiting, reserved)
//! O_tier    leading blocks of our prompt in that tier, beyond the faster tiers; together never more than B
//! load_min  the smallest load among those compared
//! s,k,r     blocks charged for a block to compute, a block held, a sequence
//! c>=h>=g   share of a block's computation that a block found in that tier saves, 0 to 1
//! d         how fast the credit decays
//! ```
//!
//! The shape is that of Dynamo's router: a prefill term from which an overlap credit is taken, active blocks, a weight for
//! requests, and a rational decay over the load above the least loaded worker, normalised by the request's size. Ours differs
//! in three things. The credit is bounded by the work that it stands for, so that a large overlap never pays for the queue in
//! front of it. The decay follows the whole load and applies to every tier; were it only for the device's blocks, a block that
//! moved up a tier could make its worker dearer. And tokens that this proxy has reserved are in the load before any report
//! shows them, because a router whose load moved only with the workers' answers sent whole bursts to one worker.
//!
//! The decay guards against hot spots: a full hit holds while what is ahead of the worker is less than 0.73 of what the hit
//! saves (the root of `x + x*x*d = 1` at `d = 0.5`), not up to all of it. The report is up to half a second old, so at equal
//! cost the worker without a queue is the better guess, and it then has the blocks too, which cools the spot.

use super::candidate::{LoadView, Overlap};

/// What each term weighs. Parsed once: `c >= h >= g`, all within 0 to 1, nothing negative.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub(crate) struct Weights {
    compute: f64,
    held: f64,
    sequence: f64,
    device: f64,
    host: f64,
    disk: f64,
    decay: f64,
}

impl Weights {
    /// For prefill. Held KV weighs a tenth: blocks that wait to be fetched cost a prefill worker no time, only room for what
    /// is cached, and the veto guards that room. Host and disk are Dynamo's 0.75 and 0.25.
    pub(crate) const PREFILL: Weights =
        Weights { compute: 1.0, held: 0.1, sequence: 1.0, device: 1.0, host: 0.75, disk: 0.25, decay: 0.5 };

    /// For decode. Every held block is read for every token, so it weighs fully. The overlap counts here too: what the decode
    /// worker has, nobody computes, wherever the prompt is computed. Sequences weigh a block each, which decides only where
    /// an engine does not report its blocks.
    pub(crate) const DECODE: Weights = Weights { held: 1.0, ..Weights::PREFILL };

    /// The weights without any credit for overlap: for a choice on load alone.
    #[cfg(test)]
    pub(crate) const fn without_overlap(self) -> Weights {
        Weights { device: 0.0, host: 0.0, disk: 0.0, ..self }
    }
}

/// The request, as far as its cost depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub(crate) struct Job {
    /// Of all its prompts.
    pub(crate) prompt_tokens: u64,
    /// Tokens a KV block.
    pub(crate) block_tokens: u32,
    /// Prompt tokens that it overtakes in a worker's queue. See [`overtaken_tokens`].
    pub(crate) overtakes_tokens: u64,
}

impl Job {
    fn blocks(self, tokens: u64) -> f64 {
        tokens as f64 / f64::from(self.block_tokens.max(1))
    }

    fn request_blocks(self) -> f64 {
        self.blocks(self.prompt_tokens).max(1.0)
    }
}

/// Prompt tokens that a request overtakes whose priority jump is so long. In Dynamo a jump moves a request's arrival back by
/// so many seconds in the queue; then what arrived within them stands behind it, and that is what a worker computes in them.
/// Only true of engines that are told the priority and heed it; for others the caller passes no jump.
pub(crate) fn overtaken_tokens(jump_ms: u64, tokens_per_second: f64) -> u64 {
    // A negative or undefined rate becomes 0, an endless one the largest integer: that is what `as` does with floats.
    (jump_ms as f64 / 1000.0 * tokens_per_second) as u64
}

/// One worker's cost and what it is made of, in blocks.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub(crate) struct Terms {
    /// To be computed before ours.
    pub(crate) ahead_blocks: f64,
    /// Held by the worker's sequences.
    pub(crate) held_blocks: f64,
    /// The worker's sequences, one block each before weighing.
    pub(crate) sequences: f64,
    /// Ours to compute, were nothing cached.
    pub(crate) request_blocks: f64,
    /// What the overlap saves, after the decay.
    pub(crate) credit_blocks: f64,
    /// The sum.
    pub(crate) cost: f64,
}

/// What the load alone costs.
fn load_blocks(weights: Weights, job: Job, load: LoadView) -> f64 {
    weights.compute * ahead_blocks(job, load)
        + weights.held * load.kv_blocks() as f64
        + weights.sequence * load.sequences() as f64
}

fn ahead_blocks(job: Job, load: LoadView) -> f64 {
    job.blocks(load.tokens_ahead().saturating_sub(job.overtakes_tokens))
}

/// The smallest load among those that are compared: the floor over which a load makes the credit decay.
pub(crate) fn load_min(weights: Weights, job: Job, loads: impl Iterator<Item = LoadView>) -> f64 {
    loads.map(|load| load_blocks(weights, job, load)).reduce(f64::min).unwrap_or(0.0)
}

/// The cost of a request on one worker.
pub(crate) fn terms(weights: Weights, job: Job, load: LoadView, overlap: Overlap, load_min: f64) -> Terms {
    let own_load = load_blocks(weights, job, load);
    let request_blocks = job.request_blocks();
    let decay = 1.0 / (1.0 + weights.decay * (own_load - load_min).max(0.0) / request_blocks);
    let device = f64::from(overlap.device_blocks).min(request_blocks);
    let host = f64::from(overlap.host_blocks).min(request_blocks - device);
    let disk = f64::from(overlap.disk_blocks).min(request_blocks - device - host);
    let saved = weights.device * device + weights.host * host + weights.disk * disk;
    let credit_blocks = (decay * saved).min(request_blocks);
    Terms {
        ahead_blocks: ahead_blocks(job, load),
        held_blocks: load.kv_blocks() as f64,
        sequences: load.sequences() as f64,
        request_blocks,
        credit_blocks,
        cost: own_load + weights.compute * (request_blocks - credit_blocks),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const JOB: Job = Job { prompt_tokens: 64 * 32, block_tokens: 32, overtakes_tokens: 0 };

    fn queued(queued_prompt_tokens: u64) -> LoadView {
        LoadView { queued_prompt_tokens, ..LoadView::default() }
    }

    fn device(device_blocks: u32) -> Overlap {
        Overlap { device_blocks, ..Overlap::default() }
    }

    fn cost(weights: Weights, load: LoadView, overlap: Overlap) -> f64 {
        terms(weights, JOB, load, overlap, 0.0).cost
    }

    #[test]
    fn an_idle_worker_costs_what_it_has_to_compute() {
        let check = |overlap: Overlap, expect: f64| assert_eq!(cost(Weights::PREFILL, queued(0), overlap), expect);
        check(device(0), 64.0);
        check(device(16), 48.0);
        check(device(64), 0.0);
        check(device(9999), 0.0);
        check(Overlap { device_blocks: 16, host_blocks: 16, disk_blocks: 16 }, 64.0 - 16.0 - 12.0 - 4.0);
        check(Overlap { device_blocks: 60, host_blocks: 16, disk_blocks: 16 }, 64.0 - 60.0 - 3.0);
    }

    #[test]
    fn a_full_hit_is_left_before_its_queue_is_as_long_as_what_it_saves() {
        let cold = cost(Weights::PREFILL, queued(0), device(0));
        let hot = |queue_blocks: u64| cost(Weights::PREFILL, queued(queue_blocks * 32), device(64));
        assert!(hot(46) < cold);
        assert!(hot(48) > cold);
    }

    #[test]
    fn reservations_weigh_as_much_as_what_is_reported() {
        let reserved = LoadView { reserved_prompt_tokens: 320, ..LoadView::default() };
        assert_eq!(cost(Weights::PREFILL, reserved, device(0)), cost(Weights::PREFILL, queued(320), device(0)));
        let active = LoadView { active_blocks: 7, reserved_requests: 2, ..LoadView::default() };
        let reported = LoadView { kv_used: 7, running: 1, waiting: 1, ..LoadView::default() };
        assert_eq!(cost(Weights::DECODE, active, device(0)), cost(Weights::DECODE, reported, device(0)));
    }

    #[test]
    fn held_blocks_weigh_on_decode_more_than_on_prefill() {
        let held = LoadView { kv_used: 100, ..LoadView::default() };
        assert_eq!(cost(Weights::DECODE, held, device(0)), 164.0);
        assert_eq!(cost(Weights::PREFILL, held, device(0)), 74.0);
    }

    #[test]
    fn a_jump_overtakes_what_a_worker_computes_in_that_time() {
        assert_eq!(overtaken_tokens(1500, 2000.0), 3000);
        for no_rate in [0.0, -1.0, f64::NAN] {
            assert_eq!(overtaken_tokens(1500, no_rate), 0);
        }
        assert_eq!(overtaken_tokens(u64::MAX, f64::INFINITY), u64::MAX);
        let jumping = Job { overtakes_tokens: 3000, ..JOB };
        assert_eq!(terms(Weights::PREFILL, jumping, queued(3000), device(0), 0.0).cost, 64.0);
        assert_eq!(terms(Weights::PREFILL, jumping, queued(3032), device(0), 0.0).cost, 65.0);
    }

    #[test]
    fn without_overlap_only_the_load_counts() {
        let blind = Weights::DECODE.without_overlap();
        assert_eq!(cost(blind, queued(64), device(64)), cost(blind, queued(64), device(0)));
    }

    fn any_load() -> impl Strategy<Value = LoadView> {
        (0u32..200, 0u32..20, 0u64..200_000, 0u32..5000, 0u64..200_000, 0u64..100, 0u64..5000).prop_map(
            |(
                running,
                waiting,
                queued_prompt_tokens,
                kv_used,
                reserved_prompt_tokens,
                reserved_requests,
                active_blocks,
            )| {
                LoadView {
                    running,
                    waiting,
                    queued_prompt_tokens,
                    kv_used,
                    kv_total: 5000,
                    reserved_prompt_tokens,
                    reserved_requests,
                    active_blocks,
                }
            },
        )
    }

    fn any_overlap() -> impl Strategy<Value = Overlap> {
        (0u32..300, 0u32..300, 0u32..300).prop_map(|(device_blocks, host_blocks, disk_blocks)| Overlap {
            device_blocks,
            host_blocks,
            disk_blocks,
        })
    }

    fn any_job() -> impl Strategy<Value = Job> {
        (0u64..10_000, 1u32..129, 0u64..50_000).prop_map(|(prompt_tokens, block_tokens, overtakes_tokens)| Job {
            prompt_tokens,
            block_tokens,
            overtakes_tokens,
        })
    }

    fn any_weights() -> impl Strategy<Value = Weights> {
        prop_oneof![Just(Weights::PREFILL), Just(Weights::DECODE), Just(Weights::DECODE.without_overlap())]
    }

    /// For the rounding of blocks that are fractions.
    const ROUNDING: f64 = 1e-9;

    proptest! {
        #[test]
        fn more_overlap_never_makes_a_worker_cost_more(
            weights in any_weights(), job in any_job(), load in any_load(), floor in 0.0f64..1000.0,
            overlap in any_overlap(), more in any_overlap(),
        ) {
            let larger = Overlap {
                device_blocks: overlap.device_blocks + more.device_blocks,
                host_blocks: overlap.host_blocks + more.host_blocks,
                disk_blocks: overlap.disk_blocks + more.disk_blocks,
            };
            let before = terms(weights, job, load, overlap, floor).cost;
            prop_assert!(terms(weights, job, load, larger, floor).cost <= before * (1.0 + ROUNDING));
        }

        #[test]
        fn a_block_that_moves_to_a_faster_tier_never_makes_a_worker_cost_more(
            weights in any_weights(), job in any_job(), load in any_load(), floor in 0.0f64..1000.0, overlap in any_overlap(),
        ) {
            let faster = Overlap {
                device_blocks: overlap.device_blocks + overlap.host_blocks,
                host_blocks: overlap.disk_blocks,
                disk_blocks: 0,
            };
            let before = terms(weights, job, load, overlap, floor).cost;
            prop_assert!(terms(weights, job, load, faster, floor).cost <= before * (1.0 + ROUNDING));
        }

        #[test]
        fn more_load_never_makes_a_worker_cheaper(
            weights in any_weights(), job in any_job(), load in any_load(), more in any_load(), other in any_load(),
            overlap in any_overlap(),
        ) {
            let larger = load.plus(more);
            let at = |load: LoadView| {
                terms(weights, job, load, overlap, load_min(weights, job, [load, other].into_iter())).cost
            };
            prop_assert!(at(larger) >= at(load));
        }

        #[test]
        fn the_credit_is_never_more_than_the_work_saved(
            weights in any_weights(), job in any_job(), load in any_load(), overlap in any_overlap(), floor in 0.0f64..1000.0,
        ) {
            let terms = terms(weights, job, load, overlap, floor);
            let found = f64::from(overlap.device_blocks + overlap.host_blocks + overlap.disk_blocks);
            prop_assert!(terms.credit_blocks >= 0.0);
            prop_assert!(terms.credit_blocks <= found.min(terms.request_blocks) * (1.0 + ROUNDING));
            prop_assert!(terms.cost.is_finite() && terms.cost >= 0.0);
        }

        #[test]
        fn a_longer_jump_never_makes_a_worker_cost_more(
            weights in any_weights(), job in any_job(), load in any_load(), more in 0u64..50_000,
        ) {
            let further = Job { overtakes_tokens: job.overtakes_tokens + more, ..job };
            let at = |job| terms(weights, job, load, Overlap::default(), 0.0).cost;
            prop_assert!(at(further) <= at(job));
        }
    }
}
