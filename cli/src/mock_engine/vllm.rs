//! vLLM's side of its NixlConnector contract, in the pull mode: prefill answers with a handle and holds the KV on a lease;
//! decode gets the handle as it was and pulls. As long as a decode leg is admitted anywhere, the KV is let go.

use super::answer::put;
use super::api::Api;
use super::args::{KvLoadFailure, MockRole};
use super::ask::Ask;
use super::call::{Call, Outcome, Refusal, injected, wrongly_cached};
use super::engine::{Engine, REQUEST_ID};
use super::fail::Failure;
use super::leg::Leg;
use super::link::count_pull;
use super::peer::{self, Word};
use super::rule::Rule;
use baton_wire::signing::body_blake3;
use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;
use std::borrow::Cow;
use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// Tokens of a block, vLLM's default.
const BLOCK_TOKENS: u64 = 16;

/// How often a decode leg that waits to be scheduled extends the lease. vLLM does it every few seconds of a lease of 30;
/// this is short enough for the leases of tests.
const HEARTBEAT: Duration = Duration::from_millis(200);

/// The handle's field that carries the digest of all others.
const DIGEST: &str = "mock_digest";

/// What stands between a handle's fields and the digest's value.
const DIGEST_JOINT: &str = ",\"mock_digest\":\"";

/// Hexadecimal digits of a digest, the quote and the brace after it.
const DIGEST_TAIL: usize = 64 + 2;

/// `kv_transfer_params`, as far as an engine looks at them.
#[derive(Debug, Deserialize)]
pub(crate) struct Params<'a> {
    do_remote_decode: Option<bool>,
    do_remote_prefill: Option<bool>,
    #[serde(borrow)]
    remote_block_ids: Option<&'a RawValue>,
    #[serde(borrow)]
    remote_engine_id: Option<Cow<'a, str>>,
    #[serde(borrow)]
    remote_request_id: Option<Cow<'a, str>>,
    #[serde(borrow)]
    remote_host: Option<Cow<'a, str>>,
    remote_port: Option<u16>,
}

/// What a request is, and what it breaks by being that.
#[derive(Debug)]
pub(crate) struct Read<'a> {
    pub(crate) leg: Leg,
    params: Option<Params<'a>>,
    broken: Vec<(Rule, String)>,
}

/// Reads what a request is from its `kv_transfer_params`.
pub(crate) fn read(raw: Option<&RawValue>, role: MockRole) -> Read<'_> {
    let mut broken = Vec::new();
    let params = raw.and_then(|raw| match serde_json::from_str::<Params<'_>>(raw.get()) {
        Ok(params) => Some(params),
        Err(error) => {
            broken.push((Rule::HandoverUnreadable, error.to_string()));
            None
        }
    });
    let gives = params.as_ref().is_some_and(|params| params.do_remote_decode == Some(true));
    let takes = params.as_ref().is_some_and(|params| params.do_remote_prefill == Some(true));
    if gives && takes {
        broken.push((Rule::HandoverFlags, "both are true".to_owned()));
    }
    let leg = if takes {
        Leg::Decode
    } else if gives {
        Leg::Prefill
    } else {
        Leg::Plain
    };
    match (leg, role) {
        (Leg::Prefill, MockRole::Decode) | (Leg::Decode, MockRole::Prefill) => {
            broken.push((Rule::WrongRole, format!("a {} leg at a {} engine", leg.as_str(), role.as_str())));
        }
        _ => {}
    }
    Read { leg, params, broken }
}

/// What a prefill leg's body breaks.
fn broken_by_prefill(api: Api, ask: &Ask<'_>) -> Vec<(Rule, String)> {
    let mut broken = Vec::new();
    if ask.streams() {
        broken.push((Rule::PrefillStreams, "stream is true".to_owned()));
    }
    if ask.stream_options.is_some() {
        broken.push((Rule::PrefillStreamOptions, "stream_options are there".to_owned()));
    }
    if ask.limit(api) != Some(1) {
        let limit = ask.limit(api).map_or_else(|| "no limit".to_owned(), |limit| format!("a limit of {limit}"));
        broken.push((Rule::PrefillUncapped, limit));
    } else if let (Api::Chat, Some(max_tokens @ 2..)) = (api, ask.max_tokens) {
        // An engine that prefers the older name would decode on.
        broken.push((Rule::PrefillUncapped, format!("max_tokens is {max_tokens} beside max_completion_tokens")));
    }
    if ask.at_least() > 1 {
        broken.push((Rule::PrefillMinTokens, format!("min_tokens is {}", ask.at_least())));
    }
    if ask.choices() > 1 {
        broken.push((Rule::PrefillChoices, format!("n is {}", ask.choices())));
    }
    broken
}

