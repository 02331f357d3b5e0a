//! Downloads from a server that behaves as a hub or as a bucket does, and as they do on bad days.

use crate::server::until;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use baton_wire::progress::{Phase, Progress};
use baton_worker::args::{Command, CommandLine};
use baton_worker::fetch::{Config, FetchError, Pace, run};
use clap::Parser;
use futures_util::StreamExt;
use http::{HeaderMap, Method, StatusCode, Uri, header};
use serde_json::json;
use std::collections::{BTreeMap, VecDeque};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// What happens to a question instead of what should.
#[derive(Clone, Debug)]
enum Fault {
    /// So many bytes of the body, then the connection breaks.
    Cut(usize),
    /// So many bytes of the body, then nothing more.
    Hangs(usize),
    /// Another byte at the end.
    Damaged,
    /// All of it whatever was asked for.
    NoRanges,
    /// This status and header.
    Refused(u16, &'static str, &'static str),
}

/// A question that came.
#[derive(Clone, Debug)]
struct Asked {
    /// Which of the two servers was asked.
    cdn: bool,
    path: String,
    query: String,
    headers: HeaderMap,
}

impl Asked {
    fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().expect("text"))
    }
}

/// A hub with a server for large files, or a bucket. What is called `large` is led to the other server, with a digest in the listing.
#[derive(Debug, Default)]
struct Place {
    files: BTreeMap<String, Bytes>,
    /// Sizes that the listing says instead.
    sizes: BTreeMap<String, u64>,
    faults: Mutex<BTreeMap<String, VecDeque<Fault>>>,
    /// What is done to every question of a path, once its own faults are used up.
    always: Mutex<BTreeMap<String, Fault>>,
    asked: Mutex<Vec<Asked>>,
    cdn: String,
}

struct Server {
    address: String,
    place: Arc<Place>,
    tasks: Vec<JoinHandle<()>>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

impl Server {
    async fn start(files: &[(&str, &[u8])], change: impl FnOnce(&mut Place)) -> Self {
        let (home, cdn) = (listener().await, listener().await);
        let address = |listener: &TcpListener| listener.local_addr().expect("bound").to_string();
        let files = files.iter().map(|(name, bytes)| ((*name).to_owned(), Bytes::copy_from_slice(bytes)));
        let mut place = Place { files: files.collect(), cdn: address(&cdn), ..Place::default() };
        change(&mut place);
        let place = Arc::new(place);
        let address = address(&home);
        let serve = |listener: TcpListener, cdn: bool| {
            let router = axum::Router::new().fallback(answer).with_state((Arc::clone(&place), cdn));
            tokio::spawn(async move { axum::serve(listener, router).await.expect("serving never ends") })
        };
        let tasks = vec![serve(home, false), serve(cdn, true)];
        Server { address, place, tasks }
    }

    fn fault(&self, path: &str, faults: impl IntoIterator<Item = Fault>) {
        self.place.faults.lock().expect("unpoisoned").insert(path.to_owned(), faults.into_iter().collect());
    }

    fn always(&self, path: &str, fault: Fault) {
        self.place.always.lock().expect("unpoisoned").insert(path.to_owned(), fault);
    }

    /// The questions for a file, redirects left out.
    fn asked(&self, file: &str) -> Vec<Asked> {
        let asked = self.place.asked.lock().expect("unpoisoned");
        asked.iter().filter(|asked| asked.path.ends_with(&format!("/{file}"))).cloned().collect()
    }

    fn hub(&self, to: &Path) -> Config {
        config(&format!("--uri hf://org/tiny --endpoint http://{}", self.address), to, &[("HF_TOKEN", "hf_x")])
    }

    fn bucket(&self, to: &Path) -> Config {
        let keys = [("AWS_ACCESS_KEY_ID", "id"), ("AWS_SECRET_ACCESS_KEY", "secret"), ("AWS_SESSION_TOKEN", "session")];
        config(&format!("--uri s3://models/a/tiny --endpoint http://{} --region eu-1", self.address), to, &keys)
    }
}

async fn listener() -> TcpListener {
    TcpListener::bind("127.0.0.1:0").await.expect("a free port")
}

fn config(flags: &str, to: &Path, environment: &[(&str, &str)]) -> Config {
    let words = format!("baton-worker fetch {flags} --admin-listen 127.0.0.1:0 --to");
    let words = words.split_whitespace().map(Into::into).chain([to.as_os_str().to_owned()]);
    let Some(Command::Fetch(args)) = CommandLine::try_parse_from(words).expect("valid flags").command else {
        panic!("no fetch")
    };
    let value = |name: &str| environment.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned());
    let mut config = Config::new(args, &value).expect("a right command line");
    // As patient as by default, and quicker.
    let (first, longest) = (Duration::from_millis(1), Duration::from_millis(5));
    config.pace = Pace { first, longest, lock: Duration::from_millis(5), ..Pace::default() };
    config
}

