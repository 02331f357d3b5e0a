//! What an engine tells about a request, in the order in which it happens, and what it does when one is taken away or the device fails.

mod engine_support;

use baton_engine::batch::Batch;
use baton_engine::block_manager::CacheChange;
use baton_engine::engine::{
    ConfigError, Engine, EngineConfig, EngineError, Event, ExportProgress, FAILED_STEPS_MAX, ImportError, StepHook,
};
use baton_engine::kv_pool::{BLOCK_TOKENS, BlockId, KvPool};
use baton_engine::prefix_hash::BlockHash;
use baton_engine::request::{FinishReason, Request, RequestId, RequestKind, SubmitError};
use baton_engine::runner::{LayerHook, RunError, Runner};
use baton_engine::sampling::{SampleRow, SampledToken, SamplingParams};
use engine_support::{FAKE_VOCAB, Failing, FakeModel, FakeRunner, Model, alone, prompt, request};
use proptest::prelude::*;
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

fn engine(config: EngineConfig) -> (Engine<FakeRunner>, Arc<dyn KvPool>) {
    engine_support::engine(&FakeModel, config)
}

fn step(engine: &mut Engine<FakeRunner>) -> Vec<Event> {
    engine.step(&mut ()).expect("the device works")
}

/// A request of `tokens` prompt tokens that are its own.
fn asking(id: u64, tokens: usize, max_tokens: usize) -> Request {
    request(id, prompt(id, tokens, FAKE_VOCAB), max_tokens)
}

fn submit(engine: &mut Engine<FakeRunner>, request: Request) -> RequestId {
    let id = request.id;
    engine.submit(request).expect("the request fits");
    id
}

fn token(id: u32) -> SampledToken {
    SampledToken { id, logprob: None, top_logprobs: Vec::new(), logits_hash: None }
}

/// Tokens told to one choice, and how it ended.
fn told(events: &[Event], of: (RequestId, u32)) -> (Vec<u32>, Option<FinishReason>) {
    let mut told = (Vec::new(), None);
    for event in events {
        if let Event::Token { id, choice, token, finish, .. } = event
            && (*id, *choice) == of
        {
            told.0.push(token.id);
            told.1 = *finish;
        }
    }
    told
}

fn run_to_end(engine: &mut Engine<FakeRunner>) -> Vec<Event> {
    let mut events = Vec::new();
    while engine.has_work() {
        events.extend(step(engine));
    }
    events
}

#[test]
fn a_request_ends_at_its_length() {
    let (mut engine, _) = engine(alone());
    let id = submit(&mut engine, asking(1, 40, 5));
    let (tokens, finish) = told(&run_to_end(&mut engine), (id, 0));
    assert_eq!((tokens.len(), finish), (5, Some(FinishReason::Length)));
    assert_eq!(engine.load().blocks_used, 0);
}

#[test]
fn a_stop_token_is_told_and_ends_its_choice_alone() {
    let (mut engine, _) = engine(alone());
    let all = Request { choices: 2, ..asking(1, 40, 12) };
    submit(&mut engine, all.clone());
    let free = run_to_end(&mut engine);
    let ([(first, _), (second, _)], id) = ([0, 1].map(|choice| told(&free, (RequestId(1), choice))), RequestId(1));
    let stop = *first.iter().find(|token| !second.contains(token)).expect("the choices differ");
    let end = first.iter().position(|&token| token == stop).expect("it is there");

    submit(&mut engine, Request { stop_tokens: vec![stop], ..all });
    let events = run_to_end(&mut engine);
    assert_eq!(told(&events, (id, 0)), (first[..=end].to_vec(), Some(FinishReason::Stop)));
    assert_eq!(told(&events, (id, 1)), (second, Some(FinishReason::Length)));
}

#[test]
fn a_completion_ends_where_the_context_ends() {
    let (mut engine, _) = engine(EngineConfig { num_blocks: 2, ..alone() });
    assert_eq!(engine.max_context(), 64);
    let id = submit(&mut engine, asking(1, 60, 1000));
    let (tokens, finish) = told(&run_to_end(&mut engine), (id, 0));
    assert_eq!((tokens.len(), finish), (4, Some(FinishReason::Length)));
}

