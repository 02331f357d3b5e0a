//! Which files of a repository are those of a model directory. Pure: names in, names out, and every reason why not.

use super::error::FetchError;
use super::remote::Entry;
use std::collections::{BTreeMap, BTreeSet};

/// The checkpoint in one file.
const SINGLE: &str = "model.safetensors";

/// Which shards there are, and what is in them.
const INDEX: &str = "model.safetensors.index.json";

/// What else a directory has by a fixed name.
const COMPANIONS: [&str; 6] = [
    "config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "vocab.json",
];

/// What else it has by the beginning of its name: tokenizers and chat templates come in several formats.
const COMPANION_PREFIXES: [&str; 3] = ["tokenizer", "chat_template", "vocab."];

/// Endings of tokenizers' own formats.
const COMPANION_ENDINGS: [&str; 2] = [".model", ".tiktoken"];

/// Weights that are not read: the first carry code, the others are for other programs.
const OTHER_FORMATS: [&str; 6] = [".bin", ".pt", ".pth", ".gguf", ".h5", ".onnx"];

/// Characters of a file's name: what file systems take.
const NAME_BYTES_MAX: usize = 255;

/// What is downloaded.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Selection {
    pub(super) files: Vec<Entry>,
    /// It names the shards, which `files` has not.
    pub(super) index: Option<Entry>,
}

/// The files of a model directory. What lies in folders belongs to other programs.
pub(super) fn select(uri: &str, entries: &[Entry]) -> Result<Selection, FetchError> {
    if let Some(entry) = entries.iter().find(|entry| !is_safe(&entry.name)) {
        let name = entry.name.chars().take(NAME_BYTES_MAX).collect();
        return Err(FetchError::UnsafeName { uri: uri.to_owned(), name });
    }
    let at_top: BTreeMap<&str, &Entry> =
        entries.iter().filter(|entry| !entry.name.contains('/')).map(|entry| (entry.name.as_str(), entry)).collect();
    let weights: Vec<&&Entry> =
        at_top.iter().filter(|(name, _)| name.ends_with(".safetensors")).map(|(_, entry)| entry).collect();
    let found = at_top.keys().find(|name| OTHER_FORMATS.iter().any(|ending| name.ends_with(ending)));
    if weights.is_empty() {
        return Err(match found {
            Some(found) => FetchError::OtherFormat { uri: uri.to_owned(), found: (*found).to_owned() },
            None => FetchError::NoModel { uri: uri.to_owned(), missing: "*.safetensors" },
        });
    }
    if !at_top.contains_key("config.json") {
        return Err(FetchError::NoModel { uri: uri.to_owned(), missing: "config.json" });
    }
    let mut files: Vec<Entry> =
        at_top.iter().filter(|(name, _)| is_companion(name)).map(|(_, entry)| Entry::clone(entry)).collect();
    // In the order in which loaders look for them. Beside either there may be the same weights in another order.
    match (at_top.get(SINGLE), at_top.get(INDEX)) {
        (Some(single), _) => files.push(Entry::clone(single)),
        (None, Some(index)) => return Ok(Selection { files, index: Some(Entry::clone(index)) }),
        (None, None) => files.extend(weights.into_iter().map(|entry| Entry::clone(entry))),
    }
    Ok(Selection { files, index: None })
}

/// The shards that an index names.
pub(super) fn shards(uri: &str, index: &str, entries: &[Entry], text: &[u8]) -> Result<Vec<Entry>, FetchError> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let wrong = |why: String| FetchError::Index { uri: uri.to_owned(), index: index.to_owned(), why };
    let Index { weight_map } = serde_json::from_slice(text).map_err(|error| wrong(error.to_string()))?;
    let names: BTreeSet<String> = weight_map.into_values().collect();
    if names.is_empty() {
        return Err(wrong("it names no file".to_owned()));
    }
    let found = |file: String| {
        let is_there = |entry: &&Entry| entry.name == file && !file.contains('/') && file.ends_with(".safetensors");
        let missing = || FetchError::ShardMissing { uri: uri.to_owned(), index: index.to_owned(), file: file.clone() };
        entries.iter().find(is_there).cloned().ok_or_else(missing)
    };
    names.into_iter().map(found).collect()
}

fn is_companion(name: &str) -> bool {
    COMPANIONS.contains(&name)
        || COMPANION_PREFIXES.iter().any(|prefix| name.starts_with(prefix))
        || COMPANION_ENDINGS.iter().any(|ending| name.ends_with(ending))
}