async fn answer(
    State((place, cdn)): State<(Arc<Place>, bool)>,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
) -> Response {
    assert_eq!(method, Method::GET);
    let (path, query) = (uri.path().to_owned(), uri.query().unwrap_or_default().to_owned());
    let asked = Asked { cdn, path: path.clone(), query: query.clone(), headers: headers.clone() };
    place.asked.lock().expect("unpoisoned").push(asked);
    let key = if cdn { format!("cdn:{path}") } else { path.clone() };
    let fault = place.faults.lock().expect("unpoisoned").get_mut(&key).and_then(VecDeque::pop_front);
    let fault = fault.or_else(|| place.always.lock().expect("unpoisoned").get(&key).cloned());
    if let Some(Fault::Refused(status, name, value)) = fault {
        return (StatusCode::from_u16(status).expect("a status"), [(name, value)], refusal(value)).into_response();
    }
    if path == "/api/models/org/tiny/revision/main" {
        return hub_listing(&place).into_response();
    }
    if path == "/models/" {
        return bucket_listing(&place, &query).into_response();
    }
    let Some((name, bytes)) = place.files.iter().find(|(name, _)| path.ends_with(&format!("/{name}"))) else {
        return StatusCode::NOT_FOUND.into_response();
    };
    if name.starts_with("model") && path.contains("/resolve/") && !cdn {
        let location = format!("http://{}{path}?signature=x", place.cdn);
        return (StatusCode::FOUND, [(header::LOCATION, location)]).into_response();
    }
    file(bytes, &headers, fault)
}

/// What S3 says in the body, and a hub in a header.
fn refusal(code: &str) -> String {
    format!("<?xml version=\"1.0\"?><Error><Code>{code}</Code><Message>no</Message></Error>")
}

fn file(bytes: &Bytes, headers: &HeaderMap, fault: Option<Fault>) -> Response {
    let range = headers.get(header::RANGE).map(|range| range.to_str().expect("text").to_owned());
    let from = range.as_deref().and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok());
    let from = if matches!(fault, Some(Fault::NoRanges)) { None } else { from };
    let mut body = bytes.slice(from.unwrap_or(0)..);
    let length = body.len();
    let body = match fault {
        Some(Fault::Cut(after)) => {
            let piece = futures_util::stream::iter([Ok(body.slice(..after))]);
            let break_off = futures_util::stream::once(async {
                // Until what came before is on its way.
                tokio::task::yield_now().await;
                Err(std::io::Error::other("broken"))
            });
            Body::from_stream(piece.chain(break_off))
        }
        Some(Fault::Hangs(after)) => {
            let piece = futures_util::stream::iter([Ok::<_, std::io::Error>(body.slice(..after))]);
            Body::from_stream(piece.chain(futures_util::stream::pending()))
        }
        Some(Fault::Damaged) => {
            let mut damaged = body.to_vec();
            *damaged.last_mut().expect("a byte") ^= 1;
            body = damaged.into();
            Body::from(body)
        }
        Some(Fault::NoRanges | Fault::Refused(..)) | None => Body::from(body),
    };
    let mut response = Response::builder().header(header::CONTENT_LENGTH, length);
    if let Some(from) = from {
        let range = format!("bytes {from}-{}/{}", bytes.len() - 1, bytes.len());
        response = response.status(StatusCode::PARTIAL_CONTENT).header(header::CONTENT_RANGE, range);
    }
    response.body(body).expect("a response")
}

fn hub_listing(place: &Place) -> String {
    let sibling = |(name, bytes): (&String, &Bytes)| {
        let size = place.sizes.get(name).copied().unwrap_or(bytes.len() as u64);
        let mut sibling = json!({"rfilename": name, "size": size});
        if name.starts_with("model") && name.ends_with(".safetensors") {
            sibling["lfs"] = json!({"sha256": sha256(bytes), "size": size, "pointerSize": 135});
        }
        sibling
    };
    let siblings: Vec<_> = place.files.iter().map(sibling).collect();
    json!({"id": "org/tiny", "sha": COMMIT, "private": false, "siblings": siblings}).to_string()
}

