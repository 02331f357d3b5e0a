//! The protocol of SGLang's disaggregation: both workers are sent the same request at the same time, with the address
//! of the prefill worker's bootstrap server and a room there in which the two find each other.
//!
//! The prefill worker holds its answer back until the decode worker has come, so neither leg may wait for the other. A
//! room belongs to one attempt: two requests in one room bring both workers' schedulers down, which is why a room that
//! the client sends is never passed on and why every attempt draws its own.

use crate::api::Hints;
use crate::json::scan::{DEPTH_MAX, Object, elements, scan};
use crate::json::splice::{Change, splice, splice_pieces};
use crate::payload::Payload;
use bytes::Bytes;
use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::net::Ipv6Addr;

/// Rooms have 63 bits: SGLang keeps them as signed numbers.
const ROOM_MAX: u64 = i64::MAX as u64;

/// Rooms of one request at most, one for each prompt and choice. Their three arrays take about 100 bytes each, so 400
/// KB for a request that asked for this many.
pub(crate) const ROOMS_MAX: u64 = 4096;

/// Bytes of a merged answer at most. An entry of log probabilities takes about 30 bytes, so this is a prompt of 500,000
/// tokens without alternatives; a longer one stays with the decode worker's own.
const MERGED_BYTES_MAX: usize = 16 << 20;

/// What only this proxy may say, in either leg. Beside the rooms these are switches that a prefill worker would take
/// from anyone.
const OURS: [(&str, Change<'static>); 5] = [
    ("bootstrap_host", Change::Remove),
    ("bootstrap_port", Change::Remove),
    ("bootstrap_room", Change::Remove),
    ("bootstrap_pair_key", Change::Remove),
    ("disagg_prefill_dp_rank", Change::Remove),
];

/// Where the two workers of a request find each other.
#[derive(Debug)]
pub(crate) struct Bootstrap<'a, R> {
    /// The prefill worker's host: a name or an address, an IPv6 one with or without its brackets.
    pub(crate) host: &'a str,
    /// Of its bootstrap server, where it isn't the engine's default.
    pub(crate) port: Option<u16>,
    /// Draws a random number for each room.
    pub(crate) rooms: R,
}

/// The data-parallel ranks that the legs are pinned to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ranks {
    /// The prefill leg's.
    pub(crate) prefill: Option<PrefillRank>,
    /// The decode leg's.
    pub(crate) decode: Option<u32>,
}

/// The rank of a prefill leg.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PrefillRank {
    /// Which one.
    pub(crate) rank: u32,
    /// Of how many, if that is known. An engine may take the rank from the room (room modulo ranks) and refuse a
    /// request whose room says another one, so rooms are chosen to agree.
    pub(crate) of: Option<u32>,
}

/// The bodies of the two legs; the same bytes unless a rank is pinned.
#[derive(Clone, Debug)]
pub(crate) struct Legs {
    /// To the prefill worker.
    pub(crate) prefill: Payload,
    /// To the decode worker.
    pub(crate) decode: Payload,
}

/// The request asks for more than there are rooms for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{prompts} prompts with {choices} choices each are more than {ROOMS_MAX}")]
pub(crate) struct TooManyRooms {
    /// Prompts in the request.
    pub(crate) prompts: u64,
    /// Choices for each.
    pub(crate) choices: u64,
}

