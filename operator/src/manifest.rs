//! A manifest file's text to the `DisaggregatedModel` in it, with every mistake named by field and line.
//!
//! Knows YAML and documents; which fields are right is `validate`'s. Reading the file is the caller's.

use crate::{Validated, Violation, location, validate};
use baton_crds::{API_VERSION, DisaggregatedModel, KIND};
use serde::Deserialize as _;
use serde_json::Value;
use std::fmt;

/// Longest manifest file that is read. The API server takes objects of at most 1.5 MiB, and a file holds a few.
pub const MANIFEST_BYTES_MAX: u64 = 4 * 1024 * 1024;

/// Mistakes of one object that are told. Nobody mends more in one go, and to find the line of each the file is read again.
const VIOLATIONS_MAX: usize = 100;

/// A manifest that is right.
#[derive(Clone, Debug)]
pub struct Manifest {
    /// The object as it stands in the file, defaults filled in.
    pub model: DisaggregatedModel,
    /// The same in types that cannot be wrong.
    pub validated: Validated,
}

/// One violation, and the line of the file on which it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Located {
    /// Counted from 1; absent where nothing in the file stands for it.
    pub line: Option<usize>,
    /// What is wrong.
    pub violation: Violation,
}

impl fmt::Display for Located {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            Some(line) => write!(f, "{line}: {}", self.violation),
            None => write!(f, " {}", self.violation),
        }
    }
}

/// Why a file gives no manifest.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// Not YAML, or YAML that no Kubernetes object can be (a field twice, say).
    #[error("document {document} is not a Kubernetes object: {source}")]
    NotYaml {
        /// Which document of the file, from 1.
        document: usize,
        /// The parser's words, with the line.
        #[source]
        source: serde_yaml::Error,
    },
    /// No document is a `DisaggregatedModel`.
    #[error("no {KIND} in it, only {}", if found.is_empty() { "empty documents".to_owned() } else { found.join(", ") })]
    NoModel {
        /// What the documents are.
        found: Vec<String>,
    },
    /// Several are, and one was asked for.
    #[error("{} {KIND}s in it ({}): keep one, the others in files of their own", names.len(), names.join(", "))]
    SeveralModels {
        /// Their names.
        names: Vec<String>,
    },
    /// One is, and is wrong.
    #[error("{}", violations.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    Invalid {
        /// Everything that is wrong, in the order of lines.
        violations: Vec<Located>,
    },
}

/// One `DisaggregatedModel` of a file.
#[derive(Debug)]
pub struct Entry {
    /// Its name, as far as it has one.
    pub name: String,
    /// The manifest, or everything that is wrong with it.
    pub result: Result<Manifest, Vec<Located>>,
}

/// Reads every `DisaggregatedModel` of a file; other objects beside them are passed over.
///
/// # Errors
/// When a document is not YAML, or when there is no `DisaggregatedModel` at all.
pub fn read_all(text: &str) -> Result<Vec<Entry>, ReadError> {
    let mut entries = Vec::new();
    let mut others = Vec::new();
    for (document, deserializer) in serde_yaml::Deserializer::from_str(text).enumerate() {
        let not_yaml = |source| ReadError::NotYaml { document: document + 1, source };
        // By way of YAML's own value, which refuses a field that is there twice.
        let object = serde_yaml::Value::deserialize(deserializer).map_err(not_yaml)?;
        let object: Value = serde_yaml::from_value(object).map_err(not_yaml)?;
        if object.is_null() {
            continue;
        }
        if is_ours(&object) {
            let name = object.pointer("/metadata/name").and_then(Value::as_str).unwrap_or("(no name)").to_owned();
            let result = validate::validate_object(&object)
                .map(|(model, validated)| Manifest { model, validated })
                .map_err(|violations| located(text, document, violations));
            entries.push(Entry { name, result });
        } else {
            let field = |name| object.get(name).and_then(Value::as_str);
            let kind = field("kind").map(|kind| format!("{} {kind}", field("apiVersion").unwrap_or("(no apiVersion)")));
            others.push(kind.unwrap_or_else(|| format!("a document without kind (expected {API_VERSION} {KIND})")));
        }
    }
    if entries.is_empty() { Err(ReadError::NoModel { found: others }) } else { Ok(entries) }
}

/// Reads the only `DisaggregatedModel` of a file.
///
/// # Errors
/// See [`ReadError`].
pub fn read_one(text: &str) -> Result<Manifest, ReadError> {
    let mut entries = read_all(text)?;
    match entries.len() {
        1 => entries.remove(0).result.map_err(|violations| ReadError::Invalid { violations }),
        _ => Err(ReadError::SeveralModels { names: entries.into_iter().map(|entry| entry.name).collect() }),
    }
}