/// One object a page, so that there are several.
fn bucket_listing(place: &Place, query: &str) -> String {
    assert!(query.contains("prefix=a%2Ftiny%2F") && query.contains("delimiter=%2F"), "{query}");
    let page: usize = query
        .split('&')
        .find_map(|pair| pair.strip_prefix("continuation-token="))
        .map_or(0, |token| token.parse().expect("a token of ours"));
    let (name, bytes) = place.files.iter().nth(page).expect("a page");
    let is_truncated = page + 1 < place.files.len();
    let next = if is_truncated {
        format!("<NextContinuationToken>{}</NextContinuationToken>", page + 1)
    } else {
        String::new()
    };
    format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\
         <ListBucketResult xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\"><Name>models</Name><Prefix>a/tiny/</Prefix>\
         <KeyCount>1</KeyCount><MaxKeys>1000</MaxKeys><EncodingType>url</EncodingType><IsTruncated>{is_truncated}</IsTruncated>\
         <Contents><Key>a/tiny/{name}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>&quot;{}&quot;</ETag>\
         <Size>{}</Size><StorageClass>STANDARD</StorageClass></Contents>{next}</ListBucketResult>",
        md5(bytes),
        bytes.len()
    )
}

fn sha256(bytes: &[u8]) -> String {
    use sha2::Digest;
    hex(&sha2::Sha256::digest(bytes))
}

