//! Request smuggling: whatever a client writes, of one request at most one reaches a worker, well-formed, and none that was
//! hidden in another.

mod support;

use baton_wire::Role;
use futures_util::future::join_all;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use support::h2raw::{self, DATA, END_HEADERS, END_STREAM, HEADERS};
use support::tap::Tap;
use support::{Mock, Proxy, Setup, WITHIN};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

/// What may reach a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reaches {
    Nothing,
    /// The outer request, once.
    Outer,
}
use Reaches::{Nothing, Outer};

/// One form of attack.
struct Form {
    name: String,
    reaches: Reaches,
    bytes: Vec<u8>,
    /// Occurs in what the outer request, and the hidden one, ask.
    marks: [String; 2],
}

/// Texts of one form.
struct Texts {
    /// The outer request's JSON.
    json: String,
    /// The same in chunks, whole.
    chunks: String,
    /// A whole request that nobody must take for one.
    hidden: String,
    marks: [String; 2],
}

fn texts() -> Texts {
    static NUMBER: AtomicUsize = AtomicUsize::new(1000);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let marks = [format!("outer-{number}"), format!("hidden-{number}")];
    let [outer, hidden] = marks.clone().map(|mark| format!("{{\"prompt\":\"{mark}\"}}"));
    Texts {
        chunks: format!("{:x}\r\n{outer}\r\n0\r\n\r\n", outer.len()),
        hidden: format!(
            "POST /v1/completions HTTP/1.1\r\nHost: proxy\r\nContent-Length: {}\r\n\r\n{hidden}",
            hidden.len()
        ),
        json: outer,
        marks,
    }
}

/// A form whose bytes are made of the texts.
fn form(name: &str, reaches: Reaches, bytes: impl FnOnce(&Texts) -> Vec<u8>) -> Form {
    let texts = texts();
    Form { name: name.to_owned(), reaches, bytes: bytes(&texts), marks: texts.marks }
}

/// `POST` with these header lines, each ended, and this body.
fn post(lines: &str, body: &str) -> Vec<u8> {
    format!("POST /v1/completions HTTP/1.1\r\nHost: proxy\r\n{lines}\r\n{body}").into_bytes()
}

/// The outer JSON with these lines in which `N` stands for its length.
fn sized(name: &str, reaches: Reaches, lines: &str) -> Form {
    form(name, reaches, |t| post(&lines.replace('N', &t.json.len().to_string()), &t.json))
}

/// The outer JSON in chunks, with these lines, and a hidden request after it.
fn chunked(name: &str, reaches: Reaches, lines: &str) -> Form {
    form(name, reaches, |t| post(lines, &format!("{}{}", t.chunks, t.hidden)))
}

/// A body of these chunks, `J` being the outer JSON and `S` its length in hexadecimal, with a hidden request after it.
fn chunks(name: &str, reaches: Reaches, body: &str) -> Form {
    form(name, reaches, |t| {
        let body = body.replace('S', &format!("{:x}", t.json.len())).replace('J', &t.json);
        post("Transfer-Encoding: chunked\r\n", &format!("{body}{}", t.hidden))
    })
}

/// A request with this first line and the outer JSON as its body.
fn line(name: &str, reaches: Reaches, line: &str) -> Form {
    form(name, reaches, |t| {
        format!("{line}\r\nHost: proxy\r\nContent-Length: {}\r\n\r\n{}", t.json.len(), t.json).into_bytes()
    })
}

