//! A model's tokenizer: text to token ids and back, with its chat template.
//!
//! Knows the files (`tokenizer.json`, `tokenizer_config.json`, `special_tokens_map.json`, `chat_template.jinja`). Must
//! not know models. How text is put together from tokens while they arrive is [`text`](crate::text)'s.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde_json::{Map, Value};

use crate::chat_template::{ChatTemplate, TemplateError, TemplateInput};
use crate::text::TokenText;

/// A tokenizer and its chat template.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    pieces: Pieces,
    templates: Templates,
    eos_token_id: Option<u32>,
    vocab_size: usize,
}

/// Templates by name; most models have one, some another for when there are tools.
#[derive(Default)]
struct Templates {
    default: Option<ChatTemplate>,
    tool_use: Option<ChatTemplate>,
}

/// How a token's text in the vocabulary spells its bytes.
enum Pieces {
    /// GPT-2: each byte is a printable character.
    ByteLevel(HashMap<char, u8>),
    /// SentencePiece: `▁` is a space, `<0x0A>` a byte.
    Metaspace,
    /// As it stands.
    Plain,
}

impl Tokenizer {
    /// Reads the tokenizer of a model directory.
    ///
    /// # Errors
    /// [`TokenizerError`] names the file and the cause. A missing template is no error here; using it is.
    pub fn load(dir: &Path) -> Result<Self, TokenizerError> {
        let path = dir.join("tokenizer.json");
        let bytes = std::fs::read(&path).map_err(|source| TokenizerError::Read { path: path.clone(), source })?;
        let json: Value = serde_json::from_slice(&bytes).map_err(|source| json_error(&path, source))?;
        let inner = tokenizers::Tokenizer::from_bytes(&bytes)
            .map_err(|source| TokenizerError::Tokenizer { path: path.clone(), source })?;
        let config = optional_object(&dir.join("tokenizer_config.json"))?;
        let map = optional_object(&dir.join("special_tokens_map.json"))?;
        let special_tokens = special_tokens(&config, &map);
        let eos_token_id =
            special_tokens.iter().find(|(name, _)| name == "eos_token").and_then(|(_, text)| inner.token_to_id(text));
        let vocab_size = inner.get_vocab(true).values().max().map_or(0, |&id| id as usize + 1);
        Ok(Tokenizer {
            pieces: Pieces::of(&json),
            templates: Templates::load(dir, &config, &special_tokens)?,
            inner,
            eos_token_id,
            vocab_size,
        })
    }

    /// Token ids of `text`. `add_special` puts in what the model expects around a plain prompt (a `<s>` in front); a
    /// rendered chat template has it already.
    ///
    /// # Errors
    /// [`TokenizerError::Encode`] when the tokenizer's own rules fail on the text.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, TokenizerError> {
        match self.inner.encode_fast(text, add_special) {
            Ok(encoding) => Ok(encoding.get_ids().to_vec()),
            // The library's message may quote the text.
            Err(_) => Err(TokenizerError::Encode),
        }
    }

    /// Text of `ids`. Unknown ids are skipped, special tokens where asked.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        self.inner.decode(ids, skip_special).unwrap_or_else(|_| char::REPLACEMENT_CHARACTER.to_string())
    }

    /// Bytes that a token stands for by itself; half a character where it is half a one. `None` for an unknown id.
    pub fn token_bytes(&self, id: u32) -> Option<Vec<u8>> {
        let token = self.inner.id_to_token(id)?;
        if self.inner.get_added_vocabulary().get_added_tokens_decoder().contains_key(&id) {
            return Some(token.into_bytes());
        }
        Some(self.pieces.bytes(&token))
    }

    /// Id of a token by its text in the vocabulary.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The `eos_token` of tokenizer_config.json, for models whose generation_config.json and config.json name none.
    pub fn eos_token_id(&self) -> Option<u32> {
        self.eos_token_id
    }

    /// One more than the largest id. A model's embedding may have more rows, and must not have fewer.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// Whether [`Tokenizer::chat_template`] can render.
    pub fn has_chat_template(&self) -> bool {
        self.templates.default.is_some()
    }

    /// The prompt text for OpenAI-style `messages`, to be encoded without special tokens.
    ///
    /// # Errors
    /// [`TemplateError`] when there is no template, or it refuses the messages or fails on them.
    pub fn chat_template(
        &self,
        messages: &Value,
        tools: Option<&Value>,
        add_generation_prompt: bool,
    ) -> Result<String, TemplateError> {
        self.render(&TemplateInput { messages, tools, add_generation_prompt, variables: None, now: SystemTime::now() })
    }

    /// As [`Tokenizer::chat_template`], with all that a template may be given.
    ///
    /// # Errors
    /// As [`Tokenizer::chat_template`].
    pub fn render(&self, input: &TemplateInput<'_>) -> Result<String, TemplateError> {
        let for_tools = self.templates.tool_use.as_ref().filter(|_| input.tools.is_some());
        match for_tools.or(self.templates.default.as_ref()) {
            Some(template) => template.render(input),
            None => Err(TemplateError::Absent),
        }
    }
}

impl TokenText for Tokenizer {
    fn decode(&self, ids: &[u32]) -> String {
        Tokenizer::decode(self, ids, true)
    }
}