fn md5(bytes: &[u8]) -> String {
    use md5::Digest;
    hex(&md5::Md5::digest(bytes))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A model in one file, with what a repository has besides.
fn tiny() -> Vec<(&'static str, &'static [u8])> {
    static WEIGHTS: [u8; 3_000_000] = [7; 3_000_000];
    vec![
        ("README.md", b"read me"),
        ("config.json", b"{\"a\": 1}"),
        ("model.safetensors", &WEIGHTS),
        ("pytorch_model.bin", b"no"),
        ("tokenizer.json", b"{}"),
    ]
}

const WEIGHTS: &str = "model.safetensors";
const WEIGHTS_PATH: &str = "/org/tiny/resolve/0123456789abcdef0123456789abcdef01234567/model.safetensors";

fn is_whole(dir: &Path) {
    for (name, bytes) in tiny() {
        let is_wanted = !["README.md", "pytorch_model.bin"].contains(&name);
        assert_eq!(std::fs::read(dir.join(name)).ok().as_deref(), is_wanted.then_some(bytes), "{name}");
    }
}

/// The whole chain of causes.
fn text(error: FetchError) -> String {
    format!("{:#}", anyhow::Error::from(error))
}

#[tokio::test]
async fn a_model_comes_from_a_hub_whole_and_is_not_asked_for_again() {
    let (dir, server) = (tempfile::tempdir().expect("a directory"), Server::start(&tiny(), |_| ()).await);
    let to = dir.path().join("cache/tiny");
    run(server.hub(&to)).await.expect("all goes well");
    is_whole(&to);
    let asked = server.asked(WEIGHTS);
    assert_eq!(asked.iter().map(|asked| asked.cdn).collect::<Vec<_>>(), [false, true]);
    assert_eq!(asked[0].header("authorization"), "Bearer hf_x");
    assert_eq!(asked[1].header("authorization"), "", "a token is for the hub alone");
    assert_eq!(asked[1].query, "signature=x");

    let config = server.hub(&to);
    drop(server);
    run(config).await.expect("what is there needs no server");
}

#[tokio::test]
async fn a_broken_connection_goes_on_where_it_was() {
    let (dir, server) = (tempfile::tempdir().expect("a directory"), Server::start(&tiny(), |_| ()).await);
    let cdn = format!("cdn:{WEIGHTS_PATH}");
    // Each of more breaks than are forgiven in a row is forgiven, since bytes come in between.
    server.fault(&cdn, (0..12).map(|_| Fault::Cut(10_000)));
    run(server.hub(dir.path())).await.expect("it comes in pieces");
    is_whole(dir.path());
    let ranges: Vec<String> =
        server.asked(WEIGHTS).iter().filter(|asked| asked.cdn).map(|asked| asked.header("range").to_owned()).collect();
    let expected = (0..=12).map(|cut| if cut == 0 { String::new() } else { format!("bytes={}-", cut * 10_000) });
    assert_eq!(ranges, expected.collect::<Vec<_>>());
}

#[tokio::test]
async fn a_server_without_ranges_is_asked_for_all_of_it() {
    let (dir, server) = (tempfile::tempdir().expect("a directory"), Server::start(&tiny(), |_| ()).await);
    server.fault(&format!("cdn:{WEIGHTS_PATH}"), [Fault::Cut(10_000), Fault::NoRanges]);
    run(server.hub(dir.path())).await.expect("it begins anew");
    is_whole(dir.path());
}

#[tokio::test]
async fn a_download_that_was_killed_goes_on_and_tells_how_far_it_is() {
    let (dir, server) = (tempfile::tempdir().expect("a directory"), Server::start(&tiny(), |_| ()).await);
    server.fault(&format!("cdn:{WEIGHTS_PATH}"), [Fault::Hangs(2_500_000)]);
    let mut config = server.hub(dir.path());
    let admin = listener().await.local_addr().expect("bound");
    config.admin_listen = Some(admin);
    let running = tokio::spawn(run(config));
    let client = Client(admin.to_string());
    until("the other files are there and this one is not", async || {
        let Some(progress) = client.progress().await else { return false };
        let Progress { phase, bytes_done, bytes_total, files_done, files_total, .. } = progress;
        (phase, bytes_done, bytes_total, files_done, files_total) == (Phase::Downloading, 2_500_010, 3_000_010, 2, 3)
    })
    .await;
    running.abort();
    assert!(running.await.expect_err("killed").is_cancelled());
    assert!(!dir.path().join(WEIGHTS).exists(), "what is not whole has no name");

    run(server.hub(dir.path())).await.expect("it goes on");
    is_whole(dir.path());
    let asked = server.asked(WEIGHTS);
    assert!(asked.last().expect("asked").header("range").starts_with("bytes="), "{asked:?}");
    assert_eq!(server.asked("config.json").len(), 1, "what was whole is not asked for again");
}

/// Asks a download how far it is.
struct Client(String);

impl Client {
    async fn progress(&self) -> Option<Progress> {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let mut stream = tokio::net::TcpStream::connect(&self.0).await.ok()?;
        stream.write_all(b"GET /progress HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.ok()?;
        let (head, body) = answer.split_once("\r\n\r\n")?;
        assert!(head.starts_with("HTTP/1.1 200"), "{answer}");
        Some(serde_json::from_str(body).expect("progress"))
    }
}

#[tokio::test]
async fn damage_is_found_and_healed_but_not_for_ever() {
    let (dir, server) = (tempfile::tempdir().expect("a directory"), Server::start(&tiny(), |_| ()).await);
    let cdn = format!("cdn:{WEIGHTS_PATH}");
    server.fault(&cdn, [Fault::Damaged]);
    run(server.hub(dir.path())).await.expect("the second time it is right");
    is_whole(dir.path());

    let dir = tempfile::tempdir().expect("a directory");
    server.always(&cdn, Fault::Damaged);
    let error = text(run(server.hub(dir.path())).await.expect_err("it is always wrong"));
    assert!(error.contains("model.safetensors of hf://org/tiny") && error.contains("its digest is another"), "{error}");
    assert!(!dir.path().join(WEIGHTS).exists());
}

#[tokio::test]
async fn another_size_than_listed_is_no_model() {
    let change = |place: &mut Place| {
        let _ = place.sizes.insert("tokenizer.json".to_owned(), 9);
    };
    let (dir, server) = (tempfile::tempdir().expect("a directory"), Server::start(&tiny(), change).await);
    let error = text(run(server.hub(dir.path())).await.expect_err("2 bytes are not 9"));
    assert!(error.contains("tokenizer.json") && error.contains("2 bytes and is listed with 9"), "{error}");
}

#[tokio::test]
async fn what_passes_is_waited_for() {
    let (dir, server) = (tempfile::tempdir().expect("a directory"), Server::start(&tiny(), |_| ()).await);
    let busy = Fault::Refused(429, "retry-after", "0");
    let down = Fault::Refused(503, "x-other", "1");
    server.fault("/api/models/org/tiny/revision/main", [busy.clone(), down.clone()]);
    server.fault(WEIGHTS_PATH, [down.clone(), busy]);
    // A link that is too old, which the hub renews.
    server.fault(&format!("cdn:{WEIGHTS_PATH}"), [Fault::Refused(403, "x-other", "1")]);
    run(server.hub(dir.path())).await.expect("patience");
    is_whole(dir.path());

    let dir = tempfile::tempdir().expect("a directory");
    server.always(WEIGHTS_PATH, down);
    let error = text(run(server.hub(dir.path())).await.expect_err("down for good"));
    assert!(
        error.contains("8 failures in a row") && error.contains("503") && error.contains("goes on from here"),
        "{error}"
    );
}

#[tokio::test]
async fn a_hubs_no_says_what_helps() {
    let dir = tempfile::tempdir().expect("a directory");
    for (fault, expect) in [
        (Fault::Refused(401, "x-other", "1"), "put a valid one under key HF_TOKEN"),
        (Fault::Refused(403, "x-error-code", "GatedRepo"), "accept the model's terms at http://"),
        (Fault::Refused(404, "x-error-code", "RevisionNotFound"), "no revision \"main\": check spec.model.revision"),
        (Fault::Refused(404, "x-error-code", "RepoNotFound"), "check spec.model.uri"),
        (Fault::Refused(400, "x-other", "1"), "spec.model.endpoint"),
    ] {
        let server = Server::start(&tiny(), |_| ()).await;
        server.always("/api/models/org/tiny/revision/main", fault.clone());
        let error = text(run(server.hub(dir.path())).await.expect_err("no"));
        assert!(error.contains(expect) && error.contains("hf://org/tiny"), "{fault:?}: {error}");
        assert!(!error.contains("hf_x"), "{error}");
        assert_eq!(server.place.asked.lock().expect("unpoisoned").len(), 1, "a no is a no");
    }
}

#[tokio::test]
async fn nothing_is_written_for_a_repository_that_is_no_model() {
    for (files, expect) in [
        (&[("config.json", &b"{}"[..]), ("pytorch_model.bin", b"x")][..], "pytorch_model.bin and no *.safetensors"),
        (
            &[("config.json", b"{}"), ("model.safetensors", b"x"), ("../../x", b"x")],
            "lead out of the model's directory",
        ),
    ] {
        let (dir, server) = (tempfile::tempdir().expect("a directory"), Server::start(files, |_| ()).await);
        let error = text(run(server.hub(dir.path())).await.expect_err("no model"));
        assert!(error.contains(expect), "{error}");
        assert!(!dir.path().join("config.json").exists());
    }
}

#[tokio::test]
async fn a_volume_that_is_too_small_is_named_before_anything_is_downloaded() {
    let change = |place: &mut Place| {
        let _ = place.sizes.insert(WEIGHTS.to_owned(), 1 << 60);
    };
    let (dir, server) = (tempfile::tempdir().expect("a directory"), Server::start(&tiny(), change).await);
    let error = text(run(server.hub(dir.path())).await.expect_err("an exbibyte"));
    assert!(error.contains(&dir.path().display().to_string()) && error.contains("more are needed"), "{error}");
    assert!(server.asked(WEIGHTS).is_empty());
}

#[tokio::test]
async fn shards_are_those_that_the_index_names() {
    let index = br#"{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}"#;
    let files: [(&str, &[u8]); 5] = [
        ("config.json", b"{}"),
        ("consolidated.safetensors", b"another order"),
        ("model-1.safetensors", b"one"),
        ("model-2.safetensors", b"two"),
        ("model.safetensors.index.json", index),
    ];
    let (dir, server) = (tempfile::tempdir().expect("a directory"), Server::start(&files, |_| ()).await);
    run(server.hub(dir.path())).await.expect("all goes well");
    assert_eq!(std::fs::read(dir.path().join("model-2.safetensors")).expect("a shard"), b"two");
    assert!(!dir.path().join("consolidated.safetensors").exists());
    run(server.hub(dir.path())).await.expect("it is there");
}

#[tokio::test]
async fn of_two_at_once_one_downloads_and_the_other_waits_for_it() {
    let (dir, server) = (tempfile::tempdir().expect("a directory"), Server::start(&tiny(), |_| ()).await);
    server.fault(&format!("cdn:{WEIGHTS_PATH}"), [Fault::Hangs(5)]);
    let first = tokio::spawn(run(server.hub(dir.path())));
    until("the first downloads", async || server.asked(WEIGHTS).len() == 2).await;
    let mut config = server.hub(dir.path());
    let admin = listener().await.local_addr().expect("bound");
    config.admin_listen = Some(admin);
    let second = tokio::spawn(run(config));
    let client = Client(admin.to_string());
    until("the second waits", async || {
        client.progress().await.is_some_and(|progress| progress.phase == Phase::Waiting)
    })
    .await;
    // Its holder's end, however it comes, is the lock's.
    first.abort();
    second.await.expect("no panic").expect("it takes over");
    is_whole(dir.path());

    let dir = tempfile::tempdir().expect("a directory");
    let both = tokio::join!(run(server.hub(dir.path())), run(server.hub(dir.path())));
    assert!(both.0.is_ok() && both.1.is_ok(), "{both:?}");
    assert_eq!(server.asked("config.json").len(), 2, "once for each directory");
}

#[tokio::test]
async fn a_directory_with_another_model_is_left_alone() {
    let (dir, server) = (tempfile::tempdir().expect("a directory"), Server::start(&tiny(), |_| ()).await);
    run(server.hub(dir.path())).await.expect("all goes well");
    let error = text(run(server.bucket(dir.path())).await.expect_err("it is taken"));
    assert!(error.contains("holds hf://org/tiny"), "{error}");
    is_whole(dir.path());
}

#[tokio::test]
async fn a_model_comes_from_a_bucket_page_by_page_with_signed_questions() {
    let (dir, server) = (tempfile::tempdir().expect("a directory"), Server::start(&tiny(), |_| ()).await);
    server.fault("/models/a/tiny/model.safetensors", [Fault::Cut(1000), Fault::Damaged]);
    run(server.bucket(dir.path())).await.expect("all goes well");
    is_whole(dir.path());
    let asked = server.asked(WEIGHTS);
    assert_eq!(asked.iter().map(|asked| asked.header("range")).collect::<Vec<_>>(), ["", "bytes=1000-", ""]);
    for asked in &asked {
        for part in ["X-Amz-Signature=", "X-Amz-Security-Token=session", "X-Amz-Credential=id%2F", "eu-1"] {
            assert!(asked.query.contains(part), "{part} in {}", asked.query);
        }
        assert_eq!(asked.header("if-match"), format!("\"{}\"", md5(&server.place.files[WEIGHTS])));
        assert!(!asked.query.contains("secret"), "{}", asked.query);
    }
    let config = server.bucket(dir.path());
    drop(server);
    run(config).await.expect("what is there needs no server");
}

#[tokio::test]
async fn a_buckets_no_says_what_helps() {
    let dir = tempfile::tempdir().expect("a directory");
    for (fault, expect) in [
        (Fault::Refused(403, "x-other", "InvalidAccessKeyId"), "check key AWS_ACCESS_KEY_ID"),
        (Fault::Refused(403, "x-other", "SignatureDoesNotMatch"), "check key AWS_SECRET_ACCESS_KEY"),
        (Fault::Refused(400, "x-other", "ExpiredToken"), "AWS_SESSION_TOKEN"),
        (Fault::Refused(403, "x-other", "AccessDenied"), "s3:ListBucket"),
        (Fault::Refused(404, "x-other", "NoSuchBucket"), "there is no such bucket"),
        (Fault::Refused(301, "x-amz-bucket-region", "eu-2"), "set spec.model.region to eu-2"),
    ] {
        let server = Server::start(&tiny(), |_| ()).await;
        server.always("/models/", fault.clone());
        let error = text(run(server.bucket(dir.path())).await.expect_err("no"));
        assert!(error.contains(expect) && error.contains("s3://models/a/tiny"), "{fault:?}: {error}");
        assert!(!error.contains("X-Amz"), "a signature is no part of an error: {error}");
    }
    let server = Server::start(&tiny(), |_| ()).await;
    server.always("/models/", Fault::Refused(403, "x-other", "AccessDenied"));
    let public = config(&format!("--uri s3://models/a/tiny --endpoint http://{}", server.address), dir.path(), &[]);
    let error = text(run(public).await.expect_err("no"));
    assert!(error.contains("name a Secret with keys AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"), "{error}");
}

#[tokio::test]
async fn a_server_that_is_not_there_is_named_in_the_end() {
    let dir = tempfile::tempdir().expect("a directory");
    let address = listener().await.local_addr().expect("bound");
    let error = run(config(&format!("--uri hf://org/tiny --endpoint http://{address}"), dir.path(), &[])).await;
    let error = text(error.expect_err("nobody listens"));
    assert!(error.contains("the listing of hf://org/tiny") && error.contains("refused"), "{error}");
}
