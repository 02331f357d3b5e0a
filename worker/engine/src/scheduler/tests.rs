//! The scheduler with an engine around it that computes nothing: single facts, then any arrivals, limits and aborts.

use super::*;
use proptest::prelude::*;
use std::collections::BTreeMap;

fn config(num_blocks: usize) -> EngineConfig {
    EngineConfig {
        num_blocks,
        max_batch_tokens: 128,
        max_num_seqs: 4,
        prefill_chunk_tokens: 64,
        prefix_cache: true,
        max_waiting: usize::MAX,
    }
}

/// A prompt that shares nothing with those of other `name`s.
fn prompt(name: u32, tokens: usize) -> Arc<[u32]> {
    (0..tokens as u32).map(|index| name * 10_000 + index).collect()
}

/// A scheduler with an engine around it that computes nothing: each sampled token is a number that was never used before.
struct Simulation {
    scheduler: Scheduler,
    /// Tokens that each request's choices generate before they end.
    lengths: BTreeMap<u64, usize>,
    next_token: u32,
    /// Announced imports.
    importing: Vec<u64>,
    /// Complete prefills.
    held: Vec<u64>,
    finished: BTreeSet<SequenceId>,
}

impl Simulation {
    fn new(config: EngineConfig) -> Self {
        Simulation {
            scheduler: Scheduler::new(config),
            lengths: BTreeMap::new(),
            next_token: 1_000_000_000,
            importing: Vec::new(),
            held: Vec::new(),
            finished: BTreeSet::new(),
        }
    }

    /// Adds a request; returns its arrival.
    fn add(&mut self, prompt: Arc<[u32]>, kind: RequestKind, choices: u32, length: usize) -> u64 {
        let arrival = self.lengths.len() as u64;
        self.lengths.insert(arrival, length);
        self.scheduler.add(arrival, prompt, 0, kind, choices);
        arrival
    }

    fn generate(&mut self, tokens: usize, choices: u32, length: usize) -> u64 {
        self.add(prompt(self.lengths.len() as u32, tokens), RequestKind::Generate, choices, length)
    }

    fn token(&mut self) -> u32 {
        self.next_token += 1;
        self.next_token
    }

    fn step(&mut self) -> Plan {
        let plan = self.scheduler.schedule();
        self.finish(&plan);
        plan
    }

    /// Does what the engine does once a plan has run.
    fn finish(&mut self, plan: &Plan) {
        for id in &plan.announced {
            if self.scheduler.sequences[id].kind == RequestKind::Import {
                self.importing.push(id.arrival);
            }
        }
        for chunk in &plan.chunks {
            self.scheduler.computed(chunk);
            let SequenceId { arrival, choice } = chunk.sequence;
            let sequence = &self.scheduler.sequences[&chunk.sequence];
            let (kind, is_first) = (sequence.kind, sequence.generated().is_empty());
            match (chunk.samples, kind) {
                (0, _) => {}
                (_, RequestKind::Prefill) => {
                    self.scheduler.hold(arrival);
                    self.held.push(arrival);
                }
                (samples, RequestKind::Generate | RequestKind::Import) if is_first => self.split(arrival, samples),
                (_, RequestKind::Generate | RequestKind::Import) => {
                    let token = self.token();
                    self.scheduler.push(chunk.sequence, token);
                    if self.scheduler.sequences[&chunk.sequence].generated().len() == self.lengths[&arrival] {
                        self.scheduler.remove(chunk.sequence);
                        self.finished.insert(SequenceId { arrival, choice });
                    }
                }
            }
        }
    }

    fn split(&mut self, arrival: u64, choices: u32) {
        let all: Vec<_> = (0..choices).map(|choice| (choice, self.token())).collect();
        let going_on = if self.lengths[&arrival] == 1 { &[][..] } else { &all[..] };
        self.scheduler.split(arrival, going_on);
        if going_on.is_empty() {
            self.finished.extend((0..choices).map(|choice| SequenceId { arrival, choice }));
        }
    }

