//! Reading request bodies: bounded, and parsed without repeating their content in an error.

use crate::error::ApiError;
use crate::openai::RequestError;
use crate::openai::limits::BODY_BYTES_MAX;
use axum::body::Body;
use bytes::Bytes;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::de::DeserializeOwned;

/// Bytes around a client's body in a render request: two names and punctuation, with room to spare.
const ENVELOPE_BYTES_MAX: usize = 4096;

/// Bytes of a leg. Every token of a prompt comes from at least one byte of the client's body and takes at most 8 more as a number
/// with its comma (vocabularies are below ten million); transfers add less than one envelope for each of 64 prompts.
pub(super) const LEG_BYTES_MAX: usize = 9 * BODY_BYTES_MAX + 64 * ENVELOPE_BYTES_MAX;

/// Bytes more of a leg that resumes a stream: a million token ids, which is eight choices of a whole context of 128k tokens.
pub(super) const RESUME_BYTES_MAX: usize = 8 << 20;

/// Bytes of a render request.
pub(super) const RENDER_BYTES_MAX: usize = BODY_BYTES_MAX + ENVELOPE_BYTES_MAX;

/// Reads a body of at most `max` bytes.
pub(super) async fn read(body: Body, max: usize) -> Result<Bytes, ApiError> {
    match Limited::new(body, max).collect().await {
        Ok(body) => Ok(body.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => Err(ApiError::BodyTooLarge { max }),
        Err(_) => Err(ApiError::BodyCut),
    }
}

/// Reads a client's body: text of at most [`BODY_BYTES_MAX`] bytes.
pub(super) async fn read_client(body: Body) -> Result<String, ApiError> {
    let body = read(body, BODY_BYTES_MAX).await?;
    String::from_utf8(body.into()).map_err(|error| {
        let before = &error.as_bytes()[..error.utf8_error().valid_up_to()];
        let line = before.iter().filter(|byte| **byte == b'\n').count() + 1;
        let column = before.iter().rev().take_while(|byte| **byte != b'\n').count() + 1;
        RequestError::MalformedJson { reason: "text that is not UTF-8".to_owned(), line, column }.into()
    })
}

/// Reads what a proxy wrote.
pub(super) async fn read_internal<T: DeserializeOwned>(
    body: Body,
    max: usize,
    what: &'static str,
) -> Result<T, ApiError> {
    let body = read(body, max).await?;
    // The parser's own words may quote values, and a prompt is one; its position is enough to find the mistake.
    serde_json::from_slice(&body).map_err(|error| ApiError::MalformedInternal {
        what,
        reason: format!("{:?} error at line {}, column {}", error.classify(), error.line(), error.column()),
    })
}
