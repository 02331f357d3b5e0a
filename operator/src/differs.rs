//! Whether a live object is as it is wanted: pure, so that nothing is written when it is.
//!
//! The wanted object holds our fields alone, the live one those of everybody: defaults, a webhook's containers, an autoscaler's
//! replicas. So what is wanted must be found in the live object, lists that Kubernetes merges item by item in its keys'
//! terms. What the live object says to be ours (`metadata.managedFields`) must still be wanted, else a field that we have ceased
//! to set would stay for ever; and what is wanted must be ours there. The latter is how an addition is seen where Kubernetes
//! takes a value as one (a selector, a policy's peers): whoever adds a key to it becomes the owner of the whole, and our keys
//! are still in it.

use serde_json::{Map, Value};

/// The first field that is not as it is wanted, as a path for people; none where nothing is to be done. `manager` is the field
/// manager whose fields are ours.
pub fn difference(wanted: &Value, live: &Value, manager: &str) -> Option<String> {
    let mut path = Path::default();
    let fields = wanted.as_object()?;
    for (field, wanted) in fields {
        // A LIST leaves these out of its items, and no object changes them.
        if matches!(field.as_str(), "apiVersion" | "kind") {
            continue;
        }
        path.enter(field);
        if let Some(difference) = missing_in(&mut path, wanted, live.get(field)) {
            return Some(difference);
        }
        path.leave();
    }
    let Some(owned) = owned_fields(live, manager) else { return Some("metadata.managedFields".to_owned()) };
    unwanted(&mut Path::default(), owned, Some(wanted)).or_else(|| {
        fields.iter().filter(|(field, _)| !matches!(field.as_str(), "apiVersion" | "kind")).find_map(
            |(field, wanted)| {
                let mut path = Path::default();
                path.enter(field);
                disowned_field(&mut path, wanted, owned.get(format!("f:{field}")))
            },
        )
    })
}

/// Whether `manager` owns `spec.replicas` of a live object by an apply.
pub fn owns_replicas(live: &Value, manager: &str) -> bool {
    owned_fields(live, manager).is_some_and(|fields| fields.pointer("/f:spec/f:replicas").is_some())
}

/// Where the comparison is: the names of the fields above, without list positions.
#[derive(Default)]
struct Path {
    shown: Vec<String>,
}

impl Path {
    fn enter(&mut self, step: impl Into<String>) {
        self.shown.push(step.into());
    }

    fn leave(&mut self) {
        self.shown.pop();
    }

    fn show(&self) -> String {
        self.shown.join(".").replace(".[", "[")
    }

    /// The nearest field's name.
    fn field(&self) -> &str {
        self.shown.iter().rev().map(String::as_str).find(|step| !step.starts_with('[')).unwrap_or_default()
    }

    fn is_within(&self, field: &str) -> bool {
        self.shown.iter().any(|step| step == field)
    }

    /// Whether values here are amounts: `1` and `1000m` are the same.
    fn is_quantity(&self) -> bool {
        let parent = self.shown.len().checked_sub(2).map(|at| self.shown[at].as_str());
        matches!(parent, Some("requests" | "limits" | "capacity" | "hard")) || self.field() == "sizeLimit"
    }
}

/// Maps that the API server leaves out when they are empty; elsewhere an empty object says something (`emptyDir: {}`).
const MAPS: [&str; 9] =
    ["labels", "annotations", "nodeSelector", "matchLabels", "data", "binaryData", "requests", "limits", "selector"];

fn missing_in(path: &mut Path, wanted: &Value, live: Option<&Value>) -> Option<String> {
    let live = match live {
        Some(live) if !live.is_null() => live,
        _ => return (!is_nothing(path, wanted)).then(|| path.show()),
    };
    match (wanted, live) {
        (Value::Null, _) => None,
        (Value::Object(wanted), Value::Object(live)) => wanted.iter().find_map(|(field, wanted)| {
            path.enter(field);
            let difference = missing_in(path, wanted, live.get(field));
            path.leave();
            difference
        }),
        (Value::Array(wanted), Value::Array(live)) => missing_in_list(path, wanted, live),
        _ => (!same_leaf(path, wanted, live)).then(|| path.show()),
    }
}

fn is_nothing(path: &Path, wanted: &Value) -> bool {
    match wanted {
        Value::Null => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty() && MAPS.contains(&path.field()),
        Value::Bool(_) | Value::Number(_) | Value::String(_) => false,
    }
}

fn missing_in_list(path: &mut Path, wanted: &[Value], live: &[Value]) -> Option<String> {
    let Some(keys) = keys(path, wanted) else {
        // Replaced as a whole by whoever writes it, so it is ours as a whole; items may have been completed by defaults.
        if wanted.len() != live.len() {
            return Some(path.show());
        }
        return wanted.iter().zip(live).enumerate().find_map(|(index, (wanted, live))| {
            path.enter(format!("[{index}]"));
            let difference = missing_in(path, wanted, Some(live));
            path.leave();
            difference
        });
    };
    wanted.iter().find_map(|item| {
        let found = live.iter().find(|live| keys.iter().all(|key| key.of(item) == key.of(live)));
        let shown = keys.first().and_then(|key| key.of(item)).map_or_else(String::new, plain);
        path.enter(format!("[{shown}]"));
        let difference = missing_in(path, item, found);
        path.leave();
        difference
    })
}