    fn commit(&mut self, arrival: u64, choices: u32) {
        self.importing.retain(|&importing| importing != arrival);
        self.scheduler.import_committed(arrival);
        self.split(arrival, choices);
    }

    /// What must hold between any two calls.
    fn check_blocks(&self) {
        let mut holders: BTreeMap<BlockId, u32> = BTreeMap::new();
        for (id, sequence) in &self.scheduler.sequences {
            sequence.block_table.iter().for_each(|&block| *holders.entry(block).or_default() += 1);
            let room = sequence.block_table.len() * BLOCK_TOKENS;
            assert!(sequence.num_computed <= room.min(sequence.num_tokens()), "{id:?} has KV without a block or token");
        }
        let blocks = &self.scheduler.blocks;
        for block in (0..blocks.num_blocks() as u32).map(BlockId) {
            assert_eq!(blocks.ref_count(block), holders.get(&block).copied().unwrap_or(0), "holders of {block:?}");
        }
        assert_eq!(blocks.num_free() + holders.len(), blocks.num_blocks(), "held and free blocks are all blocks");
    }
}

fn chunks(plan: &Plan) -> Vec<(u64, u32, usize, usize, u32)> {
    let tuple = |chunk: &Chunk| (chunk.sequence.arrival, chunk.sequence.choice, chunk.start, chunk.len, chunk.samples);
    plan.chunks.iter().map(tuple).collect()
}

#[test]
fn decodes_come_first_and_prompts_share_the_rest() {
    let mut simulation = Simulation::new(config(32));
    let first = simulation.generate(10, 1, 5);
    assert_eq!(chunks(&simulation.step()), [(first, 0, 0, 10, 1)]);
    let second = simulation.generate(100, 1, 5);
    let third = simulation.generate(200, 1, 5);
    // 127 tokens are left: a chunk's worth for the second, and 63, cut to whole blocks, for the third.
    assert_eq!(chunks(&simulation.step()), [(first, 0, 10, 1, 1), (second, 0, 0, 64, 0), (third, 0, 0, 32, 0)]);
    assert_eq!(chunks(&simulation.step()), [(first, 0, 11, 1, 1), (second, 0, 64, 36, 1), (third, 0, 32, 64, 0)]);
}

#[test]
fn a_prompt_is_computed_once_for_all_choices_and_its_full_blocks_are_shared() {
    let mut simulation = Simulation::new(config(32));
    let arrival = simulation.generate(40, 3, 5);
    assert_eq!(chunks(&simulation.step()), [(arrival, 0, 0, 40, 3)]);
    assert_eq!(simulation.scheduler.num_running(), 3);
    assert_eq!(simulation.scheduler.blocks.num_free(), 30);

    let plan = simulation.step();
    assert_eq!(plan.chunks.len(), 3);
    // The partly filled block is copied for all but the last to write to it.
    let partly_filled = plan.copies[0].from;
    assert_eq!(plan.copies.len(), 2);
    assert!(plan.copies.iter().all(|copy| copy.from == partly_filled));
    let last = &simulation.scheduler.sequences[&SequenceId { arrival, choice: 2 }];
    assert_eq!(last.block_table[1], partly_filled);
    assert_eq!(simulation.scheduler.blocks.num_free(), 28);
    simulation.check_blocks();
}

#[test]
fn a_prompt_that_ends_with_its_block_needs_no_copy() {
    let mut simulation = Simulation::new(config(32));
    simulation.generate(64, 2, 5);
    simulation.step();
    let plan = simulation.step();
    assert_eq!((plan.copies.len(), plan.fresh.len()), (0, 2));
}

