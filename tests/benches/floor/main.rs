//! The floor: the least that a proxy between a client and two engines can be, to measure ours against.
//!
//! It is what one writes in an afternoon with hyper and a JSON document in memory: read the body, ask prefill, put its answer into
//! the body, ask decode, stream back. It checks nothing, counts nothing, logs nothing and waits for ever. It is fixed: a change of
//! our proxy never comes with a change of this, or the figure that compares them would mean nothing.

mod arguments;
mod body;
mod engine;

use anyhow::{Context, Result};
use arguments::{Arguments, Mode};
use engine::{Engine, Engines};
use http_body_util::{BodyExt as _, Either, Full};
use hyper::body::{Bytes, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::net::TcpListener;

/// What a client gets: an engine's answer frame by frame, or a sentence of our own.
type Answer = Response<Either<Incoming, Full<Bytes>>>;

struct Floor {
    mode: Mode,
    engines: Engines,
    prefill: Option<Engine>,
    decode: Engine,
    next_room: AtomicU64,
}

// One thread: with one core to run on, more of them only wake each other.
#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let Arguments { mode, listen, prefill, decode } = Arguments::parse(std::env::args().skip(1))?;
    let listener = TcpListener::bind(listen).await.with_context(|| format!("listen on {listen}"))?;
    let floor = Arc::new(Floor { mode, engines: Engines::new(), prefill, decode, next_room: AtomicU64::new(1) });
    loop {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        let floor = Arc::clone(&floor);
        tokio::spawn(async move {
            let serve = service_fn(move |request| answer(Arc::clone(&floor), request));
            // A client that hangs up is no news.
            let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), serve).await;
        });
    }
}

async fn answer(floor: Arc<Floor>, request: Request<Incoming>) -> Result<Answer, std::convert::Infallible> {
    Ok(floor.forward(request).await.unwrap_or_else(|error| {
        let mut answer = Response::new(Either::Right(Full::from(format!("{error:#}\n"))));
        *answer.status_mut() = StatusCode::BAD_GATEWAY;
        answer
    }))
}

impl Floor {
    async fn forward(&self, request: Request<Incoming>) -> Result<Answer> {
        let (head, body) = request.into_parts();
        let body = body.collect().await?.to_bytes();
        let answer = match self.mode {
            Mode::Regular => self.engines.send(&self.decode, &head, body).await?,
            Mode::Vllm => {
                let prefill = self.prefill()?;
                let mut document = body::parse(&body)?;
                let answer = self.engines.send(prefill, &head, body::for_prefill(&document)?).await?;
                if !answer.status().is_success() {
                    return Ok(answer.map(Either::Left));
                }
                let answer = body::parse(&answer.into_body().collect().await?.to_bytes())?;
                body::hand_over(&mut document, answer);
                self.engines.send(&self.decode, &head, body::write(&document)?).await?
            }
            Mode::Sglang => {
                let prefill = self.prefill()?;
                let mut document = body::parse(&body)?;
                // Rooms must differ among the requests of one prefill engine, which has this proxy alone.
                let room = self.next_room.fetch_add(1, Ordering::Relaxed);
                body::meet(&mut document, prefill.authority.host(), prefill.bootstrap_port, room);
                let body = body::write(&document)?;
                let (engines, prefill, head_of_prefill) = (self.engines.clone(), prefill.clone(), head.clone());
                let body_of_prefill = body.clone();
                tokio::spawn(async move {
                    if let Ok(answer) = engines.send(&prefill, &head_of_prefill, body_of_prefill).await {
                        // It says nothing that the client is told; read to its end, the connection can be used again.
                        let _ = answer.into_body().collect().await;
                    }
                });
                self.engines.send(&self.decode, &head, body).await?
            }
        };
        Ok(answer.map(Either::Left))
    }

    fn prefill(&self) -> Result<&Engine> {
        self.prefill.as_ref().context("this mode has --prefill")
    }
}
