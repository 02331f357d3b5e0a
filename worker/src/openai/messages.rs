//! The messages of a chat request, as the model's chat template wants them: a role and one text each.

use super::error::RequestError;
use super::fields::{Fields, kind};
use super::limits::MESSAGES_MAX;
use serde::Serialize;
use serde_json::Value;

/// Who speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Instructions. OpenAI's newer name for it, `developer`, means the same and is unknown to templates.
    System,
    /// The person.
    User,
    /// The model.
    Assistant,
}

/// One message. Serialises to what chat templates read.
#[derive(Clone, PartialEq, Eq, Serialize)]
pub struct Message {
    /// Who speaks.
    pub role: Role,
    /// What is said.
    pub content: String,
    /// The speaker's name, for templates that show it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// What the model thought before an earlier answer, for templates that show it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reasoning_content: Option<String>,
}

/// Says who speaks and not what: messages never enter a log.
impl std::fmt::Debug for Message {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Message({:?}, {} bytes)", self.role, self.content.len())
    }
}

/// Takes `messages` out of a request.
pub(super) fn take(fields: &mut Fields) -> Result<Vec<Message>, RequestError> {
    let list = fields.list("messages")?.ok_or_else(|| RequestError::Missing { param: "messages".to_owned() })?;
    if list.is_empty() {
        return Err(RequestError::Empty { param: "messages".to_owned() });
    }
    if list.len() > MESSAGES_MAX {
        let param = "messages".to_owned();
        return Err(RequestError::TooMany { param, found: list.len(), unit: "messages", max: MESSAGES_MAX });
    }
    list.into_iter().enumerate().map(|(index, value)| message(format!("messages[{index}]"), value)).collect()
}

fn message(at: String, value: Value) -> Result<Message, RequestError> {
    let mut fields = Fields::of(at, value)?;
    let role = role(&mut fields)?;
    // Absent or empty, these say nothing; with a value they belong to features that this server does not have.
    for name in ["tool_calls", "function_call", "audio", "refusal", "tool_call_id", "annotations"] {
        match fields.value(name) {
            None => {}
            Some(Value::Array(list)) if list.is_empty() => {}
            Some(_) => {
                return Err(RequestError::Unsupported { param: fields.path(name), note: String::new() });
            }
        }
    }
    let message = Message {
        role,
        content: content(&mut fields)?,
        name: fields.string("name")?,
        reasoning_content: fields.string("reasoning_content")?,
    };
    fields.finish()?;
    Ok(message)
}

fn role(fields: &mut Fields) -> Result<Role, RequestError> {
    let param = fields.path("role");
    let text = fields.string("role")?.ok_or_else(|| RequestError::Missing { param: param.clone() })?;
    match text.as_str() {
        "system" | "developer" => Ok(Role::System),
        "user" => Ok(Role::User),
        "assistant" => Ok(Role::Assistant),
        "tool" | "function" => {
            Err(RequestError::Unsupported { param, note: " as tool or function: tools are not supported".to_owned() })
        }
        _ => Err(RequestError::NotOneOf { param, allowed: "system, developer, user, assistant".to_owned() }),
    }
}

/// A string, or parts that are all text: parts are joined by line breaks.
fn content(fields: &mut Fields) -> Result<String, RequestError> {
    let param = fields.path("content");
    match fields.value("content") {
        None => Err(RequestError::Missing { param }),
        Some(Value::String(text)) => Ok(text),
        Some(Value::Array(parts)) => {
            let parts = parts.into_iter().enumerate().map(|(index, part)| text_part(format!("{param}[{index}]"), part));
            Ok(parts.collect::<Result<Vec<_>, _>>()?.join("\n"))
        }
        Some(other) => {
            Err(RequestError::WrongType { param, expected: "a string or an array of text parts", found: kind(&other) })
        }
    }
}

fn text_part(at: String, part: Value) -> Result<String, RequestError> {
    let mut fields = Fields::of(at, part)?;
    let param = fields.path("type");
    match fields.string("type")?.as_deref() {
        Some("text") => {}
        Some("image_url" | "input_audio" | "file" | "refusal" | "video_url" | "audio_url") => {
            return Err(RequestError::Unsupported { param, note: ": only parts of type text are".to_owned() });
        }
        Some(_) => return Err(RequestError::NotOneOf { param, allowed: "text".to_owned() }),
        None => return Err(RequestError::Missing { param }),
    }
    let text = fields.string("text")?.ok_or_else(|| RequestError::Missing { param: fields.path("text") })?;
    fields.finish()?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn messages(json: &str) -> Result<Vec<Message>, RequestError> {
        take(&mut Fields::parse(&format!("{{\"messages\":{json}}}")).expect("JSON"))
    }

    #[test]
    fn strings_and_text_parts_become_one_text_each() {
        let parsed = messages(
            r#"[{"role":"developer","content":"be kind"},
                {"role":"user","name":"Ada","content":[{"type":"text","text":"a"},{"type":"text","text":"b"}]},
                {"role":"assistant","content":"","tool_calls":[],"refusal":null,"annotations":[]}]"#,
        )
        .expect("valid messages");
        assert_eq!(parsed[0].role, Role::System);
        assert_eq!((parsed[1].content.as_str(), parsed[1].name.as_deref()), ("a\nb", Some("Ada")));
        assert_eq!(serde_json::to_string(&parsed[2]).expect("serialises"), r#"{"role":"assistant","content":""}"#);
    }

    #[test]
    fn each_wrong_message_names_its_place() {
        for (json, param) in [
            (r#"[]"#, "messages"),
            (r#"{}"#, "messages"),
            (r#"["hi"]"#, "messages[0]"),
            (r#"[{"content":"x"}]"#, "messages[0].role"),
            (r#"[{"role":"robot","content":"x"}]"#, "messages[0].role"),
            (r#"[{"role":"tool","content":"x"}]"#, "messages[0].role"),
            (r#"[{"role":"user"}]"#, "messages[0].content"),
            (r#"[{"role":"user","content":3}]"#, "messages[0].content"),
            (r#"[{"role":"user","content":[{"type":"image_url","image_url":{}}]}]"#, "messages[0].content[0].type"),
            (r#"[{"role":"user","content":[{"type":"text"}]}]"#, "messages[0].content[0].text"),
            (r#"[{"role":"user","content":"x","tool_calls":[1]}]"#, "messages[0].tool_calls"),
            (r#"[{"role":"user","content":"x","mood":"good"}]"#, "messages[0].mood"),
        ] {
            let error = messages(json).expect_err(json);
            assert_eq!(error.param(), Some(param), "{json}: {error}");
        }
    }

    #[test]
    fn no_error_repeats_what_was_said() {
        for json in [r#"[{"role":"user","content":{"secret":1}}]"#, r#"[{"role":"secret","content":"secret"}]"#] {
            assert!(!messages(json).expect_err(json).to_string().contains("secret"));
        }
    }
}