/// By kind alone, or by group where the kind is misspelled: both are then told what is wrong.
fn is_ours(object: &Value) -> bool {
    let field = |name| object.get(name).and_then(Value::as_str).unwrap_or_default();
    let group = API_VERSION.split('/').next().unwrap_or_default();
    field("kind") == KIND || field("apiVersion").split('/').next() == Some(group)
}

fn located(text: &str, document: usize, mut violations: Vec<Violation>) -> Vec<Located> {
    let untold = violations.len().saturating_sub(VIOLATIONS_MAX);
    violations.truncate(VIOLATIONS_MAX);
    let mut located: Vec<Located> = violations
        .into_iter()
        .map(|violation| Located { line: location::line(text, document, &violation.path), violation })
        .collect();
    located.sort_by_key(|one| one.line);
    if untold > 0 {
        let violation = Violation::new("...", format!("{untold} more mistakes are not listed"), "");
        located.push(Located { line: None, violation });
    }
    located
}

#[cfg(test)]
mod tests {
    use super::*;

    const RIGHT: &str = "apiVersion: baton.dev/v1alpha1\nkind: DisaggregatedModel\nmetadata:\n  name: tiny\nspec:\n  model:\n    uri: pvc://models/tiny\n";

    fn wrong(text: &str) -> Vec<String> {
        match read_one(text) {
            Err(ReadError::Invalid { violations }) => violations.iter().map(ToString::to_string).collect(),
            other => panic!("expected violations, found {other:?}"),
        }
    }

    #[test]
    fn the_only_model_of_a_file_is_found_among_other_objects() {
        let text = format!("---\n# nothing\n---\napiVersion: v1\nkind: Secret\nmetadata: {{name: s}}\n---\n{RIGHT}");
        assert_eq!(read_one(&text).expect("one model").validated.name, "tiny");
    }

    #[test]
    fn several_models_or_none_are_listed() {
        let several = read_one(&format!("{RIGHT}---\n{RIGHT}")).expect_err("two models").to_string();
        assert!(several.contains("2 DisaggregatedModels in it (tiny, tiny)"), "{several}");
        let none = read_one("apiVersion: v1\nkind: Pod\n").expect_err("no model").to_string();
        assert_eq!(none, "no DisaggregatedModel in it, only v1 Pod");
        assert!(read_one("").expect_err("nothing").to_string().contains("empty documents"));
    }

    #[test]
    fn every_mistake_is_told_at_once_with_its_line() {
        let text = format!(
            "{RIGHT}    servedname: x\n  disaggregation:\n    policy: Sometimes\n  prefill: {{replicas: 2,\n    kvCacheMemory: lots}}\n"
        );
        assert_eq!(
            wrong(&text),
            [
                "8: spec.model.servedname: unknown field: one of cache, credentialsSecretRef, endpoint, region, revision, servedName, uri",
                "10: spec.disaggregation.policy: unknown value \"Sometimes\": one of Always, Conditional, Never",
            ],
            "the memory is told once the object has a type"
        );
        let text = format!("{RIGHT}    servedname: x\n  prefill: {{replicas: 2,\n    kvCacheMemory: lots}}\n");
        assert_eq!(
            wrong(&text),
            [
                "8: spec.model.servedname: unknown field: one of cache, credentialsSecretRef, endpoint, region, revision, servedName, uri",
                "10: spec.prefill.kvCacheMemory: \"lots\": not an amount of memory: a whole number of at most 7 digits with Ki, Mi, Gi, Ti, k, M, G or T, such as 256Mi",
            ]
        );
    }

    #[test]
    fn of_very_many_mistakes_a_hundred_are_told_and_the_rest_counted() {
        let fields: String = (0..250).map(|field| format!("  wrong{field}: 1\n")).collect();
        let told = wrong(&format!("{RIGHT}{fields}"));
        assert_eq!(told.len(), VIOLATIONS_MAX + 1);
        assert_eq!(told.last().map(String::as_str), Some(" ...: 150 more mistakes are not listed"));
    }

    #[test]
    fn a_wrong_version_or_kind_is_told_apart_from_another_object() {
        assert_eq!(
            wrong(&RIGHT.replace("v1alpha1", "v2")),
            ["1: apiVersion: unknown value \"baton.dev/v2\": one of baton.dev/v1alpha1"]
        );
        assert_eq!(
            wrong(&RIGHT.replace("DisaggregatedModel", "DisagregatedModel")),
            ["2: kind: unknown value \"DisagregatedModel\": one of DisaggregatedModel"]
        );
    }

    #[test]
    fn a_field_that_is_there_twice_is_refused() {
        let twice = read_one(&format!("{RIGHT}    uri: pvc://other\n")).expect_err("twice").to_string();
        assert!(twice.contains("duplicate") && twice.contains("uri"), "{twice}");
    }

    #[test]
    fn broken_yaml_is_told_with_its_line() {
        let broken = read_one("a: [1\nb: 2\n").expect_err("no YAML").to_string();
        assert!(broken.contains("line 2") || broken.contains("line 1"), "{broken}");
    }
}
