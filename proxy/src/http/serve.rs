//! Accepting connections and speaking HTTP/1.1 on them, with bounds on what a stranger can make us hold. HTTP/2 is told apart
//! here and spoken in `http2.rs`.

use super::framing::{self, After};
use super::http2;
use super::preface::{self, Protocol, Replayed};
use super::stall::Unstalled;
use super::{Request, Response};
use crate::tls::reload::Current;
use crate::tls::stream::Stream;
use http::{HeaderValue, header};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use rustls::ServerConfig;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_rustls::{TlsAcceptor, TlsStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Bytes of a request's line and headers; more are answered 431. A signed leg header is under 1 KiB, cookies and tracing
/// headers take a few. That there are at most 100 of them is the parser's own bound: asking for it by name would have it
/// allocate for each request.
pub(super) const HEADER_BYTES_MAX: usize = 16 << 10;

/// How long a connection may take to send a request's headers, which is also how long it may be idle between two requests.
/// A TLS handshake, and the first bytes that tell which HTTP is spoken, may take as long again.
pub(super) const HEADER_TIMEOUT: Duration = Duration::from_secs(10);

/// Connections of one port at once; more wait in the kernel's queue. Eight for each request that may be in flight by
/// default, since keep-alive connections are mostly idle.
const CONNECTIONS_MAX: usize = 4096;

/// How long a peer may take nothing of what it is sent. The deadline of a request ends a worker that is too slow, and can't
/// end a client that never reads: without this bound such clients could hold all places that there are, and for ever.
pub(super) const STALL_TIMEOUT: Duration = Duration::from_secs(60);

/// How long to wait when the system has no more file descriptors for us, before accepting is tried again.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves a port until `closing`, then lets each connection end what it is answering. Connections are tasks of `connections`.
/// With `tls` each of them begins with a handshake, by the certificates of that moment.
pub(crate) async fn serve<S, F>(
    listener: TcpListener,
    tls: Option<Current<ServerConfig>>,
    service: S,
    closing: CancellationToken,
    connections: TaskTracker,
) where
    S: Fn(Request) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = Response> + Send + 'static,
{
    let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let accept = async {
        loop {
            let slot = Arc::clone(&slots).acquire_owned().await.expect("the semaphore is never closed");
            match accepted(&listener).await {
                Ok(stream) => {
                    let connection = connection(stream, tls.clone(), service.clone(), closing.clone());
                    connections.spawn(async move {
                        connection.await;
                        drop(slot);
                    });
                }
                Err(error) => {
                    tracing::warn!("no connection accepted: {error}");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    };
    tokio::select! {
        () = accept => {}
        () = closing.cancelled() => {}
    }
}

async fn accepted(listener: &TcpListener) -> std::io::Result<TcpStream> {
    let (stream, _) = listener.accept().await?;
    // Without it each event of a stream would wait for the client's delayed acknowledgement of the one before: 40 ms.
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!("connection lost before its first request: {error}");
    }
    Ok(stream)
}

async fn connection<S, F>(stream: TcpStream, tls: Option<Current<ServerConfig>>, service: S, closing: CancellationToken)
where
    S: Fn(Request) -> F,
    F: Future<Output = Response> + Send + 'static,
{
    let opened = tokio::select! {
        opened = tokio::time::timeout(HEADER_TIMEOUT, open(stream, tls)) => opened,
        () = closing.cancelled() => return,
    };
    match opened {
        Ok(Ok((Protocol::Http1, stream))) => speak_http1(Unstalled::new(stream, STALL_TIMEOUT), service, closing).await,
        // In a box of its own, so that connections of HTTP/1, of which there are many, don't keep room for it.
        Ok(Ok((Protocol::Http2, stream))) => {
            Box::pin(http2::serve(Unstalled::new(stream, STALL_TIMEOUT), service, closing)).await;
        }
        Ok(Err(error)) => tracing::debug!("connection ended before its first request: {error}"),
        Err(_) => tracing::debug!("connection ended: it took too long to begin"),
    }
}

/// Which HTTP a connection speaks: a client says it in the TLS handshake, or with the first bytes of a plaintext connection.
async fn open(stream: TcpStream, tls: Option<Current<ServerConfig>>) -> std::io::Result<(Protocol, Replayed<Stream>)> {
    let Some(tls) = tls else { return preface::told(Stream::Plain(stream)).await };
    // In a box, because a handshake's state is large and soon gone.
    let stream = Box::pin(TlsAcceptor::from(tls.config()).accept(stream)).await?;
    let protocol = match stream.get_ref().1.alpn_protocol() {
        Some(b"h2") => Protocol::Http2,
        _ => Protocol::Http1,
    };
    Ok((protocol, Replayed::untouched(Stream::Tls(Box::new(TlsStream::Server(stream))))))
}

async fn speak_http1<S, F>(stream: Unstalled<Replayed<Stream>>, service: S, closing: CancellationToken)
where
    S: Fn(Request) -> F,
    F: Future<Output = Response>,
{
    let service = service_fn(|request| {
        let answer = framing::http1(&request).map(|after| (after, service(request)));
        async move {
            let (after, mut response) = match answer {
                Ok((after, answer)) => (after, answer.await),
                Err(refusal) => (After::Ends, *refusal),
            };
            if after == After::Ends {
                response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
            }
            Ok::<_, Infallible>(response)
        }
    });
    let mut connection = std::pin::pin!(
        http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEADER_TIMEOUT)
            .max_header_size(HEADER_BYTES_MAX)
            .serve_connection(TokioIo::new(stream), service)
    );
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = closing.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!("connection ended: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn no_accepted_socket_holds_small_writes_back() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("bound");
        let (_client, stream) = tokio::join!(TcpStream::connect(address), accepted(&listener));
        assert!(stream.expect("a connection").nodelay().expect("a socket option"));
    }
}
