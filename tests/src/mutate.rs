//! Manifests with something changed in them, drawn from the definition's own schema: wrong types, values at and beyond every
//! bound, null, missing and unknown fields, strange text, contradictions, and overlays that no pod can have.
//!
//! Knows the schema and a list of what people and machines write by mistake; whether a mutant is right is for others to say. The
//! same seed gives the same mutants.

use crate::operator::manifest::with;
use serde_json::{Map, Value, json};

/// Small numbers in a row that look random (splitmix64), the same for the same seed.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// The row of a seed.
    pub fn new(seed: u64) -> Self {
        Rng(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `count`, which is at least 1.
    pub fn below(&mut self, count: usize) -> usize {
        (self.next() % count as u64) as usize
    }

    /// True once in so many times.
    pub fn once_in(&mut self, times: usize) -> bool {
        self.below(times) == 0
    }

    /// One of several.
    pub fn one<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[self.below(of.len())]
    }
}

/// A field of the schema. In its path `[]` is an entry of a list and `{}` a value of a map.
#[derive(Clone, Debug)]
pub struct Field {
    /// From the object's top.
    pub path: Vec<String>,
    /// What the schema says of it.
    pub schema: Value,
    /// Whether the object around it must have it.
    pub is_required: bool,
}

impl Field {
    /// Its path as people write it: `spec.prefill.env[0].name`.
    pub fn name(&self) -> String {
        self.path.join(".").replace(".[]", "[0]")
    }

    /// The example in its description, where it has one.
    pub fn example(&self) -> Option<Value> {
        example(&self.schema)
    }
}

/// The schema of a DisaggregatedModel as it is shipped.
pub fn schema() -> Value {
    let mut definition = serde_json::to_value(baton_crds::definition::definition()).expect("a definition is JSON");
    definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"].take()
}

/// Every field of `spec`, those of lists' entries and maps' values included.
pub fn fields(schema: &Value) -> Vec<Field> {
    let mut fields = Vec::new();
    collect(&mut vec!["spec".to_owned()], &schema["properties"]["spec"], &mut fields);
    fields
}

fn collect(path: &mut Vec<String>, schema: &Value, fields: &mut Vec<Field>) {
    let mut visit = |step: &str, schema: &Value, is_required: bool| {
        path.push(step.to_owned());
        fields.push(Field { path: path.clone(), schema: schema.clone(), is_required });
        collect(path, schema, fields);
        path.pop();
    };
    let required = schema["required"].as_array().cloned().unwrap_or_default();
    for (name, child) in schema["properties"].as_object().into_iter().flatten() {
        visit(name, child, required.contains(&json!(name)));
    }
    if schema["items"].is_object() {
        visit("[]", &schema["items"], false);
    }
    if schema["additionalProperties"].is_object() {
        visit("{}", &schema["additionalProperties"], false);
    }
}

/// The value between the backquotes of ``Example: `...` `` in a description.
fn example(schema: &Value) -> Option<Value> {
    let (_, rest) = schema["description"].as_str()?.split_once("Example: `")?;
    let text = &rest[..rest.find('`')?];
    serde_yaml::from_str(text).ok()
}

/// A value that the schema by itself allows, as small as can be: the example, or required fields with theirs.
fn fitting(schema: &Value) -> Value {
    if let Some(example) = example(schema) {
        return example;
    }
    if let Some(first) = schema["enum"].get(0) {
        return first.clone();
    }
    match schema["type"].as_str() {
        Some("integer") => schema["minimum"].as_f64().map_or(json!(1), |least| json!(least as i64)),
        Some("string") => json!("a"),
        Some("boolean") => json!(true),
        Some("array") => json!([]),
        Some("object") => entry(schema),
        _ => json!("1"),
    }
}

/// An object with its required fields.
fn entry(schema: &Value) -> Value {
    if schema["type"] != "object" {
        return fitting(schema);
    }
    let required = schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str);
    required.map(|name| (name.to_owned(), fitting(&schema["properties"][name]))).collect::<Map<_, _>>().into()
}

