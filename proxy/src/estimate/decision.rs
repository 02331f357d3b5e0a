//! Whether a prompt is computed by the prefill worker that would be chosen or by the decode worker itself. Pure.
//!
//! ```text
//! remote iff  q_P + t_P(u_P) + x(n)  <  q_D + t_D(u_D) + i * t_D(u_D) * a
//!
//! u_P, u_D   tokens of the prompt that each worker has not cached
//! t_P, t_D   time to compute so many tokens there                                    measured, a fixed part and a slope
//! q_P, q_D   time until it is the prompt's turn: tokens ahead by t's slope, or the worker's usual wait where nobody counts
//! x(n)       from the prefill's end to the first token, for the n tokens that are moved                        measured
//! i          part of a local prefill for which each active decode stands still                                 measured
//! a          active decodes on the decode worker
//! ```
//!
//! A millisecond for which one running stream stands still counts as much as a millisecond that this request waits: both are
//! somebody's wait for a token.
//!
//! **Bounds.** Whatever is measured, a prompt below the floor stays (the manifest's threshold, or [`LOCAL_BELOW_TOKENS`]), and
//! one from [`REMOTE_FROM_TOKENS`] on is handed over: measures are of ordinary prompts, and a line that is drawn so far out
//! is a guess.
//!
//! **While a side is cold** (fewer than eight samples within five minutes, or none of nearly that length, see
//! `estimate/recent.rs`) static thresholds decide: the manifest's, or Dynamo's pair, by which a prompt stays if it is both
//! short (2,048 tokens) and in good part cached (less than 0.7 of it uncached), unless the decode worker is overloaded.
//!
//! **Exploration.** A side that is never tried is never measured. One request in [`EXPLORED_ONE_IN`] goes the other way, but
//! only near the margin, where going wrong costs little: where the estimates differ by less than half of the smaller one, or,
//! while cold, where the prompt is within a factor of four of the threshold. Farther out it would cost more than it tells. So at
//! most one request in 64 is made slower, and once all is known by at most half; a side that is clearly slower gets its next
//! chance when its samples are stale and the static thresholds decide again, which costs it
//! [`WARM_MIN`](super::recent::WARM_MIN) requests each five minutes.

use super::{Known, Policy};
use crate::select::WorkerKey;
use baton_wire::{PathReason, Role};

/// Uncached tokens below which a prompt is not handed over where the manifest names no threshold: two blocks of the usual
/// size. Two more calls and a connection take longer than computing them.
pub(crate) const LOCAL_BELOW_TOKENS: u64 = 64;

/// Uncached tokens from which on a prompt is always handed over under the conditional policy: a decode worker would stand
/// still for seconds.
pub(crate) const REMOTE_FROM_TOKENS: u64 = 32_768;

/// While cold: prompts of fewer uncached tokens may stay (Dynamo's default).
const COLD_UNCACHED_TOKENS: u64 = 2048;

/// While cold: prompts of which less than so many tenths are uncached may stay (Dynamo's default).
const COLD_UNCACHED_TENTHS: u64 = 7;

/// One request in so many goes the other way near the margin: even were each of them half slower, the mean would be by less
/// than a hundredth.
const EXPLORED_ONE_IN: u64 = 64;

/// The estimates are near each other up to this factor.
const NEAR_FACTOR: f64 = 1.5;

/// While cold, a prompt is near the threshold up to this factor.
const COLD_NEAR_FACTOR: u64 = 4;

/// The part of a local prefill for which active decodes stand still, while it is not measured: an engine that computes
/// prompts in chunks lets others go on more slowly, one that doesn't stops them, so half.
const STANDSTILL_UNMEASURED: f64 = 0.5;

