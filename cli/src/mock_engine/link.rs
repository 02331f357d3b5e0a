//! The side channel's two ends: connections to other mocks, kept and shared by all calls, and the answers to theirs.

use super::engine::Engine;
use super::holds::NotHeld;
use super::peer::{self, Call, Word};
use super::rooms::Side;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::Instant;

/// Calls that may wait for a connection. A mock serves thousands of requests at once at most, and each has one call.
const CALLS_MAX: usize = 8192;

/// How long to wait when no connection can be accepted, before it is tried again.
const ACCEPT_PAUSE: std::time::Duration = std::time::Duration::from_millis(100);

/// Connections to other mocks, one each.
#[derive(Debug, Default)]
pub(crate) struct Links {
    links: Mutex<HashMap<String, mpsc::Sender<Outgoing>>>,
    number: AtomicU64,
}

#[derive(Debug)]
struct Outgoing {
    number: u64,
    call: Call,
    /// Absent where no answer is waited for.
    answer: Option<oneshot::Sender<Word>>,
}

impl Links {
    /// Calls a mock and waits for its answer. A join that is dropped leaves its rooms.
    pub(crate) async fn call(&self, address: &str, call: Call) -> Word {
        let is_join = matches!(call, Call::Join { .. });
        let number = self.number.fetch_add(1, Ordering::Relaxed);
        let (answer, answered) = oneshot::channel();
        let link = self.link(address);
        if link.send(Outgoing { number, call, answer: Some(answer) }).await.is_err() {
            return Word::Unreachable;
        }
        let mut leave = Leave { link, number, armed: is_join };
        let word = answered.await.unwrap_or(Word::Unreachable);
        leave.armed = false;
        word
    }

    /// Tells a mock something. Where it can't be told, nobody waits: that its holds then end with their leases is what would
    /// happen to engines as well.
    pub(crate) fn tell(&self, address: &str, call: Call) {
        let number = self.number.fetch_add(1, Ordering::Relaxed);
        let _ = self.link(address).try_send(Outgoing { number, call, answer: None });
    }

    /// The connection to a mock; a new one where there is none, or the last has ended.
    fn link(&self, address: &str) -> mpsc::Sender<Outgoing> {
        let mut links = self.lock();
        if let Some(link) = links.get(address).filter(|link| !link.is_closed()) {
            return link.clone();
        }
        let (sender, calls) = mpsc::channel(CALLS_MAX);
        tokio::spawn(dial(address.to_owned(), calls));
        links.insert(address.to_owned(), sender.clone());
        sender
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, mpsc::Sender<Outgoing>>> {
        self.links.lock().expect("no code that holds the links panics")
    }
}

/// Leaves the rooms of a join whose answer is no longer waited for.
struct Leave {
    link: mpsc::Sender<Outgoing>,
    number: u64,
    armed: bool,
}

impl Drop for Leave {
    fn drop(&mut self) {
        if self.armed {
            let _ = self.link.try_send(Outgoing { number: self.number, call: Call::Leave, answer: None });
        }
    }
}

/// Serves one connection's calls until it breaks. Those that wait then have no answer, as their senders are dropped.
async fn dial(address: String, mut calls: mpsc::Receiver<Outgoing>) {
    let Ok(stream) = TcpStream::connect(&address).await else { return };
    // Or each call would wait for the acknowledgement of the one before.
    let _ = stream.set_nodelay(true);
    let (read, mut write) = stream.into_split();
    let mut lines = BufReader::new(read).lines();
    let mut waiting: HashMap<u64, oneshot::Sender<Word>> = HashMap::new();
    let mut out = String::new();
    loop {
        tokio::select! {
            call = calls.recv() => {
                let Some(first) = call else { return };
                let mut next = Some(first);
                while let Some(Outgoing { number, call, answer }) = next {
                    out.push_str(&format!("{number} {call}\n"));
                    waiting.extend(answer.map(|answer| (number, answer)));
                    next = calls.try_recv().ok();
                }
                if write.write_all(out.as_bytes()).await.is_err() {
                    return;
                }
                out.clear();
            }
            line = lines.next_line() => {
                let Ok(Some(line)) = line else { return };
                let Ok((number, word)) = peer::answer(&line) else { return };
                // The call may have been dropped meanwhile.
                if let Some(answer) = waiting.remove(&number) {
                    let _ = answer.send(word);
                }
            }
        }
    }
}

/// Answers other mocks until the process ends.
pub(crate) async fn serve(listener: TcpListener, engine: Arc<Engine>) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                tokio::spawn(answer_all(stream, Arc::clone(&engine)));
            }
            Err(_) => tokio::time::sleep(ACCEPT_PAUSE).await,
        }
    }
}