/// Notes what a request breaks; before anything is refused, so that a refusal hides none of it.
pub(crate) fn check(engine: &Engine, number: u64, api: Api, ask: Option<&Ask<'_>>, read: &mut Read<'_>) {
    if let (Leg::Prefill, Some(ask)) = (read.leg, ask) {
        read.broken.extend(broken_by_prefill(api, ask));
    }
    for (rule, found) in read.broken.drain(..) {
        engine.violated(rule, number, found);
    }
}

/// Serves a request.
///
/// # Errors
/// When vLLM would refuse it, or it meets an error.
pub(crate) async fn serve(engine: &Arc<Engine>, call: &Call<'_>, read: &Read<'_>) -> Result<Outcome, Refusal> {
    if call.ask.stream_options.is_some() && !call.ask.streams() {
        return Err(Refusal::new(400, "Stream options can only be defined when `stream=True`."));
    }
    match (read.leg, &read.params) {
        (Leg::Prefill, _) => prefill(engine, call).await,
        (Leg::Decode, Some(params)) => decode(engine, call, params).await,
        _ => call.aggregated(engine).await,
    }
}

async fn prefill(engine: &Arc<Engine>, call: &Call<'_>) -> Result<Outcome, Refusal> {
    call.admitted().await?;
    engine.compute(call.prompt.tokens).await;
    let mut answer = call.answer(engine, engine.cached_tokens(call.prompt.tokens));
    call.before_head().await;
    call.generate(engine, &answer).await;
    // Nothing is waited for from here on: a client that is gone before this has aborted, and nothing is held for it.
    if call.failure != Some(Failure::NoHandle) {
        let blocks = call.prompt.tokens.div_ceil(BLOCK_TOKENS);
        let number = engine.holds().hold(Instant::now(), blocks, call.request_id().map(str::to_owned));
        answer.handle = Some(handle(engine, number, blocks, call.prompt.tokens));
    }
    Ok(Outcome::Answered(answer, Vec::new()))
}

/// The handle in canonical form: keys in order, no spaces. Its unknown field has what careless relays change: a number that
/// a double can't hold, an escape, a character that some write as one, a null and nesting.
fn handle(engine: &Engine, number: u64, blocks: u64, prompt_tokens: u64) -> String {
    let mut out = String::with_capacity(512 + 8 * blocks as usize);
    out.push_str(
        "{\"do_remote_decode\":false,\"do_remote_prefill\":true,\"mock_opaque\":{\"a\":[null,true,{}],\
         \"big\":18446744073709551615,\"text\":\"caf\u{e9} \\\"quoted\\\"\"},\"remote_block_ids\":[[",
    );
    for block in 0..blocks {
        put!(out, "{}{}", if block > 0 { "," } else { "" }, number * 7 % 1000 + block);
    }
    let (id, name) = (engine.id(), &engine.args.name);
    let (host, port) = (engine.side.ip(), engine.side.port());
    put!(
        out,
        "]],\"remote_engine_id\":\"{id}\",\"remote_host\":\"{host}\",\"remote_num_tokens\":{prompt_tokens},\
         \"remote_port\":{port},\"remote_request_id\":\"cmpl-{name}-{number}\",\"tp_size\":1}}"
    );
    let digest = body_blake3(out.as_bytes());
    out.pop();
    put!(out, "{DIGEST_JOINT}{digest}\"}}");
    out
}

/// How a handle came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fidelity {
    /// Byte for byte.
    Verbatim,
    /// Other bytes, with the same values.
    Reserialised,
    /// Not what was given.
    Altered,
}

/// Compares a handle with its digest.
fn fidelity(raw: &str) -> Fidelity {
    let verbatim = || {
        let head = raw.get(..raw.len().checked_sub(DIGEST_TAIL)?)?;
        let digest = raw.get(head.len()..raw.len() - 2)?;
        let fields = head.strip_suffix(DIGEST_JOINT)?;
        (body_blake3(format!("{fields}}}").as_bytes()) == digest).then_some(())
    };
    if verbatim().is_some() {
        return Fidelity::Verbatim;
    }
    let Ok(Value::Object(mut fields)) = serde_json::from_str(raw) else { return Fidelity::Altered };
    let digest = fields.remove(DIGEST);
    let mut canonical = Value::Object(fields);
    canonical.sort_all_objects();
    let found = body_blake3(canonical.to_string().as_bytes());
    if digest.as_ref().and_then(Value::as_str) == Some(&found) { Fidelity::Reserialised } else { Fidelity::Altered }
}

