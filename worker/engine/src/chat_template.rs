//! A model's chat template: messages to the prompt text that the model was trained on.
//!
//! Knows the dialect of Hugging Face's `apply_chat_template` (Jinja2 with trimmed blocks, loop controls, Python's
//! methods and JSON, and the functions `raise_exception` and `strftime_now`). Must not know files or tokens. Where
//! Python's printing of `None` and `True` differs from minijinja's, `{{ }}` follows Python; inside `~` it does not.

mod python;

use std::time::SystemTime;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value};
use minijinja::{Environment, Error, ErrorKind, context};
use serde_json::Value as Json;

/// Template instructions that one prompt may take. A long conversation takes some hundred a message; a template that
/// loops without end stops here, after about a second.
const FUEL: u64 = 20_000_000;

/// Name under which errors speak of the template.
const NAME: &str = "chat_template";

/// A compiled template.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    special_tokens: Vec<(String, String)>,
}

/// What a prompt is made of.
#[derive(Clone, Debug)]
pub struct TemplateInput<'a> {
    /// OpenAI-style messages, an array of objects.
    pub messages: &'a Json,
    /// OpenAI-style tools.
    pub tools: Option<&'a Json>,
    /// End with the opening of the assistant's answer.
    pub add_generation_prompt: bool,
    /// Further variables that this model's template reads (`enable_thinking` and such).
    pub variables: Option<&'a serde_json::Map<String, Json>>,
    /// What `strftime_now` takes for now.
    pub now: SystemTime,
}

/// A template can't be used.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// The model has none.
    #[error("the model has no chat template (neither chat_template.jinja nor chat_template in tokenizer_config.json)")]
    Absent,
    /// It is no valid template.
    #[error("{NAME} line {line} is not valid")]
    Syntax {
        /// Where.
        line: usize,
        /// Why.
        #[source]
        source: Error,
    },
    /// The template refuses the messages. Its text may quote them: for the client who sent them, not for logs.
    #[error("{message}")]
    Refused {
        /// What the template says.
        message: String,
    },
    /// The template fails on these messages.
    #[error("{NAME} line {line} can't render these messages: {reason}")]
    Render {
        /// Where.
        line: usize,
        /// What kind of failure; without the values that it happened on.
        reason: String,
    },
}

/// Carries the text of `raise_exception` through minijinja's error.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

impl ChatTemplate {
    /// Compiles `source`. `special_tokens` are names and texts of those that templates refer to (`bos_token`).
    ///
    /// # Errors
    /// [`TemplateError::Syntax`] with the line.
    pub fn new(source: &str, special_tokens: Vec<(String, String)>) -> Result<Self, TemplateError> {
        let mut environment = Environment::new();
        let mut syntax = SyntaxConfig::builder();
        syntax.trim_blocks(true).lstrip_blocks(true);
        environment.set_syntax(syntax.build().expect("the default delimiters are valid"));
        // With it, errors would carry the template's variables, which are the prompt.
        environment.set_debug(false);
        environment.set_fuel(Some(FUEL));
        environment.set_formatter(python::write);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_filter("tojson", python::to_json);
        environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, "refused").with_source(Raised(message)))
        });
        environment
            .add_template_owned(NAME, without_training_tags(source))
            .map_err(|source| TemplateError::Syntax { line: source.line().unwrap_or(0), source })?;
        Ok(ChatTemplate { environment, special_tokens })
    }

    /// The prompt for these messages.
    ///
    /// # Errors
    /// [`TemplateError::Refused`] when the template itself objects, [`TemplateError::Render`] when it fails.
    pub fn render(&self, input: &TemplateInput<'_>) -> Result<String, TemplateError> {
        let now = input.now;
        let strftime_now = Value::from_function(move |format: String| python::strftime(&format, now));
        let tokens = Value::from_pairs(self.special_tokens.iter().map(|(name, text)| (name.as_str(), text.as_str())));
        let variables = input.variables.map(|variables| Value::from(Serde(variables))).unwrap_or_default();
        let own = context! {
            messages => Value::from(Serde(normalised(input.messages))),
            tools => input.tools.map(|tools| Value::from(Serde(tools))),
            documents => None::<Value>,
            add_generation_prompt => input.add_generation_prompt,
            strftime_now => strftime_now,
        };
        let template = self.environment.get_template(NAME).expect("compiled in `new`");
        template.render(context! { ..own, ..variables, ..tokens }).map_err(|error| {
            let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(&error);
            while let Some(error) = cause {
                if let Some(Raised(message)) = error.downcast_ref() {
                    return TemplateError::Refused { message: message.clone() };
                }
                cause = error.source();
            }
            TemplateError::Render { line: error.line().unwrap_or(0), reason: error.kind().to_string() }
        })
    }
}

/// Names that a message's reasoning goes by; the first is the one that templates read.
const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// Messages as templates expect them. As transformers 5 does: entries that are null are left out (clients send
/// `"content": null` beside tool calls, and templates would print it), and reasoning is found under the name that
/// templates read.
fn normalised(messages: &Json) -> Json {
    let mut messages = messages.clone();
    for message in messages.as_array_mut().into_iter().flatten() {
        if let Some(message) = message.as_object_mut() {
            message.retain(|_, value| !value.is_null());
            if let Some(reasoning) = REASONING.iter().find_map(|name| message.get(*name)).cloned() {
                message.insert(REASONING[0].to_owned(), reasoning.clone());
                message.entry(REASONING[1]).or_insert(reasoning);
            }
        }
    }
    messages
}

