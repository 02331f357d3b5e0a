//! A proxy before the API server that logs every request and breaks the ones it is told to break.
//!
//! It passes credentials through and has none of its own, so the API server sees whoever speaks. It listens on plain HTTP at
//! loopback: what is tested is what happens to requests, and TLS is spoken on the other side of it.

mod fault;
mod http;
mod request;

pub use fault::{Effect, Meant, Side, WatchFault};
pub use request::{ApiRequest, Verb};

use anyhow::{Context, Result};
use fault::{Fault, Held, Hold};
use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::broadcast;

/// A request and what came of it.
#[derive(Clone, Debug)]
pub struct Exchange {
    /// When it came, since the proxy's start.
    pub at: Duration,
    /// The request.
    pub request: ApiRequest,
    /// The answer's code; none while it is open, or when there was no answer.
    pub code: Option<u16>,
    /// The message of an answer that is an error.
    pub message: String,
    /// Whether the answer, or that there was none, is the proxy's doing.
    pub is_injected: bool,
}

impl std::fmt::Display for Exchange {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:8.3} {} -> ", self.at.as_secs_f64(), self.request)?;
        match self.code {
            Some(code) => write!(f, "{code}")?,
            None => f.write_str("no answer")?,
        }
        if self.is_injected {
            f.write_str(" (injected)")?;
        }
        if self.message.is_empty() { Ok(()) } else { write!(f, " {}", self.message) }
    }
}

/// A place in a proxy's log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mark(usize);

struct State {
    log: Vec<Exchange>,
    faults: Vec<Fault>,
    hold: Option<Hold>,
    /// Whether answers to lists are kept in `lists` for [`Effect::StaleList`].
    remembers_lists: bool,
    lists: HashMap<String, http::Remembered>,
}

struct Shared {
    state: Mutex<State>,
    watches: broadcast::Sender<WatchFault>,
    started: Instant,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // A test that failed while it held the lock has said so already.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Logs a request and decides what becomes of it.
    fn arrived(&self, request: ApiRequest) -> (usize, Option<Effect>, Held) {
        let at = self.started.elapsed();
        let mut state = self.state();
        let effect = state.faults.iter_mut().find_map(|fault| fault.hits(&request));
        let held = state.hold.as_mut().map_or(Held::No, |hold| hold.count(&request));
        state.log.push(Exchange { at, request, code: None, message: String::new(), is_injected: false });
        (state.log.len() - 1, effect, held)
    }

    fn answered(&self, number: usize, code: Option<u16>, message: String, is_injected: bool) {
        let mut state = self.state();
        let exchange = &mut state.log[number];
        (exchange.code, exchange.message, exchange.is_injected) = (code, message, is_injected);
    }

    /// The write that is to be held after it has reached the API server has done so.
    fn holds(&self, number: usize) {
        let mut state = self.state();
        let request = state.log[number].request.clone();
        if let Some(hold) = &mut state.hold {
            hold.held = Some(request);
        }
    }
}

/// The proxy. It ends, and breaks its connections, when this is dropped.
pub struct FaultProxy {
    shared: Arc<Shared>,
    address: SocketAddr,
    // Dropped without waiting for its tasks: held requests never end.
    runtime: Option<tokio::runtime::Runtime>,
}

impl Drop for FaultProxy {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl FaultProxy {
    /// Starts one before the API server of this configuration, whose credentials are left out.
    ///
    /// # Errors
    /// When it can't listen, or the configuration's certificates are not usable.
    pub fn start(upstream: &kube::Config) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("api-faults")
            .enable_all()
            .build()
            .context("runtime of the fault proxy")?;
        let (watches, _) = broadcast::channel(16);
        let state =
            State { log: Vec::new(), faults: Vec::new(), hold: None, remembers_lists: false, lists: HashMap::new() };
        let shared = Arc::new(Shared { state: Mutex::new(state), watches, started: Instant::now() });
        let address = runtime.block_on(http::serve(shared.clone(), upstream))?;
        Ok(FaultProxy { shared, address, runtime: Some(runtime) })
    }

    /// Where clients find it.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The end of the log.
    pub fn mark(&self) -> Mark {
        Mark(self.shared.state().log.len())
    }

    /// What was logged from a mark on.
    pub fn since(&self, mark: Mark) -> Vec<Exchange> {
        self.shared.state().log[mark.0..].to_vec()
    }

    /// How many requests were logged from a mark on.
    pub fn count_since(&self, mark: Mark) -> usize {
        self.shared.state().log.len() - mark.0
    }

    /// All that was logged.
    pub fn log(&self) -> Vec<Exchange> {
        self.since(Mark(0))
    }

    /// Writes from a mark on, without those of leases.
    pub fn writes_since(&self, mark: Mark) -> Vec<Exchange> {
        self.since(mark).into_iter().filter(|one| one.request.is_write() && !one.request.is_lease()).collect()
    }

