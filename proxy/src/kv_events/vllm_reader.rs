//! The loop that keeps one vLLM rank followed: connects, asks for what it missed, hands on changes, and begins again when the
//! connection ends.
//!
//! A publisher greets nobody with a snapshot, so each connection starts from nothing: all claims are taken back, and the
//! batches that the engine still keeps (`replay_endpoint`, 10,000 of them by default) are asked for from the first one. Without
//! a replay endpoint the claims come with the blocks that are stored from then on. It never ends by itself; to end it, drop it.

use super::vllm;
use super::vllm_follower::{Follower, Step};
use super::zmq::{Connection, SocketType, ZmqError};
use crate::prefix::Change;
use bytes::Bytes;
use std::time::Duration;
use tokio::time::timeout;

/// The first pause before another connection, and the longest. Each is twice the one before, and between half and all of that,
/// so that proxies don't come back to an engine at the same moment.
const PAUSE_MIN: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(10);

/// For each batch of a replay. The engine looks at requests for it between two batches, at least ten times a second, and sends
/// it in one go.
const REPLAY_TIMEOUT: Duration = Duration::from_secs(5);

/// The number that ends a replay: -1.
const REPLAY_END: u64 = u64::MAX;

/// Where a rank publishes, each as `host:port`. vLLM adds the rank to both ports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Source {
    /// Its `endpoint`.
    pub(crate) publisher: String,
    /// Its `replay_endpoint`, where it has one.
    pub(crate) replay: Option<String>,
    /// Its `topic`; empty is all.
    pub(crate) topic: String,
}

/// What the loop has to say.
#[derive(Debug)]
pub(crate) enum Report {
    /// For the index.
    Change(Change),
    /// The engine's blocks have so many tokens.
    BlockTokens(usize),
    /// A connection stands and is subscribed.
    Connected,
    /// The connection ended, or none could be made; another is tried after a pause.
    Disconnected(ZmqError),
    /// Batches are missing and the engine has no replay for them: what it holds is not known.
    Missed,
    /// The engine was asked for missing batches and did not answer as it should.
    ReplayFailed(ZmqError),
    /// A batch could not be read. What it told is missing.
    Malformed,
}

/// Follows `source` until it is dropped. `draw` gives random bits for the pauses.
pub(crate) async fn follow(
    source: &Source,
    follower: &mut Follower,
    mut report: impl FnMut(Report),
    mut draw: impl FnMut() -> u64,
) -> std::convert::Infallible {
    let mut pause_max = PAUSE_MIN;
    loop {
        let mut session = Session { source, follower, report: &mut report, was_heard: false };
        let Err(error) = session.run().await;
        if session.was_heard {
            pause_max = PAUSE_MIN;
        }
        report(Report::Disconnected(error));
        tokio::time::sleep(pause(pause_max, draw())).await;
        pause_max = (2 * pause_max).min(PAUSE_MAX);
    }
}

fn pause(pause_max: Duration, draw: u64) -> Duration {
    let half = pause_max / 2;
    half + Duration::from_micros(draw % (half.as_micros() as u64 + 1))
}

/// One connection.
struct Session<'a, R> {
    source: &'a Source,
    follower: &'a mut Follower,
    report: &'a mut R,
    /// Whether any batch came.
    was_heard: bool,
}

