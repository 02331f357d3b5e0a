//! The heads of HTTP/1.1 messages (RFC 9112): ours is written, that of an answer is read. Pure.

use super::framing::{Chunked, Framing};
use crate::upstream::Request;
use bytes::{Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use std::mem::MaybeUninit;

/// Headers of one answer. Engines send about ten.
const HEADERS_MAX: usize = 128;

/// Bytes of an answer's head, for as many headers as they may be at a length that they seldom have.
const HEAD_BYTES_MAX: usize = 64 << 10;

/// The head of an answer.
#[derive(Debug)]
pub(super) struct Head {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    pub(super) framing: Framing,
    /// Whether the connection is there for another request afterwards.
    pub(super) is_kept: bool,
}

/// Why what came back is no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum BadHead {
    /// No HTTP/1.
    #[error("what came back is not HTTP/1.1: {0}")]
    NotHttp(httparse::Error),
    /// Longer than it can rightly be.
    #[error("the head of the answer is longer than {HEAD_BYTES_MAX} bytes")]
    TooLong,
    /// It switches to a protocol that nobody asked for.
    #[error("the answer switches protocols, which was not asked for")]
    Switch,
    /// Lengths that contradict each other, or are none.
    #[error("the answer's content-length is wrong")]
    Length,
    /// It is encoded for transfer in a way that nobody said we could read.
    #[error("the answer's transfer-encoding is not chunked alone")]
    Encoding,
}

/// A request's head. Its length is that of its body, and its host this one, whatever its headers say.
pub(super) fn write(request: &Request, host: &HeaderValue) -> Bytes {
    let Request { method, path, headers, body } = request;
    let is_ours = |name: &HeaderName| {
        *name == header::HOST || *name == header::CONTENT_LENGTH || *name == header::TRANSFER_ENCODING
    };
    let line = |name: &[u8], value: &[u8]| name.len() + value.len() + 4;
    let lines: usize = headers.iter().map(|(name, value)| line(name.as_str().as_bytes(), value.as_bytes())).sum();
    let mut head = BytesMut::with_capacity(lines + path.as_str().len() + host.len() + 96);
    for part in [method.as_str(), " ", path.as_str(), " HTTP/1.1\r\nhost: "] {
        head.extend_from_slice(part.as_bytes());
    }
    head.extend_from_slice(host.as_bytes());
    head.extend_from_slice(b"\r\n");
    for (name, value) in headers {
        if !is_ours(name) {
            for part in [name.as_str().as_bytes(), b": ", value.as_bytes(), b"\r\n"] {
                head.extend_from_slice(part);
            }
        }
    }
    if !body.is_empty() || *method != Method::GET {
        for part in ["content-length: ", &body.len().to_string(), "\r\n"] {
            head.extend_from_slice(part.as_bytes());
        }
    }
    head.extend_from_slice(b"\r\n");
    head.freeze()
}

/// Takes the head of an answer, once all of it is there. Word that an answer is still to come (1xx) is passed over.
pub(super) fn take(buffer: &mut BytesMut) -> Result<Option<Head>, BadHead> {
    loop {
        let Some((status, is_http_11, length, headers)) = parse(buffer)? else { return Ok(None) };
        let head = buffer.split_to(length).freeze();
        match status {
            StatusCode::SWITCHING_PROTOCOLS => return Err(BadHead::Switch),
            status if status.is_informational() => {}
            _ => return read(status, is_http_11, headers.into_map(&head)).map(Some),
        }
    }
}

/// Where names and values lie in the head.
#[derive(Default)]
struct Places(Vec<[usize; 4]>);

impl Places {
    fn into_map(self, head: &Bytes) -> HeaderMap {
        let mut map = HeaderMap::with_capacity(self.0.len());
        for [name, name_end, value, value_end] in self.0 {
            // httparse takes no other bytes than these two types do; they have bounds in length that no engine's header comes near.
            let name = HeaderName::from_bytes(&head[name..name_end]);
            let value = HeaderValue::from_maybe_shared(head.slice(value..value_end));
            if let (Ok(name), Ok(value)) = (name, value) {
                map.append(name, value);
            }
        }
        map
    }
}

