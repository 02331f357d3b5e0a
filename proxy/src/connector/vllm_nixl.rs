//! The protocol of vLLM's `NixlConnector` in pull mode: the prefill worker answers first, with a handle to the KV that
//! it keeps, and the decode worker is sent the client's request with that handle in it.
//!
//! The handle is opaque: it is relayed byte for byte, so that fields of later versions arrive as well. A handle that
//! the client sends never reaches a worker: it names a host that the worker would connect to.
//!
//! Push mode is left out. There the decode worker must be told the prefill worker's engine id and side channel before
//! that one has answered, and no HTTP interface of vLLM gives them.

use crate::api::{Api, Hints, count};
use crate::json::scan::{DEPTH_MAX, Object, ScanError, scan};
use crate::json::splice::{Change, Changes, splice_pieces};
use crate::json::usage::Usage;
use crate::payload::Payload;
use bytes::Bytes;

/// The member that carries the protocol, in requests and in answers.
const PARAMS: &str = "kv_transfer_params";

/// What asks a prefill worker to keep the prompt's KV for another worker.
pub(crate) const KEEP: &[u8] = br#"{"do_remote_decode":true,"do_remote_prefill":false,"remote_engine_id":null,"remote_block_ids":null,"remote_host":null,"remote_port":null}"#;

/// Without one of these a decode worker says nothing and computes the prompt again.
const NEEDED: [&str; 3] = ["remote_engine_id", "remote_host", "remote_port"];

