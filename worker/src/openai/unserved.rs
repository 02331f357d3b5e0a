//! Fields of the OpenAI API, and of its common extensions, that this server has no code for: which are harmless, and which must
//! be refused because the client would get something else than it asked for.

use super::error::RequestError;
use serde_json::Value;

/// When a field that has no effect here may be given.
enum Accepted {
    /// With any value: it never changes the answer.
    Always,
    /// With these values (as JSON), which ask for what happens anyway.
    Only(&'static [&'static str]),
    /// Never; the text says what to do instead.
    Never(&'static str),
}

use Accepted::{Always, Never, Only};

/// Each field once. `null` is accepted for all of them, as everywhere.
const UNSERVED: &[(&str, Accepted)] = &[
    // Book-keeping of the client's or the provider's, without an effect on the answer.
    ("user", Always),
    ("metadata", Always),
    ("safety_identifier", Always),
    ("prompt_cache_key", Always),
    ("prompt_cache_retention", Always),
    ("parallel_tool_calls", Always),
    ("store", Only(&["false"])),
    ("service_tier", Only(&["\"auto\"", "\"default\""])),
    ("priority", Only(&["0"])),
    // Tools and output formats.
    ("tools", Only(&["[]"])),
    ("tool_choice", Only(&["\"none\""])),
    ("functions", Only(&["[]"])),
    ("function_call", Only(&["\"none\""])),
    ("response_format", Only(&["{\"type\":\"text\"}"])),
    ("modalities", Only(&["[\"text\"]"])),
    ("audio", Never("")),
    ("prediction", Never("")),
    ("reasoning_effort", Never("")),
    ("verbosity", Never("")),
    ("web_search_options", Never("")),
    ("structured_outputs", Never("")),
    ("guided_json", Never("")),
    ("guided_regex", Never("")),
    ("guided_choice", Never("")),
    ("guided_grammar", Never("")),
    // Other ways to complete.
    ("suffix", Only(&["\"\""])),
    ("best_of", Only(&["1"])),
    ("use_beam_search", Only(&["false"])),
    ("length_penalty", Only(&["1", "1.0"])),
    ("prompt_logprobs", Never("")),
    ("bad_words", Only(&["[]"])),
    ("min_tokens", Only(&["0"])),
    ("allowed_token_ids", Never(": forbid tokens with logit_bias")),
    ("truncate_prompt_tokens", Never(": shorten the prompt before sending it")),
    // How the prompt is rendered and the completion is written.
    ("chat_template", Never(": the model's own template is used")),
    ("documents", Only(&["[]"])),
    ("add_generation_prompt", Only(&["true"])),
    ("continue_final_message", Only(&["false"])),
    ("add_special_tokens", Never("")),
    ("skip_special_tokens", Only(&["true"])),
    ("spaces_between_special_tokens", Only(&["true"])),
    ("return_tokens_as_token_ids", Only(&["false"])),
    ("return_token_ids", Only(&["false"])),
];

/// Decides about one field that no reader took.
///
/// # Errors
/// [`RequestError::Unsupported`] when ignoring it would change what the client gets, [`RequestError::UnknownField`] when the
/// API doesn't have it.
pub(super) fn check(name: &str, value: &Value) -> Result<(), RequestError> {
    let Some((_, accepted)) = UNSERVED.iter().find(|(known, _)| *known == name) else {
        return Err(RequestError::UnknownField { param: name.to_owned() });
    };
    let unsupported = |note: String| Err(RequestError::Unsupported { param: name.to_owned(), note });
    match accepted {
        Always => Ok(()),
        Only(values) if values.iter().any(|allowed| is(value, allowed)) => Ok(()),
        Only(values) => unsupported(format!(" with any value but {}", values.join(" or "))),
        Never(note) => unsupported((*note).to_owned()),
    }
}

fn is(value: &Value, allowed: &str) -> bool {
    serde_json::from_str::<Value>(allowed).is_ok_and(|allowed| allowed == *value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn each_field_stands_once_and_its_values_are_json() {
        for (at, (name, accepted)) in UNSERVED.iter().enumerate() {
            assert!(UNSERVED[at + 1..].iter().all(|(other, _)| other != name), "{name} stands twice");
            if let Only(values) = accepted {
                for value in *values {
                    serde_json::from_str::<Value>(value).expect(value);
                }
            }
        }
    }

    #[test]
    fn a_field_that_would_change_the_answer_is_refused_by_name() {
        assert_eq!(check("user", &json!("abc")), Ok(()));
        assert_eq!(check("tools", &json!([])), Ok(()));
        assert_eq!(check("response_format", &json!({"type": "text"})), Ok(()));
        for (name, value) in [
            ("tools", json!([{"type": "function"}])),
            ("response_format", json!({"type": "json_schema"})),
            ("store", json!(true)),
            ("suffix", json!("end")),
            ("audio", json!({})),
        ] {
            let error = check(name, &value).expect_err(name);
            assert!(matches!(&error, RequestError::Unsupported { param, .. } if param == name), "{error}");
        }
        assert_eq!(check("tempurature", &json!(1)), Err(RequestError::UnknownField { param: "tempurature".into() }));
    }
}
