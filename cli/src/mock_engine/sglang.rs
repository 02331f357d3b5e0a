//! SGLang's side of its bootstrap contract: both legs get the same body and a room, at the same time; prefill waits in the
//! room for decode, decode asks the prefill engine's bootstrap server for the room. Where one leg is given up, the other
//! waits on until its own end or timeout, as SGLang has it.

use super::args::MockRole;
use super::call::{Call, Outcome, Refusal, wrongly_cached};
use super::engine::Engine;
use super::leg::Leg;
use super::peer::{self, Word};
use super::ranks;
use super::rooms::{Room, Side};
use super::rule::Rule;
use super::vllm::address;
use serde_json::Value;
use serde_json::value::RawValue;
use std::sync::Arc;

/// SGLang's bootstrap port where a request names none.
const BOOTSTRAP_PORT: u16 = 8998;

/// Rooms are signed numbers of 64 bits in SGLang.
const ROOM_MAX: u64 = i64::MAX as u64;

/// What a request is to an engine of this role.
pub(crate) fn leg(role: MockRole) -> Leg {
    match role {
        MockRole::Prefill => Leg::Prefill,
        MockRole::Decode => Leg::Decode,
        MockRole::Both => Leg::Plain,
    }
}

/// Where the legs of one request meet.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Meeting {
    host: String,
    port: u16,
    /// Whether the port was named, and not SGLang's own taken.
    names_port: bool,
    rooms: Vec<Room>,
}

/// Serves a request.
///
/// # Errors
/// When SGLang would refuse or fail it, or it meets an error.
pub(crate) async fn serve(engine: &Arc<Engine>, call: &Call<'_>) -> Result<Outcome, Refusal> {
    let leg = leg(engine.args.role);
    if leg == Leg::Plain {
        return call.aggregated(engine).await;
    }
    let ask = call.ask;
    let batch = call.prompt.count * ask.choices();
    let fields = [ask.bootstrap_host, ask.bootstrap_port, ask.bootstrap_room];
    let meeting = read(fields, batch, call.prompt.is_list).map_err(|(rule, found)| {
        engine.violated(rule, call.number, found);
        Refusal::new(400, rule.sentence())
    })?;
    match leg {
        Leg::Prefill => prefill(engine, call, &meeting).await,
        _ => decode(engine, call, meeting).await,
    }
}

async fn prefill(engine: &Arc<Engine>, call: &Call<'_>, meeting: &Meeting) -> Result<Outcome, Refusal> {
    if meeting.names_port && meeting.port != engine.side.port() {
        let found = format!("{} in place of {}", meeting.port, engine.side.port());
        engine.violated(Rule::BootstrapPort, call.number, found);
    }
    let size = engine.args.dp;
    let named = call.ask.data_parallel_rank.or(call.ask.routed_dp_rank);
    let off_rank = |room: &&Room| named.is_some_and(|rank| ranks::of_room(**room, size) != rank);
    if let Some(room) = meeting.rooms.iter().find(off_rank) {
        engine.violated(Rule::RoomOffRank, call.number, format!("room {room} of {size} ranks for rank {named:?}"));
        return Err(Refusal::new(400, Rule::RoomOffRank.sentence()));
    }
    call.admitted().await?;
    let seed = call.prompt.seed;
    let mut places = Vec::with_capacity(meeting.rooms.len());
    for room in &meeting.rooms {
        places.push(engine.rooms.enter(*room, Side::Prefill, seed).map_err(|_| duplicate(engine, call))?);
    }
    let met = async {
        let mut is_same = true;
        for place in &mut places {
            is_same &= place.other(seed).await;
        }
        is_same
    };
    let is_same = tokio::time::timeout(engine.args.bootstrap_timeout, met).await.map_err(|_| timed_out("prefill"))?;
    if !is_same {
        engine.violated(Rule::LegsDiffer, call.number, "the decode leg's prompt is another");
    }
    // The room says the rank of whoever does not: of this leg by the check above, and of the decode leg here.
    let elsewhere = |place: &super::rooms::Place| {
        let (room, sought) = place.sought();
        sought.filter(|sought| *sought != ranks::of_room(room, size))
    };
    if let Some(sought) = places.iter().find_map(elsewhere) {
        engine.violated(Rule::PrefillRankDiffers, call.number, format!("the decode leg looks at rank {sought}"));
        return Err(Refusal::new(500, Rule::PrefillRankDiffers.sentence()));
    }
    engine.compute(call.prompt.tokens).await;
    let mut answer = call.answer(engine, engine.cached_tokens(call.prompt.tokens));
    // Whatever the limit is: a prefill engine ends a request with its first token.
    answer.tokens = 1;
    call.before_head().await;
    places.iter().for_each(super::rooms::Place::hand_over);
    Ok(Outcome::Answered(answer, Vec::new()))
}

