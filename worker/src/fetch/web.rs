//! One GET over the network: its redirects, what a failure means, and to whom a credential goes.
//!
//! Redirects are followed here and not by the client, so that it is ours to see that a token goes to the server that it is for and to
//! no other, that encryption is not dropped on the way, and what the first server said of the file.

use super::config::Secret;
use super::error::{FetchError, causes};
use reqwest::header::{AUTHORIZATION, ETAG, HeaderMap, HeaderValue, IF_MATCH, LOCATION, RANGE, RETRY_AFTER};
use reqwest::{Client, Response, StatusCode, Url};
use std::time::Duration;

/// How long a server may take to be reached.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a server may be silent, in an answer or before it.
const SILENCE_TIMEOUT: Duration = Duration::from_secs(60);

/// Redirects of one question. A hub needs one or two.
const REDIRECTS_MAX: usize = 5;

/// Bytes of a refusal that are read for its code: S3 says it in a few lines of XML.
const REFUSAL_BYTES_MAX: usize = 8 << 10;

/// Characters of a server's own code that are shown.
const CODE_CHARACTERS_MAX: usize = 64;

/// Asks servers.
#[derive(Debug)]
pub(super) struct Web {
    client: Client,
}

/// What is asked.
#[derive(Debug)]
pub(super) struct Question {
    pub(super) url: Url,
    /// Sent to the server of `url` and to no other.
    pub(super) bearer: Option<Secret>,
    /// From which byte on.
    pub(super) from: u64,
    /// Only while it is still the same.
    pub(super) if_match: Option<String>,
    /// Whether redirects are followed: a signed question is worth nothing elsewhere.
    pub(super) follow: bool,
}

/// An answer whose body has not been read.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) response: Response,
    /// What the first server said that the file's SHA-256 is.
    pub(super) sha256: Option<[u8; 32]>,
}

/// Why there is none.
#[derive(Debug)]
pub(super) enum Trouble {
    /// It may go better next time; not before the wait that the server asks for.
    Again { why: String, asked: Option<Duration> },
    /// It is not what it should be.
    Mismatch { why: String },
    /// The server says no.
    Refused(Refusal),
    /// Nothing that a server does will help.
    Final(Box<FetchError>),
}

/// A server's no.
#[derive(Debug)]
pub(super) struct Refusal {
    pub(super) host: String,
    pub(super) status: StatusCode,
    /// The server's own word for why.
    pub(super) code: Option<String>,
    /// Where a bucket is, when it says so.
    pub(super) region: Option<String>,
}

impl From<FetchError> for Trouble {
    fn from(error: FetchError) -> Self {
        Trouble::Final(Box::new(error))
    }
}

impl Trouble {
    /// A failure of the network, without the URL: it may be signed.
    pub(super) fn broken(error: reqwest::Error) -> Self {
        let why = causes(&error.without_url());
        Trouble::Again { why, asked: None }
    }
}

impl Web {
    pub(super) fn new() -> Result<Self, FetchError> {
        // Somebody else in this process may have installed it; it is the same.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = Client::builder()
            .user_agent(concat!("baton-worker/", env!("CARGO_PKG_VERSION")))
            .redirect(reqwest::redirect::Policy::none())
            .connect_timeout(CONNECT_TIMEOUT)
            .read_timeout(SILENCE_TIMEOUT)
            .build()
            .map_err(|error| FetchError::Tls { why: causes(&error) })?;
        Ok(Web { client })
    }

    /// Asks once. The answer's status is 200, 206 or 416.
    pub(super) async fn ask(&self, question: &Question) -> Result<Answer, Trouble> {
        let origin = question.url.origin();
        let mut url = question.url.clone();
        let mut sha256 = None;
        for _ in 0..=REDIRECTS_MAX {
            let at_home = url.origin() == origin;
            let mut request = self.client.get(url.clone());
            if let Some(token) = question.bearer.as_ref().filter(|_| at_home) {
                let mut value = HeaderValue::from_str(&format!("Bearer {}", token.expose()))
                    .expect("a credential is checked to be a header value");
                value.set_sensitive(true);
                request = request.header(AUTHORIZATION, value);
            }
            if question.from > 0 {
                request = request.header(RANGE, format!("bytes={}-", question.from));
            }
            if let Some(tag) = &question.if_match {
                request = request.header(IF_MATCH, tag);
            }
            let response = request.send().await.map_err(Trouble::broken)?;
            if at_home {
                sha256 = sha256.or_else(|| linked_sha256(response.headers()));
            }
            let status = response.status();
            let host = url.host_str().unwrap_or_default().to_owned();
            if status.is_redirection() && question.follow {
                url = redirected(&url, response.headers())
                    .ok_or_else(|| again(format!("{host} answers {status} and leads nowhere")))?;
                continue;
            }
            return match status {
                StatusCode::OK | StatusCode::PARTIAL_CONTENT | StatusCode::RANGE_NOT_SATISFIABLE => {
                    Ok(Answer { response, sha256 })
                }
                _ if is_passing(status) => Err(Trouble::Again {
                    why: format!("{host} answers {status}"),
                    asked: retry_after(response.headers()),
                }),
                // Whom a hub sends us to knows no accounts: what it refuses is a link that is too old.
                _ if !at_home => Err(again(format!("{host} answers {status}"))),
                _ => Err(Trouble::Refused(refusal(host, response).await)),
            };
        }
        Err(again(format!("more than {REDIRECTS_MAX} redirects")))
    }

