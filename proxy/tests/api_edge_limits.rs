//! Floods and dawdlers, of HTTP/1.1 and of HTTP/2: bounded as documented, and honest clients are served meanwhile.

mod support;

use baton_wire::Role;
use baton_wire::names::{headers, paths};
use http::Request;
use http_body_util::Full;
use serde_json::json;
use std::time::Duration;
use support::h2raw::{self, CONTINUATION, END_HEADERS, END_STREAM, HEADERS, RST_STREAM};
use support::{CLIENT_EVENTS, Decode, JSON_ANSWER, Mock, Proxy, Reply, Setup, WITHIN, completion, completion2, http2};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::Instant;

const POST: [(&[u8], &[u8]); 4] =
    [(b":method", b"POST"), (b":scheme", b"http"), (b":path", b"/v1/completions"), (b":authority", b"proxy")];

/// An honest client is answered.
async fn is_served(proxy: &Proxy) {
    let reply = proxy.complete(json!({"prompt": "hello"})).await;
    assert_eq!((reply.status, reply.text().await.as_str()), (200, JSON_ANSWER));
}

async fn open(proxy: &Proxy, bytes: &[u8]) -> TcpStream {
    let mut stream = TcpStream::connect(&proxy.address).await.expect("a listening proxy");
    stream.write_all(bytes).await.expect("written");
    stream
}

/// All that is answered until the connection ends.
async fn until_end(mut stream: TcpStream) -> String {
    let mut answer = Vec::new();
    // A reset after the answer is an end, too.
    let _ = tokio::time::timeout(WITHIN, stream.read_to_end(&mut answer)).await.expect("an end in time");
    String::from_utf8_lossy(&answer).into_owned()
}

#[tokio::test]
async fn connections_that_dawdle_over_their_headers_end_and_hinder_nobody() {
    let own = Mock::start(Role::Decode);
    let proxy = Setup::new().own(&own).start().await;
    let started = Instant::now();
    let mut slow = Vec::new();
    for number in 0..300 {
        let bytes: &[u8] = match number % 4 {
            0 => b"",
            1 => b"P",
            2 => b"POST /v1/completions HTTP/1.1\r\nHost: proxy\r\nX: ",
            _ => b"PRI * HTTP/2.0\r\n\r\n",
        };
        slow.push(open(&proxy, bytes).await);
    }
    for _ in 0..20 {
        is_served(&proxy).await;
    }
    // A byte now and then buys no time.
    for stream in slow.iter_mut().skip(2).step_by(4) {
        let _ = stream.write_all(b"x").await;
    }
    for stream in slow {
        let answer = until_end(stream).await;
        assert!(!answer.contains(" 200 "), "{answer}");
    }
    assert!(started.elapsed() >= Duration::from_secs(9), "{:?}", started.elapsed());
    is_served(&proxy).await;
}

#[tokio::test]
async fn a_body_that_drips_is_given_up_and_hinders_nobody() {
    let own = Mock::start(Role::Decode);
    let proxy = Setup::new().own(&own).start().await;
    let head = format!("POST {} HTTP/1.1\r\nHost: proxy\r\nContent-Length: 1000\r\n\r\n{{", paths::COMPLETIONS);
    let mut slow = Vec::new();
    for _ in 0..40 {
        slow.push(open(&proxy, head.as_bytes()).await);
    }
    is_served(&proxy).await;
    for stream in slow {
        let answer = until_end(stream).await;
        assert!(answer.starts_with("HTTP/1.1 408 ") && answer.contains("body_too_slow"), "{answer}");
    }
    assert_eq!(own.count(paths::DECODE_LEG), 1);
}