fn lengths_and_codings() -> Vec<Form> {
    const TE: &str = "Transfer-Encoding: chunked\r\n";
    vec![
        // Both: chunks count, and the connection ends, so that nobody's other view of the length matters.
        form("CL.TE, the length of all", Outer, |t| {
            let body = format!("{}{}", t.chunks, t.hidden);
            post(&format!("Content-Length: {}\r\n{TE}", body.len()), &body)
        }),
        form("TE.CL order, the length of all", Outer, |t| {
            let body = format!("{}{}", t.chunks, t.hidden);
            post(&format!("{TE}Content-Length: {}\r\n", body.len()), &body)
        }),
        chunked("CL of 4 and TE", Outer, &format!("Content-Length: 4\r\n{TE}")),
        chunked("CL of 0 and TE", Outer, &format!("Content-Length: 0\r\n{TE}")),
        chunked("TE and two CL", Outer, &format!("{TE}Content-Length: 4\r\nContent-Length: 5\r\n")),
        form("TE.CL, hidden in a chunk", Nothing, |t| {
            let body = format!("{:x}\r\n{}\r\n0\r\n\r\n", t.hidden.len(), t.hidden);
            post(&format!("Content-Length: 4\r\n{TE}"), &body)
        }),
        // Codings that some would take for chunked, or not.
        chunked("TE: xchunked", Nothing, "Transfer-Encoding: xchunked\r\n"),
        chunked("TE: chunked, identity", Nothing, "Transfer-Encoding: chunked, identity\r\n"),
        chunked("TE: identity, chunked", Nothing, "Transfer-Encoding: identity, chunked\r\n"),
        chunked("TE: gzip, chunked", Nothing, "Transfer-Encoding: gzip, chunked\r\n"),
        chunked("TE: chunked twice in one", Nothing, "Transfer-Encoding: chunked, chunked\r\n"),
        chunked("TE twice", Nothing, &format!("{TE}{TE}")),
        chunked("TE and TE: identity", Nothing, &format!("{TE}Transfer-Encoding: identity\r\n")),
        chunked("TE: identity and TE", Nothing, &format!("Transfer-Encoding: identity\r\n{TE}")),
        chunked("TE: x and TE", Nothing, &format!("Transfer-Encoding: x\r\n{TE}")),
        chunked("TE with a space before the colon", Nothing, "Transfer-Encoding : chunked\r\n"),
        chunked("TE with a tab before the colon", Nothing, "Transfer-Encoding\t: chunked\r\n"),
        chunked("TE after a space", Nothing, " Transfer-Encoding: chunked\r\n"),
        chunked("TE folded onto the line before", Nothing, "X: y\r\n Transfer-Encoding: chunked\r\n"),
        chunked("TE folded after the colon", Nothing, "Transfer-Encoding:\r\n chunked\r\n"),
        chunked("TE after a vertical tab", Nothing, "Transfer-Encoding:\x0bchunked\r\n"),
        chunked("TE after a form feed", Nothing, "Transfer-Encoding: \x0cchunked\r\n"),
        chunked("TE in quotes", Nothing, "Transfer-Encoding: \"chunked\"\r\n"),
        chunked("TE with a parameter", Nothing, "Transfer-Encoding: chunked;q=1\r\n"),
        chunked("TE after a comma", Nothing, "Transfer-Encoding: ,chunked\r\n"),
        chunked("TE before a comma", Nothing, "Transfer-Encoding: chunked,\r\n"),
        chunked("TE of nothing", Nothing, "Transfer-Encoding:\r\n"),
        chunked("TE with a NUL in its name", Nothing, "Transfer-Encoding\0: chunked\r\n"),
        chunked("TE with a NUL in its value", Nothing, "Transfer-Encoding: chun\0ked\r\n"),
        chunked("TE with a bare CR after it", Nothing, "Transfer-Encoding: chunked\rX: y\r\n"),
        chunked("TE with an underscore", Nothing, "Transfer_Encoding: chunked\r\n"),
        chunked("TE after a tab", Outer, "Transfer-Encoding:\tchunked\r\n"),
        chunked("TE in capitals", Outer, "TRANSFER-ENCODING: CHUNKED\r\n"),
        chunked("TE with a space after it", Outer, "Transfer-Encoding: chunked \r\n"),
        form("TE with HTTP/1.0", Nothing, |t| {
            let head = "POST /v1/completions HTTP/1.0\r\nHost: proxy\r\nConnection: keep-alive\r\n";
            format!("{head}{TE}\r\n{}{}", t.chunks, t.hidden).into_bytes()
        }),
        // Lengths that some would read otherwise.
        sized("CL twice the same", Outer, "Content-Length: N\r\nContent-Length: N\r\n"),
        sized("CL with zeros before it", Outer, "Content-Length: 00N\r\n"),
        sized("CL twice", Nothing, "Content-Length: N\r\nContent-Length: 4\r\n"),
        sized("CL twice, the other order", Nothing, "Content-Length: 4\r\nContent-Length: N\r\n"),
        sized("CL with a plus", Nothing, "Content-Length: +N\r\n"),
        sized("CL with a minus", Nothing, "Content-Length: -N\r\n"),
        sized("CL as a list", Nothing, "Content-Length: N, N\r\n"),
        sized("CL in hexadecimal", Nothing, "Content-Length: 0xN\r\n"),
        sized("CL with a space inside", Nothing, "Content-Length: N 0\r\n"),
        sized("CL with a parameter", Nothing, "Content-Length: N;x\r\n"),
        sized("CL as a fraction", Nothing, "Content-Length: N.0\r\n"),
        sized("CL with an exponent", Nothing, "Content-Length: Ne0\r\n"),
        sized("CL with an underscore inside", Nothing, "Content-Length: 0_N\r\n"),
        sized("CL in other digits", Nothing, "Content-Length: ٢٣\r\n"),
        sized("CL of nothing", Nothing, "Content-Length:\r\n"),
        sized("CL beyond 64 bits", Nothing, "Content-Length: 18446744073709551616\r\n"),
        sized("CL of 64 bits", Nothing, "Content-Length: 18446744073709551615\r\n"),
        sized("CL with a space before the colon", Nothing, "Content-Length : N\r\n"),
        sized("CL with a tab before the colon", Nothing, "Content-Length\t: N\r\n"),
        sized("CL after a space", Nothing, " Content-Length: N\r\n"),
        sized("CL folded", Nothing, "Content-Length:\r\n N\r\n"),
        sized("CL with an underscore", Nothing, "Content_Length: N\r\n"),
        sized("CL with a NUL after it", Nothing, "Content-Length: N\0\r\n"),
        sized("no CL at all", Nothing, ""),
        form("hidden in the body of a GET", Nothing, |t| {
            let head = format!("GET /v1/models HTTP/1.1\r\nHost: proxy\r\nContent-Length: {}\r\n\r\n", t.hidden.len());
            (head + &t.hidden).into_bytes()
        }),
        form("hidden in the chunks of a GET", Nothing, |t| {
            let head = format!("GET /health HTTP/1.1\r\nHost: proxy\r\n{TE}\r\n{:x}\r\n", t.hidden.len());
            format!("{head}{}\r\n0\r\n\r\n{}", t.hidden, t.hidden).into_bytes()
        }),
        form("hidden in the body of what there is not", Nothing, |t| {
            let head = format!("POST /nothing HTTP/1.1\r\nHost: proxy\r\nContent-Length: {}\r\n\r\n", t.hidden.len());
            (head + &t.hidden).into_bytes()
        }),
    ]
}