/// The place of a path in an object; what is missing on the way is made as the schema has it. None where the object has
/// something else on the way.
fn place<'a>(object: &'a mut Value, schema: &Value, path: &[String]) -> Option<&'a mut Value> {
    let Some((step, rest)) = path.split_first() else { return Some(object) };
    let (below, next) = match step.as_str() {
        "[]" => {
            let list = object.as_array_mut()?;
            if list.is_empty() {
                list.push(entry(&schema["items"]));
            }
            (&schema["items"], list.first_mut()?)
        }
        "{}" => {
            let map = object.as_object_mut()?;
            if map.is_empty() {
                map.insert("example.com/key".to_owned(), fitting(&schema["additionalProperties"]));
            }
            (&schema["additionalProperties"], map.values_mut().next()?)
        }
        name => {
            let below = &schema["properties"][name];
            let made = match below["type"].as_str() {
                Some("array") => json!([]),
                Some("object") => entry(below),
                _ => Value::Null,
            };
            (below, object.as_object_mut()?.entry(name).or_insert(made))
        }
    };
    place(next, below, rest)
}

/// Sets a field of an object, with what must be around it. False where the object has something else on the way.
pub fn set(object: &mut Value, schema: &Value, path: &[String], value: Value) -> bool {
    place(object, schema, path).map(|place| *place = value).is_some()
}

/// A changed manifest.
#[derive(Clone, Debug)]
pub struct Mutant {
    /// The manifest.
    pub manifest: Value,
    /// What was changed, for whoever reads why a test failed.
    pub changes: Vec<String>,
}

/// Makes mutants.
pub struct Mutator {
    schema: Value,
    fields: Vec<Field>,
    /// Draws; also for whoever decides what becomes of a mutant, so that one seed says it all.
    pub rng: Rng,
}

impl Mutator {
    /// The mutants of a seed.
    pub fn new(seed: u64) -> Self {
        let schema = schema();
        Mutator { fields: fields(&schema), schema, rng: Rng::new(seed) }
    }

    /// `base` with one to three changes.
    pub fn mutant(&mut self, base: &Value) -> Mutant {
        let mut mutant = Mutant { manifest: base.clone(), changes: Vec::new() };
        for _ in 0..=self.rng.below(3) {
            let change = match self.rng.below(10) {
                0..=5 => self.change_field(&mut mutant.manifest),
                6 => self.change_fields_there(&mut mutant.manifest),
                7 => self.lay_over(&mut mutant.manifest, CONTRADICTIONS),
                8 => self.lay_over_role(&mut mutant.manifest),
                _ => self.lay_over(&mut mutant.manifest, REFERENCES),
            };
            mutant.changes.push(change);
        }
        mutant
    }

    /// The same for a definition that checks nothing: whole branches are something else, too.
    pub fn wild_mutant(&mut self, base: &Value) -> Mutant {
        let mut mutant = self.mutant(base);
        if self.rng.once_in(3) {
            let name = self.rng.one(&["spec", "spec", "spec.model", "spec.prefill", "spec.decode", "spec.engine"]);
            let path: Vec<String> = name.split('.').map(str::to_owned).collect();
            let value = self.junk();
            mutant.changes.push(format!("{name} = {}", short(&value)));
            set(&mut mutant.manifest, &self.schema, &path, value);
        }
        mutant
    }

    fn change_field(&mut self, manifest: &mut Value) -> String {
        let field = self.rng.one(&self.fields).clone();
        let value = self.value_for(&field.schema);
        let done = set(manifest, &self.schema, &field.path, value.clone());
        format!("{} = {}{}", field.name(), short(&value), if done { "" } else { " (no such place)" })
    }

    /// Takes a field away that is there, or puts one beside it that nobody knows.
    fn change_fields_there(&mut self, manifest: &mut Value) -> String {
        let mut at = manifest["spec"].as_object_mut();
        let mut name = "spec".to_owned();
        while let Some(map) = at {
            let keys: Vec<String> = map.keys().cloned().collect();
            if keys.is_empty() || self.rng.once_in(3) {
                let unknown =
                    (*self.rng.one(&["unknown", "Replicas", "replica", "ünknown", "a.b", "", "$ref"])).to_owned();
                map.insert(unknown.clone(), self.junk());
                return format!("{name}.{unknown:?} added");
            }
            let key = self.rng.one(&keys).clone();
            name = format!("{name}.{key}");
            if self.rng.once_in(3) || !map[&key].is_object() {
                map.remove(&key);
                return format!("{name} removed");
            }
            at = map.get_mut(&key).and_then(Value::as_object_mut);
        }
        "nothing: spec is no map".to_owned()
    }

    fn lay_over(&mut self, manifest: &mut Value, patches: &[&str]) -> String {
        let text: &&str = self.rng.one(patches);
        let patch: Value = serde_json::from_str(text).expect("the tables are JSON");
        *manifest = with(manifest.take(), &json!({ "spec": patch }));
        format!("spec: {text}")
    }