#[test]
fn cached_tokens_are_told_once_with_the_first_token() {
    let (mut engine, _) = engine(EngineConfig { prefix_cache: true, ..alone() });
    submit(&mut engine, asking(1, 70, 2));
    run_to_end(&mut engine);
    submit(&mut engine, asking(1, 70, 2));
    let events = run_to_end(&mut engine);
    let cached: Vec<_> = events
        .iter()
        .map(|event| match event {
            Event::Token { cached_tokens, .. } => *cached_tokens,
            other => panic!("unexpected {other:?}"),
        })
        .collect();
    assert_eq!(cached, [Some(64), None]);
    let counters = engine.counters();
    assert_eq!((counters.prefix_query_tokens, counters.prefix_hit_tokens), (140, 64));
    assert_eq!((counters.computed_prompt_tokens, counters.generated_tokens), (76, 4));
    assert_eq!((counters.steps, counters.preemptions, counters.failed_steps), (4, 0, 0));
}

#[test]
fn another_salt_shares_nothing() {
    let (mut engine, _) = engine(EngineConfig { prefix_cache: true, ..alone() });
    submit(&mut engine, asking(1, 70, 1));
    run_to_end(&mut engine);
    submit(&mut engine, Request { salt: 9, ..asking(1, 70, 1) });
    run_to_end(&mut engine);
    assert_eq!(engine.counters().prefix_hit_tokens, 0);
}

#[test]
fn a_prefill_tells_of_each_chunk_and_keeps_its_blocks_until_release() {
    let (mut engine, pool) = engine(EngineConfig { prefill_chunk_tokens: 32, ..alone() });
    let id = submit(&mut engine, Request { kind: RequestKind::Prefill, choices: 2, ..asking(1, 70, 9) });
    let mut computed = Vec::new();
    let mut done = None;
    for event in run_to_end(&mut engine) {
        match event {
            Event::Computed { blocks, tokens, .. } => {
                assert!(done.is_none(), "the last chunk is told before the end");
                assert_eq!(blocks.len(), tokens.div_ceil(BLOCK_TOKENS));
                assert!(blocks.iter().all(|&(block, generation)| pool.generation(block) == generation));
                computed.push(tokens);
            }
            Event::PrefillDone { first, cached_tokens, .. } => done = Some((first.len(), cached_tokens)),
            other => panic!("unexpected {other:?}"),
        }
    }
    assert_eq!((computed, done), (vec![32, 64, 70], Some((2, 0))));
    assert_eq!(engine.load().blocks_used, 3);
    engine.release(id);
    assert_eq!(engine.load().blocks_used, 0);
}

#[test]
fn a_prefills_cached_beginning_can_leave_before_the_rest_is_computed() {
    let (mut engine, _) = engine(EngineConfig { prefix_cache: true, ..alone() });
    submit(&mut engine, asking(1, 70, 1));
    run_to_end(&mut engine);
    submit(&mut engine, Request { kind: RequestKind::Prefill, ..asking(1, 70, 1) });
    let steps = engine.counters().steps;
    let events = step(&mut engine);
    assert!(matches!(events[..], [Event::Computed { tokens: 64, .. }]), "{events:?}");
    assert_eq!(engine.counters().steps, steps, "no forward pass was waited for");
}