async fn decode(engine: &Arc<Engine>, call: &Call<'_>, params: &Params<'_>) -> Result<Outcome, Refusal> {
    match call.ask.kv_transfer_params.map_or(Fidelity::Altered, |raw| fidelity(raw.get())) {
        Fidelity::Verbatim => {}
        Fidelity::Reserialised => engine.ledger().reserialised += 1,
        Fidelity::Altered => engine.violated(Rule::HandleAltered, call.number, "its digest is another"),
    }
    match Held::of(engine, params) {
        Ok(mut held) => {
            held.wait_for_turn(call).await?;
            let word = held.pull(call).await;
            note(engine, call, word);
            match (word, engine.args.kv_load_failure) {
                (Word::Ok | Word::OkOtherId, _) => {}
                (_, KvLoadFailure::Fail) => return Err(Refusal::new(500, "KV load failed")),
                (_, KvLoadFailure::Recompute) => recompute(engine, call).await,
            }
        }
        Err(missing) => {
            engine.violated(Rule::HandleIncomplete, call.number, format!("{missing} is missing"));
            call.admitted().await?;
            recompute(engine, call).await;
        }
    }
    let answer = call.answer(engine, wrongly_cached(call.prompt.tokens));
    call.before_head().await;
    call.generate(engine, &answer).await;
    Ok(Outcome::Answered(answer, Vec::new()))
}

async fn recompute(engine: &Engine, call: &Call<'_>) {
    engine.ledger().pulls.recomputed += 1;
    engine.compute(call.prompt.tokens).await;
}

fn note(engine: &Engine, call: &Call<'_>, word: Word) {
    count_pull(engine, word);
    let broken = match word {
        Word::OkOtherId => Some((Rule::RequestIdsDiffer, call.request_id().unwrap_or("none here"))),
        Word::Unknown | Word::Duplicate => Some((Rule::HandleUnknown, "prefill does not know it")),
        Word::Freed => Some((Rule::HandleFreed, "prefill has freed it")),
        // The prefill engine has died: nothing that a router could have done.
        Word::Ok | Word::Unreachable => None,
    };
    if let Some((rule, found)) = broken {
        engine.violated(
            rule,
            call.number,
            if rule == Rule::RequestIdsDiffer { format!("{REQUEST_ID}: {found}") } else { found.to_owned() },
        );
    }
}

/// KV that waits for an admitted decode leg. Dropped before the pull, it is let go, as vLLM's scheduler does.
struct Held<'a> {
    engine: &'a Engine,
    address: String,
    id: String,
    handle: String,
    pulled: bool,
}

impl<'a> Held<'a> {
    /// # Errors
    /// The name of a field without which vLLM computes the prompt again.
    fn of(engine: &'a Engine, params: &Params<'_>) -> Result<Self, &'static str> {
        let part =
            |field: &Option<Cow<'_, str>>| field.as_deref().filter(|text| peer::is_part(text)).map(str::to_owned);
        let blocks = params.remote_block_ids.map_or("", RawValue::get);
        if !blocks.bytes().any(|byte| byte.is_ascii_digit()) {
            return Err("remote_block_ids");
        }
        let id = part(&params.remote_engine_id).ok_or("remote_engine_id")?;
        let host = part(&params.remote_host).ok_or("remote_host")?;
        let port = params.remote_port.ok_or("remote_port")?;
        let handle = part(&params.remote_request_id).ok_or("remote_request_id")?;
        Ok(Held { engine, address: address(&host, port), id, handle, pulled: false })
    }

    /// Waits to be scheduled, while the lease is extended.
    async fn wait_for_turn(&self, call: &Call<'_>) -> Result<(), Refusal> {
        let renew = async {
            loop {
                tokio::time::sleep(HEARTBEAT).await;
                self.engine
                    .links
                    .tell(&self.address, peer::Call::Renew { engine: self.id.clone(), handle: self.handle.clone() });
            }
        };
        tokio::select! {
            biased;
            outcome = call.admitted() => outcome,
            () = renew => Err(injected(500)),
        }
    }

    async fn pull(&mut self, call: &Call<'_>) -> Word {
        let request_id = call.request_id().map(str::to_owned);
        let pull = peer::Call::Pull { engine: self.id.clone(), handle: self.handle.clone(), request_id };
        let word = self.engine.links.call(&self.address, pull).await;
        self.pulled = true;
        word
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        if !self.pulled {
            let release = peer::Call::Release { engine: self.id.clone(), handle: self.handle.clone() };
            self.engine.links.tell(&self.address, release);
        }
    }
}