/// Both legs of one attempt. `hints` are those of the same request.
///
/// # Errors
/// The request asks for too many prompts and choices.
pub(crate) fn legs(
    object: &Object,
    hints: &Hints<'_>,
    bootstrap: Bootstrap<'_, impl FnMut() -> u64>,
    ranks: Ranks,
) -> Result<Legs, TooManyRooms> {
    let Hints { prompts, choices, batch, .. } = *hints;
    let count = prompts.max(1).saturating_mul(choices.max(1));
    if count > ROOMS_MAX {
        return Err(TooManyRooms { prompts, choices });
    }
    let Bootstrap { host, port, rooms } = bootstrap;
    let host = quoted(host);
    let port = port.map_or_else(|| "null".to_owned(), |port| port.to_string());
    let rooms = draw(count, rooms, ranks.prefill).into_iter().map(|room| room.to_string());
    // A batch has one of each for every request that the engine makes of it.
    let [host, port, room] = if batch || count > 1 {
        let repeated = |text: String| list((0..count).map(|_| text.as_str()));
        let rooms: Vec<String> = rooms.collect();
        [repeated(host), repeated(port), list(rooms.iter().map(String::as_str))]
    } else {
        [host, port, rooms.collect()]
    };
    let body = |rank: Option<u32>, prefill_rank: Option<u32>| {
        let rank = rank.map(|rank| rank.to_string());
        let prefill_rank = prefill_rank.map(|rank| rank.to_string());
        splice_pieces(
            object,
            &[
                ("bootstrap_host", Change::Set(host.as_bytes())),
                ("bootstrap_port", Change::Set(port.as_bytes())),
                ("bootstrap_room", Change::Set(room.as_bytes())),
                ("bootstrap_pair_key", Change::Remove),
                // A rank of the client's means one leg's pool and would be wrong in the other's.
                ("data_parallel_rank", pinned(rank.as_deref())),
                ("routed_dp_rank", Change::Remove),
                ("disagg_prefill_dp_rank", pinned(prefill_rank.as_deref())),
            ],
        )
    };
    let prefill_rank = ranks.prefill.map(|prefill| prefill.rank);
    let prefill = body(prefill_rank, None);
    let decode = if ranks == Ranks::default() { prefill.clone() } else { body(ranks.decode, prefill_rank) };
    Ok(Legs { prefill, decode })
}

fn pinned(rank: Option<&str>) -> Change<'_> {
    rank.map_or(Change::Remove, |rank| Change::Set(rank.as_bytes()))
}

/// The request for a worker that does both phases, pinned to a rank where one was chosen. Without fields of ours in it, it is the
/// same bytes otherwise.
pub(crate) fn local(object: &Object, rank: Option<u32>) -> Payload {
    let rank = rank.map(|rank| rank.to_string());
    let mut changes = OURS.to_vec();
    // A client that could name a rank here could send everybody's requests to one.
    changes.extend([("data_parallel_rank", pinned(rank.as_deref())), ("routed_dp_rank", Change::Remove)]);
    splice_pieces(object, &changes)
}

/// A host as JSON. An engine puts a colon and the port behind it, so an IPv6 address needs its brackets.
fn quoted(host: &str) -> String {
    let text = if host.parse::<Ipv6Addr>().is_ok() { format!("[{host}]") } else { host.to_owned() };
    serde_json::Value::String(text).to_string()
}

/// Different rooms, all of the wanted rank.
fn draw(count: u64, mut random: impl FnMut() -> u64, rank: Option<PrefillRank>) -> BTreeSet<u64> {
    // The step from one room of a rank to the next.
    let (rank, step) = match rank {
        Some(PrefillRank { rank, of: Some(of) }) if rank < of => (u64::from(rank), u64::from(of)),
        Some(_) | None => (0, 1),
    };
    let mut rooms = BTreeSet::new();
    for _ in 0..count {
        let random = random() & ROOM_MAX;
        let mut room = random - random % step + rank;
        if room > ROOM_MAX {
            room -= step;
        }
        while !rooms.insert(room) {
            room = if room + step > ROOM_MAX { rank } else { room + step };
        }
    }
    rooms
}

fn list<'a>(items: impl Iterator<Item = &'a str>) -> String {
    let mut list = String::from("[");
    for (index, item) in items.enumerate() {
        let comma = if index == 0 { "" } else { "," };
        let _ = write!(list, "{comma}{item}");
    }
    list.push(']');
    list
}

