//! Sampling parameters: what the client says, else what the model's `generation_config.json` says (as vLLM does), else the API's
//! defaults.

use super::error::RequestError;
use super::fields::{Fields, integer, number};
use super::limits::{
    LOGIT_BIAS, LOGIT_BIAS_MAX, MIN_P, PENALTY, REPETITION_PENALTY, TEMPERATURE, TOP_LOGPROBS_MAX, TOP_P,
};
use baton_engine::config::GenerationDefaults;
use baton_engine::sampling::SamplingParams;
use baton_wire::render::Endpoint;

/// Takes every sampling parameter out of a request.
pub(super) fn take(
    fields: &mut Fields,
    endpoint: Endpoint,
    defaults: &GenerationDefaults,
    vocab_size: u32,
) -> Result<SamplingParams, RequestError> {
    let api = SamplingParams::default();
    // -1 is vLLM's way to say "all", 0 is ours and Hugging Face's.
    let top_k = fields.integer("top_k", -1..=i64::from(u32::MAX))?.map(|k| u32::try_from(k).unwrap_or(0));
    Ok(SamplingParams {
        temperature: fields.number("temperature", TEMPERATURE)?.or(defaults.temperature).unwrap_or(api.temperature),
        top_k: top_k.or(defaults.top_k).unwrap_or(api.top_k),
        top_p: fields.number("top_p", TOP_P)?.or(defaults.top_p).unwrap_or(api.top_p),
        min_p: fields.number("min_p", MIN_P)?.or(defaults.min_p).unwrap_or(api.min_p),
        repetition_penalty: fields
            .number("repetition_penalty", REPETITION_PENALTY)?
            .or(defaults.repetition_penalty)
            .unwrap_or(api.repetition_penalty),
        presence_penalty: fields.number("presence_penalty", PENALTY)?.unwrap_or(api.presence_penalty),
        frequency_penalty: fields.number("frequency_penalty", PENALTY)?.unwrap_or(api.frequency_penalty),
        logit_bias: logit_bias(fields, vocab_size)?,
        logprobs: logprobs(fields, endpoint)?,
        logits_hash: false,
    })
}

fn logit_bias(fields: &mut Fields, vocab_size: u32) -> Result<Vec<(u32, f32)>, RequestError> {
    let Some(biases) = fields.object("logit_bias")? else { return Ok(Vec::new()) };
    let mut list = Vec::new();
    for (name, value) in biases.into_map() {
        // Written in one way only, so that no token has two biases.
        let id = name.parse::<u64>().ok().filter(|id| id.to_string() == name);
        let id = id.ok_or_else(|| RequestError::WrongType {
            param: "logit_bias".to_owned(),
            expected: "an object whose keys are token ids",
            found: "another key",
        })?;
        let id = super::fields::token("logit_bias", &id.into(), vocab_size)?;
        list.push((id, number(&format!("logit_bias.{id}"), &value, LOGIT_BIAS)?));
    }
    if list.len() > LOGIT_BIAS_MAX {
        let param = "logit_bias".to_owned();
        return Err(RequestError::TooMany { param, found: list.len(), unit: "entries", max: LOGIT_BIAS_MAX });
    }
    list.sort_unstable_by_key(|(id, _)| *id);
    Ok(list)
}

/// Chat has a switch and a count, completions a count alone.
fn logprobs(fields: &mut Fields, endpoint: Endpoint) -> Result<Option<u32>, RequestError> {
    let count = |count: i64| u32::try_from(count).expect("the range starts at 0 and ends at 20");
    match endpoint {
        Endpoint::Chat => {
            let wanted = fields.boolean("logprobs")?.unwrap_or(false);
            let top = fields.integer("top_logprobs", 0..=TOP_LOGPROBS_MAX)?;
            match (wanted, top) {
                (true, top) => Ok(Some(count(top.unwrap_or(0)))),
                (false, None | Some(0)) => Ok(None),
                (false, Some(_)) => Err(RequestError::Conflict {
                    param: "top_logprobs".to_owned(),
                    reason: "needs logprobs to be true",
                }),
            }
        }
        Endpoint::Completions => match fields.value("logprobs") {
            None => Ok(None),
            Some(value) => Ok(Some(count(integer("logprobs", &value, 0..=TOP_LOGPROBS_MAX)?))),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampling(endpoint: Endpoint, json: &str) -> Result<SamplingParams, RequestError> {
        let defaults = GenerationDefaults { temperature: Some(0.6), top_k: Some(20), ..Default::default() };
        take(&mut Fields::parse(json).expect("JSON"), endpoint, &defaults, 100)
    }

    #[test]
    fn the_request_beats_the_model_beats_the_api() {
        let params = sampling(Endpoint::Chat, r#"{"temperature":0,"top_p":null}"#).expect("valid");
        assert_eq!((params.temperature, params.top_k, params.top_p), (0.0, 20, 1.0));
        assert_eq!(sampling(Endpoint::Chat, "{}").expect("valid").temperature, 0.6);
        assert_eq!(sampling(Endpoint::Chat, r#"{"top_k":-1}"#).expect("valid").top_k, 0);
    }

    #[test]
    fn logprobs_follow_the_endpoint() {
        assert_eq!(sampling(Endpoint::Completions, r#"{"logprobs":0}"#).expect("valid").logprobs, Some(0));
        assert_eq!(sampling(Endpoint::Chat, r#"{"logprobs":true,"top_logprobs":5}"#).expect("valid").logprobs, Some(5));
        assert_eq!(sampling(Endpoint::Chat, r#"{"logprobs":false}"#).expect("valid").logprobs, None);
        assert!(sampling(Endpoint::Chat, r#"{"logprobs":5}"#).is_err());
        assert!(sampling(Endpoint::Completions, r#"{"logprobs":true}"#).is_err());
    }

    #[test]
    fn a_bias_is_sorted_by_token_and_each_token_must_exist() {
        let params = sampling(Endpoint::Chat, r#"{"logit_bias":{"9":1,"2":-100}}"#).expect("valid");
        assert_eq!(params.logit_bias, [(2, -100.0), (9, 1.0)]);
        for bias in [
            r#"{"100":1}"#,
            r#"{"a":1}"#,
            r#"{"1":101}"#,
            r#"{"1":"x"}"#,
            r#"{"1.5":1}"#,
            r#"{"05":1}"#,
            r#"{"+5":1}"#,
            "[]",
        ] {
            assert!(sampling(Endpoint::Chat, &format!(r#"{{"logit_bias":{bias}}}"#)).is_err(), "{bias}");
        }
    }

    #[test]
    fn each_value_outside_its_range_names_its_field() {
        for (field, value) in [
            ("temperature", "-0.1"),
            ("temperature", "2.1"),
            ("temperature", "\"hot\""),
            ("top_p", "0"),
            ("top_p", "1.1"),
            ("top_k", "-2"),
            ("top_k", "1.5"),
            ("min_p", "1.1"),
            ("repetition_penalty", "0"),
            ("presence_penalty", "2.1"),
            ("frequency_penalty", "-2.1"),
            ("top_logprobs", "21"),
            ("top_logprobs", "1"),
        ] {
            let error = sampling(Endpoint::Chat, &format!("{{\"{field}\":{value}}}")).expect_err(field);
            assert_eq!(error.param(), Some(field), "{field}={value}: {error}");
        }
    }
}