/// What a decision is made from, beside the policy and what is measured.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub(crate) struct Inputs {
    /// The decode worker that was chosen.
    pub(crate) decode_worker: WorkerKey,
    /// The prefill worker that would be.
    pub(crate) prefill_worker: WorkerKey,
    /// Of the decode worker.
    pub(crate) decode_role: Role,
    /// Whether the request names its prefill worker.
    pub(crate) prefill_pinned: bool,
    /// Whether the connector can hand over what it asks for, or why not.
    pub(crate) handover: Result<(), PathReason>,
    /// Of all its prompts.
    pub(crate) prompt_tokens: u64,
    /// Of them, not in the decode worker's cache.
    pub(crate) uncached_on_decode: u64,
    /// Of them, not in the prefill worker's cache.
    pub(crate) uncached_on_prefill: u64,
    /// Of them, moved in a handover: all, or those that the decode worker lacks where the connector moves only these.
    pub(crate) moved_tokens: u64,
    /// Prompt tokens ahead on the prefill worker, as selection counts them; absent where it is not known.
    pub(crate) ahead_on_prefill: Option<u64>,
    /// Prompt tokens ahead on the decode worker.
    pub(crate) ahead_on_decode: Option<u64>,
    /// Sequences that the decode worker generates for.
    pub(crate) active_decodes: u64,
    /// Whether new work is better sent elsewhere than to the decode worker.
    pub(crate) decode_overloaded: bool,
    /// 64 random bits, others than those by which the workers were chosen.
    pub(crate) draw: u64,
}

/// Where the prompt is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Plan {
    /// On the prefill worker.
    Remote,
    /// On the decode worker.
    Local(LocalReason),
}

/// Why a prompt stays with the decode worker. A closed list: these are metric labels too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize)]
#[serde(into = "&'static str")]
pub(crate) enum LocalReason {
    /// The worker serves both phases.
    Aggregated,
    /// The policy is to never hand over.
    PolicyNever,
    /// It is below the threshold.
    ShortPrompt,
    /// The connector can't hand over what the request asks for.
    NoHandover(PathReason),
    /// It takes less time there.
    CheaperLocal,
    /// It takes less time there because of the prefill worker's queue, and would not without.
    PrefillBusy,
    /// To measure how long it takes there.
    Exploration,
}

impl LocalReason {
    /// The reason as headers and metric labels spell it.
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            LocalReason::Aggregated => "aggregated",
            LocalReason::PolicyNever => "policy-never",
            LocalReason::ShortPrompt => "short-prompt",
            LocalReason::NoHandover(reason) => reason.as_str(),
            LocalReason::CheaperLocal => "cheaper-local",
            LocalReason::PrefillBusy => "prefill-busy",
            LocalReason::Exploration => "exploration",
        }
    }

    /// The reason as clients and other workers know it. They have one word for what was decided by time.
    pub(crate) const fn path_reason(self) -> PathReason {
        match self {
            LocalReason::Aggregated => PathReason::Aggregated,
            LocalReason::PolicyNever => PathReason::PolicyNever,
            LocalReason::ShortPrompt => PathReason::ShortPrompt,
            LocalReason::NoHandover(reason) => reason,
            LocalReason::CheaperLocal | LocalReason::PrefillBusy | LocalReason::Exploration => PathReason::CheaperLocal,
        }
    }
}

impl From<LocalReason> for &'static str {
    fn from(reason: LocalReason) -> Self {
        reason.as_str()
    }
}

/// What decided. A closed list: these are metric labels too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum By {
    /// The policy, or what the workers can do at all.
    Policy,
    /// The request named its prefill worker.
    Pinned,
    /// The floor or the ceiling.
    Bounds,
    /// Both estimates.
    Measured,
    /// The static thresholds.
    ColdStart,
    /// The draw, against the estimates or the static thresholds.
    Exploration,
}

impl By {
    /// As JSON and metric labels spell it.
    #[cfg(test)]
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            By::Policy => "policy",
            By::Pinned => "pinned",
            By::Bounds => "bounds",
            By::Measured => "measured",
            By::ColdStart => "cold-start",
            By::Exploration => "exploration",
        }
    }
}

/// What a remote prefill would take, in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub(crate) struct RemoteEstimate {
    /// Until it is the prompt's turn.
    pub(crate) queue_ms: f64,
    /// Computing it.
    pub(crate) prefill_ms: f64,
    /// From then to the first token.
    pub(crate) transfer_ms: f64,
}

impl RemoteEstimate {
    fn total_ms(self) -> f64 {
        self.queue_ms + self.prefill_ms + self.transfer_ms
    }
}

