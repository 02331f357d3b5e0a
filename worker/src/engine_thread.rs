//! The engine's own thread: commands in between steps, events out after each.
//!
//! It never waits for anyone but its own queue: an event that a request's channel can't hold, or that nobody receives, is not
//! waited for; the KV of a prefill is handed to its export layer by layer from inside the step. Async code talks to it through
//! [`EngineHandle`]; what the events mean to a client is not known here.

use crate::kv_events::{KvEvents, Recorder};
use crate::metrics::Metrics;
use crate::transfer::commit::{Commit, first_token};
use crate::transfer::producer::Export;
use baton_engine::engine::{Engine, EngineError, Event, ExportProgress, Load, StepHook};
use baton_engine::prefix_hash::BlockHash;
use baton_engine::request::{Request, RequestId, SubmitError};
use baton_engine::runner::Runner;
use baton_engine::sampling::SampledToken;
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot, watch};

/// Commands that wait for the end of a step. Senders wait when it is full, so this only decides how often they do: a request
/// sends a handful, and a step admits at most `--max-num-seqs` requests.
const COMMANDS_MAX: usize = 1024;

/// How long a look at the prefix cache may take: a few steps of a small model. It stands between a client and its first token, so a
/// busy engine is not waited for.
const PEEK_TIMEOUT: Duration = Duration::from_millis(5);

/// An event of one of the prompts of an HTTP request.
pub type PromptEvent = (usize, Event);

/// Events of one prompt besides its tokens: ImportReady, PrefillDone, Failed.
pub const EVENTS_BESIDE_TOKENS: usize = 3;

/// Where a prompt's events go.
#[derive(Clone, Debug)]
pub struct Events {
    /// Has room for every event that the request can cause, so that sending never waits.
    pub sender: mpsc::Sender<PromptEvent>,
    /// Which prompt of the HTTP request.
    pub prompt: usize,
}

enum Command {
    Submit(Box<Submit>),
    CommitImport {
        id: RequestId,
        first: Vec<SampledToken>,
        cached_tokens: usize,
        reply: oneshot::Sender<bool>,
    },
    FailImport(RequestId),
    StopChoice(RequestId, u32),
    Release(RequestId),
    /// Cached tokens of a prompt with these block hashes, for each of several.
    Peek {
        prompts: Vec<Vec<BlockHash>>,
        reply: oneshot::Sender<Vec<usize>>,
    },
    /// All that the prefix cache holds, and the number of the first event that is not in it.
    CachedBlocks {
        reply: oneshot::Sender<(Vec<BlockHash>, u64)>,
    },
}

struct Submit {
    request: Request,
    events: Events,
    export: Option<Arc<Export>>,
    reply: oneshot::Sender<Result<(), SubmitError>>,
}

/// The engine is gone; the process is about to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the engine has stopped")]
pub struct EngineStopped;

/// Why a request did not get into the engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EntryError {
    /// It refused.
    #[error(transparent)]
    Refused(#[from] SubmitError),
    /// It is gone.
    #[error(transparent)]
    Stopped(#[from] EngineStopped),
}

/// How the thread ended.
#[derive(Debug, thiserror::Error)]
pub enum EngineEnd {
    /// The device is lost.
    #[error("the engine's device is lost")]
    Device(#[source] EngineError),
    /// A bug; the panic's message is in the log.
    #[error("the engine's thread panicked")]
    Panicked,
}

/// Talks to the engine's thread. The thread ends when the last handle, and the last request, is dropped.
#[derive(Clone, Debug)]
pub struct EngineHandle {
    commands: mpsc::Sender<Command>,
    next_id: Arc<AtomicU64>,
    load: watch::Receiver<Load>,
    kv_events: KvEvents,
}

/// A request in the engine. Dropping it ends it there, whatever its state, and frees its blocks.
#[derive(Debug)]
pub struct Submitted {
    id: RequestId,
    commands: mpsc::Sender<Command>,
}

/// Starts the thread. The receiver hears how it ended, unless that was because nobody needed it any more.
pub fn start<R: Runner + 'static>(
    mut engine: Engine<R>,
    layers: usize,
    metrics: Arc<Metrics>,
) -> std::io::Result<(EngineHandle, oneshot::Receiver<Result<(), EngineEnd>>)> {
    let (commands, inbox) = mpsc::channel(COMMANDS_MAX);
    let (load_sender, load) = watch::channel(engine.load());
    let (ended, end) = oneshot::channel();
    engine.record_cache_changes();
    let (recorder, kv_events) = KvEvents::new();
    let driver = Driver {
        engine,
        layers,
        inbox,
        load: load_sender,
        metrics,
        open: HashMap::new(),
        queued: VecDeque::new(),
        exports: Exports::default(),
        recorder,
    };
    std::thread::Builder::new().name("engine".to_owned()).spawn(move || {
        let end = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| driver.drive()));
        // Nobody listens any more when the whole worker is gone.
        let _ = ended.send(end.unwrap_or(Err(EngineEnd::Panicked)));
    })?;
    Ok((EngineHandle { commands, next_id: Arc::default(), load, kv_events }, end))
}