fn parse(buffer: &BytesMut) -> Result<Option<(StatusCode, bool, usize, Places)>, BadHead> {
    if buffer.is_empty() {
        return Ok(None);
    }
    let mut headers = [const { MaybeUninit::uninit() }; HEADERS_MAX];
    let mut response = httparse::Response::new(&mut []);
    let config = httparse::ParserConfig::default();
    let parsed = config.parse_response_with_uninit_headers(&mut response, buffer, &mut headers);
    let httparse::Status::Complete(length) = parsed.map_err(BadHead::NotHttp)? else {
        return if buffer.len() > HEAD_BYTES_MAX { Err(BadHead::TooLong) } else { Ok(None) };
    };
    if length > HEAD_BYTES_MAX {
        return Err(BadHead::TooLong);
    }
    let code = response.code.expect("a complete head has one");
    let status = StatusCode::from_u16(code).map_err(|_| BadHead::NotHttp(httparse::Error::Status))?;
    let start = buffer.as_ptr() as usize;
    let place = |part: &[u8]| {
        let at = part.as_ptr() as usize - start;
        (at, at + part.len())
    };
    let places = response.headers.iter().map(|header| {
        let ((name, name_end), (value, value_end)) = (place(header.name.as_bytes()), place(header.value));
        [name, name_end, value, value_end]
    });
    Ok(Some((status, response.version == Some(1), length, Places(places.collect()))))
}

fn read(status: StatusCode, is_http_11: bool, mut headers: HeaderMap) -> Result<Head, BadHead> {
    let names = |name: HeaderName, token: &str| {
        let values = headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
        values.flat_map(|value| value.split(',')).any(|one| one.trim().eq_ignore_ascii_case(token))
    };
    // Before 1.1 a connection was kept by exception only, and no engine speaks that.
    let is_kept = is_http_11 && !names(header::CONNECTION, "close");
    let (framing, is_kept) = if status == StatusCode::NO_CONTENT || status == StatusCode::NOT_MODIFIED {
        // Who says that something follows all the same may well send it, and it would be taken for the next answer.
        let is_empty =
            !headers.contains_key(header::TRANSFER_ENCODING) && matches!(length(&headers), Ok(None | Some(0)));
        (Framing::Length(0), is_kept && is_empty)
    } else if headers.contains_key(header::TRANSFER_ENCODING) {
        let mut codings = headers.get_all(header::TRANSFER_ENCODING).iter();
        let is_chunked = codings.next().is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"chunked"));
        if !is_chunked || codings.next().is_some() || !is_http_11 {
            return Err(BadHead::Encoding);
        }
        // Who says both has been confused by somebody; the chunks count, and nothing more is asked on that connection.
        let is_alone = headers.remove(header::CONTENT_LENGTH).is_none();
        (Framing::Chunked(Chunked::default()), is_kept && is_alone)
    } else {
        match length(&headers)? {
            Some(length) => (Framing::Length(length), is_kept),
            None => (Framing::UntilClose, false),
        }
    };
    Ok(Head { status, headers, framing, is_kept })
}

