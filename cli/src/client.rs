//! HTTP to our own proxies and workers: bounded answers, and streams of events.

use crate::sse::{EventReader, EventTooLong};
use baton_wire::ErrorBody;
use bytes::Bytes;
use http::{HeaderMap, Request, StatusCode, header};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use hyper_util::client::legacy::Client as HyperClient;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde::de::DeserializeOwned;
use std::collections::VecDeque;
use std::time::Duration;

/// Largest answer that is not a stream: the debug page of a thousand workers.
const ANSWER_BYTES_MAX: usize = 4 << 20;

/// Longest silence of a stream. The first token of a long prompt on a busy CPU takes minutes; the proxy gives up before us.
const STREAM_SILENCE_MAX: Duration = Duration::from_secs(660);

/// Why there is no answer, or none to use.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ClientError {
    /// Not an URL.
    #[error("{url}: not an URL of the form http://HOST:PORT")]
    Url { url: String },
    /// Nobody answers there.
    #[error("{url}: no answer")]
    Unreachable {
        url: String,
        #[source]
        source: hyper_util::client::legacy::Error,
    },
    /// It takes too long.
    #[error("{url}: nothing for {} s", after.as_secs_f64())]
    Silent { url: String, after: Duration },
    /// It refuses, in its own words.
    #[error("{url}: {status}: {message}")]
    Refused { url: String, status: StatusCode, message: String },
    /// The answer breaks off or is too large.
    #[error("{url}: the answer breaks off")]
    Broken {
        url: String,
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The answer is not what this path answers with.
    #[error("{url}: the answer cannot be read")]
    Unreadable {
        url: String,
        #[source]
        source: serde_json::Error,
    },
    /// The stream is not one of events.
    #[error("{url}: {source}")]
    NoEvents { url: String, source: EventTooLong },
}

/// A client with its kept connections.
#[derive(Clone)]
pub(crate) struct Client {
    http: HyperClient<HttpConnector, Full<Bytes>>,
}

impl Client {
    pub(crate) fn new() -> Self {
        let mut connector = HttpConnector::new();
        // Or each small request would wait for the acknowledgement of the one before.
        connector.set_nodelay(true);
        Client { http: HyperClient::builder(TokioExecutor::new()).build(connector) }
    }

    /// Gets a JSON answer.
    ///
    /// # Errors
    /// When there is none within the time, or another than 200 with that JSON.
    pub(crate) async fn get_json<T: DeserializeOwned>(&self, url: &str, within: Duration) -> Result<T, ClientError> {
        let bytes = self.get(url, within).await?;
        serde_json::from_slice(&bytes).map_err(|source| ClientError::Unreadable { url: url.to_owned(), source })
    }

    /// Gets an answer.
    ///
    /// # Errors
    /// When there is none within the time, or one that is no success.
    pub(crate) async fn get(&self, url: &str, within: Duration) -> Result<Bytes, ClientError> {
        let exchange = async {
            let request = Request::get(url).body(Full::default());
            let answer = self.send(url, request).await?;
            let (parts, body) = answer.into_parts();
            let bytes = collect(url, body).await?;
            if parts.status.is_success() { Ok(bytes) } else { Err(refused(url, parts.status, &bytes)) }
        };
        let silent = |_| ClientError::Silent { url: url.to_owned(), after: within };
        tokio::time::timeout(within, exchange).await.map_err(silent)?
    }

    /// Posts JSON and gives the answer's events as they come.
    ///
    /// # Errors
    /// When there is no answer, or one that is no success.
    pub(crate) async fn stream(&self, url: &str, body: &serde_json::Value) -> Result<Events, ClientError> {
        let body = Full::new(Bytes::from(body.to_string()));
        let request = Request::post(url).header(header::CONTENT_TYPE, "application/json").body(body);
        let silent = |_| ClientError::Silent { url: url.to_owned(), after: STREAM_SILENCE_MAX };
        let answer = tokio::time::timeout(STREAM_SILENCE_MAX, self.send(url, request)).await.map_err(silent)??;
        let (parts, body) = answer.into_parts();
        if !parts.status.is_success() {
            return Err(refused(url, parts.status, &collect(url, body).await?));
        }
        Ok(Events {
            url: url.to_owned(),
            headers: parts.headers,
            body,
            reader: EventReader::default(),
            ready: VecDeque::new(),
        })
    }

    async fn send(
        &self,
        url: &str,
        request: http::Result<Request<Full<Bytes>>>,
    ) -> Result<http::Response<Incoming>, ClientError> {
        let no_url = || ClientError::Url { url: url.to_owned() };
        let request = request.map_err(|_| no_url())?;
        // Between our own there is no TLS: the connector would only call it unreachable.
        if request.uri().scheme_str() != Some("http") {
            return Err(no_url());
        }
        self.http.request(request).await.map_err(|source| ClientError::Unreachable { url: url.to_owned(), source })
    }
}

/// The events of a streamed answer.
pub(crate) struct Events {
    url: String,
    /// The answer's headers, which leave with the first token.
    pub(crate) headers: HeaderMap,
    body: Incoming,
    reader: EventReader,
    ready: VecDeque<String>,
}

impl Events {
    /// The next event's data, `None` when the stream has ended.
    ///
    /// # Errors
    /// When the stream breaks, is silent for too long, or is none of events.
    pub(crate) async fn next(&mut self) -> Result<Option<String>, ClientError> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Ok(Some(event));
            }
            let silent = |_| ClientError::Silent { url: self.url.clone(), after: STREAM_SILENCE_MAX };
            let frame = tokio::time::timeout(STREAM_SILENCE_MAX, self.body.frame()).await.map_err(silent)?;
            let Some(frame) = frame else { return Ok(None) };
            let frame = frame.map_err(|source| ClientError::Broken { url: self.url.clone(), source: source.into() })?;
            if let Ok(bytes) = frame.into_data() {
                let no_events = |source| ClientError::NoEvents { url: self.url.clone(), source };
                self.ready.extend(self.reader.push(&bytes).map_err(no_events)?);
            }
        }
    }

    /// A header's text.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).and_then(|value| value.to_str().ok())
    }
}

async fn collect(url: &str, body: Incoming) -> Result<Bytes, ClientError> {
    let collected = Limited::new(body, ANSWER_BYTES_MAX).collect().await;
    collected.map(|body| body.to_bytes()).map_err(|source| ClientError::Broken { url: url.to_owned(), source })
}

/// Our own errors carry a message; of anything else, the first line will do.
fn refused(url: &str, status: StatusCode, body: &[u8]) -> ClientError {
    let message = match serde_json::from_slice::<ErrorBody>(body) {
        Ok(body) => body.error.message,
        Err(_) => String::from_utf8_lossy(body).lines().next().unwrap_or_default().chars().take(200).collect(),
    };
    ClientError::Refused { url: url.to_owned(), status, message }
}