#[test]
fn each_layer_of_a_prefill_is_told_while_the_next_is_not_computed() {
    struct Layers {
        pool: Arc<dyn KvPool>,
        seen: Vec<(usize, usize)>,
    }
    impl StepHook for Layers {
        fn layer_done(&mut self, layer: usize, exports: &[ExportProgress<'_>]) {
            let [export] = exports else { panic!("one of the two requests is a prefill: {exports:?}") };
            self.seen.push((layer, export.tokens));
            let mut bytes = vec![0; self.pool.layout().block_bytes()];
            let (block, generation) = export.blocks[0];
            for of_layer in 0..2 {
                self.pool.export(of_layer, block, generation, &mut bytes).expect("it is held");
                let is_written = bytes.iter().any(|&byte| byte != 0);
                assert_eq!(is_written, of_layer <= layer, "layer {of_layer} as layer {layer} completes");
            }
        }
    }
    let (mut engine, pool) = engine(alone());
    submit(&mut engine, asking(1, 20, 9));
    submit(&mut engine, Request { kind: RequestKind::Prefill, ..asking(2, 40, 9) });
    let mut hook = Layers { pool, seen: Vec::new() };
    engine.step(&mut hook).expect("the device works");
    assert_eq!(hook.seen, [(0, 40), (1, 40)]);
}

#[test]
fn an_import_runs_only_once_it_is_committed() {
    let (mut engine, _) = engine(alone());
    let id = submit(&mut engine, Request { kind: RequestKind::Import, choices: 2, ..asking(1, 70, 3) });
    let events = step(&mut engine);
    let [Event::ImportReady { blocks, cached_blocks: 0, .. }] = &events[..] else { panic!("unexpected {events:?}") };
    assert_eq!(blocks.len(), 3);
    assert!(!engine.has_work(), "all depends on the commit");
    assert_eq!(engine.load().waiting, 1);

    let wrong = engine.commit_import(id, vec![token(1)], 0).expect_err("there are two choices");
    assert_eq!(wrong, ImportError::WrongChoiceCount { expected: 2, found: 1 });
    let events = engine.commit_import(id, vec![token(1), token(2)], 32).expect("it is importing");
    let firsts: Vec<_> = events
        .iter()
        .map(|event| match event {
            Event::Token { choice, token, finish: None, cached_tokens: Some(32), .. } => (*choice, token.id),
            other => panic!("unexpected {other:?}"),
        })
        .collect();
    assert_eq!(firsts, [(0, 1), (1, 2)]);
    assert!(engine.has_work());
    let again = engine.commit_import(id, vec![token(1), token(2)], 32).expect_err("it has begun");
    assert_eq!(again, ImportError::NotImporting(id));
    let (tokens, finish) = told(&run_to_end(&mut engine), (id, 1));
    assert_eq!((tokens.len(), finish), (2, Some(FinishReason::Length)), "the first one counts");
}

#[test]
fn first_tokens_that_are_last_end_an_import_at_its_commit() {
    let (mut engine, _) = engine(alone());
    let import = Request { kind: RequestKind::Import, choices: 2, stop_tokens: vec![7], ..asking(1, 70, 3) };
    let id = submit(&mut engine, import);
    step(&mut engine);
    let events = engine.commit_import(id, vec![token(7), token(7)], 0).expect("it is importing");
    assert_eq!(told(&events, (id, 0)), (vec![7], Some(FinishReason::Stop)));
    assert_eq!(told(&events, (id, 1)), (vec![7], Some(FinishReason::Stop)));
    assert!(!engine.has_work());
    assert_eq!(engine.load().blocks_used, 0);
}

#[test]
fn a_committed_prompt_is_found_by_the_next_turn() {
    let (mut engine, _) = engine(EngineConfig { prefix_cache: true, ..alone() });
    let import = Request { kind: RequestKind::Import, ..asking(1, 70, 3) };
    let id = submit(&mut engine, import.clone());
    step(&mut engine);
    engine.commit_import(id, vec![token(1)], 0).expect("it is importing");
    run_to_end(&mut engine);
    submit(&mut engine, import);
    let events = step(&mut engine);
    assert!(matches!(events[..], [Event::ImportReady { cached_blocks: 2, .. }]), "{events:?}");
}

#[test]
fn an_import_can_fail_before_it_has_blocks_and_not_after_its_commit() {
    let (mut engine, _) = engine(EngineConfig { num_blocks: 4, ..alone() });
    let first = submit(&mut engine, Request { kind: RequestKind::Import, ..asking(1, 100, 2) });
    let second = submit(&mut engine, Request { kind: RequestKind::Import, ..asking(2, 100, 2) });
    assert_eq!(step(&mut engine).len(), 1, "there is room for one");
    engine.fail_import(second).expect("it waits");
    engine.commit_import(first, vec![token(1)], 0).expect("it is importing");
    assert_eq!(engine.fail_import(first), Err(ImportError::NotImporting(first)));
    assert_eq!(engine.fail_import(second), Err(ImportError::NotImporting(second)));
    let events = run_to_end(&mut engine);
    assert_eq!(told(&events, (first, 0)).0.len(), 1);
    assert_eq!(told(&events, (second, 0)).0.len(), 2, "it was computed here");
}

#[test]
fn an_import_that_is_given_up_tells_what_it_reused_and_not_what_it_could_have() {
    let (mut engine, _) = engine(EngineConfig { prefix_cache: true, ..alone() });
    submit(&mut engine, asking(1, 64, 1));
    run_to_end(&mut engine);
    let id = submit(&mut engine, Request { kind: RequestKind::Import, ..asking(1, 64, 1) });
    let events = step(&mut engine);
    assert!(matches!(events[..], [Event::ImportReady { cached_blocks: 2, .. }]), "{events:?}");
    engine.fail_import(id).expect("it waits");
    let events = run_to_end(&mut engine);
    assert!(matches!(events[..], [Event::Token { cached_tokens: Some(32), .. }]), "{events:?}");
}

#[test]
fn the_blocks_of_an_aborted_import_refuse_late_writes_once_they_have_a_new_owner() {
    let (mut engine, pool) = engine(EngineConfig { num_blocks: 3, ..alone() });
    let id = submit(&mut engine, Request { kind: RequestKind::Import, ..asking(1, 70, 3) });
    let events = step(&mut engine);
    let [Event::ImportReady { blocks, .. }] = &events[..] else { panic!("unexpected {events:?}") };
    engine.abort(id);
    let expected = run_to_end_of(&mut engine_of(3), 2);
    submit(&mut engine, asking(2, 70, 10));
    let mut tokens = Vec::new();
    while engine.has_work() {
        tokens.extend(told(&step(&mut engine), (RequestId(2), 0)).0);
        for &(block, generation) in blocks {
            let garbage = vec![0xaa; pool.layout().block_bytes()];
            pool.import(0, block, generation, &garbage).expect_err("the block has a new owner");
        }
    }
    assert_eq!(tokens, expected);
}

fn engine_of(num_blocks: usize) -> Engine<FakeRunner> {
    engine(EngineConfig { num_blocks, ..alone() }).0
}

fn run_to_end_of(engine: &mut Engine<FakeRunner>, id: u64) -> Vec<u32> {
    submit(engine, asking(id, 70, 10));
    told(&run_to_end(engine), (RequestId(id), 0)).0
}

#[test]
fn a_stopped_choice_says_no_more_and_the_others_go_on() {
    let (mut engine, _) = engine(alone());
    let id = submit(&mut engine, Request { choices: 3, ..asking(1, 40, 4) });
    engine.stop_choice(id, 2); // Before it exists.
    let mut events = step(&mut engine);
    engine.stop_choice(id, 0);
    engine.stop_choice(id, 9); // Never existed.
    events.extend(run_to_end(&mut engine));
    assert_eq!(told(&events, (id, 0)).0.len(), 1);
    assert_eq!(told(&events, (id, 1)).0.len(), 4);
    assert_eq!(told(&events, (id, 2)).0.len(), 0);
    assert_eq!(engine.load().blocks_used, 0);
}

#[test]
fn each_choice_is_sampled_under_its_own_number_before_and_after_the_split() {
    /// Notes (choice, tokens generated) of each row.
    struct Rows(Arc<Mutex<Vec<(u32, usize)>>>);
    impl Runner for Rows {
        fn run(
            &mut self,
            _batch: &Batch,
            rows: &[SampleRow<'_>],
            _hook: &mut dyn LayerHook,
        ) -> Result<Vec<SampledToken>, RunError> {
            self.0.lock().expect("one thread").extend(rows.iter().map(|row| (row.choice, row.generated.len())));
            Ok(rows.iter().map(|row| token(row.choice)).collect())
        }
    }
    let rows = Arc::new(Mutex::new(Vec::new()));
    let (_, pool) = FakeModel.rig(64);
    let mut engine = Engine::new(Rows(rows.clone()), pool, alone(), 512).expect("the limits fit");
    engine.submit(Request { choices: 3, ..asking(1, 40, 2) }).expect("it fits");
    while engine.has_work() {
        engine.step(&mut ()).expect("the device works");
    }
    assert_eq!(*rows.lock().expect("one thread"), [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1)]);
}

#[test]
fn stopping_every_choice_ends_the_request() {
    let (mut engine, _) = engine(alone());
    let id = submit(&mut engine, Request { choices: 2, ..asking(1, 40, 4) });
    step(&mut engine);
    engine.stop_choice(id, 0);
    engine.stop_choice(id, 1);
    assert!(!engine.has_work());
    assert_eq!(engine.load().blocks_used, 0);
    submit(&mut engine, asking(1, 40, 4)); // The id is free again.
}

#[test]
fn what_cannot_be_served_is_refused_by_name() {
    let (mut engine, _) = engine(EngineConfig { num_blocks: 4, max_waiting: 1, ..alone() });
    let mut refused = |request| engine.submit(request).expect_err("it can't be served");
    assert_eq!(refused(asking(1, 0, 1)), SubmitError::EmptyPrompt);
    assert_eq!(refused(asking(1, 512, 1)), SubmitError::PromptTooLong { tokens: 512, max_model_length: 512 });
    assert_eq!(refused(asking(1, 128, 1)), SubmitError::PromptNeverFits { blocks: 5, blocks_total: 4 });
    assert_eq!(refused(asking(1, 10, 0)), SubmitError::NoTokensWanted);
    for choices in [0, 9] {
        let request = Request { choices, ..asking(1, 10, 1) };
        assert_eq!(refused(request), SubmitError::ChoicesOutOfRange { choices, max: 8 });
    }
    submit(&mut engine, asking(1, 127, 1));
    assert_eq!(engine.submit(asking(1, 10, 1)), Err(SubmitError::DuplicateId(RequestId(1))));
    assert_eq!(engine.submit(asking(2, 10, 1)), Err(SubmitError::QueueFull { waiting: 1 }));
}

#[test]
fn limits_that_contradict_each_other_are_refused_by_name() {
    let check = |config: EngineConfig, expected: ConfigError| {
        let (runner, pool) = FakeModel.rig(16);
        assert_eq!(Engine::new(runner, pool, config, 512).err(), Some(expected));
    };
    let fine = EngineConfig { num_blocks: 16, ..alone() };
    check(EngineConfig { num_blocks: 17, ..fine }, ConfigError::NumBlocks { num_blocks: 17, pool_blocks: 16 });
    check(EngineConfig { max_num_seqs: 0, ..fine }, ConfigError::NoSequences);
    check(EngineConfig { max_batch_tokens: 39, ..fine }, ConfigError::BatchTooSmall { max_batch_tokens: 39, min: 40 });
    check(
        EngineConfig { prefill_chunk_tokens: 33, ..fine },
        ConfigError::ChunkNotWholeBlocks { prefill_chunk_tokens: 33 },
    );
}

#[test]
fn a_failed_step_ends_its_requests_and_no_others() {
    let config = EngineConfig { max_num_seqs: 2, prefix_cache: true, ..alone() };
    let (mut engine, failing) = failing_engine(config);
    let hit = submit(&mut engine, Request { choices: 2, ..asking(1, 40, 4) });
    let spared = submit(&mut engine, asking(2, 40, 4));
    step(&mut engine);
    failing.set(1);
    let events = step(&mut engine);
    assert!(matches!(events[..], [Event::Failed { id, .. }] if id == hit), "both choices fail once: {events:?}");
    assert_eq!(engine.load().blocks_used, 0);
    assert_eq!(told(&run_to_end(&mut engine), (spared, 0)).0.len(), 4);
    assert_eq!(engine.counters().failed_steps, 1);
}

#[test]
fn kv_of_a_failed_step_is_never_found_by_others() {
    let (mut engine, failing) = failing_engine(EngineConfig { prefix_cache: true, ..alone() });
    failing.set(1);
    submit(&mut engine, asking(1, 70, 1));
    step(&mut engine);
    submit(&mut engine, asking(1, 70, 1));
    step(&mut engine);
    assert_eq!(engine.counters().prefix_hit_tokens, 0);
}

#[test]
fn a_device_that_fails_again_and_again_is_lost() {
    let (mut engine, failing) = failing_engine(alone());
    failing.set(FAILED_STEPS_MAX as usize);
    for id in 0..u64::from(FAILED_STEPS_MAX) {
        submit(&mut engine, asking(id, 40, 4));
        let events = step(&mut engine);
        assert!(matches!(events[..], [Event::Failed { .. }]), "{events:?}");
    }
    assert!(engine.has_work(), "the driver is to learn of it");
    let error = engine.step(&mut ()).expect_err("the device is lost");
    assert!(matches!(error, EngineError::DeviceLost { failures: FAILED_STEPS_MAX }));
}

/// An engine, and how many of its next steps fail.
fn failing_engine(config: EngineConfig) -> (Engine<FakeRunner>, Failing) {
    let (runner, pool) = FakeModel.rig(config.num_blocks);
    let failing = runner.fail.clone();
    (Engine::new(runner, pool, config, 512).expect("the limits fit"), failing)
}

/// A command at some step.
#[derive(Clone, Debug)]
enum Command {
    Abort,
    Release,
    Stop(u32),
    Commit,
    Fail,
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever is asked, in any state, in any order, with failures in between: nothing panics, every block comes back, and a request
    /// that was taken away says no more.
    #[test]
    fn any_commands_leave_an_engine_whole(
        requests in engine_support::requests(FAKE_VOCAB, 1..10, 100, 20),
        kinds in prop::collection::vec(prop::sample::select(vec![RequestKind::Generate, RequestKind::Prefill, RequestKind::Import]), 10),
        commands in prop::collection::vec((0usize..40, 0u64..10, prop_oneof![
            Just(Command::Abort), Just(Command::Release), (0u32..3).prop_map(Command::Stop), Just(Command::Commit), Just(Command::Fail),
        ]), 0..40),
        failures in prop::collection::vec(0usize..40, 0..3),
        spare_blocks in 0usize..6,
    ) {
        let num_blocks = engine_support::blocks_of_largest(&requests) + spare_blocks;
        let (mut engine, failing) = failing_engine(EngineConfig { num_blocks, prefix_cache: true, ..alone() });
        for (arriving, &kind) in requests.iter().zip(&kinds) {
            submit(&mut engine, Request { kind, sampling: SamplingParams::default(), ..arriving.request.clone() });
        }
        let mut gone = std::collections::BTreeSet::new();
        for now in 0..60 {
            failing.set(usize::from(failures.contains(&now)));
            for event in if engine.has_work() { engine.step(&mut ()).unwrap_or_default() } else { Vec::new() } {
                let (Event::ImportReady { id, .. } | Event::Computed { id, .. } | Event::PrefillDone { id, .. }
                    | Event::Token { id, .. } | Event::Failed { id, .. }) = event;
                prop_assert!(!gone.contains(&id), "{:?} was taken away", id);
                if matches!(event, Event::Failed { .. }) {
                    gone.insert(id);
                }
            }
            for (_, id, command) in commands.iter().filter(|(when, ..)| *when == now) {
                let id = RequestId(*id);
                let choices = requests.get(id.0 as usize).map_or(1, |arriving| arriving.request.choices);
                match command {
                    Command::Abort => { engine.abort(id); gone.insert(id); }
                    Command::Release => { engine.release(id); gone.insert(id); }
                    Command::Stop(choice) => engine.stop_choice(id, *choice),
                    Command::Commit => { let _ = engine.commit_import(id, vec![token(1); choices as usize], 0); }
                    Command::Fail => { let _ = engine.fail_import(id); }
                }
            }
        }
        (0..requests.len() as u64).for_each(|id| engine.abort(RequestId(id)));
        prop_assert_eq!(engine.load().blocks_used, 0, "all blocks came back");
        prop_assert_eq!((engine.load().running, engine.load().waiting), (0, 0));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_snapshot_and_what_has_changed_since_are_what_the_prefix_cache_holds(
        requests in engine_support::requests(FAKE_VOCAB, 1..7, 150, 40),
        spare_blocks in 0usize..6,
        late_at in 0usize..100,
    ) {
        let num_blocks = engine_support::blocks_of_largest(&requests) + spare_blocks;
        let (mut engine, _) = engine(EngineConfig { num_blocks, prefix_cache: true, ..alone() });
        engine.record_cache_changes();
        let mut early = BTreeSet::new();
        let mut late = None;
        let mut arriving = requests.iter();
        for at in 0.. {
            if let Some(next) = arriving.next() {
                engine.submit(next.request.clone()).expect("it fits");
            }
            step(&mut engine);
            let changes = engine.take_cache_changes();
            for known in [Some(&mut early), late.as_mut()].into_iter().flatten() {
                for change in &changes {
                    match *change {
                        CacheChange::Stored(hash) => prop_assert!(known.insert(hash), "it is stored once"),
                        CacheChange::Removed(hash) => prop_assert!(known.remove(&hash), "it was there"),
                    }
                }
            }
            let held: BTreeSet<BlockHash> = engine.cached_hashes().into_iter().collect();
            prop_assert_eq!(&early, &held);
            prop_assert!(late.as_ref().is_none_or(|late| *late == held));
            if at == late_at {
                late = Some(held);
            }
            if arriving.len() == 0 && !engine.has_work() {
                break;
            }
        }
    }
}

#[test]
fn resumed_choices_compute_their_prompt_once() {
    let (mut engine, _) = engine(EngineConfig { prefix_cache: true, ..alone() });
    let resumed = vec![Some(vec![1, 2, 3]), None, Some(Vec::new()), Some(vec![4])];
    let id = submit(&mut engine, Request { choices: 4, resumed, ..asking(1, 96, 5) });
    let events = run_to_end(&mut engine);
    let lengths = [0, 1, 2, 3].map(|choice| told(&events, (id, choice)).0.len());
    assert_eq!(lengths, [2, 0, 5, 4]);
    // 96 tokens and 3; then the prompt's last block for the choice without tokens, and one token for the last.
    assert_eq!(engine.counters().prefix_hit_tokens, 64 + 96);
    assert_eq!(engine.load().blocks_used, 0);
}

#[test]
fn what_was_generated_elsewhere_must_fit_the_request() {
    let (mut engine, _) = engine(alone());
    let all = Request { choices: 2, ..asking(1, 40, 3) };
    for resumed in
        [vec![Some(vec![1])], vec![None, None], vec![None, Some(vec![1, 2, 3])], vec![Some(Vec::new()), None, None]]
    {
        let wrong = Request { resumed, ..all.clone() };
        assert_eq!(engine.submit(wrong), Err(SubmitError::ResumedMisfit));
    }
    let resumed = vec![Some(vec![1, 2]), None];
    let wrong = Request { kind: RequestKind::Import, resumed: resumed.clone(), ..all.clone() };
    assert_eq!(engine.submit(wrong), Err(SubmitError::ResumedMisfit));
    let long = Request { resumed: vec![Some(vec![1; 480]), None], max_tokens: 500, ..all.clone() };
    assert!(matches!(engine.submit(long), Err(SubmitError::PromptTooLong { tokens: 520, .. })));

    // A choice that is stopped from outside says no more, wherever it began.
    let id = submit(&mut engine, Request { resumed: vec![Some(vec![1]), Some(vec![2])], ..all });
    engine.stop_choice(id, 1);
    let events = run_to_end(&mut engine);
    assert_eq!([0, 1].map(|choice| told(&events, (id, choice)).0.len()), [2, 0]);
    assert_eq!(engine.load().blocks_used, 0);
}

#[test]
fn a_block_id_of_the_engine_is_one_of_the_pool() {
    let (mut engine, pool) = engine(EngineConfig { num_blocks: 3, ..alone() });
    submit(&mut engine, Request { kind: RequestKind::Import, ..asking(1, 90, 3) });
    let events = step(&mut engine);
    let [Event::ImportReady { blocks, .. }] = &events[..] else { panic!("unexpected {events:?}") };
    let mut ids: Vec<_> = blocks.iter().map(|&(block, _)| block).collect();
    ids.sort();
    assert_eq!(ids, [0, 1, 2].map(BlockId));
    assert!(blocks.iter().all(|&(block, generation)| pool.generation(block) == generation && generation > 0));
}