fn length(headers: &HeaderMap) -> Result<Option<u64>, BadHead> {
    let mut length = None;
    for value in headers.get_all(header::CONTENT_LENGTH) {
        let text = value.to_str().ok().filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()));
        let one = text.and_then(|text| text.parse().ok()).ok_or(BadHead::Length)?;
        if length.replace(one).is_some_and(|other: u64| other != one) {
            return Err(BadHead::Length);
        }
    }
    Ok(length)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::payload::Payload;
    use proptest::prelude::*;

    fn head(text: &str) -> Result<Option<Head>, BadHead> {
        take(&mut BytesMut::from(text))
    }

    fn whole(text: &str) -> Head {
        head(text).expect("right").expect("whole")
    }

    #[test]
    fn a_request_says_its_own_length_and_host() {
        let request = Request {
            method: Method::POST,
            path: "/v1/completions?a=b".parse().expect("a path"),
            headers: HeaderMap::from_iter([
                (header::AUTHORIZATION, HeaderValue::from_static("Bearer x")),
                (header::HOST, HeaderValue::from_static("elsewhere")),
                (header::CONTENT_LENGTH, HeaderValue::from_static("99")),
                (header::TRANSFER_ENCODING, HeaderValue::from_static("chunked")),
            ]),
            body: Bytes::from_static(b"{}").into(),
        };
        assert_eq!(
            write(&request, &HeaderValue::from_static("worker:8000")),
            "POST /v1/completions?a=b HTTP/1.1\r\nhost: worker:8000\r\nauthorization: Bearer x\r\ncontent-length: 2\r\n\r\n"
        );
        let empty = Request { body: Payload::default(), headers: HeaderMap::new(), ..request };
        assert!(write(&empty, &HeaderValue::from_static("w")).ends_with(b"content-length: 0\r\n\r\n"));
        let get = write(&Request::get("/status"), &HeaderValue::from_static("w:1"));
        assert_eq!(get, "GET /status HTTP/1.1\r\nhost: w:1\r\n\r\n");
    }

    #[test]
    fn the_framing_and_the_future_of_a_connection_are_read() {
        let check = |text: &str, framing: &str, is_kept: bool| {
            let head = whole(&format!("{text}\r\n\r\n"));
            assert_eq!(
                (
                    format!("{:?}", head.framing).split_once(['(', ' ']).map_or("UntilClose", |(name, _)| name),
                    head.is_kept
                ),
                (framing, is_kept),
                "{text}"
            );
        };
        check("HTTP/1.1 200 OK\r\ncontent-length: 2", "Length", true);
        check("HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 2", "Length", true);
        check("HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: x, Close", "Length", false);
        check("HTTP/1.0 200 OK\r\ncontent-length: 2\r\nconnection: keep-alive", "Length", false);
        check("HTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked", "Chunked", true);
        check("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ncontent-length: 3", "Chunked", false);
        check("HTTP/1.1 200 OK\r\nserver: x", "UntilClose", false);
        check("HTTP/1.1 204 No Content\r\nserver: x", "Length", true);
        check("HTTP/1.1 204 No Content\r\ntransfer-encoding: chunked", "Length", false);
        check("HTTP/1.1 204 No Content\r\ncontent-length: 5", "Length", false);
        assert!(
            !whole("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ncontent-length: 3\r\n\r\n")
                .headers
                .contains_key(header::CONTENT_LENGTH)
        );
    }

    #[test]
    fn an_answer_that_could_be_read_in_two_ways_is_refused() {
        for (lines, error) in [
            ("content-length: 2\r\ncontent-length: 3", BadHead::Length),
            ("content-length: 2, 2", BadHead::Length),
            ("content-length: +2", BadHead::Length),
            ("content-length: ", BadHead::Length),
            ("content-length: 99999999999999999999", BadHead::Length),
            ("transfer-encoding: gzip, chunked", BadHead::Encoding),
            ("transfer-encoding: gzip", BadHead::Encoding),
            ("transfer-encoding: chunked\r\ntransfer-encoding: chunked", BadHead::Encoding),
        ] {
            let text = format!("HTTP/1.1 200 OK\r\n{lines}\r\n\r\n");
            assert_eq!(head(&text).map(|_| ()), Err(error), "{lines}");
        }
        assert_eq!(head("HTTP/1.0 200 OK\r\ntransfer-encoding: chunked\r\n\r\n").map(|_| ()), Err(BadHead::Encoding));
        assert_eq!(head("HTTP/1.1 101 Switching Protocols\r\n\r\n").map(|_| ()), Err(BadHead::Switch));
        assert!(matches!(head("SSH-2.0-x\r\n"), Err(BadHead::NotHttp(_))));
        let endless = format!("HTTP/1.1 200 OK\r\nx: {}", "x".repeat(HEAD_BYTES_MAX));
        assert_eq!(head(&endless).map(|_| ()), Err(BadHead::TooLong));
        assert_eq!(head(&format!("{endless}\r\n\r\n")).map(|_| ()), Err(BadHead::TooLong));
    }

    #[test]
    fn word_of_an_answer_to_come_is_passed_over() {
        let early = "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n";
        assert!(head(early).expect("right").is_none());
        let mut buffer = BytesMut::from(format!("{early}HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").as_str());
        let head = take(&mut buffer).expect("right").expect("whole");
        assert_eq!((head.status, head.headers.len(), &buffer[..]), (StatusCode::OK, 1, &b"ok"[..]));
    }

    proptest! {
        #[test]
        fn headers_are_read_as_they_were_sent_once_all_are_there(
            headers in prop::collection::vec(("[a-z][a-z0-9-]{0,12}", "[!-~]([ -~]{0,20}[!-~])?"), 0..20),
            cut in any::<prop::sample::Index>(),
        ) {
            let headers: Vec<_> = headers.into_iter().filter(|(name, _)| name != "content-length" && name != "transfer-encoding").collect();
            let lines: String = headers.iter().map(|(name, value)| format!("{name}:  {value} \r\n")).collect();
            let text = format!("HTTP/1.1 200 OK\r\n{lines}\r\n");
            let mut buffer = BytesMut::from(&text[..cut.index(text.len())]);
            prop_assert!(take(&mut buffer).expect("not wrong so far").is_none());
            buffer.extend_from_slice(&text.as_bytes()[buffer.len()..]);
            let head = take(&mut buffer).expect("right").expect("whole");
            let read: Vec<_> = head.headers.iter().map(|(name, value)| (name.as_str(), value.to_str().expect("text"))).collect();
            let mut expect: Vec<_> = headers.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
            // A map has those of one name together, each in its order.
            let first = |name: &str| headers.iter().position(|(other, _)| other == name);
            expect.sort_by_key(|(name, _)| first(name));
            prop_assert_eq!(read, expect);
        }
    }
}