impl<R: FnMut(Report)> Session<'_, R> {
    async fn run(&mut self) -> Result<std::convert::Infallible, ZmqError> {
        let mut subscriber = Connection::connect(&self.source.publisher, SocketType::Sub).await?;
        subscriber.subscribe(&self.source.topic).await?;
        (self.report)(Report::Connected);
        // The subscription first and the past then: what happens between the two comes twice, and not never.
        self.lost();
        self.replay(0).await;
        loop {
            let message = subscriber.receive().await?;
            let [_topic, seq, payload] = &message[..] else { return Err(ZmqError::Frame) };
            let seq = number(seq).ok_or(ZmqError::Frame)?;
            self.was_heard = true;
            if let Step::Gap { expected } = self.take(seq, payload) {
                self.replay(expected).await;
                self.take_or_lose(seq, payload);
            }
        }
    }

    /// Asks for the batches from number `from` on, as far as the engine has them, and applies them.
    async fn replay(&mut self, from: u64) {
        let Some(address) = &self.source.replay else { return };
        let result = match Connection::connect(address, SocketType::Dealer).await {
            Ok(mut dealer) => self.replay_over(&mut dealer, from).await,
            Err(error) => Err(error),
        };
        if let Err(error) = result {
            (self.report)(Report::ReplayFailed(error));
        }
    }

    async fn replay_over(&mut self, dealer: &mut Connection, from: u64) -> Result<(), ZmqError> {
        // A ROUTER looks for the empty frame that a REQ would send.
        dealer.send(&[b"", &from.to_be_bytes()]).await?;
        loop {
            let received = timeout(REPLAY_TIMEOUT, dealer.receive()).await;
            let message = received.map_err(|_| ZmqError::Timeout(REPLAY_TIMEOUT))??;
            let [_empty, seq, payload] = &message[..] else { return Err(ZmqError::Frame) };
            match number(seq).ok_or(ZmqError::Frame)? {
                REPLAY_END => return Ok(()),
                seq => self.take_or_lose(seq, payload),
            }
        }
    }

    /// Applies a batch; where others before it are missing for good, after all claims are taken back.
    fn take_or_lose(&mut self, seq: u64, payload: &Bytes) {
        if let Step::Gap { .. } = self.take(seq, payload) {
            (self.report)(Report::Missed);
            self.lost();
            self.take(seq, payload);
        }
    }

    fn take(&mut self, seq: u64, payload: &Bytes) -> Step {
        let Ok(batch) = vllm::decode(payload) else {
            if self.follower.next().is_some_and(|next| seq < next) {
                return Step::Repeated;
            }
            // Read as a batch without events, after which nothing is known.
            (self.report)(Report::Malformed);
            self.lost();
            return self.follower.batch(seq, vllm::Batch::default(), &mut Vec::new());
        };
        let mut changes = Vec::new();
        let block_tokens = self.follower.block_tokens();
        let step = self.follower.batch(seq, batch, &mut changes);
        if let Some(tokens) = self.follower.block_tokens().filter(|_| self.follower.block_tokens() != block_tokens) {
            (self.report)(Report::BlockTokens(tokens));
        }
        changes.into_iter().for_each(|change| (self.report)(Report::Change(change)));
        step
    }

    fn lost(&mut self) {
        let change = self.follower.lost();
        (self.report)(Report::Change(change));
    }
}