#[tokio::test]
async fn a_hundred_headers_are_taken_and_one_more_is_not() {
    let own = Mock::start(Role::Decode);
    let proxy = Setup::new().own(&own).start().await;
    let json = r#"{"prompt":"hello"}"#;
    for (headers, status) in [(98, "200"), (99, "431")] {
        let many: String = (0..headers).map(|number| format!("X-{number}: y\r\n")).collect();
        let request = format!(
            "POST {} HTTP/1.1\r\nHost: proxy\r\nContent-Length: {}\r\n{many}\r\n{json}",
            paths::COMPLETIONS,
            json.len()
        );
        let mut stream = open(&proxy, request.as_bytes()).await;
        let mut answer = [0; 12];
        stream.read_exact(&mut answer).await.expect("an answer");
        assert_eq!(&answer[9..], status.as_bytes(), "{headers} headers and two");
    }
    let long = format!("POST / HTTP/1.1\r\nHost: proxy\r\nX: {}\r\n\r\n", "x".repeat(17 << 10));
    assert!(until_end(open(&proxy, long.as_bytes()).await).await.starts_with("HTTP/1.1 431 "));
    // Without an end, too, nothing is held beyond the bound.
    let endless = format!("POST / HTTP/1.1\r\nHost: proxy\r\nX: {}", "x".repeat(64 << 10));
    let mut stream = TcpStream::connect(&proxy.address).await.expect("a listening proxy");
    let _ = stream.write_all(endless.as_bytes()).await;
    let answer = until_end(stream).await;
    assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 431 "), "{answer}");
    is_served(&proxy).await;
}

#[tokio::test]
async fn bodies_without_end_hinder_nobody() {
    let own = Mock::start(Role::Decode);
    let proxy = Setup::new().own(&own).limits(|limits| limits.body_bytes_max = 1000).start().await;
    let head = format!("POST {} HTTP/1.1\r\nHost: proxy\r\nTransfer-Encoding: chunked\r\n\r\n", paths::COMPLETIONS);
    let mut floods = tokio::task::JoinSet::new();
    for _ in 0..8 {
        let mut stream = open(&proxy, head.as_bytes()).await;
        floods.spawn(async move {
            let chunk = [&b"10000\r\n"[..], &[b'x'; 0x10000], b"\r\n"].concat();
            // Until the proxy has had enough.
            while stream.write_all(&chunk).await.is_ok() {}
        });
    }
    for _ in 0..5 {
        is_served(&proxy).await;
    }
    tokio::time::timeout(2 * WITHIN, floods.join_all()).await.expect("each flood ends");
    assert_eq!(own.count(paths::DECODE_LEG), 5);
}

#[tokio::test]
async fn a_client_with_two_ids_for_its_request_has_one_on_every_leg() {
    let own = Mock::start(Role::Decode);
    let proxy = Setup::new().own(&own).start().await;
    let mut request = completion(json!({"prompt": "hello"}));
    request.headers_mut().append(headers::REQUEST_ID, "first".parse().expect("a value"));
    request.headers_mut().append(headers::REQUEST_ID, "second".parse().expect("a value"));
    let reply = proxy.send(request).await;
    assert_eq!((reply.status, reply.header(headers::REQUEST_ID)), (200, "first"));
    let seen = own.scenario.seen.borrow();
    assert!(!seen.calls.is_empty());
    for call in &seen.calls {
        let ids: Vec<_> = call.headers.get_all(headers::REQUEST_ID).iter().collect();
        assert_eq!(ids, ["first"], "{}", call.path);
    }
}

#[tokio::test]
async fn http2_is_spoken_on_the_same_port_many_requests_at_once() {
    let own = Mock::start(Role::Decode);
    let proxy = Setup::new().own(&own).start().await;
    let sender = http2(TcpStream::connect(&proxy.address).await.expect("a listening proxy")).await;
    let exchange = async |body: serde_json::Value| {
        Reply::of(sender.clone().send_request(completion2(body)).await.expect("an answer"))
    };
    let (json, first, second) = tokio::join!(
        exchange(json!({"prompt": "hello"})),
        exchange(json!({"prompt": "hello", "stream": true})),
        exchange(json!({"prompt": "hello", "stream": true})),
    );
    assert_eq!((json.status, json.text().await.as_str()), (200, JSON_ANSWER));
    assert_eq!((first.text().await.as_str(), second.text().await.as_str()), (CLIENT_EVENTS, CLIENT_EVENTS));
    let health = Request::get("http://proxy/health").body(Full::default()).expect("a request");
    assert_eq!(Reply::of(sender.clone().send_request(health).await.expect("an answer")).text().await, "ok\n");
    is_served(&proxy).await;
}