#[test]
fn an_equal_beginning_is_not_computed_again_but_the_last_token_is() {
    let mut simulation = Simulation::new(config(32));
    let shared = prompt(7, 64);
    simulation.add(shared.clone(), RequestKind::Generate, 1, 1);
    simulation.step();
    // The whole prompt is known, and still its last block is computed: its logits are wanted.
    let again = simulation.add(shared.clone(), RequestKind::Generate, 1, 1);
    assert_eq!(chunks(&simulation.step()), [(again, 0, 32, 32, 1)]);
    let longer: Arc<[u32]> = shared.iter().copied().chain([1, 2, 3]).collect();
    let longer = simulation.add(longer, RequestKind::Generate, 1, 1);
    assert_eq!(chunks(&simulation.step()), [(longer, 0, 64, 3, 1)]);
    assert_eq!(simulation.scheduler.totals().prefix_hit_tokens, 32 + 64);
    assert_eq!(simulation.scheduler.totals().prefix_query_tokens, 64 + 64 + 67);
}

#[test]
fn an_import_may_use_a_known_prompt_as_a_whole() {
    let mut simulation = Simulation::new(config(32));
    simulation.add(prompt(7, 64), RequestKind::Generate, 1, 1);
    simulation.step();
    let import = simulation.add(prompt(7, 64), RequestKind::Import, 1, 3);
    assert_eq!(simulation.step().announced, [SequenceId { arrival: import, choice: 0 }]);
    assert_eq!(simulation.scheduler.sequences[&SequenceId { arrival: import, choice: 0 }].num_computed, 64);
}

#[test]
fn generated_tokens_enter_the_prefix_cache_too() {
    let mut simulation = Simulation::new(config(32));
    let first = simulation.generate(20, 1, 40);
    let id = SequenceId { arrival: first, choice: 0 };
    let mut conversation = Vec::new();
    while let Some(sequence) = simulation.scheduler.sequence(id) {
        conversation = (0..sequence.num_tokens()).map(|index| sequence.token(index)).collect();
        simulation.step();
    }
    let next = simulation.add(conversation.into(), RequestKind::Generate, 1, 1);
    assert_eq!(chunks(&simulation.step())[0].2, 32, "the first block is half prompt, half completion, and known");
    assert_eq!(next, 1);
}

#[test]
fn the_youngest_is_preempted_and_computed_again() {
    let mut simulation = Simulation::new(EngineConfig { prefix_cache: false, ..config(4) });
    let old = simulation.generate(32, 1, 64);
    let young = simulation.generate(32, 1, 64);
    let young_id = SequenceId { arrival: young, choice: 0 };
    simulation.step();
    // Both grow to two blocks each; after 32 tokens more the old one needs a third.
    for _ in 0..33 {
        assert_eq!(simulation.scheduler.totals().preemptions, 0);
        simulation.step();
    }
    assert_eq!(simulation.scheduler.totals().preemptions, 1);
    assert!(simulation.scheduler.waiting.contains(&young_id));
    let lost = simulation.scheduler.sequences[&young_id].num_tokens();
    while !simulation.finished.contains(&SequenceId { arrival: old, choice: 0 }) {
        simulation.step();
        simulation.check_blocks();
    }
    let mut plan = simulation.step();
    assert_eq!(chunks(&plan), [(young, 0, 0, 64, 0)], "prompt and completion are computed as one prompt");
    plan = simulation.step();
    assert_eq!(chunks(&plan), [(young, 0, 64, lost - 64, 1)]);
}

#[test]
fn a_prefill_is_never_preempted_and_the_decode_waits_for_its_release() {
    let mut simulation = Simulation::new(config(4));
    let decode = simulation.generate(32, 1, 80);
    simulation.step();
    let prefill = simulation.add(prompt(9, 64), RequestKind::Prefill, 1, 1);
    while simulation.step().chunks.iter().any(|chunk| chunk.sequence.arrival == decode) {}
    assert_eq!(simulation.held, [prefill]);
    assert!(simulation.scheduler.schedule().is_stuck(), "all is held: nothing to do until the release");
    assert_eq!(simulation.scheduler.totals().preemptions, 0);
    simulation.scheduler.remove_request(prefill);
    assert_eq!(chunks(&simulation.step())[0].0, decode);
}