/// Answers one mock's calls. When it is gone, so are its legs from our rooms.
async fn answer_all(stream: TcpStream, engine: Arc<Engine>) {
    let _ = stream.set_nodelay(true);
    let (read, mut write) = stream.into_split();
    let mut lines = BufReader::new(read).lines();
    let mut joins: JoinSet<()> = JoinSet::new();
    let mut joined: HashMap<u64, AbortHandle> = HashMap::new();
    let (sender, mut ready) = mpsc::channel::<(u64, Word)>(64);
    loop {
        let (number, word) = tokio::select! {
            line = lines.next_line() => {
                let Ok(Some(line)) = line else { return };
                let Ok((number, rest)) = peer::numbered(&line) else { return };
                match rest.parse() {
                    Ok(Call::Join { seed, rooms, rank }) => {
                        let (engine, sender) = (Arc::clone(&engine), sender.clone());
                        let join = async move {
                            let word = join(&engine, seed, &rooms, rank).await;
                            // A connection that is gone wants no answer.
                            let _ = sender.send((number, word)).await;
                        };
                        joined.insert(number, joins.spawn(join));
                        continue;
                    }
                    Ok(Call::Leave) => {
                        if let Some(join) = joined.remove(&number) {
                            join.abort();
                        }
                        continue;
                    }
                    Ok(call) => (number, at_once(&engine, &call)),
                    Err(_) => return,
                }
            }
            Some((number, word)) = ready.recv() => {
                joined.remove(&number);
                (number, word)
            }
            // Without this branch ended joins would pile up.
            Some(_) = joins.join_next() => continue,
        };
        if write.write_all(format!("{number} {}\n", word.as_str()).as_bytes()).await.is_err() {
            return;
        }
    }
}

async fn join(engine: &Engine, seed: super::tokens::Seed, rooms: &[super::rooms::Room], rank: Option<u32>) -> Word {
    let mut places = Vec::with_capacity(rooms.len());
    for room in rooms {
        match engine.rooms.enter_seeking(*room, Side::Decode, seed, rank) {
            Ok(place) => places.push(place),
            Err(_) => return Word::Duplicate,
        }
    }
    for place in &mut places {
        place.done().await;
    }
    Word::Ok
}

fn at_once(engine: &Engine, call: &Call) -> Word {
    let now = Instant::now();
    let (asked, handle) = match call {
        Call::Pull { engine, handle, .. } | Call::Release { engine, handle } | Call::Renew { engine, handle } => {
            (engine, handle)
        }
        Call::Join { .. } | Call::Leave => return Word::Unknown,
    };
    let number = handle.rsplit_once('-').and_then(|(_, number)| number.parse::<u64>().ok());
    let number = number.filter(|_| *asked == engine.id());
    let not_held = |reason| match reason {
        NotHeld::Unknown => Word::Unknown,
        NotHeld::Freed => Word::Freed,
    };
    match (call, number) {
        (Call::Pull { request_id, .. }, number) => {
            let pulled = number.ok_or(NotHeld::Unknown).and_then(|number| engine.holds().pull(now, number));
            let word = match pulled {
                Ok(prefill_id) if prefill_id.is_some() && prefill_id != *request_id => Word::OkOtherId,
                Ok(_) => Word::Ok,
                Err(reason) => not_held(reason),
            };
            count_pull(engine, word);
            word
        }
        (Call::Release { .. }, Some(number)) => {
            engine.holds().release(now, number);
            Word::Ok
        }
        (Call::Renew { .. }, Some(number)) => engine.holds().renew(now, number).map_or_else(not_held, |()| Word::Ok),
        (Call::Release { .. } | Call::Renew { .. } | Call::Join { .. } | Call::Leave, _) => Word::Unknown,
    }
}

/// Counts a pull, at either end.
pub(crate) fn count_pull(engine: &Engine, word: Word) {
    let mut ledger = engine.ledger();
    match word {
        Word::Ok | Word::OkOtherId => ledger.pulls.ok += 1,
        Word::Unknown | Word::Duplicate => ledger.pulls.unknown += 1,
        Word::Freed => ledger.pulls.freed += 1,
        Word::Unreachable => ledger.pulls.unreachable += 1,
    }
}
