//! From all candidates to those among which a mode may choose: what a request asks for, who can be paired, who is well. Pure.
//!
//! Each step either leaves somebody or says why nobody is left; wishes (an adapter that is loaded, a worker that is not
//! overloaded) are dropped where they would leave nobody. The veto on overloaded workers holds for every mode: cached blocks
//! or a turn are no reason to join a queue that another worker does not have.

use super::candidate::{Candidate, LoadView};
use super::rank::{self, NoSuchRank};
use super::resolution::{PinError, Unavailable};
use super::{Request, WorkerId};

/// Indices of the candidates among which may be chosen; never empty.
///
/// # Errors
/// When nobody can serve, the first step that left nobody.
pub(super) fn considered(
    candidates: &[Candidate<'_>],
    request: &Request<'_>,
    load: impl Fn(&Candidate<'_>) -> LoadView,
) -> Result<Vec<usize>, Unavailable> {
    let mut left: Vec<usize> = (0..candidates.len()).collect();
    if left.is_empty() {
        return Err(Unavailable::NoWorker);
    }
    left.retain(|index| is_allowed(request, candidates[*index].id));
    if left.is_empty() {
        return Err(Unavailable::NoneAllowed);
    }
    let unpaired = left.iter().filter_map(|index| candidates[*index].pairs.err()).min();
    left.retain(|index| candidates[*index].pairs.is_ok());
    if let (true, Some(reason)) = (left.is_empty(), unpaired) {
        return Err(Unavailable::Unpaired(reason));
    }
    left.retain(|index| !candidates[*index].breaker_open);
    if left.is_empty() {
        return Err(Unavailable::BreakersOpen);
    }
    if let Some(asked) = request.dp_rank {
        let size = left.iter().map(|index| candidates[*index].dp_size.max(1)).max().unwrap_or(1);
        left.retain(|index| rank::has(&candidates[*index], request.dp_rank));
        if left.is_empty() {
            return Err(Unavailable::NoSuchRank(NoSuchRank { asked, size }));
        }
    }
    prefer(&mut left, |index| !load(&candidates[index]).is_overloaded());
    if let Some(lora) = request.lora {
        prefer(&mut left, |index| candidates[index].loras.contains(&lora));
    }
    Ok(left)
}

/// The candidate that the request names.
///
/// # Errors
/// When it can't serve. Overload is no reason: whoever names a worker has seen its load, or wants this one whatever it is.
pub(super) fn pinned(candidates: &[Candidate<'_>], request: &Request<'_>, id: WorkerId) -> Result<usize, PinError> {
    let index = candidates.iter().position(|candidate| candidate.id == id).ok_or(PinError::Absent)?;
    let candidate = &candidates[index];
    if !is_allowed(request, id) {
        return Err(PinError::NotAllowed);
    }
    candidate.pairs.map_err(PinError::Unpaired)?;
    if candidate.breaker_open {
        return Err(PinError::BreakerOpen);
    }
    match request.dp_rank {
        Some(asked) if !rank::has(candidate, Some(asked)) => {
            Err(PinError::NoSuchRank(NoSuchRank { asked, size: candidate.dp_size.max(1) }))
        }
        Some(_) | None => Ok(index),
    }
}

fn is_allowed(request: &Request<'_>, id: WorkerId) -> bool {
    request.allowed.is_none_or(|allowed| allowed.contains(&id))
}

/// Leaves those of whom it is true, where there are any.
fn prefer(left: &mut Vec<usize>, is_preferred: impl Fn(usize) -> bool) {
    if left.iter().any(|index| is_preferred(*index)) {
        left.retain(|index| is_preferred(*index));
    }
}

#[cfg(test)]
mod tests {
    use super::super::candidate::fixtures::{idle, overloaded};
    use super::super::fixtures::REQUEST;
    use super::*;
    use baton_wire::PathReason;

    fn left(candidates: &[Candidate<'_>], request: Request<'_>) -> Result<Vec<usize>, Unavailable> {
        considered(candidates, &request, |candidate| candidate.load)
    }

    #[test]
    fn the_first_step_that_leaves_nobody_is_the_reason() {
        let check = |candidates: &[Candidate<'_>], request, expect: Unavailable| {
            assert_eq!(left(candidates, request), Err(expect), "{candidates:?}");
        };
        let unpaired = |id, reason| Candidate { pairs: Err(reason), ..idle(id) };
        let open = |id| Candidate { breaker_open: true, ..idle(id) };
        check(&[], REQUEST, Unavailable::NoWorker);
        check(&[idle(0)], Request { allowed: Some(&[]), ..REQUEST }, Unavailable::NoneAllowed);
        check(&[idle(0)], Request { allowed: Some(&[WorkerId(1)]), ..REQUEST }, Unavailable::NoneAllowed);
        let mixed = [unpaired(0, PathReason::Protocol), unpaired(1, PathReason::FingerprintMismatch)];
        check(&mixed, REQUEST, Unavailable::Unpaired(PathReason::FingerprintMismatch));
        check(&[unpaired(0, PathReason::Protocol), open(1)], REQUEST, Unavailable::BreakersOpen);
        let wide = Candidate { dp_size: 4, ..idle(0) };
        let asks = Request { dp_rank: Some(4), ..REQUEST };
        check(&[wide, idle(1)], asks, Unavailable::NoSuchRank(NoSuchRank { asked: 4, size: 4 }));
    }

    #[test]
    fn wishes_are_heeded_while_they_leave_somebody() {
        let check = |candidates: &[Candidate<'_>], request, expect: &[usize]| {
            assert_eq!(left(candidates, request).as_deref(), Ok(expect), "{candidates:?}");
        };
        let with_lora = |candidate| Candidate { loras: &[77], ..candidate };
        let asks = Request { lora: Some(77), ..REQUEST };
        check(&[idle(0), overloaded(1), idle(2)], REQUEST, &[0, 2]);
        check(&[overloaded(0), overloaded(1)], REQUEST, &[0, 1]);
        check(&[idle(0), with_lora(idle(1))], asks, &[1]);
        check(&[idle(0), with_lora(idle(1))], REQUEST, &[0, 1]);
        check(&[idle(0), idle(1)], asks, &[0, 1]);
        check(&[idle(0), with_lora(overloaded(1))], asks, &[0]);
        check(&[idle(0), Candidate { dp_size: 2, ..idle(1) }], Request { dp_rank: Some(1), ..REQUEST }, &[1]);
    }

    #[test]
    fn a_pinned_worker_serves_or_says_why_not() {
        let check = |candidate: Candidate<'_>, request: Request<'_>, expect| {
            assert_eq!(pinned(&[idle(8), candidate], &request, WorkerId(3)), expect, "{candidate:?}");
        };
        check(idle(3), REQUEST, Ok(1));
        check(overloaded(3), REQUEST, Ok(1));
        check(idle(4), REQUEST, Err(PinError::Absent));
        check(idle(3), Request { allowed: Some(&[WorkerId(8)]), ..REQUEST }, Err(PinError::NotAllowed));
        let unpaired = Candidate { pairs: Err(PathReason::FingerprintMismatch), ..idle(3) };
        check(unpaired, REQUEST, Err(PinError::Unpaired(PathReason::FingerprintMismatch)));
        check(Candidate { breaker_open: true, ..idle(3) }, REQUEST, Err(PinError::BreakerOpen));
        let no_rank = PinError::NoSuchRank(NoSuchRank { asked: 1, size: 1 });
        check(idle(3), Request { dp_rank: Some(1), ..REQUEST }, Err(no_rank));
    }
}