    /// What the schema leaves open: volumes, mounts, the pod template.
    fn lay_over_role(&mut self, manifest: &mut Value) -> String {
        let role = *self.rng.one(&["prefill", "decode"]);
        let patch = match self.rng.below(6) {
            0 => json!({"podTemplate": {"spec": {"schedulerName": "x".repeat(20_000)}}}),
            1 => json!({"podTemplate": {"spec": nested(60)}}),
            2 => json!({"podTemplate": {"spec": self.junk()}}),
            3 => {
                let field = *self.rng.one(&[
                    "containers",
                    "initContainers",
                    "volumes",
                    "affinity",
                    "securityContext",
                    "tolerations",
                ]);
                json!({"podTemplate": {"spec": {field: self.junk()}}})
            }
            _ => {
                let text: &&str = self.rng.one(OVERLAYS);
                serde_json::from_str(text).expect("the table is JSON")
            }
        };
        let said = format!("spec.{role}: {}", short(&patch));
        *manifest = with(manifest.take(), &json!({"spec": {role: patch}}));
        said
    }

    /// A value for a field: one in three is right.
    fn value_for(&mut self, schema: &Value) -> Value {
        match self.rng.below(3) {
            0 => self.right(schema),
            1 => self.beyond(schema),
            _ => self.junk(),
        }
    }

    fn right(&mut self, schema: &Value) -> Value {
        if let Some(values) = schema["enum"].as_array() {
            return self.rng.one(values).clone();
        }
        match schema["type"].as_str() {
            Some("integer") => {
                let least = schema["minimum"].as_f64().unwrap_or_default() as i64;
                let most = schema["maximum"].as_f64().map_or(i64::from(i32::MAX), |most| most as i64);
                let step = schema["multipleOf"].as_f64().map_or(1, |step| step as i64);
                let near = least + self.rng.below(8) as i64;
                json!(*self.rng.one(&[least, most, near.min(most)]) / step * step)
            }
            Some("array") if schema["items"].is_object() => {
                let one = entry(&schema["items"]);
                self.rng.one(&[json!([]), json!([one])]).clone()
            }
            _ => fitting(schema),
        }
    }

    /// A value of the right type, at a bound or past it.
    fn beyond(&mut self, schema: &Value) -> Value {
        if schema["enum"].is_array() {
            let word = fitting(schema).as_str().unwrap_or_default().to_owned();
            let of = [word.to_lowercase(), word.to_uppercase(), format!(" {word}"), format!("{word}\n"), String::new()];
            return json!(self.rng.one(&of));
        }
        let count = |key: &str| schema[key].as_u64().and_then(|count| usize::try_from(count).ok());
        match schema["type"].as_str() {
            Some("integer") => {
                let least = schema["minimum"].as_f64().unwrap_or_default() as i64;
                let most = schema["maximum"].as_f64().map_or(i64::from(i32::MAX), |most| most as i64);
                let of = [
                    json!(least - 1),
                    json!(most + 1),
                    json!(i64::MIN),
                    json!(i64::MAX),
                    json!(u64::MAX),
                    json!(1e300),
                    json!(0.5),
                    json!(2.0),
                ];
                self.rng.one(&of).clone()
            }
            Some("string") => {
                let most = count("maxLength").unwrap_or(64);
                let least = count("minLength").unwrap_or(0);
                let length = *self.rng.one(&[least, least.saturating_sub(1), most, most + 1, 4 * most]);
                // Of two bytes each, so that who counts bytes is found out.
                let letter = *self.rng.one(&["a", "a", "ä"]);
                json!(letter.repeat(length))
            }
            Some("array") => {
                let most = count("maxItems").unwrap_or(16);
                let one = entry(&schema["items"]);
                // The same entry several times has the same key several times.
                json!(vec![one; *self.rng.one(&[2, most, most + 1])])
            }
            Some("object") if schema["additionalProperties"].is_object() => {
                let most = count("maxProperties").unwrap_or(16);
                let value = fitting(&schema["additionalProperties"]);
                let keys =
                    ["cpu", "", "a b", "example.com/", "kubernetes.io/arch", "nvidia.com/gpu", "baton.dev/model", "ä"];
                let many = *self.rng.one(&[1, 1, 1, most + 1]);
                (0..many)
                    .map(|number| {
                        (
                            if many == 1 { (*self.rng.one(&keys)).to_owned() } else { format!("k{number}") },
                            value.clone(),
                        )
                    })
                    .collect::<Map<_, _>>()
                    .into()
            }
            Some("object") => json!({}),
            // Amounts.
            _ => json!(self.rng.one(AMOUNTS)),
        }
    }

