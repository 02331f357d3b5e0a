//! A row's bits depend on its own sequence alone.

use baton_engine::config::Dtype;

use crate::drive::{Driver, MODELS, bits, expected, load};

const DTYPES: [Dtype; 3] = [Dtype::F32, Dtype::Bf16, Dtype::F16];

#[test]
fn a_prefill_in_chunks_gives_the_bits_of_a_whole_one() {
    for name in MODELS {
        for dtype in DTYPES {
            let prompt = expected(name).remove(0).prompt;
            let mut driver = Driver::new(load(name, Some(dtype)));
            let mut sequence = driver.sequence(&prompt);
            let whole = driver.compute(&mut [(&mut sequence, prompt.len())]);
            for chunk in [1, 7, 32, 33] {
                // Over the same blocks again: every slot is rewritten before it is read.
                sequence.computed = 0;
                let mut chunked = Vec::new();
                while sequence.computed < prompt.len() {
                    let count = chunk.min(prompt.len() - sequence.computed);
                    chunked.extend(driver.compute(&mut [(&mut sequence, count)]));
                }
                assert_eq!(bits(&chunked), bits(&whole), "{name} {dtype:?} in chunks of {chunk}");
            }
        }
    }
}

#[test]
fn company_in_the_batch_does_not_show() {
    for name in MODELS {
        for dtype in DTYPES {
            let [first, second] = [0, 1].map(|i| expected(name).remove(i));
            let mut driver = Driver::new(load(name, Some(dtype)));
            let vocab = driver.vocab;
            let mut a = driver.sequence(&first.prompt);
            let alone_a = driver.compute(&mut [(&mut a, first.prompt.len())]);
            let decoded: Vec<u32> = second.prompt.iter().chain(&second.greedy[..8]).copied().collect();
            let mut b = driver.sequence(&decoded);
            let alone_b = driver.compute(&mut [(&mut b, decoded.len())]);

            // The second decodes one token a step while the first is prefilled in uneven chunks beside it, in changing
            // order.
            (a.computed, b.computed) = (0, second.prompt.len());
            let (mut together_a, mut together_b) = (Vec::new(), Vec::new());
            for (step, chunk) in [5, 18, 1, 20, 3, 11, 2, 10].into_iter().enumerate() {
                if step % 2 == 0 {
                    let logits = driver.compute(&mut [(&mut a, chunk), (&mut b, 1)]);
                    together_a.extend_from_slice(&logits[..chunk * vocab]);
                    together_b.extend_from_slice(&logits[chunk * vocab..]);
                } else {
                    let logits = driver.compute(&mut [(&mut b, 1), (&mut a, chunk)]);
                    together_b.extend_from_slice(&logits[..vocab]);
                    together_a.extend_from_slice(&logits[vocab..]);
                }
            }
            assert_eq!(bits(&together_a), bits(&alone_a), "{name} {dtype:?}, prefill");
            assert_eq!(bits(&together_b), bits(&alone_b[second.prompt.len() * vocab..]), "{name} {dtype:?}, decode");
        }
    }
}

#[test]
fn the_number_of_threads_does_not_show() {
    let prompt = expected("qwen3").remove(0).prompt;
    let logits = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads");
        pool.install(|| {
            let mut driver = Driver::new(load("qwen3", Some(Dtype::Bf16)));
            let mut sequence = driver.sequence(&prompt);
            bits(&driver.compute(&mut [(&mut sequence, prompt.len())]))
        })
    };
    let one = logits(1);
    assert_eq!(one, logits(2));
    assert_eq!(one, logits(5));
}
