//! Our own worker's side, as far as HTTP shows it: it renders, and both legs meet by transfer id, as SGLang's do by room. A
//! decode leg whose KV does not come computes the prompt itself and says so in the path header.

use super::api::Api;
use super::args::MockRole;
use super::ask::{Ask, Prompt};
use super::call::{Call, Outcome, Refusal, wrongly_cached};
use super::engine::Engine;
use super::fail::Failure;
use super::peer::{self, Word};
use super::rooms::{Room, Side};
use super::rule::Rule;
use super::tokens::Seed;
use baton_wire::leg::{LegRequest, PrefillDone, Transfer};
use baton_wire::names::headers;
use baton_wire::render::{Endpoint, RenderRequest, RenderResponse, RenderedPrompt};
use baton_wire::signing::{self, TransferClaims};
use baton_wire::status::{Load, State, Status, Totals};
use baton_wire::{Path, PathReason, Role};
use http::HeaderMap;
use serde_json::value::RawValue;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

/// Tokens of a KV block, as our worker has it.
const BLOCK_TOKENS: u32 = 32;

/// KV bytes of a token, for the totals alone: those of the demo model or thereabouts.
const KV_BYTES_PER_TOKEN: u64 = 1024;

/// Prompt and completion that fit: more than any test sends.
const MODEL_LENGTH_MAX: u32 = 1 << 20;

/// What the mock says of itself.
pub(crate) fn status(engine: &Engine) -> String {
    let ledger = engine.ledger();
    let running: u64 = super::leg::Leg::ALL.iter().map(|leg| ledger.running.of(*leg)).sum();
    let totals = Totals {
        prefill_tokens: ledger.prompt_tokens,
        decode_tokens: ledger.completion_tokens,
        transfers_completed: ledger.pulls.ok,
        ..Totals::default()
    };
    drop(ledger);
    let load = Load {
        running: u32::try_from(running).unwrap_or(u32::MAX),
        waiting: u32::try_from(engine.waiting()).unwrap_or(u32::MAX),
        kv_blocks_total: 1 << 20,
        ..Load::default()
    };
    let status = Status {
        role: match engine.args.role {
            MockRole::Prefill => Role::Prefill,
            MockRole::Decode => Role::Decode,
            MockRole::Both => Role::PrefillDecode,
        },
        revision: engine.args.revision.clone(),
        epoch: engine.epoch,
        model: engine.args.model.clone(),
        fingerprint: Some(engine.fingerprint),
        kv_address: Some(engine.side.to_string()),
        state: State::Ready,
        progress: None,
        max_model_length: Some(MODEL_LENGTH_MAX),
        block_tokens: BLOCK_TOKENS,
        load,
        totals,
        bootstrap_port: None,
        rank_loads: Vec::new(),
        adapters: Vec::new(),
    };
    json(&status)
}

/// Turns a request into token ids.
///
/// # Errors
/// When it has no prompt.
pub(crate) fn render(engine: &Engine, number: u64, body: &[u8]) -> Result<Outcome, Refusal> {
    let request: RenderRequest = serde_json::from_slice(body).map_err(|error| unreadable(engine, number, &error))?;
    let ask = Ask::read(request.body.get().as_bytes())?;
    let prompts = ask.raw_prompts()?.into_iter().map(|raw| RenderedPrompt {
        token_ids: token_ids(raw),
        block_hashes: Vec::new(),
        cached_tokens: 0,
    });
    let rendered = RenderResponse {
        prompts: prompts.collect(),
        choices: u32::try_from(ask.choices()).unwrap_or(u32::MAX),
        stream: ask.streams(),
        seed: ask.seed,
    };
    Ok(Outcome::Json(json(&rendered)))
}

/// Ids are taken as they are; of text, four characters are a token.
fn token_ids(raw: &RawValue) -> Vec<u32> {
    serde_json::from_str::<Vec<u32>>(raw.get()).unwrap_or_else(|_| {
        let text: String = serde_json::from_str(raw.get()).unwrap_or_else(|_| raw.get().to_owned());
        let ids = text.as_bytes().chunks(4).map(|bytes| (Seed::of(bytes).0 % 32_000) as u32);
        ids.collect()
    })
}