    /// Requests from a mark on, counted by verb and resource.
    pub fn totals_since(&self, mark: Mark) -> BTreeMap<String, usize> {
        let mut totals = BTreeMap::new();
        for one in self.since(mark) {
            let resource = one.request.resource_and_subresource();
            *totals.entry(format!("{} {resource}", one.request.verb.as_str())).or_default() += 1;
        }
        totals
    }

    /// Breaks one in `one_in` of the requests that are meant, until [`FaultProxy::heal`].
    pub fn inject(&self, effect: Effect, one_in: u32, meant: impl Fn(&ApiRequest) -> bool + Send + 'static) {
        let fault = Fault { meant: Box::new(meant), effect, one_in: one_in.max(1), seen: 0 };
        self.shared.state().faults.push(fault);
    }

    /// Ends every injected fault and hold. What is held stays held.
    pub fn heal(&self) {
        let mut state = self.shared.state();
        state.faults.clear();
        state.hold = None;
    }

    /// Does something to every watch that is open now.
    pub fn break_watches(&self, fault: WatchFault) {
        // Nobody listens where no watch is open.
        let _ = self.shared.watches.send(fault);
    }

    /// Keeps the answers to lists from now on for [`Effect::StaleList`], the newest of each; or keeps what there is.
    pub fn remember_lists(&self, on: bool) {
        self.shared.state().remembers_lists = on;
    }

    /// Holds the write with this number, counted from 1 and from now, on one side of the API server, and all after it. What is
    /// held is never let go: whoever sent it is to be killed.
    pub fn hold_write(&self, number: usize, side: Side) {
        self.shared.state().hold = Some(Hold { number, side, seen: 0, held: None });
    }