/// What a local prefill would take, in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub(crate) struct LocalEstimate {
    /// Until it is the prompt's turn.
    pub(crate) queue_ms: f64,
    /// Computing it.
    pub(crate) prefill_ms: f64,
    /// For which others would stand still, all of them together.
    pub(crate) standstill_ms: f64,
}

impl LocalEstimate {
    fn total_ms(self) -> f64 {
        self.queue_ms + self.prefill_ms + self.standstill_ms
    }
}

/// A decision with everything that it was made from, for the debug page.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub(crate) struct Decision {
    /// Where.
    pub(crate) plan: Plan,
    /// What decided.
    pub(crate) by: By,
    /// The policy.
    pub(crate) policy: Policy,
    /// What it was made from.
    pub(crate) inputs: Inputs,
    /// The remote side; absent while it is cold.
    pub(crate) estimate_remote_ms: Option<f64>,
    /// The local side; absent while it is cold.
    pub(crate) estimate_local_ms: Option<f64>,
    /// What the remote side is made of.
    pub(crate) remote: Option<RemoteEstimate>,
    /// What the local side is made of.
    pub(crate) local: Option<LocalEstimate>,
}

/// Decides. What comes first is what a person would change first: the worker's role, the policy, the request, the prompt.
pub(super) fn decide(policy: Policy, inputs: Inputs, prefill: Known, decode: Known) -> Decision {
    let remote = remote_estimate(&inputs, &prefill);
    let local = local_estimate(&inputs, &decode);
    let (plan, by) = match policy {
        _ if inputs.decode_role == Role::PrefillDecode => (Plan::Local(LocalReason::Aggregated), By::Policy),
        Policy::Never => (Plan::Local(LocalReason::PolicyNever), By::Policy),
        Policy::Always | Policy::Conditional { .. } => match (inputs.handover, policy) {
            (Err(reason), _) => (Plan::Local(LocalReason::NoHandover(reason)), By::Policy),
            (Ok(()), Policy::Conditional { .. }) if inputs.prefill_pinned => (Plan::Remote, By::Pinned),
            (Ok(()), Policy::Conditional { min_uncached_prompt_tokens }) => {
                by_cost(min_uncached_prompt_tokens, &inputs, remote, local)
            }
            (Ok(()), Policy::Always | Policy::Never) => (Plan::Remote, By::Policy),
        },
    };
    let estimate_remote_ms = remote.map(RemoteEstimate::total_ms);
    let estimate_local_ms = local.map(LocalEstimate::total_ms);
    Decision { plan, by, policy, inputs, estimate_remote_ms, estimate_local_ms, remote, local }
}

fn by_cost(
    threshold: Option<u64>,
    inputs: &Inputs,
    remote: Option<RemoteEstimate>,
    local: Option<LocalEstimate>,
) -> (Plan, By) {
    let uncached = inputs.uncached_on_decode;
    // The floor comes before the ceiling: a manifest may set it as high as it likes.
    if uncached < threshold.unwrap_or(LOCAL_BELOW_TOKENS) {
        return (Plan::Local(LocalReason::ShortPrompt), By::Bounds);
    }
    if uncached >= REMOTE_FROM_TOKENS {
        return (Plan::Remote, By::Bounds);
    }
    let (plan, by, is_near) = match (remote, local) {
        (Some(remote), Some(local)) => {
            let (remote_ms, local_ms) = (remote.total_ms(), local.total_ms());
            let is_near = remote_ms.max(local_ms) <= remote_ms.min(local_ms) * NEAR_FACTOR;
            (cheaper(remote, local), By::Measured, is_near)
        }
        (None, _) | (_, None) => {
            let around = threshold.unwrap_or(COLD_UNCACHED_TOKENS);
            let is_near = uncached <= around.saturating_mul(COLD_NEAR_FACTOR) && uncached >= around / COLD_NEAR_FACTOR;
            (static_plan(threshold, inputs), By::ColdStart, is_near)
        }
    };
    let explores = is_near && inputs.draw.is_multiple_of(EXPLORED_ONE_IN);
    match plan {
        Plan::Local(_) if explores => (Plan::Remote, By::Exploration),
        // A worker that is overloaded is not given more for the sake of a measurement, which would be of the overload.
        Plan::Remote if explores && !inputs.decode_overloaded => {
            (Plan::Local(LocalReason::Exploration), By::Exploration)
        }
        Plan::Local(_) | Plan::Remote => (plan, by),
    }
}