/// Parameters can also be smuggled in where vLLM hands extra arguments through to its connector.
const NO_PARAMS: Changes<'static> = &[(PARAMS, Change::Remove)];
const NO_XARGS: (&str, Change<'static>) = ("vllm_xargs", Change::Within(NO_PARAMS));
const NO_EXTRA_ARGS: (&str, Change<'static>) = ("extra_args", Change::Within(NO_PARAMS));

/// Why a request's KV can't be handed from one vLLM worker to another. A closed list: these are metric labels too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Reason {
    /// The first choice to be scheduled takes the KV and frees it; the others would find nothing.
    SeveralChoices,
    /// As with several choices.
    BestOf,
    /// As with several choices: each beam is a request of its own.
    BeamSearch,
    /// The answer has a handle for the first prompt alone: the KV of the others would stay until its lease ends, and
    /// the decode worker would take the first prompt's KV for all of them.
    SeveralPrompts,
    /// Only who computes the prompt has them. A decode worker with received KV reads memory that was never written, or
    /// crashes (`vllm#50792`).
    PromptLogprobs,
    /// The worker that stored it has to serve it; others don't know it.
    StoredConversation,
}

/// Whether the KV of a request can be handed over at all.
///
/// # Errors
/// Why one worker has to serve all of it.
pub(crate) fn can_hand_over(hints: &Hints<'_>) -> Result<(), Reason> {
    let reasons = [
        (hints.choices != 1, Reason::SeveralChoices),
        (hints.best_of != 1, Reason::BestOf),
        (hints.beam_search, Reason::BeamSearch),
        (hints.prompts != 1, Reason::SeveralPrompts),
        (hints.prompt_logprobs, Reason::PromptLogprobs),
        (hints.stored_conversation, Reason::StoredConversation),
    ];
    reasons.into_iter().find(|(applies, _)| *applies).map_or(Ok(()), |(_, reason)| Err(reason))
}

/// KV that a prefill worker keeps for a decode worker.
#[derive(Clone, Debug)]
pub(crate) struct Handle {
    params: Bytes,
    usage: Usage,
}

/// Why a prefill worker's answer is no handle.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum HandleError {
    /// It is no JSON.
    #[error("the prefill worker's answer is no JSON object")]
    NotJson(#[source] ScanError),
    /// The worker runs without the connector, or kept nothing.
    #[error("the prefill worker's answer has no {PARAMS}")]
    Absent,
    /// The worker kept no block: the prompt fills none.
    #[error("the prefill worker kept no block")]
    NoBlocks,
    /// The KV is kept but can't be fetched.
    #[error("the prefill worker's {PARAMS} lack {0}")]
    Incomplete(&'static str),
}

impl Handle {
    /// Reads a prefill worker's answer.
    ///
    /// # Errors
    /// There is nothing that a decode worker could fetch.
    pub(crate) fn read(api: Api, answer: &Bytes) -> Result<Handle, HandleError> {
        let object = scan(answer, DEPTH_MAX).map_err(HandleError::NotJson)?;
        let span = object.span(PARAMS).ok_or(HandleError::Absent)?;
        let params = object.object(PARAMS).ok_or(HandleError::Absent)?;
        // One list for each group of layers; they may all be empty.
        if !params.given("remote_block_ids").is_some_and(|ids| ids.iter().any(u8::is_ascii_digit)) {
            return Err(HandleError::NoBlocks);
        }
        if let Some(field) = NEEDED.into_iter().find(|field| params.given(field).is_none()) {
            return Err(HandleError::Incomplete(field));
        }
        Ok(Handle { params: answer.slice(span), usage: Usage::read(api, &object) })
    }

    /// The parameters as the prefill worker wrote them.
    #[cfg(test)]
    pub(crate) fn params(&self) -> &Bytes {
        &self.params
    }

    /// How much of the prompt the prefill worker had cached. vLLM leaves the number out when it is 0.
    pub(crate) fn cached_tokens(&self) -> u64 {
        self.usage.cached_tokens.unwrap_or(0)
    }

    /// How long the prompt was, if the prefill worker said so.
    pub(crate) fn prompt_tokens(&self) -> Option<u64> {
        self.usage.prompt_tokens
    }
}

/// The prefill leg: the client's request for one token, whose KV is kept. `params` replaces [`KEEP`].
pub(crate) fn prefill(object: &Object, api: Api, params: Option<&[u8]>) -> Payload {
    one_token(object, api, params.unwrap_or(KEEP))
}

/// The decode leg: the client's request with the handle.
pub(crate) fn decode(object: &Object, handle: &Handle) -> Payload {
    let sampling = [NO_EXTRA_ARGS];
    splice_pieces(
        object,
        &[(PARAMS, Change::Set(&handle.params)), ("sampling_params", Change::Within(&sampling)), NO_XARGS],
    )
}

/// What frees the KV that a handle stands for when nobody wants the answer any more: a decode leg for one token. Any
/// decode worker that it reaches tells the prefill worker, whether it serves the request or not.
pub(crate) fn release(object: &Object, api: Api, handle: &Handle) -> Payload {
    one_token(object, api, &handle.params)
}

/// The request for a worker that computes the prompt itself. Without parameters of the client's it is the same
/// [`Bytes`].
pub(crate) fn local(object: &Object) -> Payload {
    let sampling = [NO_EXTRA_ARGS];
    splice_pieces(object, &[(PARAMS, Change::Remove), ("sampling_params", Change::Within(&sampling)), NO_XARGS])
}

/// The request for one token and one choice, in one piece.
fn one_token(object: &Object, api: Api, params: &[u8]) -> Payload {
    const ONE: Change<'static> = Change::Set(b"1");
    const ONE_IF_THERE: Change<'static> = Change::Replace(b"1");
    const FALSE: Change<'static> = Change::Set(b"false");
    // More would contradict the cap, and vLLM refuses that.
    let min_tokens = |object: &Object| {
        let above = object.given("min_tokens").and_then(count).is_some_and(|min| min > 1);
        above.then_some(("min_tokens", ONE_IF_THERE))
    };
    let mut sampling = vec![NO_EXTRA_ARGS];
    let mut changes =
        vec![(PARAMS, Change::Set(params)), ("stream", FALSE), ("stream_options", Change::Remove), NO_XARGS];
    match api {
        Api::Chat => changes.extend([("max_tokens", ONE), ("max_completion_tokens", ONE_IF_THERE)]),
        Api::Completions | Api::Messages => changes.push(("max_tokens", ONE)),
        // In the background, an answer would come before there is KV; stored, it would stay on a worker that is never
        // asked.
        Api::Responses => {
            changes.extend([("max_output_tokens", ONE), ("background", Change::Remove), ("store", FALSE)]);
        }
        Api::Generate | Api::SglangGenerate => {
            sampling.extend([("n", ONE_IF_THERE), ("best_of", Change::Remove)]);
            sampling.push((if api == Api::Generate { "max_tokens" } else { "max_new_tokens" }, ONE));
            sampling.extend(object.object("sampling_params").as_ref().and_then(min_tokens));
        }
    }
    changes.extend([("n", ONE_IF_THERE), ("best_of", Change::Remove)]);
    changes.extend(min_tokens(object));
    changes.push(("sampling_params", Change::Within(&sampling)));
    splice_pieces(object, &changes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    // Bodies as one piece, which is what is looked at.
    fn prefill(object: &Object, api: Api, params: Option<&[u8]>) -> Bytes {
        super::prefill(object, api, params).to_bytes()
    }

    fn decode(object: &Object, handle: &Handle) -> Bytes {
        super::decode(object, handle).to_bytes()
    }

    fn release(object: &Object, api: Api, handle: &Handle) -> Bytes {
        super::release(object, api, handle).to_bytes()
    }

    fn local(object: &Object) -> Bytes {
        super::local(object).to_bytes()
    }

    fn object(text: &str) -> Object {
        scan(&Bytes::copy_from_slice(text.as_bytes()), DEPTH_MAX).expect("valid")
    }

    fn value(body: &[u8]) -> Value {
        serde_json::from_slice(body).expect("valid")
    }

    const ANSWER: &str = r#"{"id":"x","choices":[{"text":"a"}],"usage":{"prompt_tokens":128,"prompt_tokens_details":{"cached_tokens":64}},
        "kv_transfer_params": {"do_remote_prefill":true, "do_remote_decode":false,"remote_block_ids":[[1,2 ,3]],"remote_engine_id":"e",
        "remote_request_id":"r","remote_host":"10.0.0.1","remote_port":5600,"tp_size":1,"a_later_field":1.50e1}}"#;

    fn handle() -> Handle {
        Handle::read(Api::Chat, &Bytes::from_static(ANSWER.as_bytes())).expect("a handle")
    }

    fn check(api: Api, body: &str, expect: &str) {
        let keep = std::str::from_utf8(KEEP).expect("text");
        let out = prefill(&object(body), api, None);
        assert_eq!(String::from_utf8_lossy(&out), expect.replace("KEEP", keep), "{api:?} {body}");
    }

    #[test]
    fn the_prefill_leg_asks_to_keep_the_kv_with_all_six_keys() {
        let keys = value(KEEP);
        let keys: Vec<&String> = keys.as_object().expect("an object").keys().collect();
        assert_eq!(
            keys,
            [
                "do_remote_decode",
                "do_remote_prefill",
                "remote_engine_id",
                "remote_block_ids",
                "remote_host",
                "remote_port"
            ]
        );
        let own = prefill(&object(r#"{"max_tokens":1}"#), Api::Chat, Some(br#"{"x":1}"#));
        assert_eq!(value(&own)["kv_transfer_params"], json!({"x": 1}));
    }

    // Problem 14, `llm-d-routing-sidecar#67`: with only `max_tokens` capped the prefill worker generates the whole
    // answer.
    #[test]
    fn every_cap_of_every_interface_is_one_on_the_prefill_leg() {
        check(
            Api::Chat,
            r#"{"model":"m", "max_tokens":100,"stream":true,"stream_options":{"include_usage":true},"temperature":0.10}"#,
            r#"{"model":"m", "max_tokens":1,"stream":false,"temperature":0.10,"kv_transfer_params":KEEP}"#,
        );
        check(
            Api::Chat,
            r#"{"max_completion_tokens":100}"#,
            r#"{"max_completion_tokens":1,"kv_transfer_params":KEEP,"stream":false,"max_tokens":1}"#,
        );
        check(Api::Chat, r#"{"stream":true}"#, r#"{"stream":false,"kv_transfer_params":KEEP,"max_tokens":1}"#);
        check(
            Api::Completions,
            r#"{"max_tokens":null}"#,
            r#"{"max_tokens":1,"kv_transfer_params":KEEP,"stream":false}"#,
        );
        check(
            Api::Responses,
            r#"{"background":true,"max_output_tokens":100,"store":true}"#,
            r#"{"max_output_tokens":1,"store":false,"kv_transfer_params":KEEP,"stream":false}"#,
        );
        check(Api::Messages, r#"{"max_tokens":9}"#, r#"{"max_tokens":1,"kv_transfer_params":KEEP,"stream":false}"#);
        check(
            Api::Generate,
            r#"{"token_ids":[1,2],"sampling_params":{"max_tokens":9, "top_k":3,"n":1,"best_of":1,"min_tokens":4}}"#,
            r#"{"token_ids":[1,2],"sampling_params":{"max_tokens":1, "top_k":3,"n":1,"min_tokens":1},"kv_transfer_params":KEEP,"stream":false}"#,
        );
        check(
            Api::Generate,
            r#"{"token_ids":[1]}"#,
            r#"{"token_ids":[1],"kv_transfer_params":KEEP,"stream":false,"sampling_params":{"max_tokens":1}}"#,
        );
        check(
            Api::Chat,
            r#"{"max_tokens":7,"max_tokens":8}"#,
            r#"{"max_tokens":1,"kv_transfer_params":KEEP,"stream":false}"#,
        );
    }

    // Problem 14: vLLM refuses a request whose `min_tokens` is above its `max_tokens`.
    #[test]
    fn min_tokens_never_contradict_the_cap() {
        let min = |body: &str| value(&prefill(&object(body), Api::Chat, None)).get("min_tokens").cloned();
        assert_eq!(min(r#"{"min_tokens":5}"#), Some(json!(1)));
        assert_eq!(min(r#"{"min_tokens":"5"}"#), Some(json!(1)));
        assert_eq!(min(r#"{"min_tokens":0}"#), Some(json!(0)));
        assert_eq!(min(r#"{"min_tokens":-1}"#), Some(json!(-1)));
        assert_eq!(min(r#"{"min_tokens":null}"#), Some(json!(null)));
        assert_eq!(min("{}"), None);
    }

    #[test]
    fn the_prefill_leg_has_one_choice() {
        let out = value(&prefill(&object(r#"{"n":4,"best_of":5,"logprobs":true,"top_logprobs":2}"#), Api::Chat, None));
        assert_eq!((&out["n"], out.get("best_of")), (&json!(1), None));
        assert_eq!((&out["logprobs"], &out["top_logprobs"]), (&json!(true), &json!(2)));
    }

    #[test]
    fn the_handle_is_relayed_byte_for_byte() {
        let handle = handle();
        let raw = object(ANSWER);
        assert_eq!(handle.params(), raw.get("kv_transfer_params").expect("there"));
        assert!(handle.params().ends_with(br#""a_later_field":1.50e1}"#));
        let body = r#"{"model":"m","max_tokens":100,"stream":true,"x":1.0}"#;
        let params = std::str::from_utf8(handle.params()).expect("text");
        let expect = format!(r#"{{"model":"m","max_tokens":100,"stream":true,"x":1.0,"kv_transfer_params":{params}}}"#);
        assert_eq!(decode(&object(body), &handle), expect);
    }

    // Problem 6, `vllm-router#193`: the number that the client is to see comes from here.
    #[test]
    fn the_handle_tells_what_the_prefill_worker_had_cached() {
        assert_eq!((handle().cached_tokens(), handle().prompt_tokens()), (64, Some(128)));
        let silent =
            ANSWER.replace(r#""prompt_tokens_details":{"cached_tokens":64}"#, r#""prompt_tokens_details":null"#);
        assert_eq!(Handle::read(Api::Chat, &silent.into()).map(|handle| handle.cached_tokens()), Ok(0));
    }

    impl PartialEq for Handle {
        fn eq(&self, other: &Self) -> bool {
            self.params == other.params
        }
    }

    #[test]
    fn an_answer_without_kept_blocks_is_no_handle() {
        let check = |answer: &str, expect: HandleError| {
            assert_eq!(Handle::read(Api::Chat, &Bytes::copy_from_slice(answer.as_bytes())), Err(expect), "{answer}");
        };
        check("{}", HandleError::Absent);
        check(r#"{"kv_transfer_params":null}"#, HandleError::Absent);
        check(r#"{"kv_transfer_params":[1]}"#, HandleError::Absent);
        for ids in ["", r#""remote_block_ids":null"#, r#""remote_block_ids":[]"#, r#""remote_block_ids":[[],[]]"#] {
            check(&format!(r#"{{"kv_transfer_params":{{{ids}}}}}"#), HandleError::NoBlocks);
        }
        check(
            &ANSWER.replace(r#""remote_port":5600"#, r#""remote_port":null"#),
            HandleError::Incomplete("remote_port"),
        );
        check(&ANSWER.replace("remote_host", "host"), HandleError::Incomplete("remote_host"));
        assert!(matches!(Handle::read(Api::Chat, &Bytes::from_static(b"oops")), Err(HandleError::NotJson(_))));
        let flat = ANSWER.replace("[[1,2 ,3]]", "[7]");
        assert!(Handle::read(Api::Chat, &flat.into()).is_ok());
    }

    // Problem 1, `vllm#41269`: as long as a request with the handle reaches a decode worker, the prefill worker's KV is
    // freed.
    #[test]
    fn a_release_is_a_decode_leg_for_one_token() {
        let body = r#"{"stream":true,"max_completion_tokens":500,"min_tokens":20,"kv_transfer_params":{"remote_host":"evil"}}"#;
        let out = value(&release(&object(body), Api::Chat, &handle()));
        assert_eq!(out["kv_transfer_params"], value(handle().params()));
        assert_eq!(
            (&out["stream"], &out["max_tokens"], &out["max_completion_tokens"], &out["min_tokens"]),
            (&json!(false), &json!(1), &json!(1), &json!(1))
        );
    }

    #[test]
    fn a_local_request_without_parameters_is_the_clients_own_bytes() {
        let object = object(r#"{"model":"m","sampling_params":{"n":1},"vllm_xargs":{"a":1}}"#);
        assert_eq!(local(&object).as_ptr(), object.body().as_ptr());
    }

    const SMUGGLED: [&str; 8] = [
        r#"{"kv_transfer_params":{"remote_host":"evil"},"x":1}"#,
        r#"{"x":1,"kv_transfer_params":{"remote_host":"evil"}}"#,
        r#"{"kv_transfer_params":{"remote_host":"evil"},"x":1,"kv_transfer_params":{"remote_host":"evil"}}"#,
        r#"{"\u006bv_transfer_params":{"remote_host":"evil"},"x":1}"#,
        r#"{"kv\u005ftransfer\u005Fparams":{"remote_host":"evil"},"kv_transfer_params":null,"x":1}"#,
        r#"{"x":1,"sampling_params":{"extra_args":{"kv_transfer_params":{"remote_host":"evil"}}}}"#,
        r#"{"x":1,"sampling_params":{"extra_args":{}},"sampling_params":{"extra_\u0061rgs":{"kv_transfer_params":{"remote_host":"evil"}}}}"#,
        r#"{"x":1,"vllm_xargs":{"kv_transfer_params":{"remote_host":"evil"}}}"#,
    ];

    #[test]
    fn parameters_of_the_clients_never_reach_a_worker() {
        let handle = handle();
        for body in SMUGGLED {
            let object = object(body);
            let mut legs = vec![local(&object), decode(&object, &handle)];
            for api in Api::ALL {
                legs.extend([prefill(&object, api, None), release(&object, api, &handle)]);
            }
            for leg in legs {
                assert!(!leg.windows(4).any(|bytes| bytes == b"evil"), "{body}: {leg:?}");
                assert_eq!(value(&leg)["x"], json!(1));
            }
        }
    }

    #[test]
    fn a_request_whose_kv_has_several_takers_is_not_handed_over() {
        let check = |api: Api, body: &str, expect: Result<(), Reason>| {
            assert_eq!(can_hand_over(&Hints::read(api, &object(body))), expect, "{body}");
        };
        check(Api::Chat, r#"{"messages":[]}"#, Ok(()));
        check(Api::Chat, r#"{"n":1,"best_of":null,"use_beam_search":false}"#, Ok(()));
        check(Api::Chat, r#"{"n":2}"#, Err(Reason::SeveralChoices));
        check(Api::Chat, r#"{"n":"2"}"#, Err(Reason::SeveralChoices));
        check(Api::Completions, r#"{"best_of":3}"#, Err(Reason::BestOf));
        check(Api::Completions, r#"{"use_beam_search":true}"#, Err(Reason::BeamSearch));
        check(Api::Completions, r#"{"prompt":["a","b"]}"#, Err(Reason::SeveralPrompts));
        check(Api::Completions, r#"{"prompt":[[1],[2]]}"#, Err(Reason::SeveralPrompts));
        check(Api::Completions, r#"{"prompt":["a"]}"#, Ok(()));
        check(Api::Completions, r#"{"prompt":[1,2]}"#, Ok(()));
        check(Api::Completions, r#"{"echo":true,"logprobs":1}"#, Err(Reason::PromptLogprobs));
        check(Api::Responses, r#"{"previous_response_id":"r"}"#, Err(Reason::StoredConversation));
        check(Api::Generate, r#"{"token_ids":[1],"sampling_params":{"n":2}}"#, Err(Reason::SeveralChoices));
    }

    proptest! {
        #[test]
        fn unknown_members_keep_their_bytes_on_every_leg(
            members in prop::collection::vec(("[a-e_]{1,4}", "-?[1-9][0-9]{0,3}(\\.[0-9]{1,4})?(e\\+?[0-9]{1,2})?"), 0..6),
            stream in any::<bool>(),
        ) {
            let mut raw: Vec<String> = members.iter().map(|(key, number)| format!("\"x{key}\" : {number}")).collect();
            raw.insert(raw.len() / 2, format!("\"stream\":{stream}"));
            let object = object(&format!("{{ {} }}", raw.join(" , ")));
            for leg in [prefill(&object, Api::Chat, None), decode(&object, &handle()), local(&object)] {
                let text = String::from_utf8(leg.to_vec()).expect("text");
                let mut rest = text.as_str();
                for member in raw.iter().filter(|member| !member.starts_with("\"stream\"")) {
                    let (_, behind) = rest.split_once(member.as_str()).expect("there, in its order");
                    rest = behind;
                }
            }
        }
    }
}