/// A field that tells the items of a list apart, and what it is where it isn't said.
#[derive(Clone, Copy)]
struct Key {
    field: &'static str,
    default: Option<&'static str>,
}

impl Key {
    const fn new(field: &'static str) -> Self {
        Key { field, default: None }
    }

    fn of(self, item: &Value) -> Option<Value> {
        item.get(self.field).cloned().or_else(|| self.default.map(Value::from))
    }
}

const NAME: &[Key] = &[Key::new("name")];
const TCP: Key = Key { field: "protocol", default: Some("TCP") };
const CONTAINER_PORT: &[Key] = &[Key::new("containerPort"), TCP];
const SERVICE_PORT: &[Key] = &[Key::new("port"), TCP];

/// The keys by which Kubernetes merges a list's items (`x-kubernetes-list-map-keys` in its published schema); none where it
/// replaces the list as a whole.
fn keys(path: &Path, items: &[Value]) -> Option<&'static [Key]> {
    let has = |field: &str| !items.is_empty() && items.iter().all(|item| item.get(field).is_some());
    match path.field() {
        "containers"
        | "initContainers"
        | "ephemeralContainers"
        | "volumes"
        | "env"
        | "imagePullSecrets"
        | "resourceClaims"
        | "schedulingGates"
        | "secrets"
            if has("name") =>
        {
            Some(NAME)
        }
        "claims" if path.is_within("resources") && has("name") => Some(NAME),
        "volumeMounts" => Some(const { &[Key::new("mountPath")] }),
        "volumeDevices" => Some(const { &[Key::new("devicePath")] }),
        "hostAliases" => Some(const { &[Key::new("ip")] }),
        "topologySpreadConstraints" => Some(const { &[Key::new("topologyKey"), Key::new("whenUnsatisfiable")] }),
        "ownerReferences" => Some(const { &[Key::new("uid")] }),
        "ports" if has("containerPort") => Some(CONTAINER_PORT),
        // A Service's; those of a network policy's rules are replaced as a whole.
        "ports" if has("port") && path.shown.len() == 2 => Some(SERVICE_PORT),
        _ => None,
    }
}

fn same_leaf(path: &Path, wanted: &Value, live: &Value) -> bool {
    if wanted == live {
        return true;
    }
    if path.is_quantity() {
        return match (quantity(wanted), quantity(live)) {
            (Some(wanted), Some(live)) => wanted == live,
            _ => false,
        };
    }
    match (wanted.as_f64(), live.as_f64()) {
        (Some(wanted), Some(live)) => wanted == live,
        _ => false,
    }
}

/// An amount in thousand-millionths, as a number or in Kubernetes' notation; none where it is no amount.
fn quantity(value: &Value) -> Option<i128> {
    let text = match value {
        Value::String(text) => text.trim().to_owned(),
        Value::Number(number) => number.to_string(),
        Value::Null | Value::Bool(_) | Value::Array(_) | Value::Object(_) => return None,
    };
    let split = text.find(|c: char| !(c.is_ascii_digit() || matches!(c, '.' | '+' | '-'))).unwrap_or(text.len());
    let (number, suffix) = text.split_at(split);
    // Nano is the smallest that Kubernetes has; finer amounts are rounded up there, and stay different here.
    const NANOS: i128 = 1_000_000_000;
    let (factor, divisor): (i128, i128) = match suffix {
        "n" => (1, 1),
        "u" => (1_000, 1),
        "m" => (1_000_000, 1),
        "" => (NANOS, 1),
        "k" => (NANOS * 1_000, 1),
        "M" => (NANOS * 1_000_000, 1),
        "G" => (NANOS * 1_000_000_000, 1),
        "T" => (NANOS * 1_000_000_000_000, 1),
        "P" => (NANOS * 1_000_000_000_000_000, 1),
        "E" => (NANOS * 1_000_000_000_000_000_000, 1),
        "Ki" => (NANOS << 10, 1),
        "Mi" => (NANOS << 20, 1),
        "Gi" => (NANOS << 30, 1),
        "Ti" => (NANOS << 40, 1),
        "Pi" => (NANOS << 50, 1),
        "Ei" => (NANOS << 60, 1),
        exponent => {
            let exponent: i32 = exponent.strip_prefix(['e', 'E'])?.parse().ok()?;
            let power = 10i128.checked_pow(exponent.unsigned_abs())?;
            if exponent < 0 { (NANOS, power) } else { (NANOS.checked_mul(power)?, 1) }
        }
    };
    let (negative, digits) = match number.strip_prefix('-') {
        Some(digits) => (true, digits),
        None => (false, number.strip_prefix('+').unwrap_or(number)),
    };
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    if whole.is_empty() && fraction.is_empty() {
        return None;
    }
    let scale = 10i128.checked_pow(u32::try_from(fraction.len()).ok()?)?;
    let all: i128 = format!("{whole}{fraction}").parse().ok()?;
    let scaled = all.checked_mul(factor)?;
    let divisor = scale.checked_mul(divisor)?;
    let value = (scaled % divisor == 0).then_some(scaled / divisor)?;
    Some(if negative { -value } else { value })
}