fn cheaper(remote: RemoteEstimate, local: LocalEstimate) -> Plan {
    if remote.total_ms() < local.total_ms() {
        Plan::Remote
    } else if remote.total_ms() - remote.queue_ms < local.total_ms() {
        Plan::Local(LocalReason::PrefillBusy)
    } else {
        Plan::Local(LocalReason::CheaperLocal)
    }
}

fn static_plan(threshold: Option<u64>, inputs: &Inputs) -> Plan {
    let uncached = inputs.uncached_on_decode;
    let is_short = uncached < COLD_UNCACHED_TOKENS;
    let is_well_cached = uncached * 10 < inputs.prompt_tokens.saturating_mul(COLD_UNCACHED_TENTHS);
    if threshold.is_none() && is_short && is_well_cached && !inputs.decode_overloaded {
        Plan::Local(LocalReason::ShortPrompt)
    } else {
        Plan::Remote
    }
}

fn remote_estimate(inputs: &Inputs, prefill: &Known) -> Option<RemoteEstimate> {
    let line = prefill.prefill?.reaching(inputs.uncached_on_prefill)?;
    Some(RemoteEstimate {
        queue_ms: queue_ms(inputs.ahead_on_prefill, line.ms_per_token, prefill.wait_ms),
        prefill_ms: line.at(inputs.uncached_on_prefill),
        transfer_ms: prefill.transfer?.reaching(inputs.moved_tokens)?.at(inputs.moved_tokens),
    })
}

fn local_estimate(inputs: &Inputs, decode: &Known) -> Option<LocalEstimate> {
    let line = decode.local_prefill?.reaching(inputs.uncached_on_decode)?;
    let prefill_ms = line.at(inputs.uncached_on_decode);
    let standstill = decode.standstill.unwrap_or(STANDSTILL_UNMEASURED);
    Some(LocalEstimate {
        queue_ms: queue_ms(inputs.ahead_on_decode, line.ms_per_token, decode.local_wait_ms),
        prefill_ms,
        standstill_ms: standstill * prefill_ms * inputs.active_decodes as f64,
    })
}

/// What is counted now says more than what was usual.
fn queue_ms(tokens_ahead: Option<u64>, ms_per_token: f64, usual_ms: Option<f64>) -> f64 {
    tokens_ahead.map_or(usual_ms.unwrap_or(0.0), |tokens| tokens as f64 * ms_per_token)
}

#[cfg(test)]
mod tests {
    use super::super::Line;
    use super::*;
    use proptest::prelude::*;

    /// A draw that explores, and one that does not.
    const EXPLORES: u64 = 64;
    const STAYS: u64 = 1;

    const CONDITIONAL: Policy = Policy::Conditional { min_uncached_prompt_tokens: None };

    const COLD: Known = Known {
        prefill: None,
        transfer: None,
        wait_ms: None,
        local_prefill: None,
        local_wait_ms: None,
        standstill: None,
    };

    const fn line(fixed_ms: f64, ms_per_token: f64) -> Line {
        Line { fixed_ms, ms_per_token, reach_tokens: u64::MAX }
    }

    /// 0.05 ms a token, 10 ms for the way, 0.01 ms a token for the transfer.
    const PREFILL: Known = Known { prefill: Some(line(0.0, 0.05)), transfer: Some(line(10.0, 0.01)), ..COLD };

    /// 0.1 ms a token.
    const DECODE: Known = Known { local_prefill: Some(line(0.0, 0.1)), standstill: Some(0.5), ..COLD };

