//! What is refused, each with its own code, and without a byte of KV leaving.

use super::fixture::*;
use crate::transfer::consumer::Destination;
use crate::transfer::error::{FetchError, OpenError, SessionError};
use crate::transfer::limits::{Limits, Timing};
use crate::transfer::producer::ExportReason;
use crate::transfer::session;
use baton_engine::kv_pool::BLOCK_TOKENS;
use baton_wire::kv::control::{decode, encode, encode_bare};
use baton_wire::kv::{Codec, Credit, ErrorCode, ErrorReport, Header, Hello, Kind, Negotiated, Stream, Subscribe};
use baton_wire::signing::{self, TransferClaims};
use baton_wire::{Epoch, Fingerprint, PathReason, PromptHash, SessionId, TransferId};
use ed25519_dalek::SigningKey;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_token_fetches_nothing() {
    let pair = Pair::start(Setup::default()).await;
    let prompt = pair.prompt(3 * BLOCK_TOKENS, 0);
    let export = pair.open(&prompt);
    pair.compute_all(&export, &prompt);
    export.commit(commit());
    let right = prompt.claims();
    let cases = [
        ("expired", TransferClaims { expires_unix_ms: 1, ..right.clone() }, ErrorCode::Unauthorized),
        ("other consumer", TransferClaims { consumer: Epoch([9; 16]), ..right.clone() }, ErrorCode::Unauthorized),
        ("other transfer", TransferClaims { transfer: TransferId([9; 16]), ..right.clone() }, ErrorCode::Unauthorized),
        ("other attempt", TransferClaims { attempt: 2, ..right.clone() }, ErrorCode::Unauthorized),
        ("other model", TransferClaims { fingerprint: Fingerprint([9; 32]), ..right.clone() }, ErrorCode::Unauthorized),
        ("budget", TransferClaims { byte_budget: right.byte_budget - 1, ..right.clone() }, ErrorCode::BudgetExceeded),
    ];
    let stranger = SigningKey::from_bytes(&[8; 32]);
    let mut tokens: Vec<_> =
        cases.iter().map(|(what, claims, code)| (*what, signing::sign(&key(), claims), *code)).collect();
    tokens.push(("other key", signing::sign(&stranger, &right), ErrorCode::Unauthorized));
    tokens.push(("no token", "nonsense".to_owned(), ErrorCode::Unauthorized));
    for (what, token, expect) in tokens {
        let mut fetch = prompt.fetch_from(pair.address);
        fetch.transfer.token = token;
        let error = soon(what, pair.consumer.fetch(fetch, prompt.destination())).await.expect_err(what);
        assert!(matches!(error, FetchError::Refused(code) if code == expect), "{what}: {error:?}");
        assert_eq!(error.path_reason(), PathReason::Unauthorized, "{what}");
    }
    assert_eq!(pair.producer.stats().kv_bytes_sent, 0);
    assert_eq!(pair.producer.stats().refused(ErrorCode::Unauthorized), 7);
    // None of them has spoilt it for the right one.
    soon("the right one", pair.fetch(&prompt)).await.expect("nothing goes wrong");
    pair.assert_arrived(&prompt);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transfer_is_fetched_once() {
    let pair = Pair::start(Setup::default()).await;
    let prompt = pair.prompt(3 * BLOCK_TOKENS, 0);
    let export = pair.open(&prompt);
    pair.compute_all(&export, &prompt);
    export.commit(commit());
    soon("the first", pair.fetch(&prompt)).await.expect("nothing goes wrong");
    soon("the acknowledgement", export.finished()).await;
    let sent = pair.producer.stats().kv_bytes_sent;
    let error = soon("the replay", pair.fetch(&prompt)).await.expect_err("fetched already");
    assert!(matches!(error, FetchError::Refused(ErrorCode::AlreadyTaken)), "{error:?}");
    assert_eq!(pair.producer.stats().kv_bytes_sent, sent);
    let reopened = pair.producer.open(prompt.spec()).err();
    assert!(matches!(reopened, Some(OpenError::Superseded { by: 1, .. })), "{reopened:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_workers_with_different_fingerprints_both_say_so() {
    let other = Fingerprint([4; 32]);
    let pair = Pair::start(Setup { consumer_fingerprint: other, ..Setup::default() }).await;
    let prompt = pair.prompt(BLOCK_TOKENS, 0);
    let error = soon("the refusal", pair.fetch(&prompt)).await.expect_err("another model");
    match &error {
        FetchError::Session(SessionError::FingerprintMismatch { local, remote }) => {
            assert_eq!((*local, *remote), (other, FINGERPRINT));
        }
        error => panic!("{error:?}"),
    }
    assert_eq!(error.path_reason(), PathReason::FingerprintMismatch);
    until("the producer counts it", || pair.producer.stats().refused(ErrorCode::FingerprintMismatch) == 1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kv_of_another_prompt_is_refused() {
    let pair = Pair::start(Setup::default()).await;
    let prompt = pair.prompt(BLOCK_TOKENS, 0);
    let export = pair.open(&prompt);
    pair.compute_all(&export, &prompt);
    let mut fetch = prompt.fetch_from(pair.address);
    fetch.prompt_hash = PromptHash::of(&[1, 2, 3]);
    let error =
        soon("the refusal", pair.consumer.fetch(fetch, prompt.destination())).await.expect_err("another prompt");
    assert!(matches!(error, FetchError::Refused(ErrorCode::PromptMismatch)), "{error:?}");
    assert_eq!(pair.producer.stats().kv_bytes_sent, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_higher_attempt_takes_the_place_of_a_lower_one_on_both_sides() {
    let pair = Pair::start(Setup::default()).await;
    let first = pair.prompt(3 * BLOCK_TOKENS, 0);
    let second = first.attempt(2);
    let first_export = pair.open(&first);
    let first_fetch = tokio::spawn(pair.fetch(&first));
    first_export.progress(0, &first.source_blocks, BLOCK_TOKENS);
    until("a frame is here", || pair.consumer.stats().frames_received == 1).await;

    let second_export = pair.open(&second);
    assert_eq!(soon("the first's end", first_export.finished()).await.reason, ExportReason::Superseded);
    let error = soon("the first's end", first_fetch).await.expect("no panic").expect_err("superseded");
    assert!(matches!(error, FetchError::Refused(ErrorCode::Superseded)), "{error:?}");
    let late = pair.producer.open(first.spec()).err();
    assert!(matches!(late, Some(OpenError::Superseded { attempt: 1, by: 2, .. })), "{late:?}");
    let error = soon("a late first", pair.fetch(&first)).await.expect_err("superseded");
    assert!(matches!(error, FetchError::Refused(ErrorCode::Superseded)), "{error:?}");

    pair.compute_all(&second_export, &second);
    second_export.commit(commit());
    soon("the second", pair.fetch(&second)).await.expect("nothing goes wrong");
    pair.assert_arrived(&second);
    pair.assert_nothing_held().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_higher_attempts_fetch_ends_the_lower_ones_export() {
    let pair = Pair::start(Setup::default()).await;
    let first = pair.prompt(BLOCK_TOKENS, 0);
    let second = first.attempt(2);
    let first_export = pair.open(&first);
    let first_fetch = tokio::spawn(pair.fetch(&first));
    first_export.progress(0, &first.source_blocks, BLOCK_TOKENS);
    until("a frame is here", || pair.consumer.stats().frames_received == 1).await;
    let second_fetch = tokio::spawn(pair.fetch(&second));
    // By the new subscription or by the old one's CANCEL, which cross each other.
    let reason = soon("the first's end", first_export.finished()).await.reason;
    assert!(matches!(reason, ExportReason::Superseded | ExportReason::Cancelled), "{reason:?}");
    let error = soon("the first's end", first_fetch).await.expect("no panic").expect_err("superseded");
    assert!(matches!(error, FetchError::Superseded { attempt: 1, .. }), "{error:?}");
    let second_export = pair.open(&second);
    pair.compute_all(&second_export, &second);
    second_export.commit(commit());
    soon("the second", second_fetch).await.expect("no panic").expect("nothing goes wrong");
    pair.assert_arrived(&second);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_limit_of_a_producer_has_its_own_refusal() {
    let limits = Limits { exports_open: 1, subscriptions_parked: 1, connections: 2 };
    let pair = Pair::start(Setup { limits, ..Setup::default() }).await;
    let [open, too_many, parked, unparked] = [0; 4].map(|cached| pair.prompt(BLOCK_TOKENS, cached));
    let export = pair.open(&open);
    let refused = pair.producer.open(too_many.spec()).err();
    assert_eq!(refused, Some(OpenError::TooManyOpen { open: 1 }));

    let waiting = tokio::spawn(pair.fetch(&parked));
    until("one waits", || pair.producer.stats().now.subscriptions_parked == 1).await;
    let error = soon("the refusal", pair.fetch(&unparked)).await.expect_err("too many");
    assert!(matches!(error, FetchError::Refused(ErrorCode::TooManySubscriptions)), "{error:?}");

    let mut third = TcpStream::connect(pair.address).await.expect("the kernel accepts");
    let hello = Hello::new(FINGERPRINT, CONSUMER, SessionId([1; 16]), Stream::Control);
    session::write_hello(&mut third, &hello, DEADLINE).await.expect("small enough for the socket's buffer");
    let refused = session::read_hello(&mut third, DEADLINE).await.expect_err("too many connections");
    assert!(matches!(refused, SessionError::Refused(ErrorCode::TooManyConnections)), "{refused:?}");

    drop((waiting, export));
    // The empty prompt is refused whatever the room.
    let empty = crate::transfer::export::ExportSpec { prompt_tokens: 0, ..open.spec() };
    assert_eq!(pair.producer.open(empty).err(), Some(OpenError::EmptyPrompt));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_subscription_does_not_wait_for_ever_for_its_export() {
    let producer_timing = Timing { park: Duration::from_millis(50), ..Timing::default() };
    let pair = Pair::start(Setup { producer_timing, ..Setup::default() }).await;
    let prompt = pair.prompt(BLOCK_TOKENS, 0);
    let error = soon("the refusal", pair.fetch(&prompt)).await.expect_err("never opened");
    assert!(matches!(error, FetchError::Refused(ErrorCode::NotOpened)), "{error:?}");
    assert_eq!(error.path_reason(), PathReason::Timeout);
    pair.assert_nothing_held().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fetch_whose_blocks_do_not_fit_its_prompt_is_refused_here() {
    let pair = Pair::start(Setup::default()).await;
    let prompt = pair.prompt(3 * BLOCK_TOKENS, 0);
    for (attempt, cached_blocks, blocks) in [(1, 4, 3), (2, 0, 2)] {
        let prompt = prompt.attempt(attempt);
        let export = pair.open(&prompt);
        pair.compute_all(&export, &prompt);
        let destination = Destination { blocks: prompt.sink_blocks[..blocks].to_vec(), cached_blocks };
        let fetch = pair.consumer.fetch(prompt.fetch_from(pair.address), std::future::ready(destination));
        let error = soon("the refusal", fetch).await.expect_err("does not fit");
        assert!(matches!(error, FetchError::BadDestination { .. }), "{error:?}");
        assert_eq!(soon("the outcome", export.finished()).await.reason, ExportReason::Cancelled);
    }
    assert_eq!(pair.producer.stats().kv_bytes_sent, 0);
}

/// A consumer made of bare sockets, to say what ours never would.
struct Bare {
    control: TcpStream,
    bulk: TcpStream,
}

const AGREED: Negotiated = Negotiated { features: 0, frame_bytes_max: baton_wire::kv::FRAME_BYTES_MAX };

impl Bare {
    async fn dial(pair: &Pair, id: u8) -> Bare {
        let greet = async |stream: Stream| {
            let mut connection = TcpStream::connect(pair.address).await.expect("the producer listens");
            let hello = Hello::new(FINGERPRINT, CONSUMER, SessionId([id; 16]), stream);
            session::write_hello(&mut connection, &hello, DEADLINE).await.expect("small");
            session::read_hello(&mut connection, DEADLINE).await.expect("it is welcome");
            connection
        };
        let control = greet(Stream::Control).await;
        Bare { control, bulk: greet(Stream::Bulk).await }
    }

    async fn subscribe(&mut self, pair: &Pair, prompt: &Prompt, change: impl FnOnce(&mut Subscribe)) {
        self.say(Bare::asking(pair, prompt, change)).await;
    }

    async fn say(&mut self, message: Vec<u8>) {
        self.control.write_all(&message).await.expect("the producer reads");
    }

    fn asking(pair: &Pair, prompt: &Prompt, change: impl FnOnce(&mut Subscribe)) -> Vec<u8> {
        let mut asked = Subscribe {
            token: signing::sign(&key(), &prompt.claims()),
            prompt_tokens: prompt.tokens as u32,
            prompt_hash: prompt.hash(),
            have_prefix_blocks: 0,
            head_start: 0,
            head_count: pair.layout.kv_heads as u16,
            codec: Codec::None,
            credit_bytes: 1 << 20,
        };
        change(&mut asked);
        encode(prompt.transfer, prompt.attempt, &asked).expect("short")
    }

    /// The next control message that is no PING.
    async fn control(&mut self) -> (Header, Vec<u8>) {
        soon("a control message", async {
            loop {
                let message = session::read_message(&mut self.control, &AGREED).await.expect("the session is alive");
                if message.0.kind != Kind::Ping {
                    return message;
                }
            }
        })
        .await
    }

    async fn error(&mut self) -> ErrorCode {
        let (header, payload) = self.control().await;
        decode::<ErrorReport>(&header, &payload).expect("an ERROR").code
    }

    async fn frame(&mut self) -> Header {
        let header = soon("a frame", session::read_header(&mut self.bulk, &AGREED)).await.expect("a header");
        let mut payload = Vec::new();
        session::read_payload(&mut self.bulk, &header, &mut payload).await.expect("its payload");
        header
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_served_is_refused() {
    let pair = Pair::start(Setup::default()).await;
    let prompt = pair.prompt(3 * BLOCK_TOKENS, 0);
    let export = pair.open(&prompt);
    pair.compute_all(&export, &prompt);
    let mut bare = Bare::dial(&pair, 1).await;
    let changes: [fn(&mut Subscribe); 4] =
        [|s| s.head_start = 1, |s| s.head_count = 1, |s| s.have_prefix_blocks = 4, |s| s.credit_bytes = 1];
    for change in changes {
        bare.subscribe(&pair, &prompt, change).await;
        assert_eq!(bare.error().await, ErrorCode::Unsupported);
    }
    assert_eq!(pair.producer.stats().kv_bytes_sent, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_more_leaves_than_the_credit_allows() {
    let producer_timing = Timing { ping: Duration::from_millis(5), ..Timing::default() };
    let pair = Pair::start(Setup { producer_timing, ..Setup::default() }).await;
    let prompt = pair.prompt(3 * BLOCK_TOKENS, 0);
    let export = pair.open(&prompt);
    pair.compute_all(&export, &prompt);
    let block = pair.layout.block_bytes() as u64;
    let mut bare = Bare::dial(&pair, 1).await;
    bare.subscribe(&pair, &prompt, |asked| asked.credit_bytes = block).await;
    let mut blocks = bare.frame().await.block_count;
    for credit in [1, 2, 2] {
        // Two PINGs later the sender would long have sent more.
        for _ in 0..2 {
            let (header, _) = session::read_message(&mut bare.control, &AGREED).await.expect("alive");
            assert_eq!(header.kind, Kind::Ping);
        }
        assert_eq!(pair.producer.stats().kv_bytes_sent, u64::from(blocks) * block);
        let credit = Credit { bytes: credit * block, have_prefix_blocks: 0 };
        bare.say(encode(prompt.transfer, prompt.attempt, &credit).expect("short")).await;
        let until = blocks + (credit.bytes / block) as u32;
        while blocks < until {
            blocks += bare.frame().await.block_count;
        }
        assert_eq!(blocks, until);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_queued_subscription_is_told_of_the_start_and_gets_frames_with_its_first_credit() {
    let pair = Pair::start(Setup::default()).await;
    let prompt = pair.prompt(3 * BLOCK_TOKENS, 0);
    let export = pair.open(&prompt);
    let mut bare = Bare::dial(&pair, 1).await;
    bare.subscribe(&pair, &prompt, |asked| asked.credit_bytes = 0).await;
    pair.compute_all(&export, &prompt);
    assert_eq!(bare.control().await.0.kind, Kind::Started);
    assert_eq!(pair.producer.stats().kv_bytes_sent, 0);
    let credit = |bytes, have_prefix_blocks| {
        encode(prompt.transfer, prompt.attempt, &Credit { bytes, have_prefix_blocks }).expect("short")
    };
    bare.say(credit(1 << 20, 2)).await;
    let frame = bare.frame().await;
    assert_eq!((frame.first_block, frame.block_count), (2, 1), "the first two are there already");
    // A prefix is had from the beginning or not at all.
    bare.say(credit(1 << 20, 1)).await;
    assert_eq!(bare.error().await, ErrorCode::ProtocolViolation);
    assert_eq!(soon("the outcome", export.finished()).await.reason, ExportReason::ConsumerLost);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_first_credit_beyond_the_prompt_is_refused() {
    let pair = Pair::start(Setup::default()).await;
    let prompt = pair.prompt(3 * BLOCK_TOKENS, 0);
    let export = pair.open(&prompt);
    pair.compute_all(&export, &prompt);
    let mut bare = Bare::dial(&pair, 1).await;
    bare.subscribe(&pair, &prompt, |asked| asked.credit_bytes = 0).await;
    assert_eq!(bare.control().await.0.kind, Kind::Started);
    let credit = Credit { bytes: 1 << 20, have_prefix_blocks: 4 };
    bare.say(encode(prompt.transfer, prompt.attempt, &credit).expect("short")).await;
    assert_eq!(bare.error().await, ErrorCode::ProtocolViolation);
    assert_eq!(pair.producer.stats().kv_bytes_sent, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_cancels_or_acknowledges_another_sessions_transfer() {
    let pair = Pair::start(Setup::default()).await;
    let prompt = pair.prompt(3 * BLOCK_TOKENS, 0);
    let export = pair.open(&prompt);
    let fetch = tokio::spawn(pair.fetch(&prompt));
    export.progress(0, &prompt.source_blocks, BLOCK_TOKENS);
    until("a frame is here", || pair.consumer.stats().frames_received == 1).await;
    let mut bare = Bare::dial(&pair, 1).await;
    for kind in [Kind::Cancel, Kind::CommitAck] {
        bare.say(encode_bare(kind, prompt.transfer, prompt.attempt).to_vec()).await;
    }
    let failed = ErrorReport { code: ErrorCode::Corrupt };
    bare.say(encode(prompt.transfer, prompt.attempt, &failed).expect("short")).await;
    // Messages are taken in order, so this refusal says that the ones before were read.
    bare.subscribe(&pair, &prompt, |_| {}).await;
    assert_eq!(bare.error().await, ErrorCode::AlreadyTaken);
    pair.compute_all(&export, &prompt);
    export.commit(commit());
    soon("the fetch", fetch).await.expect("no panic").expect("nothing goes wrong");
    pair.assert_arrived(&prompt);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancel_right_behind_its_subscribe_is_not_lost() {
    let layout = baton_engine::kv_pool::KvLayout { num_blocks: 1024, ..small() };
    let pair = Pair::start(Setup { layout, ..Setup::default() }).await;
    let mut bare = Bare::dial(&pair, 1).await;
    for _ in 0..50 {
        let prompt = pair.prompt(BLOCK_TOKENS, 0);
        let cancel = encode_bare(Kind::Cancel, prompt.transfer, prompt.attempt);
        let export = pair.open(&prompt);
        bare.say([&Bare::asking(&pair, &prompt, |_| {})[..], &cancel].concat()).await;
        assert_eq!(soon("the end", export.finished()).await.reason, ExportReason::Cancelled);

        let prompt = prompt.attempt(2);
        bare.subscribe(&pair, &prompt, |_| {}).await;
        until("it waits", || pair.producer.stats().now.subscriptions_parked == 1).await;
        let export = pair.open(&prompt);
        bare.say(encode_bare(Kind::Cancel, prompt.transfer, prompt.attempt).to_vec()).await;
        assert_eq!(soon("the end", export.finished()).await.reason, ExportReason::Cancelled);
    }
    pair.assert_nothing_held().await;
    assert_eq!(pair.producer.stats().refused(ErrorCode::AlreadyTaken), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bulk_connection_without_its_control_connection_is_refused() {
    let pair = Pair::start(Setup::default()).await;
    let mut bulk = TcpStream::connect(pair.address).await.expect("the producer listens");
    let hello = Hello::new(FINGERPRINT, CONSUMER, SessionId([5; 16]), Stream::Bulk);
    session::write_hello(&mut bulk, &hello, DEADLINE).await.expect("small");
    session::read_hello(&mut bulk, DEADLINE).await.expect("HELLO is answered first");
    let (header, payload) = session::read_message(&mut bulk, &AGREED).await.expect("an ERROR");
    let report = decode::<ErrorReport>(&header, &payload).expect("an ERROR");
    assert_eq!(report.code, ErrorCode::UnknownSession);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stranger_who_speaks_another_protocol_is_told_and_shown_out() {
    let pair = Pair::start(Setup::default()).await;
    for (stranger, expect) in [
        (
            &b"GET / HTTP/1.1\r\nhost: worker:5600\r\nuser-agent: a curious person with a browser\r\n\r\n"[..],
            ErrorCode::ProtocolViolation,
        ),
        (&Header::bare(Kind::Frame, TransferId([1; 16]), 1).encode()[..], ErrorCode::ProtocolViolation),
        (&[0xff; 64][..], ErrorCode::ProtocolViolation),
    ] {
        let mut connection = TcpStream::connect(pair.address).await.expect("the producer listens");
        connection.write_all(stranger).await.expect("small");
        let refused = session::read_hello(&mut connection, DEADLINE).await.expect_err("no HELLO");
        assert!(matches!(refused, SessionError::Refused(code) if code == expect), "{refused:?}");
        let end = soon("the end", connection.read(&mut [0; 1])).await;
        assert!(matches!(end, Ok(0) | Err(_)));
    }
}
