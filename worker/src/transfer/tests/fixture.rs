//! A producer and a consumer in one process, each with a pool of its own, and prompts whose KV is known bytes.

use crate::transfer::commit::{Commit, FirstToken};
use crate::transfer::consumer::{Consumer, ConsumerConfig, Destination, Fetch, FetchError, Fetched};
use crate::transfer::limits::{Limits, Timing};
use crate::transfer::producer::{Export, ExportSpec, Producer, ProducerConfig};
use baton_engine::kv_pool::{BLOCK_TOKENS, BlockId, HeapPool, KvDtype, KvLayout, KvPool};
use baton_wire::leg::Transfer;
use baton_wire::signing::{self, TransferClaims};
use baton_wire::{Epoch, Fingerprint, PromptHash, TransferId};
use ed25519_dalek::SigningKey;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio_util::sync::{CancellationToken, DropGuard};

/// What every wait in these tests is bounded by. Generous, because it only decides how long a failing test takes.
pub(super) const DEADLINE: Duration = Duration::from_secs(20);

/// What destination blocks hold before anything arrives.
pub(super) const UNTOUCHED: u8 = 0xee;

pub(super) const CONSUMER: Epoch = Epoch([2; 16]);
pub(super) const FINGERPRINT: Fingerprint = Fingerprint([3; 32]);

pub(super) fn key() -> SigningKey {
    SigningKey::from_bytes(&[7; 32])
}

pub(super) fn small() -> KvLayout {
    KvLayout { layers: 2, kv_heads: 2, head_dim: 4, dtype: KvDtype::F16, num_blocks: 64 }
}

/// How a pair differs from the usual one.
#[derive(Clone)]
pub(super) struct Setup {
    pub(super) layout: KvLayout,
    pub(super) producer_timing: Timing,
    pub(super) consumer_timing: Timing,
    pub(super) limits: Limits,
    pub(super) consumer_fingerprint: Fingerprint,
}

impl Default for Setup {
    fn default() -> Self {
        Setup {
            layout: small(),
            producer_timing: Timing::default(),
            consumer_timing: Timing::default(),
            limits: Limits::default(),
            consumer_fingerprint: FINGERPRINT,
        }
    }
}

/// A producer that serves, and a consumer.
pub(super) struct Pair {
    pub(super) layout: KvLayout,
    pub(super) producer: Producer,
    pub(super) consumer: Consumer,
    pub(super) source: Arc<HeapPool>,
    pub(super) sink: Arc<HeapPool>,
    pub(super) address: SocketAddr,
    pub(super) shutdown: CancellationToken,
    next: AtomicU32,
    _end: DropGuard,
}

/// A prompt with blocks on both sides.
#[derive(Clone, Debug)]
pub(super) struct Prompt {
    pub(super) transfer: TransferId,
    pub(super) attempt: u32,
    pub(super) tokens: usize,
    pub(super) cached_blocks: usize,
    pub(super) source_blocks: Vec<(BlockId, u64)>,
    pub(super) sink_blocks: Vec<(BlockId, u64)>,
    pub(super) byte_budget: u64,
}

impl Prompt {
    pub(super) fn hash(&self) -> PromptHash {
        PromptHash::of(&[self.tokens as u32, u32::from(self.transfer.0[0])])
    }

    pub(super) fn spec(&self) -> ExportSpec {
        let (transfer, attempt, prompt_tokens) = (self.transfer, self.attempt, self.tokens);
        ExportSpec { transfer, attempt, prompt_tokens, prompt_hash: self.hash() }
    }

    pub(super) fn claims(&self) -> TransferClaims {
        TransferClaims {
            transfer: self.transfer,
            attempt: self.attempt,
            consumer: CONSUMER,
            fingerprint: FINGERPRINT,
            byte_budget: self.byte_budget,
            expires_unix_ms: u64::MAX,
        }
    }

    pub(super) fn fetch_from(&self, source: SocketAddr) -> Fetch {
        let token = signing::sign(&key(), &self.claims());
        let transfer = Transfer { id: self.transfer, attempt: self.attempt, source: source.to_string(), token };
        Fetch { transfer, prompt_tokens: self.tokens, prompt_hash: self.hash() }
    }

    /// Its destination, there when it is asked for.
    pub(super) fn destination(&self) -> std::future::Ready<Destination> {
        std::future::ready(Destination { blocks: self.sink_blocks.clone(), cached_blocks: self.cached_blocks })
    }

    /// The same prompt once more.
    pub(super) fn attempt(&self, attempt: u32) -> Prompt {
        Prompt { attempt, ..self.clone() }
    }
}

pub(super) fn commit() -> Commit {
    let choice = FirstToken { id: 42, logprob: None, top_logprobs: vec![], logits_hash: Some(7) };
    Commit { cached_tokens: 1, choices: vec![choice] }
}

impl Pair {
    pub(super) async fn start(setup: Setup) -> Pair {
        let source = Arc::new(HeapPool::new(setup.layout));
        let sink = Arc::new(HeapPool::new(setup.layout));
        let config = ProducerConfig {
            epoch: Epoch([1; 16]),
            fingerprint: FINGERPRINT,
            verifying_key: key().verifying_key(),
            timing: setup.producer_timing,
            limits: setup.limits,
        };
        let producer = Producer::new(config, source.clone()).expect("blocks fit frames");
        let config =
            ConsumerConfig { epoch: CONSUMER, fingerprint: setup.consumer_fingerprint, timing: setup.consumer_timing };
        let consumer = Consumer::new(config, sink.clone()).expect("blocks fit frames");
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a loopback port is free");
        let address = listener.local_addr().expect("a bound listener has an address");
        let shutdown = CancellationToken::new();
        let serving = producer.clone();
        let token = shutdown.clone();
        tokio::spawn(async move { serving.serve(listener, token).await });
        let (layout, next) = (setup.layout, AtomicU32::new(0));
        let _end = shutdown.clone().drop_guard();
        Pair { layout, producer, consumer, source, sink, address, shutdown, next, _end }
    }

