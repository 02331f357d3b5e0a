//! Whole objects as YAML, kept beside the code: `UPDATE_SNAPSHOTS=1 cargo test -p baton-operator --lib desired` writes them
//! anew, and the difference is read in review.

use super::fixtures::{downloaded, made_for_snapshot, sglang, site, standalone, tiny, vllm_over_nodes};
use crate::Disaggregation;
use crate::child::{Objects, Planned};
use crate::site::Site;
use crate::validated::Validated;
use std::path::Path;

fn yaml(objects: &Objects<Planned>) -> String {
    let documents = objects
        .children()
        .iter()
        .map(|child| format!("---\n{}", serde_yaml::to_string(&child.body).expect("an object is YAML")));
    documents.collect()
}

#[track_caller]
fn check(name: &str, objects: &Objects<Planned>) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/desired/snapshots").join(format!("{name}.yaml"));
    let made = yaml(objects);
    if std::env::var_os("UPDATE_SNAPSHOTS").is_some() {
        std::fs::write(&path, &made).expect("the folder is there");
    }
    let kept = std::fs::read_to_string(&path).unwrap_or_default();
    let first = kept.lines().zip(made.lines()).position(|(kept, made)| kept != made);
    let line = first.unwrap_or_else(|| kept.lines().count().min(made.lines().count())) + 1;
    assert!(
        kept == made,
        "{name}.yaml differs from line {line} on; if that is meant, set UPDATE_SNAPSHOTS=1 and review"
    );
}

#[test]
fn the_demo_model() {
    check("tiny", &made_for_snapshot(&tiny(), &Site { kinds: Default::default(), ..site() }));
}

#[test]
fn a_front_door_and_every_setting_of_a_pod() {
    let model = standalone(downloaded());
    let disaggregation = match model.disaggregation {
        Disaggregation::Always { prefill } | Disaggregation::Conditional { prefill, .. } => {
            Disaggregation::Conditional { prefill, min_uncached_prompt_tokens: super::fixtures::number(256) }
        }
        Disaggregation::Never => Disaggregation::Never,
    };
    check("standalone-download", &made_for_snapshot(&Validated { disaggregation, ..model }, &site()));
}

#[test]
fn another_engine_over_nodes() {
    check("vllm-over-nodes", &made_for_snapshot(&vllm_over_nodes(), &site()));
}

#[test]
fn another_engine_behind_a_front_door() {
    check("sglang-standalone", &made_for_snapshot(&standalone(sglang()), &site()));
}