    /// Something that nobody means.
    fn junk(&mut self) -> Value {
        match self.rng.below(18) {
            0..=2 => Value::Null,
            3 => json!(true),
            4 => json!(*self.rng.one(&[-1, 0, 1, 7, i64::MAX])),
            5 => json!(*self.rng.one(&[0.5, -1e300, 1e-9])),
            6 => json!([]),
            7 => json!([null]),
            8 => json!([1, "a", null, {}, []]),
            9 => json!({}),
            10 => json!({"": ""}),
            11 => json!({"name": null, "value": 7}),
            12 => json!([{"name": "a"}, {"name": "a"}]),
            13 => nested(40),
            14 => json!("x".repeat(5000)),
            _ => json!(self.rng.one(TEXTS)),
        }
    }
}

fn nested(depth: usize) -> Value {
    (0..depth).fold(json!({}), |inner, _| json!({"affinity": inner}))
}

fn short(value: &Value) -> String {
    const SHOWN: usize = 80;
    let text = value.to_string();
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}... ({} bytes)", &text[..end], text.len()),
        None => text,
    }
}

/// Text that breaks those who do not expect it.
const TEXTS: &[&str] = &[
    "",
    " ",
    "a",
    "\u{0}",
    "a\nb: c",
    "../../etc/passwd",
    "$(POD_IP)",
    "{{ .Values.x }}",
    "%s%n",
    "'; --",
    "🦀🦀🦀",
    "\u{202e}abc",
    "\u{feff}",
    "Ä",
    "null",
    "true",
    "-1",
    "a/b/c",
    "-a-",
    "a..b",
    "pvc://",
    "hf://a/../b",
];

/// Amounts, right and wrong.
const AMOUNTS: &[&str] = &[
    "1",
    "0",
    "500m",
    "0.5",
    "1e3",
    "1E",
    "1e400",
    "-1",
    "+1",
    ".5",
    "1.",
    "1Zi",
    "1 Gi",
    "",
    "0x10",
    "NaN",
    "0.0000000001",
    "999999999999999Ei",
    "1Kim",
    "١",
];

/// Patches of `spec` whose parts contradict each other, or do not.
const CONTRADICTIONS: &[&str] = &[
    r#"{"disaggregation": {"policy": "Never"}}"#,
    r#"{"disaggregation": {"policy": "Never"}, "prefill": {"replicas": 0}}"#,
    r#"{"disaggregation": {"policy": "Never"}, "prefill": {"replicas": null, "autoscaling": {"provider": "External"}}}"#,
    r#"{"disaggregation": {"policy": "Conditional"}}"#,
    r#"{"disaggregation": {"policy": "Conditional", "minUncachedPromptTokens": 64}}"#,
    r#"{"disaggregation": {"minUncachedPromptTokens": 64}}"#,
    r#"{"prefill": {"replicas": 0}}"#,
    r#"{"decode": {"replicas": 0}}"#,
    r#"{"decode": {"autoscaling": {"provider": "External"}}}"#,
    r#"{"decode": {"replicas": null, "autoscaling": {"provider": "External"}}}"#,
    r#"{"decode": {"nodesPerReplica": 2}}"#,
    r#"{"engine": {"type": "VLLM"}}"#,
    r#"{"engine": {"type": "VLLM", "image": "registry.example.com/vllm:v1"}}"#,
    r#"{"engine": {"type": "VLLM", "image": "registry.example.com/vllm:v1"}, "decode": {"nodesPerReplica": 2}}"#,
    r#"{"engine": {"type": "SGLang", "image": "registry.example.com/sglang:v1", "dtype": "BF16"}}"#,
    r#"{"engine": {"args": ["--role=decode"]}}"#,
    r#"{"engine": {"args": ["--threads=2"]}}"#,
    r#"{"routing": {"standalone": {"replicas": 1}}}"#,
    r#"{"routing": {"mode": "Standalone"}}"#,
    r#"{"routing": {"discovery": "EndpointSlices"}}"#,
    r#"{"observability": {"monitor": "PodMonitor"}}"#,
    r#"{"security": {"networkPolicy": "Disabled"}}"#,
    r#"{"placement": {"colocation": {"topologyKey": "kubernetes.io/hostname", "mode": "Required"}}}"#,
    r#"{"decode": {"maxSequences": 512, "maxBatchTokens": 512}}"#,
    r#"{"prefill": {"prefillChunkTokens": 1024, "maxBatchTokens": 512}}"#,
    r#"{"decode": {"gpu": {"count": 1}, "resources": {"limits": {"nvidia.com/gpu": 1}}}}"#,
    r#"{"decode": {"gpu": {"count": 1, "class": "A", "resourceName": "amd.com/gpu"}}}"#,
    r#"{"decode": {"resources": {"requests": {"cpu": 4}, "limits": {"cpu": 2}}}}"#,
    r#"{"decode": {"resources": {"requests": {"example.com/device": 1}, "limits": {"example.com/device": 2}}}}"#,
    r#"{"decode": {"resources": {"limits": {"cpu": "999999999999999Ei"}}}}"#,
    r#"{"decode": {"env": [{"name": "A", "value": "1"}, {"name": "A", "value": "2"}]}}"#,
    r#"{"decode": {"env": [{"name": "POD_IP", "value": "1"}]}}"#,
    r#"{"decode": {"env": [{"name": "A", "value": "$(POD_IP) $(A) $$"}]}}"#,
    r#"{"decode": {"tolerations": [{"operator": "Exists", "value": "a"}]}}"#,
    r#"{"decode": {"topologySpread": [{"topologyKey": "zone", "maxSkew": 1000, "whenUnsatisfiable": "DoNotSchedule"}]}}"#,
    r#"{"decode": {"nodeSelector": {"no-such-label": "anywhere"}}}"#,
    r#"{"decode": {"priorityClassName": "no-such-class"}}"#,
    r#"{"decode": {"runtimeClassName": "no-such-class"}}"#,
];