    const INPUTS: Inputs = Inputs {
        decode_worker: WorkerKey(1),
        prefill_worker: WorkerKey(2),
        decode_role: Role::Decode,
        prefill_pinned: false,
        handover: Ok(()),
        prompt_tokens: 1000,
        uncached_on_decode: 1000,
        uncached_on_prefill: 1000,
        moved_tokens: 1000,
        ahead_on_prefill: Some(0),
        ahead_on_decode: Some(0),
        active_decodes: 0,
        decode_overloaded: false,
        draw: STAYS,
    };

    fn of_tokens(tokens: u64) -> Inputs {
        Inputs {
            prompt_tokens: tokens,
            uncached_on_decode: tokens,
            uncached_on_prefill: tokens,
            moved_tokens: tokens,
            ..INPUTS
        }
    }

    fn check(policy: Policy, inputs: Inputs, sides: (Known, Known), plan: Plan, by: By) {
        let decision = decide(policy, inputs, sides.0, sides.1);
        assert_eq!((decision.plan, decision.by), (plan, by), "{policy:?} {inputs:?}");
    }

    #[test]
    fn what_is_not_a_matter_of_time_comes_first() {
        let warm = (PREFILL, DECODE);
        let local = |reason| Plan::Local(reason);
        let both = Inputs { decode_role: Role::PrefillDecode, prefill_pinned: true, ..INPUTS };
        let choices = Inputs { handover: Err(PathReason::Protocol), prefill_pinned: true, ..INPUTS };
        let pinned = Inputs { prefill_pinned: true, ..of_tokens(1) };
        for policy in [Policy::Always, Policy::Never, CONDITIONAL] {
            check(policy, both, warm, local(LocalReason::Aggregated), By::Policy);
        }
        check(Policy::Never, pinned, warm, local(LocalReason::PolicyNever), By::Policy);
        check(Policy::Always, of_tokens(1), warm, Plan::Remote, By::Policy);
        check(Policy::Always, choices, warm, local(LocalReason::NoHandover(PathReason::Protocol)), By::Policy);
        check(CONDITIONAL, choices, warm, local(LocalReason::NoHandover(PathReason::Protocol)), By::Policy);
        check(CONDITIONAL, pinned, warm, Plan::Remote, By::Pinned);
    }

    #[test]
    fn the_faster_side_computes_the_prompt() {
        // Remote takes 10 + 0.06 n, local 0.1 n: equal at 250.
        let warm = (PREFILL, DECODE);
        let cheaper = Plan::Local(LocalReason::CheaperLocal);
        check(CONDITIONAL, of_tokens(240), warm, cheaper, By::Measured);
        check(CONDITIONAL, of_tokens(250), warm, cheaper, By::Measured);
        check(CONDITIONAL, of_tokens(260), warm, Plan::Remote, By::Measured);
        let busy = Plan::Local(LocalReason::PrefillBusy);
        check(CONDITIONAL, Inputs { ahead_on_prefill: Some(5000), ..INPUTS }, warm, busy, By::Measured);
        let both_busy = Inputs { ahead_on_prefill: Some(5000), ahead_on_decode: Some(5000), ..INPUTS };
        check(CONDITIONAL, both_busy, warm, Plan::Remote, By::Measured);
        check(CONDITIONAL, Inputs { active_decodes: 1, ..of_tokens(240) }, warm, Plan::Remote, By::Measured);
        let cached_there = Inputs { uncached_on_decode: 100, ..INPUTS };
        check(CONDITIONAL, cached_there, warm, cheaper, By::Measured);
        let cached_remotely = Inputs { uncached_on_prefill: 0, moved_tokens: 240, ..of_tokens(240) };
        check(CONDITIONAL, cached_remotely, warm, Plan::Remote, By::Measured);
    }

    #[test]
    fn the_usual_wait_stands_in_where_nobody_counts_the_queue() {
        let unknown = Inputs { ahead_on_prefill: None, ..INPUTS };
        check(CONDITIONAL, unknown, (PREFILL, DECODE), Plan::Remote, By::Measured);
        let waits = Known { wait_ms: Some(50.0), ..PREFILL };
        check(CONDITIONAL, unknown, (waits, DECODE), Plan::Local(LocalReason::PrefillBusy), By::Measured);
        check(CONDITIONAL, INPUTS, (waits, DECODE), Plan::Remote, By::Measured);
    }