async fn decode(engine: &Arc<Engine>, call: &Call<'_>, meeting: Meeting) -> Result<Outcome, Refusal> {
    call.admitted().await?;
    let server = address(&meeting.host, meeting.port);
    let rank = call.ask.disagg_prefill_dp_rank;
    let join = peer::Call::Join { seed: call.prompt.seed, rooms: meeting.rooms, rank };
    let word = tokio::time::timeout(engine.args.bootstrap_timeout, engine.links.call(&server, join))
        .await
        .map_err(|_| timed_out("decode"))?;
    match word {
        Word::Ok | Word::OkOtherId => {}
        Word::Duplicate => return Err(duplicate(engine, call)),
        Word::Unknown | Word::Freed | Word::Unreachable => {
            engine.ledger().pulls.unreachable += 1;
            return Err(Refusal::new(500, format!("no bootstrap server answers at {server}")));
        }
    }
    engine.ledger().pulls.ok += 1;
    let answer = call.answer(engine, wrongly_cached(call.prompt.tokens));
    call.before_head().await;
    call.generate(engine, &answer).await;
    Ok(Outcome::Answered(answer, Vec::new()))
}

fn duplicate(engine: &Engine, call: &Call<'_>) -> Refusal {
    engine.violated(Rule::DuplicateRoom, call.number, "a leg of this side is there");
    Refusal::new(500, Rule::DuplicateRoom.sentence())
}

fn timed_out(side: &str) -> Refusal {
    Refusal::new(500, format!("the {side} leg timed out waiting for the other: KVTransferError"))
}

/// Reads host, port and room for a batch of so many, or says what is wrong with them.
fn read(fields: [Option<&RawValue>; 3], batch: u64, is_list: bool) -> Result<Meeting, (Rule, String)> {
    let [host, port, room] = fields;
    let (Some(host), Some(room)) = (host, room) else {
        let missing = if room.is_none() { "bootstrap_room" } else { "bootstrap_host" };
        return Err((Rule::BootstrapMissing, format!("no {missing}")));
    };
    let hosts = list("bootstrap_host", host, batch, is_list)?;
    // The port alone may be null: then it is SGLang's own.
    let ports = port.map_or_else(|| Ok(Vec::new()), |port| list("bootstrap_port", port, batch, is_list))?;
    let rooms = list("bootstrap_room", room, batch, is_list)?;
    let host = match &hosts[..] {
        [Value::String(host), rest @ ..] if peer::is_part(host) && rest.iter().all(|other| other == host) => host,
        _ => return Err((Rule::BootstrapShape, "bootstrap_host is not one host".to_owned())),
    };
    let named = match &ports[..] {
        [] => None,
        [first, rest @ ..] if rest.iter().all(|other| other == first) => match first {
            Value::Null => None,
            port => Some(
                port.as_u64()
                    .and_then(|port| u16::try_from(port).ok())
                    .ok_or_else(|| (Rule::BootstrapShape, format!("bootstrap_port {port} is no port")))?,
            ),
        },
        _ => return Err((Rule::BootstrapShape, "bootstrap_port is not one port".to_owned())),
    };
    let room = |room: &Value| {
        let number = room.as_u64().filter(|number| *number <= ROOM_MAX);
        number.map(Room::from).ok_or_else(|| (Rule::RoomOutOfRange, format!("{room}")))
    };
    let rooms: Vec<Room> = rooms.iter().map(room).collect::<Result<_, _>>()?;
    Ok(Meeting { host: host.clone(), port: named.unwrap_or(BOOTSTRAP_PORT), names_port: named.is_some(), rooms })
}