/// Patches of `spec` that refer to what is not there.
const REFERENCES: &[&str] = &[
    r#"{"model": {"uri": "pvc://absent/tiny"}}"#,
    r#"{"model": {"uri": "pvc://models"}}"#,
    r#"{"model": {"uri": "hf://org/repo", "revision": "main", "credentialsSecretRef": {"name": "absent"}}}"#,
    r#"{"model": {"uri": "hf://org/repo", "cache": {"type": "PersistentVolumeClaim", "claimName": "absent"}}}"#,
    r#"{"model": {"uri": "s3://bucket/prefix", "region": "eu-central-1", "endpoint": "http://minio:9000"}}"#,
    r#"{"model": {"uri": "oci://registry.example.com/model:v1", "credentialsSecretRef": {"name": "absent"}}}"#,
    r#"{"model": {"credentialsSecretRef": {"name": "absent"}}}"#,
    r#"{"decode": {"env": [{"name": "A", "secretKeyRef": {"name": "absent", "key": "a"}}]}}"#,
    r#"{"decode": {"resourceClaims": [{"name": "gpu", "resourceClaimTemplateName": "absent"}]}}"#,
    r#"{"decode": {"volumes": [{"name": "v", "secret": {"secretName": "absent"}}]}}"#,
    r#"{"decode": {"volumes": [{"name": "v", "persistentVolumeClaim": {"claimName": "absent"}}]}}"#,
    r#"{"engine": {"image": "registry.example.com/never-pulls:v1"}}"#,
    r#"{"engine": {"image": "registry.example.com/crashes:v1"}}"#,
];