    /// A prompt whose source blocks hold random-looking bytes and whose destination blocks are untouched.
    pub(super) fn prompt(&self, tokens: usize, cached_blocks: usize) -> Prompt {
        let blocks = tokens.div_ceil(BLOCK_TOKENS);
        let first = self.next.fetch_add(blocks as u32, Ordering::Relaxed);
        // The two sides use different blocks, and neither uses them in order. No pool's size here is a multiple of 3 or 7.
        let block = |i: u32, step: u32| BlockId(((first + i) * step + step / 2) % self.layout.num_blocks as u32);
        let own = |pool: &HeapPool, block: BlockId| (block, pool.begin_generation(block));
        let source_blocks: Vec<_> = (0..blocks as u32).map(|i| own(&self.source, block(i, 7))).collect();
        let sink_blocks: Vec<_> = (0..blocks as u32).map(|i| own(&self.sink, block(i, 3))).collect();
        let mut state = first.wrapping_mul(2_654_435_761) ^ 0x9e37_79b9;
        for layer in 0..self.layout.layers {
            for (&(from, from_generation), &(to, to_generation)) in source_blocks.iter().zip(&sink_blocks) {
                let bytes: Vec<u8> = std::iter::repeat_with(|| {
                    // Xorshift (Marsaglia, 2003).
                    state ^= state << 13;
                    state ^= state >> 17;
                    state ^= state << 5;
                    state as u8
                })
                .take(self.layout.block_bytes())
                .collect();
                self.source.import(layer, from, from_generation, &bytes).expect("just allocated");
                let untouched = vec![UNTOUCHED; self.layout.block_bytes()];
                self.sink.import(layer, to, to_generation, &untouched).expect("just allocated");
            }
        }
        let mut transfer = TransferId([0; 16]);
        transfer.0[..4].copy_from_slice(&(first + 1).to_le_bytes());
        let byte_budget = (blocks * self.layout.block_bytes_all_layers()) as u64;
        Prompt { transfer, attempt: 1, tokens, cached_blocks, source_blocks, sink_blocks, byte_budget }
    }

    pub(super) fn open(&self, prompt: &Prompt) -> Export {
        self.producer.open(prompt.spec()).expect("nothing stands against it")
    }

    pub(super) fn fetch(&self, prompt: &Prompt) -> impl Future<Output = Result<Fetched, FetchError>> + Send + use<> {
        self.consumer.fetch(prompt.fetch_from(self.address), prompt.destination())
    }

    /// Tells the export of everything at once.
    pub(super) fn compute_all(&self, export: &Export, prompt: &Prompt) {
        (0..self.layout.layers).for_each(|layer| export.progress(layer, &prompt.source_blocks, prompt.tokens));
    }

    /// Checks that the destination holds the source's bytes, with zeroes where the last block has no tokens, and that blocks that
    /// were there already were left alone.
    pub(super) fn assert_arrived(&self, prompt: &Prompt) {
        let head_bytes = self.layout.head_bytes();
        for layer in 0..self.layout.layers {
            for index in 0..prompt.source_blocks.len() {
                let found = read(&self.sink, layer, prompt.sink_blocks[index]);
                if index < prompt.cached_blocks {
                    assert!(found.iter().all(|&byte| byte == UNTOUCHED), "block {index} was there already");
                    continue;
                }
                let mut expected = read(&self.source, layer, prompt.source_blocks[index]);
                let tokens = (prompt.tokens - index * BLOCK_TOKENS).min(BLOCK_TOKENS);
                for head in expected.chunks_exact_mut(head_bytes) {
                    head[head_bytes / BLOCK_TOKENS * tokens..].fill(0);
                }
                assert!(found == expected, "block {index} of layer {layer} differs");
            }
        }
    }

    /// All destination bytes of a prompt.
    pub(super) fn arrived(&self, prompt: &Prompt) -> Vec<u8> {
        let layers = 0..self.layout.layers;
        layers.flat_map(|layer| prompt.sink_blocks.iter().flat_map(move |&b| read(&self.sink, layer, b))).collect()
    }

    /// Waits until neither side holds anything of any transfer.
    pub(super) async fn assert_nothing_held(&self) {
        until("exports and subscriptions are gone", || {
            let now = self.producer.stats().now;
            now.exports_open == 0 && now.subscriptions_parked == 0 && self.consumer.stats().fetches_active == 0
        })
        .await;
    }
}

fn read(pool: &HeapPool, layer: usize, (block, generation): (BlockId, u64)) -> Vec<u8> {
    let mut bytes = vec![0; pool.layout().block_bytes()];
    pool.export(layer, block, generation, &mut bytes).expect("the test holds the block");
    bytes
}

/// Waits until something is the case.
pub(super) async fn until(what: &str, condition: impl Fn() -> bool) {
    let waited = tokio::time::timeout(DEADLINE, async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    });
    waited.await.unwrap_or_else(|_| panic!("not the case in time: {what}"));
}

/// Waits for something that must come.
pub(super) async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, future).await.unwrap_or_else(|_| panic!("did not come in time: {what}"))
}

/// Runs an async property case on a runtime of its own.
pub(super) fn run<T>(case: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    runtime.expect("threads and sockets are available").block_on(case)
}
