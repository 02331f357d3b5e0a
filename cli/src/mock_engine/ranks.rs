//! The data-parallel ranks of a mock: which of them a request names, and what each has had. Pure.

use super::args::Contract;
use super::ask::Ask;
use super::leg::Leg;
use super::rooms::Room;
use super::rule::Rule;
use http::HeaderMap;
use serde_json::{Value, json};

/// The header in which vLLM is told the rank.
const RANK_HEADER: &str = baton_wire::names::headers::DATA_PARALLEL_RANK;

/// What the ranks have had since start or reset.
#[derive(Debug)]
pub(crate) struct Ranks {
    requests: Vec<[u64; Leg::ALL.len()]>,
    running: Vec<u64>,
    unnamed: u64,
}

impl Ranks {
    pub(crate) fn new(size: u32) -> Self {
        let size = size as usize;
        Ranks { requests: vec![[0; Leg::ALL.len()]; size], running: vec![0; size], unnamed: 0 }
    }

    /// A request goes to a rank, which it named or which was found for it.
    pub(crate) fn add(&mut self, rank: u32, leg: Leg, is_named: bool) {
        let place = rank as usize % self.running.len();
        self.requests[place][leg as usize] += 1;
        self.running[place] += 1;
        self.unnamed += u64::from(!is_named);
    }

    /// It has ended.
    pub(crate) fn take(&mut self, rank: u32) {
        let place = rank as usize % self.running.len();
        self.running[place] = self.running[place].saturating_sub(1);
    }

    /// Being served, by rank.
    pub(crate) fn running(&self) -> &[u64] {
        &self.running
    }

    /// Forgets all but what is being served.
    pub(crate) fn reset(&mut self) {
        let running = std::mem::take(&mut self.running);
        *self = Ranks { running, ..Ranks::new(self.requests.len() as u32) };
    }

    pub(crate) fn json(&self) -> Value {
        let of = |leg: Leg| self.requests.iter().map(|rank| rank[leg as usize]).collect::<Vec<u64>>();
        json!({
            "prefill": of(Leg::Prefill), "decode": of(Leg::Decode), "plain": of(Leg::Plain),
            "running": self.running, "unnamed": self.unnamed,
        })
    }
}

/// The rank that a request names, or nothing where it leaves that to the engine.
///
/// # Errors
/// When an engine with so many ranks has no such rank: the rule, and what was found.
pub(crate) fn named(
    contract: Contract,
    size: u32,
    headers: &HeaderMap,
    ask: &Ask<'_>,
) -> Result<Option<u32>, (Rule, String)> {
    let named = match contract {
        Contract::Baton => None,
        Contract::Sglang => ask.data_parallel_rank.or(ask.routed_dp_rank).map(|rank| rank.to_string()),
        Contract::Vllm => headers.get(RANK_HEADER).map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned()),
    };
    let Some(named) = named else { return Ok(None) };
    match named.parse() {
        Ok(rank) if rank < size => Ok(Some(rank)),
        _ => Err((Rule::RankOutOfRange, format!("{named} of {size}"))),
    }
}

/// The rank that belongs to a room, where an engine goes by rooms.
pub(crate) fn of_room(room: Room, size: u32) -> u32 {
    u32::try_from(room % Room::from(size)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named_in(contract: Contract, header: Option<&'static str>, body: &str) -> Result<Option<u32>, Rule> {
        let mut headers = HeaderMap::new();
        if let Some(value) = header {
            headers.insert(RANK_HEADER, http::HeaderValue::from_static(value));
        }
        let ask = Ask::read(body.as_bytes()).expect("a body");
        named(contract, 4, &headers, &ask).map_err(|(rule, _)| rule)
    }

    #[test]
    fn vllm_is_told_the_rank_in_a_header_and_sglang_in_the_body() {
        let body = r#"{"prompt":"a","data_parallel_rank":2}"#;
        assert_eq!(named_in(Contract::Vllm, Some("3"), body), Ok(Some(3)));
        assert_eq!(named_in(Contract::Vllm, None, body), Ok(None));
        assert_eq!(named_in(Contract::Sglang, Some("3"), body), Ok(Some(2)));
        assert_eq!(named_in(Contract::Sglang, None, r#"{"prompt":"a","routed_dp_rank":0}"#), Ok(Some(0)));
        assert_eq!(named_in(Contract::Baton, Some("3"), body), Ok(None));
    }

    #[test]
    fn a_rank_that_is_not_there_breaks_a_rule() {
        for header in ["4", "-1", "x", ""] {
            assert_eq!(named_in(Contract::Vllm, Some(header), "{}"), Err(Rule::RankOutOfRange), "{header}");
        }
        assert_eq!(named_in(Contract::Sglang, None, r#"{"data_parallel_rank":4}"#), Err(Rule::RankOutOfRange));
    }

    #[test]
    fn a_reset_keeps_what_is_being_served() {
        let mut ranks = Ranks::new(2);
        ranks.add(1, Leg::Decode, true);
        ranks.add(0, Leg::Prefill, false);
        assert_eq!((&ranks.json()["decode"], &ranks.json()["unnamed"]), (&json!([0, 1]), &json!(1)));
        ranks.take(0);
        ranks.reset();
        assert_eq!((ranks.running(), &ranks.json()["decode"]), (&[0, 1][..], &json!([0, 0])));
    }
}