impl EngineHandle {
    /// What the engine has to do.
    pub fn load(&self) -> Load {
        *self.load.borrow()
    }

    /// Tokens of the leading full blocks of each prompt, given by its block hashes, that the prefix cache holds now. Looks and holds
    /// nothing. The answer comes in between steps and behind the commands before it; `None` where that takes longer than
    /// [`PEEK_TIMEOUT`].
    pub async fn cached_tokens(&self, prompts: Vec<Vec<BlockHash>>) -> Option<Vec<usize>> {
        let (reply, answer) = oneshot::channel();
        let asked = async {
            self.commands.send(Command::Peek { prompts, reply }).await.ok()?;
            answer.await.ok()
        };
        tokio::time::timeout(PEEK_TIMEOUT, asked).await.ok().flatten()
    }

    /// The changes of the prefix cache.
    pub fn kv_events(&self) -> &KvEvents {
        &self.kv_events
    }

    /// The names of all blocks that the prefix cache holds, as they are in between two steps, and the number of the first event that
    /// happened later.
    ///
    /// # Errors
    /// When the engine is gone.
    pub async fn cached_blocks(&self) -> Result<(Vec<BlockHash>, u64), EngineStopped> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(Command::CachedBlocks { reply }).await.map_err(|_| EngineStopped)?;
        answer.await.map_err(|_| EngineStopped)
    }

    /// Submits a request under an id of its own; `request.id` is overwritten. `export` gets the KV of a prefill.
    ///
    /// # Errors
    /// When the engine refuses it or is gone.
    pub async fn submit(
        &self,
        mut request: Request,
        events: Events,
        export: Option<Arc<Export>>,
    ) -> Result<Submitted, EntryError> {
        request.id = RequestId(self.next_id.fetch_add(1, Ordering::Relaxed));
        // Made before the command is sent: whoever drops this future in between still ends the request.
        let submitted = Submitted { id: request.id, commands: self.commands.clone() };
        let (reply, outcome) = oneshot::channel();
        submitted.send(Command::Submit(Box::new(Submit { request, events, export, reply }))).await?;
        outcome.await.map_err(|_| EngineStopped)??;
        Ok(submitted)
    }
}

impl Submitted {
    /// Starts generation of an import whose KV is in its blocks. `false` when what came with the KV doesn't fit the request, which
    /// then still waits.
    ///
    /// # Errors
    /// When the engine is gone.
    pub async fn commit_import(&self, first: Vec<SampledToken>, cached_tokens: usize) -> Result<bool, EngineStopped> {
        let (reply, outcome) = oneshot::channel();
        self.send(Command::CommitImport { id: self.id, first, cached_tokens, reply }).await?;
        outcome.await.map_err(|_| EngineStopped)
    }

    /// Gives up on an import's KV: the prompt is computed here.
    ///
    /// # Errors
    /// When the engine is gone.
    pub async fn fail_import(&self) -> Result<(), EngineStopped> {
        self.send(Command::FailImport(self.id)).await
    }

    /// Ends one choice; the others go on.
    ///
    /// # Errors
    /// When the engine is gone.
    pub async fn stop_choice(&self, choice: u32) -> Result<(), EngineStopped> {
        self.send(Command::StopChoice(self.id, choice)).await
    }

    async fn send(&self, command: Command) -> Result<(), EngineStopped> {
        self.commands.send(command).await.map_err(|_| EngineStopped)
    }
}

impl Drop for Submitted {
    fn drop(&mut self) {
        match self.commands.try_send(Command::Release(self.id)) {
            Ok(()) | Err(mpsc::error::TrySendError::Closed(_)) => {}
            Err(mpsc::error::TrySendError::Full(command)) => {
                // A release must not get lost, and a drop can't wait. Outside of a runtime the process is ending.
                let commands = self.commands.clone();
                if let Ok(runtime) = tokio::runtime::Handle::try_current() {
                    runtime.spawn(async move { commands.send(command).await });
                }
            }
        }
    }
}

