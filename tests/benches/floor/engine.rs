//! Engines, and the pool of connections to them.

use anyhow::{Context, Result, bail};
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{CONNECTION, CONTENT_LENGTH, HOST, TRANSFER_ENCODING};
use hyper::http::request::Parts;
use hyper::http::uri::{Authority, PathAndQuery, Scheme};
use hyper::{Request, Response, Uri};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;

/// Where an engine is.
#[derive(Clone, Debug)]
pub(crate) struct Engine {
    pub(crate) authority: Authority,
    pub(crate) bootstrap_port: Option<u16>,
}

impl Engine {
    /// `http://HOST:PORT` or `http://HOST:PORT,bootstrap=PORT`.
    pub(crate) fn parse(text: &str) -> Result<Self> {
        let (url, bootstrap) = text.split_once(",bootstrap=").map_or((text, None), |(url, port)| (url, Some(port)));
        let uri: Uri = url.parse().with_context(|| format!("{url} is no URL"))?;
        if uri.scheme() != Some(&Scheme::HTTP) {
            bail!("{url} is not http://HOST:PORT");
        }
        let authority = uri.into_parts().authority.with_context(|| format!("{url} names no host"))?;
        let bootstrap_port = bootstrap.map(|port| port.parse().with_context(|| format!("bootstrap={port}")));
        Ok(Engine { authority, bootstrap_port: bootstrap_port.transpose()? })
    }
}

/// The connections to all engines, kept open.
#[derive(Clone)]
pub(crate) struct Engines(Client<HttpConnector, Full<Bytes>>);

impl Engines {
    pub(crate) fn new() -> Self {
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        Engines(Client::builder(TokioExecutor::new()).build(connector))
    }

    /// Sends the client's request on with another body; the answer's body is still on its way.
    pub(crate) async fn send(&self, engine: &Engine, head: &Parts, body: Bytes) -> Result<Response<Incoming>> {
        let path = head.uri.path_and_query().cloned().unwrap_or_else(|| PathAndQuery::from_static("/"));
        let uri = Uri::builder().scheme(Scheme::HTTP).authority(engine.authority.clone()).path_and_query(path);
        let mut request = Request::new(Full::new(body));
        *request.method_mut() = head.method.clone();
        *request.uri_mut() = uri.build()?;
        *request.headers_mut() = head.headers.clone();
        // These are about a connection and a body that are not this one's; hyper writes its own.
        for name in [CONNECTION, CONTENT_LENGTH, HOST, TRANSFER_ENCODING] {
            request.headers_mut().remove(name);
        }
        self.0.request(request).await.with_context(|| format!("{} does not answer", engine.authority))
    }
}
