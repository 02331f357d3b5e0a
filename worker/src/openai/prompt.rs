//! The prompts of a completions request: one or many, each as text or as token ids.

use super::error::RequestError;
use super::fields::{Fields, kind, token};
use super::limits::PROMPTS_MAX;
use serde_json::Value;

/// One prompt as the client wrote it.
#[derive(Clone, PartialEq, Eq)]
pub enum Prompt {
    /// Text, still to be tokenised.
    Text(String),
    /// Token ids, taken as they are.
    Tokens(Vec<u32>),
}

/// Says how long the prompt is and not what it says: prompts never enter a log.
impl std::fmt::Debug for Prompt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Prompt::Text(text) => write!(f, "Text({} bytes)", text.len()),
            Prompt::Tokens(tokens) => write!(f, "Tokens({})", tokens.len()),
        }
    }
}

const EXPECTED: &str = "a string, an array of strings, an array of token ids, or an array of arrays of token ids";

/// Takes `prompt` out of a request for a model with `vocab_size` tokens.
pub(super) fn take(fields: &mut Fields, vocab_size: u32) -> Result<Vec<Prompt>, RequestError> {
    let param = || "prompt".to_owned();
    let value = fields.value("prompt").ok_or_else(|| RequestError::Missing { param: param() })?;
    let list = match value {
        Value::String(text) => return Ok(vec![Prompt::Text(text)]),
        Value::Array(list) => list,
        other => return Err(RequestError::WrongType { param: param(), expected: EXPECTED, found: kind(&other) }),
    };
    match list.first() {
        None => Err(RequestError::Empty { param: param() }),
        Some(Value::Number(_)) => Ok(vec![Prompt::Tokens(tokens("prompt", &list, vocab_size)?)]),
        Some(_) if list.len() > PROMPTS_MAX => {
            Err(RequestError::TooMany { param: param(), found: list.len(), unit: "prompts", max: PROMPTS_MAX })
        }
        Some(_) => list
            .into_iter()
            .enumerate()
            .map(|(index, value)| one(&format!("prompt[{index}]"), value, vocab_size))
            .collect(),
    }
}

fn one(path: &str, value: Value, vocab_size: u32) -> Result<Prompt, RequestError> {
    match value {
        Value::String(text) => Ok(Prompt::Text(text)),
        Value::Array(list) if list.is_empty() => Err(RequestError::Empty { param: path.to_owned() }),
        Value::Array(list) => Ok(Prompt::Tokens(tokens(path, &list, vocab_size)?)),
        other => {
            let expected = "a string or an array of token ids";
            Err(RequestError::WrongType { param: path.to_owned(), expected, found: kind(&other) })
        }
    }
}

fn tokens(path: &str, list: &[Value], vocab_size: u32) -> Result<Vec<u32>, RequestError> {
    list.iter().enumerate().map(|(index, value)| token(&format!("{path}[{index}]"), value, vocab_size)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prompts(json: &str) -> Result<Vec<Prompt>, RequestError> {
        take(&mut Fields::parse(&format!("{{\"prompt\":{json}}}")).expect("JSON"), 100)
    }

    #[test]
    fn all_four_forms_are_read() {
        let text = |text: &str| Prompt::Text(text.to_owned());
        assert_eq!(prompts(r#""a""#), Ok(vec![text("a")]));
        assert_eq!(prompts(r#"["a","b"]"#), Ok(vec![text("a"), text("b")]));
        assert_eq!(prompts("[1,99]"), Ok(vec![Prompt::Tokens(vec![1, 99])]));
        assert_eq!(prompts("[[1],[2,3]]"), Ok(vec![Prompt::Tokens(vec![1]), Prompt::Tokens(vec![2, 3])]));
    }

    #[test]
    fn each_wrong_prompt_names_its_place() {
        for (json, param) in [
            ("{}", "prompt"),
            ("[]", "prompt"),
            ("[1,\"a\"]", "prompt[1]"),
            ("[1,100]", "prompt[1]"),
            ("[[1],[]]", "prompt[1]"),
            ("[[1],[-1]]", "prompt[1][0]"),
            ("[\"a\",3]", "prompt[1]"),
        ] {
            let error = prompts(json).expect_err(json);
            assert_eq!(error.param(), Some(param), "{json}: {error}");
        }
        let many = format!("[{}]", vec!["\"a\""; PROMPTS_MAX + 1].join(","));
        assert!(matches!(prompts(&many), Err(RequestError::TooMany { found: 65, .. })));
    }
}