    /// Asks once for a body of a bounded length.
    pub(super) async fn read(&self, question: &Question, bytes_max: usize) -> Result<Vec<u8>, Trouble> {
        let Answer { mut response, .. } = self.ask(question).await?;
        read(&mut response, bytes_max).await
    }
}

async fn read(response: &mut Response, bytes_max: usize) -> Result<Vec<u8>, Trouble> {
    let mut body = Vec::new();
    while let Some(piece) = response.chunk().await.map_err(Trouble::broken)? {
        if body.len() + piece.len() > bytes_max {
            return Err(again(format!("an answer of more than {bytes_max} bytes")));
        }
        body.extend_from_slice(&piece);
    }
    Ok(body)
}

async fn refusal(host: String, mut response: Response) -> Refusal {
    let (status, headers) = (response.status(), response.headers());
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
    let (mut code, region) = (text("x-error-code"), text("x-amz-bucket-region"));
    if code.is_none() {
        // The status says most of it; what can't be read is not missed.
        let body = read(&mut response, REFUSAL_BYTES_MAX).await.unwrap_or_default();
        code = between(&String::from_utf8_lossy(&body), "<Code>", "</Code>");
    }
    let is_shown = |c: &char| c.is_ascii_alphanumeric() || *c == '-' || *c == '_';
    let code = code.map(|code| code.chars().filter(is_shown).take(CODE_CHARACTERS_MAX).collect());
    Refusal { host, status, code, region: region.map(|region| region.chars().filter(is_shown).collect()) }
}

fn between(text: &str, before: &str, after: &str) -> Option<String> {
    Some(text.split_once(before)?.1.split_once(after)?.0.to_owned())
}

fn again(why: String) -> Trouble {
    Trouble::Again { why, asked: None }
}

/// Where a redirect leads. Never from https to http.
fn redirected(from: &Url, headers: &HeaderMap) -> Option<Url> {
    let to = from.join(headers.get(LOCATION)?.to_str().ok()?).ok()?;
    let stays_encrypted = to.scheme() == "https" || (to.scheme() == "http" && from.scheme() == "http");
    stays_encrypted.then_some(to)
}

/// Whether a status may be another one in a moment.
fn is_passing(status: StatusCode) -> bool {
    let passing = [StatusCode::REQUEST_TIMEOUT, StatusCode::TOO_EARLY, StatusCode::TOO_MANY_REQUESTS];
    status.is_server_error() || passing.contains(&status)
}

/// Seconds; the other form, a date, is nothing that our two clocks need agree on.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    headers.get(RETRY_AFTER)?.to_str().ok()?.trim().parse().ok().map(Duration::from_secs)
}

/// The SHA-256 by which a hub names a large file, in the header of its own or in the file's tag.
fn linked_sha256(headers: &HeaderMap) -> Option<[u8; 32]> {
    let tag = headers.get("x-linked-etag").or_else(|| headers.get(ETAG))?.to_str().ok()?;
    hex(tag.trim_start_matches("W/").trim_matches('"'))
}

/// Bytes of a hexadecimal text of exactly their length.
pub(super) fn hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digits = text.as_bytes();
    if digits.len() != 2 * N || !digits.iter().all(u8::is_ascii_hexdigit) {
        return None;
    }
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_redirect_never_drops_encryption() {
        let check = |from: &str, location: &'static str, expect: Option<&str>| {
            let headers = HeaderMap::from_iter([(LOCATION, HeaderValue::from_static(location))]);
            let to = redirected(&Url::parse(from).expect("a URL"), &headers);
            assert_eq!(to.as_ref().map(Url::as_str), expect, "{location}");
        };
        check("https://hub/a", "https://cdn/b?s=1", Some("https://cdn/b?s=1"));
        check("https://hub/a", "/b", Some("https://hub/b"));
        check("http://hub/a", "http://cdn/b", Some("http://cdn/b"));
        check("https://hub/a", "http://hub/a", None);
        check("http://hub/a", "file:///etc/passwd", None);
    }

    #[test]
    fn a_digest_is_taken_from_a_tag_of_its_length_alone() {
        let check = |name: &'static str, tag: String, found: bool| {
            let value = HeaderValue::from_str(&tag).expect("a header value");
            let headers = HeaderMap::from_iter([(reqwest::header::HeaderName::from_static(name), value)]);
            assert_eq!(linked_sha256(&headers), found.then_some([0xab; 32]), "{tag}");
        };
        check("x-linked-etag", format!("\"{}\"", "ab".repeat(32)), true);
        check("etag", format!("W/\"{}\"", "ab".repeat(32)), true);
        check("etag", format!("\"{}\"", "ab".repeat(20)), false);
        check("etag", "é".repeat(32), false);
    }
}
