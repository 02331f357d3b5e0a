//! Token ids, texts and rendered chats are those of transformers; broken files are named.

use std::fs;
use std::path::Path;

use baton_engine::chat_template::TemplateError;
use baton_engine::tokenizer::{Tokenizer, TokenizerError};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::drive::directory;

const TOKENIZERS: [&str; 2] = ["tokenizer-byte-level", "tokenizer-byte-fallback"];

fn load(name: &str) -> (Tokenizer, Value) {
    let text = fs::read_to_string(directory(name).join("expected.json")).expect("the fixture is there");
    (Tokenizer::load(&directory(name)).expect("the fixture loads"), serde_json::from_str(&text).expect("JSON"))
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).expect("token ids")
}

#[test]
fn ids_and_texts_are_those_of_transformers() {
    for name in TOKENIZERS {
        let (tokenizer, expected) = load(name);
        for case in expected["texts"].as_array().expect("cases") {
            let text = case["text"].as_str().expect("a text");
            assert_eq!(tokenizer.encode(text, true).expect("encodes"), ids(&case["ids"]), "{name}: {text:?}");
            let plain = tokenizer.encode(text, false).expect("encodes");
            assert_eq!(plain, ids(&case["plain_ids"]), "{name}: {text:?}");
            assert_eq!(tokenizer.decode(&plain, true), case["decoded"], "{name}: {text:?}");
        }
    }
}

#[test]
fn the_bytes_of_tokens_join_to_the_bytes_of_the_text() {
    let text = "naïve café, 日本語, emoji 🦀👩‍🚀\n\t<|end|>";
    for (name, expected) in [("tokenizer-byte-level", text.to_owned()), ("tokenizer-byte-fallback", format!(" {text}"))]
    {
        let (tokenizer, _) = load(name);
        let ids = tokenizer.encode(text, false).expect("encodes");
        let bytes: Vec<u8> = ids.iter().flat_map(|&id| tokenizer.token_bytes(id).expect("a known id")).collect();
        assert_eq!(String::from_utf8(bytes).expect("whole characters"), expected, "{name}");
        assert_eq!(tokenizer.token_bytes(tokenizer.vocab_size() as u32), None);
    }
}

#[test]
fn chats_are_rendered_as_transformers_renders_them() {
    for name in TOKENIZERS {
        let (tokenizer, expected) = load(name);
        for case in expected["chats"].as_array().expect("cases") {
            let open = case["add_generation_prompt"].as_bool().expect("a flag");
            let rendered = tokenizer.chat_template(&case["messages"], case.get("tools"), open).expect("renders");
            assert_eq!(rendered, case["rendered"], "{name}");
        }
    }
}

#[test]
fn special_tokens_are_known_by_name() {
    let (tokenizer, _) = load("tokenizer-byte-fallback");
    assert_eq!((tokenizer.eos_token_id(), tokenizer.token_id("</s>")), (Some(2), Some(2)));
    let (tokenizer, _) = load("tokenizer-byte-level");
    assert_eq!((tokenizer.eos_token_id(), tokenizer.token_id("<|end|>")), (Some(0), Some(0)));
    assert_eq!(tokenizer.decode(&[0], true), "");
    assert_eq!(tokenizer.decode(&[0], false), "<|end|>");
}

#[test]
fn a_template_refuses_wrong_roles_in_its_own_words() {
    let (tokenizer, _) = load("tokenizer-byte-fallback");
    match tokenizer.chat_template(&json!([{"role": "assistant", "content": "first"}]), None, true) {
        Err(TemplateError::Refused { message }) => assert_eq!(message, "roles must alternate"),
        other => panic!("expected a refusal, got {other:?}"),
    }
}

fn copy_with(name: &str, file: &str, content: &str) -> TempDir {
    let dir = TempDir::new().expect("a temporary directory");
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        fs::copy(directory(name).join(file), dir.path().join(file)).expect("the fixture is there");
    }
    fs::write(dir.path().join(file), content).expect("room for a file");
    dir
}

fn error(dir: &Path) -> TokenizerError {
    match Tokenizer::load(dir) {
        Ok(_) => panic!("{} must not load", dir.display()),
        Err(error) => error,
    }
}

#[test]
fn broken_files_are_named_with_the_cause() {
    let cases = [
        ("tokenizer.json", "{", "tokenizer.json is not valid", "EOF"),
        ("tokenizer.json", r#"{"model": {"type": "Magic"}}"#, "tokenizer.json describes no tokenizer", ""),
        ("tokenizer_config.json", "[]", "tokenizer_config.json is not valid", "invalid type"),
        ("tokenizer_config.json", r#"{"chat_template": 5}"#, "chat_template is neither a string nor a list", ""),
        ("tokenizer_config.json", r#"{"chat_template": [{"name": "x"}]}"#, "has no name or no template", ""),
        (
            "tokenizer_config.json",
            r#"{"chat_template": "a\n{% for %}"}"#,
            "tokenizer_config.json has a broken chat template",
            "chat_template line 2 is not valid",
        ),
        ("chat_template.jinja", "{{ 1 +", "chat_template.jinja has a broken chat template", "line 1"),
        ("special_tokens_map.json", "no", "special_tokens_map.json is not valid", "expected"),
    ];
    for (file, content, message, cause) in cases {
        let error = error(copy_with("tokenizer-byte-level", file, content).path());
        let source = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
        assert!(error.to_string().contains(message) && source.contains(cause), "{error}: {source}");
    }
    let dir = TempDir::new().expect("a temporary directory");
    assert!(error(dir.path()).to_string().contains("tokenizer.json"));
}

#[test]
fn named_templates_are_chosen_by_whether_there_are_tools_and_a_missing_one_is_said() {
    let named = r#"{"chat_template": [
        {"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}, {"name": "rag", "template": "x"}
    ]}"#;
    let tokenizer = Tokenizer::load(copy_with("tokenizer-byte-level", "tokenizer_config.json", named).path());
    let tokenizer = tokenizer.expect("loads");
    let messages = json!([{"role": "user", "content": "hi"}]);
    assert_eq!(tokenizer.chat_template(&messages, None, true).expect("renders"), "plain");
    assert_eq!(tokenizer.chat_template(&messages, Some(&json!([])), true).expect("renders"), "tools");

    let tokenizer =
        Tokenizer::load(copy_with("tokenizer-byte-level", "tokenizer_config.json", "{}").path()).expect("loads");
    assert!(!tokenizer.has_chat_template());
    let error = tokenizer.chat_template(&messages, None, true).expect_err("there is none");
    assert!(error.to_string().contains("the model has no chat template"), "{error}");
}
