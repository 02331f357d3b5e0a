//! The one place where an error becomes an HTTP status and an OpenAI error body.
//!
//! An error before the first token is an HTTP response; after it, the status has left, and the same body goes out as the stream's
//! last event.

use crate::error::ApiError;
use crate::openai::RequestError;
use axum::response::{IntoResponse, Response};
use baton_wire::ErrorBody;
use http::{HeaderValue, StatusCode, header};

/// Seconds after which a client may try again what was refused for lack of room, or while loading or draining.
const RETRY_AFTER_SECONDS: u64 = 1;

/// How an error looks from outside.
struct Outside {
    status: StatusCode,
    /// OpenAI's class.
    kind: &'static str,
    code: &'static str,
    retry: bool,
}

/// On an error's response: its code, for the metric that counts them.
#[derive(Clone, Copy, Debug)]
pub(super) struct ErrorCode(pub(super) &'static str);

impl ApiError {
    fn outside(&self) -> Outside {
        let invalid =
            |code| Outside { status: StatusCode::BAD_REQUEST, kind: "invalid_request_error", code, retry: false };
        let server = |status, code| Outside { status, kind: "server_error", code, retry: false };
        let later = |status, code| Outside { status, kind: "server_error", code, retry: true };
        match self {
            ApiError::Request(error) => match error {
                RequestError::ModelNotFound { .. } => {
                    Outside { status: StatusCode::NOT_FOUND, ..invalid("model_not_found") }
                }
                RequestError::ContextLengthExceeded { .. } => invalid("context_length_exceeded"),
                RequestError::MalformedJson { .. } => invalid("malformed_json"),
                RequestError::WrongType { .. } => invalid("invalid_type"),
                RequestError::Missing { .. } => invalid("missing_required_parameter"),
                RequestError::UnknownField { .. } => invalid("unknown_parameter"),
                RequestError::Unsupported { .. } => invalid("unsupported_parameter"),
                RequestError::OutOfRange { .. }
                | RequestError::TooMany { .. }
                | RequestError::Empty { .. }
                | RequestError::NotOneOf { .. }
                | RequestError::Conflict { .. }
                | RequestError::NoSuchToken { .. }
                | RequestError::Template { .. }
                | RequestError::Untokenisable => invalid("invalid_value"),
            },
            ApiError::BodyTooLarge { .. } => {
                Outside { status: StatusCode::PAYLOAD_TOO_LARGE, ..invalid("request_too_large") }
            }
            ApiError::BodyCut | ApiError::MalformedInternal { .. } | ApiError::ResumeContradiction => {
                invalid("malformed_request")
            }
            ApiError::NoSuchPath { .. } => Outside { status: StatusCode::NOT_FOUND, ..invalid("unknown_url") },
            ApiError::NoSuchMethod { .. } => {
                Outside { status: StatusCode::METHOD_NOT_ALLOWED, ..invalid("method_not_supported") }
            }
            ApiError::WrongRole { .. } => Outside { status: StatusCode::MISDIRECTED_REQUEST, ..invalid("wrong_role") },
            ApiError::Loading => later(StatusCode::SERVICE_UNAVAILABLE, "model_loading"),
            ApiError::Draining => later(StatusCode::SERVICE_UNAVAILABLE, "draining"),
            ApiError::CutOff => later(StatusCode::SERVICE_UNAVAILABLE, "cut_off"),
            ApiError::QueueFull { .. } => later(StatusCode::SERVICE_UNAVAILABLE, "queue_full"),
            ApiError::TransferRefused { .. } => later(StatusCode::SERVICE_UNAVAILABLE, "transfer_refused"),
            ApiError::Refused(_) => server(StatusCode::INTERNAL_SERVER_ERROR, "refused_by_engine"),
            ApiError::RenderPanicked => server(StatusCode::INTERNAL_SERVER_ERROR, "render_failed"),
            ApiError::ForwardFailed => server(StatusCode::INTERNAL_SERVER_ERROR, "forward_failed"),
            ApiError::KvNotFetched { .. } => server(StatusCode::BAD_GATEWAY, "kv_not_fetched"),
            ApiError::EngineStopped => server(StatusCode::SERVICE_UNAVAILABLE, "engine_stopped"),
        }
    }

    fn body(&self) -> ErrorBody {
        let outside = self.outside();
        let param = if let ApiError::Request(error) = self { error.param() } else { None };
        ErrorBody::new(outside.kind, self.to_string(), param, Some(outside.code))
    }

    /// The body as JSON, which is also what a stream ends with when it fails after its first token.
    pub(super) fn json(&self) -> String {
        serde_json::to_string(&self.body()).expect("an error body is strings, which always serialise")
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let outside = self.outside();
        if outside.status.is_server_error() {
            tracing::warn!(status = outside.status.as_u16(), code = outside.code, "request failed: {self}");
        }
        let json = (header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        let mut response = (outside.status, [json], self.json()).into_response();
        response.extensions_mut().insert(ErrorCode(outside.code));
        if outside.retry {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(RETRY_AFTER_SECONDS));
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clients_mistake_is_a_4xx_with_its_parameter() {
        let error = ApiError::from(RequestError::Missing { param: "messages".to_owned() });
        assert_eq!(error.outside().status, StatusCode::BAD_REQUEST);
        assert_eq!(
            error.json(),
            r#"{"error":{"message":"messages is missing","type":"invalid_request_error","param":"messages","code":"missing_required_parameter"}}"#
        );
        let unknown = RequestError::ModelNotFound { model: "a".into(), served: "b".into() };
        assert_eq!(ApiError::from(unknown).outside().status, StatusCode::NOT_FOUND);
    }

    #[test]
    fn what_passes_by_itself_says_when_to_try_again() {
        for (error, retry) in
            [(ApiError::Draining, true), (ApiError::QueueFull { waiting: 3 }, true), (ApiError::ForwardFailed, false)]
        {
            let response = error.clone().into_response();
            assert!(response.status().is_server_error());
            assert_eq!(response.headers().contains_key(header::RETRY_AFTER), retry, "{error}");
        }
    }
}