/// Replaces `{% generation %}` and its end, which mark the assistant's tokens for training, by an `if` that is always
/// taken: the whitespace control of the tags stays as it is written.
fn without_training_tags(source: &str) -> String {
    let mut output = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let Some(length) = rest[start..].find("%}") else { break };
        let tag = &rest[start..start + length + 2];
        let keyword = tag[2..tag.len() - 2].trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+');
        output.push_str(&rest[..start]);
        match keyword {
            "generation" => output.push_str(&tag.replace("generation", "if true")),
            "endgeneration" => output.push_str(&tag.replace("endgeneration", "endif")),
            _ => output.push_str(tag),
        }
        rest = &rest[start + length + 2..];
    }
    output.push_str(rest);
    output
}

/// Keyword arguments of `tojson`, as `json.dumps` has them.
fn json_style(indent: Option<Value>, kwargs: &Kwargs) -> Result<python::JsonStyle, Error> {
    let indent = match indent {
        Some(indent) => Some(indent),
        None => kwargs.get("indent")?,
    };
    let separators: Option<Vec<String>> = kwargs.get("separators")?;
    let style = python::JsonStyle {
        indent: indent.filter(|indent| !indent.is_none()).map(usize::try_from).transpose()?,
        separators: match separators.as_deref() {
            Some([item, key]) => Some((item.clone(), key.clone())),
            Some(_) => return Err(Error::new(ErrorKind::InvalidOperation, "separators are two strings")),
            None => None,
        },
        ensure_ascii: kwargs.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        sort_keys: kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
    };
    kwargs.assert_all_used()?;
    Ok(style)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn render(source: &str, messages: Json) -> Result<String, TemplateError> {
        let tokens = vec![("bos_token".to_owned(), "<s>".to_owned())];
        ChatTemplate::new(source, tokens)?.render(&TemplateInput {
            messages: &messages,
            tools: None,
            add_generation_prompt: true,
            variables: json!({"enable_thinking": false}).as_object(),
            now: SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(951_827_696),
        })
    }

    #[test]
    fn templates_see_what_transformers_shows_them() {
        let cases = [
            ("{{ bos_token }}{{ eos_token }}{{ add_generation_prompt }}{{ tools }}", "<s>TrueNone"),
            ("{% if enable_thinking is defined and enable_thinking is false %}off{% endif %}", "off"),
            ("{{ strftime_now('%d %b %Y, %A %H:%M:%S (%j) 100%%') }}", "29 Feb 2000, Tuesday 12:34:56 (060) 100%"),
            ("  {% if true %}\nx\n  {% endif %}\ny", "x\ny"),
            ("{%- generation -%}\n a {% endgeneration %}", "a "),
            ("{{ messages[0] }}", "{'role': 'user', 'content': \"it's\", 'n': [1, None, 2.5]}"),
            ("{{ messages[0] | tojson }}", "{\"role\": \"user\", \"content\": \"it's\", \"n\": [1, null, 2.5]}"),
            ("{{ messages[0].n | tojson(indent=2) }}", "[\n  1,\n  null,\n  2.5\n]"),
            ("{{ '<é>' | tojson }}{{ '<é🦀>' | tojson(ensure_ascii=true) }}", "\"<é>\"\"<\\u00e9\\ud83e\\udd80>\""),
            ("{{ {'b': 1, 'a': {}} | tojson(sort_keys=true, separators=(',', ':')) }}", "{\"a\":{},\"b\":1}"),
            ("{{ ' a b '.strip().split(' ')[::-1] | join('|') }}", "b|a"),
        ];
        for (source, expected) in cases {
            let messages = json!([{"role": "user", "content": "it's", "n": [1, null, 2.5]}]);
            assert_eq!(render(source, messages).expect("renders"), expected, "{source}");
        }
    }

    #[test]
    fn a_refusal_is_the_templates_own_words() {
        let source = "{% if messages[0].role != 'user' %}{{ raise_exception('start with the user') }}{% endif %}";
        match render(source, json!([{"role": "system"}])) {
            Err(TemplateError::Refused { message }) => assert_eq!(message, "start with the user"),
            other => panic!("expected a refusal, got {other:?}"),
        }
    }

    #[test]
    fn a_broken_template_is_refused_with_its_line_and_a_failing_one_without_the_messages() {
        let error = render("\n\n{% for %}", json!([])).expect_err("not a template");
        assert_eq!(error.to_string(), "chat_template line 3 is not valid");
        let error = render("\n{{ messages[0].content + 1 }}", json!([{"content": "secret"}])).expect_err("can't add");
        let text = format!("{error} {error:?}");
        assert!(text.contains("line 2") && !text.contains("secret"), "{text}");
    }

    #[test]
    fn a_template_without_end_stops() {
        let source = "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}";
        assert!(matches!(render(source, json!([])), Err(TemplateError::Render { .. })));
    }
}