    #[test]
    fn standstill_counts_with_half_until_it_is_measured() {
        let unmeasured = Known { standstill: None, ..DECODE };
        let inputs = Inputs { active_decodes: 4, ..INPUTS };
        let standstill = |decode| decide(CONDITIONAL, inputs, PREFILL, decode).local.map(|local| local.standstill_ms);
        assert_eq!(standstill(unmeasured), Some(200.0));
        assert_eq!(standstill(Known { standstill: Some(0.25), ..DECODE }), Some(100.0));
    }

    #[test]
    fn bounds_hold_whatever_is_measured() {
        let short = Plan::Local(LocalReason::ShortPrompt);
        let threshold = Policy::Conditional { min_uncached_prompt_tokens: Some(256) };
        for draw in [STAYS, EXPLORES] {
            for sides in [(PREFILL, DECODE), (COLD, COLD)] {
                let check =
                    |policy, tokens, plan| check(policy, Inputs { draw, ..of_tokens(tokens) }, sides, plan, By::Bounds);
                check(CONDITIONAL, LOCAL_BELOW_TOKENS - 1, short);
                check(CONDITIONAL, REMOTE_FROM_TOKENS, Plan::Remote);
                check(threshold, 255, short);
                check(threshold, REMOTE_FROM_TOKENS, Plan::Remote);
                check(Policy::Conditional { min_uncached_prompt_tokens: Some(u64::MAX) }, REMOTE_FROM_TOKENS, short);
            }
        }
    }

    #[test]
    fn static_thresholds_decide_while_a_side_is_cold() {
        let short = Plan::Local(LocalReason::ShortPrompt);
        let untransferred = Known { transfer: None, ..PREFILL };
        for sides in [(COLD, COLD), (PREFILL, COLD), (COLD, DECODE), (untransferred, DECODE)] {
            let cold = |policy, inputs, plan| check(policy, inputs, sides, plan, By::ColdStart);
            let cached = |prompt_tokens, uncached_on_decode| Inputs { prompt_tokens, uncached_on_decode, ..INPUTS };
            cold(CONDITIONAL, cached(4000, 2047), short);
            cold(CONDITIONAL, cached(4000, 2048), Plan::Remote);
            cold(CONDITIONAL, cached(1000, 699), short);
            cold(CONDITIONAL, cached(1000, 700), Plan::Remote);
            cold(CONDITIONAL, Inputs { decode_overloaded: true, ..cached(1000, 100) }, Plan::Remote);
            let threshold = Policy::Conditional { min_uncached_prompt_tokens: Some(256) };
            cold(threshold, cached(1000, 256), Plan::Remote);
        }
    }

    #[test]
    fn a_side_is_cold_for_prompts_longer_than_its_line_reaches() {
        let short = |line: Option<Line>| line.map(|line| Line { reach_tokens: 999, ..line });
        let prefill = Known { prefill: short(PREFILL.prefill), ..PREFILL };
        let transfer = Known { transfer: short(PREFILL.transfer), ..PREFILL };
        let decode = Known { local_prefill: short(DECODE.local_prefill), ..DECODE };
        for sides in [(prefill, DECODE), (transfer, DECODE), (PREFILL, decode)] {
            check(CONDITIONAL, of_tokens(999), sides, Plan::Remote, By::Measured);
            check(CONDITIONAL, of_tokens(1000), sides, Plan::Remote, By::ColdStart);
        }
    }