/// A leg as it came.
///
/// # Errors
/// When it is none.
pub(crate) fn read(engine: &Engine, number: u64, body: &[u8]) -> Result<LegRequest, Refusal> {
    let leg: LegRequest = serde_json::from_slice(body).map_err(|error| unreadable(engine, number, &error))?;
    if leg.prompts.iter().any(Vec::is_empty) || leg.prompts.is_empty() {
        engine.violated(Rule::LegUnreadable, number, "a prompt without tokens");
        return Err(Refusal::new(400, Rule::LegUnreadable.sentence()));
    }
    Ok(leg)
}

fn unreadable(engine: &Engine, number: u64, error: &serde_json::Error) -> Refusal {
    engine.violated(Rule::LegUnreadable, number, error.to_string());
    Refusal::new(400, Rule::LegUnreadable.sentence())
}

/// The leg's request to generate.
///
/// # Errors
/// When the client's body can't be served.
pub(crate) fn call<'a>(
    number: u64,
    leg: &LegRequest,
    ask: &'a Ask<'a>,
    headers: &'a HeaderMap,
    failure: Option<Failure>,
) -> Result<Call<'a>, Refusal> {
    let api = match leg.endpoint {
        Endpoint::Chat => Api::Chat,
        Endpoint::Completions => Api::Completions,
    };
    let mut call = Call::new(number, api, ask, headers, failure)?;
    let tokens = leg.prompts.iter().map(|prompt| prompt.len() as u64).sum();
    // The draws of our engine are a function of the leg's seed and the place, whatever the prompt.
    call.prompt = Prompt { count: leg.prompts.len() as u64, is_list: false, tokens, seed: Seed(leg.seed) };
    Ok(call)
}

/// Serves a prefill leg: its answer comes when the KV has gone over.
///
/// # Errors
/// When the leg is wrong, meets an error, or the decode leg does not come.
pub(crate) async fn prefill(engine: &Arc<Engine>, call: &Call<'_>, leg: &LegRequest) -> Result<Outcome, Refusal> {
    if leg.transfers.len() != leg.prompts.len() {
        engine.violated(Rule::TransferMissing, call.number, transfers_found(leg));
        return Err(Refusal::new(400, Rule::TransferMissing.sentence()));
    }
    if engine.args.role == MockRole::Decode {
        engine.violated(Rule::WrongRole, call.number, "a prefill leg at a decode engine");
    }
    call.admitted().await?;
    let seed = prompts_seed(leg);
    let mut places = Vec::with_capacity(leg.transfers.len());
    for transfer in &leg.transfers {
        let entered = engine.rooms.enter(room(transfer), Side::Prefill, seed);
        places.push(entered.map_err(|_| duplicate(engine, call))?);
    }
    engine.compute(call.prompt.tokens).await;
    call.before_head().await;
    let met = async {
        for place in &mut places {
            if !place.other(seed).await {
                engine.violated(Rule::LegsDiffer, call.number, "the decode leg's prompt is another");
            }
        }
    };
    let met = tokio::time::timeout(engine.args.bootstrap_timeout, met).await;
    met.map_err(|_| Refusal::new(500, "the decode leg did not come before the lease ended"))?;
    places.iter().for_each(super::rooms::Place::hand_over);
    let done = PrefillDone {
        prompt_tokens: call.prompt.tokens,
        cached_tokens: engine.cached_tokens(call.prompt.tokens),
        kv_bytes: call.prompt.tokens * KV_BYTES_PER_TOKEN,
        compute_ms: 0.0,
    };
    Ok(Outcome::Json(json(&done)))
}

/// Serves a decode leg.
///
/// # Errors
/// When the leg is wrong or meets an error.
pub(crate) async fn decode(engine: &Arc<Engine>, call: &Call<'_>, leg: &LegRequest) -> Result<Outcome, Refusal> {
    if !leg.transfers.is_empty() && leg.transfers.len() != leg.prompts.len() {
        engine.violated(Rule::TransferMissing, call.number, transfers_found(leg));
        return Err(Refusal::new(400, Rule::TransferMissing.sentence()));
    }
    if engine.args.role == MockRole::Prefill {
        engine.violated(Rule::WrongRole, call.number, "a decode leg at a prefill engine");
    }
    call.admitted().await?;
    let mut path = leg.planned;
    let mut cached = engine.cached_tokens(call.prompt.tokens);
    if leg.transfers.is_empty() {
        engine.compute(call.prompt.tokens).await;
    } else if let Err(reason) = fetch(engine, call, leg).await {
        path = Path::Fallback(reason);
        engine.ledger().pulls.recomputed += 1;
        engine.compute(call.prompt.tokens).await;
    } else {
        engine.ledger().pulls.ok += leg.transfers.len() as u64;
        cached = wrongly_cached(call.prompt.tokens);
    }
    let mut answer = call.answer(engine, cached);
    answer.start = leg.prompts.first().map_or(0, |prompt| u32::try_from(prompt.len()).unwrap_or(u32::MAX));
    answer.with_ids = call.headers.get(headers::TOKEN_IDS).is_some_and(|value| value == "1");
    call.before_head().await;
    call.generate(engine, &answer).await;
    Ok(Outcome::Answered(answer, vec![(headers::PATH, path.to_string())]))
}

