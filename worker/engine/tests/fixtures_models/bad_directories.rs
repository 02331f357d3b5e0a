//! Broken model directories: each is refused with an error that names the file and what is wrong with it.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use baton_engine::loader::{self, LoadOptions};
use safetensors::tensor::{Dtype, TensorView};
use tempfile::TempDir;

use crate::drive::{bits, directory, expected};

fn copy(name: &str) -> TempDir {
    let dir = TempDir::new().expect("a temporary directory");
    for entry in fs::read_dir(directory(name)).expect("the fixture is there") {
        let entry = entry.expect("the fixture is readable");
        fs::copy(entry.path(), dir.path().join(entry.file_name())).expect("room for a copy");
    }
    dir
}

/// The error with its causes, as a log shows it.
fn error(dir: &Path) -> String {
    match loader::load(dir, LoadOptions::default(), &mut |_, _| {}) {
        Ok(_) => panic!("{} must not load", dir.display()),
        Err(error) => {
            let mut text = error.to_string();
            let mut cause = std::error::Error::source(&error);
            while let Some(error) = cause {
                text += &format!(": {error}");
                cause = error.source();
            }
            text
        }
    }
}

fn loads(dir: &Path) {
    loader::load(dir, LoadOptions::default(), &mut |_, _| {}).map(|_| ()).expect("the directory loads");
}

/// Fixture, damage, and what the error says of it.
type Case<'a> = (&'a str, &'a dyn Fn(&mut Tensors), &'a str);

type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

/// Rewrites model.safetensors.
fn change(dir: &Path, change: impl FnOnce(&mut Tensors)) {
    let path = dir.join("model.safetensors");
    let bytes = fs::read(&path).expect("one file of weights");
    let mut tensors: Tensors = safetensors::SafeTensors::deserialize(&bytes)
        .expect("the fixture is intact")
        .tensors()
        .into_iter()
        .map(|(name, view)| (name, (view.dtype(), view.shape().to_vec(), view.data().to_vec())))
        .collect();
    change(&mut tensors);
    let views = tensors
        .iter()
        .map(|(name, (dtype, shape, data))| (name, TensorView::new(*dtype, shape.clone(), data).expect("consistent")));
    let bytes = safetensors::serialize(views, None).expect("consistent");
    fs::write(path, bytes).expect("room for a file");
}

fn change_json(path: &Path, change: impl FnOnce(&mut serde_json::Value)) {
    let mut json = serde_json::from_slice(&fs::read(path).expect("the file is there")).expect("the file is JSON");
    change(&mut json);
    fs::write(path, json.to_string()).expect("room for a file");
}

#[test]
fn a_tensor_that_is_missing_mis_shaped_or_of_another_type_is_named() {
    let q = "model.layers.1.self_attn.q_proj.weight";
    let cases: [Case<'_>; 7] = [
        (
            "llama2",
            &|t| drop(t.remove(q)),
            "tensor model.layers.1.self_attn.q_proj.weight of shape [32, 32] is missing",
        ),
        ("llama2", &|t| drop(t.remove("lm_head.weight")), "tensor lm_head.weight of shape [199, 32] is missing"),
        (
            "qwen3",
            &|t| drop(t.remove("model.layers.0.self_attn.k_norm.weight")),
            "k_norm.weight of shape [16] is missing",
        ),
        (
            "qwen2-tied",
            &|t| drop(t.remove("model.layers.0.self_attn.v_proj.bias")),
            "model.layers.0.self_attn.v_proj.bias of shape [16] is missing",
        ),
        (
            "llama2",
            &|t| t.get_mut(q).expect("present").1 = vec![16, 64],
            "q_proj.weight: expected shape [32, 32], found [16, 64]",
        ),
        (
            "llama2",
            &|t| t.get_mut("model.norm.weight").expect("present").1 = vec![1, 32],
            "model.norm.weight: expected shape [32], found [1, 32]",
        ),
        (
            "llama2",
            &|t| t.get_mut(q).expect("present").0 = Dtype::I32,
            "q_proj.weight: expected type BF16, F16 or F32, found I32",
        ),
    ];
    for (name, damage, message) in cases {
        let dir = copy(name);
        change(dir.path(), damage);
        let error = error(dir.path());
        assert!(error.contains(message) && error.contains("model.safetensors"), "{error}");
    }
}

