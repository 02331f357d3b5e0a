//! A TCP relay between consumer and producer that does to their bytes what networks and dying processes do.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

/// Which bytes are meant: the consumer dials control first and bulk second.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    ControlToConsumer,
    ControlToProducer,
    BulkToConsumer,
    BulkToProducer,
}

/// What happens to the byte at `at` of one way.
#[derive(Clone, Copy, Debug)]
pub(super) enum Harm {
    /// Bits of it are flipped.
    Flip { mask: u8 },
    /// The connection is closed before it.
    Cut,
    /// From it on, nothing goes any way any more, and nothing is closed: what a stopped process looks like.
    Stall,
}

/// One harm at one place.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fault {
    pub(super) way: Way,
    pub(super) at: usize,
    pub(super) harm: Harm,
}

pub(super) struct Relay {
    pub(super) address: SocketAddr,
    /// Cancelled when the fault has happened.
    pub(super) happened: CancellationToken,
}

impl Relay {
    /// Relays to `upstream`, with one fault, which happens once.
    pub(super) async fn start(upstream: SocketAddr, fault: Fault) -> Relay {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a loopback port is free");
        let address = listener.local_addr().expect("a bound listener has an address");
        let happened = CancellationToken::new();
        let connections = Arc::new(AtomicUsize::new(0));
        let token = happened.clone();
        tokio::spawn(async move {
            while let Ok((down, _)) = listener.accept().await {
                let up = TcpStream::connect(upstream).await.expect("the producer listens");
                let (to_consumer, to_producer) = match connections.fetch_add(1, Ordering::Relaxed) % 2 {
                    0 => (Way::ControlToConsumer, Way::ControlToProducer),
                    _ => (Way::BulkToConsumer, Way::BulkToProducer),
                };
                let ((down_from, down_to), (up_from, up_to)) = (down.into_split(), up.into_split());
                tokio::spawn(pump(up_from, down_to, fault, to_consumer, token.clone()));
                tokio::spawn(pump(down_from, up_to, fault, to_producer, token.clone()));
            }
        });
        Relay { address, happened }
    }
}

async fn pump(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, fault: Fault, way: Way, happened: CancellationToken) {
    let mut passed = 0;
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let Ok(read @ 1..) = from.read(&mut buffer).await else { return };
        let bytes = &mut buffer[..read];
        let here =
            fault.at.checked_sub(passed).filter(|here| *here < read && way == fault.way && !happened.is_cancelled());
        if let Some(here) = here {
            happened.cancel();
            match fault.harm {
                Harm::Flip { mask } => bytes[here] ^= mask,
                Harm::Cut | Harm::Stall => {
                    let _ = to.write_all(&bytes[..here]).await;
                }
            }
            if matches!(fault.harm, Harm::Cut) {
                return;
            }
        }
        if happened.is_cancelled() && matches!(fault.harm, Harm::Stall) {
            // Both halves stay open for as long as the test runs.
            return std::future::pending().await;
        }
        if to.write_all(bytes).await.is_err() {
            return;
        }
        passed += read;
    }
}