    #[test]
    fn the_other_side_is_tried_at_times_near_the_margin() {
        let explored = |inputs: Inputs, sides, plan| {
            check(CONDITIONAL, Inputs { draw: EXPLORES, ..inputs }, sides, plan, By::Exploration);
        };
        let not_explored = |inputs: Inputs, sides, plan, by| {
            check(CONDITIONAL, Inputs { draw: EXPLORES, ..inputs }, sides, plan, by);
        };
        let warm = (PREFILL, DECODE);
        let stays = Plan::Local(LocalReason::Exploration);
        explored(of_tokens(300), warm, stays);
        explored(of_tokens(200), warm, Plan::Remote);
        not_explored(of_tokens(100), warm, Plan::Local(LocalReason::CheaperLocal), By::Measured);
        not_explored(of_tokens(5000), warm, Plan::Remote, By::Measured);
        let cold = (COLD, COLD);
        explored(of_tokens(512), cold, stays);
        explored(of_tokens(8192), cold, stays);
        explored(Inputs { prompt_tokens: 9000, ..of_tokens(1000) }, cold, Plan::Remote);
        not_explored(of_tokens(511), cold, Plan::Remote, By::ColdStart);
        not_explored(of_tokens(8193), cold, Plan::Remote, By::ColdStart);
        not_explored(Inputs { decode_overloaded: true, ..of_tokens(300) }, warm, Plan::Remote, By::Measured);
        not_explored(Inputs { decode_overloaded: true, ..of_tokens(2000) }, cold, Plan::Remote, By::ColdStart);
    }

    #[test]
    fn a_decision_explains_itself_in_json() {
        let json = serde_json::to_value(decide(CONDITIONAL, INPUTS, PREFILL, DECODE)).expect("it serialises");
        assert_eq!((&json["plan"], &json["by"]), (&"remote".into(), &"measured".into()));
        assert_eq!(json["policy"]["conditional"]["min_uncached_prompt_tokens"], serde_json::Value::Null);
        assert_eq!(json["inputs"]["uncached_on_decode"], 1000);
        assert_eq!((&json["estimate_remote_ms"], &json["estimate_local_ms"]), (&70.0.into(), &100.0.into()));
        assert_eq!((&json["remote"]["transfer_ms"], &json["local"]["standstill_ms"]), (&20.0.into(), &0.0.into()));
        let cold = serde_json::to_value(decide(Policy::Never, INPUTS, COLD, COLD)).expect("it serialises");
        assert_eq!((&cold["plan"]["local"], &cold["remote"]), (&"policy-never".into(), &serde_json::Value::Null));
    }

    #[test]
    fn labels_are_spelled_as_in_json() {
        let reasons = [
            LocalReason::Aggregated,
            LocalReason::PolicyNever,
            LocalReason::ShortPrompt,
            LocalReason::NoHandover(PathReason::Corrupt),
            LocalReason::CheaperLocal,
            LocalReason::PrefillBusy,
            LocalReason::Exploration,
        ];
        for reason in reasons {
            assert_eq!(serde_json::to_value(reason).expect("it serialises"), reason.as_str());
            let is_by_time = reason.path_reason() == PathReason::CheaperLocal;
            assert!(is_by_time || reason.path_reason().as_str() == reason.as_str());
        }
        for by in [By::Policy, By::Pinned, By::Bounds, By::Measured, By::ColdStart, By::Exploration] {
            assert_eq!(serde_json::to_value(by).expect("it serialises"), by.as_str());
        }
    }

    fn any_line() -> impl Strategy<Value = Line> {
        (0.0f64..50.0, 0.0f64..1.0).prop_map(|(fixed_ms, ms_per_token)| line(fixed_ms, ms_per_token))
    }

    fn any_sides() -> impl Strategy<Value = (Known, Known)> {
        let maybe = || prop::option::weighted(0.8, any_line());
        (maybe(), maybe(), maybe(), prop::option::of(0.0f64..1.0)).prop_map(
            |(prefill, transfer, local_prefill, standstill)| {
                (Known { prefill, transfer, ..COLD }, Known { local_prefill, standstill, ..COLD })
            },
        )
    }

    fn any_inputs() -> impl Strategy<Value = Inputs> {
        (1u64..40_000, 0.0f64..=1.0, 0.0f64..=1.0, 0u64..20_000, 0u64..20_000, 0u64..100, any::<u64>()).prop_map(
            |(prompt_tokens, on_decode, on_prefill, ahead_on_prefill, ahead_on_decode, active_decodes, draw)| Inputs {
                prompt_tokens,
                uncached_on_decode: (prompt_tokens as f64 * on_decode) as u64,
                uncached_on_prefill: (prompt_tokens as f64 * on_prefill) as u64,
                moved_tokens: prompt_tokens,
                ahead_on_prefill: Some(ahead_on_prefill),
                ahead_on_decode: Some(ahead_on_decode),
                active_decodes,
                draw,
                ..INPUTS
            },
        )
    }