/// A host that may be an IPv6 address without its brackets.
pub(crate) fn address(host: &str, port: u16) -> String {
    if host.contains(':') && !host.starts_with('[') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn given() -> String {
        let fields = "{\"a\":1,\"b\":[[1,2]]}";
        format!("{{\"a\":1,\"b\":[[1,2]]{DIGEST_JOINT}{}\"}}", body_blake3(fields.as_bytes()))
    }

    #[test]
    fn a_handle_is_known_in_other_bytes_and_not_with_other_values() {
        let given = given();
        let check = |raw: &str, expect: Fidelity| assert_eq!(fidelity(raw), expect, "{raw}");
        check(&given, Fidelity::Verbatim);
        check(&given.replace(",\"b\":", ", \"b\": "), Fidelity::Reserialised);
        let value: Value = serde_json::from_str(&given).expect("JSON");
        let mut reversed: Vec<_> = value.as_object().expect("an object").clone().into_iter().collect();
        reversed.reverse();
        check(&Value::Object(reversed.into_iter().collect()).to_string(), Fidelity::Reserialised);
        check(&given.replace("\"a\":1", "\"a\":2"), Fidelity::Altered);
        check(&given.replace("\"a\":1,", ""), Fidelity::Altered);
        check("{}", Fidelity::Altered);
        check("null", Fidelity::Altered);
    }

    #[test]
    fn the_flags_say_which_leg_it_is() {
        let check = |params: &str, role: MockRole, leg: Leg, expect: &[Rule]| {
            let raw = RawValue::from_string(params.to_owned()).expect("JSON");
            let read = read(Some(&raw), role);
            let broken: Vec<Rule> = read.broken.iter().map(|(rule, _)| *rule).collect();
            assert_eq!((read.leg, &broken[..]), (leg, expect), "{params}");
        };
        check("{\"do_remote_decode\":true}", MockRole::Prefill, Leg::Prefill, &[]);
        check("{\"do_remote_prefill\":true}", MockRole::Decode, Leg::Decode, &[]);
        check("{\"do_remote_prefill\":true}", MockRole::Both, Leg::Decode, &[]);
        check("{\"do_remote_prefill\":false}", MockRole::Both, Leg::Plain, &[]);
        check("{\"do_remote_decode\":true}", MockRole::Decode, Leg::Prefill, &[Rule::WrongRole]);
        check("{\"do_remote_prefill\":true}", MockRole::Prefill, Leg::Decode, &[Rule::WrongRole]);
        let both = "{\"do_remote_prefill\":true,\"do_remote_decode\":true}";
        check(both, MockRole::Both, Leg::Decode, &[Rule::HandoverFlags]);
        check("[]", MockRole::Both, Leg::Plain, &[Rule::HandoverUnreadable]);
        assert_eq!(read(None, MockRole::Decode).leg, Leg::Plain);
    }

    #[test]
    fn a_prefill_leg_is_capped_in_every_api() {
        let check = |api: Api, body: &str, expect: &[Rule]| {
            let ask = Ask::read(body.as_bytes()).expect("a body");
            let broken: Vec<Rule> = broken_by_prefill(api, &ask).into_iter().map(|(rule, _)| rule).collect();
            assert_eq!(broken, expect, "{api:?} {body}");
        };
        check(Api::Completions, r#"{"prompt":"a","max_tokens":1,"stream":false}"#, &[]);
        check(Api::Chat, r#"{"messages":[],"max_tokens":1}"#, &[]);
        check(Api::Chat, r#"{"messages":[],"max_tokens":1,"max_completion_tokens":1,"n":1,"min_tokens":1}"#, &[]);
        check(Api::Responses, r#"{"input":"a","max_output_tokens":1}"#, &[]);
        check(Api::Messages, r#"{"messages":[],"max_tokens":1}"#, &[]);
        check(Api::TokenIn, r#"{"token_ids":[1],"sampling_params":{"max_tokens":1}}"#, &[]);
        check(Api::Completions, r#"{"prompt":"a"}"#, &[Rule::PrefillUncapped]);
        check(Api::Responses, r#"{"input":"a","max_tokens":1}"#, &[Rule::PrefillUncapped]);
        check(Api::TokenIn, r#"{"token_ids":[1],"max_tokens":1}"#, &[Rule::PrefillUncapped]);
        let chat = r#"{"messages":[],"max_tokens":1,"max_completion_tokens":9}"#;
        check(Api::Chat, chat, &[Rule::PrefillUncapped]);
        check(Api::Chat, r#"{"messages":[],"max_tokens":9,"max_completion_tokens":1}"#, &[Rule::PrefillUncapped]);
        let all = r#"{"prompt":"a","max_tokens":1,"stream":true,"stream_options":{},"min_tokens":2,"n":2}"#;
        let rules = [Rule::PrefillStreams, Rule::PrefillStreamOptions, Rule::PrefillMinTokens, Rule::PrefillChoices];
        check(Api::Completions, all, &rules);
    }
}
