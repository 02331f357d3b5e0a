//! Both sides of a connection over the loopback interface.

use super::*;
use proptest::prelude::*;
use tokio::net::TcpListener;

/// The server's side of ZMTP, as little of it as a test needs: what libzmq sends was compared with it by hand.
pub(crate) struct Peer {
    stream: TcpStream,
    input: BytesMut,
}

impl Peer {
    /// Takes a connection and exchanges greetings.
    pub(crate) async fn accept(listener: &TcpListener, socket_type: &str) -> Self {
        let (stream, _) = listener.accept().await.expect("a connection");
        let mut peer = Peer { stream, input: BytesMut::new() };
        let mut greeting = greeting();
        greeting[11] = 1;
        let ready =
            [b"\x05READY\x0bSocket-Type\0\0\0", &[socket_type.len() as u8][..], socket_type.as_bytes()].concat();
        peer.bytes(&greeting).await;
        peer.frame(FLAG_COMMAND, &ready).await;
        while peer.input.len() < GREETING_LEN {
            peer.stream.read_buf(&mut peer.input).await.expect("a greeting");
        }
        assert!(is_greeting(&peer.input.split_to(GREETING_LEN)));
        assert!(peer.receive().await.body.starts_with(b"\x05READY\x0bSocket-Type"));
        peer
    }

    pub(crate) async fn bytes(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.expect("the other side reads");
    }

    pub(crate) async fn frame(&mut self, flags: u8, body: &[u8]) {
        let head = if body.len() < 256 {
            vec![flags, body.len() as u8]
        } else {
            [&[flags | FLAG_LONG], &(body.len() as u64).to_be_bytes()[..]].concat()
        };
        self.bytes(&[&head, body].concat()).await;
    }

    pub(crate) async fn send(&mut self, frames: &[&[u8]]) {
        for (index, frame) in frames.iter().enumerate() {
            self.frame(u8::from(index + 1 < frames.len()), frame).await;
        }
    }

    async fn receive(&mut self) -> Frame {
        loop {
            if let Some(frame) = parse(&mut self.input, MESSAGE_BYTES_MAX).expect("a frame") {
                return frame;
            }
            assert!(self.stream.read_buf(&mut self.input).await.expect("more") > 0, "the other side closed");
        }
    }

    /// The bodies of the frames of the next message.
    pub(crate) async fn message(&mut self) -> Vec<Bytes> {
        let mut frames = Vec::new();
        loop {
            let frame = self.receive().await;
            frames.push(frame.body);
            if !frame.has_more {
                return frames;
            }
        }
    }
}

pub(crate) async fn listener() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address").to_string();
    (listener, address)
}

async fn pair(socket_type: SocketType, peer: &str) -> (Connection, Peer) {
    let (listener, address) = listener().await;
    let (connection, peer) = tokio::join!(Connection::connect(&address, socket_type), Peer::accept(&listener, peer));
    (connection.expect("a connection"), peer)
}

#[tokio::test]
async fn a_subscriber_gets_the_frames_that_a_publisher_sends() {
    let (mut subscriber, mut publisher) = pair(SocketType::Sub, "PUB").await;
    subscriber.subscribe("kv").await.expect("sent");
    assert_eq!(publisher.message().await, ["\x01kv"]);
    let long = vec![7; 100_000];
    publisher.send(&[b"kv", b"", &long]).await;
    publisher.send(&[b"kv"]).await;
    assert_eq!(subscriber.receive().await.expect("a message"), [&b"kv"[..], b"", &long]);
    assert_eq!(subscriber.receive().await.expect("a message"), [&b"kv"[..]]);
    drop(publisher);
    assert!(matches!(subscriber.receive().await, Err(ZmqError::Closed)));
}

#[tokio::test]
async fn a_dealer_asks_and_is_answered() {
    let (mut dealer, mut router) = pair(SocketType::Dealer, "ROUTER").await;
    dealer.send(&[b"", b"question"]).await.expect("sent");
    assert_eq!(router.message().await, [&b""[..], b"question"]);
    router.send(&[b"", b"answer"]).await;
    assert_eq!(dealer.receive().await.expect("a message"), [&b""[..], b"answer"]);
}