    proptest! {
        #[test]
        fn measured_decisions_are_the_rule(inputs in any_inputs(), sides in any_sides()) {
            let decision = decide(CONDITIONAL, inputs, sides.0, sides.1);
            if decision.by == By::Measured {
                let remote_is_faster = decision.estimate_remote_ms < decision.estimate_local_ms;
                prop_assert_eq!(decision.plan == Plan::Remote, remote_is_faster);
            }
            let is_warm = decision.remote.is_some() && decision.local.is_some();
            prop_assert!(decision.by != By::ColdStart || !is_warm);
            prop_assert!(decision.by != By::Measured || is_warm);
        }

        #[test]
        fn more_ahead_on_the_prefill_worker_never_makes_a_prompt_remote(
            inputs in any_inputs(), sides in any_sides(), more in 0u64..50_000,
        ) {
            let inputs = Inputs { draw: STAYS, ..inputs };
            let longer = Inputs { ahead_on_prefill: inputs.ahead_on_prefill.map(|ahead| ahead + more), ..inputs };
            if decide(CONDITIONAL, inputs, sides.0, sides.1).plan != Plan::Remote {
                prop_assert!(decide(CONDITIONAL, longer, sides.0, sides.1).plan != Plan::Remote);
            }
        }

        #[test]
        fn more_on_the_decode_worker_never_makes_a_prompt_local(
            inputs in any_inputs(), sides in any_sides(), more_ahead in 0u64..50_000, more_active in 0u64..200,
        ) {
            let inputs = Inputs { draw: STAYS, ..inputs };
            let busier = Inputs {
                ahead_on_decode: inputs.ahead_on_decode.map(|ahead| ahead + more_ahead),
                active_decodes: inputs.active_decodes + more_active,
                ..inputs
            };
            if decide(CONDITIONAL, inputs, sides.0, sides.1).plan == Plan::Remote {
                prop_assert_eq!(decide(CONDITIONAL, busier, sides.0, sides.1).plan, Plan::Remote);
            }
        }

        #[test]
        fn a_higher_threshold_never_makes_a_warm_prompt_remote(inputs in any_inputs(), lower in 64u64..9000, more in 0u64..9000) {
            let at = |threshold| {
                let policy = Policy::Conditional { min_uncached_prompt_tokens: Some(threshold) };
                decide(policy, inputs, PREFILL, DECODE).plan
            };
            if at(lower) != Plan::Remote {
                prop_assert!(at(lower + more) != Plan::Remote);
            }
        }

        #[test]
        fn exploration_is_rare_bounded_and_the_only_difference_a_draw_makes(inputs in any_inputs(), sides in any_sides()) {
            let with = |draw| decide(CONDITIONAL, Inputs { draw, ..inputs }, sides.0, sides.1);
            let usual = with(STAYS);
            let differing = (0..640u64).filter(|draw| with(*draw).plan != usual.plan).count();
            prop_assert!(differing == 0 || differing == 10, "{differing}");
            let explored = with(EXPLORES);
            if let (true, Some(remote), Some(local)) =
                (explored.by == By::Exploration, explored.estimate_remote_ms, explored.estimate_local_ms)
            {
                prop_assert!(remote.max(local) <= remote.min(local) * NEAR_FACTOR);
            }
        }

        #[test]
        fn no_inputs_break_a_decision(tokens: u64, ahead: u64, active_decodes: u64, draw: u64, sides in any_sides()) {
            let inputs = Inputs {
                ahead_on_prefill: Some(ahead),
                ahead_on_decode: Some(ahead),
                active_decodes,
                draw,
                ..of_tokens(tokens)
            };
            let decision = decide(CONDITIONAL, inputs, sides.0, sides.1);
            prop_assert!(decision.estimate_remote_ms.is_none_or(f64::is_finite));
            prop_assert!(decision.estimate_local_ms.is_none_or(f64::is_finite));
        }
    }
}