#[tokio::test]
async fn a_stream_that_its_client_resets_ends_at_the_worker_and_the_others_go_on() {
    let own = Mock::start(Role::Decode);
    own.decodes(Decode::FallsSilent);
    let proxy = Setup::new().own(&own).start().await;
    let sender = http2(TcpStream::connect(&proxy.address).await.expect("a listening proxy")).await;
    let stream = json!({"prompt": "hello", "stream": true});
    let reset = sender.clone().send_request(completion2(stream)).await.expect("an answer that begins");
    own.decodes(Decode::Answers);
    drop(reset);
    own.sees("the end of the stream that was reset", |seen| seen.decode_aborts == 1).await;
    let other = sender.clone().send_request(completion2(json!({"prompt": "hello"}))).await.expect("an answer");
    assert_eq!(Reply::of(other).text().await, JSON_ANSWER);
}

#[tokio::test]
async fn a_flood_of_resets_ends_its_connection_and_hinders_nobody() {
    let own = Mock::start(Role::Decode);
    own.decodes(Decode::Pending);
    let proxy = Setup::new().own(&own).limits(|limits| limits.in_flight_max = 512).start().await;
    let mut flood = h2raw::Connection::open(&proxy.address).await;
    let head = h2raw::block(&POST);
    let flooding = async {
        for number in 0..20_000_u32 {
            let stream = 2 * number + 1;
            let begin = h2raw::frame(HEADERS, END_HEADERS, stream, &head);
            let reset = h2raw::frame(RST_STREAM, 0, stream, &8_u32.to_be_bytes());
            if !flood.write(&[begin, reset].concat()).await {
                return true;
            }
            tokio::task::yield_now().await;
        }
        false
    };
    let ended = tokio::time::timeout(2 * WITHIN, flooding).await.expect("writing goes on or fails");
    assert!(ended, "the connection took 20,000 requests that were given up");
    own.decodes(Decode::Answers);
    is_served(&proxy).await;
}

#[tokio::test]
async fn headers_without_end_are_refused_and_their_connection_ends() {
    let own = Mock::start(Role::Decode);
    let proxy = Setup::new().own(&own).start().await;
    // Frame after frame of one header list.
    let mut endless = h2raw::Connection::open(&proxy.address).await;
    let mut ended = !endless.write(&h2raw::frame(HEADERS, END_STREAM, 1, &h2raw::block(&POST))).await;
    let more = h2raw::frame(CONTINUATION, 0, 1, &h2raw::block(&[(b"x", &[b'y'; 1000])]));
    for _ in 0..100_000 {
        ended = ended || !endless.write(&more).await;
        if ended {
            break;
        }
    }
    assert!(ended, "the connection took 100 MB of headers");
    // A list that ends, and is too long: in bytes, in lines.
    let long: Vec<(&[u8], &[u8])> = POST.iter().copied().chain([(&b"x"[..], &[b'y'; 9000][..]); 2]).collect();
    let many: Vec<(&[u8], &[u8])> = POST.iter().copied().chain([(&b"x"[..], &b"y"[..]); 101]).collect();
    for fields in [long, many] {
        let mut connection = h2raw::Connection::open(&proxy.address).await;
        let block = h2raw::block(&fields);
        let (first, rest) = block.split_at(block.len().min(16 << 10));
        let flags = if rest.is_empty() { END_HEADERS | END_STREAM } else { END_STREAM };
        connection.write(&h2raw::frame(HEADERS, flags, 1, first)).await;
        if !rest.is_empty() {
            connection.write(&h2raw::frame(CONTINUATION, END_HEADERS, 1, rest)).await;
        }
        connection.ends(1).await;
    }
    assert_eq!(own.count(paths::RENDER), 0);
    is_served(&proxy).await;
}
