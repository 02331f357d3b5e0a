//! The error body of the OpenAI API, which every HTTP error of ours has.

use serde::{Deserialize, Serialize};

/// `{"error": {"message", "type", "param", "code"}}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// The one field.
    pub error: ErrorDetail,
}

/// What went wrong, for a person and for a client library.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorDetail {
    /// What went wrong and what to do about it.
    pub message: String,
    /// OpenAI's class of error, such as `invalid_request_error`.
    #[serde(rename = "type")]
    pub kind: String,
    /// The parameter at fault, where one is.
    #[serde(default)]
    pub param: Option<String>,
    /// Machine-readable cause, where there is one, such as `context_length_exceeded`.
    #[serde(default)]
    pub code: Option<String>,
}

impl ErrorBody {
    /// The request is wrong; `param` says where, `code` why.
    pub fn invalid_request(message: impl Into<String>, param: Option<&str>, code: Option<&str>) -> Self {
        Self::new("invalid_request_error", message, param, code)
    }

    /// We could not serve a right request; `code` says why.
    pub fn server_error(message: impl Into<String>, code: Option<&str>) -> Self {
        Self::new("server_error", message, None, code)
    }

    /// Any class of error.
    pub fn new(kind: &str, message: impl Into<String>, param: Option<&str>, code: Option<&str>) -> Self {
        ErrorBody {
            error: ErrorDetail {
                message: message.into(),
                kind: kind.to_owned(),
                param: param.map(str::to_owned),
                code: code.map(str::to_owned),
            },
        }
    }
}