impl Templates {
    /// The file has precedence over the entry, as in transformers.
    fn load(dir: &Path, config: &Map<String, Value>, special: &[(String, String)]) -> Result<Self, TokenizerError> {
        let compile = |path: PathBuf, source: &str| {
            let compiled = ChatTemplate::new(source, special.to_vec());
            compiled.map_err(|source| TokenizerError::Template { path, source })
        };
        let path = dir.join("chat_template.jinja");
        if path.exists() {
            let source =
                std::fs::read_to_string(&path).map_err(|source| TokenizerError::Read { path: path.clone(), source })?;
            return Ok(Templates { default: Some(compile(path, &source)?), tool_use: None });
        }
        let path = dir.join("tokenizer_config.json");
        let wrong = |problem: &str| TokenizerError::Entry { path: path.clone(), problem: problem.to_owned() };
        let mut templates = Templates::default();
        match config.get("chat_template") {
            None | Some(Value::Null) => {}
            Some(Value::String(source)) => templates.default = Some(compile(path.clone(), source)?),
            Some(Value::Array(entries)) => {
                for entry in entries {
                    let text = |key: &str| entry.get(key).and_then(Value::as_str);
                    let (Some(name), Some(source)) = (text("name"), text("template")) else {
                        return Err(wrong("an entry of chat_template has no name or no template"));
                    };
                    match name {
                        "default" => templates.default = Some(compile(path.clone(), source)?),
                        "tool_use" => templates.tool_use = Some(compile(path.clone(), source)?),
                        // Others (such as `rag`) are for callers that ask for them by name, which the API can't.
                        _ => {}
                    }
                }
            }
            Some(_) => return Err(wrong("chat_template is neither a string nor a list")),
        }
        Ok(templates)
    }
}

/// Texts of `bos_token`, `eos_token` and the others, each a string or an object with `content`.
fn special_tokens(config: &Map<String, Value>, map: &Map<String, Value>) -> Vec<(String, String)> {
    let mut tokens: Vec<(String, String)> = Vec::new();
    for (name, value) in config.iter().chain(map) {
        let text = value.as_str().or_else(|| value.get("content").and_then(Value::as_str));
        if let Some(text) = text
            && name.ends_with("_token")
            && tokens.iter().all(|(known, _)| known != name)
        {
            tokens.push((name.clone(), text.to_owned()));
        }
    }
    tokens
}

fn optional_object(path: &Path) -> Result<Map<String, Value>, TokenizerError> {
    match std::fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes).map_err(|source| json_error(path, source)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Map::new()),
        Err(source) => Err(TokenizerError::Read { path: path.to_owned(), source }),
    }
}

fn json_error(path: &Path, source: serde_json::Error) -> TokenizerError {
    TokenizerError::Json { path: path.to_owned(), source }
}

impl Pieces {
    /// Told by the decoder that tokenizer.json describes, which may be nested in a sequence.
    fn of(tokenizer: &Value) -> Self {
        fn mentions(decoder: &Value, kind: &str) -> bool {
            decoder.get("type").and_then(Value::as_str) == Some(kind)
                || decoder
                    .get("decoders")
                    .and_then(Value::as_array)
                    .is_some_and(|all| all.iter().any(|d| mentions(d, kind)))
        }
        let decoder = &tokenizer["decoder"];
        if mentions(decoder, "ByteLevel") {
            Pieces::ByteLevel(byte_level_alphabet())
        } else if mentions(decoder, "Metaspace") || mentions(decoder, "ByteFallback") {
            Pieces::Metaspace
        } else {
            Pieces::Plain
        }
    }

    fn bytes(&self, token: &str) -> Vec<u8> {
        match self {
            Pieces::ByteLevel(alphabet) => {
                let mut bytes = Vec::with_capacity(token.len());
                for c in token.chars() {
                    match alphabet.get(&c) {
                        Some(byte) => bytes.push(*byte),
                        None => bytes.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
                    }
                }
                bytes
            }
            Pieces::Metaspace => {
                let byte = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
                match byte.filter(|hex| hex.len() == 2).and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
                    Some(byte) => vec![byte],
                    None => token.replace('▁', " ").into_bytes(),
                }
            }
            Pieces::Plain => token.as_bytes().to_vec(),
        }
    }
}

/// GPT-2's `bytes_to_unicode`: printable bytes stand for themselves, the others for characters from 256 on.
fn byte_level_alphabet() -> HashMap<char, u8> {
    let mut next = 256;
    (0..=255_u8)
        .map(|byte| match byte {
            b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => (char::from(byte), byte),
            _ => {
                let c = char::from_u32(next).expect("256..324 are characters");
                next += 1;
                (c, byte)
            }
        })
        .collect()
}

/// A tokenizer can't be used.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// A file can't be read.
    #[error("can't read {}", path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A file isn't the JSON that it should be.
    #[error("{} is not valid", path.display())]
    Json {
        /// Which file.
        path: PathBuf,
        /// Where and why.
        #[source]
        source: serde_json::Error,
    },
    /// tokenizer.json describes no tokenizer.
    #[error("{} describes no tokenizer", path.display())]
    Tokenizer {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: tokenizers::Error,
    },
    /// An entry is of the wrong kind.
    #[error("{}: {problem}", path.display())]
    Entry {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// The chat template doesn't compile.
    #[error("{} has a broken chat template", path.display())]
    Template {
        /// Which file.
        path: PathBuf,
        /// Where and why.
        #[source]
        source: TemplateError,
    },
    /// The text can't be encoded.
    #[error("the tokenizer can't encode this text")]
    Encode,
}