fn bodies_in_chunks() -> Vec<Form> {
    let long = "x".repeat(20 << 10);
    vec![
        chunks("data after the last chunk", Outer, "S\r\nJ\r\n0\r\n\r\n"),
        chunks("an extension", Outer, "S;a=b\r\nJ\r\n0\r\n\r\n"),
        chunks("an extension in quotes", Outer, "S;a=\"b\"\r\nJ\r\n0;c\r\n\r\n"),
        chunks("trailers that look like framing", Outer, "S\r\nJ\r\n0\r\nContent-Length: 5\r\n\r\n"),
        chunks("a size of more than 64 bits", Nothing, "FFFFFFFFFFFFFFFFFFS\r\nJ\r\n0\r\n\r\n"),
        chunks("a size that wraps around", Nothing, "100000000000000S\r\nJ\r\n0\r\n\r\n00000"),
        chunks("a negative size", Nothing, "-S\r\nJ\r\n0\r\n\r\n"),
        chunks("a size with a plus", Nothing, "+S\r\nJ\r\n0\r\n\r\n"),
        chunks("a size with 0x", Nothing, "0xS\r\nJ\r\n0\r\n\r\n"),
        chunks("a space before the size", Nothing, " S\r\nJ\r\n0\r\n\r\n"),
        chunks("no size", Nothing, "\r\nJ\r\n0\r\n\r\n"),
        chunks("a bare LF after the size", Nothing, "S\nJ\r\n0\r\n\r\n"),
        chunks("a bare LF in an extension", Nothing, "S;a\nJ\r\n0\r\n\r\n"),
        chunks("a bare CR in an extension", Nothing, "S;a\rJ\r\n0\r\n\r\n"),
        chunks("an endless extension", Nothing, &format!("S;{long}\r\nJ\r\n0\r\n\r\n")),
        chunks("endless trailers", Nothing, &format!("S\r\nJ\r\n0\r\nX: {long}\r\n\r\n")),
        chunks("no end of line after the data", Nothing, "S\r\nJ0\r\n\r\n"),
        chunks("more data than the size", Nothing, "S\r\nJxx\r\n0\r\n\r\n"),
        chunks("a bare LF after the data", Nothing, "S\r\nJ\n0\r\n\r\n"),
    ]
}