/// A field as one value for each of the batch. A list of prompts of length one may go either way.
fn list(name: &str, raw: &RawValue, batch: u64, is_list: bool) -> Result<Vec<Value>, (Rule, String)> {
    let value: Value = serde_json::from_str(raw.get()).map_err(|error| (Rule::BootstrapShape, error.to_string()))?;
    match value {
        Value::Array(values) if values.len() as u64 == batch && (batch > 1 || is_list) => Ok(values),
        Value::Array(values) => {
            Err((Rule::BootstrapShape, format!("{name} has {} values for a batch of {batch}", values.len())))
        }
        _ if batch > 1 => Err((Rule::BootstrapShape, format!("{name} is one value for a batch of {batch}"))),
        value => Ok(vec![value]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mock_engine::ask::Ask;

    fn reads(body: &str) -> Result<Meeting, Rule> {
        let ask = Ask::read(body.as_bytes()).expect("a body");
        let prompt = ask.prompt().expect("a prompt");
        let fields = [ask.bootstrap_host, ask.bootstrap_port, ask.bootstrap_room];
        read(fields, prompt.count * ask.choices(), prompt.is_list).map_err(|(rule, _)| rule)
    }

    #[test]
    fn the_fields_are_values_or_arrays_as_the_batch_is() {
        let meets = |body: &str, port: u16, rooms: &[Room]| {
            let meeting = reads(body).unwrap_or_else(|rule| panic!("{body}: {rule:?}"));
            assert_eq!((meeting.host.as_str(), meeting.port, &meeting.rooms[..]), ("h", port, rooms), "{body}");
        };
        meets(r#"{"text":"a","bootstrap_host":"h","bootstrap_port":1,"bootstrap_room":5}"#, 1, &[5]);
        meets(r#"{"text":"a","bootstrap_host":"h","bootstrap_port":null,"bootstrap_room":0}"#, 8998, &[0]);
        meets(r#"{"text":["a"],"bootstrap_host":"h","bootstrap_room":9223372036854775807}"#, 8998, &[i64::MAX as Room]);
        meets(r#"{"text":["a"],"bootstrap_host":["h"],"bootstrap_port":[1],"bootstrap_room":[5]}"#, 1, &[5]);
        let two = r#""bootstrap_host":["h","h"],"bootstrap_port":[1,1],"bootstrap_room":[5,6]"#;
        meets(&format!("{{\"text\":[\"a\",\"b\"],{two}}}"), 1, &[5, 6]);
        meets(&format!("{{\"messages\":[{{}}],\"n\":2,{two}}}"), 1, &[5, 6]);
        meets(&format!("{{\"input_ids\":[[1],[2]],{two}}}"), 1, &[5, 6]);
    }

    #[test]
    fn what_is_wrong_with_them_is_a_rule() {
        let check = |body: &str, expect: Rule| assert_eq!(reads(body), Err(expect), "{body}");
        check(r#"{"text":"a"}"#, Rule::BootstrapMissing);
        check(r#"{"text":"a","bootstrap_host":"h"}"#, Rule::BootstrapMissing);
        check(r#"{"text":"a","bootstrap_host":"h","bootstrap_room":[5]}"#, Rule::BootstrapShape);
        check(r#"{"text":["a","b"],"bootstrap_host":"h","bootstrap_room":5}"#, Rule::BootstrapShape);
        check(r#"{"text":["a","b"],"bootstrap_host":["h","h"],"bootstrap_room":[5]}"#, Rule::BootstrapShape);
        check(r#"{"text":["a","b"],"bootstrap_host":["h","i"],"bootstrap_room":[5,6]}"#, Rule::BootstrapShape);
        check(r#"{"text":"a","bootstrap_host":7,"bootstrap_room":5}"#, Rule::BootstrapShape);
        check(r#"{"text":"a","bootstrap_host":"h","bootstrap_port":70000,"bootstrap_room":5}"#, Rule::BootstrapShape);
        check(r#"{"text":"a","bootstrap_host":"h","bootstrap_room":9223372036854775808}"#, Rule::RoomOutOfRange);
        check(r#"{"text":"a","bootstrap_host":"h","bootstrap_room":-1}"#, Rule::RoomOutOfRange);
        check(r#"{"text":"a","bootstrap_host":"h","bootstrap_room":"5"}"#, Rule::RoomOutOfRange);
    }
}
