//! What a client can get wrong in a request, with the values that it needs to put it right.
//!
//! Knows the OpenAI API's names; which HTTP status each error becomes is decided in `http/error.rs`. Values of sampling
//! parameters may be repeated in a message; prompts, stop strings and tokens never are.

use super::limits::ECHO_CHARS_MAX;

/// A request that can't be served because of what it says.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum RequestError {
    /// Not JSON at all.
    #[error("the request body is not valid JSON: {reason} (line {line}, column {column})")]
    MalformedJson {
        /// What the parser expected.
        reason: String,
        /// Counts from 1.
        line: usize,
        /// Counts from 1.
        column: usize,
    },
    /// A field has the wrong JSON type.
    #[error("{param} must be {expected}, found {found}")]
    WrongType {
        /// Path of the field, such as `messages[2].content`.
        param: String,
        /// What it must be.
        expected: &'static str,
        /// What it is.
        found: &'static str,
    },
    /// A field that a request can't do without.
    #[error("{param} is missing")]
    Missing {
        /// Path of the field.
        param: String,
    },
    /// A number outside its range.
    #[error("{param} must be {allowed}, found {found}")]
    OutOfRange {
        /// Path of the field.
        param: String,
        /// The range, in words.
        allowed: String,
        /// The value.
        found: String,
    },
    /// More elements, or longer ones, than are accepted.
    #[error("{param} has {found} {unit}; at most {max} are accepted")]
    TooMany {
        /// Path of the field.
        param: String,
        /// How many there are.
        found: usize,
        /// What is counted.
        unit: &'static str,
        /// How many may be.
        max: usize,
    },
    /// A string, list or prompt without anything in it.
    #[error("{param} must not be empty")]
    Empty {
        /// Path of the field.
        param: String,
    },
    /// A field's value is none of those allowed.
    #[error("{param} must be one of {allowed}")]
    NotOneOf {
        /// Path of the field.
        param: String,
        /// The allowed values.
        allowed: String,
    },
    /// Two fields contradict each other.
    #[error("{param}: {reason}")]
    Conflict {
        /// The field to change.
        param: String,
        /// What contradicts what.
        reason: &'static str,
    },
    /// A field of the API that is known and not implemented.
    #[error("{param} is not supported by this server{note}")]
    Unsupported {
        /// Path of the field.
        param: String,
        /// What to do instead, starting with `: `, or nothing.
        note: String,
    },
    /// A field that the API doesn't have.
    #[error("unknown field {param}")]
    UnknownField {
        /// Path of the field.
        param: String,
    },
    /// A token id that the model doesn't have.
    #[error("{param} names token {token}, and the model has tokens 0 to {max}")]
    NoSuchToken {
        /// Path of the field.
        param: String,
        /// The id.
        token: u64,
        /// The highest id.
        max: u32,
    },
    /// Another model's name.
    #[error("the model {model:?} does not exist; this server has {served:?}")]
    ModelNotFound {
        /// The name in the request, shortened.
        model: String,
        /// The name that is served.
        served: String,
    },
    /// Prompt and completion together don't fit.
    #[error(
        "this model's maximum context length is {max_model_length} tokens, and the request has {prompt_tokens} in its prompt \
         and asks for {completion_tokens} more"
    )]
    ContextLengthExceeded {
        /// Which field holds the prompt: `messages` or `prompt`.
        param: &'static str,
        /// Tokens in the prompt.
        prompt_tokens: usize,
        /// Tokens asked for (at least 1).
        completion_tokens: usize,
        /// Tokens that both may have together.
        max_model_length: usize,
    },
    /// The model's chat template refuses the messages, or the model has none.
    #[error("the model's chat template can't render these messages: {reason}")]
    Template {
        /// What the template said.
        reason: String,
    },
    /// The tokenizer refuses the text.
    #[error("the prompt can't be tokenised")]
    Untokenisable,
}

impl RequestError {
    /// Another model's name, shortened before it is repeated.
    pub fn model_not_found(model: &str, served: &str) -> Self {
        let model = model.chars().take(ECHO_CHARS_MAX).collect();
        RequestError::ModelNotFound { model, served: served.to_owned() }
    }

    /// The parameter at fault, where one is.
    pub fn param(&self) -> Option<&str> {
        match self {
            RequestError::MalformedJson { .. } | RequestError::Untokenisable => None,
            RequestError::WrongType { param, .. }
            | RequestError::Missing { param }
            | RequestError::OutOfRange { param, .. }
            | RequestError::TooMany { param, .. }
            | RequestError::Empty { param }
            | RequestError::NotOneOf { param, .. }
            | RequestError::Conflict { param, .. }
            | RequestError::Unsupported { param, .. }
            | RequestError::UnknownField { param }
            | RequestError::NoSuchToken { param, .. } => Some(param),
            RequestError::ModelNotFound { .. } => Some("model"),
            RequestError::ContextLengthExceeded { param, .. } => Some(param),
            RequestError::Template { .. } => Some("messages"),
        }
    }
}
