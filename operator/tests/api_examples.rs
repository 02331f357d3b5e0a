//! The manifests in examples/ and in the API's document are right, and an object keeps all that stands in them.

use baton_operator::manifest;
use std::path::Path;

#[test]
fn every_example_is_right_and_survives_its_own_form() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples");
    let mut names = Vec::new();
    for entry in std::fs::read_dir(&folder).expect("examples/ is there") {
        let path = entry.expect("a readable entry").path();
        if path.extension().is_none_or(|extension| extension != "yaml") {
            continue;
        }
        let text = std::fs::read_to_string(&path).expect("a readable file");
        let read = manifest::read_one(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let again = serde_yaml::to_string(&read.model).expect("an object serialises");
        let again = manifest::read_one(&again).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        assert_eq!(again.model, read.model);
        assert_eq!(again.validated, read.validated);
        names.push(read.validated.name);
    }
    names.sort();
    assert_eq!(names, ["qwen3-0-6b", "qwen3-8b-sglang", "qwen3-8b-vllm", "tiny"]);
}

#[test]
fn the_documents_example_is_right() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/api.md");
    let text = std::fs::read_to_string(&path).expect("docs/api.md is there");
    let blocks: Vec<&str> = text.split("```yaml\n").skip(1).filter_map(|rest| rest.split("```").next()).collect();
    assert!(!blocks.is_empty(), "no example in {}", path.display());
    for block in blocks {
        manifest::read_one(block).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    }
}