fn number(frame: &Bytes) -> Option<u64> {
    Some(u64::from_be_bytes(frame[..].try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::super::vllm_follower::block_hashes;
    use super::super::zmq::tests::{Peer, listener};
    use super::*;
    use crate::prefix::{Holder, exact::ExactIndex};
    use tokio::net::TcpListener;

    const HOLDER: Holder = Holder { worker: 0, dp_rank: 0 };

    /// A batch of one block of one token, in MessagePack as the first release writes it: stored after `parent`.
    fn stored(parent: Option<u8>, block: u8) -> Vec<u8> {
        let parent = parent.unwrap_or(0xc0);
        [&[0x92, 0, 0x91, 0x96][..], b"\xabBlockStored", &[0x91, block, parent, 0x91, block, 1, 0xc0]].concat()
    }

    #[derive(Default)]
    struct Rig {
        index: ExactIndex,
        said: Vec<&'static str>,
    }

    impl Rig {
        fn report(&mut self, report: Report) {
            match report {
                Report::Change(change) => self.index.apply(HOLDER, &change),
                Report::BlockTokens(tokens) => assert_eq!(tokens, 1),
                Report::Connected => self.said.push("connected"),
                Report::Disconnected(_) => self.said.push("disconnected"),
                Report::Missed => self.said.push("missed"),
                Report::ReplayFailed(_) => self.said.push("replay failed"),
                Report::Malformed => self.said.push("malformed"),
            }
        }

        fn leading(&self, tokens: &[u32]) -> u32 {
            self.index.leading(&block_hashes(1, tokens, None, None)).first().map_or(0, |overlap| overlap.leading)
        }
    }

    async fn publish(publisher: &mut Peer, seq: u64, payload: &[u8]) {
        publisher.send(&[b"kv", &seq.to_be_bytes(), payload]).await;
    }

    async fn accept_subscriber(listener: &TcpListener) -> Peer {
        let mut publisher = Peer::accept(listener, "PUB").await;
        assert_eq!(publisher.message().await, ["\x01kv"]);
        publisher
    }

    /// Answers one request for a replay.
    async fn replay(listener: &TcpListener, expect_from: u64, batches: &[(u64, Vec<u8>)]) {
        let mut router = Peer::accept(listener, "ROUTER").await;
        assert_eq!(router.message().await, [&b""[..], &expect_from.to_be_bytes()]);
        for (seq, payload) in batches {
            router.send(&[b"", &seq.to_be_bytes(), payload]).await;
        }
        router.send(&[b"", &REPLAY_END.to_be_bytes(), b""]).await;
    }

    /// Runs the loop beside `engine` until that ends, by dropping its connection, and the loop has noticed.
    async fn run(source: Source, engine: impl Future<Output = ()>) -> Rig {
        let (mut rig, mut follower) = (Rig::default(), Follower::default());
        let (ended, mut has_ended) = tokio::sync::mpsc::unbounded_channel();
        let report = |report: Report| {
            if matches!(report, Report::Disconnected(_)) {
                ended.send(()).expect("somebody waits");
            }
            rig.report(report);
        };
        tokio::select! {
            never = follow(&source, &mut follower, report, || 0) => match never {},
            () = async {
                engine.await;
                has_ended.recv().await.expect("it ends");
            } => {}
        }
        rig
    }

    #[tokio::test]
    async fn the_past_is_replayed_and_a_gap_is_filled() {
        let ((pub_listener, publisher), (replay_listener, replay_address)) = (listener().await, listener().await);
        let source = Source { publisher, replay: Some(replay_address), topic: "kv".to_owned() };
        let engine = async {
            let mut publisher = accept_subscriber(&pub_listener).await;
            replay(&replay_listener, 0, &[(0, stored(None, 1)), (1, stored(Some(1), 2))]).await;
            publish(&mut publisher, 1, &stored(Some(1), 2)).await;
            publish(&mut publisher, 4, &stored(Some(4), 5)).await;
            replay(&replay_listener, 2, &[(2, stored(Some(2), 3)), (3, stored(Some(3), 4)), (4, stored(Some(4), 5))])
                .await;
        };
        let rig = run(source, engine).await;
        assert_eq!((rig.leading(&[1, 2, 3, 4, 5, 6]), &rig.said[..]), (5, &["connected", "disconnected"][..]));
    }

    #[tokio::test]
    async fn without_replay_a_gap_takes_the_claims_back_until_they_are_used() {
        let (pub_listener, publisher) = listener().await;
        let source = Source { publisher, replay: None, topic: "kv".to_owned() };
        let engine = async {
            let mut publisher = accept_subscriber(&pub_listener).await;
            publish(&mut publisher, 7, &stored(None, 1)).await;
            publish(&mut publisher, 8, &stored(Some(1), 2)).await;
            publish(&mut publisher, 9, &stored(Some(2), 3)).await;
            publish(&mut publisher, 11, &stored(Some(1), 4)).await;
        };
        let rig = run(source, engine).await;
        assert_eq!((rig.leading(&[1, 2, 3]), rig.leading(&[1, 4])), (1, 2));
        assert_eq!(rig.said, ["connected", "missed", "disconnected"]);
    }

    #[tokio::test]
    async fn a_batch_that_cannot_be_read_takes_the_claims_back() {
        let (pub_listener, publisher) = listener().await;
        let source = Source { publisher, replay: None, topic: "kv".to_owned() };
        let engine = async {
            let mut publisher = accept_subscriber(&pub_listener).await;
            publish(&mut publisher, 0, &stored(None, 1)).await;
            publish(&mut publisher, 1, b"\xc1").await;
            publish(&mut publisher, 2, &stored(None, 2)).await;
        };
        let rig = run(source, engine).await;
        assert_eq!((rig.leading(&[1]), rig.leading(&[2])), (0, 1));
        assert_eq!(rig.said, ["connected", "malformed", "disconnected"]);
    }

    #[tokio::test(start_paused = true)]
    async fn another_connection_starts_from_nothing_and_a_dead_replay_does_not_stop_it() {
        let (pub_listener, publisher) = listener().await;
        let source = Source { publisher, replay: Some("127.0.0.1:1".to_owned()), topic: "kv".to_owned() };
        let engine = async {
            for block in [1, 2] {
                let mut publisher = accept_subscriber(&pub_listener).await;
                publish(&mut publisher, 0, &stored(None, block)).await;
            }
        };
        let (mut rig, mut follower) = (Rig::default(), Follower::default());
        let (told, mut is_told) = tokio::sync::mpsc::unbounded_channel();
        let report = |report: Report| {
            if matches!(report, Report::Disconnected(_)) {
                told.send(()).expect("somebody waits");
            }
            rig.report(report);
        };
        tokio::select! {
            never = follow(&source, &mut follower, report, || u64::MAX) => match never {},
            () = async {
                engine.await;
                is_told.recv().await.expect("the first end");
                is_told.recv().await.expect("the second end");
            } => {}
        }
        assert_eq!((rig.leading(&[1]), rig.leading(&[2])), (0, 1));
        assert_eq!(rig.said, ["connected", "replay failed", "disconnected"].repeat(2));
    }

    #[test]
    fn pauses_are_between_half_and_all_of_their_bound() {
        for draw in [0, 1, 77_777, u64::MAX] {
            for pause_max in [PAUSE_MIN, PAUSE_MAX] {
                let pause = pause(pause_max, draw);
                assert!(pause_max / 2 <= pause && pause <= pause_max, "{pause:?}");
            }
        }
    }
}