#[tokio::test]
async fn a_ping_is_answered_with_its_context() {
    let (mut subscriber, mut publisher) = pair(SocketType::Sub, "PUB").await;
    publisher.frame(FLAG_COMMAND, b"\x04PING\0\x0acontext").await;
    publisher.send(&[b"m"]).await;
    publisher.send(&[b"n"]).await;
    subscriber.receive().await.expect("a message");
    subscriber.receive().await.expect("a message");
    assert_eq!(publisher.receive().await.body, b"\x04PONGcontext"[..]);
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_answered_once_and_then_is_silent_is_dead() {
    let (mut subscriber, mut publisher) = pair(SocketType::Sub, "PUB").await;
    let answering = async {
        assert_eq!(publisher.receive().await.body, b"\x04PING\0\0"[..]);
        publisher.frame(FLAG_COMMAND, b"\x04PONG").await;
        assert_eq!(publisher.receive().await.body, b"\x04PING\0\0"[..]);
        std::future::pending::<()>().await;
    };
    tokio::select! {
        received = subscriber.receive() => assert!(matches!(received, Err(ZmqError::Timeout(_))), "{received:?}"),
        () = answering => {}
    }
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_never_answers_pings_may_be_silent() {
    let (mut subscriber, mut publisher) = pair(SocketType::Sub, "PUB").await;
    let late = async {
        tokio::time::sleep(10 * PING_AFTER).await;
        publisher.send(&[b"late"]).await;
    };
    let (received, ()) = tokio::join!(subscriber.receive(), late);
    assert_eq!(received.expect("a message"), [&b"late"[..]]);
}

#[tokio::test]
async fn what_is_no_zmtp_is_refused() {
    for (answer, expect) in [
        (&b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"[..], "does not speak ZMTP"),
        (&[&greeting()[..12], b"CURVE", &[0; 47]].concat(), "does not speak ZMTP"),
        (&[&greeting()[..], b"\x04\x0b\x05ERROR\x04nope"].concat(), "refused the connection: nope"),
        (&[&greeting()[..], b"\x00\x01x"].concat(), "does not speak ZMTP"),
        (b"\xff", "closed the connection"),
    ] {
        let (listener, address) = listener().await;
        let serve = async {
            let (mut stream, _) = listener.accept().await.expect("a connection");
            stream.write_all(answer).await.expect("sent");
            stream.shutdown().await.expect("closed");
            // What the client says is read, so that closing does not cut the answer off.
            let _ = stream.read_to_end(&mut Vec::new()).await;
        };
        let (connected, ()) = tokio::join!(Connection::connect(&address, SocketType::Sub), serve);
        let error = connected.expect_err("no ZMTP").to_string();
        assert!(error.contains(expect), "{error}");
    }
}

#[tokio::test]
async fn messages_beyond_the_bounds_are_refused_before_they_take_memory() {
    let check = |bytes: Vec<u8>| async move {
        let (mut subscriber, mut publisher) = pair(SocketType::Sub, "PUB").await;
        publisher.bytes(&bytes).await;
        let error = subscriber.receive().await.expect_err("too large");
        assert!(matches!(error, ZmqError::TooLarge | ZmqError::Frame), "{error}");
        assert!(subscriber.input.capacity() < 1 << 20, "{} bytes", subscriber.input.capacity());
    };
    check([&[FLAG_LONG], &[0x7f; 8][..]].concat()).await;
    check([&[FLAG_LONG], &(MESSAGE_BYTES_MAX as u64 + 1).to_be_bytes()[..]].concat()).await;
    check([&[FLAG_LONG | FLAG_COMMAND], &(COMMAND_BYTES_MAX as u64 + 1).to_be_bytes()[..]].concat()).await;
    check([FLAG_MORE, 0].repeat(FRAMES_MAX)).await;
    check(vec![0xf0, 0]).await;
    check(vec![FLAG_COMMAND | FLAG_MORE, 0]).await;
    check(vec![FLAG_COMMAND, 2, 9, b'x']).await;
}

proptest! {
    #[test]
    fn any_bytes_are_frames_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
        let mut input = BytesMut::from(&bytes[..]);
        while let Ok(Some(_)) = parse(&mut input, 1 << 20) {}
        prop_assert!(input.capacity() <= (1 << 20) + 200);
    }

    #[test]
    fn frames_do_not_depend_on_how_they_arrive(bodies in prop::collection::vec(0usize..600, 1..6), piece in 1usize..300) {
        let mut bytes = Vec::new();
        for &len in &bodies {
            if len < 256 {
                bytes.extend([0, len as u8]);
            } else {
                bytes.push(FLAG_LONG);
                bytes.extend((len as u64).to_be_bytes());
            }
            bytes.extend(vec![len as u8; len]);
        }
        let (mut input, mut found) = (BytesMut::new(), Vec::new());
        for piece in bytes.chunks(piece) {
            input.extend_from_slice(piece);
            while let Some(frame) = parse(&mut input, 1 << 20).expect("well-formed") {
                prop_assert!(frame.body.iter().all(|&byte| byte == frame.body.len() as u8));
                found.push(frame.body.len());
            }
        }
        prop_assert_eq!(found, bodies);
    }
}