/// A whole JSON answer of `/generate` with what only the prefill worker knows: the log probabilities of the prompt, put
/// before the decode worker's, and for a batch each prompt's cached tokens. An answer that doesn't have the shape for
/// it, or would become too long, stays as the decode worker gave it.
pub(crate) fn merge_logprobs(decode: &Bytes, prefill: &Bytes) -> Bytes {
    if decode.len().saturating_add(prefill.len()) > MERGED_BYTES_MAX {
        return decode.clone();
    }
    let merged = match decode.trim_ascii_start().first() {
        Some(b'[') => merge_batch(decode, prefill),
        Some(_) | None => merge_one(decode, prefill, false),
    };
    merged.unwrap_or_else(|| decode.clone())
}

fn merge_batch(decode: &Bytes, prefill: &Bytes) -> Option<Bytes> {
    let theirs = elements(prefill, DEPTH_MAX).ok()?;
    let ours = elements(decode, DEPTH_MAX).ok()?;
    if ours.len() != theirs.len() {
        return None;
    }
    let mut merged = Vec::with_capacity(decode.len() + prefill.len());
    let mut copied = 0;
    for (our, their) in ours.into_iter().zip(theirs) {
        merged.extend_from_slice(&decode[copied..our.start]);
        let one = decode.slice(our.clone());
        merged.extend_from_slice(&merge_one(&one, &prefill.slice(their), true).unwrap_or(one));
        copied = our.end;
    }
    merged.extend_from_slice(&decode[copied..]);
    Some(merged.into())
}

fn merge_one(decode: &Bytes, prefill: &Bytes, with_cached: bool) -> Option<Bytes> {
    const LOGPROBS: &str = "input_token_logprobs";
    let decode = scan(decode, DEPTH_MAX).ok()?;
    let ours = decode.object("meta_info")?;
    let theirs = scan(prefill, DEPTH_MAX).ok()?.object("meta_info")?;
    let mut changes = Vec::with_capacity(2);
    let cached = theirs.as_u64("cached_tokens").filter(|_| with_cached).map(|cached| cached.to_string());
    if let Some(cached) = &cached {
        changes.push(("cached_tokens", Change::Replace(cached.as_bytes())));
    }
    let logprobs = theirs
        .given(LOGPROBS)
        .and_then(inside)
        .filter(|theirs| !theirs.is_empty())
        .and_then(|theirs| Some((theirs, ours.given(LOGPROBS).map_or(Some(b"".as_slice()), inside)?)))
        .map(|(theirs, ours)| {
            let comma: &[u8] = if ours.is_empty() { b"" } else { b"," };
            [b"[", theirs, comma, ours, b"]"].concat()
        });
    if let Some(logprobs) = &logprobs {
        changes.push((LOGPROBS, Change::Set(logprobs)));
    }
    Some(splice(&decode, &[("meta_info", Change::Within(&changes))]))
}

