//! What containers ask of a node, where the manifest does not say.
//!
//! Our proxy and our download have requests and limits. An engine has requests alone: how much a model takes, only the
//! model knows, and a limit that guessed would kill it while it loads; a limit on CPU would make it wait in the middle of
//! a token although the node idles. Whoever wants limits states them in `resources.limits`.

use crate::RoleSettings;
use crate::validated::EngineKind;
use k8s_openapi::api::core::v1::{ResourceClaim, ResourceRequirements};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use std::collections::BTreeMap;

const CPU: &str = "cpu";
const MEMORY: &str = "memory";

/// Memory of an engine beyond its KV cache that is asked for: program, activations of a step, weights of a small model.
/// Weights of a large one are the user's to add, in `resources.requests.memory`.
const ENGINE_MEMORY: u64 = 1 << 30;
const MIB: u64 = 1 << 20;

/// An engine's resources: the manifest's, and requests for CPU and memory where it names neither request nor limit
/// (a limit without a request is a request too, so ours would be in its way).
pub(super) fn of_engine(kind: EngineKind, settings: &RoleSettings) -> ResourceRequirements {
    let pod = &settings.pod;
    let mut requests = pod.requests.clone();
    let defaults = [(CPU, "1".to_owned()), (MEMORY, binary(host_memory(kind, settings)))];
    for (name, amount) in defaults {
        if !pod.limits.contains_key(name) {
            requests.entry(name.to_owned()).or_insert(Quantity(amount));
        }
    }
    let claims = pod.resource_claims.iter().map(|claim| ResourceClaim { name: claim.name.clone(), request: None });
    ResourceRequirements {
        requests: some(requests),
        limits: some(pod.limits.clone()),
        claims: super::pod::some(claims.collect()),
    }
}

/// The proxy's. Memory: 512 requests at once with 1 MiB of body and state each, and as much again for other pods' legs.
pub(super) fn of_proxy() -> ResourceRequirements {
    fixed([(CPU, "100m"), (MEMORY, "64Mi")], [(CPU, "2"), (MEMORY, "1Gi")])
}

/// The download's: it keeps a few pieces of files in memory, and hashes them.
pub(super) fn of_download() -> ResourceRequirements {
    fixed([(CPU, "500m"), (MEMORY, "256Mi")], [(CPU, "2"), (MEMORY, "1Gi")])
}

/// Memory of the node, not of a device: where another engine has devices, its KV cache is there.
fn host_memory(kind: EngineKind, settings: &RoleSettings) -> u64 {
    let pod = &settings.pod;
    // Names of devices have a domain: nvidia.com/gpu.
    let has_devices = !pod.resource_claims.is_empty() || pod.limits.keys().any(|name| name.contains('/'));
    let kv_cache = match kind {
        EngineKind::Baton => settings.kv_cache_bytes.get(),
        EngineKind::Vllm | EngineKind::Sglang if has_devices => 0,
        EngineKind::Vllm | EngineKind::Sglang => settings.kv_cache_bytes.get(),
    };
    kv_cache.saturating_add(ENGINE_MEMORY)
}

/// An amount of memory as Kubernetes itself would write it: whole MiB, in the largest unit that divides it.
fn binary(bytes: u64) -> String {
    let mut amount = bytes.div_ceil(MIB);
    let mut units = ["Mi", "Gi", "Ti", "Pi"].into_iter().peekable();
    loop {
        let unit = units.next().unwrap_or("Ei");
        if !amount.is_multiple_of(1024) || unit == "Ei" {
            return format!("{amount}{unit}");
        }
        amount /= 1024;
    }
}

fn fixed(requests: [(&str, &str); 2], limits: [(&str, &str); 2]) -> ResourceRequirements {
    let map = |entries: [(&str, &str); 2]| {
        entries.map(|(name, amount)| (name.to_owned(), Quantity(amount.to_owned()))).into()
    };
    ResourceRequirements { requests: Some(map(requests)), limits: Some(map(limits)), claims: None }
}

fn some(amounts: BTreeMap<String, Quantity>) -> Option<BTreeMap<String, Quantity>> {
    Some(amounts).filter(|amounts| !amounts.is_empty())
}

#[cfg(test)]
mod tests {
    use super::binary;

    #[test]
    fn memory_is_written_in_the_largest_unit_that_divides_it() {
        for (bytes, expect) in
            [(1, "1Mi"), (1 << 30, "1Gi"), ((1 << 30) + (128 << 20), "1152Mi"), (u64::MAX, "16Ei"), (5 << 40, "5Ti")]
        {
            assert_eq!(binary(bytes), expect, "{bytes}");
        }
    }
}