/// Patches of a role in what the schema leaves open.
const OVERLAYS: &[&str] = &[
    r#"{"volumes": [{"name": "v", "emptyDir": {}}], "volumeMounts": [{"name": "v", "mountPath": "/v"}]}"#,
    r#"{"volumes": [{"name": "v", "emptyDir": {"sizeLimit": "many"}}]}"#,
    r#"{"volumes": [{"name": "v", "emptyDir": {}, "hostPath": {"path": "/"}}]}"#,
    r#"{"volumes": [{"name": "v", "hostPath": {"path": "/"}}]}"#,
    r#"{"volumes": [{"name": "v", "nfs": {}}]}"#,
    r#"{"volumes": [{"name": "v"}], "volumeMounts": [{"name": "v", "mountPath": "/v", "subPath": "../.."}]}"#,
    r#"{"volumes": [{"name": "v", "emptyDir": {}}], "volumeMounts": [{"name": "v", "mountPath": "/v", "mountPropagation": "Up"}]}"#,
    r#"{"volumeMounts": [{"name": "v", "mountPath": "/models/x"}]}"#,
    r#"{"podTemplate": {"metadata": {"labels": {"baton.dev/model": "other"}}}}"#,
    r#"{"podTemplate": {"metadata": {"labels": {"example.com/team": "-"}}}}"#,
    r#"{"podTemplate": {"metadata": {"annotations": {"a b": "c"}}}}"#,
    r#"{"podTemplate": {"spec": {"schedulerName": "nobody"}}}"#,
    r#"{"podTemplate": {"spec": {"hostNetwork": true}}}"#,
    r#"{"podTemplate": {"spec": {"nodeName": "nowhere"}}}"#,
    r#"{"podTemplate": {"spec": {"serviceAccountName": "absent"}}}"#,
    r#"{"podTemplate": {"spec": {"terminationGracePeriodSeconds": 1}}}"#,
    r#"{"podTemplate": {"spec": {"securityContext": {"runAsUser": -5}}}}"#,
    r#"{"podTemplate": {"spec": {"securityContext": {"runAsNonRoot": false}}}}"#,
    r#"{"podTemplate": {"spec": {"containers": "engine"}}}"#,
    r#"{"podTemplate": {"spec": {"containers": [{"name": "engine", "image": "other"}]}}}"#,
    r#"{"podTemplate": {"spec": {"containers": [{"name": "engine", "securityContext": {"privileged": true}}]}}}"#,
    r#"{"podTemplate": {"spec": {"containers": [{"name": "engine", "resources": {"limits": {"cpu": "lots"}}}]}}}"#,
    r#"{"podTemplate": {"spec": {"containers": [{"name": "engine", "livenessProbe": {"periodSeconds": -1}}]}}}"#,
    r#"{"podTemplate": {"spec": {"containers": [{"name": "engine", "livenessProbe": null}]}}}"#,
    r#"{"podTemplate": {"spec": {"containers": [{"name": "Engine"}]}}}"#,
    r#"{"podTemplate": {"spec": {"containers": [{"name": "log"}]}}}"#,
    r#"{"podTemplate": {"spec": {"containers": [{"name": "log", "image": "a"}, {"name": "log", "image": "b"}]}}}"#,
    r#"{"podTemplate": {"spec": {"initContainers": [{"name": "engine"}]}}}"#,
    r#"{"podTemplate": {"spec": {"tolerations": [{"effect": "Never"}]}}}"#,
    r#"{"podTemplate": {"spec": {"affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {}}}}}}"#,
    r#"{"podTemplate": {"spec": {"topologySpreadConstraints": [{"maxSkew": 0}]}}}"#,
    r#"{"podTemplate": {"spec": {"dnsPolicy": "None"}}}"#,
    r#"{"podTemplate": {"spec": {"volumes": [{"name": "baton-model", "emptyDir": {}}]}}}"#,
    r#"{"podTemplate": {"spec": {"overhead": {"cpu": "1"}}}}"#,
    r#"{"podTemplate": {"spec": {"priority": 7}}}"#,
    r#"{"podTemplate": {"spec": {"hostname": "A_B"}}}"#,
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::operator::manifest::tiny;
    use baton_operator::validate::validate_object;
    use std::collections::BTreeSet;

    #[test]
    fn the_same_seed_gives_the_same_mutants() {
        let row = |seed| -> Vec<Value> {
            let mut mutator = Mutator::new(seed);
            (0..50).map(|_| mutator.mutant(&tiny("m")).manifest).collect()
        };
        assert_eq!(row(7), row(7));
        assert_ne!(row(7), row(8));
    }

    #[test]
    fn every_field_is_reached_from_a_small_manifest() {
        let schema = schema();
        for field in fields(&schema) {
            let mut manifest = tiny("m");
            assert!(set(&mut manifest, &schema, &field.path, json!("here")), "{}", field.name());
            assert!(manifest.to_string().contains("\"here\""), "{}", field.name());
        }
    }

    #[test]
    fn mutants_are_right_and_wrong_in_many_ways() {
        let mut mutator = Mutator::new(1);
        let (mut right, mut wrong) = (0, BTreeSet::new());
        for _ in 0..1000 {
            match validate_object(&mutator.mutant(&tiny("m")).manifest) {
                Ok(_) => right += 1,
                Err(violations) => wrong.extend(violations.into_iter().map(|violation| violation.path)),
            }
        }
        assert!(right > 150, "{right} right ones");
        assert!(wrong.len() > 150, "{} fields named", wrong.len());
    }
}