/// What the thread owns.
struct Driver<R: Runner> {
    engine: Engine<R>,
    layers: usize,
    inbox: mpsc::Receiver<Command>,
    load: watch::Sender<Load>,
    metrics: Arc<Metrics>,
    /// From submission to release.
    open: HashMap<RequestId, Events>,
    /// Those that no step has computed yet, in the order of their submission, which is that of admission.
    queued: VecDeque<(RequestId, Instant)>,
    exports: Exports,
    recorder: Recorder,
}

/// Exports of the prefills in the engine; told from inside a step.
#[derive(Default)]
struct Exports(HashMap<RequestId, Arc<Export>>);

impl StepHook for Exports {
    fn layer_done(&mut self, layer: usize, exports: &[ExportProgress<'_>]) {
        for progress in exports {
            if let Some(export) = self.0.get(&progress.id) {
                export.progress(layer, progress.blocks, progress.tokens);
            }
        }
    }
}

impl<R: Runner> Driver<R> {
    fn drive(mut self) -> Result<(), EngineEnd> {
        loop {
            if !self.engine.has_work() {
                self.publish();
                match self.inbox.blocking_recv() {
                    Some(command) => self.obey(command),
                    None => return Ok(()),
                }
            }
            while let Ok(command) = self.inbox.try_recv() {
                self.obey(command);
            }
            if self.engine.has_work() {
                let events = self.engine.step(&mut self.exports).map_err(EngineEnd::Device)?;
                // Published first, so that whoever hears of a token finds the load that it is a part of.
                self.publish();
                events.into_iter().for_each(|event| self.tell(event));
                self.observe_queue();
            }
        }
    }

    fn observe_queue(&mut self) {
        while let Some(&(id, since)) = self.queued.front() {
            if !self.engine.is_admitted(id) {
                break;
            }
            self.queued.pop_front();
            // Who hung up in the queue has not left it in the way that is measured.
            if self.open.contains_key(&id) {
                self.metrics.queued(since.elapsed());
            }
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Submit(submit) => {
                let Submit { request, events, export, reply } = *submit;
                let id = request.id;
                let outcome = self.engine.submit(request);
                if outcome.is_ok() {
                    self.open.insert(id, events);
                    self.queued.push_back((id, Instant::now()));
                    self.exports.0.extend(export.map(|export| (id, export)));
                }
                // Whoever hung up meanwhile has dropped its `Submitted`: the release is in the queue.
                let _ = reply.send(outcome);
            }
            Command::CommitImport { id, first, cached_tokens, reply } => {
                let outcome = self.engine.commit_import(id, first, cached_tokens);
                // As above.
                let _ = reply.send(outcome.is_ok());
                match outcome {
                    Ok(events) => events.into_iter().for_each(|event| self.tell(event)),
                    Err(error) => tracing::warn!("an import's commit is refused: {error}"),
                }
            }
            Command::FailImport(id) => {
                if let Err(error) = self.engine.fail_import(id) {
                    tracing::warn!("an import can't be given up: {error}");
                }
            }
            Command::StopChoice(id, choice) => self.engine.stop_choice(id, choice),
            Command::Peek { prompts, reply } => {
                if !reply.is_closed() {
                    // Whoever has given up a moment ago has no use for it.
                    let _ = reply.send(prompts.iter().map(|hashes| self.engine.cached_tokens(hashes)).collect());
                }
            }
            Command::CachedBlocks { reply } => {
                // Commands before this one may have changed something since the last step.
                self.recorder.record(self.engine.take_cache_changes());
                if !reply.is_closed() {
                    let _ = reply.send((self.engine.cached_hashes(), self.recorder.next()));
                }
            }
            Command::Release(id) => {
                self.engine.release(id);
                self.open.remove(&id);
                self.exports.0.remove(&id);
            }
        }
    }

    /// Passes an event on. It never waits.
    fn tell(&mut self, event: Event) {
        match event {
            Event::Computed { id, blocks, tokens } => {
                if let Some(export) = self.exports.0.get(&id) {
                    (0..self.layers).for_each(|layer| export.progress(layer, &blocks, tokens));
                }
            }
            Event::PrefillDone { id, cached_tokens, ref first } => {
                let commit = commit(cached_tokens, first);
                // Told before the commit leaves, so that whoever hears of the acknowledgement has heard of this.
                self.send(id, event);
                if let Some(export) = self.exports.0.get(&id) {
                    export.commit(commit);
                }
            }
            Event::Failed { id, ref error } => {
                tracing::error!(request = id.0, "{error}");
                self.send(id, event);
            }
            Event::ImportReady { id, .. } | Event::Token { id, .. } => self.send(id, event),
        }
    }