fn lines_and_headers() -> Vec<Form> {
    vec![
        line("an absolute URI", Outer, "POST http://evil.test/v1/completions HTTP/1.1"),
        line("an absolute URI with a user", Outer, "POST http://a:b@evil.test/v1/completions HTTP/1.1"),
        line("an authority for a POST", Nothing, "POST evil.test:80 HTTP/1.1"),
        line("an asterisk", Nothing, "OPTIONS * HTTP/1.1"),
        line("two spaces", Nothing, "POST  /v1/completions HTTP/1.1"),
        line("a NUL in the path", Nothing, "POST /v1/completions\0 HTTP/1.1"),
        line("a CR in the path", Nothing, "POST /v1/completions\rX HTTP/1.1"),
        line("an escaped line end in the path", Nothing, "POST /v1/completions%0d%0aHost:%20x HTTP/1.1"),
        line("dots in the path", Nothing, "POST /v1/models/../completions HTTP/1.1"),
        line("HTTP/1.2", Nothing, "POST /v1/completions HTTP/1.2"),
        line("HTTP/2.0 in a line", Nothing, "POST /v1/completions HTTP/2.0"),
        line("no version", Nothing, "POST /v1/completions"),
        line("a small method", Nothing, "post /v1/completions HTTP/1.1"),
        line("two host headers", Nothing, "POST /v1/completions HTTP/1.1\r\nHost: evil.test"),
        line("a folded host", Nothing, "POST /v1/completions HTTP/1.1\r\nX: y\r\n Host: evil.test"),
        line("a header without a colon", Nothing, "POST /v1/completions HTTP/1.1\r\nX"),
        line("a header without a name", Nothing, "POST /v1/completions HTTP/1.1\r\n: x"),
        line("a space in a header's name", Nothing, "POST /v1/completions HTTP/1.1\r\nX y: z"),
        line("the preface of HTTP/2 and then HTTP/1", Nothing, "PRI * HTTP/2.0\r\n\r\nPOST /v1/completions HTTP/1.1"),
        form("no host", Nothing, |t| {
            let head = format!("POST /v1/completions HTTP/1.1\r\nContent-Length: {}\r\n\r\n", t.json.len());
            (head + &t.json).into_bytes()
        }),
        form("a tunnel with a request in it", Nothing, |t| {
            format!("CONNECT evil.test:443 HTTP/1.1\r\nHost: evil.test\r\n\r\n{}", t.hidden).into_bytes()
        }),
        form("a bare LF after each line", Outer, |t| {
            String::from_utf8(post(&format!("Content-Length: {}\r\n", t.json.len()), &t.json))
                .expect("text")
                .replace("\r\n", "\n")
                .into_bytes()
        }),
        sized("expect and the body at once", Outer, "Content-Length: N\r\nExpect: 100-continue\r\n"),
        sized("an expectation that nobody knows", Outer, "Content-Length: N\r\nExpect: 200-maybe\r\n"),
        sized(
            "an upgrade to h2c",
            Outer,
            "Content-Length: N\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAA\r\n",
        ),
        sized("an upgrade to websocket", Outer, "Content-Length: N\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"),
        sized("a connection that names the length", Outer, "Content-Length: N\r\nConnection: Content-Length\r\n"),
        sized("a connection that names the host", Outer, "Content-Length: N\r\nConnection: Host, X-Request-Id\r\n"),
        chunked(
            "a connection that names the coding",
            Outer,
            "Connection: Transfer-Encoding\r\nTransfer-Encoding: chunked\r\n",
        ),
        sized("headers that steer workers", Outer, "Content-Length: N\r\nX-Baton-Leg: x\r\nX-Baton-Token-Ids: 0\r\n"),
        sized("another method inside", Outer, "Content-Length: N\r\nX-HTTP-Method-Override: GET\r\n"),
    ]
}

