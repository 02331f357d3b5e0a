//! An amount as Kubernetes takes it: a number, or a string with a unit.

use crate::rules;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::borrow::Cow;

/// An amount (`resource.Quantity`) as it stands in a manifest: `2`, `"500m"`, `16Gi`. Any JSON reads, so that no stored object
/// can keep a program from reading it; the schema refuses what is no amount.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Amount(pub Value);

impl Amount {
    /// The amount in Kubernetes' own spelling: a string. None where the schema would have refused it.
    pub fn text(&self) -> Option<String> {
        match &self.0 {
            Value::String(text) => Some(text.clone()),
            Value::Number(number) => Some(number.to_string()),
            Value::Null | Value::Bool(_) | Value::Array(_) | Value::Object(_) => None,
        }
    }
}

impl JsonSchema for Amount {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "Amount".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "x-kubernetes-int-or-string": true,
            "minimum": 0,
            "maxLength": rules::AMOUNT_CHARS_MAX,
            "pattern": rules::AMOUNT_PATTERN,
        })
    }
}
