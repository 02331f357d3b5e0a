//! `/status` of this pod: its engine's own words, signed where the asker gave a nonce, so that it knows that they are ours. Beside an
//! engine that is not ours, this proxy says what it has learnt of it.

use crate::connector::Connector;
use crate::proxy::Proxy;
use crate::upstream::{Request, UpstreamError, by};
use crate::workers::poll::STATUS_BYTES_MAX;
use baton_wire::names::paths;
use baton_wire::signing;
use baton_wire::status::State;
use bytes::Bytes;
use http::StatusCode;
use std::time::Duration;
use tokio::time::Instant;

/// How long the engine may take: less than the asker's patience of 1 s, so that it hears why there is no status.
const ENGINE_TIMEOUT: Duration = Duration::from_millis(800);

/// Characters of a nonce at most: 16 bytes in hexadecimal.
pub(crate) const NONCE_CHARACTERS_MAX: usize = 32;

/// Why there is no status.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StatusError {
    /// This proxy has no engine: it is a front door.
    #[error("this proxy is a front door and has no engine")]
    NoEngine,
    /// The engine did not answer.
    #[error("the engine of this pod does not answer")]
    Engine(#[source] UpstreamError),
    /// The engine answered with something else.
    #[error("the engine of this pod answered {status}")]
    Answered {
        /// Its status code.
        status: StatusCode,
    },
    /// The engine's answer is no JSON object.
    #[error("the status of this pod's engine can't be read")]
    Garbled,
}

/// What is answered.
#[derive(Debug)]
pub(crate) struct Relayed {
    pub(crate) body: Bytes,
    pub(crate) signature: Option<String>,
}

/// Asks the engine. A proxy that is draining says so in its engine's place, since no leg gets past it any more.
pub(crate) async fn relay(proxy: &Proxy, nonce: Option<&str>) -> Result<Relayed, StatusError> {
    let table = proxy.workers.table();
    let own = table.own().ok_or(StatusError::NoEngine)?;
    if proxy.connector != Connector::Baton {
        let status = own.status().ok_or(StatusError::Garbled)?;
        let mut status = status.clone();
        if proxy.drain.is_draining() {
            status.state = State::Draining;
        }
        let body: Bytes = serde_json::to_vec(&status).map_err(|_| StatusError::Garbled)?.into();
        let signature = nonce.map(|nonce| signing::sign_status(&proxy.key, nonce, &body));
        return Ok(Relayed { body, signature });
    }
    let engine = &own.upstream;
    let exchange = async {
        let answer = engine.send(&Request::get(paths::STATUS)).await?;
        Ok((answer.status, answer.body.collect(STATUS_BYTES_MAX).await?))
    };
    let deadline = Instant::now() + ENGINE_TIMEOUT;
    let (status, mut body) = by(deadline, engine.address(), exchange).await.map_err(StatusError::Engine)?;
    if !status.is_success() {
        return Err(StatusError::Answered { status });
    }
    if proxy.drain.is_draining() {
        body = as_draining(&body).ok_or(StatusError::Garbled)?;
    }
    let signature = nonce.map(|nonce| signing::sign_status(&proxy.key, nonce, &body));
    Ok(Relayed { body, signature })
}

/// The same status with the state replaced; fields that this proxy does not know yet stay.
fn as_draining(body: &[u8]) -> Option<Bytes> {
    let mut status: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(body).ok()?;
    status.insert("state".into(), serde_json::to_value(State::Draining).ok()?);
    serde_json::to_vec(&status).ok().map(Bytes::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draining_replaces_the_state_and_nothing_else() {
        let body = as_draining(br#"{"role":"decode","state":"ready","new":[1]}"#).expect("an object");
        assert_eq!(body, r#"{"role":"decode","state":"draining","new":[1]}"#);
        assert!(as_draining(b"[]").is_none());
    }
}