/// All that the proxy answers to these bytes, and then to a question that shows whether the connection still stands.
async fn write_raw(proxy: &Proxy, bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect(&proxy.address).await.expect("a listening proxy");
    // One that is refused early may be closed while we still write.
    let _ = stream.write_all(bytes).await;
    let mut answer = Vec::new();
    let reading = async {
        let mut buffer = [0; 4096];
        let mut has_asked = false;
        loop {
            match tokio::time::timeout(Duration::from_millis(300), stream.read(&mut buffer)).await {
                Ok(Ok(0) | Err(_)) => break,
                Ok(Ok(length)) => answer.extend_from_slice(&buffer[..length]),
                Err(_) if !has_asked => {
                    has_asked = true;
                    let last = b"GET /health HTTP/1.1\r\nHost: proxy\r\nConnection: close\r\n\r\n";
                    let _ = stream.write_all(last).await;
                }
                Err(_) => {}
            }
        }
    };
    tokio::time::timeout(3 * WITHIN, reading).await.expect("the connection ends");
    String::from_utf8_lossy(&answer).into_owned()
}

/// A proxy before a worker whose wire is watched.
async fn watched() -> (Mock, Tap, Proxy) {
    let mut own = Mock::start(Role::Decode);
    let tap = Tap::before(own.address.clone()).await;
    own.address.clone_from(&tap.address);
    let proxy = Setup::new().own(&own).limits(|limits| limits.in_flight_max = 512).start().await;
    (own, tap, proxy)
}