#[test]
fn nobody_overtakes_the_first_that_waits() {
    let mut simulation = Simulation::new(config(4));
    simulation.generate(32, 1, 20);
    simulation.step();
    let large = simulation.generate(4 * 32 - 1, 1, 1);
    let small = simulation.generate(1, 1, 1);
    while simulation.finished.is_empty() {
        let plan = simulation.step();
        assert!(
            plan.chunks.iter().all(|chunk| chunk.sequence.arrival == 0),
            "the small one fits, and waits behind the large"
        );
    }
    let mut order = Vec::new();
    while simulation.finished.len() < 3 {
        order.extend(simulation.step().chunks.into_iter().map(|chunk| chunk.sequence.arrival));
    }
    assert_eq!(order, [large, large, small]);
}

#[test]
fn choices_take_a_seat_each_before_they_exist() {
    let mut simulation = Simulation::new(config(32));
    simulation.generate(200, 3, 5);
    simulation.generate(10, 2, 5);
    simulation.generate(10, 1, 5);
    let plan = simulation.step();
    assert_eq!(chunks(&plan), [(0, 0, 0, 64, 0)], "3 of 4 seats are taken, and nobody overtakes the second");
}

#[test]
fn a_failed_import_is_computed_here_at_its_place_in_the_order() {
    let mut simulation = Simulation::new(config(32));
    let import = simulation.add(prompt(1, 40), RequestKind::Import, 1, 2);
    let later = simulation.generate(10, 1, 2);
    let plan = simulation.step();
    assert_eq!(plan.announced, [SequenceId { arrival: import, choice: 0 }]);
    assert_eq!((plan.chunks.len(), plan.fresh.len()), (0, 3));
    simulation.scheduler.import_failed(import);
    simulation.check_blocks();
    assert_eq!(chunks(&simulation.step()), [(import, 0, 0, 40, 1), (later, 0, 0, 10, 1)]);
}

#[test]
fn a_committed_import_decodes_and_its_prompt_is_known_from_then_on() {
    let mut simulation = Simulation::new(config(32));
    let import = simulation.add(prompt(1, 70), RequestKind::Import, 2, 4);
    simulation.step();
    simulation.commit(import, 2);
    assert_eq!(chunks(&simulation.step()), [(import, 0, 70, 1, 1), (import, 1, 70, 1, 1)]);
    let next = simulation.add(prompt(1, 70), RequestKind::Generate, 1, 1);
    assert_eq!(chunks(&simulation.step()).last(), Some(&(next, 0, 64, 6, 1)));
}

#[test]
fn what_only_an_import_wrote_is_unknown_until_its_commit() {
    let mut simulation = Simulation::new(config(32));
    simulation.add(prompt(1, 70), RequestKind::Import, 1, 4);
    simulation.step();
    let other = simulation.add(prompt(1, 70), RequestKind::Generate, 1, 1);
    assert_eq!(chunks(&simulation.step()), [(other, 0, 0, 64, 0)]);
}

#[derive(Clone, Debug)]
struct Arrival {
    after_steps: usize,
    prompt_tokens: usize,
    /// Prompts of one family begin alike.
    family: u32,
    kind: RequestKind,
    choices: u32,
    length: usize,
    /// Steps that somebody outside takes to commit, fail or release.
    outside_steps: usize,
    import_fails: bool,
}

fn arrival(num_blocks: usize) -> impl Strategy<Value = Arrival> {
    let kind = prop_oneof![
        4 => Just(RequestKind::Generate),
        1 => Just(RequestKind::Prefill),
        2 => Just(RequestKind::Import),
    ];
    let size = (1..num_blocks * BLOCK_TOKENS, 1u32..=3, 1usize..80);
    (0usize..20, size, 0u32..3, kind, 0usize..30, any::<bool>()).prop_map(
        move |(after_steps, (prompt_tokens, choices, length), family, kind, outside_steps, import_fails)| Arrival {
            after_steps,
            prompt_tokens,
            family,
            kind,
            choices,
            length: length.min(num_blocks * BLOCK_TOKENS - prompt_tokens),
            outside_steps,
            import_fails,
        },
    )
}