/// The fields that a manager has applied to an object itself (its subresources have owners of their own), or those that it
/// created the object with, where it has not applied it since.
fn owned_fields<'a>(live: &'a Value, manager: &str) -> Option<&'a Value> {
    let entries = live.pointer("/metadata/managedFields")?.as_array()?;
    let of = |operation: &str| {
        entries.iter().find(|entry| {
            entry.get("manager").and_then(Value::as_str) == Some(manager)
                && entry.get("operation").and_then(Value::as_str) == Some(operation)
                && entry.get("subresource").and_then(Value::as_str).unwrap_or_default().is_empty()
        })
    };
    of("Apply").or_else(|| of("Update"))?.get("fieldsV1")
}

/// The first wanted value that is not ours. `owned` is what is owned at this place: nothing, the value as a whole (an empty
/// object), or some of what is in it.
fn disowned_field(path: &mut Path, wanted: &Value, owned: Option<&Value>) -> Option<String> {
    let is_identity =
        path.shown.len() == 2 && path.is_within("metadata") && matches!(path.field(), "name" | "namespace");
    if is_nothing(path, wanted) || is_identity {
        return None;
    }
    let owned = match owned.and_then(Value::as_object) {
        None => {
            return match wanted {
                // Of an object's own metadata, nothing but its name may be wanted.
                Value::Object(fields) if path.shown.len() == 1 => fields.iter().find_map(|(field, wanted)| {
                    path.enter(field);
                    let difference = disowned_field(path, wanted, None);
                    path.leave();
                    difference
                }),
                _ => Some(path.show()),
            };
        }
        Some(owned) if owned.is_empty() => return None,
        Some(owned) => owned,
    };
    match wanted {
        Value::Object(fields) => fields.iter().find_map(|(field, wanted)| {
            path.enter(field);
            let difference = disowned_field(path, wanted, owned.get(&format!("f:{field}")));
            path.leave();
            difference
        }),
        Value::Array(items) => items.iter().enumerate().find_map(|(index, item)| {
            path.enter(format!("[{index}]"));
            let difference = disowned_field(path, item, owned_item(item, owned));
            path.leave();
            difference
        }),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => None,
    }
}

/// What is owned of a list's item.
fn owned_item<'a>(item: &Value, owned: &'a Map<String, Value>) -> Option<&'a Value> {
    owned.iter().find_map(|(step, deeper)| {
        let is_it = match step.split_once(':')? {
            ("k", keys) => is_item(item, &serde_json::from_str(keys).ok()?),
            ("v", value) => *item == serde_json::from_str::<Value>(value).ok()?,
            _ => false,
        };
        is_it.then_some(deeper)
    })
}

/// Whether an item is the one with these keys. A key that we leave to its default (a port's protocol) is no difference.
fn is_item(item: &Value, keys: &Map<String, Value>) -> bool {
    keys.iter().all(|(key, value)| item.get(key).is_none_or(|found| found == value))
}

/// The first field of ours that is not wanted any more. Fields are written as `f:name`, a list's items as `k:{keys}` or `v:value`,
/// and `.` for the place itself.
fn unwanted(path: &mut Path, owned: &Value, wanted: Option<&Value>) -> Option<String> {
    let owned: &Map<String, Value> = owned.as_object()?;
    let Some(wanted) = wanted else { return Some(path.show()) };
    owned.iter().find_map(|(step, deeper)| {
        let (kind, name) = step.split_once(':').unwrap_or((step, ""));
        let found = match kind {
            "f" => wanted.get(name),
            "k" => {
                let keys: Map<String, Value> = serde_json::from_str(name).ok()?;
                let items = wanted.as_array().map(Vec::as_slice).unwrap_or_default();
                items.iter().find(|item| is_item(item, &keys))
            }
            "v" => {
                let value: Value = serde_json::from_str(name).ok()?;
                wanted.as_array().map(Vec::as_slice).unwrap_or_default().iter().find(|item| **item == value)
            }
            // `.`, the place itself, and anything that a later version adds.
            _ => return None,
        };
        path.enter(if kind == "f" { name.to_owned() } else { format!("[{name}]") });
        let difference = match found {
            // A default key of an item is owned although it is not among what we say.
            None if is_default_key(path, name) => None,
            found => unwanted(path, deeper, found),
        };
        path.leave();
        difference
    })
}

/// Whether a field that we own without having said it is a list key that the API server completed.
fn is_default_key(path: &Path, name: &str) -> bool {
    name == "protocol" && path.is_within("ports")
}

fn plain(value: Value) -> String {
    match value {
        Value::String(text) => text,
        other => other.to_string(),
    }
}

#[cfg(test)]
#[path = "differs_tests.rs"]
mod tests;