/// What reached the worker is what may.
fn judge(tap: &Tap, forms: &[Form]) {
    let requests = tap.requests();
    let mut wrong = Vec::new();
    for Form { name, reaches, marks: [outer, hidden], .. } in forms {
        let count = |path: &str, mark: &str| {
            let on_path = requests.iter().filter(|request| request.line.starts_with(&format!("POST {path} ")));
            on_path.filter(|request| String::from_utf8_lossy(&request.body).contains(mark)).count()
        };
        let seen = ["/internal/render", "/internal/decode"].map(|path| (count(path, outer), count(path, hidden)));
        let expect = match reaches {
            Nothing => [(0, 0); 2],
            Outer => [(1, 0); 2],
        };
        if seen != expect {
            wrong.push(format!("{name}: {seen:?} reached the worker"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    for request in &requests {
        for (name, value) in &request.headers {
            assert!(!matches!(name.as_str(), "x-baton-leg" | "x-http-method-override" | "upgrade"), "{name}: {value}");
            assert!(name != "x-baton-token-ids" || value == "1", "{name}: {value}");
        }
    }
}

#[tokio::test]
async fn of_one_request_of_http1_at_most_one_reaches_a_worker() {
    let (_own, tap, proxy) = watched().await;
    let forms = [lengths_and_codings(), bodies_in_chunks(), lines_and_headers()].into_iter().flatten();
    let forms: Vec<Form> = forms.collect();
    assert!(forms.len() >= 60, "{}", forms.len());
    let answers = join_all(forms.iter().map(|form| write_raw(&proxy, &form.bytes))).await;
    judge(&tap, &forms);
    for (form, answer) in forms.iter().zip(&answers) {
        let statuses: Vec<&str> =
            answer.split("HTTP/1.1 ").skip(1).map(|rest| rest.get(..3).unwrap_or_default()).collect();
        let is_fence = |status: &&str| *status == "200" && answer.ends_with("\r\n\r\nok\n");
        // The answer to what was asked, and to the question whether the connection still stands; nothing third.
        let right = match (form.reaches, &statuses[..]) {
            (_, ["100", "200"] | ["100", "200", "200"]) => form.name.starts_with("expect"),
            (Outer, ["200"]) => true,
            (Outer, ["200", fence]) => is_fence(fence),
            (Outer, _) => false,
            (Nothing, [] | [_]) => true,
            (Nothing, [_, fence]) => is_fence(fence),
            (Nothing, _) => false,
        };
        assert!(right, "{}: {answer}", form.name);
    }
}

#[tokio::test]
async fn of_one_request_of_http2_at_most_one_reaches_a_worker() {
    let (_own, tap, proxy) = watched().await;
    type Field = (&'static [u8], &'static [u8]);
    const POST: [Field; 4] =
        [(b":method", b"POST"), (b":scheme", b"http"), (b":path", b"/v1/completions"), (b":authority", b"proxy")];
    let with = |more: &[Field]| [&POST, more].concat();
    let instead = |name: &'static [u8], value: &'static [u8]| {
        POST.iter().map(|field| if field.0 == name { (name, value) } else { *field }).collect::<Vec<Field>>()
    };
    let without = |name: &[u8]| POST.iter().filter(|field| field.0 != name).copied().collect::<Vec<Field>>();
    let cases: Vec<(&str, Reaches, Vec<Field>)> = vec![
        ("nothing special", Outer, with(&[])),
        ("te: trailers", Outer, with(&[(b"te", b"trailers")])),
        ("a host that agrees", Outer, with(&[(b"host", b"proxy")])),
        ("a length that is too large", Nothing, with(&[(b"content-length", b"1000")])),
        ("a length that is too small", Nothing, with(&[(b"content-length", b"4")])),
        ("a length of 0", Nothing, with(&[(b"content-length", b"0")])),
        ("two lengths", Nothing, with(&[(b"content-length", b"23"), (b"content-length", b"4")])),
        ("a length with a plus", Nothing, with(&[(b"content-length", b"+23")])),
        ("a coding", Nothing, with(&[(b"transfer-encoding", b"chunked")])),
        ("te: gzip", Nothing, with(&[(b"te", b"gzip")])),
        ("connection", Nothing, with(&[(b"connection", b"keep-alive")])),
        ("upgrade", Nothing, with(&[(b"upgrade", b"h2c")])),
        ("a line end in a value", Nothing, with(&[(b"x", b"a\r\ntransfer-encoding: chunked")])),
        ("a LF in a value", Nothing, with(&[(b"x", b"a\nb: c")])),
        ("a NUL in a value", Nothing, with(&[(b"x", b"a\0b")])),
        ("a line end in a name", Nothing, with(&[(b"x\r\ny", b"z")])),
        ("a colon in a name", Nothing, with(&[(b"x:y", b"z")])),
        ("a space in a name", Nothing, with(&[(b"x y", b"z")])),
        ("a capital in a name", Nothing, with(&[(b"X", b"z")])),
        ("a name of nothing", Nothing, with(&[(b"", b"z")])),
        ("a second path", Nothing, with(&[(b":path", b"/v1/chat/completions")])),
        ("a pseudo-header after a header", Nothing, [&[(&b"x"[..], &b"y"[..])], &POST[..]].concat()),
        ("a pseudo-header that nobody knows", Nothing, with(&[(b":x", b"y")])),
        ("a status in a request", Nothing, with(&[(b":status", b"200")])),
        ("no path", Nothing, without(b":path")),
        ("no method", Nothing, without(b":method")),
        ("a path of nothing", Nothing, instead(b":path", b"")),
        ("a path with a line in it", Nothing, instead(b":path", b"/v1/completions HTTP/1.1\r\nhost: x\r\n\r\n")),
        ("a path with a space", Nothing, instead(b":path", b"/v1/completions x")),
        ("a method with a line in it", Nothing, instead(b":method", b"POST /v1/completions HTTP/1.1\r\nx:")),
        ("a tunnel", Nothing, instead(b":method", b"CONNECT")),
        ("an authority with a line in it", Nothing, instead(b":authority", b"x\r\ny: z")),
        ("a host that disagrees", Nothing, with(&[(b"host", b"evil.test")])),
        ("two hosts", Nothing, with(&[(b"host", b"proxy"), (b"host", b"proxy")])),
    ];
    let forms = cases.into_iter().map(|(name, reaches, fields)| {
        form(name, reaches, |t| {
            let head = h2raw::frame(HEADERS, END_HEADERS, 1, &h2raw::block(&fields));
            [head, h2raw::frame(DATA, END_STREAM, 1, t.json.as_bytes())].concat()
        })
    });
    // Trailers are never looked at, so one that the parser lets pass goes nowhere.
    let trailers: [(&str, Reaches, &[Field]); 2] = [
        ("a path in the trailers", Outer, &[(b":path", b"/x")]),
        ("a coding in them", Nothing, &[(b"transfer-encoding", b"chunked")]),
    ];
    let trailing = trailers.into_iter().map(|(name, reaches, fields)| {
        form(name, reaches, |t| {
            let head = h2raw::frame(HEADERS, END_HEADERS, 1, &h2raw::block(&POST));
            let trailers = h2raw::frame(HEADERS, END_HEADERS | END_STREAM, 1, &h2raw::block(fields));
            [head, h2raw::frame(DATA, 0, 1, t.json.as_bytes()), trailers].concat()
        })
    });
    let forms: Vec<Form> = forms.chain(trailing).collect();
    join_all(forms.iter().map(async |form| {
        let mut connection = h2raw::Connection::open(&proxy.address).await;
        connection.write(&form.bytes).await;
        connection.ends(1).await;
    }))
    .await;
    judge(&tap, &forms);
}