    /// The write that is held now.
    pub fn held(&self) -> Option<ApiRequest> {
        self.shared.state().hold.as_ref().and_then(|hold| hold.held.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http as client;
    use std::io::{BufRead as _, BufReader, Read as _, Write as _};
    use std::net::TcpListener;
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// Stands where the API server does: counts requests, numbers its answers, and keeps watches open.
    struct Upstream {
        url: String,
        served: Arc<AtomicUsize>,
    }

    fn upstream() -> Upstream {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let url = format!("http://{}", listener.local_addr().expect("it listens"));
        let served = Arc::new(AtomicUsize::new(0));
        let count = served.clone();
        std::thread::spawn(move || {
            for mut stream in listener.incoming().map_while(Result::ok) {
                let count = count.clone();
                std::thread::spawn(move || {
                    let mut reader = BufReader::new(stream.try_clone().expect("a socket"));
                    loop {
                        let (mut first, mut line, mut length) = (String::new(), String::new(), 0);
                        if reader.read_line(&mut first).unwrap_or(0) == 0 {
                            return;
                        }
                        while reader.read_line(&mut line).unwrap_or(0) > 2 {
                            if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                                length = value.trim().parse().expect("a length");
                            }
                            line.clear();
                        }
                        reader.read_exact(&mut vec![0; length]).expect("the body that was announced");
                        let number = count.fetch_add(1, Ordering::SeqCst) + 1;
                        let answer = if first.contains("watch=true") {
                            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n6\r\nevent\n\r\n".to_owned()
                        } else {
                            format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{number}", number.to_string().len())
                        };
                        if stream.write_all(answer.as_bytes()).is_err() {
                            return;
                        }
                    }
                });
            }
        });
        Upstream { url, served }
    }

    fn proxy(upstream: &Upstream) -> FaultProxy {
        FaultProxy::start(&kube::Config::new(upstream.url.parse().expect("a URL"))).expect("a proxy")
    }

    fn ask(proxy: &FaultProxy, method: &str, path: &str) -> Result<(u16, String)> {
        let body = if method == "GET" { "" } else { "{}" };
        let answer = client::send(method, &proxy.address.to_string(), path, &[], body)?;
        Ok((answer.status, answer.text()?))
    }

    const PODS: &str = "/api/v1/namespaces/a/pods";
    const POD: &str = "/api/v1/namespaces/a/pods/p";

    #[test]
    fn requests_go_through_and_are_logged_with_their_codes() -> Result<()> {
        let upstream = upstream();
        let proxy = proxy(&upstream);
        let mark = proxy.mark();
        assert_eq!(ask(&proxy, "GET", PODS)?, (200, "1".to_owned()));
        assert_eq!(ask(&proxy, "PATCH", POD)?, (200, "2".to_owned()));
        let said: Vec<_> = proxy.since(mark).iter().map(|one| (one.request.to_string(), one.code)).collect();
        assert_eq!(said, [("list pods a/".to_owned(), Some(200)), ("patch pods a/p".to_owned(), Some(200))]);
        assert_eq!(proxy.writes_since(mark).len(), 1);
        Ok(())
    }

    #[test]
    fn an_injected_answer_hits_what_is_meant_and_one_in_so_many_until_healed() -> Result<()> {
        let upstream = upstream();
        let proxy = proxy(&upstream);
        proxy.inject(Effect::Answer(503), 2, |request| request.is_write());
        let codes = |count: usize| -> Result<Vec<u16>> {
            (0..count).map(|_| ask(&proxy, "PATCH", POD).map(|(code, _)| code)).collect()
        };
        assert_eq!(codes(4)?, [503, 200, 503, 200]);
        assert_eq!(ask(&proxy, "GET", PODS)?.0, 200);
        assert_eq!(upstream.served.load(Ordering::SeqCst), 3);
        proxy.heal();
        assert_eq!(codes(2)?, [200, 200]);
        Ok(())
    }

    #[test]
    fn what_is_dropped_after_was_acted_on_and_what_is_dropped_before_was_not() -> Result<()> {
        let upstream = upstream();
        let proxy = proxy(&upstream);
        proxy.inject(Effect::Drop, 1, |_| true);
        assert!(ask(&proxy, "PATCH", POD).is_err());
        assert_eq!(upstream.served.load(Ordering::SeqCst), 0);
        proxy.heal();
        proxy.inject(Effect::DropAfter, 1, |_| true);
        assert!(ask(&proxy, "PATCH", POD).is_err());
        assert_eq!(upstream.served.load(Ordering::SeqCst), 1);
        proxy.heal();
        proxy.inject(Effect::AnswerAfter(500), 1, |_| true);
        assert_eq!(ask(&proxy, "PATCH", POD)?.0, 500);
        assert_eq!(upstream.served.load(Ordering::SeqCst), 2);
        Ok(())
    }

    /// Sends a request of which no answer comes, and hangs up once `done` says so.
    fn send_and_hang_up(proxy: &FaultProxy, done: impl Fn() -> bool) {
        let mut stream = std::net::TcpStream::connect(proxy.address).expect("the proxy listens");
        write!(stream, "PATCH {POD} HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{{}}").expect("a request");
        wait(done);
    }

    fn wait(mut done: impl FnMut() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !done() {
            assert!(Instant::now() < deadline, "waited in vain");
            std::thread::park_timeout(Duration::from_millis(5));
        }
    }

    #[test]
    fn the_write_of_that_number_is_held_on_that_side_and_those_after_it_go_nowhere() -> Result<()> {
        for (side, acted_on) in [(Side::Before, 1), (Side::After, 2)] {
            let upstream = upstream();
            let proxy = proxy(&upstream);
            proxy.hold_write(2, side);
            assert_eq!(ask(&proxy, "PATCH", POD)?.0, 200);
            assert_eq!(proxy.held(), None);
            send_and_hang_up(&proxy, || proxy.held().is_some());
            let mark = proxy.mark();
            send_and_hang_up(&proxy, || proxy.count_since(mark) == 1);
            assert_eq!(upstream.served.load(Ordering::SeqCst), acted_on, "{side:?}");
            proxy.heal();
            assert_eq!(ask(&proxy, "PATCH", POD)?.0, 200);
            assert_eq!(upstream.served.load(Ordering::SeqCst), acted_on + 1, "{side:?}");
        }
        Ok(())
    }

    #[test]
    fn a_stale_list_is_an_older_answer_to_the_same_list() -> Result<()> {
        let upstream = upstream();
        let proxy = proxy(&upstream);
        let list = format!("{PODS}?labelSelector=a&resourceVersion=7");
        proxy.remember_lists(true);
        assert_eq!(ask(&proxy, "GET", &list)?.1, "1");
        proxy.remember_lists(false);
        assert_eq!(ask(&proxy, "GET", &list)?.1, "2");
        proxy.inject(Effect::StaleList, 1, |_| true);
        assert_eq!(ask(&proxy, "GET", &format!("{PODS}?labelSelector=a&resourceVersion=9"))?.1, "1");
        assert_eq!(ask(&proxy, "GET", &format!("{PODS}?labelSelector=b"))?.1, "3");
        Ok(())
    }

    #[test]
    fn open_watches_break_as_they_are_told() -> Result<()> {
        let upstream = upstream();
        let proxy = proxy(&upstream);
        for (fault, rest) in [(WatchFault::Cut, None), (WatchFault::End, Some("")), (WatchFault::Expire, Some("410"))] {
            let mut watch = client::get(&proxy.address.to_string(), &format!("{PODS}?watch=true"))?;
            assert_eq!(watch.chunk()?.as_deref(), Some(b"event\n".as_slice()));
            proxy.break_watches(fault);
            match (watch.text(), rest) {
                (Err(_), None) => {}
                (Ok(text), Some(rest)) => assert!(text.contains(rest), "{fault:?}: {text}"),
                (text, _) => panic!("{fault:?}: {text:?}"),
            }
        }
        Ok(())
    }
}
