//! Requests that two parsers could cut at different places, refused before anything is read of their bodies. A proxy in front
//! of ours may have cut them elsewhere, and then a part of one client's request would be taken for another's (request
//! smuggling; RFC 9112, section 11.2).
//!
//! The parser below has refused what is malformed. What is left to judge here is what is well-formed and doubtful; where in
//! doubt the connection ends with the answer, so that no byte after it is ever read as a request.

use super::{Request, Response, respond};
use baton_wire::ErrorBody;
use http::{HeaderMap, Method, StatusCode, Version, header};
use http_body::Body as _;

/// Header lines of a request. HTTP/1.1's parser has the same bound; HTTP/2's knows bytes alone.
const HEADERS_MAX: usize = 100;

/// What may become of a connection after a request's answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum After {
    Stays,
    Ends,
}

/// Judges a request of HTTP/1.
///
/// # Errors
/// The refusal. The connection ends with it.
pub(super) fn http1(request: &Request) -> Result<After, Box<Response>> {
    let headers = request.headers();
    if request.method() == Method::CONNECT {
        return Err(refused(StatusCode::METHOD_NOT_ALLOWED, "this is no tunnel", "method_not_supported"));
    }
    let mut hosts = headers.get_all(header::HOST).iter();
    let may_lack_host = request.version() == Version::HTTP_10;
    if (hosts.next().is_none() && !may_lack_host) || hosts.next().is_some() {
        return Err(refused(StatusCode::BAD_REQUEST, "a request has one host header", "malformed_request"));
    }
    if request.body().size_hint().exact().is_none() {
        // A length beside it was dropped by the parser, as the standard says; not every parser does.
        return if is_plainly_chunked(headers) {
            Ok(After::Ends)
        } else {
            let text = "the only transfer-encoding here is chunked";
            Err(refused(StatusCode::NOT_IMPLEMENTED, text, "unsupported_transfer_encoding"))
        };
    }
    let may_lack_length = matches!(*request.method(), Method::GET | Method::HEAD | Method::DELETE | Method::OPTIONS);
    if !may_lack_length && request.body().is_end_stream() && !headers.contains_key(header::CONTENT_LENGTH) {
        // What follows may be this request's body in the eyes of others: a length under a name that only they know.
        return Err(refused(StatusCode::LENGTH_REQUIRED, "say how long the body is", "length_required"));
    }
    Ok(After::Stays)
}

/// Judges a request of HTTP/2, whose frames say where it ends.
///
/// # Errors
/// The refusal.
pub(super) fn http2(request: &Request) -> Result<(), Box<Response>> {
    let headers = request.headers();
    if request.method() == Method::CONNECT {
        return Err(refused(StatusCode::METHOD_NOT_ALLOWED, "this is no tunnel", "method_not_supported"));
    }
    if headers.len() > HEADERS_MAX {
        let text = "the request has too many headers";
        return Err(refused(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, text, "too_many_headers"));
    }
    let authority = request.uri().authority().map(http::uri::Authority::as_str);
    let mut hosts = headers.get_all(header::HOST).iter();
    let host = hosts.next();
    let agree = match (authority, host) {
        (Some(authority), Some(host)) => host.as_bytes().eq_ignore_ascii_case(authority.as_bytes()),
        (Some(_), None) | (None, Some(_)) => true,
        (None, None) => false,
    };
    if !agree || hosts.next().is_some() {
        let text = "a request has one :authority, and no host that differs";
        return Err(refused(StatusCode::BAD_REQUEST, text, "malformed_request"));
    }
    Ok(())
}

/// One header that says `chunked` and nothing else: anything more is spelled so that somebody reads it otherwise.
fn is_plainly_chunked(headers: &HeaderMap) -> bool {
    let mut codings = headers.get_all(header::TRANSFER_ENCODING).iter();
    codings.next().is_some_and(|coding| coding.as_bytes().eq_ignore_ascii_case(b"chunked")) && codings.next().is_none()
}

fn refused(status: StatusCode, message: &str, code: &str) -> Box<Response> {
    Box::new(respond::error(status, &ErrorBody::invalid_request(message, None, Some(code))))
}