/// Meets the prefill leg of each transfer.
async fn fetch(engine: &Arc<Engine>, call: &Call<'_>, leg: &LegRequest) -> Result<(), PathReason> {
    let seed = prompts_seed(leg);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64);
    for transfer in &leg.transfers {
        if let Some(found) = is_foreign(engine, transfer, now) {
            engine.violated(Rule::ForeignToken, call.number, found);
            return Err(PathReason::Unauthorized);
        }
        let join = peer::Call::Join { seed, rooms: vec![room(transfer)], rank: None };
        let word = tokio::time::timeout(engine.args.bootstrap_timeout, engine.links.call(&transfer.source, join)).await;
        match word {
            Ok(Word::Ok | Word::OkOtherId) => {}
            Ok(Word::Duplicate) => {
                duplicate(engine, call);
                return Err(PathReason::Protocol);
            }
            Ok(Word::Unknown | Word::Freed) => return Err(PathReason::LeaseExpired),
            Ok(Word::Unreachable) => {
                engine.ledger().pulls.unreachable += 1;
                return Err(PathReason::PrefillUnreachable);
            }
            Err(_) => return Err(PathReason::Timeout),
        }
    }
    Ok(())
}

/// What is wrong with a transfer's token, where there is a key to check it with.
fn is_foreign(engine: &Engine, transfer: &Transfer, now_unix_ms: u64) -> Option<String> {
    let key = engine.key.as_ref()?;
    match signing::verify::<TransferClaims>(key, &transfer.token, now_unix_ms) {
        Err(error) => Some(error.to_string()),
        Ok(claims) if (claims.transfer, claims.attempt) != (transfer.id, transfer.attempt) => {
            Some("it is of another transfer or attempt".to_owned())
        }
        Ok(claims) if claims.consumer != engine.epoch => Some("it is for another worker".to_owned()),
        Ok(claims) if claims.fingerprint != engine.fingerprint => Some("it is for another model".to_owned()),
        Ok(_) => None,
    }
}

fn duplicate(engine: &Engine, call: &Call<'_>) -> Refusal {
    engine.violated(Rule::DuplicateRoom, call.number, "a leg of this side has the transfer");
    Refusal::new(409, Rule::DuplicateRoom.sentence())
}

fn transfers_found(leg: &LegRequest) -> String {
    format!("{} transfers for {} prompts", leg.transfers.len(), leg.prompts.len())
}

/// Each attempt has a room of its own: a higher one does not wait for a lower one's end.
fn room(transfer: &Transfer) -> Room {
    Room::from_be_bytes(transfer.id.0) ^ Room::from(transfer.attempt)
}

fn prompts_seed(leg: &LegRequest) -> Seed {
    let bytes: Vec<u8> = leg.prompts.iter().flatten().flat_map(|id| id.to_le_bytes()).collect();
    Seed::of(&bytes)
}

fn json(value: &impl serde::Serialize) -> String {
    serde_json::to_string(value).expect("strings, numbers and lists always serialise")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_stay_and_text_becomes_some() {
        let raw = |text: &str| RawValue::from_string(text.to_owned()).expect("JSON");
        assert_eq!(token_ids(&raw("[5, 6]")), [5, 6]);
        assert_eq!(token_ids(&raw("\"eight ch\"")).len(), 2);
        assert_eq!(token_ids(&raw("\"same\"")), token_ids(&raw("\"same\"")));
        assert!(!token_ids(&raw("[{\"role\":\"user\"}]")).is_empty());
    }
}