fn limits() -> impl Strategy<Value = (EngineConfig, Vec<Arrival>)> {
    (2usize..16, 3usize..6, 0usize..100, 1usize..4, any::<bool>()).prop_flat_map(
        |(num_blocks, max_num_seqs, extra, chunk_blocks, prefix_cache)| {
            let config = EngineConfig {
                num_blocks,
                max_batch_tokens: max_num_seqs + BLOCK_TOKENS + extra,
                max_num_seqs,
                prefill_chunk_tokens: chunk_blocks * BLOCK_TOKENS,
                prefix_cache,
                max_waiting: usize::MAX,
            };
            (Just(config), prop::collection::vec(arrival(num_blocks), 1..12))
        },
    )
}

/// What one plan must keep to, whatever the state that led to it.
fn check_plan(scheduler: &Scheduler, plan: &Plan) {
    let config = &scheduler.config;
    assert!(plan.num_tokens() <= config.max_batch_tokens, "the token budget");
    assert!(scheduler.seats_taken() <= config.max_num_seqs, "the seats");
    let mut seen = BTreeSet::new();
    for chunk in &plan.chunks {
        assert!(seen.insert(chunk.sequence), "one chunk a sequence");
        assert!(chunk.len >= 1 && (chunk.len == 1 || chunk.len <= config.prefill_chunk_tokens), "{chunk:?}");
        assert!(
            chunk.samples > 0 || (chunk.start + chunk.len) % BLOCK_TOKENS == 0,
            "a chunk ends with a block: {chunk:?}"
        );
    }
    if !plan.announced.is_empty() {
        assert!(plan.chunks.is_empty(), "announcements don't wait for a forward pass");
        return;
    }
    // The oldest running sequence advances, unless all blocks are held from outside.
    if let Some(oldest) =
        scheduler.running.first().filter(|oldest| plan.chunks.iter().all(|chunk| chunk.sequence != **oldest))
    {
        let sequence = &scheduler.sequences[oldest];
        let others = scheduler.running.range((Bound::Excluded(*oldest), Bound::Unbounded));
        let preemptable = others.filter(|id| scheduler.sequences[id].kind != RequestKind::Prefill).count();
        assert_eq!(
            (sequence.num_uncomputed(), preemptable),
            (1, 0),
            "the oldest stalls though others could be preempted"
        );
        assert_eq!(scheduler.blocks.num_free(), 0, "the oldest stalls though blocks are free");
    }
}