/// What stands between the brackets of an array.
fn inside(raw: &[u8]) -> Option<&[u8]> {
    Some(raw.strip_prefix(b"[")?.strip_suffix(b"]")?.trim_ascii())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::Api;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    /// The two bodies, each as one piece.
    #[derive(Debug)]
    struct Bodies {
        prefill: Bytes,
        decode: Bytes,
    }

    fn bodies(legs: Legs) -> Bodies {
        Bodies { prefill: legs.prefill.to_bytes(), decode: legs.decode.to_bytes() }
    }

    fn local(object: &Object, rank: Option<u32>) -> Bytes {
        super::local(object, rank).to_bytes()
    }

    fn object(text: &str) -> Object {
        scan(&Bytes::copy_from_slice(text.as_bytes()), DEPTH_MAX).expect("valid")
    }

    fn value(body: &[u8]) -> Value {
        serde_json::from_slice(body).expect("valid")
    }

    fn numbers() -> impl FnMut() -> u64 {
        let mut next = 99;
        move || {
            next += 1;
            next
        }
    }

    fn joined(api: Api, body: &str, ranks: Ranks) -> Result<Bodies, TooManyRooms> {
        let object = object(body);
        let bootstrap = Bootstrap { host: "10.0.0.1", port: Some(8998), rooms: numbers() };
        legs(&object, &Hints::read(api, &object), bootstrap, ranks).map(bodies)
    }

    fn check(api: Api, body: &str, expect: &str) {
        let legs = joined(api, body, Ranks::default()).expect("few");
        assert_eq!(String::from_utf8_lossy(&legs.prefill), expect, "{body}");
        assert_eq!(legs.prefill.as_ptr(), legs.decode.as_ptr());
    }

    // Problem 12: both legs leave at once, so they are one body that needs nothing of either answer.
    #[test]
    fn both_legs_are_the_clients_request_with_a_room() {
        check(
            Api::Chat,
            r#"{"model":"m", "max_tokens":100,"stream":true,"x":1.0}"#,
            r#"{"model":"m", "max_tokens":100,"stream":true,"x":1.0,"bootstrap_host":"10.0.0.1","bootstrap_port":8998,"bootstrap_room":100}"#,
        );
    }

    #[test]
    fn a_batch_has_arrays_of_its_length() {
        let arrays = |count: usize| {
            let rooms: Vec<String> = (100..100 + count).map(|room| room.to_string()).collect();
            format!(
                r#""bootstrap_host":[{}],"bootstrap_port":[{}],"bootstrap_room":[{}]"#,
                vec!["\"10.0.0.1\""; count].join(","),
                vec!["8998"; count].join(","),
                rooms.join(",")
            )
        };
        let grown = |api: Api, body: &str, count: usize| {
            check(api, body, &format!("{},{}}}", &body[..body.len() - 1], arrays(count)));
        };
        grown(Api::Chat, r#"{"n":3}"#, 3);
        grown(Api::Completions, r#"{"prompt":["a","b"]}"#, 2);
        grown(Api::Completions, r#"{"prompt":["a"]}"#, 1);
        grown(Api::Completions, r#"{"prompt":["a","b"],"n":2}"#, 4);
        grown(Api::SglangGenerate, r#"{"text":["a","b","c"]}"#, 3);
        grown(Api::SglangGenerate, r#"{"input_ids":[[1,2],[3]]}"#, 2);
        grown(Api::SglangGenerate, r#"{"text":"a","sampling_params":{"n":2}}"#, 2);
        check(
            Api::SglangGenerate,
            r#"{"input_ids":[1,2]}"#,
            r#"{"input_ids":[1,2],"bootstrap_host":"10.0.0.1","bootstrap_port":8998,"bootstrap_room":100}"#,
        );
    }

    #[test]
    fn more_rooms_than_the_bound_are_refused() {
        let refused = |body: &str| joined(Api::Chat, body, Ranks::default()).err();
        assert_eq!(refused(r#"{"n":4096}"#), None);
        assert_eq!(refused(r#"{"n":4097}"#), Some(TooManyRooms { prompts: 1, choices: 4097 }));
        assert!(refused(r#"{"n":18446744073709551615}"#).is_some());
        assert!(refused(r#"{"n":"x"}"#).is_some());
    }

    // Problem 11, `sglang#40125`: two requests in one room bring both schedulers down.
    #[test]
    fn a_room_that_the_client_sends_is_always_overwritten() {
        for body in [
            r#"{"bootstrap_room":7,"bootstrap_host":"evil","bootstrap_port":1}"#,
            r#"{"bootstrap_room":7,"bootstrap_room":8,"bootstrap_host":["evil"],"bootstrap_pair_key":"evil"}"#,
            r#"{"bootstrap\u005froom":7,"\u0062ootstrap_host":"evil"}"#,
            r#"{"bootstrap_room":null,"bootstrap_port":"evil","data_parallel_rank":7,"routed_dp_rank":7,"disagg_prefill_dp_rank":7}"#,
        ] {
            let legs = joined(Api::Chat, body, Ranks::default()).expect("one");
            let expect = json!({"bootstrap_host": "10.0.0.1", "bootstrap_port": 8998, "bootstrap_room": 100});
            assert_eq!(value(&legs.prefill), expect, "{body}");
            assert!(!local(&object(body), None).windows(9).any(|bytes| bytes == b"bootstrap"), "{body}");
            let ranked = body.replacen('{', r#"{"routed_dp_rank":0,"data_parallel_rank":0,"#, 1);
            let (ranked, plain) = (ranked.replace(",}", "}"), local(&object(body), None));
            assert_eq!(value(&local(&object(&ranked), None)), value(&plain), "{body}");
        }
    }

    // Problem 11: also within a batch, and even where the random numbers repeat themselves.
    #[test]
    fn no_two_requests_of_a_batch_share_a_room() {
        for (of, number) in [(None, 5), (None, u64::MAX), (Some(8), u64::MAX), (Some(7), i64::MAX as u64)] {
            let ranks = of.map(|of| PrefillRank { rank: of - 1, of: Some(of) });
            let rooms = draw(100, || number, ranks);
            assert_eq!(rooms.len(), 100);
            assert!(rooms.iter().all(|room| *room <= ROOM_MAX));
        }
    }

    #[test]
    fn a_local_request_is_the_clients_own_bytes_but_for_ranks_that_it_names() {
        let plain = object(r#"{"model":"m"}"#);
        assert_eq!(local(&plain, None).as_ptr(), plain.body().as_ptr());
        let ranked = object(r#"{"model":"m","data_parallel_rank":1,"routed_dp_rank":1}"#);
        assert_eq!(local(&ranked, None), plain.body());
    }

    #[test]
    fn a_local_request_is_pinned_to_the_rank_that_was_chosen() {
        let body =
            local(&object(r#"{"model":"m","data_parallel_rank":1,"routed_dp_rank":1,"bootstrap_room":3}"#), Some(2));
        assert_eq!(value(&body), json!({"model": "m", "data_parallel_rank": 2}));
    }

    #[test]
    fn hosts_are_written_as_engines_join_them_with_a_port() {
        let check = |host: &str, expect: &str| assert_eq!(quoted(host), expect);
        check("10.0.0.1", r#""10.0.0.1""#);
        check("fd00::1", r#""[fd00::1]""#);
        check("[fd00::1]", r#""[fd00::1]""#);
        check("prefill-0.pool", r#""prefill-0.pool""#);
        check("a\"b", r#""a\"b""#);
    }

    #[test]
    fn a_port_that_is_not_known_is_null() {
        let object = object(r#"{"n":2}"#);
        let bootstrap = Bootstrap { host: "p", port: None, rooms: numbers() };
        let legs =
            legs(&object, &Hints::read(Api::Chat, &object), bootstrap, Ranks::default()).map(bodies).expect("few");
        assert_eq!(value(&legs.decode)["bootstrap_port"], json!([null, null]));
    }

    // Problem 9, `dynamo#7984`, `sglang#29725`: each leg has its own rank, and the room agrees with the prefill
    // worker's.
    #[test]
    fn each_leg_has_its_own_rank_and_the_room_agrees() {
        let ranks = Ranks { prefill: Some(PrefillRank { rank: 3, of: Some(8) }), decode: Some(1) };
        let legs = joined(Api::Chat, r#"{"data_parallel_rank":7,"n":2}"#, ranks).expect("few");
        let (prefill, decode) = (value(&legs.prefill), value(&legs.decode));
        assert_eq!((&prefill["data_parallel_rank"], prefill.get("disagg_prefill_dp_rank")), (&json!(3), None));
        assert_eq!((&decode["data_parallel_rank"], &decode["disagg_prefill_dp_rank"]), (&json!(1), &json!(3)));
        assert_eq!(prefill["bootstrap_room"], decode["bootstrap_room"]);
        for room in prefill["bootstrap_room"].as_array().expect("two") {
            assert_eq!(room.as_u64().map(|room| room % 8), Some(3));
        }
        let only_prefill = Ranks { prefill: Some(PrefillRank { rank: 3, of: None }), decode: None };
        let decode = value(&joined(Api::Chat, "{}", only_prefill).expect("one").decode);
        assert_eq!((decode.get("data_parallel_rank"), &decode["disagg_prefill_dp_rank"]), (None, &json!(3)));
    }

    #[test]
    fn the_prompts_logprobs_stand_before_the_decode_workers() {
        let check = |decode: &str, prefill: &str, expect: &str| {
            let merged =
                merge_logprobs(&Bytes::copy_from_slice(decode.as_bytes()), &Bytes::copy_from_slice(prefill.as_bytes()));
            assert_eq!(String::from_utf8_lossy(&merged), expect, "{decode} {prefill}");
        };
        let prefill =
            r#"{"text":"p","meta_info":{"input_token_logprobs":[[-1.50,1,null], [-2.0,2,null] ],"cached_tokens":4}}"#;
        check(
            r#"{"text": "d","meta_info":{"id":"x","input_token_logprobs":[ [-3.0,3,null]],"cached_tokens":9}}"#,
            prefill,
            r#"{"text": "d","meta_info":{"id":"x","input_token_logprobs":[[-1.50,1,null], [-2.0,2,null],[-3.0,3,null]],"cached_tokens":9}}"#,
        );
        for empty in ["[]", "null", "[ ]"] {
            check(
                &format!(r#"{{"meta_info":{{"input_token_logprobs":{empty}}}}}"#),
                prefill,
                r#"{"meta_info":{"input_token_logprobs":[[-1.50,1,null], [-2.0,2,null]]}}"#,
            );
        }
        let same = |decode: &str, prefill: &str| check(decode, prefill, decode);
        same(r#"{"text":"d"}"#, prefill);
        same(r#"{"meta_info":{"input_token_logprobs":7}}"#, prefill);
        same(r#"{"meta_info":{"input_token_logprobs":[[1]]}}"#, r#"{"meta_info":{"input_token_logprobs":[]}}"#);
        same(r#"{"meta_info":{"input_token_logprobs":[[1]]}}"#, "oops");
        same("oops", prefill);
        same("", "");
        let batch = format!("[{prefill},\n {prefill}]");
        check(
            r#"[ {"meta_info":{"cached_tokens":9}} , {"meta_info":{"input_token_logprobs":[[0]],"cached_tokens":9}} ]"#,
            &batch,
            r#"[ {"meta_info":{"cached_tokens":4,"input_token_logprobs":[[-1.50,1,null], [-2.0,2,null]]}} , {"meta_info":{"input_token_logprobs":[[-1.50,1,null], [-2.0,2,null],[0]],"cached_tokens":4}} ]"#,
        );
        same(r#"[{"meta_info":{"cached_tokens":9}}]"#, &batch);
    }

    #[test]
    fn a_merge_beyond_the_bound_leaves_the_answer() {
        let decode = Bytes::from_static(br#"{"meta_info":{}}"#);
        let text = "x".repeat(MERGED_BYTES_MAX);
        let prefill = Bytes::from(format!(r#"{{"text":"{text}","meta_info":{{"input_token_logprobs":[[1]]}}}}"#));
        assert_eq!(merge_logprobs(&decode, &prefill).as_ptr(), decode.as_ptr());
    }

    proptest! {
        #[test]
        fn rooms_are_different_in_range_and_of_their_rank(
            random in prop::collection::vec(prop_oneof![any::<u64>(), Just(u64::MAX), 0..40_u64], 1..40),
            of in 1..32_u32,
            rank in 0..32_u32,
        ) {
            let mut numbers = random.iter().copied();
            let rank = rank % of;
            let rooms = draw(random.len() as u64, || numbers.next().unwrap_or(0), Some(PrefillRank { rank, of: Some(of) }));
            prop_assert_eq!(rooms.len(), random.len());
            prop_assert!(rooms.iter().all(|room| *room <= ROOM_MAX && room % u64::from(of) == u64::from(rank)));
        }
    }
}
