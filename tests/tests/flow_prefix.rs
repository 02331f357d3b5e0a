//! Prefix caches of real workers: a prompt goes back to the prefill worker that has it, and never to another tenant's blocks.

use anyhow::{Context as _, Result};
use serde_json::json;
use std::io::Write as _;
use system_tests::cluster::{Cluster, PodSpec, path_of, wait};
use system_tests::http;

/// Some hundred tokens that begin with their own number, so that no two prompts share a block.
fn prompt(number: usize) -> String {
    format!("Story number {number} of many. ")
        + &"Once upon a time, a small fox lived near a quiet river and wanted to cross the old bridge. ".repeat(12)
}

/// Who prefilled the prompt, and how many of its tokens were cached there.
fn complete(pod: &str, key: &str, prompt: &str) -> Result<(String, u64)> {
    let body = json!({"model": "tiny", "prompt": prompt, "max_tokens": 4, "temperature": 0}).to_string();
    let authorization = format!("Bearer {key}");
    let answer = http::send("POST", pod, "/v1/completions", &[("authorization", &authorization)], body)?;
    assert_eq!((answer.status, path_of(&answer).as_str()), (200, "remote-prefill"));
    let worker = answer.header("x-baton-prefill-worker").context("a prefill worker")?.to_owned();
    let usage = answer.json()?["usage"].clone();
    Ok((worker, usage["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap_or(0)))
}

#[test]
fn a_prompt_goes_back_to_the_worker_that_has_it_and_another_tenant_finds_nothing() -> Result<()> {
    let mut keys = tempfile::NamedTempFile::new()?;
    // The digests of "key-of-a" and "key-of-b".
    let file_of_keys = json!({"keys": [
        {"sha256": "ee063bb3d7270fdf6148f09dde510a5cf346c4aa4dd2ff4b2caec5348d799043", "tenant": "a"},
        {"sha256": "caad66a34f6dbd2c56b4fceb13caf74761aba0720534d6e33185edd493ea0f63", "tenant": "b"},
    ]});
    keys.write_all(file_of_keys.to_string().as_bytes())?;
    let file = keys.path().to_str().context("a path")?.to_owned();
    let pod = |role| PodSpec::new(role).proxy_flag("--api-keys-file", &file);
    let cluster = Cluster::start(&[pod("prefill"), pod("prefill"), pod("decode")])?;
    let address = cluster.pods[2].proxy_address();
    let admin = format!("{}:9090", cluster.pods[2].address);
    let blocks_of = |address: &str| -> Result<Option<u64>> {
        let page = http::get(&admin, "/debug/prefix")?.json()?;
        let workers = page["workers"].as_array().context("a list")?;
        Ok(workers.iter().find(|worker| worker["worker"] == address).and_then(|worker| worker["blocks"].as_u64()))
    };
    // A report of a queue that is gone by now may still turn a choice.
    let is_idle = || -> Result<bool> {
        let page = http::get(&admin, "/debug/workers")?.json()?;
        let is_idle = |worker: &serde_json::Value| {
            worker["reserved_prompt_tokens"] == 0 && worker["status"]["load"]["queued_prompt_tokens"] == 0
        };
        Ok(page["workers"].as_array().context("a list")?.iter().all(is_idle))
    };
    let streams = || -> Result<usize> {
        let page = http::get(&admin, "/debug/prefix")?.json()?;
        Ok(page["workers"].as_array().context("a list")?.iter().filter(|worker| worker["state"] == "in-step").count())
    };
    wait("all three workers are followed", || Ok(streams()? == 3))?;

    let (first, cached) = complete(&address, "key-of-a", &prompt(0))?;
    assert_eq!(cached, 0, "nothing is cached at the start");
    wait("the first prompt's blocks are known", || Ok(blocks_of(&first)? > Some(0)))?;
    let mut workers = std::collections::BTreeSet::from([first.clone()]);
    for number in 1..6 {
        workers.insert(complete(&address, "key-of-a", &prompt(number))?.0);
    }
    for _ in 0..3 {
        wait("nothing is queued anywhere", is_idle)?;
        let (again, cached) = complete(&address, "key-of-a", &prompt(0))?;
        assert_eq!(again, first, "{workers:?}");
        assert!(cached > 0, "the worker that has it was chosen, and had nothing");
    }
    let (_, cached) = complete(&address, "key-of-b", &prompt(0))?;
    assert_eq!(cached, 0, "another tenant's blocks were used");
    Ok(())
}