    fn send(&mut self, id: RequestId, event: Event) {
        let Some(events) = self.open.get(&id) else { return };
        match events.sender.try_send((events.prompt, event)) {
            // A closed channel is a client that hung up: its release is on the way.
            Ok(()) | Err(mpsc::error::TrySendError::Closed(_)) => {}
            Err(mpsc::error::TrySendError::Full(_)) => {
                tracing::error!(request = id.0, "more events than the request can have: it is aborted");
                self.engine.abort(id);
                self.open.remove(&id);
            }
        }
    }

    fn publish(&mut self) {
        self.recorder.record(self.engine.take_cache_changes());
        let load = self.engine.load();
        self.load.send_if_modified(|published| std::mem::replace(published, load) != load);
        self.metrics.engine(&load, &self.engine.counters());
    }
}

/// What the decode worker needs besides KV to go on without a forward pass of its own.
fn commit(cached_tokens: usize, first: &[SampledToken]) -> Commit {
    Commit { cached_tokens, choices: first.iter().map(first_token).collect() }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use baton_engine::batch::Batch;
    use baton_engine::engine::{EngineConfig, FAILED_STEPS_MAX};
    use baton_engine::kv_pool::{HeapPool, KvDtype, KvLayout};
    use baton_engine::prefix_hash;
    use baton_engine::request::RequestKind;
    use baton_engine::runner::{LayerHook, RunError};
    use baton_engine::sampling::{SampleRow, SamplingParams};
    use baton_wire::Role;

    /// What stands in for a model: does this in each step.
    #[derive(Clone, Copy)]
    enum Device {
        Counts,
        Fails,
        Panics,
    }

    impl Runner for Device {
        fn run(
            &mut self,
            _batch: &Batch,
            rows: &[SampleRow<'_>],
            _hook: &mut dyn LayerHook,
        ) -> Result<Vec<SampledToken>, RunError> {
            match self {
                Device::Counts => Ok(rows.iter().map(|row| token(row.generated.len() as u32)).collect()),
                Device::Fails => Err(RunError("it is broken".to_owned())),
                Device::Panics => panic!("as this test wants"),
            }
        }
    }

    /// A device whose steps last until the test lets them end.
    pub(crate) struct Gate {
        pub(crate) entered: std::sync::mpsc::Sender<()>,
        pub(crate) wait: std::sync::mpsc::Receiver<()>,
    }

    impl Runner for Gate {
        fn run(
            &mut self,
            _batch: &Batch,
            rows: &[SampleRow<'_>],
            _hook: &mut dyn LayerHook,
        ) -> Result<Vec<SampledToken>, RunError> {
            // A test that has ended waits for no step.
            let _ = self.entered.send(());
            let _ = self.wait.recv();
            Ok(rows.iter().map(|_| token(0)).collect())
        }
    }

    fn token(id: u32) -> SampledToken {
        SampledToken { id, logprob: None, top_logprobs: Vec::new(), logits_hash: None }
    }

    fn started<R: Runner + 'static>(device: R) -> (EngineHandle, oneshot::Receiver<Result<(), EngineEnd>>) {
        let layout = KvLayout { layers: 1, kv_heads: 1, head_dim: 2, dtype: KvDtype::F32, num_blocks: 8 };
        let config = EngineConfig { num_blocks: 8, ..EngineConfig::default() };
        let engine = Engine::new(device, Arc::new(HeapPool::new(layout)), config, 128).expect("fitting limits");
        start(engine, layout.layers, Arc::new(Metrics::new(Role::Decode, "r", "m"))).expect("a thread")
    }

    fn request(max_tokens: usize, kind: RequestKind) -> Request {
        Request {
            id: RequestId(0),
            prompt: vec![1, 2, 3],
            sampling: SamplingParams::default(),
            choices: 1,
            seed: 0,
            max_tokens,
            stop_tokens: Vec::new(),
            salt: 0,
            kind,
            resumed: Vec::new(),
        }
    }

    fn events(room: usize) -> (Events, mpsc::Receiver<PromptEvent>) {
        let (sender, receiver) = mpsc::channel(room);
        (Events { sender, prompt: 0 }, receiver)
    }

    #[tokio::test]
    async fn a_request_gets_its_tokens_in_order_and_blocks_come_back_when_it_is_dropped() {
        let (engine, _end) = started(Device::Counts);
        let (sink, mut told) = events(5);
        let submitted = engine.submit(request(5, RequestKind::Generate), sink, None).await.expect("taken");
        for expected in 0..5 {
            let (_, event) = told.recv().await.expect("an event");
            let Event::Token { token, finish, .. } = event else { panic!("{event:?}") };
            assert_eq!((token.id, finish.is_some()), (expected, expected == 4));
        }
        drop(submitted);
        assert!(told.recv().await.is_none(), "released: nothing more is told");
        let mut load = engine.load.clone();
        load.wait_for(|load| load.blocks_used == 0).await.expect("the engine lives");
    }

    #[tokio::test]
    async fn the_prefix_cache_is_looked_at_but_a_busy_engine_is_not_waited_for() {
        let (engine, _end) = started(Device::Counts);
        let prompt: Vec<u32> = (0..70).collect();
        let hashes = prefix_hash::block_hashes(0, &prompt);
        let other = prefix_hash::block_hashes(1, &prompt);
        let (sink, mut told) = events(4);
        let request = Request { prompt, ..request(1, RequestKind::Generate) };
        let submitted = engine.submit(request, sink, None).await.expect("taken");
        told.recv().await.expect("a token");
        drop(submitted);
        let look = async || loop {
            // A thread of a busy machine may not be scheduled in time.
            if let Some(cached) = engine.cached_tokens(vec![hashes.clone(), other.clone()]).await {
                return cached;
            }
        };
        assert_eq!(look().await, [64, 0]);

        let (entered, is_busy) = std::sync::mpsc::channel();
        let (go, wait) = std::sync::mpsc::channel::<()>();
        let (engine, _end) = started(Gate { entered, wait });
        let (sink, mut told) = events(4);
        let _submitted = engine.submit(self::request(1, RequestKind::Generate), sink, None).await.expect("taken");
        is_busy.recv().expect("the step begins");
        assert_eq!(engine.cached_tokens(vec![hashes.clone()]).await, None);
        drop(go);
        told.recv().await.expect("the step ends, and the look that nobody waits for harms nothing");
    }

    #[tokio::test]
    async fn an_import_waits_for_its_commit_and_refuses_one_that_does_not_fit() {
        let (engine, _end) = started(Device::Counts);
        let (sink, mut told) = events(8);
        let submitted = engine.submit(request(2, RequestKind::Import), sink, None).await.expect("taken");
        assert!(matches!(told.recv().await, Some((0, Event::ImportReady { .. }))));
        assert_eq!(submitted.commit_import(Vec::new(), 0).await, Ok(false), "one choice, no first token");
        assert_eq!(submitted.commit_import(vec![token(9)], 0).await, Ok(true));
        assert!(matches!(told.recv().await, Some((_, Event::Token { token, .. })) if token.id == 9));
        assert!(matches!(told.recv().await, Some((_, Event::Token { token, .. })) if token.id == 1));
    }

    #[tokio::test]
    async fn a_client_that_does_not_listen_stops_nobody_but_itself() {
        let (engine, _end) = started(Device::Counts);
        let (narrow, deaf) = events(1);
        let slow = engine.submit(request(50, RequestKind::Generate), narrow, None).await.expect("taken");
        let (sink, mut told) = events(50);
        let other = engine.submit(request(50, RequestKind::Generate), sink, None).await.expect("taken");
        for _ in 0..50 {
            told.recv().await.expect("every token");
        }
        drop((slow, other, deaf));
    }

    #[tokio::test]
    async fn a_device_that_fails_again_and_again_ends_the_thread() {
        let (engine, end) = started(Device::Fails);
        for _ in 0..FAILED_STEPS_MAX {
            let (sink, mut told) = events(4);
            let _submitted = engine.submit(request(1, RequestKind::Generate), sink, None).await.expect("taken");
            assert!(matches!(told.recv().await, Some((_, Event::Failed { .. }))), "each request is told");
        }
        assert!(matches!(end.await, Ok(Err(EngineEnd::Device(_)))));
        let (sink, _told) = events(4);
        let refused = engine.submit(request(1, RequestKind::Generate), sink, None).await.expect_err("nobody is there");
        assert_eq!(refused, EntryError::Stopped(EngineStopped));
    }

    #[tokio::test]
    async fn a_panic_ends_the_thread_and_its_requests() {
        let (engine, end) = started(Device::Panics);
        let (sink, mut told) = events(4);
        let _submitted = engine.submit(request(1, RequestKind::Generate), sink, None).await.expect("taken");
        assert!(told.recv().await.is_none(), "the channel closes rather than staying silent");
        assert!(matches!(end.await, Ok(Err(EngineEnd::Panicked))));
    }
}