/// Every token that a plan computes goes to a block that only its sequence holds and that no prefix names.
fn check_writes(scheduler: &Scheduler, plan: &Plan) {
    for chunk in &plan.chunks {
        let sequence = &scheduler.sequences[&chunk.sequence];
        for block in &sequence.block_table[chunk.start / BLOCK_TOKENS..(chunk.start + chunk.len).div_ceil(BLOCK_TOKENS)]
        {
            assert_eq!(scheduler.blocks.ref_count(*block), 1, "{chunk:?} writes to a block of others");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// Under any load, limits are kept, nobody overtakes, every request ends, and no block is lost.
    #[test]
    fn every_request_finishes_within_the_limits((config, arrivals) in limits()) {
        config.check(config.num_blocks).expect("the strategy makes valid limits");
        let mut simulation = Simulation::new(config);
        let mut outside: Vec<(usize, u64)> = Vec::new();
        let mut todo: std::collections::VecDeque<_> = arrivals.iter().cloned().collect();
        let mut known: Vec<Arrival> = Vec::new();
        let mut wait = 0;
        let mut ended: BTreeSet<u64> = BTreeSet::new();
        // Each request alone takes at most its tokens in steps, twice that when preempted or failed, and waits outside for a while. In
        // turn, the worst order, that is the sum, and each preemption gives the older ones a block's worth of steps.
        let alone = |a: &Arrival| a.after_steps + a.outside_steps + 4 * (a.prompt_tokens + a.choices as usize * a.length) + 8;
        let bound: usize = arrivals.iter().map(alone).sum::<usize>() * 4;
        let mut steps = 0;
        while !todo.is_empty() || ended.len() < known.len() {
            steps += 1;
            prop_assert!(steps <= bound, "not done after {} steps: {:?}", steps, simulation.scheduler);
            while let Some(next) = todo.front().filter(|next| next.after_steps <= wait) {
                let base = prompt(next.family, next.prompt_tokens);
                simulation.add(base, next.kind, next.choices, next.length);
                known.push(next.clone());
                todo.pop_front();
                wait = 0;
            }
            wait += 1;

            let plan = simulation.scheduler.schedule();
            check_plan(&simulation.scheduler, &plan);
            check_writes(&simulation.scheduler, &plan);
            simulation.check_blocks();
            simulation.finish(&plan);
            simulation.check_blocks();

            // First come, first admitted.
            let trunks = (0..known.len() as u64).map(|arrival| SequenceId { arrival, choice: 0 });
            let admitted: Vec<bool> = trunks
                .filter_map(|id| simulation.scheduler.sequence(id).map(|sequence| sequence.num_cached.is_some()))
                .collect();
            prop_assert!(admitted.is_sorted_by(|earlier, later| earlier >= later), "somebody overtook: {:?}", admitted);

            for &id in &plan.announced {
                if known[id.arrival as usize].kind == RequestKind::Import {
                    outside.push((steps + known[id.arrival as usize].outside_steps, id.arrival));
                }
            }
            for arrival in simulation.held.drain(..) {
                outside.push((steps + known[arrival as usize].outside_steps, arrival));
            }
            let (due, later) = outside.into_iter().partition(|&(step, _)| step <= steps);
            outside = later;
            let due: Vec<(usize, u64)> = due;
            for (_, arrival) in due {
                let request = &known[arrival as usize];
                match (request.kind, request.import_fails) {
                    (RequestKind::Import, true) => simulation.scheduler.import_failed(arrival),
                    (RequestKind::Import, false) => simulation.commit(arrival, request.choices),
                    (RequestKind::Prefill | RequestKind::Generate, _) => {
                        simulation.scheduler.remove_request(arrival);
                        ended.insert(arrival);
                    }
                }
                simulation.check_blocks();
            }
            for arrival in 0..known.len() as u64 {
                let done = (0..known[arrival as usize].choices).all(|choice| simulation.finished.contains(&SequenceId { arrival, choice }));
                if done {
                    ended.insert(arrival);
                }
            }
        }
        prop_assert!(simulation.scheduler.sequences.is_empty());
        prop_assert!(!simulation.scheduler.has_work());
        prop_assert_eq!(simulation.scheduler.blocks.num_free(), config.num_blocks, "all blocks came back");
    }

    /// Requests that are taken away in any state leave nothing behind.
    #[test]
    fn an_abort_at_any_moment_frees_everything((config, arrivals) in limits(), aborts in prop::collection::vec((0usize..60, 0u64..12), 0..12)) {
        let mut simulation = Simulation::new(config);
        for next in &arrivals {
            simulation.add(prompt(next.family, next.prompt_tokens), next.kind, next.choices, next.length);
        }
        for step in 0..60 {
            simulation.step();
            for &(_, arrival) in aborts.iter().filter(|(when, _)| *when == step) {
                simulation.scheduler.remove_request(arrival);
                simulation.importing.retain(|&importing| importing != arrival);
                simulation.check_blocks();
            }
        }
        for arrival in 0..arrivals.len() as u64 {
            simulation.scheduler.remove_request(arrival);
        }
        prop_assert!(!simulation.scheduler.has_work());
        prop_assert_eq!(simulation.scheduler.blocks.num_free(), config.num_blocks, "all blocks came back");
    }
}