#[test]
fn a_truncated_file_names_the_tensor_that_it_cuts() {
    let dir = copy("llama2");
    let path = dir.path().join("model.safetensors");
    let bytes = fs::read(&path).expect("the file is there");
    fs::write(&path, &bytes[..bytes.len() - 10]).expect("room for a file");
    let text = error(dir.path());
    assert!(text.contains("model.safetensors: truncated: tensor model."), "{text}");
    assert!(text.contains(&format!("the file at {}", bytes.len() - 10)), "{text}");
    for (len, message) in [(40, "claims"), (5, "5 bytes are too short"), (0, "0 bytes are too short")] {
        fs::write(&path, &bytes[..len]).expect("room for a file");
        let text = error(dir.path());
        assert!(text.contains(message), "{len} bytes: {text}");
    }
    let mut claim = bytes.clone();
    claim[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    fs::write(&path, claim).expect("room for a file");
    assert!(error(dir.path()).contains("the header claims 18446744073709551615 bytes"));
}

#[test]
fn a_sharded_checkpoint_is_complete_or_refused() {
    loads(copy("llama3").path());

    let dir = copy("llama3");
    fs::remove_file(dir.path().join("model-00002-of-00003.safetensors")).expect("the file is there");
    assert!(error(dir.path()).contains("can't read") && error(dir.path()).contains("model-00002-of-00003.safetensors"));

    let index = |change: &dyn Fn(&mut serde_json::Value)| {
        let dir = copy("llama3");
        change_json(&dir.path().join("model.safetensors.index.json"), change);
        error(dir.path())
    };
    let text = index(&|json| json["weight_map"]["model.norm.weight"] = "../elsewhere.safetensors".into());
    assert!(text.contains("names \"../elsewhere.safetensors\", which is not a file of the directory"), "{text}");
    let text = index(&|json| json["weight_map"]["model.extra.weight"] = "model-00001-of-00003.safetensors".into());
    assert!(text.contains("tensor model.extra.weight is missing, which the index says is here"), "{text}");
    let text = index(&|json| json["weight_map"] = 5.into());
    assert!(text.contains("model.safetensors.index.json is not a valid index: "), "{text}");

    let dir = copy("llama3");
    let first = dir.path().join("model-00001-of-00003.safetensors");
    fs::copy(&first, dir.path().join("model-00002-of-00003.safetensors")).expect("room for a copy");
    assert!(error(dir.path()).contains("is also in another file"));
}

#[test]
fn a_directory_without_weights_or_configuration_says_what_it_lacks() {
    let dir = copy("llama2");
    fs::remove_file(dir.path().join("model.safetensors")).expect("the file is there");
    assert!(error(dir.path()).contains("has neither model.safetensors nor model.safetensors.index.json"));
    fs::remove_file(dir.path().join("config.json")).expect("the file is there");
    assert!(error(dir.path()).contains("config.json: No such file"));
}

#[test]
fn a_configuration_that_is_not_json_or_not_supported_is_named() {
    let config = |change: &dyn Fn(&mut serde_json::Value)| {
        let dir = copy("llama2");
        change_json(&dir.path().join("config.json"), change);
        error(dir.path())
    };
    let text = config(&|json| json["architectures"] = serde_json::json!(["GPT2LMHeadModel"]));
    assert!(
        text.starts_with("unsupported architecture \"GPT2LMHeadModel\": supported are LlamaForCausalLM, "),
        "{text}"
    );
    let text = config(&|json| json["hidden_size"] = "wide".into());
    assert!(text.contains("config.json is not a valid configuration: invalid type: string \"wide\""), "{text}");
    let text = config(&|json| json["vocab_size"] = 200.into());
    assert!(text.contains("model.embed_tokens.weight: expected shape [200, 32], found [199, 32]"), "{text}");

    let dir = copy("llama2");
    fs::write(dir.path().join("generation_config.json"), "{").expect("room for a file");
    assert!(error(dir.path()).contains("generation_config.json is not a valid configuration: EOF"));
}

#[test]
fn tensors_that_published_checkpoints_carry_beside_the_model_do_no_harm() {
    let prompt = expected("qwen2-tied").remove(1).prompt;
    let logits = |dir: &Path| {
        let model = loader::load(dir, LoadOptions::default(), &mut |_, _| {}).expect("the directory loads");
        let mut driver = crate::drive::Driver::new(model);
        let mut sequence = driver.sequence(&prompt);
        bits(&driver.compute(&mut [(&mut sequence, prompt.len())]))
    };
    let dir = copy("qwen2-tied");
    change(dir.path(), |tensors| {
        let embedding = tensors["model.embed_tokens.weight"].clone();
        tensors.insert("lm_head.weight".into(), embedding);
        let frequencies = (Dtype::F32, vec![4], vec![0; 16]);
        tensors.insert("model.layers.0.self_attn.rotary_emb.inv_freq".into(), frequencies.clone());
        tensors.insert("something.of.another.kind".into(), frequencies);
    });
    assert_eq!(logits(dir.path()), logits(&directory("qwen2-tied")));
}

#[test]
fn progress_counts_the_bytes_of_the_weights_to_the_last() {
    let dir = copy("llama2");
    // Old configurations may name no type; the weights' own is taken then.
    change_json(&dir.path().join("config.json"), |json| {
        drop(json.as_object_mut().expect("an object").remove("torch_dtype"))
    });
    let mut seen = Vec::new();
    let model = loader::load(dir.path(), LoadOptions::default(), &mut |done, total| seen.push((done, total)));
    assert_eq!(model.expect("the directory loads").dtype, baton_engine::config::Dtype::F32);
    let total = seen[0].1;
    let file = fs::metadata(dir.path().join("model.safetensors")).expect("the file is there").len();
    assert!(total < file && file - total < 4096, "{total} of a file of {file}");
    assert_eq!((seen.first(), seen.last()), (Some(&(0, total)), Some(&(total, total))));
    assert!(seen.iter().all(|s| s.1 == total) && seen.is_sorted() && seen.len() > 15);
    assert_eq!(seen[seen.len() - 2].0, total, "nothing is counted that is not read");
}