/// Whether a name can't lead out of a directory, nor hide what it is.
fn is_safe(name: &str) -> bool {
    name.len() <= NAME_BYTES_MAX * 4
        && !name.contains('\\')
        && !name.contains(char::is_control)
        && name.split('/').all(|part| !part.is_empty() && part != "." && part != ".." && part.len() <= NAME_BYTES_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const URI: &str = "hf://org/tiny";

    fn entries(names: &[&str]) -> Vec<Entry> {
        names.iter().map(|name| Entry { name: (*name).to_owned(), size: 1, digest: None, tag: None }).collect()
    }

    fn names(files: &[Entry]) -> Vec<&str> {
        files.iter().map(|entry| entry.name.as_str()).collect()
    }

    #[test]
    fn a_repository_gives_its_model_directory_and_nothing_else() {
        let all = entries(&[
            ".gitattributes",
            "LICENSE",
            "README.md",
            "chat_template.jinja",
            "config.json",
            "consolidated.safetensors",
            "generation_config.json",
            "merges.txt",
            "model.safetensors",
            "onnx/model.onnx",
            "original/consolidated.00.pth",
            "original/tokenizer.model",
            "pytorch_model.bin",
            "tokenizer.json",
            "tokenizer_config.json",
            "training_args.bin",
            "vocab.json",
        ]);
        let Selection { files, index } = select(URI, &all).expect("a model");
        assert_eq!(index, None);
        assert_eq!(
            names(&files),
            [
                "chat_template.jinja",
                "config.json",
                "generation_config.json",
                "merges.txt",
                "tokenizer.json",
                "tokenizer_config.json",
                "vocab.json",
                "model.safetensors"
            ]
        );
    }

    #[test]
    fn an_index_says_which_shards_there_are() {
        let all = entries(&[
            "config.json",
            "consolidated-00001.safetensors",
            INDEX,
            "model-1.safetensors",
            "model-2.safetensors",
            "tokenizer.json",
        ]);
        let Selection { files, index } = select(URI, &all).expect("a model");
        assert_eq!(names(&files), ["config.json", "tokenizer.json"]);
        assert_eq!(index.expect("an index").name, INDEX);
        let shards = |text: &str| shards(URI, INDEX, &all, text.as_bytes());
        let two = r#"{"metadata": {}, "weight_map": {"a": "model-2.safetensors", "b": "model-1.safetensors", "c": "model-2.safetensors"}}"#;
        assert_eq!(names(&shards(two).expect("both")), ["model-1.safetensors", "model-2.safetensors"]);
        for (text, expect) in [
            (r#"{"weight_map": {"a": "model-3.safetensors"}}"#, "model-3.safetensors"),
            (r#"{"weight_map": {"a": "../config.json"}}"#, "../config.json"),
            (r#"{"weight_map": {"a": "config.json"}}"#, "config.json"),
            (r#"{"weight_map": {}}"#, "no file"),
            ("[]", INDEX),
        ] {
            let error = shards(text).expect_err("wrong").to_string();
            assert!(error.contains(expect), "{text}: {error}");
        }
    }

    #[test]
    fn what_is_no_model_is_refused_by_what_it_is() {
        let check = |list: &[&str], expect: &str| {
            let error = select(URI, &entries(list)).expect_err("no model").to_string();
            assert!(error.contains(expect) && error.contains(URI), "{list:?}: {error}");
        };
        check(&["config.json", "pytorch_model.bin", "tokenizer.json"], "pytorch_model.bin and no *.safetensors");
        check(&["tiny.Q4_K_M.gguf"], "tiny.Q4_K_M.gguf and no *.safetensors");
        check(&["sub/config.json", "sub/model.safetensors"], "no *.safetensors");
        check(&["model.safetensors"], "no config.json");
        check(&[], "no *.safetensors");
        for name in ["../x", "/etc/passwd", "a/../../b", "a//b", "./x", "a\\b", "a\nb", ""] {
            check(&["config.json", "model.safetensors", name], "could lead out");
        }
    }

    proptest! {
        #[test]
        fn whatever_is_selected_is_one_plain_name_of_the_listing(list in proptest::collection::vec("[a-z./\\\\]{0,24}|(model|tokenizer)[a-z./]{0,8}(.safetensors)?", 0..20)) {
            let mut list: Vec<&str> = list.iter().map(String::as_str).collect();
            list.extend(["config.json", "model-1.safetensors"]);
            if let Ok(Selection { files, index }) = select(URI, &entries(&list)) {
                for entry in files.iter().chain(&index) {
                    prop_assert!(list.contains(&entry.name.as_str()));
                    prop_assert_eq!(std::path::Path::new(&entry.name).file_name(), Some(entry.name.as_ref()));
                }
            }
        }
    }
}
